from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fluxloop.compile.graphs
from fluxloop import (
    EMA,
    AbstractTrainingPhase,
    Accelerator,
    ActivationStats,
    AutoencoderPhase,
    BackwardBegin,
    BackwardEnd,
    BarlowTwinsPhase,
    BYOLPhase,
    Callback,
    CancelStepException,
    CompileError,
    CustomCallback,
    DINOPhase,
    DistillationPhase,
    FluxloopError,
    GANPhase,
    GANValidationPhase,
    GradientClip,
    Learner,
    LearningRate,
    LogHistograms,
    LossBegin,
    LossError,
    LRScheduler,
    MAEPhase,
    Memory,
    MetricsPrinter,
    MixUp,
    MoCoPhase,
    Momentum,
    ObjectiveValidationPhase,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    Phase,
    Scheduler,
    SimCLRPhase,
    SimSiamPhase,
    StepBegin,
    StepEnd,
    SupConPhase,
    TrainingPhase,
    TripletPhase,
    TwoViews,
    Unfreeze,
    UpdateBegin,
    VAEPhase,
    ValidationPhase,
    VICRegPhase,
    WeightDecay,
    accuracy,
    cosine,
    linear,
    on,
    one_cycle,
    runepoch,
    runstep,
    throttle,
)
from fluxloop.testing import assert_observer, assert_resumes_exactly, toy_learner

ROWS = 70
"""Two full batches of 32 and a ragged one."""
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
RMSPROP = partial(torch.optim.RMSprop, lr=1e-3)
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=False)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """Import what tracing needs, and keep it out of each later look through the process's objects."""
    import torch._inductor
    import torch.fx.experimental.proxy_tensor  # noqa: F401 - takes seconds

    gc.freeze()
    yield
    gc.unfreeze()


