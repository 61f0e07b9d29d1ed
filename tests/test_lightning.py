"""The Lightning callback, against the real package."""

import subprocess
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.plain.mean_teacher import EMATeacher as Plain
from tllib_rs.integrations.lightning import EMATeacherCallback

# Advice on loaders' workers and the like, which the settings of these tests turn into errors.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning.*")
ALPHA = 0.75


class Net(LightningModule):
    """Learns to agree with its teacher, and keeps what it saw."""

    def __init__(self, network=""):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.network, self.losses, self.validated, self.tested = network, [], [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        # Where a loader continues after a resume is Lightning's business: the step alone chooses the batch here.
        x = batch[0].roll(self.global_step) + self.global_step / 10
        with torch.no_grad():
            target = EMATeacherCallback.of(self.trainer, self.network).teacher(x)
        y = self.net(x)
        loss = y.square().mean() + (y - target - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.validated.append(self.net(batch[0]).clone())

    def test_step(self, batch, batch_idx):
        self.tested.append(self.net(batch[0]).clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(Callback):
    """After each batch: the number of optimizer steps, and the student's and teacher's weights."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        teacher = EMATeacherCallback.of(trainer, pl_module.network).teacher
        self.seen.append(
            (trainer.global_step, teacher.step, _values(teacher.model), _values(teacher.teacher))
        )


def _values(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def data(batches=6):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x.repeat(batches, 1)), batch_size=8)


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


@pytest.mark.parametrize("network", ["", "net"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_moves_after_each_step_of_the_optimizer(tmp_path, network, accumulate):
    module, watch = Net(network), Watch()
    plain = Plain(module.get_submodule(network), ALPHA)
    callback = EMATeacherCallback(ALPHA, network=network)
    trainer(tmp_path, callback, watch, accumulate_grad_batches=accumulate).fit(module, data())
    assert [steps for steps, *_ in watch.seen] == [(k + 1) // accumulate for k in range(6)]
    before = 0
    for steps, counted, student, teacher in watch.seen:
        assert counted == steps
        if steps > before:
            plain.model.load_state_dict(student)
            plain.update()
            before = steps
        for name, parameter in plain.teacher.named_parameters():
            torch.testing.assert_close(teacher[name], parameter.detach())
    assert not callback.teacher.teacher.training
    statistics = "1.running_mean" if network else "net.1.running_mean"
    assert torch.equal(teacher[statistics], student[statistics])


@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("network", ["", "net"])
def test_evaluations_use_the_teacher_and_give_the_student_back(tmp_path, network, evaluate):
    module, callback, watch = (
        Net(network),
        EMATeacherCallback(ALPHA, network=network, evaluate=evaluate),
        Watch(),
    )
    loader = data()
    runner = trainer(tmp_path, callback, watch, num_sanity_val_steps=1)
    runner.fit(module, loader, data(1))
    after = _values(module)
    for name, value in watch.seen[-1][2].items():
        assert torch.equal(callback.teacher.model.state_dict()[name], value)
    runner.test(module, data(1), verbose=False)
    runner.validate(module, data(1), verbose=False)
    assert all(torch.equal(after[name], value) for name, value in module.state_dict().items())
    shown = callback.teacher.teacher if evaluate else callback.teacher.model
    shown.eval()
    expected = shown(next(iter(data(1)))[0])
    for seen in (module.validated[-1], module.validated[-2], module.tested[-1]):
        assert torch.equal(seen, expected)
    # Training goes on from the student.
    trainer(tmp_path, callback).fit(module, loader)


def _run(folder, steps, resume=None, **options):
    module, callback = Net(), EMATeacherCallback(ALPHA, **options)
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    runner = trainer(
        folder,
        callback,
        checkpoint,
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=True,
        val_check_interval=2,
    )
    runner.fit(module, data(), data(1), ckpt_path=resume)
    return module, callback


@pytest.mark.parametrize("options", [{}, {"schedule": "warmup"}], ids=["alpha", "schedule"])
def test_a_resumed_fit_gives_the_losses_of_the_one_that_never_stopped(tmp_path, options):
    straight, whole = _run(tmp_path / "whole", 10, **options)
    _run(tmp_path / "half", 5, **options)
    resumed, again = _run(tmp_path / "again", 10, resume=tmp_path / "half" / "step=5.ckpt", **options)
    assert resumed.losses == straight.losses[5:]
    assert again.teacher.step == whole.teacher.step == 10
    assert again.teacher.alpha == whole.teacher.alpha
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(again.teacher.state_dict()[name], value)


def test_a_checkpoint_holds_both_networks(tmp_path):
    module, callback = _run(tmp_path, 4)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)
    state = saved["callbacks"][callback.state_key]["teacher"]
    for name, value in callback.teacher.state_dict().items():
        assert torch.equal(state[name], value)
    assert not torch.equal(state["net.0.weight"], saved["state_dict"]["net.0.weight"])
    # A fresh process that only evaluates finds the teacher in it.
    other = Net()
    fresh = EMATeacherCallback(ALPHA)
    trainer(tmp_path, fresh).test(other, data(1), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert torch.equal(other.tested[-1], callback.teacher(next(iter(data(1)))[0]))
    # The teacher was made in inference mode, and can still be trained.
    trainer(tmp_path, fresh).fit(other, data())


class SavesAndFails(Callback):
    """Saves in the middle of a validation, and interrupts it."""

    def on_validation_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")
        raise RuntimeError("in the middle")


def test_the_student_survives_a_save_and_a_failure_in_the_middle_of_a_validation(tmp_path):
    module, watch = Net(), Watch()
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer(tmp_path, EMATeacherCallback(ALPHA), watch, SavesAndFails()).fit(module, data(), data(1))
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    for name, value in watch.seen[-1][2].items():
        assert torch.equal(module.state_dict()[name], value)
        assert torch.equal(saved[name], value)


def test_a_checkpoint_without_a_teacher_says_so(tmp_path):
    module = Net()
    runner = trainer(tmp_path, max_steps=0)
    runner.fit(module, data())
    runner.save_checkpoint(tmp_path / "bare.ckpt")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(tmp_path, EMATeacherCallback(ALPHA)).fit(module, data(), ckpt_path=tmp_path / "bare.ckpt")
    said = "EMATeacherCallback{'network': ''}: the checkpoint holds no teacher; it starts as a copy of the student"
    assert said in [str(warning.message) for warning in found]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="alpha must be in"):
        EMATeacherCallback(1.5)
    with pytest.raises(ValueError, match="buffers must be one of leave, copy, average, got 'keep'"):
        EMATeacherCallback(buffers="keep")
    with pytest.raises(AttributeError, match="has no attribute `nets`"):
        trainer(tmp_path, EMATeacherCallback(network="nets")).fit(Net(), data())
    with pytest.raises(ValueError, match="the trainer has none for the network 'head'"):
        EMATeacherCallback.of(trainer(tmp_path, EMATeacherCallback()), "head")


def test_lightning_is_imported_only_when_asked_for():
    code = (
        "import sys, tllib_rs.integrations, tllib_rs.self_training.mean_teacher\n"
        "assert not any(name.partition('.')[0] == 'lightning' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
