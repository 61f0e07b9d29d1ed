"""Self-tuning: classifier, contrastive log-probabilities, queue."""

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import golden
from tests.losses import Observed
from tests.plain import self_tuning as plain
from tllib_rs import _core
from tllib_rs.self_training.self_tuning import Classifier, SelfTuning

CASES = {case.name: case for case in golden.cases("self_tuning")}
PASSES = ["three_passes", "wrap_small_queue"]


def backbone():
    layer = nn.Linear(3, 2)
    layer.out_features = 2
    return layer


def classifier(case=None, dtype=torch.float32, prefix="state:", **settings):
    model = Classifier(backbone(), 5, **{"projection_dim": 4, "pool_layer": nn.Identity(), **settings})
    model = model.to(dtype)
    if case is not None:
        names = [name for name in case.entry["inputs"] if name.startswith(prefix)]
        model.load_state_dict({name.removeprefix(prefix): case.input(name, dtype) for name in names})
        model.bottleneck[3].p = 0.0
    return model


def check_state(case, prefix, values, precision):
    found = [name for name in case.entry["outputs"] if name.startswith(prefix)]
    for name in found:
        case.check(name, values[name.removeprefix(prefix)], precision)
    return len(found)


@pytest.mark.parametrize("name", ["classifier_eval", "classifier_train"])
def test_golden_classifier(name, precision):
    case = CASES[name]
    model = classifier(case, precision)
    x = case.input("x", precision).requires_grad_()
    if name == "classifier_eval":
        y = model.eval()(x)
        case.check("y", y, precision)
        (y * case.input("grad_out", precision)).sum().backward()
    else:
        h, y = model.train()(x)
        loss = (h * case.input("cot_h", precision)).sum() + (y * case.input("cot_y", precision)).sum()
        for key, value in {"h": h, "y": y, "loss": loss}.items():
            case.check(key, value, precision)
        (loss * case.grad_out).backward()
        assert check_state(case, "buffers_after:", model.state_dict(), precision) == 3
    case.check_grad("x", x.grad, precision)


def test_classifier_layout_is_tllibs():
    entry = CASES["classifier_eval"].entry
    model = classifier()
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()]
    assert found == entry["state_dict"]
    assert model.features_dim == entry["features_dim"]
    for name, expected in entry["groups"].items():
        kind, rate = name.split("_lr")
        model = classifier(finetune=kind == "finetune")
        groups = [{**group, "params": list(group["params"])} for group in model.get_parameters(float(rate))]
        for group, want in zip(groups, expected, strict=True):
            assert len(group["params"]) == want["n_params"]
            assert sum(p.numel() for p in group["params"]) == want["numel"]
            assert group["lr"] == pytest.approx(want["lr"], rel=1e-15)
            assert sorted(set(group) - {"params"}) == want["keys"]


def test_any_bottleneck_dim():
    # tllib's forward raises here: its two heads always have 1024 inputs.
    assert CASES["classifier_bottleneck_dim_16"].raises == "RuntimeError"
    h, y = classifier(bottleneck_dim=16)(torch.randn(6, 3))
    assert h.shape == (6, 4)
    assert y.shape == (6, 5)


def test_same_random_numbers_as_tllib():
    case = CASES["init_seed0"]
    torch.manual_seed(0)
    encoders = [Classifier(nn.Linear(3, 2), 5, projection_dim=4, pool_layer=nn.Identity()) for _ in range(2)]
    model = SelfTuning(*encoders, **case.ctor)
    state = model.state_dict()
    for name in case.entry["outputs"]:
        case.check_drawn(name, state[name.replace("q:", "encoder_q.")])
    assert [k for k in state if not k.startswith("encoder_")] == ["queue_list", "queue_ptr"]
    for q, k in zip(encoders[0].parameters(), encoders[1].parameters(), strict=True):
        assert torch.equal(q, k)
        assert q.requires_grad
        assert not k.requires_grad


