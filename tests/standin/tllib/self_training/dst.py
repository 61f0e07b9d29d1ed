import torch
import torch.nn as nn
import torch.nn.functional as F

from tllib.modules.classifier import Classifier, bottleneck_of
from tllib.modules.grl import WarmStartGradientReverseLayer


def _head(width_in, width, classes):
    return nn.Sequential(nn.Linear(width_in, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, classes))


class ImageClassifier(Classifier):
    def __init__(self, backbone, num_classes, bottleneck_dim=1024, width=2048, **kwargs):
        bottleneck = bottleneck_of(backbone.out_features, bottleneck_dim, nn.Dropout(0.5))
        bottleneck[0].weight.data.normal_(0, 0.005)
        bottleneck[0].bias.data.fill_(0.1)
        super(ImageClassifier, self).__init__(backbone, num_classes, bottleneck, bottleneck_dim, **kwargs)
        self.pseudo_head = _head(bottleneck_dim, width, num_classes)
        self.grl_layer = WarmStartGradientReverseLayer(hi=0.1, max_iters=1000)
        self.adv_head = _head(bottleneck_dim, width, num_classes)

    def forward(self, x):
        f = self.bottleneck(self.pool_layer(self.backbone(x)))
        adversarial = self.adv_head(self.grl_layer(f))
        y, pseudo = self.head(f), self.pseudo_head(f)
        return (y, adversarial, pseudo) if self.training else y

    def get_parameters(self, base_lr=1.0):
        heads = [{"params": h.parameters(), "lr": base_lr} for h in (self.pseudo_head, self.adv_head)]
        return super(ImageClassifier, self).get_parameters(base_lr) + heads

    def step(self):
        self.grl_layer.step()


def shift_log(x, offset=1e-6):
    return (x + offset).clamp(max=1.0).log()


class WorstCaseEstimationLoss(nn.Module):
    def __init__(self, eta_prime):
        super(WorstCaseEstimationLoss, self).__init__()
        self.eta_prime = eta_prime

    def forward(self, y_l, y_l_adv, y_u, y_u_adv):
        labelled = F.cross_entropy(y_l_adv, y_l.argmax(dim=1))
        unlabelled = F.nll_loss(shift_log(1.0 - y_u_adv.softmax(dim=1)), y_u.argmax(dim=1))
        return self.eta_prime * labelled + unlabelled
