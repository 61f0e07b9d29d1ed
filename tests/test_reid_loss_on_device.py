"""What is specific to the triplet losses and to hard example mining on a device."""

import pytest
import torch
from torch.nn import functional as F

from tests.on_device import DEVICE, ON_GPU, ROUNDING, gpu, kernels, somewhere
from tests.plain import reid_loss as plain
from tllib_rs.vision.models.reid.loss import (
    SoftTripletLoss,
    TripletLoss,
    TripletLossXBM,
    hard_examples_mining,
)

pytestmark = somewhere


def grads_of(function, *inputs):
    """The loss, and 0.37 times its gradient with respect to each input, in float64 on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = function(*inputs)
    grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.37))
    return [x.detach().double().cpu() for x in (loss, *grads)]


def assert_close(got, expected, rounding):
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max() <= rounding * e.abs().max()


def test_in_parts(generator):
    # More products than are kept at a time, and more pairs than a row looks at at a time.
    rows = 4500 if ON_GPU else 700
    f = torch.randn(rows, 6, generator=generator)
    labels = torch.arange(rows) % (rows // 4)
    assert_close(
        grads_of(lambda f: SoftTripletLoss(0.2)(f, None, labels.to(DEVICE)), f.to(DEVICE)),
        grads_of(lambda f: plain.soft_triplet(f, f, labels, 0.2), f.double()),
        2e-6,
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_one_candidate_for_all(normalize, generator):
    # The two ends of a line are the hardest negatives or positives of every row.
    f = torch.randn(600, 3, generator=generator).abs() + torch.tensor([1.0, 0.0, 0.0])
    memory = torch.stack([-f[0], 10 * f[1], f[2]])
    labels, memory_labels = torch.arange(600) % 2, torch.tensor([0, 1, 1])
    on_device = [labels.to(DEVICE), memory_labels.to(DEVICE)]
    module = TripletLossXBM(1.0, normalize)
    assert_close(
        grads_of(lambda f, m: module(f, on_device[0], m, on_device[1]), f.to(DEVICE), memory.to(DEVICE)),
        grads_of(
            lambda f, m: plain.triplet_xbm(f, labels, m, memory_labels, 1.0, normalize),
            f.double(),
            memory.double(),
        ),
        2e-6,
    )


def test_a_teacher_of_another_dtype(generator):
    f, teacher = torch.randn(9, 20, generator=generator), torch.randn(9, 33, generator=generator).half()
    labels = torch.arange(9) % 3
    module = SoftTripletLoss(normalize_feature=True)
    for student in (f, f.bfloat16()):
        assert_close(
            grads_of(lambda f: module(f, teacher.to(DEVICE), labels.to(DEVICE)), student.to(DEVICE)),
            grads_of(lambda f: plain.soft_triplet(f, teacher.double(), labels, None, True), student.double()),
            ROUNDING[student.dtype],
        )


def test_small_norms_do_not_overflow_float16(generator):
    f = 1e-3 * F.normalize(torch.randn(8, 5, generator=generator))
    f[3] = 0
    f = f.half()
    labels = torch.arange(8) // 2
    assert_close(
        grads_of(lambda f: TripletLoss(1.0, True)(f, labels.to(DEVICE)), f.to(DEVICE))[:1],
        grads_of(lambda f: plain.triplet(f, labels, 1.0, True), f.double())[:1],
        2e-6,
    )
    f = f[[0, 1, 2, 4, 5, 6, 7]]
    labels = labels[[0, 1, 2, 4, 5, 6, 7]]
    assert_close(
        grads_of(lambda f: TripletLoss(1.0, True)(f, labels.to(DEVICE)), f.to(DEVICE)),
        grads_of(lambda f: plain.triplet(f, labels, 1.0, True), f.double()),
        ROUNDING[torch.float16],
    )


def test_second_derivatives(generator):
    f, teacher = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    labels = torch.arange(8) % 3
    results = []
    for loss, to in (
        (lambda f, t: SoftTripletLoss()(f, t, labels.to(DEVICE)), {"device": DEVICE}),
        (lambda f, t: plain.soft_triplet(f, t, labels), {"dtype": torch.float64}),
    ):
        x = f.to(**to).requires_grad_()
        (first,) = torch.autograd.grad(loss(x, teacher.to(**to)), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append([x.detach().double().cpu() for x in (first, second)])
    assert_close(*results, 1e-5)


@kernels
def test_what_is_mined_does_not_depend_on_tf32(generator):
    f = torch.randn(64, 96, generator=generator).to(DEVICE)
    labels = (torch.arange(64) % 8).to(DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    results = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results.append(grads_of(lambda f: TripletLoss(3.0)(f, labels), f))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@kernels
@gpu
def test_sums_have_one_order(generator):
    f = torch.randn(512, 300, generator=generator).to(DEVICE)
    labels = (torch.arange(512) % 7).to(DEVICE)
    first = grads_of(lambda f: SoftTripletLoss(0.1)(f, None, labels), f)
    for _ in range(20):
        for a, b in zip(first, grads_of(lambda f: SoftTripletLoss(0.1)(f, None, labels), f), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 700)], ids=str)
def test_hard_examples_of_a_matrix(dtype, shape, generator):
    # Few distinct distances, so that many are equal, and weights that are neither 0 nor 1.
    d = torch.randint(6, shape, generator=generator).to(dtype)
    s = torch.randint(3, shape, generator=generator).div(2).to(dtype)
    d[0, -1] = torch.nan
    if shape[0] > 2:
        d[1], s[2], d[3] = -0.0, 1, torch.nan
    positive, negative = d + (s - 1) * 1e7, d + s * 1e7
    expected = (positive.argmax(1), negative.masked_fill(negative.isnan(), torch.inf).argmin(1))
    strided = torch.stack((d, s), dim=2).to(DEVICE)
    for distances, identity in ((d.to(DEVICE), s.to(DEVICE)), strided.unbind(2)):
        found = hard_examples_mining(distances, identity, return_idxes=True)[2:]
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got.cpu(), want)