@pytest.mark.parametrize("name", PASSES)
def test_golden_passes(name, precision):
    case = CASES[name]
    model = SelfTuning(classifier(case, precision), classifier(case, precision), **case.ctor)
    model.queue_list = case.input("queue_list", precision)
    model.queue_ptr = case.input("queue_ptr", precision)
    storage = model.queue_list.data_ptr()
    im_q, im_k, labels = (case.input(key, precision) for key in ("im_q", "im_k", "labels"))
    for i, targets in enumerate(labels, 1):
        for key, parameter in model.encoder_q.named_parameters():
            if i > 1:
                parameter.data += case.input(f"delta{i - 1}:{key}", precision)
            parameter.grad = None
        x = im_q[i - 1].clone().requires_grad_()
        pgc_logits, pgc_labels, y_q = model(x, im_k[i - 1], targets)
        loss = 0.37 * F.kl_div(pgc_logits, pgc_labels, reduction="batchmean") + F.cross_entropy(y_q, targets)
        loss.backward()
        found = {"pgc_logits": pgc_logits, "pgc_labels": pgc_labels, "y_q": y_q, "loss": loss}
        found |= {"queue_list": model.queue_list, "queue_ptr": model.queue_ptr}
        for key, value in found.items():
            case.check(f"pass{i}:{key}", value, precision)
        q_state, k_state = model.encoder_q.state_dict(), model.encoder_k.state_dict()
        assert check_state(case, f"pass{i}:q_buffers:", q_state, precision) == 3
        assert check_state(case, f"pass{i}:k_buffers:", k_state, precision) == 3
        check_state(case, f"pass{i}:k:", k_state, precision)
        grads = {"im_q": x.grad} | {k: p.grad for k, p in model.encoder_q.named_parameters()}
        expected = [key for key in case.entry["grads"] if key.startswith(f"pass{i}:")]
        assert expected
        for key in expected:
            case.check_grad(key, grads[key.removeprefix(f"pass{i}:")], precision)
    assert model.queue_list.data_ptr() == storage


class Setting:
    """A queue of its own, our step and the plain one on the same numbers."""

    def __init__(self, generator, rows=6, dim=5, classes=4, keys=3, temperature=0.3, dtype=torch.float64):
        def randn(*shape):
            return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)

        self.new = lambda: (
            randn(rows, dim).requires_grad_(),
            randn(rows, dim),
            torch.randint(classes, (rows,), generator=generator),
        )
        self.settings = _core.SelfTuningSettings(classes, keys, 0.9, temperature)
        self.keys, self.temperature = keys, temperature
        self.history = _core.SelfTuningHistory()
        self.queue = randn(keys * classes, dim).T.contiguous()
        self.pointers = torch.randint(keys, (classes,), generator=generator)
        self.plain_queue, self.plain_pointers = self.queue.clone(), self.pointers.clone()

    def ours(self, h_q, h_k, labels):
        return self.history.step(h_q, h_k, labels, self.queue, self.pointers, self.settings)

    def plain(self, h_q, h_k, labels):
        state = (self.plain_queue, self.plain_pointers)
        return plain.step(h_q, h_k, labels, *state, self.keys, self.temperature)

    def check_state(self):
        assert torch.equal(self.queue, self.plain_queue)
        assert torch.equal(self.pointers, self.plain_pointers)


SHAPES = [
    {},
    {"rows": 1, "classes": 1, "keys": 1},
    {"rows": 13, "classes": 1, "keys": 5},
    {"rows": 7, "classes": 11, "keys": 1, "dim": 1},
    {"rows": 64, "dim": 33, "classes": 7, "keys": 13},
    {"rows": 300, "dim": 8, "classes": 31, "keys": 17},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_forwards_before_their_backwards(shape, generator):
    setting = Setting(generator, **shape)
    batches = [setting.new() for _ in range(4)]
    ours = [setting.ours(*batch) for batch in batches]
    setting_grads = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in ours]
    expected = [setting.plain(*batch) for batch in batches]
    setting.check_state()
    for k in (2, 0, 3, 1):
        torch.testing.assert_close(ours[k], expected[k], rtol=1e-12, atol=1e-12)
        (want,) = torch.autograd.grad(expected[k], batches[k][0], setting_grads[k])
        for retain in (True, False):
            (got,) = torch.autograd.grad(ours[k], batches[k][0], setting_grads[k], retain_graph=retain)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        with pytest.raises(RuntimeError, match="second time"):
            ours[k].backward(setting_grads[k])


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_float32_is_as_good_as_plain_float32(shape, generator):
    setting = Setting(generator, **shape, dtype=torch.float32)
    exact = Setting(torch.Generator(), **shape)
    exact.queue.copy_(setting.queue)
    exact.plain_queue.copy_(setting.queue)
    batch = setting.new()
    double = [x.detach().double() if x.is_floating_point() else x for x in batch]
    double[0].requires_grad_()
    results = []
    for call, inputs in ((setting.ours, batch), (setting.plain, batch), (exact.plain, double)):
        out = call(*inputs)
        (grad,) = torch.autograd.grad(
            out, inputs[0], torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out)
        )
        results.append([out.detach().double(), grad.double()])
    for ours, theirs, reference in zip(*results, strict=True):
        scale = reference.abs().max()
        bound = max(4 * (theirs - reference).abs().max() / scale, 2e-6)
        assert (ours - reference).abs().max() / scale <= bound