WITH_COMPILER = "FLUXLOOP_COMPILER" in os.environ
"""Whether these tests use the compiler, which takes many minutes."""


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the graphs as they were traced, without a compiler: the same operations, in no time.

    Without gradients, as a compiled graph is run. With the compiler, where it was asked for, operations
    draw random numbers as they do in eager steps.
    """
    if WITH_COMPILER:
        from torch._inductor import config

        with config.patch(fallback_random=True):
            yield
    else:
        monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
        yield


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 16, generator=generator), torch.randint(4, (ROWS,), generator=generator)


def learner(compile: Any = "step", model: Callable[[], Any] = mlp, **options: Any) -> Learner[Any]:
    torch.manual_seed(0)
    defaults = {"data": (rows(), rows()), "optimizer": SGD, "loss_fn": functional.cross_entropy}
    made = Learner(model(), **{**defaults, **options}, accelerator=Accelerator("cpu", compile=compile), seed=0)
    made.remove_callback(MetricsPrinter)
    return made


def weights(of: Learner[Any]) -> list[Tensor]:
    return [t.detach().clone() for m in of.modules() for t in (*m.parameters(), *m.buffers())]


def both(
    epochs: int = 3,
    phases: Callable[[], list[Phase]] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    tolerance: float = 2e-6,
    **options: Any,
) -> tuple[Learner[Any], Learner[Any]]:
    """Train eagerly and compiled; the weights have to agree as floating point allows."""
    trained = []
    for compile in (False, "step"):
        made = learner(compile, callbacks=callbacks(), **options)
        made.fit(epochs, phases=None if phases is None else phases())
        trained.append(made)
    eager, compiled = trained
    tolerance *= 10 if WITH_COMPILER else 1  # other kernels add up in another order
    for a, b in zip(weights(eager), weights(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return eager, compiled


def graphs(of: Learner[Any], phase: type[Phase] = TrainingPhase) -> int:
    assert of._compiled is not None
    return sum(map(len, of._compiled._plans[phase]._graphs.values()))


# Compiled by TorchInductor


@pytest.mark.slow
def test_a_compiled_training_agrees_with_eager_after_100_steps_ragged_batches_and_dropout_too() -> None:
    model = lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))  # noqa: E731
    clip = lambda: [GradientClip(0.5), Scheduler({LearningRate: one_cycle(100, 0.05)})]  # noqa: E731
    eager, compiled = both(34, callbacks=clip, model=model, tolerance=1e-4, data=(rows(),))
    assert compiled.history[TrainingPhase].steps == 102
    assert compiled.history[TrainingPhase].updates == eager.history[TrainingPhase].updates == {None: 102}
    assert graphs(compiled) == 2  # full batches, and the ragged one
    for name in ("training/loss", "training/grad_norm"):
        assert compiled.history[name] == pytest.approx(eager.history[name], rel=1e-3)


@pytest.mark.slow
def test_a_compiled_dropout_draws_other_numbers_at_each_step_the_same_in_each_run() -> None:
    def outputs() -> list[Tensor]:
        seen: list[Tensor] = []
        note = CustomCallback(lambda learner: seen.append(learner.step.preds.clone()), StepEnd, TrainingPhase)
        xs = torch.ones(64 * 3, 8)
        model = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))  # noqa: E731
        data = ([(xs[:64], torch.zeros(64, dtype=torch.long))] * 4,)
        learner(model=model, data=data, callbacks=[note], optimizer=partial(torch.optim.SGD, lr=0.0)).fit(1)
        return seen

    first, again = outputs(), outputs()
    assert len(first) == 4
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[2], first[3])
    assert all(map(torch.equal, first, again))


# A graph that was compiled and cannot be run


def breaking(error: Exception, calls: int = 0) -> Callable[..., Any]:
    """Compile to a function that changes all it is given, draws, and fails, for so many calls or for ever."""
    failures = []

    def lower(graph: Any, inputs: list[Any], device: torch.device) -> Any:
        def call(*inputs: Tensor) -> Any:
            if calls and len(failures) == calls:
                with torch.no_grad():
                    return graph(*inputs)
            failures.append(error)
            with torch.no_grad():
                for tensor in inputs[: len(inputs) - 3]:  # the rate and the batch are no state
                    tensor.add_(1)
            torch.rand(3)
            raise error

        return call

    return lower


@pytest.mark.slow
def test_what_fails_at_the_first_call_of_a_graph_is_an_error_that_says_what_to_do_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = breaking(RuntimeError("no such kernel\nat some place"), calls=1)
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", broken)
    made = learner(optimizer=SGD, model=lambda: nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)), data=(rows(),))
    state: list[Any] = []
    note = lambda learner: state.append((weights(learner), copy.deepcopy(learner.optimizer.state_dict())))  # noqa: E731
    made.add_callback(CustomCallback(note, StepEnd, TrainingPhase))
    with pytest.raises(CompileError, match="was compiled, but cannot be run: RuntimeError: no such kernel") as caught:
        made.fit(1)
    for words in ("TrainingPhase()", "Nothing was changed", "compiled = False", 'compile="model"'):
        assert words in str(caught.value)
    assert len(state) == 1
    assert all(map(torch.equal, state[0][0], weights(made)))
    for old, new in zip(state[0][1]["state"].values(), made.optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])
    made.fit(1)  # it may be tried again
    assert len(state) == 4


def test_memory_that_runs_out_at_the_first_call_is_the_error_that_everybody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", breaking(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    made = learner(data=(rows(),))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        made.fit(1)
    assert all(weight.abs().max() < 1 for weight in weights(made))


def test_a_torch_that_cannot_trace_is_said_when_the_learner_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "_is_compiling_flag")
    with pytest.raises(CompileError, match="cannot be used with torch"):
        learner()


# What a step does, graph by graph


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.SGD, lr=0.1, maximize=True),
        partial(torch.optim.Adam, lr=1e-3, fused=True),
        partial(torch.optim.AdamW, lr=1e-3, amsgrad=True, foreach=False),
        partial(torch.optim.AdamW, lr=torch.tensor(1e-3), foreach=False),
        partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.9),
        partial(torch.optim.Adagrad, lr=0.01, lr_decay=0.1, weight_decay=0.01),
        partial(torch.optim.NAdam, momentum_decay=0.01, decoupled_weight_decay=True, weight_decay=0.1),
        partial(torch.optim.RAdam, weight_decay=0.1),
        *(
            getattr(torch.optim, name)
            for name in (
                *("Adam", "AdamW", "Adagrad", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adamax", "ASGD", "Rprop"),
            )
        ),
    ],
    ids=str,
)
def test_torchs_optimizers_step_inside_the_graph(optimizer: Any) -> None:
    eager, compiled = both(2, optimizer=optimizer, tolerance=1e-5)
    state, other = eager.optimizer.state_dict()["state"], compiled.optimizer.state_dict()["state"]
    assert state.keys() == other.keys()
    for index, entries in state.items():
        for name, value in entries.items():
            torch.testing.assert_close(value, other[index][name], rtol=1e-4, atol=1e-6)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="new in torch 2.9")
def test_muon_which_asks_for_its_rate_as_a_number_is_refused_in_words() -> None:
    made = learner(optimizer=partial(torch.optim.Muon, lr=0.01), model=matrices)
    with pytest.raises(CompileError, match=r"asks for a number in the middle .*a tensor as alpha= or value="):
        made.fit(1)


@pytest.mark.slow(quick=1)
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("optimizer", "sparse", "words"),
    [
        ("Adafactor", False, "the step of TrainingPhase"),
        ("LBFGS", False, "LBFGS needs a closure"),
        ("SparseAdam", True, "gradients are sparse"),
        ("SGD", True, r"gradients are sparse.*Embedding\(sparse=False\)"),
    ],
)
def test_optimizers_that_no_graph_can_step_are_refused_in_words(optimizer: str, sparse: bool, words: str) -> None:
    if not hasattr(torch.optim, optimizer):
        pytest.skip(f"torch {torch.__version__} has no {optimizer}")
    made = learner(
        model=lambda: nn.Embedding(4, 4, sparse=sparse),
        data=((torch.arange(4), torch.arange(4)),),
        optimizer=partial(getattr(torch.optim, optimizer), lr=0.1),
    )
    with pytest.raises(FluxloopError, match=words):
        made.fit(3)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [GradientClip(0.1)],
        lambda: [GradientClip(value=0.01)],
        lambda: [Scheduler({LearningRate: one_cycle(9, 0.1)})],
        lambda: [LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), unit="step")],
        lambda: [EMA("model", 0.9)],
        lambda: [MixUp(0.4, num_classes=4)],
        lambda: [Unfreeze({"0": 1})],
        lambda: [Unfreeze({"0": 3}, unit="step")],
        lambda: [LogHistograms(Memory(), of="weights", every=2)],
    ],
    ids=["clip", "clip values", "schedule", "torch's", "average", "mixup", "unfreeze", "unfreeze in an epoch", "log"],
)
def test_callbacks_work_with_compiled_steps(callbacks: Callable[[], list[Callback]]) -> None:
    eager, compiled = both(callbacks=callbacks)
    assert compiled.history[TrainingPhase] == eager.history[TrainingPhase]
    for name in eager.history.metrics[TrainingPhase]:
        assert compiled.history[f"training/{name}"] == pytest.approx(eager.history[f"training/{name}"], rel=1e-4)
    for view in ("model@ema",):
        if view in eager.weights:
            for a, b in zip(eager.weights[view].parameters(), compiled.weights[view].parameters(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_schedules_of_the_learning_rate_and_of_weight_decay_make_no_new_graphs() -> None:
    _, compiled = both(5, callbacks=lambda: [Scheduler({LearningRate: linear(12, 0.1, 0.01)})])
    assert graphs(compiled) == 2
    for optimizer in (SGD, partial(SGD, maximize=True), ADAM, partial(torch.optim.AdamW, fused=False), RMSPROP):
        decay = linear(15, 0.0, 0.3)
        _, compiled = both(5, callbacks=lambda: [Scheduler({WeightDecay: decay})], optimizer=optimizer)  # noqa: B023
        assert graphs(compiled) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_momentum_that_changes_at_every_step_is_right_and_said() -> None:
    with pytest.warns(UserWarning, match=r"compiled 8 times.*the optimizer: momentum"):
        both(5, callbacks=lambda: [Scheduler({Momentum: linear(15, 0.5, 0.9)})])


def encoder() -> dict[str, nn.Module]:
    return {"encoder": nn.Linear(16, 8), "projector": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))}


def student(*parts: str) -> dict[str, nn.Module]:
    network = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6))
    return {
        "student": network,
        "teacher": copy.deepcopy(network).requires_grad_(False),
        **{part: nn.Linear(6, 6) for part in parts},
    }


VIEWS = TwoViews(lambda xs: xs + 0.1 * torch.randn_like(xs))


def with_twin(phase: Any) -> list[Phase]:
    return [phase, ObjectiveValidationPhase(phase)]


class Triplets(TripletPhase):
    """Makes triplets of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries((batch[0], batch[0] + 0.1, batch[0].roll(1, 0)))


