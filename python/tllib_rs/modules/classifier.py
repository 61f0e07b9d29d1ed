"""The classifier that tllib's methods share."""

from typing import Any

import torch
from torch import nn

__all__ = ["Classifier", "ImageClassifier"]


class Classifier(nn.Module):
    """Backbone, pooling, bottleneck and head.

    Args:
        backbone (torch.nn.Module): extracts features; needs ``out_features`` where no bottleneck is given.
        num_classes (int): number of classes.
        bottleneck (torch.nn.Module, optional): between pooling and head. Default: none
        bottleneck_dim (int, optional): its width; above 0 where a bottleneck is given. Default: -1
        head (torch.nn.Module, optional): the classifier. Default: a linear layer
        finetune (bool): whether the backbone is pre-trained and learns at a tenth of the rate. Default: True
        pool_layer (torch.nn.Module, optional): after the backbone. Default: average pooling and flattening

    Inputs:
        - x (tensor): input of the backbone, (minibatch, ...).

    Returns:
        predictions (minibatch, num_classes); in training mode or with ``return_feat`` also the features
        (minibatch, features_dim).

    Raises:
        AssertionError: a bottleneck without its width, as in tllib (also a ValueError).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck: nn.Module | None = None,
        bottleneck_dim: int | None = -1,
        head: nn.Module | None = None,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        if pool_layer is None:
            pool_layer = nn.Sequential(nn.AdaptiveAvgPool2d(output_size=(1, 1)), nn.Flatten())
        self.pool_layer = pool_layer
        if bottleneck is None:
            self.bottleneck = nn.Identity()
            self._features_dim = backbone.out_features
        else:
            if not bottleneck_dim or bottleneck_dim <= 0:
                raise BottleneckError(
                    f"Classifier: bottleneck_dim must be above 0 with a bottleneck, got {bottleneck_dim}"
                )
            self.bottleneck = bottleneck
            self._features_dim = bottleneck_dim
        self.head = nn.Linear(self._features_dim, num_classes) if head is None else head
        self.finetune = finetune

    @property
    def features_dim(self) -> int:
        """The width of the features in front of the head."""
        return self._features_dim

    def forward(self, x: torch.Tensor, return_feat: bool = False) -> Any:
        """See the class."""
        features = self.bottleneck(self.pool_layer(self.backbone(x)))
        predictions = self.head(features)
        return (predictions, features) if self.training or return_feat else predictions

    def get_parameters(self, base_lr: float = 1.0) -> list[dict[str, Any]]:
        """Parameter groups with the learning rate of each part."""
        return [
            {"params": self.backbone.parameters(), "lr": (0.1 if self.finetune else 1.0) * base_lr},
            {"params": self.bottleneck.parameters(), "lr": 1.0 * base_lr},
            {"params": self.head.parameters(), "lr": 1.0 * base_lr},
        ]


class BottleneckError(ValueError, AssertionError):
    """A bottleneck without its width. tllib asserts here, so it can be caught as AssertionError too."""


class ImageClassifier(Classifier):
    """The same class, under the name that image scripts use."""