def test_gradcheck_and_second_derivatives(generator):
    setting = Setting(generator)
    h_q, h_k, labels = setting.new()
    queue, pointers = setting.queue.clone(), setting.pointers.clone()

    def call(h_q):
        return setting.history.step(h_q, h_k, labels, queue.clone(), pointers.clone(), setting.settings)

    assert torch.autograd.gradcheck(call, h_q)
    assert torch.autograd.gradgradcheck(call, h_q)
    # The kept queue also has its old values under create_graph, after a later forward.
    first = setting.ours(h_q, h_k, labels)
    setting.ours(*setting.new())
    expected = setting.plain(h_q, h_k, labels)
    weight = torch.randn(first.shape, generator=generator, dtype=first.dtype)
    for out in (first, expected):
        (grad,) = torch.autograd.grad(out, h_q, weight, create_graph=True)
        h_q.grad = None
        grad.square().sum().backward()
        second = h_q.grad if out is first else second  # noqa: F821
    torch.testing.assert_close(second, h_q.grad, rtol=1e-10, atol=1e-10)


def test_torch_func_and_batched_gradients(generator):
    setting = Setting(generator)
    h_q, h_k, labels = setting.new()

    def call(step, h_q):
        return step(h_q, h_k, labels, setting.queue.clone(), setting.pointers.clone())

    def ours(h_q):
        return call(lambda *args: _core.SelfTuningHistory().step(*args, setting.settings), h_q)

    def theirs(h_q):
        return call(lambda *args: plain.step(*args, setting.keys, setting.temperature), h_q)

    leaf = h_q.detach()
    expected = torch.autograd.functional.jacobian(theirs, leaf)
    batched = torch.autograd.functional.jacobian(ours, leaf, vectorize=True)
    torch.testing.assert_close(batched, expected, rtol=1e-11, atol=1e-11)
    got = torch.func.grad(lambda h: (ours(h) * torch.arange(13)).sum())(leaf)
    torch.testing.assert_close(
        got, (expected * torch.arange(13)[:, None, None]).sum((0, 1)), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_float32(dtype, generator):
    setting = Setting(generator, dtype=torch.float32)
    h_q, h_k, labels = setting.new()
    half_q, half_k = h_q.detach().to(dtype).requires_grad_(), h_k.to(dtype)
    exact_q = half_q.detach().float().requires_grad_()
    expected = setting.plain(exact_q, half_k.float(), labels)
    weight = torch.randn(expected.shape, generator=generator)
    expected.backward(weight)
    for queue in (setting.queue.clone(), setting.queue.to(dtype)):
        half_q.grad = None
        pointers = setting.pointers.clone()
        out = setting.history.step(half_q, half_k, labels, queue, pointers, setting.settings)
        assert out.dtype == torch.float32
        out.backward(weight)
        assert half_q.grad.dtype == dtype
        tolerance = 1e-5 if queue.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(half_q.grad.float(), exact_q.grad, rtol=3e-2, atol=3e-2)


def test_strides_and_autocast(generator):
    setting = Setting(generator, dtype=torch.float32)
    h_q, h_k, labels = setting.new()
    expected = setting.plain(h_q, h_k, labels)
    strided_q = h_q.detach().T.contiguous().T.requires_grad_()
    strided_k = torch.stack([h_k, h_k], dim=-1)[..., 1]
    strided_labels = torch.stack([labels, labels], dim=1)[:, 0]
    setting.queue = setting.queue.T.contiguous().T
    with torch.autocast("cpu", torch.bfloat16):
        out = setting.ours(strided_q, strided_k, strided_labels)
        torch.testing.assert_close(out, expected)
        weight = torch.randn(out.T.shape, generator=generator).T
        out.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(strided_q.grad, h_q.grad)
    setting.check_state()


def test_new_keys_that_are_not_finite_do_not_reach_the_old_graph(generator):
    setting = Setting(generator)
    batches = [setting.new(), setting.new()]
    batches[1][1][0] = float("nan")
    batches[1][1][1] = float("inf")
    ours = [setting.ours(*batch) for batch in batches]
    expected = [setting.plain(*batch) for batch in batches]
    for (h_q, _, _), got, want in zip(batches, ours, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
        weight = torch.ones_like(want)
        weight[:, 0] = 2
        grads = [torch.autograd.grad(out, h_q, weight)[0] for out in (got, want)]
        torch.testing.assert_close(*grads, equal_nan=True)
    assert torch.autograd.grad(setting.ours(*batches[0]).sum(), batches[0][0])[0].isnan().any()


def test_other_writes_between_forward_and_backward_raise(generator):
    setting = Setting(generator)
    batch = setting.new()
    out = setting.ours(*batch)
    setting.queue.mul_(1.0)
    later = setting.ours(*batch)
    with pytest.raises(RuntimeError, match="queue_list, written between forward and backward"):
        out.sum().backward()
    later.sum().backward()
    out = setting.ours(*batch)
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: SelfTuning's pgc_logits"):
        out.sum().backward()
    # Replacing the buffer, as .to() and the like do, is not a write.
    out = setting.ours(*batch)
    setting.queue = setting.queue.clone()
    setting.ours(*batch)
    out.sum().backward()


def test_others_notice_that_the_queue_was_written(generator):
    setting = Setting(generator)
    h_q, h_k, labels = setting.new()
    other = (h_q @ setting.queue).sum()
    setting.ours(h_q, h_k, labels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_nothing_is_kept_after_the_graphs(generator):
    setting = Setting(generator, rows=3)
    kept = setting.ours(*setting.new())
    for _ in range(20_000):
        setting.ours(*setting.new()[:2], torch.zeros(3, dtype=torch.int64))
    # One graph held 20,000 changes: dropping them must not exhaust the stack.
    del kept
    gc.collect()
    with torch.no_grad():
        setting.ours(*setting.new())


def small_model(**settings):
    arguments = {"num_classes": 5, "K": 4, "m": 0.9, "T": 0.07, **settings}
    return SelfTuning(classifier(bottleneck_dim=16), classifier(bottleneck_dim=16), **arguments)


def test_empty_batch(generator):
    setting = Setting(generator, rows=0)
    h_q, h_k, labels = setting.new()
    out = setting.ours(h_q, h_k, labels)
    # tllib gives (0, 1), an accident of concatenating empty lists; this is the shape of its labels.
    assert out.shape == (0, 13)
    out.sum().backward()
    assert h_q.grad.shape == (0, 5)
    setting.check_state()


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None, None), TypeError, "SelfTuning: im_q must be a torch.Tensor, got list"),
        ((None, torch.zeros(5, 3), None), ValueError, "im_k must have as many rows as im_q, 6, got shape"),
        (
            (None, None, torch.zeros(5, dtype=torch.int64)),
            ValueError,
            r"labels must .* = \[6\], got shape \[5\]",
        ),
        ((None, None, torch.zeros(6, 1, dtype=torch.int64)), ValueError, r"got shape \[6, 1\]"),
        ((None, None, torch.zeros(6)), TypeError, "labels must be int64 or int32, got float32"),
        ((None, None, torch.tensor([0, 1, 5, 0, 0, 0])), IndexError, r"labels must be in \[0, 4\], got 5"),
        ((None, None, torch.tensor([0, 1, -1, 0, 0, 0])), IndexError, r"labels must be in \[0, 4\], got -1"),
    ],
)
def test_bad_batches_change_nothing(arguments, error, message):
    model = small_model()
    good = (torch.randn(6, 3), torch.randn(6, 3), torch.randint(5, (6,)))
    before = snapshot(model)
    with pytest.raises(error, match=message):
        model(*(b if a is None else a for a, b in zip(arguments, good, strict=True)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model(*good)
    assert not torch.equal(before["queue_list"], model.queue_list)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"K": 0}, ValueError, "SelfTuning: K must be an integer above 0, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be an integer above 0, got -1"),
        ({"K": 1.5}, TypeError, "K must be an integer, got float"),
        ({"m": 1.5}, ValueError, r"m must be in \[0, 1\], got 1.5"),
        ({"m": float("nan")}, ValueError, r"m must be in \[0, 1\], got NaN"),
        ({"T": 0}, ValueError, "T must be a finite number above 0, got 0"),
        ({"T": "1"}, TypeError, "T must be a number, got str"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        small_model(**settings)
    model = small_model()
    for key, value in settings.items():
        setattr(model, key, value)
    with pytest.raises(error, match=message):
        model(torch.randn(6, 3), torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))


