import torch
import torch.nn as nn
import torch.nn.functional as F

from tllib.modules.classifier import Classifier as ClassifierBase
from tllib.modules.classifier import bottleneck_of


class ClassBalanceLoss(nn.Module):
    def __init__(self, num_classes):
        super(ClassBalanceLoss, self).__init__()
        self.uniform_distribution = torch.full((num_classes,), 1.0 / num_classes)

    def forward(self, p):
        return F.binary_cross_entropy(p.mean(dim=0), self.uniform_distribution.to(p.device))


class ImageClassifier(ClassifierBase):
    def __init__(self, backbone, num_classes, bottleneck_dim=256, **kwargs):
        bottleneck = bottleneck_of(backbone.out_features, bottleneck_dim)
        super(ImageClassifier, self).__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
