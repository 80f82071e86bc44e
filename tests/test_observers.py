from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from attrs import define, field
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fluxloop import (
    BackwardBegin,
    BackwardEnd,
    Callback,
    ConditionalCallback,
    CustomCallback,
    CycleBegin,
    CycleEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    GarbageCollect,
    Learner,
    LossBegin,
    Metric,
    Metrics,
    MetricsPrinter,
    Phase,
    PredictionPhase,
    ProgressBar,
    Recorder,
    SanityCheck,
    SmoothLoss,
    StepBegin,
    StepEnd,
    StopOnNaNLoss,
    TensorBatches,
    Traces,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    mae,
    on,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.testing import EventRecorder, assert_observer, assert_same_bits, bits, toy_learner
from processes.launching import run

EPOCHS = 3
STEP_EVENTS = [StepBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, StepEnd]
EVENTS = [EpochBegin, *STEP_EVENTS, EpochEnd]
WORKERS = pytest.mark.parametrize("workers", [0, 2], ids=["0 workers", "2 workers"])


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from torch, NumPy and Python, drawn when a row is fetched."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.xs = torch.randn(24, 3, generator=generator)
        self.ys = self.xs.sum(dim=1, keepdim=True)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(()) + np.random.randn() + np.random.rand() + random.random() + random.gauss(0, 1)
        return (self.xs[index] + 0.1 * noise).float(), self.ys[index]


class Noisy(TrainingPhase):
    """Supervised training whose step draws from torch (dropout), NumPy (an odd normal number) and Python."""

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.xs = state.xs + 0.1 * (np.random.randn() + random.random())
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            state.loss = learner.loss_fn(state.preds, state.ys) * (1 + 0.1 * np.random.rand() + 0.1 * random.random())
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update()


def make_learner(*callbacks: Callback, workers: int = 0, seed: int | None = 5) -> Learner:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    rows = Augmented()
    return Learner(
        model,
        mse_loss,
        data=(
            DataLoader(rows, batch_size=5, shuffle=True, num_workers=workers),
            DataLoader(rows, batch_size=8, shuffle=True),
        ),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=callbacks,
        default_callbacks=False,
        seed=seed,
    )


def train(learner: Learner, *more: Phase) -> Learner:
    learner.fit(EPOCHS, phases=[Noisy(), *more])
    return learner


@pytest.fixture(scope="module")
def reference() -> Callable[[int], Learner]:
    """Give the run that nobody watches, trained once per number of workers."""
    trained: dict[int, Learner] = {}

    def get(workers: int) -> Learner:
        if workers not in trained:
            trained[workers] = train(make_learner(workers=workers))
        return trained[workers]

    return get


Reference = Callable[[int], Learner]


def draw() -> list[float]:
    """Draw from every generator, with one odd normal number of NumPy's and of Python's."""
    return [torch.rand(()).item(), float(np.random.randn()), random.random(), random.gauss(0, 1), np.random.rand()]


def generators() -> dict[str, Any]:
    """Give the states of the global generators, short enough to be read where they differ."""
    _, key, *rest = np.random.get_state()
    return {
        "torch": sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy": (sha256(key.tobytes()).hexdigest(), rest),
        "python": sha256(repr(random.getstate()).encode()).hexdigest(),
    }


@define
class Draws(Callback):
    """A read-only callback that draws at an event; it does not say that it does."""

    event: type[Event] = Event
    numbers: list[list[float]] = field(factory=list, init=False, repr=False)

    reads = ("*",)

    @on(Event)
    def watch(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event) and type(event) in EVENTS:
            self.numbers.append(draw())


@define
class SaysItDraws(Draws):
    draws = True


# The run itself


@pytest.mark.slow
@WORKERS
def test_the_same_run_twice_gives_the_same_bits(reference: Reference, workers: int) -> None:
    assert_same_bits(train(make_learner(workers=workers)), reference(workers))


def test_two_seeds_give_two_runs(reference: Reference) -> None:
    other = bits(train(make_learner(seed=6)))
    assert not any(torch.equal(other[name], tensor) for name, tensor in bits(reference(0)).items() if "weight" in name)


def test_the_generators_of_the_script_do_not_decide_a_seeded_run(reference: Reference) -> None:
    learner = make_learner()
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert_same_bits(train(learner), reference(0))


def test_without_a_seed_torchs_generator_decides_and_the_seed_is_recorded() -> None:
    first, second = (train(make_learner(seed=None)) for _ in range(2))
    assert_same_bits(first, second)
    assert first.seed == first.history.seed == second.history.seed
    assert f"seed={first.seed}" in repr(first)
    assert_same_bits(train(make_learner(seed=first.seed)), first)


def test_another_torch_manual_seed_gives_another_seed() -> None:
    seeds = []
    for number in (1, 2, 1):
        torch.manual_seed(number)
        seeds.append(Learner(nn.Linear(1, 1)).seed)
    assert seeds[0] == seeds[2] != seeds[1]


SCRIPT = """
import hashlib, torch
from functools import partial
from torch import nn
from fluxloop import Learner, Metrics, mae, SmoothLoss
from fluxloop.testing import bits
xs = torch.linspace(-1, 1, 60).reshape(20, 3)
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
learner = Learner(model, nn.functional.mse_loss, data=((xs, xs[:, :1]), (xs, xs[:, :1])), seed=4,
                  callbacks=[Metrics(mae, SmoothLoss())])
history = learner.fit(3)
digest = hashlib.sha256()
for name, tensor in bits(learner).items():
    digest.update(name.encode() + tensor.numpy().tobytes())
print(hash("a text"))
print(digest.hexdigest(), learner.callbacks.digest, history["validation/mae"])
"""


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_two_processes_whatever_their_hash_seed() -> None:
    alone = "import os; del os.environ['RANK'], os.environ['WORLD_SIZE']"  # each trains as if there were no other
    outputs = run(alone + SCRIPT, 2).outputs
    (one, first), (other, second) = (output.splitlines()[-2:] for output in outputs)
    assert one != other
    assert len(first.split()[0]) == 64
    assert first == second


# Watching changes nothing


@pytest.mark.slow
@WORKERS
def test_a_validation_pass_changes_nothing(reference: Reference, workers: int) -> None:
    assert_same_bits(train(make_learner(workers=workers), ValidationPhase()), reference(workers))


@pytest.mark.slow(quick=1)
@WORKERS
def test_several_validation_passes_and_a_prediction_pass_change_nothing(reference: Reference, workers: int) -> None:
    class Predict(PredictionPhase):
        pass

    learner = train(make_learner(workers=workers), ValidationPhase(), Predict(), ValidationPhase())
    assert_same_bits(learner, reference(workers))


def defaults() -> dict[str, list[Callback]]:
    each: dict[str, list[Callback]] = {
        "Recorder": [Recorder()],
        "Metrics": [Recorder(), Metrics(mae, SmoothLoss())],
        "ProgressBar": [ProgressBar(enabled=True, interval=0.0, file=StringIO())],
        "MetricsPrinter": [Recorder(), Metrics(), MetricsPrinter()],
        "StopOnNaNLoss": [StopOnNaNLoss()],
    }
    each["all"] = [
        Recorder(),
        Metrics(mae),
        ProgressBar(enabled=True, interval=0.0, file=StringIO()),
        MetricsPrinter(),
        StopOnNaNLoss(wait=True),
    ]
    return each


@pytest.mark.slow(quick=1)
@WORKERS
@pytest.mark.parametrize("name", defaults())
def test_a_default_callback_changes_nothing(reference: Reference, name: str, workers: int) -> None:
    learner = make_learner(*defaults()[name], workers=workers)
    assert_same_bits(train(learner), reference(workers))


@pytest.mark.slow(quick=1)
@WORKERS
def test_all_default_callbacks_and_validation_change_nothing(reference: Reference, workers: int) -> None:
    learner = make_learner(*defaults()["all"], workers=workers)
    assert_same_bits(train(learner, ValidationPhase()), reference(workers))


def others() -> dict[str, Callback]:
    return {
        "EventRecorder": EventRecorder(),
        "SanityCheck": SanityCheck(),
        "GarbageCollect": GarbageCollect(),
        "Traces that draw": Traces({"noise": lambda learner: torch.randn(()) + np.random.randn()}),
        "a throttled callback that draws": throttle(Draws(StepEnd), StepEnd, freq=2),
        "a hook that draws": CustomCallback(lambda learner: draw(), StepEnd, TrainingPhase),
        "a callback behind a condition that draws": ConditionalCallback(
            EventRecorder(), lambda event, phase: random.random() < 0.5
        ),
        "a metric that draws": Metrics(Metric(lambda preds, ys: np.random.randn() + random.random(), name="noise")),
    }


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("name", others())
def test_another_callback_changes_nothing(reference: Reference, name: str) -> None:
    assert_same_bits(train(make_learner(Recorder(), others()[name])), reference(0))


@pytest.mark.slow(quick=1)
@WORKERS
@pytest.mark.parametrize("observer", [Draws, SaysItDraws], ids=["undeclared", "draws = True"])
def test_a_callback_that_draws_at_every_event_changes_nothing(
    reference: Reference, observer: type[Draws], workers: int
) -> None:
    callback = observer()
    assert_same_bits(train(make_learner(callback, workers=workers), ValidationPhase()), reference(workers))
    assert len(callback.numbers) > EPOCHS * 5 * 7


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("observer", [Draws, SaysItDraws], ids=["undeclared", "draws = True"])
def test_a_callback_that_draws_at_one_event_changes_nothing(
    reference: Reference, observer: type[Draws], event: type[Event]
) -> None:
    callback = observer(event)
    assert_same_bits(train(make_learner(callback)), reference(0))
    assert len(callback.numbers) == EPOCHS * (5 if event in STEP_EVENTS else 1)


@define
class DrawsOneNormalNumber(Callback):
    """Draws a single normal number of NumPy's, which puts another one in store."""

    event: type[Event] = StepEnd

    @on(Event)
    def watch(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            np.random.randn()


@pytest.mark.slow(quick=5)
@pytest.mark.parametrize("event", EVENTS)
def test_a_single_normal_number_drawn_by_a_callback_changes_nothing(reference: Reference, event: type[Event]) -> None:
    assert_same_bits(train(make_learner(DrawsOneNormalNumber(event))), reference(0))


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_only_listens_changes_nothing(reference: Reference, event: type[Event]) -> None:
    assert_same_bits(train(make_learner(CustomCallback(lambda learner: None, event, reads=()))), reference(0))


def test_two_callbacks_that_draw_change_nothing_together(reference: Reference) -> None:
    learner = make_learner(Draws(), SaysItDraws(), DrawsOneNormalNumber())
    assert_same_bits(train(learner, ValidationPhase()), reference(0))


@pytest.mark.slow
@WORKERS
def test_evaluate_and_predict_between_epochs_change_nothing(reference: Reference, workers: int) -> None:
    learner = make_learner(workers=workers)
    for _ in range(EPOCHS):
        learner.evaluate()
        learner.predict(learner.data.validation)
        learner.fit(1, phases=[Noisy()])
        learner.evaluate(learner.data.training, metrics=[mae])
        learner.predict(learner.data.training)
    assert_same_bits(learner, reference(workers))


def generator_loader() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(8))


def persistent_loader() -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=5, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("loader", [generator_loader, persistent_loader])
@pytest.mark.parametrize("action", ["evaluate", "predict", "check", "sanity check"])
def test_looking_at_the_training_data_between_epochs_changes_nothing(
    action: str, loader: Callable[[], DataLoader[Any]]
) -> None:
    plain, watched = make_learner(), make_learner(*([SanityCheck()] if action == "sanity check" else []))
    for learner in (plain, watched):
        learner.data.training = loader()
        for _ in range(EPOCHS):
            if learner is watched and action == "check":
                learner.check(phases=[Noisy()])
            elif learner is watched and action in ("evaluate", "predict"):
                getattr(learner, action)(learner.data.training)
            learner.fit(1, phases=[Noisy()])
        learner.data.training = []  # ends the workers
    assert_same_bits(plain, watched)


@pytest.mark.slow
@WORKERS
def test_a_check_of_the_gradients_changes_nothing(reference: Reference, workers: int) -> None:
    learner = make_learner(workers=workers)
    learner.check(phases=[Noisy()])
    for _ in range(EPOCHS):
        learner.fit(1, phases=[Noisy()])
        learner.check()
    assert_same_bits(learner, reference(workers))


@define
class ValidatesAt(UnsafeCallback):
    """Runs a validation epoch in the middle of the training."""

    event: type[Event] = StepEnd
    epochs: int = field(default=0, init=False)

    @on(Event, TrainingPhase)
    def validate(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            learner.epoch(ValidationPhase())
            self.epochs += 1


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("event", EVENTS)
def test_a_validation_epoch_started_by_a_handler_changes_nothing(reference: Reference, event: type[Event]) -> None:
    callback = ValidatesAt(event)
    learner = train(make_learner(callback, Recorder(), Draws()))
    assert_same_bits(learner, reference(0))
    assert callback.epochs == EPOCHS * (5 if event in STEP_EVENTS else 1)


@pytest.mark.slow
def test_a_validation_epoch_started_by_a_handler_changes_nothing_with_workers(reference: Reference) -> None:
    assert_same_bits(train(make_learner(ValidatesAt(UpdateBegin), workers=2)), reference(2))


@define
class EvaluatesAt(UnsafeCallback):
    event: type[Event] = StepEnd

    @on(Event, TrainingPhase)
    def evaluate(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            learner.evaluate()
            learner.predict(learner.data.validation)


@pytest.mark.slow
@pytest.mark.parametrize("event", [BackwardBegin, StepEnd])
def test_evaluation_and_prediction_started_by_a_handler_change_nothing(
    reference: Reference, event: type[Event]
) -> None:
    assert_same_bits(train(make_learner(EvaluatesAt(event))), reference(0))


class OwnLoop(Noisy):
    """A loop of one's own that validates after every second step."""

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for count, batch in enumerate(data):
                self.step(learner, batch)
                if count % 2:
                    learner.epoch(ValidationPhase())
                    learner.predict(learner.data.validation)


@pytest.mark.slow
@WORKERS
def test_a_loop_of_ones_own_that_validates_inside_its_epoch_changes_nothing(reference: Reference, workers: int) -> None:
    learner = make_learner(Draws(), Recorder(), workers=workers)
    learner.fit(EPOCHS, phases=[OwnLoop()])
    assert_same_bits(learner, reference(workers))
    assert learner.history[ValidationPhase].epochs == EPOCHS * 2


class DrawsBetween(Noisy):
    """A loop of one's own that draws a single normal number of NumPy's between two steps."""

    def epoch(self, learner: Learner, data: Any) -> None:
        with runepoch(learner, self):
            for xs, ys in data:
                self.step(learner, (xs + np.random.randn(), ys))


@pytest.mark.parametrize("event", [StepBegin, StepEnd])
def test_a_callback_changes_nothing_of_what_a_loop_of_ones_own_draws_between_two_steps(event: type[Event]) -> None:
    batches = [(xs.float(), ys) for xs, ys in DataLoader(Augmented(), batch_size=5)]
    plain, watched = make_learner(), make_learner(DrawsOneNormalNumber(event))
    for learner in (plain, watched):
        learner.fit(EPOCHS, data=batches, phases=[DrawsBetween()])
    assert_same_bits(plain, watched)


class ChoosesBefore(Noisy):
    """A loop of one's own that draws before its epoch begins."""

    def epoch(self, learner: Learner, data: Any) -> None:
        keep = torch.rand(5) + torch.tensor(np.random.rand(5))
        with runepoch(learner, self):
            for number, batch in zip(keep, data, strict=True):
                if number > 0.7:
                    self.step(learner, batch)


@define
class DrawsInTheFit(Callback):
    """Draws at the events of the fit itself."""

    @on(FitBegin)
    @on(CycleBegin)
    @on(CycleEnd)
    @on(FitEnd)
    def watch(self, event: Event, phase: Phase, learner: Any) -> None:
        draw()


def test_a_callback_that_draws_at_the_events_of_the_fit_changes_nothing(reference: Reference) -> None:
    assert_same_bits(train(make_learner(DrawsInTheFit())), reference(0))


def test_a_callback_that_draws_at_the_events_of_the_fit_does_not_change_what_a_loop_draws_before_its_epoch() -> None:
    plain, watched = make_learner(), make_learner(DrawsInTheFit())
    for learner in (plain, watched):
        torch.manual_seed(3)
        np.random.seed(3)
        learner.fit(EPOCHS, phases=[ChoosesBefore()])
    assert_same_bits(plain, watched)


def test_a_callback_that_draws_in_the_fit_does_not_change_the_seed_of_the_next_learner() -> None:
    seeds = []
    for callbacks in ([], [DrawsInTheFit()]):
        learner = toy_learner(*callbacks)
        torch.manual_seed(3)
        learner.fit(1)
        seeds.append(Learner(nn.Linear(1, 1)).seed)
    assert seeds[0] == seeds[1]


# A GAN: several update blocks draw in one step


class GAN(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = gen(torch.randn(len(state.real), 2))
            with learner.optimizing("D") as block:
                block.loss = softplus(-dis(state.real)).mean() + softplus(dis(state.fake.detach())).mean()
            state.fake = gen(torch.randn(len(state.real), 2) + np.random.randn() + random.random())
            with learner.optimizing("G") as block:
                block.loss = softplus(-dis(state.fake)).mean()


def gan_learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(1)
    models = {
        "G": nn.Linear(2, 3),
        "D": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)),
    }
    images = TensorBatches(Augmented().xs, batch_size=5, shuffle=True)
    return Learner(models, data=(images,), seed=5, callbacks=callbacks, default_callbacks=False)


@pytest.mark.parametrize("observer", [Draws, SaysItDraws], ids=["undeclared", "draws = True"])
def test_a_callback_that_draws_between_the_update_blocks_of_a_gan_changes_nothing(observer: type[Draws]) -> None:
    plain, watched = gan_learner(), gan_learner(observer(), Recorder(), Metrics(), StopOnNaNLoss())
    plain.fit(EPOCHS, phases=[GAN()])
    watched.fit(EPOCHS, phases=[GAN()])
    assert_same_bits(plain, watched)


# The generators of the script


ACTIONS: dict[str, Callable[[Learner], object]] = {
    "fit": lambda learner: learner.fit(2, phases=[Noisy(), ValidationPhase()]),
    "epoch": lambda learner: learner.epoch(Noisy()),
    "evaluate": lambda learner: learner.evaluate(),
    "predict": lambda learner: learner.predict(learner.data.training),
    "check": lambda learner: learner.check(phases=[Noisy()]),
}


@pytest.mark.slow(quick=6)
@pytest.mark.parametrize("in_store", [False, True], ids=["nothing in store", "a normal number in store"])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_generators_of_the_script_are_as_they_were_after(action: str, in_store: bool) -> None:
    learner = make_learner(Draws(), SaysItDraws(), *defaults()["all"])
    draw()
    if in_store:
        np.random.randn()
    before = generators()
    ACTIONS[action](learner)
    assert generators() == before


def test_the_generators_of_the_script_are_as_they_were_after_a_fit_that_fails() -> None:
    def fail(learner: Any) -> None:
        draw()
        raise KeyError("on purpose")

    learner = make_learner(CustomCallback(fail, BackwardEnd))
    draw()
    before = generators()
    with pytest.raises(KeyError, match="on purpose"):
        train(learner)
    assert generators() == before


def test_the_generators_of_the_script_are_as_they_were_after_a_fit_whose_callbacks_draw_at_its_events() -> None:
    learner = make_learner(DrawsInTheFit())
    before = generators()
    train(learner)
    assert generators() == before


# What a callback that draws gets


@define
class Samples(Callback):
    """Draws at the end of every training step, and keeps the numbers."""

    numbers: list[list[float]] = field(factory=list, init=False, repr=False)

    draws = True

    @on(StepEnd, TrainingPhase)
    def sample(self, event: Event, phase: Phase, learner: Any) -> None:
        self.numbers.append(draw())


def samples(*others: Callback, phases: list[Phase], seed: int = 5) -> list[list[float]]:
    callback = Samples()
    make_learner(callback, *others, seed=seed).fit(2, phases=phases)
    return callback.numbers


@pytest.mark.slow
def test_a_callback_that_says_it_draws_gets_the_same_numbers_whatever_else_is_there() -> None:
    alone = samples(phases=[Noisy()])
    assert len({tuple(numbers) for numbers in alone}) == 10
    assert samples(Draws(), SaysItDraws(), *defaults()["all"], phases=[Noisy(), ValidationPhase()]) == alone
    draw()
    assert samples(ValidatesAt(StepBegin), phases=[OwnLoop()]) == alone


def test_a_callback_that_says_it_draws_gets_other_numbers_with_another_seed() -> None:
    assert samples(phases=[Noisy()], seed=6) != samples(phases=[Noisy()])


@define
class FixedNoise(Callback):
    """Draws once, when it is set up, as a sampler of images does."""

    noise: Tensor | None = field(default=None, init=False, repr=False)

    draws = True

    def init(self, learner: Any) -> None:
        self.noise = torch.randn(4)


def test_what_a_callback_that_says_it_draws_draws_in_init_is_decided_by_the_seed_of_the_run() -> None:
    noises = []
    for script in (1, 2):
        callback = FixedNoise()
        learner = make_learner()
        torch.manual_seed(script)
        before = generators()
        learner.add_callback(callback)
        assert generators() == before
        noises.append(callback.noise)
    assert torch.equal(*noises)


# The assertion for users


def test_assert_observer_passes_for_a_callback_and_a_phase_that_only_watch() -> None:
    assert_observer(Draws(), toy_learner)
    assert_observer(ValidationPhase(), toy_learner)


def test_assert_observer_fails_for_a_callback_that_changes_a_weight() -> None:
    def nudge(learner: Any) -> None:
        learner.model.value.data += 1e-6

    meddler = CustomCallback(nudge, StepBegin, TrainingPhase)
    with pytest.raises(AssertionError, match=r"value differs by up to"):
        assert_observer(meddler, toy_learner)


def test_assert_observer_fails_for_a_phase_that_trains() -> None:
    with pytest.raises(AssertionError, match=r"value differs by up to"):
        assert_observer(TrainingPhase(), toy_learner)


class TrainEval(ValidationPhase):
    """Watches the training data."""

    data_key = "training"


def generator_sampler() -> DataLoader[Any]:
    rows = Augmented()
    return DataLoader(rows, batch_size=5, sampler=RandomSampler(rows, generator=torch.Generator().manual_seed(8)))


def shuffled_batches() -> TensorBatches:
    rows = Augmented()
    return TensorBatches(rows.xs, rows.ys, batch_size=5, shuffle=True)


def seeded_batches() -> TensorBatches:
    rows = Augmented()
    return TensorBatches(rows.xs, rows.ys, batch_size=5, shuffle=True, seed=3)


LOADERS = [generator_loader, persistent_loader, generator_sampler, shuffled_batches, seeded_batches]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("before", [True, False], ids=["before the training", "after the training"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_phase_that_only_watches_the_training_data_changes_nothing(loader: Callable[[], Any], before: bool) -> None:
    plain, watched = make_learner(), make_learner(Recorder())
    for learner, phases in (
        (plain, [Noisy()]),
        (watched, [TrainEval(), Noisy()] if before else [Noisy(), TrainEval()]),
    ):
        learner.data.training = loader()
        learner.fit(EPOCHS, phases=phases)
        learner.data.training = []  # ends the workers
    assert_same_bits(plain, watched)
    assert watched.history[TrainEval].steps == 5 * EPOCHS


@pytest.mark.slow
@WORKERS
def test_a_phase_that_only_watches_a_plain_loader_of_the_training_changes_nothing(
    reference: Reference, workers: int
) -> None:
    assert_same_bits(train(make_learner(workers=workers), TrainEval()), reference(workers))


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("validated", ["after each epoch", "at the end of each step"])
@pytest.mark.parametrize("shared", ["generator", "loader with persistent workers"])
def test_validation_on_what_the_training_shares_changes_nothing(shared: str, validated: str) -> None:
    plain = make_learner()
    watched = make_learner(*([ValidatesAt(StepEnd)] if validated == "at the end of each step" else []))
    for learner in (plain, watched):
        if shared == "generator":
            generator = torch.Generator().manual_seed(8)
            both = [DataLoader(Augmented(), batch_size=size, shuffle=True, generator=generator) for size in (5, 8)]
            learner.data.training, learner.data.validation = both
        else:
            learner.data.training = learner.data.validation = persistent_loader()
        validates = learner is watched and validated == "after each epoch"
        learner.fit(2, phases=[Noisy(), ValidationPhase()] if validates else [Noisy()])
        learner.data.training = learner.data.validation = []  # ends the workers
    assert_same_bits(plain, watched)


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("action", ["evaluate", "predict", "check", "sanity check"])
def test_looking_at_the_data_of_a_sampler_with_a_generator_changes_nothing(action: str) -> None:
    plain, watched = make_learner(), make_learner(*([SanityCheck()] if action == "sanity check" else []))
    for learner in (plain, watched):
        learner.data.training = generator_sampler()
        for _ in range(EPOCHS):
            if learner is watched and action == "check":
                learner.check(phases=[Noisy()])
            elif learner is watched and action in ("evaluate", "predict"):
                getattr(learner, action)(learner.data.training)
            learner.fit(1, phases=[Noisy()])
    assert_same_bits(plain, watched)


class RunningScale(nn.Module):
    """A loss divided by its running mean, which is updated in train mode: in place, or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("scale", torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, preds: Tensor, ys: Tensor) -> Tensor:
        loss = mse_loss(preds, ys)
        self.modes.append(self.training)
        if self.training:
            scale = 0.9 * self.scale + 0.1 * loss.detach()
            self.scale = self.scale.copy_(scale) if self.in_place else scale
        return loss / self.scale


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "by a new tensor"])
@pytest.mark.parametrize("action", ["validation", "evaluate", "check", "sanity check"])
def test_looking_changes_nothing_of_a_loss_with_a_state_of_its_own(action: str, in_place: bool) -> None:
    plain, watched = make_learner(), make_learner(*([SanityCheck()] if action == "sanity check" else []))
    for learner in (plain, watched):
        learner.loss_fn = RunningScale(in_place)
        for _ in range(EPOCHS):
            learner.fit(1, phases=[Noisy()])
            learner.loss_fn.modes.clear()
            if learner is watched and action == "validation":
                learner.epoch(ValidationPhase())
                assert learner.loss_fn.modes == [False] * 3
            elif learner is watched and action == "evaluate":
                learner.evaluate()
                assert learner.loss_fn.modes == [False] * 3
            elif learner is watched and action == "check":
                learner.check(phases=[Noisy()])
                assert learner.loss_fn.modes == []  # what its step appended is taken back
    assert_same_bits(plain, watched)
    assert torch.equal(plain.loss_fn.scale, watched.loss_fn.scale)
    assert plain.loss_fn.scale.item() != 1
    assert watched.loss_fn.training


class Nests(Noisy):
    """Validates inside each training step: with a ``runstep``, with a phase's step, or not at all."""

    def __init__(self, how: str | None) -> None:
        self.how = how

    def look(self, learner: Learner, batch: Any) -> None:
        step = learner.step
        if self.how == "runstep":
            with runstep(learner, ValidationPhase(), xs=batch[0]) as (_, inner):
                inner.preds = learner.model(inner.xs)
                assert learner.step is inner
                assert not learner.model.training
        elif self.how == "step":
            assert ValidationPhase().step(learner, batch).loss.grad_fn is None
        assert learner.step is step

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            self.look(learner, batch)
            state.preds = learner.model(state.xs + 0.1 * (np.random.randn() + random.random()))
            self.look(learner, batch)
            state.loss = learner.loss_fn(state.preds, state.ys) * (1 + 0.1 * torch.rand(()))
            learner.backward(state.loss)
            self.look(learner, batch)
            learner.update()


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("how", ["runstep", "step"])
def test_a_validation_step_inside_a_training_step_changes_nothing(how: str) -> None:
    plain, watched = make_learner(), make_learner(Recorder(), Draws())
    plain.fit(EPOCHS, phases=[Nests(None)])
    watched.fit(EPOCHS, phases=[Nests(how)])
    assert_same_bits(plain, watched)


@define
class DrawsWhenUndoing(Callback):
    """Draws in what it defers."""

    event: type[Event]
    undone: int = field(default=0, init=False, repr=False)

    draws = False

    @on(Event, TrainingPhase)
    def act(self, event: Event, phase: Phase, learner: Any) -> None:
        if isinstance(event, self.event):
            learner.defer(self.undo)

    def undo(self) -> None:
        draw()
        self.undone += 1


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("event", STEP_EVENTS)
def test_what_a_deferred_function_draws_changes_nothing(reference: Reference, event: type[Event]) -> None:
    callback = DrawsWhenUndoing(event)
    assert_same_bits(train(make_learner(callback)), reference(0))
    assert callback.undone == 5 * EPOCHS
