from torchvision.models.resnet import model_urls  # gone since torchvision 0.13

__all__ = ["resnet18"]


def resnet18():
    return model_urls["resnet18"]
