from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    Accelerator,
    CustomCallback,
    DataError,
    EpochEnd,
    Event,
    Learner,
    Phase,
    PhaseError,
    Recorder,
    SanityCheck,
    StallReport,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    ValidationPhase,
    on,
    runstep,
)
from fluxloop.testing import EventRecorder, assert_same_bits, toy_learner

ADAM = partial(torch.optim.Adam, lr=0.01)


class GAN(TrainingPhase):
    """A GAN step whose forgotten detach, if any, is in the critic's block."""

    def __init__(self, detach: bool = True) -> None:
        self.detach = detach

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.noise = torch.randn(len(state.real), 2) + np.random.randn() + random.random()
            state.fake = gen(state.noise)
            fake = state.fake.detach() if self.detach else state.fake
            with learner.optimizing("D") as block:
                block.loss = softplus(-dis(state.real)).mean() + softplus(dis(fake)).mean()
            state.fake = gen(state.noise)
            with learner.optimizing("G") as block:
                block.loss = softplus(-dis(state.fake)).mean()


def images(**options: Any) -> TensorBatches:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return TensorBatches(rows, batch_size=4, shuffle=True, **options)


def gan(*callbacks: Any, data: Any = None, **options: Any) -> Learner:
    torch.manual_seed(1)
    models = {
        "G": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        "D": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 1)),
    }
    given: dict[str, Any] = {"optimizer": ADAM, "default_callbacks": False, "seed": 4, **options}
    return Learner(models, data=(images() if data is None else data,), callbacks=callbacks, **given)


# What it finds


def test_a_forgotten_detach_is_found_with_the_entry_it_came_through() -> None:
    (finding,) = gan().check(phases=[GAN(detach=False)])
    assert "the loss of optimizer 'D' also reaches 6 parameters of optimizer 'G'" in finding
    assert "(G.0.weight, …)" in finding
    assert "through step.fake" in finding
    assert ".detach()" in finding


def test_a_correct_gan_has_no_findings() -> None:
    assert gan().check(phases=[GAN()]) == []


def test_a_correct_step_of_a_single_model_has_no_findings() -> None:
    assert toy_learner().check() == []


class Distillation(TrainingPhase):
    """The student's loss reaches the teacher through two entries, one inside the other's graph."""

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch) as (_, state):
            state.target = learner.model.teacher(state.xs)
            state.scaled = 2 * state.target
            state.unused = learner.model.teacher(state.xs)
            with learner.optimizing("student") as block:
                block.loss = (learner.model.student(state.xs) - state.scaled).square().mean()


def test_every_entry_through_which_a_loss_leaks_is_named_and_no_other() -> None:
    models = {"student": nn.Linear(3, 2), "teacher": nn.Linear(3, 2)}
    learner = Learner(models, data=(images(),), default_callbacks=False, seed=0)
    (finding,) = learner.check(phases=[Distillation()])
    assert "the loss of optimizer 'student' also reaches 2 parameters of optimizer 'teacher'" in finding
    assert "step.target" in finding
    assert "step.scaled" in finding
    assert "unused" not in finding


class NotStored(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch):
            target = learner.model.teacher(batch)
            with learner.optimizing("student") as block:
                block.loss = (learner.model.student(batch) - target).square().mean()


def test_a_leak_through_something_that_is_not_stored_is_found_too() -> None:
    models = {"student": nn.Linear(3, 2), "teacher": nn.Linear(3, 2)}
    learner = Learner(models, data=(images(),), default_callbacks=False, seed=0)
    (finding,) = learner.check(phases=[NotStored()])
    assert "also reaches 2 parameters of optimizer 'teacher' (teacher.weight, …); detach it" in finding


def test_a_frozen_teacher_needs_no_detach() -> None:
    models = {"student": nn.Linear(3, 2), "teacher": nn.Linear(3, 2).requires_grad_(False)}
    learner = Learner(models, data=(images(),), default_callbacks=False, seed=0)
    assert learner.check(phases=[Distillation()]) == []


def test_each_phase_is_checked_and_a_finding_is_told_once() -> None:
    class Other(GAN):
        pass

    findings = gan().check(phases=[GAN(detach=False), Other(detach=False), GAN()])
    assert len(findings) == 1


