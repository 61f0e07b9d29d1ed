import torch
import torch.nn as nn
from torch.nn.functional import normalize

from tllib.modules.classifier import Classifier as ClassifierBase
from tllib.modules.classifier import bottleneck_of


class Classifier(ClassifierBase):
    def __init__(
        self,
        backbone,
        num_classes,
        projection_dim=1024,
        bottleneck_dim=1024,
        finetune=True,
        pool_layer=None,
    ):
        bottleneck = bottleneck_of(backbone.out_features, bottleneck_dim, nn.Dropout(0.5))
        bottleneck[0].weight.data.normal_(0, 0.005)
        bottleneck[0].bias.data.fill_(0.1)
        head = nn.Linear(1024, num_classes)
        super(Classifier, self).__init__(
            backbone, num_classes, bottleneck, bottleneck_dim, head, finetune, pool_layer
        )
        self.projector = nn.Linear(1024, projection_dim)
        self.projection_dim = projection_dim

    def forward(self, x):
        f = self.bottleneck(self.pool_layer(self.backbone(x)))
        h = normalize(self.projector(f), dim=1)
        y = self.head(f)
        return (h, y) if self.training else y

    def get_parameters(self, base_lr=1.0):
        slow = (0.1 if self.finetune else 1.0) * base_lr
        groups = super(Classifier, self).get_parameters(base_lr)
        return [*groups, {"params": self.projector.parameters(), "lr": slow}]


class SelfTuning(nn.Module):
    def __init__(self, encoder_q, encoder_k, num_classes, K=32, m=0.999, T=0.07):
        super(SelfTuning, self).__init__()
        self.K, self.m, self.T, self.num_classes = K, m, T, num_classes
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        for q, k in zip(encoder_q.parameters(), encoder_k.parameters()):
            k.data.copy_(q.data)
            k.requires_grad = False
        queue = torch.randn(encoder_q.projection_dim, K * num_classes)
        self.register_buffer("queue_list", normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(num_classes, dtype=torch.long))

    def forward(self, im_q, im_k, labels):
        h_q, y_q = self.encoder_q(im_q)
        with torch.no_grad():
            for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
                k.data = self.m * k.data + (1.0 - self.m) * q.data
            h_k, _ = self.encoder_k(im_k)
        queue = self.queue_list.clone()
        rows = []
        for i, label in enumerate(labels.tolist()):
            own = torch.arange(label * self.K, (label + 1) * self.K)
            others = [j for j in range(queue.shape[1]) if j // self.K != label]
            keys = torch.cat([h_k[i][:, None], queue[:, own], queue[:, others]], dim=1)
            rows.append(h_q[i] @ keys)
            at = int(self.queue_ptr[label])
            self.queue_list[:, label * self.K + at] = h_k[i]
            self.queue_ptr[label] = (at + 1) % self.K
        logits = (torch.stack(rows) / self.T).log_softmax(dim=1)
        targets = torch.zeros_like(logits)
        targets[:, : self.K + 1] = 1.0 / (self.K + 1)
        return logits, targets, y_q