def test_bad_queues(generator):
    setting = Setting(generator)
    batch = setting.new()
    with pytest.raises(ValueError, match=r"queue_list must have shape \(projection_dim, K \* num_classes\)"):
        setting.history.step(*batch, setting.queue[:, 1:], setting.pointers, setting.settings)
    with pytest.raises(ValueError, match=r"queue_ptr must hold positions in \[0, 2\], got 3"):
        setting.history.step(*batch, setting.queue, setting.pointers * 0 + 3, setting.settings)
    with pytest.raises(TypeError, match="queue_ptr must be int64, got float32"):
        setting.history.step(*batch, setting.queue, setting.pointers.float(), setting.settings)
    with pytest.raises(ValueError, match="h_k must have the shape of h_q"):
        setting.history.step(
            batch[0], batch[1][1:], batch[2], setting.queue, setting.pointers, setting.settings
        )
    setting.check_state()


def test_bad_encoders():
    with pytest.raises(ValueError, match="encoder_q and encoder_k must have parameters of the same shapes"):
        SelfTuning(classifier(bottleneck_dim=16), classifier(bottleneck_dim=8), 5)
    model = small_model().eval()
    # Two rows: the tensor itself could be unpacked.
    with pytest.raises(ValueError, match=r"encoder_q must return \(projections, predictions\).* got Tensor"):
        model(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))