def test_without_phases_the_training_phases_that_have_run_are_checked() -> None:
    learner = gan()
    learner.fit(1, phases=[GAN(detach=False)])
    (finding,) = learner.check()
    assert "through step.fake" in finding


def test_a_batch_may_be_given() -> None:
    seen: list[int] = []

    class Look(GAN):
        def step(self, learner: Learner, batch: Any) -> Any:
            seen.append(len(batch))
            return super().step(learner, batch)

    learner = gan()
    assert learner.check(torch.randn(7, 3), phases=[Look()]) == []
    assert seen == [7]


# What it says where it cannot run


def test_a_check_without_data_says_what_is_missing() -> None:
    learner = Learner(nn.Linear(1, 1), cross_entropy, default_callbacks=False)
    (problem,) = learner.check()
    assert problem.startswith("TrainingPhase(): DataError: TrainingPhase runs on the 'training' data, and there is no")


def test_a_check_of_several_models_asks_for_the_phase() -> None:
    (problem,) = gan().check()
    assert problem.startswith("TrainingPhase(): PhaseError: TrainingPhase runs one model")
    assert "['D', 'G']" in problem


def test_a_check_of_a_class_asks_for_an_instance() -> None:
    with pytest.raises(PhaseError, match=r"expected an instance: GAN\(\)"):
        gan().check(phases=[GAN])


# It changes nothing


def generators() -> tuple[str, ...]:
    parts = torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(random.getstate())
    return tuple(sha256(p if isinstance(p, bytes) else p.encode()).hexdigest() for p in parts)


def everything(learner: Learner) -> dict[str, Any]:
    """Give all that a check could change, as something to compare."""
    found: dict[str, Any] = {"generators": generators(), "positions": learner.streams.positions()}
    for name, model in learner.models.items():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            found[f"{name}.{key}"] = tensor.detach().clone()
            found[f"{name}.{key} requires_grad"] = tensor.requires_grad
            found[f"{name}.{key} gradient"] = None if tensor.grad is None else tensor.grad.clone()
        found[f"{name} modes"] = [module.training for module in model.modules()]
    for slot in learner.updates.slots:
        state = slot.optimizer.state_dict()
        found[f"{slot.name} groups"] = state["param_groups"]
        for index, values in state["state"].items():
            for key, value in values.items():
                found[f"{slot.name} {index} {key}"] = torch.as_tensor(value).clone()
    found["step"] = id(learner.step)
    found["counts"] = repr(learner.history)
    return found


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    changed = []
    for key, value in before.items():
        if isinstance(value, Tensor):
            same = isinstance(after[key], Tensor) and torch.equal(value, after[key])
        else:
            same = value == after[key]
        if not same:
            changed.append(key)
    assert changed == []


@pytest.mark.parametrize("trained", [False, True], ids=["before any training", "after an epoch"])
@pytest.mark.parametrize("detach", [True, False], ids=["a correct step", "a leaking step"])
def test_a_check_changes_nothing_that_can_be_seen(trained: bool, detach: bool) -> None:
    learner = gan(Recorder(), EventRecorder())
    if trained:
        learner.fit(1, phases=[GAN()])
    learner.model.G.eval()
    np.random.randn()
    before = everything(learner)
    trace = list(learner.get_callback(EventRecorder).trace)
    learner.check(phases=[GAN(detach)])
    assert_unchanged(before, everything(learner))
    assert learner.get_callback(EventRecorder).trace == trace


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("data", ["tensors", "seeded tensors", "loader", "loader with a generator", "list"])
def test_a_check_between_epochs_changes_no_bit_of_the_training(data: str) -> None:
    def make() -> Any:
        rows = images().data
        return {
            "tensors": lambda: images(),
            "seeded tensors": lambda: images(seed=8),
            "loader": lambda: DataLoader(rows, batch_size=4, shuffle=True),
            "loader with a generator": lambda: DataLoader(
                rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(8)
            ),
            "list": lambda: [*rows.split(4)],
        }[data]()

    plain, checked = gan(data=make()), gan(data=make())
    checked.check(phases=[GAN()])
    for _ in range(3):
        plain.fit(1, phases=[GAN()])
        checked.fit(1, phases=[GAN()])
        checked.check()
    assert_same_bits(plain, checked)