class Images(MAEPhase):
    """Makes images of the rows."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return super().entries(batch[0].reshape(-1, 1, 4, 4))


class Tokens(nn.Module):
    """An encoder of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(4, 8), nn.Embedding(4, 8)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.layer(patches) + self.places(places)
        return out


class Patches(nn.Module):
    """A decoder of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.layer(tokens.mean(1)).reshape(-1, 4, 4)
        return out


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("phases", "model", "callbacks"),
    [
        (lambda: with_twin(SimCLRPhase(VIEWS)), encoder, list),
        (lambda: [BarlowTwinsPhase(VIEWS)], encoder, list),
        (lambda: [VICRegPhase(VIEWS)], encoder, list),
        (lambda: [SimSiamPhase(VIEWS)], lambda: {**encoder(), "predictor": nn.Linear(6, 6)}, list),
        (
            lambda: with_twin(BYOLPhase(VIEWS)),
            lambda: student("predictor"),
            lambda: [EMA("student", cosine(total=9, start=0.9, end=1.0), into="teacher")],
        ),
        (lambda: with_twin(MoCoPhase(VIEWS, queue_size=64)), student, lambda: [EMA("student", 0.9, into="teacher")]),
        (
            lambda: [DINOPhase(VIEWS, teacher_temperature=linear(9, 0.04, 0.07))],
            student,
            lambda: [EMA("student", 0.9, into="teacher")],
        ),
        (lambda: [VAEPhase()], lambda: {"encoder": nn.Linear(16, 8), "decoder": nn.Linear(4, 16)}, list),
        (lambda: [AutoencoderPhase()], lambda: {"encoder": nn.Linear(16, 8), "decoder": nn.Linear(8, 16)}, list),
        (lambda: with_twin(SupConPhase(VIEWS)), encoder, list),
        (lambda: [DistillationPhase()], student, list),
        (lambda: [Triplets()], mlp, list),
        (lambda: [Images(2, normalize=True)], lambda: {"encoder": Tokens(), "decoder": Patches()}, list),
    ],
    ids=[
        *("SimCLR", "Barlow Twins", "VICReg", "SimSiam", "BYOL", "MoCo", "DINO", "VAE", "autoencoder", "SupCon"),
        *("distillation", "triplets", "MAE"),
    ],
)
def test_phases_of_one_loss_are_compiled(phases: Any, model: Any, callbacks: Any) -> None:
    loss_fn = None if type(phases()[0]) is DistillationPhase else functional.mse_loss
    _, compiled = both(phases=phases, model=model, callbacks=callbacks, loss_fn=loss_fn)
    assert graphs(compiled, type(phases()[0])) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_gan_is_compiled_with_a_graph_for_each_kind_of_step() -> None:
    models = lambda: {"G": nn.Linear(8, 16), "D": nn.Linear(16, 1)}  # noqa: E731
    gan = lambda: GANPhase(noise=8, critic_steps=2, gradient_penalty=10.0)  # noqa: E731
    phases = lambda: (lambda phase: [phase, GANValidationPhase(phase)])(gan())  # noqa: E731
    eager, compiled = both(4, phases=phases, model=models, loss_fn=None, optimizer=ADAM)
    assert graphs(compiled, GANPhase) == 4  # with the generator and without, full batches and the ragged one
    assert compiled.history[GANPhase].updates == eager.history[GANPhase].updates == {"D": 12, "G": 6}


class TwoRates(PerOptimizerPhase):
    def loss(self, learner: Any, state: Any, name: str | None) -> Tensor:
        loss: Tensor = learner.loss_fn(state.preds, state.ys)
        return loss + learner.model[0].weight.square().sum() if name == "0" else loss


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_one_graph_holds_the_updates_of_several_optimizers_in_order() -> None:
    phases = lambda: [TwoRates(), PerOptimizerValidationPhase(TwoRates())]  # noqa: E731
    optimizers = {"0": SGD, "2": ADAM}
    eager, compiled = both(phases=phases, optimizer=optimizers, callbacks=lambda: [GradientClip(0.5)])
    assert compiled.history[TwoRates].updates == eager.history[TwoRates].updates == {"0": 9, "2": 9}
    assert graphs(compiled, TwoRates) == 2
    assert compiled.history["training/grad_norm_2"] == pytest.approx(eager.history["training/grad_norm_2"], rel=1e-4)


class Nested(AbstractTrainingPhase):
    """A phase of a user's, with entries of its own."""

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"batch": {"rows": batch[0], "more": [batch[1]], "name": "digits"}}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.batch["rows"])
        state.seen = {"preds": state.preds.detach() * 2, "number": 3}
        with learner.optimizing() as block:
            block.loss = functional.cross_entropy(state.preds, state.batch["more"][0])

    def finish(self, learner: Any, state: Any) -> None:
        state.mean = state.preds.mean().item()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_phase_of_ones_own_is_compiled_by_its_entries_body_and_finish() -> None:
    eager, compiled = both(phases=lambda: [Nested()])
    for made in (eager, compiled):
        assert made.step.seen["number"] == 3
        assert isinstance(made.step.mean, float)
        torch.testing.assert_close(made.step.seen["preds"], made.step.preds * 2)
    assert compiled.step.mean == pytest.approx(eager.step.mean, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_shared_parametrized_recurrent_unused_and_normalized_parameters() -> None:
    shared = nn.Linear(16, 16)
    models: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(copied := copy.deepcopy(shared), nn.Tanh(), copied, nn.Linear(16, 4)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4))),
        lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        Recurrent,
        Unused,
    ]
    for model in models:
        both(model=model, tolerance=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(xs.view(-1, 4, 4))[0][:, -1])
        return out


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(3, 3)

    def forward(self, xs: Tensor) -> Tensor:
        out: Tensor = self.used(xs)
        return out


