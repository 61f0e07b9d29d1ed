"""FlexMatch's thresholds by counting all samples at every step, as tllib does."""

from collections import Counter

import torch


class DynamicThresholdingModule:
    """The state is the label of every sample."""

    def __init__(self, threshold, warmup, mapping_func, num_classes, n_unlabeled_samples, device):
        self.threshold, self.warmup, self.mapping_func = threshold, warmup, mapping_func
        self.num_classes, self.device = num_classes, device
        self.net_outputs = torch.full((n_unlabeled_samples,), -1, device=device)

    def status(self):
        """Counts over the largest count."""
        counts = Counter(self.net_outputs.tolist())
        if max(counts.values()) == len(self.net_outputs):
            return torch.zeros(self.num_classes, device=self.device)
        if not self.warmup:
            counts.pop(-1, None)
        largest = max(counts.values())
        return torch.tensor([counts[c] / largest for c in range(self.num_classes)], dtype=torch.float32).to(
            self.device
        )

    def get_threshold(self, pseudo_labels):
        """The threshold of each label."""
        return self.threshold * self.mapping_func(self.status()[pseudo_labels])

    def update(self, idxes, selected_mask, pseudo_labels):
        """Note the selected labels; of equal indices the last one stays."""
        chosen = selected_mask == 1
        if idxes[chosen].nelement() != 0:
            self.net_outputs[idxes[chosen]] = pseudo_labels[chosen]