def test_encoders_that_return_a_list():
    class Listed(nn.Module):
        projection_dim = 4

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            h = self.head(x)
            return [nn.functional.normalize(h, dim=1), h]

    logits, targets, y_q = SelfTuning(Listed(), Listed(), 5, K=2)(
        torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)
    )
    assert (logits.shape, targets.shape, y_q.shape) == ((2, 11), (2, 11), (2, 4))


def test_copies_and_pickles():
    model = small_model()
    batch = (torch.randn(6, 3), torch.randn(6, 3), torch.randint(5, (6,)))
    model(*batch)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), small_model()]
    twins[2].load_state_dict(model.state_dict())
    states = []
    for twin in (model, *twins):
        torch.manual_seed(1)  # dropout
        out = twin(*batch)
        out[0].sum().backward()
        states.append([*out, *twin.state_dict().values()])
    for state in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], state, strict=True))


def test_device_plan_equals_host(generator):
    """The formulas for devices, on the CPU: labels that are not an ordinary tensor take that path."""
    setting = Setting(generator, rows=29, classes=3, keys=4)
    for _ in range(5):
        h_q, h_k, labels = setting.new()

        class Opaque(torch.Tensor):
            pass

        out = setting.ours(h_q, h_k, labels.as_subclass(Opaque))
        expected = setting.plain(h_q, h_k, labels)
        torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=1e-11, atol=1e-11)
        setting.check_state()


def test_threads_share_a_queue(generator):
    setting = Setting(generator, rows=16, dim=64, classes=8, keys=64)
    failures = []

    def work(batches):
        try:
            for batch in batches:
                setting.ours(*batch).sum().backward()
        except Exception as error:
            failures.append(error)

    jobs = [[setting.new() for _ in range(20)] for _ in range(4)]
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures
    assert setting.queue.isfinite().all()


def test_labels_are_checked_within_a_dispatch_mode_before_anything_changes(generator):
    model = small_model()
    x = torch.randn(4, 3, generator=generator)
    before = [p.clone() for p in model.encoder_k.parameters()]
    with torch.no_grad():
        next(iter(model.encoder_q.parameters())).add_(1)
    with Observed(), pytest.raises(IndexError, match="labels must be in"):
        model(x, x, torch.tensor([0, 1, 2, 99]))
    for parameter, old in zip(model.encoder_k.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_queue_of_numbers_of_numpy():
    model = SelfTuning(small_model().encoder_q, small_model().encoder_k, np.int8(10), K=np.int8(32))
    assert model.queue_list.shape[1] == 320


def test_steps_that_a_subclass_changes(generator):
    """The methods are tllib's, which enqueue row by row: the queue is the same."""
    calls = []

    class Changed(SelfTuning):
        def _momentum_update_key_encoder(self):
            calls.append("update")
            super()._momentum_update_key_encoder()

        def _dequeue_and_enqueue(self, h, label):
            calls.append("enqueue")
            super()._dequeue_and_enqueue(h, label)

    torch.manual_seed(0)
    first = SelfTuning(classifier(), classifier(), 5, K=2, m=0.9).double()
    torch.manual_seed(0)
    second = Changed(classifier(), classifier(), 5, K=2, m=0.9).double()
    labels = torch.tensor([1, 3, 1, 1])
    for module in (first, second):
        module.encoder_q.bottleneck[3].p = module.encoder_k.bottleneck[3].p = 0.0
    for _ in range(2):
        views = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
        found = [forward(*views, labels)[0] for forward in (first, second)]
        torch.testing.assert_close(*found)
        grads = [
            torch.autograd.grad(y.square().sum(), m.encoder_q.projector.weight)[0]
            for y, m in zip(found, (first, second), strict=True)
        ]
        torch.testing.assert_close(*grads)
        assert calls == ["update"] + 4 * ["enqueue"]
        calls.clear()
    torch.testing.assert_close(second.state_dict(), first.state_dict())


def test_an_encoder_in_evaluation_mode_leaves_the_other_alone():
    model = small_model()
    for name in ("encoder_q", "encoder_k"):
        model.train()
        getattr(model, name).eval()
        torch.nn.init.normal_(model.encoder_q.head.weight)
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"{name} must return \(projections, predictions\)"):
            model(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("encoder_k."))


