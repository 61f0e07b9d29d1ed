"""The methods inside other libraries. Each module needs its library and is imported only when asked for."""
