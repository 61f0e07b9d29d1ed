import torch.nn as nn
import torch.nn.functional as F


class ConfidenceBasedSelfTrainingLoss(nn.Module):
    def __init__(self, threshold):
        super(ConfidenceBasedSelfTrainingLoss, self).__init__()
        self.threshold = threshold

    def forward(self, y, y_target):
        confidence, labels = y_target.detach().softmax(dim=1).max(dim=1)
        mask = (confidence > self.threshold).float()
        return (mask * F.cross_entropy(y, labels, reduction="none")).mean(), mask, labels
