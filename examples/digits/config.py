"""The settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its seed and its method."""

    iterations: int = 1000
    labels_per_class: int = 4
    unlabelled_batch: int = 128
    width: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    ema_alpha: float = 0.99
    threshold: float = 0.95
    evaluations: int = 40

    def is_evaluated(self, iteration: int) -> bool:
        """Evenly spaced, the last iteration among them."""
        every = max(self.iterations // self.evaluations, 1)
        return iteration % every == 0 or iteration == self.iterations
