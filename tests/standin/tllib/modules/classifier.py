import torch.nn as nn

__all__ = ["Classifier"]


class Classifier(nn.Module):
    def __init__(
        self,
        backbone,
        num_classes,
        bottleneck=None,
        bottleneck_dim=-1,
        head=None,
        finetune=True,
        pool_layer=None,
    ):
        super(Classifier, self).__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.pool_layer = pool_layer or nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        assert bottleneck is None or bottleneck_dim > 0
        self.bottleneck = bottleneck or nn.Identity()
        self._features_dim = backbone.out_features if bottleneck is None else bottleneck_dim
        self.head = head or nn.Linear(self._features_dim, num_classes)
        self.finetune = finetune

    @property
    def features_dim(self):
        return self._features_dim

    def features(self, x):
        return self.bottleneck(self.pool_layer(self.backbone(x)))

    def forward(self, x, return_feat=False):
        f = self.features(x)
        y = self.head(f)
        return (y, f) if self.training or return_feat else y

    def get_parameters(self, base_lr=1.0):
        rates = [(self.backbone, 0.1 if self.finetune else 1.0), (self.bottleneck, 1.0), (self.head, 1.0)]
        return [{"params": part.parameters(), "lr": rate * base_lr} for part, rate in rates]


class ImageClassifier(Classifier):
    pass


def bottleneck_of(width_in, width, *more):
    """What the stand-in's classifiers share."""
    return nn.Sequential(nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.ReLU(), *more)
