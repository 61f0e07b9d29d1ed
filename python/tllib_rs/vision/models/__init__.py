"""Models of computer vision."""
