from .resnet import *

__all__ = ["resnet"]
