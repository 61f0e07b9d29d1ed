import torch
import torch.nn as nn

from tllib.modules.classifier import Classifier as ClassifierBase
from tllib.modules.classifier import bottleneck_of

from ..modules.entropy import entropy

__all__ = ["MinimumClassConfusionLoss", "ImageClassifier"]


def confusion(predictions, rows):
    """The normalized confusion matrix of both modules that use one."""
    weight = 1 + torch.exp(-entropy(predictions).detach())
    weight = rows * weight / weight.sum()
    matrix = (weight[:, None] * predictions).t() @ predictions
    return matrix / matrix.sum(dim=1)


class MinimumClassConfusionLoss(nn.Module):
    def __init__(self, temperature):
        super(MinimumClassConfusionLoss, self).__init__()
        self.temperature = temperature

    def forward(self, logits):
        matrix = confusion((logits / self.temperature).softmax(dim=1), len(logits))
        return (matrix.sum() - matrix.trace()) / logits.shape[1]


class ImageClassifier(ClassifierBase):
    def __init__(self, backbone, num_classes, bottleneck_dim=256, **kwargs):
        bottleneck = bottleneck_of(backbone.out_features, bottleneck_dim)
        super(ImageClassifier, self).__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
