"""Schedules of a decay factor, for the ``schedule`` of
:class:`~tllib_rs.self_training.mean_teacher.EMATeacher`: any callable from the number of the update, starting
at 1, to the factor."""

from dataclasses import dataclass

__all__ = ["WarmUp"]


@dataclass(frozen=True)
class WarmUp:
    r"""The warm-up of timm's ``ModelEmaV3``: with k = step - start - 1,

    .. math::
        \alpha_{step} = \max(\min(1 - (1 + k / gamma)^{-power},\ alpha),\ min\_alpha)

    and 0, which copies the student, as long as k <= 0. With ``power`` 2/3 the factor reaches 0.999 after
    31,600 updates and 0.9999 after a million; with 3/4 after 10,000 and 215,000; ``gamma = power = 1`` is the
    plain mean of all students from the last copied one on.

    Args:
        alpha (float): the final factor.
        gamma (float): positive; larger is slower.
        power (float): positive; larger is faster.
        min_alpha (float): the least factor once k > 0.
        start (int): updates before the warm-up that copy the student, besides the first.

    Raises:
        ValueError: an argument is out of its range.
    """

    alpha: float
    gamma: float = 1.0
    power: float = 2 / 3
    min_alpha: float = 0.0
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "min_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"WarmUp: {name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("gamma", "power"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"WarmUp: {name} must be positive and finite, got {getattr(self, name)}")
        if not self.start >= 0:
            raise ValueError(f"WarmUp: start must not be negative, got {self.start}")

    def __call__(self, step: int) -> float:
        k = step - self.start - 1
        if k <= 0:
            return 0.0
        return max(min(1 - (1 + k / self.gamma) ** -self.power, self.alpha), self.min_alpha)
