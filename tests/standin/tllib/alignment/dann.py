"""A module that we do not provide, with names of modules that we do."""

from tllib.modules.classifier import Classifier as ClassifierBase

from ..modules.entropy import entropy
from ..modules.grl import WarmStartGradientReverseLayer


class ImageClassifier(ClassifierBase):
    """A subclass that tllib makes of a class that we replace."""


class DomainLoss:
    """Uses both."""

    def __init__(self):
        self.grl = WarmStartGradientReverseLayer(hi=1.0)

    def __call__(self, f, p):
        return (self.grl(f) ** 2).mean() + entropy(p, "mean")
