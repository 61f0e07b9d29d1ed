import torch
import torch.nn as nn
import torch.nn.functional as F


def pairwise_euclidean_distance(x, y):
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :]
    return (squares - 2 * x @ y.t()).clamp(min=1e-12).sqrt()


def hard_examples_mining(dist_mat, identity_mat, return_idxes=False):
    ap, ap_at = (dist_mat - 1e7 * (1 - identity_mat)).sort(dim=1, descending=True)
    an, an_at = (dist_mat + 1e7 * identity_mat).sort(dim=1)
    found = ap[:, 0], an[:, 0]
    return (*found, ap_at[:, 0], an_at[:, 0]) if return_idxes else found


def _same(labels, others):
    return (labels[:, None] == others[None, :]).float()


class CrossEntropyLossWithLabelSmooth(nn.Module):
    def __init__(self, num_classes, epsilon=0.1):
        super(CrossEntropyLossWithLabelSmooth, self).__init__()
        self.num_classes, self.epsilon = num_classes, epsilon

    def forward(self, y, labels):
        target = torch.zeros_like(y).scatter_(1, labels[:, None], 1 - self.epsilon)
        target = target + self.epsilon / self.num_classes
        return -(target * y.log_softmax(dim=1)).sum(dim=1).mean()


class TripletLoss(nn.Module):
    def __init__(self, margin, normalize_feature=False):
        super(TripletLoss, self).__init__()
        self.margin, self.normalize_feature = margin, normalize_feature
        self.margin_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, f, labels):
        f = F.normalize(f) if self.normalize_feature else f
        ap, an = hard_examples_mining(pairwise_euclidean_distance(f, f), _same(labels, labels))
        return self.margin_loss(an, ap, torch.ones_like(an))


class TripletLossXBM(nn.Module):
    def __init__(self, margin=0.3, normalize_feature=False):
        super(TripletLossXBM, self).__init__()
        self.margin, self.normalize_feature = margin, normalize_feature
        self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, f, labels, xbm_f, xbm_labels):
        if self.normalize_feature:
            f, xbm_f = F.normalize(f), F.normalize(xbm_f)
        ap, an = hard_examples_mining(pairwise_euclidean_distance(f, xbm_f), _same(labels, xbm_labels))
        return self.ranking_loss(an, ap, torch.ones_like(an))


class SoftTripletLoss(nn.Module):
    def __init__(self, margin=None, normalize_feature=False):
        super(SoftTripletLoss, self).__init__()
        self.margin, self.normalize_feature = margin, normalize_feature

    def forward(self, features_1, features_2, labels):
        if self.normalize_feature:
            features_1, features_2 = F.normalize(features_1), F.normalize(features_2)
        mined = hard_examples_mining(
            pairwise_euclidean_distance(features_1, features_1), _same(labels, labels), return_idxes=True
        )
        log_p = torch.stack(mined[:2], dim=1).log_softmax(dim=1)
        if self.margin is not None:
            target = torch.tensor([self.margin, 1 - self.margin], dtype=log_p.dtype, device=log_p.device)
        else:
            teacher = pairwise_euclidean_distance(features_2, features_2)
            pairs = [teacher.gather(1, at[:, None])[:, 0] for at in mined[2:]]
            target = torch.stack(pairs, dim=1).softmax(dim=1).detach()
        return -(target * log_p).sum(dim=1).mean()


class CrossEntropyLoss(nn.Module):
    def forward(self, y, labels):
        return -(labels.softmax(dim=1).detach() * y.log_softmax(dim=1)).sum(dim=1).mean()
