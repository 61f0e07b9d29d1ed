"""Unrelated to our modules."""


class Meter:
    """Keeps a mean."""

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value):
        self.sum, self.count = self.sum + value, self.count + 1

    @property
    def mean(self):
        return self.sum / self.count
