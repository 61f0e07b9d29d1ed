"""Self-tuning's step row by row in plain PyTorch."""

import torch


def log_probabilities(h_q, h_k, labels, queue, keys, temperature):
    """Each query against its key, its own class's part of the queue, and the rest in order."""
    rows = []
    for q, k, label in zip(h_q, h_k, labels.tolist(), strict=True):
        parts = list(queue.split(keys, dim=1))
        own = parts.pop(label)
        against = torch.cat([k[:, None], own, *parts], dim=1)
        rows.append(q @ against / temperature)
    return torch.stack(rows).log_softmax(dim=1)


def enqueue(h_k, labels, queue, pointers, keys):
    """Write the keys one by one, in place."""
    for k, label in zip(h_k, labels.tolist(), strict=True):
        queue[:, label * keys + pointers[label]] = k
        pointers[label] = (pointers[label] + 1) % keys


def step(h_q, h_k, labels, queue, pointers, keys, temperature):
    """The log-probabilities against the queue as it is, and then the new keys."""
    out = log_probabilities(h_q, h_k.detach(), labels, queue.clone(), keys, temperature)
    enqueue(h_k.detach(), labels, queue, pointers, keys)
    return out
