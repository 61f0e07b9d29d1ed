"""Beside the module that we provide; it needs the packages above to import."""
