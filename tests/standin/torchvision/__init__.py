"""A torchvision of today: no ``model_urls``."""
