"""The residual networks, without the addresses of their weights."""
