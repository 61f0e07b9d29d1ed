from collections import Counter

import torch


class DynamicThresholdingModule(object):
    def __init__(self, threshold, warmup, mapping_func, num_classes, n_unlabeled_samples, device):
        self.threshold, self.warmup, self.mapping_func = threshold, warmup, mapping_func
        self.num_classes, self.n_unlabeled_samples, self.device = num_classes, n_unlabeled_samples, device
        self.net_outputs = torch.full((n_unlabeled_samples,), -1, dtype=torch.long, device=device)

    def get_threshold(self, pseudo_labels):
        counts = Counter(self.net_outputs.tolist())
        status = torch.zeros(self.num_classes)
        if max(counts.values()) < self.n_unlabeled_samples:
            if not self.warmup:
                counts.pop(-1, None)
            most = max(counts.values())
            status = torch.tensor([counts[c] / most for c in range(self.num_classes)], dtype=torch.float)
        return self.threshold * self.mapping_func(status.to(self.device)[pseudo_labels])

    def update(self, idxes, selected_mask, pseudo_labels):
        chosen = selected_mask == 1
        self.net_outputs[idxes[chosen]] = pseudo_labels[chosen]