def test_a_check_takes_no_batch_from_data_that_can_be_iterated_once() -> None:
    def rows() -> Iterator[Tensor]:
        yield from images().data.split(4)

    learner = gan(Recorder(), data=rows())
    try:
        learner.check(phases=[GAN()])
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    learner.fit(1, phases=[GAN()])
    assert learner.history[GAN].steps == 5
    assert refused == "" or "batch" in refused


def test_gradients_that_wait_for_their_update_are_still_there_after_a_check() -> None:
    class EverySecond(TrainingPhase):
        count = 0

        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(learner.loss_fn(learner.model(state.xs), state.ys))
                self.count += 1
                if self.count % 2 == 0:
                    learner.update()

    plain, checked = toy_learner(num_batches=3), toy_learner(num_batches=3)
    for learner in (plain, checked):
        phase = EverySecond()
        learner.epoch(phase)
        if learner is checked:
            waiting = learner.model.value.grad
            assert waiting is not None
            learner.check(phases=[TrainingPhase()])
            assert learner.model.value.grad is waiting
        learner.epoch(phase)
    assert_same_bits(plain, checked)


def test_buffers_that_are_not_saved_are_put_back_too() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, xs: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(xs)

    xs = torch.ones(4, 1)
    learner = Learner(Counts(), nn.functional.mse_loss, data=((xs, xs),), default_callbacks=False)
    learner.check()
    assert learner.model.calls.item() == 0


def test_everything_is_put_back_after_a_step_that_fails() -> None:
    class Fails(GAN):
        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                with learner.optimizing("D") as block:
                    block.loss = dis(state.real).mean()
                gen(torch.randn(4, 2))
                with learner.optimizing("G"):
                    np.random.randn()
                    raise KeyError("on purpose")

    learner = gan(Recorder())
    learner.fit(1, phases=[GAN()])
    before = everything(learner)
    (problem,) = learner.check(phases=[Fails()])
    assert problem.startswith("Fails(): KeyError: 'on purpose' (test_check.py, line ")
    assert_unchanged(before, everything(learner))
    assert learner.updates.findings is None
    assert learner.updates.block is None