def test_meta_device():
    with torch.device("meta"):
        outputs = small_model()(torch.randn(6, 3), torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    assert [(x.device.type, x.shape[0]) for x in outputs] == [("meta", 6)] * 3


def test_the_gradient_of_torch_func_is_refused_in_its_own_words():
    """It forbids in-place operations on tensors that it did not create, such as those of the key encoder."""
    model = small_model()
    batch = (torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="in-place operation .* that would mutate a captured Tensor"):
        torch.func.grad(lambda x: model(x, batch[0], batch[1])[0].sum())(batch[0])


def test_a_step_that_is_assigned_to_one_object(generator):
    def calls(model):
        seen = []
        enqueue = model._dequeue_and_enqueue
        model._dequeue_and_enqueue = lambda h, label: (seen.append(int(label)), enqueue(h, label))
        return seen

    model, same = small_model(), small_model()
    same.load_state_dict(model.state_dict())
    for module in (model, same):
        module.encoder_q.bottleneck[3].p = module.encoder_k.bottleneck[3].p = 0.0
    x, labels = torch.randn(4, 3, generator=generator), torch.tensor([1, 0, 1, 2])
    seen = calls(model)
    torch.testing.assert_close(model(x, x, labels)[0], same(x, x, labels)[0])
    assert seen == labels.tolist()
    assert torch.equal(model.queue_list, same.queue_list)


@pytest.mark.parametrize("step", ["_dequeue_and_enqueue", "_momentum_update_key_encoder"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:Dynamo does not know", "ignore:The .grad attribute")
def test_a_step_that_is_patched_in_the_class(step, compiled, monkeypatch, generator):
    model, seen = small_model(), []
    x, labels = torch.randn(4, 3, generator=generator), torch.tensor([1, 0, 1, 2])
    original = getattr(SelfTuning, step)

    def patched(self, *args):
        seen.append(args)
        return original(self, *args)

    call = torch.compile(model, backend="aot_eager") if compiled else model
    with monkeypatch.context() as patch:
        patch.setattr(SelfTuning, step, patched)
        call(x, x, labels)
    assert len(seen) == (4 if step == "_dequeue_and_enqueue" else 1)
    call(x, x, labels)
    assert len(seen) == (4 if step == "_dequeue_and_enqueue" else 1)


def test_a_class_given_as_a_number(generator):
    model = small_model()
    key = torch.randn(1, len(model.queue_list), generator=generator)
    model._dequeue_and_enqueue(key, 2)
    assert torch.equal(model.queue_list[:, 2 * model.K], key[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_layer_of_both_encoders_behind_trainable_ones(compiled, generator):
    """The momentum step comes between forward and the backward pass, which needs it."""
    shared = nn.Linear(4, 4).requires_grad_(False)

    class Encoder(nn.Module):
        projection_dim = 6

        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(3, 4), shared, nn.Linear(4, 6)

        def forward(self, x):
            h = self.last(self.shared(self.first(x)))
            return h, h

    before = shared.weight.clone()
    model = SelfTuning(Encoder(), Encoder(), 3, K=2, m=0.7)
    x, labels = torch.randn(4, 3, generator=generator), torch.tensor([1, 0, 1, 2])
    call = torch.compile(model, backend="aot_eager") if compiled else model
    pgc_logits, _, y = call(x, x, labels)
    (pgc_logits.sum() + y.sum()).backward()
    assert model.encoder_q.first.weight.grad.abs().sum() > 0
    assert torch.equal(shared.weight, before)