class Rebinding(Unused):
    """Puts another tensor into the place of its buffer, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, xs: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return super().forward(xs) * (1 + 0.1 * self.seen)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_buffer_that_forward_replaces_counts_on() -> None:
    _, compiled = both(model=Rebinding)
    assert compiled.model.seen == 2 * 9  # training and validation


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_tensors_that_a_loss_function_holds_are_looked_up_not_copied() -> None:
    balance = torch.ones(4)
    made = learner(loss_fn=partial(functional.cross_entropy, weight=balance))
    made.fit(1)
    graph_count = graphs(made)
    balance[:] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    made.fit(1)
    assert graphs(made) == graph_count
    with torch.no_grad():
        expected = functional.cross_entropy(made.model(made.step.xs), made.step.ys, weight=balance)
    torch.testing.assert_close(made.step.loss, expected)  # of the validation step, the last


# What a step leaves


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_entries_stay_readable_without_graphs_and_gradients_are_not_kept() -> None:
    made = learner()
    made.fit(1, phases=[TrainingPhase()])
    step = made.step
    assert {"xs", "ys", "preds", "loss"} == set(vars(step))
    assert not step.loss.requires_grad
    assert step.preds.shape == (ROWS % 32, 4)
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_events_outside_and_counts_of_updates_are_as_ever() -> None:
    heard: list[str] = []

    class Note(Callback):
        in_compiled_step = "after"

        @on(StepBegin)
        @on(StepEnd)
        @on(LossBegin)
        @on(BackwardBegin)
        @on(UpdateBegin)
        def note(self, event: Any, phase: Any, learner: Any) -> None:
            heard.append(type(event).__name__)

    learner(callbacks=[Note()]).fit(1, phases=[TrainingPhase()])
    one = ["StepBegin", "LossBegin", "BackwardBegin", "UpdateBegin", "StepEnd"]
    assert heard == one * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_loss_that_is_not_finite_leaves_weights_and_state_as_they_are_and_ends_the_fit() -> None:
    xs, ys = rows()
    batches = [(xs[:32], ys[:32]), (xs[32:64], ys[32:64]), (xs[:32] * float("nan"), ys[:32]), (xs[:32], ys[:32])]
    eager, compiled = both(2, data=(batches,), optimizer=ADAM)
    assert graphs(compiled) == 1
    reason = "the loss became nan in TrainingPhase(), epoch 1, step 3 of the run"
    assert compiled.history.stop_reason == eager.history.stop_reason == reason
    assert compiled.history[TrainingPhase].steps == eager.history[TrainingPhase].steps == 2
    assert compiled.history[TrainingPhase].updates == eager.history[TrainingPhase].updates == {None: 2}
    steps = [state["step"].item() for state in compiled.optimizer.state.values()]
    assert steps == [2.0] * 4


# Resume, and watching


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_compiled_runs_resume_to_the_bit() -> None:
    def make() -> Learner[Any]:
        rates = Scheduler({LearningRate: one_cycle(9, 0.1), WeightDecay: linear(6, 0.3, 0.0)})
        callbacks = [rates, GradientClip(0.5), EMA("model", 0.9)]
        model = lambda: nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 4))  # noqa: E731
        return learner(model=model, callbacks=callbacks, optimizer=ADAM)

    assert_resumes_exactly(make, epochs=2, at=[2, 7])


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_with_inductor_too() -> None:
    accelerator = partial(Accelerator, "cpu", compile="step")
    assert_resumes_exactly(lambda: toy_learner(accelerator=accelerator()), epochs=1, at=[1, 9])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_watching_changes_nothing_in_compiled_steps() -> None:
    note = CustomCallback(lambda learner: torch.rand(3), StepEnd, TrainingPhase)
    assert_observer(note, lambda: toy_learner(accelerator=Accelerator("cpu", compile="step")))
    assert_observer(ValidationPhase(), lambda: toy_learner(accelerator=Accelerator("cpu", compile="step")))


# What stands in the way


class Reads(Callback):
    reads = ("step.preds",)
    writes = ("step.loss",)

    @on(BackwardBegin, TrainingPhase)
    def change(self, event: Any, phase: Any, learner: Any) -> None:
        learner.step.loss = learner.step.loss * 2


class ReadsGradients(Callback):
    reads = ("step.grads",)

    @on(StepEnd, AbstractTrainingPhase)
    def look(self, event: Any, phase: Any, learner: Any) -> None:
        list(learner.step.grads)


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Reads(), ("Reads handles BackwardBegin of TrainingPhase", "reads 'step.preds'", "writes 'step.loss'")),
        (CustomCallback(print, BackwardEnd, TrainingPhase), ("CustomCallback handles BackwardEnd", "reads '*'")),
        (ReadsGradients(), ("ReadsGradients reads 'step.grads' at StepEnd",)),
        (ActivationStats(), ("ActivationStats looks into the step",)),
        (LogHistograms(Memory()), ("LogHistograms looks into the step",)),
        (MixUp(0.4), ("MixUp handles LossBegin",)),
        (throttle(GradientClip(), UpdateBegin, freq=2), ("GradientClip handles UpdateBegin",)),
    ],
    ids=lambda value: value[0].split(" ")[0] if isinstance(value, tuple) else "",
)
def test_a_callback_that_needs_a_moment_inside_is_an_error_when_the_learner_is_made(
    callback: Callback, words: tuple[str, ...]
) -> None:
    learner(False, callbacks=[copy.deepcopy(callback)])
    with pytest.raises(CompileError) as caught:
        learner(callbacks=[callback])
    for word in (*words, "compile=False"):
        assert word in str(caught.value)


def test_a_callback_added_later_is_refused_and_the_old_ones_stay() -> None:
    made = learner()
    before = made.callbacks.order
    with pytest.raises(CompileError, match="Reads handles BackwardBegin"):
        made.add_callback(Reads())
    assert made.callbacks.order == before


@pytest.mark.slow
def test_a_handler_added_from_outside_is_noticed_at_the_next_step(plain: None) -> None:
    class Taught(Callback):
        pass

    made = learner(callbacks=[Taught()])
    made.fit(1)

    @on(BackwardEnd, TrainingPhase, Taught)
    def look(callback: Any, event: Any, phase: Any, learner: Any) -> None: ...

    with pytest.raises(CompileError, match="Taught handles BackwardEnd"):
        made.fit(1)


class OwnStep(TrainingPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)
            learner.update()
        return state


class AsItIs(OwnStep):
    compiled = False


def test_a_step_of_ones_own_is_refused_unless_its_class_says_that_it_runs_as_it_is(plain: None) -> None:
    with pytest.raises(
        CompileError, match=r"OwnStep has a step of its own; say what it does in entries\(batch\), body"
    ):
        learner().fit(1, phases=[OwnStep()])
    _, compiled = both(phases=lambda: [AsItIs()], tolerance=0.0)
    assert compiled._compiled is not None
    assert AsItIs not in compiled._compiled._plans


def test_explain_says_which_steps_can_be_compiled() -> None:
    text = learner(False, callbacks=[Reads()]).callbacks.explain().text
    training, validation = text.split("ValidationPhase")
    assert "steps are not fusable:\n    Reads handles BackwardBegin of TrainingPhase" in training
    assert "steps are fusable" in validation


def test_what_compile_may_be() -> None:
    with pytest.raises(ValueError, match="expected False, 'model' or 'step'"):
        Accelerator("cpu", compile="all")  # type: ignore[arg-type]  # what is tested


# Graphs are made anew where what they rest on has changed


class Weighted(TrainingPhase):
    """Weighs its loss by a number that changes."""

    def __init__(self, change: float) -> None:
        self.weight, self.change = 1.0, change

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = learner.model(state.xs)
        state.loss = learner.loss_fn(state.preds, state.ys) * self.weight
        learner.backward(state.loss)
        learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.weight *= self.change


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_number_of_the_phase_that_changes_is_seen_and_said_when_it_changes_often() -> None:
    with pytest.warns(UserWarning, match=r"Weighted has been compiled 8 times.*Weighted.weight"):
        both(5, phases=lambda: [Weighted(0.9)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, compiled = both(5, phases=lambda: [Weighted(1.0)])
    assert graphs(compiled, Weighted) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_modes_attributes_and_frozen_parameters_are_compared_at_each_epoch() -> None:
    model = lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.LeakyReLU(0.1))  # noqa: E731
    changes: list[Callable[[nn.Sequential], object]] = [
        lambda model: setattr(model[3], "negative_slope", 0.5),
        lambda model: model[0].requires_grad_(False),
        lambda model: setattr(model[1], "momentum", 0.5),
        lambda model: model[2].weight.data.mul_(0.5),
        lambda model: setattr(model[2].bias, "data", model[2].bias.data + 1),
    ]
    for change in changes:
        made = [learner(compile, model=model) for compile in (False, "step")]
        for each in made:
            each.fit(2)
            change(each.model)
            each.fit(2)
        for a, b in zip(*map(weights, made), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:the step of TrainingPhase has been compiled")
def test_a_callback_that_changes_the_model_between_steps_is_seen() -> None:
    class Slope(Callback):
        writes = ("model",)

        @on(StepBegin, TrainingPhase)
        def change(self, event: Any, phase: Any, learner: Any) -> None:
            learner.model[1].negative_slope += 0.1

    model = lambda: nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))  # noqa: E731
    both(3, model=model, callbacks=lambda: [Slope()])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_in_a_loop_of_ones_own_the_model_is_compared_at_every_step() -> None:
    found = []
    for compile in (False, "step"):
        model = lambda: nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 4))  # noqa: E731
        made, phase, (xs, ys) = learner(compile, model=model), TrainingPhase(), rows()
        with runepoch(made, phase):
            for _ in range(5):
                made.model[1].negative_slope += 0.1
                phase.step(made, (xs, ys))
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_loading_a_state_goes_on_with_the_tensors_that_are_there_then() -> None:
    other = learner(optimizer=ADAM)
    other.fit(1)
    state = copy.deepcopy(other.state_dict())
    made = learner(optimizer=ADAM)
    made.fit(3)
    made.load_state_dict(state)
    other.fit(2)
    made.fit(2)
    for a, b in zip(weights(other), weights(made), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_evaluate_and_predict_are_compiled_and_reuse_their_graphs() -> None:
    made = learner(callbacks=[])
    made.fit(2)
    assert made._compiled is not None
    expected = learner(False)
    expected.model.load_state_dict(made.model.state_dict())
    for _ in range(2):
        assert made.evaluate(rows(), metrics=[accuracy]) == pytest.approx(
            expected.evaluate(rows(), metrics=[accuracy]), rel=1e-5
        )
        torch.testing.assert_close(made.predict(rows()), expected.predict(rows()))
    assert graphs(made, ValidationPhase) == 2
    assert sum(len(plan._graphs) for plan in made._compiled._plans.values()) == 6


# Gradients that wait for an update


class Every(TrainingPhase):
    """Updates with the mean gradient of `every` batches."""

    def __init__(self, every: int = 3) -> None:
        self.every = every
        self.batches = 0
        self.updates = every == 1

    def loss(self, learner: Any, state: Any) -> Tensor:
        state.preds = learner.model(state.xs)
        found: Tensor = learner.loss_fn(state.preds, state.ys)
        return found

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.loss = self.loss(learner, state)
        handle(BackwardBegin())
        learner.backward(state.loss / self.every)
        handle(BackwardEnd())
        if self.updates:
            learner.update()

    def finish(self, learner: Any, state: Any) -> None:
        self.batches += 1
        self.updates = (self.batches + 1) % self.every == 0


def gradients(of: Learner[Any]) -> list[Tensor | None]:
    return [parameter.grad for module in of.modules() for parameter in module.parameters()]


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(torch.optim.SGD, lr=0.1)], ids=["SGD", "Adam", "plain SGD"])
def test_gradients_are_added_up_over_compiled_steps_and_used_by_a_later_one(optimizer: Any) -> None:
    # three batches an epoch, the last of them smaller, so that windows end in any of them and span epochs
    eager, made = both(8, lambda: [Every(4)], lambda: [GradientClip(0.1)], optimizer=optimizer, tolerance=1e-5)
    assert made.history[Every].updates == eager.history[Every].updates == {None: 6}
    assert graphs(made, Every) == 6  # begins, adds, updates: of full batches and of smaller ones
    made.fit(1, phases=[Every(4)])
    eager.fit(1, phases=[Every(4)])
    for a, b in zip(gradients(eager), gradients(made), strict=True):
        assert a is not None  # three batches wait
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradients_are_added_up_in_graphs_of_inductor_too() -> None:
    _, made = both(5, lambda: [Every(2)], data=(rows(),), optimizer=ADAM, tolerance=1e-5)
    assert made.history[Every].updates == {None: 7}


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_an_optimizer_that_takes_its_first_step_late_costs_no_graph_of_a_later_epoch() -> None:
    made = learner(optimizer=ADAM, data=((rows()[0][:64], rows()[1][:64]),))
    made.fit(4, phases=[phase := Every(2)])
    plan = made._compiled._plans[Every]  # type: ignore[union-attr]  # it is compiled
    assert plan._count == 2
    made.load_state_dict(copy.deepcopy(made.state_dict()))
    made.fit(2, phases=[phase])
    assert plan._count == 4  # the states are other tensors now


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_window_that_is_open_resumes_to_the_bit_in_compiled_steps() -> None:
    assert_resumes_exactly(lambda: learner(optimizer=ADAM), epochs=3, phases=lambda: [Every(4)])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_what_waits_at_the_end_of_an_epoch_can_be_used_outside_of_a_step() -> None:
    class Flushed(Every):
        def epoch(self, learner: Any, data: Any) -> None:
            with runepoch(learner, self):
                for batch in data:
                    self.step(learner, batch)
                if self.batches % self.every:
                    learner.update()

    eager, made = both(3, lambda: [Flushed(2)], tolerance=1e-5)
    assert made.history[Flushed].updates == eager.history[Flushed].updates


class Halves(Every):
    """Adds up the gradients of the halves of a batch in one step."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        xs, ys = state.xs, state.ys
        for state.xs, state.ys in zip(xs.chunk(2), ys.chunk(2), strict=True):
            learner.backward(self.loss(learner, state) / (2 * self.every))
        state.xs, state.ys = xs, ys
        if self.updates:
            learner.update()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_of_parts_of_a_batch_are_added_up_in_one_graph(every: int) -> None:
    both(4, lambda: [Halves(every)], tolerance=1e-5)