@define
class ChecksAt(UnsafeCallback):
    """Checks in the middle of the training."""

    event: type[Event] = StepEnd

    @on(Event, GAN)
    def check(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            assert learner.check(phases=[GAN()]) == []


def test_a_check_started_by_a_callback_after_a_step_changes_no_bit_of_the_training() -> None:
    plain, checked = gan(), gan(ChecksAt())
    for learner in (plain, checked):
        learner.fit(2, phases=[GAN()])
    assert_same_bits(plain, checked)


def test_the_learners_callbacks_hear_nothing_of_a_check() -> None:
    heard: list[str] = []
    learner = toy_learner(CustomCallback(lambda learner: heard.append("step"), StepEnd))
    learner.check()
    assert heard == []
    learner.epoch(ValidationPhase())
    assert len(heard) == 16


def test_data_for_rows_of_a_dataset_is_as_it_was() -> None:
    data = DataLoader(TensorDataset(torch.ones(8, 1), torch.ones(8, 1)), batch_size=4, shuffle=True, num_workers=2)
    learner = Learner(nn.Linear(1, 1), nn.functional.mse_loss, data=(data,), default_callbacks=False)
    assert learner.check() == []
    assert learner.streams.positions() == {}


class ChecksBatch(UnsafeCallback):
    """Checks a batch in the middle of the training, and compares everything before and after."""

    def __init__(self, event: type[Event]) -> None:
        super().__init__()
        self.event = event
        self.calls = 0

    @on(Event, GAN)
    def check(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            self.calls += 1
            before = everything(learner)
            assert learner.check(torch.ones(4, 3)) == []
            assert_unchanged(before, everything(learner))


@pytest.mark.slow
@pytest.mark.parametrize(("event", "calls"), [(EpochEnd, 2), (StepEnd, 10), (StepBegin, 10), (UpdateBegin, 20)])
def test_a_check_of_a_batch_by_a_callback_changes_nothing_and_does_not_call_it(event: type[Event], calls: int) -> None:
    callback = ChecksBatch(event)
    plain, checked = gan(Recorder()), gan(Recorder(), callback)
    for learner in (plain, checked):
        learner.fit(2, phases=[GAN()])
    assert_same_bits(plain, checked)
    assert callback.calls == calls
    assert repr(checked.history) == repr(plain.history)


class MasterCopy(torch.optim.Optimizer):
    """Steps a copy of another precision, and rounds."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.state[parameter].setdefault("master", parameter.float())
                master -= group["lr"] * parameter.grad.float()
                parameter.copy_(master)


def test_optimizer_state_of_another_precision_is_kept_to_the_bit() -> None:
    torch.manual_seed(0)
    xs = torch.randn(12, 3).bfloat16()
    learner = Learner(
        nn.Linear(3, 1).bfloat16(),
        nn.functional.mse_loss,
        data=(TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4),),
        optimizer=MasterCopy,
        default_callbacks=False,
    )
    learner.fit(2)
    masters = [entries["master"] for entries in learner.optimizer.state.values()]
    before = [(tensor.dtype, tensor.clone()) for tensor in masters]
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)
    assert learner.check() == []
    after = [entries["master"] for entries in learner.optimizer.state.values()]
    assert all(new is old for new, old in zip(after, masters, strict=True))
    assert [tensor.dtype for tensor in after] == [torch.float32] * 2 == [dtype for dtype, _ in before]
    assert all(torch.equal(new, old) for new, (_, old) in zip(after, before, strict=True))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_checked_after_a_step() -> None:
    xs = torch.ones(8, 3)
    data = TensorBatches(xs, xs[:, :1], batch_size=4)
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(1))
    learner = Learner(
        model,
        nn.functional.mse_loss,
        data=(data, data),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[SanityCheck()],
        default_callbacks=False,
    )
    with pytest.raises(PhaseError, match=r"lazy modules.*run one step first"):
        learner.check()
    learner.fit(1)
    assert learner.check() == []


class Keeps(TrainingPhase):
    """Keeps a count, a pool and a running mean, without a pair of methods for them."""

    def __init__(self) -> None:
        self.count, self.pool, self.mean = 0, [], torch.zeros(1)

    def finish(self, learner: Learner, state: Any) -> None:
        self.count += 1
        self.pool.append(state.loss.item())
        self.mean.lerp_(state.loss.detach().reshape(1), 0.1)


class CountingLoss:
    calls = 0

    def __call__(self, preds: Tensor, ys: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.mse_loss(preds, ys)


class CountingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(1, 1), 0, []

    def forward(self, xs: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(xs))
        return self.layer(xs)


def test_phases_losses_and_models_are_left_as_they_were() -> None:
    xs = torch.ones(8, 1)
    seen: list[int] = []
    model, loss_fn, phase = CountingModel(), CountingLoss(), Keeps()
    model.seen = seen
    data = ((xs, xs), (xs, xs))
    learner = Learner(model, loss_fn, data=data, optimizer=ADAM, default_callbacks=False, seed=0)
    assert learner.check(phases=[phase, ValidationPhase()]) == []
    assert (phase.count, phase.pool, phase.mean.item()) == (0, [], 0)
    assert (loss_fn.calls, learner.loss_fn is loss_fn) == (0, True)
    assert (model.calls, model.seen) == (0, [])
    assert model.seen is seen


def test_a_phase_that_shares_a_model_with_the_learner_is_checked_with_that_model() -> None:
    class Holds(TrainingPhase):
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state), learner.optimizing() as block:
                block.loss = self.model(state.xs).mean()

    learner = toy_learner()
    assert learner.check(phases=[Holds(learner.model)]) == []


class Knows(UnsafeCallback):
    """Is given the learner, and may store whatever it likes."""


class Broken(ValidationPhase):
    def body(self, learner: Learner, handle: Any, state: Any) -> None:
        state.loss = learner.loss_fn(learner.model(state.xs), state.labels)


def test_every_problem_of_every_phase_is_listed_validation_too() -> None:
    class Silent(TrainingPhase):
        def body(self, learner: Learner, handle: Any, state: Any) -> None:
            learner.backward(torch.zeros(1, requires_grad=True).sum())

    problems = toy_learner().check(phases=[Silent(), Broken(), ValidationPhase()])
    assert [problem.split(":")[0] for problem in problems] == ["Silent()", "Broken()"]
    assert "LossError: the loss of the optimizer reaches none of its own parameters" in problems[0]
    assert "MissingEntryError: The step has no entry 'labels'" in problems[1]
    assert "test_check.py, line" in problems[1]


def test_without_phases_those_of_a_plain_fit_are_checked() -> None:
    xs, ys = torch.ones(8, 1), torch.ones(8, 1)
    learner = Learner(nn.Linear(1, 1), nn.functional.mse_loss, data=((xs, ys), (torch.ones(8, 2), ys)))
    (problem,) = learner.check()
    assert problem.startswith("ValidationPhase(): RuntimeError: mat1 and mat2 shapes cannot be multiplied")


class EpochAlone(AbstractTrainingPhase):
    """What it does, its epoch says; there is no step to look at."""

    def epoch(self, learner: Any, data: Any) -> None: ...


def test_a_phase_that_says_what_an_epoch_does_and_not_a_step_has_no_problem() -> None:
    assert toy_learner().check(phases=[EpochAlone()]) == []


def test_data_that_can_be_iterated_once_is_left_alone() -> None:
    batches = iter([(torch.ones(2, 1), torch.ones(2, 1))])
    learner = Learner(nn.Linear(1, 1), nn.functional.mse_loss, data={"training": batches})
    (problem,) = learner.check()
    assert "can be iterated once only; give a batch to look at: learner.check(batch)" in problem
    assert learner.check((torch.ones(2, 1), torch.ones(2, 1))) == []
    assert len(list(batches)) == 1


def test_a_phase_that_cannot_be_copied_is_not_run() -> None:
    class Locked(Keeps):
        def __init__(self) -> None:
            super().__init__()
            self.lock = Lock()

    phase = Locked()
    (problem,) = toy_learner().check(phases=[phase])
    assert "Locked() cannot be copied (TypeError: cannot pickle '_thread.lock' object)" in problem
    assert phase.count == 0


def test_steps_that_are_to_be_compiled_are_checked_as_they_are_written() -> None:
    xs = torch.ones(8, 1)
    accelerator = Accelerator("cpu", compile="step")
    learner = Learner(nn.Linear(1, 1), nn.functional.mse_loss, data=((xs, xs),), accelerator=accelerator)
    compiled = learner._compiled
    assert learner.check() == []
    assert learner._compiled is compiled


@pytest.mark.parametrize(
    ("callbacks", "severity"),
    [
        ([], "error"),
        ([CustomCallback(lambda learner: None, StepBegin, writes=("step.labels",))], "warning"),
        ([CustomCallback(lambda learner: None, StepBegin, writes=("step",))], "warning"),
        ([CustomCallback(lambda learner: None, StepBegin, writes=("step.other",))], "error"),
        ([StallReport()], "error"),
        ([Knows()], "warning"),
    ],
)
def test_an_entry_that_is_missing_is_an_error_unless_a_callback_may_store_it(
    callbacks: list[Any], severity: str
) -> None:
    (problem,) = toy_learner(*callbacks).check(phases=[Broken()])
    assert problem.severity == severity  # type: ignore[attr-defined]  # it is a Problem


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"precision": "fp16"}], ids=str)
def test_windows_of_several_batches_and_the_scale_of_losses_are_put_back(options: dict[str, Any]) -> None:
    def trained(checked: bool) -> Learner:
        torch.manual_seed(0)
        xs = torch.randn(12, 2)
        model = nn.Linear(2, 1)
        learner = Learner(
            model, nn.functional.mse_loss, data=((xs, xs[:, :1]),), seed=1, accelerator=Accelerator("cpu", **options)
        )
        learner.fit(1)
        for _ in range(2 * checked):
            assert learner.check() == []
        assert not learner.is_accumulating
        learner.fit(1)
        return learner

    checked, plain = trained(True), trained(False)
    assert_same_bits(checked, plain)
    assert checked.updates.scale_state() == plain.updates.scale_state()
