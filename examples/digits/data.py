"""The digits: split, batches, and weak and strong views of whole batches at a time."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images are (n, 1, 8, 8) in [0, 1]."""

    images: torch.Tensor
    labels: torch.Tensor
    unlabelled: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def split_digits(seed: int, labels_per_class: int) -> Split:
    """Hold out a third for testing, whatever the seed; the seed draws which of the rest are labelled."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    labelled, unlabelled = train_test_split(
        train, train_size=NUM_CLASSES * labels_per_class, stratify=labels[train], random_state=seed
    )
    return Split(images[labelled], labels[labelled], images[unlabelled], images[test], labels[test])


class Batches:
    """Indices in random order, for ever; each epoch drops its incomplete batch."""

    def __init__(self, n: int, batch_size: int):
        self.n, self.batch_size = n, batch_size
        self.order, self.position = torch.empty(0, dtype=torch.int64), 0

    def __next__(self) -> torch.Tensor:
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = torch.randperm(self.n), 0
        self.position += self.batch_size
        return self.order[self.position - self.batch_size : self.position]

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Where in which order."""
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Go on from there."""
        self.order, self.position = state["order"], state["position"]


# Augmentation: one call for a whole batch ------------------------------------------------------------------


def uniform(radius: float, *shape: int) -> torch.Tensor:
    """Uniform in [-radius, radius]."""
    return (2 * torch.rand(shape) - 1) * radius


def affine(
    images: torch.Tensor, shift: float, degrees: float = 0, scale: float = 0, shear: float = 0
) -> torch.Tensor:
    """Each image under its own random affine map; the shift is in pixels."""
    n = len(images)
    angle, skew, pixel = uniform(math.radians(degrees), n), uniform(shear, n), 2 / images.shape[-1]
    scale_x, scale_y = 1 + uniform(scale, n), 1 + uniform(scale, n)
    theta = torch.stack(
        [
            torch.stack([angle.cos() * scale_x, skew - angle.sin() * scale_y, uniform(shift * pixel, n)], 1),
            torch.stack([angle.sin() * scale_x, angle.cos() * scale_y, uniform(shift * pixel, n)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cutout(images: torch.Tensor, size: int) -> torch.Tensor:
    """Black out a square of each image, at a random place that may reach over the border."""
    n, _, height, width = images.shape
    rows = torch.arange(height) - torch.randint(1 - size, height, (n, 1))
    columns = torch.arange(width) - torch.randint(1 - size, width, (n, 1))
    inside_rows, inside_columns = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
    return images.masked_fill((inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1), 0)


def weak(images: torch.Tensor) -> torch.Tensor:
    """Shifts of up to a pixel and small rotations."""
    return affine(images, shift=1, degrees=10)


def strong(images: torch.Tensor) -> torch.Tensor:
    """Shift, rotation, scale and shear, then contrast, noise and cutout."""
    images = affine(images, shift=1.5, degrees=25, scale=0.2, shear=0.2)
    images = images * (1 + uniform(0.4, len(images), 1, 1, 1)) + 0.1 * torch.randn_like(images)
    return cutout(images, size=3)