class TurnByTurn(AbstractTrainingPhase):
    """Two optimizers whose windows are open at different times."""

    def __init__(self) -> None:
        self.batches, self.first, self.second = 0, False, False

    def entries(self, batch: Any) -> dict[str, Any]:
        return {"xs": batch[0]}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        for name, updates in (("a", self.first), ("b", self.second)):
            with learner.optimizing(name) as block:
                learner.backward(learner.models[name](state.xs).square().mean())
                if updates:
                    learner.update()
            assert block.loss is None

    def finish(self, learner: Any, state: Any) -> None:
        self.batches += 1
        self.first, self.second = self.batches % 2 == 1, self.batches % 3 == 2


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_each_optimizer_has_a_window_of_its_own_in_compiled_steps() -> None:
    model = lambda: {"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)}  # noqa: E731
    eager, made = both(5, lambda: [TurnByTurn()], model=model, loss_fn=None, data=(rows(),), tolerance=1e-5)
    assert made.history[TurnByTurn].updates == eager.history[TurnByTurn].updates == {"a": 7, "b": 5}
    assert len(made.updates.slots[0].waiting) == 2
    assert made.updates.slots[0].in_block


class Same(Every):
    """Its two parameters have one gradient, which is an entry of the batch."""

    def loss(self, learner: Any, state: Any) -> Tensor:
        first, second = learner.model.parameters()
        return ((first + second) * state.xs).sum()

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        learner.backward(self.loss(learner, state))
        if self.updates:
            learner.update()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_gradients_that_wait_share_no_memory(compiler: str, request: pytest.FixtureRequest) -> None:
    if compiler == "none":
        request.getfixturevalue("plain")
    data = [(torch.randn(4, generator=torch.Generator().manual_seed(n)), torch.zeros(1)) for n in range(4)]
    before = [xs.clone() for xs, _ in data]
    model = lambda: nn.ParameterList([torch.zeros(4), torch.zeros(4)])  # noqa: E731
    _, made = both(2, lambda: [Same(5)], model=model, data=(data,))
    assert all(torch.equal(xs, old) for (xs, _), old in zip(data, before, strict=True))
    a, b = gradients(made)
    assert a is not None
    assert b is not None
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_loss_that_is_not_finite_leaves_gradients_that_waited_as_they_are() -> None:
    xs, ys = rows()
    batches = [(xs[:8], ys[:8]), (xs[8:16], ys[8:16]), (xs[16:24] * float("nan"), ys[16:24])]
    found = []
    for compile in (False, "step"):
        made = learner(compile, data=(batches,))
        history = made.fit(1, phases=[Every(5)])
        assert history.stop_reason == "the loss became nan in Every(), epoch 1, step 3 of the run"
        found.append(gradients(made))
    for a, b in zip(*found, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.usefixtures("plain")
def test_a_gradient_that_is_new_in_a_step_whose_loss_is_not_finite_is_not_kept() -> None:
    class InTurn(Every):
        def loss(self, learner: Any, state: Any) -> Tensor:
            part = learner.model[0] if self.batches < 2 else learner.model[1]
            found: Tensor = part(state.xs).square().mean()
            return found

    xs = rows()[0]
    batches = [(xs[:8], 0), (xs[8:16], 0), (xs[16:24] * float("nan"), 0)]
    made = learner(data=(batches,), model=lambda: nn.ModuleList([nn.Linear(16, 2), nn.Linear(16, 2)]))
    assert made.fit(1, phases=[InTurn(9)]).stop_reason == "the loss became nan in InTurn(), epoch 1, step 3 of the run"
    first, second = gradients(made)[0], gradients(made)[2]
    assert first is not None
    assert first.isfinite().all()
    assert second is None or not second.any()


@pytest.mark.usefixtures("plain")
def test_a_loss_of_nobody_knows_whom_is_the_same_error_with_and_without_a_graph() -> None:
    class Both(TurnByTurn):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            loss = learner.models["a"](state.xs).square().mean()
            if self.batches == 0:
                learner.backward(loss)
                return
            with learner.optimizing("a") as block:
                block.loss = loss

    for compile in (False, "step"):
        made = learner(compile, model=lambda: {"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)}, loss_fn=None)
        with pytest.raises(LossError, match="the block of optimizer 'a' would add to gradients"):
            made.fit(1, phases=[Both()])


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_cancelled_step_takes_only_its_own_gradients_with_it() -> None:
    class CancelsAt(Every):
        def __init__(self, number: int) -> None:
            super().__init__(3)
            self.number = number

        def finish(self, learner: Any, state: Any) -> None:
            super().finish(learner, state)
            if self.batches == self.number:
                raise CancelStepException

    for number in (4, 5, 6):  # that begins, adds, updates
        both(3, lambda: [CancelsAt(number)], tolerance=1e-5)  # noqa: B023 - called at once


class ByHand(Every):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if self.every == 1:
            learner.optimizer.zero_grad()
        (self.loss(learner, state) / self.every).backward()
        if self.updates:
            learner.optimizer.step()
            if self.every > 1:
                learner.optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_computed_by_hand_are_used_in_their_step_or_refused() -> None:
    both(2, lambda: [ByHand(1)], tolerance=1e-5)
    with pytest.raises(CompileError, match="by hand, and leaves them for a later step"):
        learner().fit(2, phases=[ByHand(3)])


class AsEver(TrainingPhase):
    compiled = False


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_somebody_computes_after_an_update_are_released() -> None:
    found = []
    for compile in (False, "step"):
        made = learner(compile)
        made.fit(2)
        made.loss_fn(made.model(rows()[0]), rows()[1]).backward()
        assert made.state_dict()["updates"]["gradients"] == {}
        made.fit(1, phases=[AsEver()])
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_options_of_a_float64_model_are_not_rounded() -> None:
    data = ((rows()[0].double(), rows()[1]),)
    both(2, data=data, model=lambda: mlp().double(), optimizer=partial(torch.optim.SGD, lr=0.05), tolerance=1e-13)


class Dropping(Every):
    """Drops what waits in every second batch."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        if self.updates:
            learner.optimizer.zero_grad()
        else:
            learner.backward(self.loss(learner, state))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_waited_and_were_dropped_are_gone() -> None:
    eager, made = both(2, lambda: [Dropping(2)])
    assert gradients(eager) == gradients(made) == [None] * 4


@pytest.mark.usefixtures("plain")
def test_sparse_gradients_that_wait_are_refused() -> None:
    class Embeds(Every):
        def loss(self, learner: Any, state: Any) -> Tensor:
            found: Tensor = learner.model(state.ys).square().mean()
            return found

    made = learner(model=lambda: nn.Embedding(4, 2, sparse=True), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(CompileError, match="sparse gradients wait for an update"):
        made.fit(1, phases=[Embeds()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own use of it
def test_a_model_is_compiled_by_torch_and_stays_what_it_is() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    eager, made = learner(False), learner("model")
    kind, names = type(made.model), list(made.model.state_dict())
    assert (type(eager.model), list(eager.model.state_dict())) == (kind, names)
    for each in (eager, made):
        each.fit(1, steps_per_epoch=2)
    assert counters["stats"]["unique_graphs"] >= 1  # a Sequential is compiled too
    for a, b in zip(weights(eager), weights(made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert type(copy.deepcopy(made.model)) is kind


# Replayed on a GPU: the bookkeeping, with a recording that runs what it recorded


class Recording:
    def replay(self) -> None:
        results = self.compiled(*self.inputs)  # type: ignore[attr-defined]  # set when it is recorded
        for kept, new in zip(self.outputs, results, strict=True):  # type: ignore[attr-defined]  # as above
            kept.copy_(new)


def test_a_replayed_graph_gets_what_moves_and_gives_what_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    weight, queue = torch.zeros(3), torch.zeros(3)

    def compiled(*inputs: Tensor) -> list[Tensor]:
        if not hasattr(recording, "replaying") and replayed._calls > replayed.WARM_UP:
            recording.compiled, recording.inputs, recording.replaying = step, replayed._inputs, True  # type: ignore[attr-defined]  # a recording runs nothing
            recording.outputs = [torch.zeros(())]  # type: ignore[attr-defined]  # as above
            return recording.outputs  # type: ignore[attr-defined, no-any-return]  # as above
        return step(*inputs)

    def step(weight: Tensor, xs: Tensor, queue: Tensor) -> list[Tensor]:
        weight += xs
        queue += 2 * xs
        return [weight.sum().clone()]

    replayed = fluxloop.compile.replay.Replayed(compiled, num_fixed=1, changed=[1])
    given = [replayed(weight, torch.full((3,), float(number)), queue)[0] for number in range(1, 7)]
    assert [each.item() for each in given] == [3.0, 9.0, 18.0, 30.0, 45.0, 63.0]
    assert torch.equal(weight, torch.full((3,), 21.0))
    assert torch.equal(queue, torch.full((3,), 42.0))  # what moves and is changed in place is the caller's too


class Averages(TrainingPhase):
    """Keeps an average of its predictions."""

    def __init__(self) -> None:
        self.average = torch.zeros(4)

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        self.average = self.average.lerp(state.preds.detach().mean(0), 0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_a_replayed_graph_is_told_what_it_changes_besides_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []

    def replayed(call: Any, num_fixed: int, changed: list[int]) -> Any:
        told.append(changed)
        return call

    monkeypatch.setattr(fluxloop.compile.graphs, "can_replay", lambda inputs: True)
    monkeypatch.setattr(fluxloop.compile.graphs, "Replayed", replayed)
    for phase in (TrainingPhase(), Averages()):
        learner(data=(rows(),)).fit(1, phases=[phase])
    full, smaller, averages, averages_smaller = told
    assert full == smaller == []
    assert averages == averages_smaller == [1]  # the second of what moves: the first is the learning rate


def test_a_step_is_replayed_only_where_all_of_it_is_on_the_device() -> None:
    on, off = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    assert fluxloop.compile.replay.can_replay([on, on])
    assert not fluxloop.compile.replay.can_replay([on, off])


# Gradients that are not finite, cancelled, of another phase; closures; version counters


class SpoiledGradient(torch.autograd.Function):
    """Passes a tensor on; where `bad` is true, its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.where(ctx.saved_tensors[0], float("nan"), gradients[0]), None


class SpoiledNet(nn.Module):
    """Batches with a seven have a gradient that is NaN, those with NaN a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, xs: Tensor) -> Tensor:
        found: Tensor = SpoiledGradient.apply(self.layers(xs), (xs == 7.0).any())
        return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.parametrize("bad", [7.0, float("nan")])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.usefixtures("plain")
def test_a_compiled_step_that_is_not_finite_changes_neither_weights_nor_buffers_nor_counts(
    bad: float, window: int, clip: bool
) -> None:
    xs, ys = (tensor.clone() for tensor in rows())
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 48, 8)]
    batches[-1][0][3, 2] = bad
    found = []
    for compile in (False, "step"):
        callbacks = [GradientClip(0.1)] if clip else []
        made = learner(compile, model=SpoiledNet, data=(batches,), callbacks=callbacks)
        history = made.fit(1, phases=[Every(window)])
        found.append((str(history.stop_reason), history[Every].steps, history[Every].updates, made.updates.count))
        found[-1] += ([g is not None and bool(g.isfinite().all()) for g in gradients(made)] if window == 2 else [],)
        expected = learner(False, model=SpoiledNet, data=(batches[:-1],), callbacks=callbacks)
        expected.fit(1, phases=[Every(window)])
        for a, b in zip(weights(made), weights(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert found[0] == found[1]
    assert found[0][0].endswith("Every(), epoch 1, step 6 of the run")
    assert ("the loss" if bad != bad else "layers.0.weight") in found[0][0]


class TwoBlocks(TrainingPhase):
    def body(self, learner: Any, handle: Any, state: Any) -> None:
        with learner.optimizing("D") as block:
            block.loss = learner.model.D(state.xs.nan_to_num()).square().mean()
        with learner.optimizing("G") as block:
            block.loss = SpoiledGradient.apply(learner.model.G(state.xs), (state.xs == 7.0).any()).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit stops")
@pytest.mark.parametrize("bad", [7.0, float("nan")])
@pytest.mark.usefixtures("plain")
def test_of_two_compiled_blocks_the_update_before_the_bad_one_is_made_and_counted(bad: float) -> None:
    xs = rows()[0].clone()
    batches = [(xs[n : n + 8], 0) for n in range(0, 40, 8)]
    batches[3][0][0, 0] = bad
    found = []
    for compile in (False, "step"):
        model = lambda: {"G": nn.Linear(16, 2), "D": nn.Linear(16, 2)}  # noqa: E731
        made = learner(compile, model=model, data=(batches,), optimizer=ADAM)
        history = made.fit(1, phases=[TwoBlocks()])
        found.append((history.stop_reason, history[TwoBlocks].updates, weights(made)))
    assert found[0][:2] == found[1][:2]
    assert found[0][1] == {"D": 4, "G": 3}
    for a, b in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Cancels(Every):
    """Cancels batches when the body has run."""

    def __init__(self, every: int, cancelled: tuple[int, ...]) -> None:
        super().__init__(every)
        self.cancelled = cancelled
        self.number = 0

    def finish(self, learner: Any, state: Any) -> None:
        self.number += 1
        if self.number in self.cancelled:
            raise CancelStepException
        super().finish(learner, state)


@pytest.mark.slow
@pytest.mark.parametrize("cancelled", [(4,), (5,), (4, 5)])
@pytest.mark.usefixtures("plain")
def test_gradients_of_a_compiled_step_that_is_cancelled_never_count(cancelled: tuple[int, ...]) -> None:
    xs, ys = rows()
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 64, 8)]
    both(1, lambda: [Cancels(3, cancelled)], data=(batches,))


@pytest.mark.slow
@pytest.mark.usefixtures("plain")
def test_gradients_that_wait_are_dropped_where_another_compiled_phase_begins() -> None:
    class Other(TrainingPhase):
        pass

    xs, ys = rows()
    batches = [(xs[n : n + 8], ys[n : n + 8]) for n in range(0, 40, 8)]
    found = []
    for compile in (False, "step"):
        made = learner(compile, data=(batches,))
        with pytest.warns(UserWarning, match="gradients of 2 batches of Every still wait"):
            made.fit(1, phases=[Every(3), Other()])
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("plain")
def test_an_update_with_a_closure_cannot_be_compiled() -> None:
    class WithClosure(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            def closure() -> Tensor:
                state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
                learner.backward(state.loss)
                loss: Tensor = state.loss
                return loss

            learner.update(closure=closure)

    with pytest.raises(CompileError, match="compiled = False"):
        learner().fit(1, phases=[WithClosure()])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_graph_made_before_a_step_cannot_be_differentiated_after_it(optimizer: Any) -> None:
    for compile in (False, "step"):
        made = learner(compile, optimizer=optimizer)
        made.fit(2)
        late = made.model(rows()[0]).sum()
        made.fit(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
