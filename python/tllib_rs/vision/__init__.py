"""Models and losses of computer vision."""
