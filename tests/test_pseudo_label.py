"""Pseudo labels."""

import pytest
import torch

from tests import golden
from tllib_rs.self_training.pseudo_label import ConfidenceBasedSelfTrainingLoss


@pytest.mark.parametrize("case", golden.cases("pseudo_label"), ids=repr)
def test_golden(case, precision):
    inputs = case.inputs(precision)
    if "y_target" in inputs:
        case.requires_grad(inputs)
        target = inputs["y_target"]
    else:  # the very tensor y
        target = inputs["y"].requires_grad_()
    loss, mask, labels = ConfidenceBasedSelfTrainingLoss(**case.ctor)(inputs["y"], target)
    case.backward(loss, inputs, precision)
    case.check("loss", loss, precision)
    case.check("mask", mask, precision)
    case.check("pseudo_labels", labels, precision)
    case.check_grads(inputs, precision)
