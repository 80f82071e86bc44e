"""What is given wrongly is refused: the message says what was given, what was expected and what to type."""

from __future__ import annotations

import ast
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import fluxloop
from fluxloop import (
    CSV,
    EMA,
    GL,
    JSONL,
    PQ,
    AbstractTrainingPhase,
    Accelerator,
    ActivationStats,
    AttentionMaps,
    Attribute,
    AutoencoderPhase,
    BarlowTwinsPhase,
    BatchError,
    BatchLimit,
    Betas,
    Callback,
    CallbackTypeError,
    Check,
    Checkpointer,
    CSVLogger,
    CustomCallback,
    CutMix,
    CycleGANPhase,
    Data2VecPhase,
    DataError,
    DiffusionPhase,
    DINOPhase,
    DINOv2Phase,
    DistillationPhase,
    DuplicateCallbackError,
    EarlyStopping,
    EmbeddingMap,
    FeatureStats,
    FittingPhase,
    FlowMatchingPhase,
    FluxloopError,
    FrechetDistance,
    GANPhase,
    GarbageCollect,
    GradientClip,
    HandlerError,
    IBOTPhase,
    IJEPAPhase,
    KeepBestModel,
    KNNProbe,
    Learner,
    LearningRate,
    LeJEPAPhase,
    LinearProbe,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogVisualization,
    LossError,
    LRScheduler,
    MAEPhase,
    Memory,
    Metric,
    MetricError,
    Metrics,
    MetricsPrinter,
    MissingEntryError,
    MixUp,
    MoCoPhase,
    MoCoV3Phase,
    ModelError,
    Momentum,
    MSNPhase,
    MultiCrop,
    NeighborImages,
    NNCLRPhase,
    NoImprovement,
    NumberLimit,
    OptimizerError,
    Patience,
    PerOptimizerPhase,
    PerOptimizerValidationPhase,
    PhaseError,
    Profile,
    ProgressBar,
    ReconstructionImages,
    Recorder,
    ReentrantFitError,
    SampleImages,
    SanityCheck,
    Scheduler,
    SimCLRPhase,
    StepBegin,
    StepEnd,
    StochasticWeightAveraging,
    StopOnNaNLoss,
    SupConPhase,
    SwAVPhase,
    TensorBatches,
    TensorBoard,
    Threshold,
    TimeLimit,
    Timer,
    Traces,
    TrainingPhase,
    TripletPhase,
    TwoViews,
    Unfreeze,
    VAEPhase,
    ValidationPhase,
    VICRegPhase,
    ViewDataset,
    WeightDecay,
    as_dataloader,
    constant,
    cosine,
    exponential,
    find_batch_size,
    find_lr,
    get_hyperparameter,
    inverse_sqrt,
    linear,
    on,
    one_cycle,
    overfit,
    polynomial,
    recompute_activations,
    repeat,
    runepoch,
    runstep,
    seed_everything,
    set_hyperparameter,
    shift,
    sine,
    split,
    throttle,
    top_k,
    triangle,
    warmup,
)
from fluxloop.augment import BlockMasks, MultiBlock, RandomMasks
from fluxloop.testing import Coefficient, EventRecorder, toy_learner

XS = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
YS = torch.rand(8, 1, generator=torch.Generator().manual_seed(1))
GOOD = [(XS, YS)]
sgd = partial(SGD, lr=0.1)
PLACEHOLDER = re.compile(r"\{[A-Za-z_][\w.]*(\([^)]*\))?(!r)?(:[^}\s]*)?\}|%[sdr]")


class Case(NamedTuple):
    """Something given wrongly, the error it raises, and words of its message."""

    name: str
    given: Any
    error: type[Exception]
    words: tuple[str, ...]


def table(*cases: Case) -> Any:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("case", cases, ids=names)


def refused(case: Case, call: Callable[[], object]) -> None:
    with pytest.raises(case.error) as caught:
        call()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    missing = [word for word in case.words if word not in text]
    assert not missing, f"the message says nothing of {missing}: {text}"
    assert not PLACEHOLDER.search(text), f"the message has a placeholder that was not filled in: {text}"


class Snapshot:
    """All that a training changes in a learner, or in a model."""

    def __init__(self, thing: Any) -> None:
        self.models = thing.modules() if isinstance(thing, Learner) else [thing]
        self.learner = thing if isinstance(thing, Learner) else None
        self.tensors = [t.detach().clone() for m in self.models for t in m.state_dict().values()]
        self.flags = self._flags()
        self.states = self._states()

    def _flags(self) -> list[Any]:
        modules = [module for model in self.models for module in model.modules()]
        flags: list[Any] = [module.training for module in modules]
        flags += [(p.requires_grad, p.grad is None) for model in self.models for p in model.parameters()]
        flags.append(torch.is_grad_enabled())
        if self.learner is not None:
            learner = self.learner
            flags += [
                learner._running.fitting,
                learner.scope,
                learner.num_batches,
                learner.history.cycles,
                learner.data,
            ]
            flags += [learner.callbacks.digest, learner.updates.block]
        return flags

    def _states(self) -> list[Any]:
        return [] if self.learner is None else [slot.optimizer.state_dict() for slot in self.learner.updates.slots]

    def assert_unchanged(self) -> None:
        now = [t for m in self.models for t in m.state_dict().values()]
        assert all(torch.equal(a, b) for a, b in zip(self.tensors, now, strict=True)), "weights were changed"
        assert self._flags() == self.flags
        assert self._states() == self.states


# Building a learner: each case is what differs from one that works


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def base() -> dict[str, Any]:
    return {
        "model": network(),
        "loss_fn": mse_loss,
        "data": (GOOD,),
        "optimizer": sgd,
        "callbacks": [Recorder()],
        "default_callbacks": False,
        "seed": 0,
    }


def build(options: dict[str, Any]) -> Learner:
    merged = {**base(), **options}
    return Learner(merged.pop("model"), merged.pop("loss_fn"), **merged)


def pair(**options: Any) -> dict[str, Any]:
    return {"model": {"generator": nn.Linear(2, 2), "critic": nn.Linear(2, 2)}, **options}


def over(*choose: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """A model with one optimizer per choice of its parameters."""
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a parameter given twice
        made = [SGD(parameters(model), lr=0.1) for parameters in choose]
    return {"model": model, "optimizer": made[0] if len(made) == 1 else dict(zip("abc", made, strict=False))}


def shared() -> dict[str, Any]:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    return {"model": {"one": one, "two": two}}


def same_recorder_twice() -> dict[str, Any]:
    recorder = Recorder()
    return {"callbacks": [Metrics(), recorder, recorder]}


def same_recorder_wrapped() -> dict[str, Any]:
    recorder = Recorder()
    return {"callbacks": [recorder, throttle(recorder, StepEnd, freq=2)]}


def same_module_twice() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    return {"model": {"generator": model, "critic": model}}


MODULE = "expected a torch.nn.Module"
NAME = "expected a name to stand behind 'learner.model.', such as 'generator'"
LOADABLE = "expected tensors or arrays, a tuple or dict of them, a Dataset, or an iterable of batches"
FACTORY = "expected a factory that takes parameters (torch.optim.Adam, partial(torch.optim.SGD, lr=0.1))"
SEED = "expected a whole number from 0 to 4294967295, e.g. seed=0"

CONSTRUCTION = (
    Case("model None", {"model": None}, ModelError, ("model is None", MODULE)),
    Case("model function", {"model": network}, ModelError, ("model is a function", MODULE)),
    Case("model class", {"model": nn.Linear}, ModelError, ("model is the class Linear", f"{MODULE}: Linear(...)")),
    Case("model list", {"model": [nn.Linear(1, 1)]}, ModelError, ("model is a list of length 1", MODULE)),
    Case("model parameters", {"model": nn.Linear(2, 2).weight}, ModelError, ("shape (2, 2)", MODULE)),
    Case("models none", {"model": {}}, ModelError, ("no model was given", MODULE)),
    Case("models empty tuple", {"model": ()}, ModelError, ("no model was given", MODULE)),
    Case("models bad value", pair(model={"g": network(), "d": 3}), ModelError, ("model['d'] is 3", MODULE)),
    Case("models None value", pair(model={"d": None}), ModelError, ("model['d'] is None", MODULE)),
    Case("models class value", pair(model={"d": nn.ReLU}), ModelError, ("model['d'] is the class ReLU", "ReLU(...)")),
    Case("models bad item", {"model": (network(), "x")}, ModelError, ("model['1'] is 'x'", MODULE)),
    Case("models name with blank", {"model": {"my model": network()}}, ModelError, ("is named 'my model'", NAME)),
    Case("models name private", {"model": {"_model": network()}}, ModelError, ("is named '_model'", NAME)),
    Case("models name empty", {"model": {"": network()}}, ModelError, ("is named ''", NAME)),
    Case("models name number", {"model": {1: network()}}, ModelError, ("is named 1", NAME)),
    Case("models name keyword", {"model": {"class": network()}}, ModelError, ("is named 'class'", NAME)),
    Case("models same twice", same_module_twice(), ModelError, ("one module", "['generator', 'critic']", "each once")),
    Case("loss class", {"loss_fn": nn.MSELoss}, LossError, ("loss_fn=the class MSELoss", "MSELoss()")),
    Case("loss name", {"loss_fn": "mse"}, LossError, ("loss_fn='mse'", "expected a function (preds, ys) -> scalar")),
    Case("loss number", {"loss_fn": 0.5}, LossError, ("loss_fn=0.5", "expected a function (preds, ys) -> scalar")),
    Case("loss tensor", {"loss_fn": YS}, LossError, ("loss_fn=a Tensor of shape (8, 1)", "expected a function")),
    Case("data None", {"data": None}, DataError, ("None was given as data", LOADABLE, "data['training']")),
    Case("data number", {"data": 3}, DataError, ("3 was given as data", LOADABLE)),
    Case("data name", {"data": "mnist"}, DataError, ("'mnist' was given as data", LOADABLE)),
    Case("data function", {"data": (network,)}, DataError, ("a function was given as data", LOADABLE)),
    Case("data loader None", {"data": (GOOD, None)}, DataError, ("None was given", LOADABLE, "data['validation']")),
    Case(
        "data of three", {"data": (GOOD, GOOD, GOOD)}, DataError, ("a tuple of 3", "expected (train,), (train, valid)")
    ),
    Case("data key", {"data": {1: GOOD}}, DataError, ("data has the key 1", "expected a name such as 'training'")),
    Case("data rows differ", {"data": ((XS, YS[:3]),)}, DataError, ("[3, 8] rows", "the same number of rows")),
    Case("data no rows", {"data": ((XS[:0], YS[:0]),)}, DataError, ("no rows", "expected at least one")),
    Case("data with a label", {"data": ((XS, "y"),)}, DataError, ("'y' was given as data", LOADABLE)),
    Case("optimizer None", {"optimizer": None}, OptimizerError, ("optimizer=None was given", FACTORY)),
    Case("optimizer name", {"optimizer": "adam"}, OptimizerError, ("optimizer='adam' was given", FACTORY)),
    Case("optimizer number", {"optimizer": 0.1}, OptimizerError, ("optimizer=0.1 was given", FACTORY)),
    Case(
        "optimizer list", {"optimizer": [Adam]}, OptimizerError, ("optimizer=a list of length 1", "a mapping of names")
    ),
    Case("optimizer wrong class", {"optimizer": nn.Linear}, OptimizerError, ("the class Linear", "torch.optim")),
    Case(
        "optimizer scheduler", {"optimizer": torch.optim.lr_scheduler.StepLR}, OptimizerError, ("StepLR", "torch.optim")
    ),
    Case("optimizer module", {"optimizer": nn.ReLU()}, OptimizerError, ("a ReLU", "torch.optim")),
    Case("optimizer makes a list", {"optimizer": list}, OptimizerError, ("the class list", "torch.optim")),
    Case("optimizer makes None", {"optimizer": lambda p: None}, OptimizerError, ("made None", "torch.optim.Optimizer")),
    Case(
        "optimizer foreign",
        {"optimizer": SGD(nn.Linear(5, 7).parameters(), lr=0.1)},
        OptimizerError,
        ("2 parameters that belong to no model", "(7, 5)", "build it from the parameters of the learner's model"),
    ),
    Case(
        "optimizer missing",
        over(lambda m: [m.weight]),
        OptimizerError,
        ("in no optimizer: bias", "requires_grad_(False)"),
    ),
    Case(
        "optimizer none at all", {"optimizer": {}}, OptimizerError, ("in no optimizer: weight, bias", "add them to one")
    ),
    Case(
        "optimizer of one model only",
        pair(optimizer={"generator": sgd}),
        OptimizerError,
        ("in no optimizer: critic.weight, critic.bias", "add them to one"),
    ),
    Case(
        "optimizer parameter in two",
        over(lambda m: m.parameters(), lambda m: [m.weight]),
        OptimizerError,
        ("held more than once: weight (in optimizer['a'] and optimizer['b'])", "each in exactly one optimizer"),
    ),
    Case(
        "optimizer parameter twice in one",
        over(lambda m: [m.weight, m.bias, m.weight]),
        OptimizerError,
        ("held more than once: weight", "each in exactly one optimizer"),
    ),
    Case(
        "optimizer shared parameter",
        shared(),
        OptimizerError,
        ("held more than once: one.weight", "give the optimizers"),
    ),
    Case(
        "optimizer misspelt name",
        pair(optimizer={"generater": sgd, "critic": sgd}),
        OptimizerError,
        ("optimizer['generater'] is a factory, but no model", "['critic', 'generator']", "did you mean 'generator'?"),
    ),
    Case(
        "optimizer value",
        pair(optimizer={"critic": 3}),
        OptimizerError,
        ("optimizer['critic'] is 3", "torch.optim.Adam"),
    ),
    Case("optimizer key", {"optimizer": {1: sgd}}, OptimizerError, ("named 1", "expected a name such as 'generator'")),
    Case(
        "optimizer of a frozen model",
        {"model": {"a": network(), "b": network().requires_grad_(False)}, "optimizer": {"a": sgd, "b": sgd}},
        OptimizerError,
        ("optimizer['b'] would get no parameter", "unfreeze the model first"),
    ),
    Case("callbacks None", {"callbacks": None}, CallbackTypeError, ("callbacks=None", "callbacks=[...]")),
    Case("callbacks single", {"callbacks": Recorder()}, CallbackTypeError, ("callbacks=a Recorder", "callbacks=[...]")),
    Case(
        "callbacks class alone", {"callbacks": Recorder}, CallbackTypeError, ("the class Recorder", "callbacks=[...]")
    ),
    Case(
        "callbacks class in list",
        {"callbacks": [Metrics(), Recorder]},
        CallbackTypeError,
        ("callbacks[1] is the class Recorder", "expected an instance: Recorder(...)"),
    ),
    Case(
        "callbacks None in list",
        {"callbacks": [None]},
        CallbackTypeError,
        ("callbacks[0] is None", "expected a Callback"),
    ),
    Case(
        "callbacks function in list",
        {"callbacks": [network]},
        CallbackTypeError,
        ("callbacks[0] is a function", "CustomCallback(function, StepEnd)"),
    ),
    Case(
        "callbacks same twice",
        same_recorder_twice(),
        DuplicateCallbackError,
        ("the same Recorder was given twice", "callbacks[1] and callbacks[2]", "make a second instance"),
    ),
    Case(
        "callbacks same wrapped",
        same_recorder_wrapped(),
        DuplicateCallbackError,
        ("the same Recorder was given twice",),
    ),
    Case(
        "callbacks two alike",
        {"callbacks": [EventRecorder(), EventRecorder()]},
        DuplicateCallbackError,
        ("two EventRecorder callbacks cannot be told apart", "EventRecorder(..., name='first')"),
    ),
    Case("accelerator name", {"accelerator": "cpu"}, TypeError, ("'cpu'", "Accelerator('cpu')")),
    Case("accelerator device", {"accelerator": torch.device("cpu")}, TypeError, ("device", "Accelerator(")),
    Case("accelerator class", {"accelerator": Accelerator}, TypeError, ("Accelerator", "Accelerator('cpu')")),
    Case("seed negative", {"seed": -1}, ValueError, ("seed=-1 was given", SEED)),
    Case("seed too large", {"seed": 2**32}, ValueError, ("seed=4294967296 was given", SEED)),
    Case("seed text", {"seed": "0"}, ValueError, ("seed='0' was given", SEED)),
    Case("seed fraction", {"seed": 1.0}, ValueError, ("seed=1.0 was given", SEED)),
    Case("seed truth", {"seed": True}, ValueError, ("seed=True was given", SEED)),
)


def modules_in(model: Any) -> list[nn.Module]:
    if isinstance(model, (dict, tuple)):
        model = list(model.values()) if isinstance(model, dict) else list(model)
    return [thing for thing in (model if isinstance(model, list) else [model]) if isinstance(thing, nn.Module)]


@pytest.mark.slow(quick=30)
@table(*CONSTRUCTION)
def test_a_learner_is_not_built_from_bad_input(case: Case) -> None:
    options = {"model": network(), **case.given}
    before = [Snapshot(model) for model in modules_in(options["model"])]
    refused(case, lambda: build(options))
    for snapshot in before:
        snapshot.assert_unchanged()


@pytest.mark.parametrize("options", [{"callbacks": [Recorder]}, {"optimizer": None}, {"data": 3}, {"model": None}])
def test_a_learner_that_is_not_built_draws_no_random_number(options: dict[str, Any]) -> None:
    given = {"model": nn.Linear(4, 1), "seed": 0, **options}
    before = torch.get_rng_state()
    with pytest.raises(FluxloopError):
        build(given)
    assert torch.equal(torch.get_rng_state(), before)


# Fitting


class Stray(AbstractTrainingPhase):
    data_key = "trainnig"

    def step(self, learner: Learner, batch: Any) -> None: ...


class NoBody(AbstractTrainingPhase):
    pass


class NoLoss(PerOptimizerPhase):
    pass


class TrainsOnValidation(ValidationPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            learner.backward(state.loss)


class Blocks(AbstractTrainingPhase):
    """Runs an update block with whatever loss, under whatever name."""

    def __init__(self, loss: Callable[[Learner, Any], Any], name: Any = None) -> None:
        self.loss = loss
        self.block_name = name

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            with learner.optimizing(self.block_name) as block:
                block.loss = self.loss(learner, state)


class Does(AbstractTrainingPhase):
    """Calls something in a step."""

    def __init__(self, call: Callable[[Learner, Any], Any]) -> None:
        self.call = call

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            self.call(learner, state)


def loss_of(learner: Learner, state: Any) -> Tensor:
    return learner.loss_fn(learner.model(state.xs), state.ys)


def no_grad_loss(preds: Tensor, ys: Tensor) -> Tensor:
    with torch.no_grad():
        return mse_loss(preds, ys)


def level(preds: Tensor, ys: Tensor) -> Tensor:
    return preds.mean()


def nested_blocks(learner: Learner, state: Any) -> None:
    with learner.optimizing():
        with learner.optimizing():
            pass


def losing(loss: Any) -> dict[str, Any]:
    return {"loss_fn": loss}


def training(*batches: Any, **options: Any) -> dict[str, Any]:
    return {"data": (list(batches),), **options}


def phases(*given: Any, **options: Any) -> dict[str, Any]:
    return {"fit": {"phases": list(given)}, **options}


SCALAR = "reduce it with .mean() or .sum()"
NO_GRADIENT = "no gradient can be computed from the loss"
BATCH = (
    "TrainingPhase was given",
    "as a batch; expected a pair (xs, ys)",
    "write a phase with entries(batch) and a body of its own",
)
EPOCHS = "expected a number of epochs, 0 or more, e.g. fit(10)"

FITTING = (
    Case(
        "no loss", losing(None), LossError, ("TrainingPhase needs a loss function", "torch.nn.functional.cross_entropy")
    ),
    Case("loss per row", losing(lambda p, y: (p - y).squeeze(1)), LossError, ("shape (8,)", SCALAR)),
    Case("loss unreduced", losing(nn.MSELoss(reduction="none")), LossError, ("shape (8, 1)", "reduction='mean'")),
    Case("loss a number", losing(lambda p, y: 1.0), LossError, ("the loss is 1.0", "expected a tensor")),
    Case("loss None", losing(lambda p, y: None), LossError, ("the loss is None", "expected a tensor")),
    Case("loss a tuple", losing(lambda p, y: (p.mean(), 1)), LossError, ("a tuple of length 2", "expected a tensor")),
    Case("loss a dict", losing(lambda p, y: {"l": p.mean()}), LossError, ("a dict of length 1", "expected a tensor")),
    Case("loss detached", losing(lambda p, y: mse_loss(p, y).detach()), LossError, (NO_GRADIENT, "detached")),
    Case("loss constant", losing(lambda p, y: torch.tensor(1.0)), LossError, (NO_GRADIENT, "constants")),
    Case("loss of integers", losing(lambda p, y: (p > y).sum()), LossError, (NO_GRADIENT, "constants")),
    Case("loss without gradients", losing(no_grad_loss), LossError, (NO_GRADIENT,)),
    Case("loss complex", losing(lambda p, y: mse_loss(p, y) * 1j), LossError, ("complex",)),
    Case("loss of other parameters", losing(lambda p, y: nn.Linear(1, 1)(y).mean()), LossError, ("reaches none",)),
    Case("model frozen", {"model": nn.Linear(4, 1).requires_grad_(False)}, LossError, (NO_GRADIENT, "frozen")),
    Case("model without parameters", {"model": nn.ReLU(), **losing(level)}, LossError, (NO_GRADIENT, "frozen")),
    Case("batch None", training(None), BatchError, ("None", *BATCH)),
    Case("batch bare tensor", training(XS), BatchError, ("a Tensor of shape (8, 4)", *BATCH)),
    Case("batch without target", training((XS,)), BatchError, ("a tuple of length 1", *BATCH)),
    Case("batch of three", training((XS, YS, YS)), BatchError, ("a tuple of length 3", *BATCH)),
    Case("batch a dict", training({"xs": XS, "ys": YS}), BatchError, ("a dict of length 2", *BATCH)),
    Case("batch a text", training("ab"), BatchError, ("'ab'", *BATCH)),
    Case("batch a number", training(3), BatchError, ("3", *BATCH)),
    Case("data of two tensors", {"data": (XS, YS)}, BatchError, ("data=((xs, ys),)", *BATCH)),
    Case(
        "data empty", {"data": ([],)}, DataError, ("the training data (a list of length 0) gave no batch", "drop_last")
    ),
    Case("data used up", {"data": (iter(()),)}, DataError, ("the training data", "gave no batch", "used up before")),
    Case(
        "validation empty", {"data": (GOOD, [])}, DataError, ("the validation data (a list of length 0) gave no batch",)
    ),
    Case(
        "data missing",
        {"data": ()},
        DataError,
        ("TrainingPhase runs on the 'training' data", "no data", "or to this call"),
    ),
    Case(
        "data of another name",
        {"data": {"train": GOOD}},
        DataError,
        ("runs on the 'training' data, and there is ['train']", "did you mean 'train'?", "data={'training': ...}"),
    ),
    Case("data for validation missing", phases(ValidationPhase()), DataError, ("'validation' data", "['training']")),
    Case("data of an unknown phase", phases(Stray()), DataError, ("'trainnig' data", "did you mean 'training'?")),
    Case("data given to fit", {"fit": {"data": 3}}, DataError, ("3 was given as data", LOADABLE)),
    Case("data of three given to fit", {"fit": {"data": (GOOD,) * 3}}, DataError, ("a tuple of 3", "(train, valid)")),
    Case("epochs negative", {"fit": {"epochs": -1}}, ValueError, ("fit(-1)", EPOCHS)),
    Case("epochs fraction", {"fit": {"epochs": 1.0}}, ValueError, ("fit(1.0)", EPOCHS)),
    Case("epochs text", {"fit": {"epochs": "3"}}, ValueError, ("fit('3')", EPOCHS)),
    Case("epochs truth", {"fit": {"epochs": True}}, ValueError, ("fit(True)", EPOCHS)),
    Case("epochs None", {"fit": {"epochs": None}}, ValueError, ("fit(None)", EPOCHS)),
    Case("epochs not a number", {"fit": {"epochs": float("nan")}}, ValueError, ("fit(nan)", EPOCHS)),
    Case("phase class", phases(TrainingPhase), PhaseError, ("the class TrainingPhase", "an instance: TrainingPhase()")),
    Case("phase name", phases("training"), PhaseError, ("'training' was given as a phase", "TrainingPhase()")),
    Case("phase None", phases(None), PhaseError, ("None was given as a phase", "an instance")),
    Case(
        "phases single",
        {"fit": {"phases": TrainingPhase()}},
        PhaseError,
        ("TrainingPhase()", "phases=[TrainingPhase()]"),
    ),
    Case("phase of the fit", phases(FittingPhase()), PhaseError, ("FittingPhase",)),
    Case(
        "phase without a body",
        phases(NoBody()),
        PhaseError,
        ("NoBody does not say what a step does", "def body(self, learner, handle, state):"),
    ),
    Case(
        "phase without a loss",
        phases(NoLoss()),
        PhaseError,
        ("NoLoss says no loss", "def loss(self, learner, state, name):"),
    ),
    Case(
        "phase that trains on validation",
        phases(TrainsOnValidation(), data=(GOOD, GOOD)),
        LossError,
        (NO_GRADIENT, "is this a validation phase"),
    ),
    Case(
        "phase for one model",
        pair(optimizer=sgd),
        PhaseError,
        ("TrainingPhase runs one model", "['critic', 'generator']", "learner.fit(..., phases=[MyPhase()])"),
    ),
    Case(
        "block of an unknown name", phases(Blocks(loss_of, "D")), OptimizerError, ("no optimizer 'D'", "optimizing()")
    ),
    Case("block of an unknown number", phases(Blocks(loss_of, 3)), OptimizerError, ("no optimizer 3",)),
    Case("block loss per row", phases(Blocks(lambda le, st: le.model(st.xs))), LossError, ("shape (8, 1)", SCALAR)),
    Case("block loss a number", phases(Blocks(lambda le, st: 2.5)), LossError, ("the loss is 2.5",)),
    Case("block loss detached", phases(Blocks(lambda le, st: loss_of(le, st).detach())), LossError, (NO_GRADIENT,)),
    Case(
        "block loss of other parameters",
        phases(Blocks(lambda le, st: nn.Linear(1, 1)(st.ys).mean())),
        LossError,
        ("the loss of the optimizer reaches none of its own parameters", "detached"),
    ),
    Case(
        "block in a block", phases(Does(nested_blocks)), OptimizerError, ("opened inside", "close one before the next")
    ),
    Case(
        "update of an unknown name", phases(Does(lambda le, st: le.update("D"))), OptimizerError, ("no optimizer 'D'",)
    ),
    Case("backward of nothing", phases(Does(lambda le, st: le.backward(None))), LossError, ("the loss is None",)),
    Case("fit in a fit", phases(Does(lambda le, st: le.fit(1))), ReentrantFitError, ("while this learner is fitting",)),
)


@pytest.mark.slow(quick=14)
@table(*FITTING)
def test_a_fit_with_bad_input_changes_nothing_and_can_be_repeated(case: Case) -> None:
    options = dict(case.given)
    arguments = {"epochs": 1, **options.pop("fit", {})}
    learner = build(options)
    before = Snapshot(learner)
    refused(case, lambda: learner.fit(arguments.pop("epochs"), arguments.pop("data", None), **arguments))
    before.assert_unchanged()
    assert learner.history[TrainingPhase].steps == 0
    if "model" not in options:
        learner.loss_fn = mse_loss
        learner.fit(1, (GOOD, GOOD))
        assert learner.history[TrainingPhase].steps == 1


@pytest.mark.parametrize("phase", [TrainingPhase, "training", None, Recorder()])
def test_an_epoch_wants_an_instance_of_a_phase(phase: Any) -> None:
    learner = build({})
    before = Snapshot(learner)
    with pytest.raises(PhaseError, match=r"was given as a phase; expected an instance: TrainingPhase\(\)"):
        learner.epoch(phase)
    before.assert_unchanged()


@pytest.mark.parametrize("phase", [TrainingPhase, "training", None])
def test_a_step_wants_an_instance_of_a_phase(phase: Any) -> None:
    learner = build({})
    with pytest.raises(PhaseError, match=r"was given as a phase; expected an instance, e\.g\. TrainingPhase\(\)"):
        with runstep(learner, phase, xs=XS):
            pass
    assert learner.scope is None


def test_a_validation_twin_wants_an_instance_of_its_training_phase() -> None:
    for thing in (NoLoss, TrainingPhase(), None):
        with pytest.raises(PhaseError, match=r"was given .*; expected .*: PerOptimizerValidationPhase\(MyPhase"):
            PerOptimizerValidationPhase(thing)


# Several optimizers


def run_pair(call: Callable[[Learner, Any], Any]) -> None:
    learner = build(pair(loss_fn=None, data=([(XS[:, :2], YS)],)))
    before = Snapshot(learner)
    try:
        learner.fit(1, phases=[Does(call)])
    finally:
        before.assert_unchanged()


def through(learner: Learner, name: str, state: Any) -> Tensor:
    return getattr(learner.model, name)(state.xs).mean()


def in_block_of_critic(call: Callable[[Learner, Any], Any]) -> Callable[[Learner, Any], Any]:
    def run(learner: Learner, state: Any) -> None:
        with learner.optimizing("critic") as block:
            block.loss = call(learner, state)

    return run


@table(
    Case(
        "no name",
        lambda le, st: le.optimizing(),
        OptimizerError,
        ("['generator', 'critic']", "optimizing('generator')"),
    ),
    Case("misspelt", lambda le, st: le.optimizing("critik"), OptimizerError, ("'critik'", "did you mean 'critic'?")),
    Case(
        "loss of the other model",
        in_block_of_critic(lambda le, st: through(le, "generator", st)),
        LossError,
        (NO_GRADIENT,),
    ),
    Case(
        "output computed before and detached",
        in_block_of_critic(lambda le, st: through(le, "critic", st).detach()),
        LossError,
        (NO_GRADIENT, "detached"),
    ),
    Case(
        "update of the other optimizer",
        in_block_of_critic(lambda le, st: le.update("generator")),
        OptimizerError,
        ("learner.update('generator')", "inside the block of optimizer 'critic'", "learner.optimizing('generator')"),
    ),
    Case(
        "block of the other optimizer inside",
        in_block_of_critic(lambda le, st: le.optimizing("generator").__enter__()),
        OptimizerError,
        ("the block of optimizer 'generator' was opened inside that of optimizer 'critic'",),
    ),
)
def test_with_several_optimizers_whose_turn_it_is_must_be_said(case: Case) -> None:
    refused(case, lambda: run_pair(case.given))


def test_a_second_loss_of_nobody_is_refused() -> None:
    def twice(learner: Learner, state: Any) -> None:
        learner.backward(through(learner, "critic", state))
        learner.backward(through(learner, "generator", state))

    learner = build(pair(loss_fn=None, data=([(XS[:, :2], YS)],)))
    with pytest.raises(LossError, match=r"(?s)called twice in one step.*\['generator', 'critic'\].*optimizing\('gen"):
        learner.fit(1, phases=[Does(twice)])


# Metrics


def test_a_metric_of_an_entry_that_the_phase_does_not_store_says_what_there_is() -> None:
    learner = build({"callbacks": [Recorder(), Metrics(Metric(mse_loss, name="views", inputs=("z1", "ys")))]})
    before = Snapshot(learner)
    case = Case(
        "",
        None,
        MissingEntryError,
        (
            "The step has no entry 'z1'; it has: loss, preds, xs, ys.",
            "runstep(learner, self, NAME=...)",
            "the metric 'views' has inputs=('z1', 'ys')",
            "Metric(..., phase=...)",
            "raised by Metrics at StepEnd of ValidationPhase()",
        ),
    )
    refused(case, lambda: learner.fit(1, {"validation": GOOD}, phases=[ValidationPhase()]))
    before.assert_unchanged()


@table(
    Case(
        "name", lambda: Metrics("accuracy"), MetricError, ("'accuracy' was given as a metric", "(preds, ys) -> scalar")
    ),
    Case(
        "class", lambda: Metrics(Recorder), MetricError, ("the class Recorder was given as a metric", "Recorder(...)")
    ),
    Case("list", lambda: Metrics([mse_loss]), MetricError, ("a list of length 1 was given as a metric",)),
    Case("lambda", lambda: Metrics(lambda p, y: p), MetricError, ("a lambda", "Metric(f, name='...')")),
    Case(
        "twice", lambda: Metrics(mse_loss, mse_loss), MetricError, ("two metrics are called 'mse_loss'", "name='...'")
    ),
    Case("inputs", lambda: Metric(mse_loss, inputs="preds"), MetricError, ("inputs='preds'", "inputs=('preds',)")),
    Case("phase", lambda: Metric(mse_loss, phase=TrainingPhase()), MetricError, ("phase=", "TrainingPhase")),
)
def test_what_is_no_metric_is_refused(case: Case) -> None:
    refused(case, case.given)


# Callbacks and events


def misspelt_event() -> None:
    class Misspelt(Callback):
        @on("StepBegn")
        def run(self, event: Any, phase: Any, learner: Any) -> None: ...


def event_instance() -> None:
    class Instance(Callback):
        @on(StepBegin())
        def run(self, event: Any, phase: Any, learner: Any) -> None: ...


def event_of_no_kind() -> None:
    class Other(Callback):
        @on(Recorder)
        def run(self, event: Any, phase: Any, learner: Any) -> None: ...


def phase_instance() -> None:
    class Instance(Callback):
        @on(StepBegin, TrainingPhase())
        def run(self, event: Any, phase: Any, learner: Any) -> None: ...


def phase_name() -> None:
    class Named(Callback):
        @on(StepBegin, "training")
        def run(self, event: Any, phase: Any, learner: Any) -> None: ...


def method_without_on() -> None:
    class Luz(Callback):
        def on_batch_end(self, event: Any, phase: Any, learner: Any) -> None: ...


def half_a_state() -> None:
    class Half(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {}


@table(
    Case("misspelt", misspelt_event, HandlerError, ("'StepBegn'", "@on(StepEnd)", "did you mean 'StepBegin'?")),
    Case("instance", event_instance, HandlerError, ("a StepBegin as an event", "expected an event type")),
    Case("no event", event_of_no_kind, HandlerError, ("the class Recorder as an event", "expected an event type")),
    Case("phase instance", phase_instance, HandlerError, ("a TrainingPhase as a phase", "expected a phase type")),
    Case("phase name", phase_name, HandlerError, ("'training' as a phase", "@on(StepBegin, AbstractTrainingPhase)")),
    Case("no @on", method_without_on, HandlerError, ("Luz.on_batch_end looks like a handler", "@on(StepEnd)")),
    Case("half a state", half_a_state, HandlerError, ("Half has state_dict alone", "load_state_dict(self, state)")),
)
def test_a_callback_that_nothing_would_call_is_refused_when_it_is_made(case: Case) -> None:
    refused(case, case.given)


def test_a_misspelt_name_of_the_package_says_which_was_meant() -> None:
    with pytest.raises(AttributeError, match=r"fluxloop has no 'StepBegn'; did you mean 'StepBegin'\?"):
        _ = fluxloop.StepBegn


@pytest.mark.parametrize("manage", ["add_callback", "replace_callback", "set_callbacks"])
@pytest.mark.parametrize("thing", [Recorder, None, "Recorder", network])
def test_management_refuses_what_is_no_callback(manage: str, thing: Any) -> None:
    learner = toy_learner(EventRecorder())
    before = Snapshot(learner)
    with pytest.raises(CallbackTypeError, match="expected"):
        getattr(learner, manage)(thing)
    before.assert_unchanged()


@pytest.mark.parametrize("manage", ["get_callback", "remove_callback"])
@pytest.mark.parametrize("thing", ["Recorder", Recorder(), None])
def test_callbacks_are_looked_up_by_class(manage: str, thing: Any) -> None:
    with pytest.raises(CallbackTypeError, match=r"was given; expected the class of a callback, e\.g\. Recorder"):
        getattr(toy_learner(Recorder()), manage)(thing)


# Seeds


@pytest.mark.parametrize("seed", [-1, 2**32, "0", 1.5, None, True])
def test_a_seed_for_everything_lies_in_its_range_or_changes_nothing(seed: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"seed.* was given; expected a .*number from 0 to 4294967295") as caught:
        seed_everything(seed)
    assert str(seed).strip("'") in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


# What is used before it is there


def test_defer_outside_of_everything_says_what_must_run() -> None:
    with pytest.raises(PhaseError, match=r"learner\.defer was called while nothing is running; expected a fit"):
        toy_learner().defer(lambda: None)


def test_an_entry_before_the_first_step_says_that_there_is_none() -> None:
    with pytest.raises(MissingEntryError, match="The step has no entry 'loss'; it has: nothing"):
        _ = toy_learner().step.loss
    with pytest.raises(MissingEntryError, match="cbstate has no entry 'history'; it has: nothing"):
        _ = toy_learner().cbstate.history


def test_predict_with_several_models_says_what_to_write() -> None:
    learner = Learner({"a": Coefficient(), "b": Coefficient()}, default_callbacks=False)
    with pytest.raises(PhaseError, match=r"predict runs one model, .* has \['a', 'b'\].*phase=MyPhase\(\)"):
        learner.predict(XS)


def test_predictions_that_no_step_stored_say_what_is_missing() -> None:
    class Forgets(ValidationPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch):
                pass

    with pytest.raises((PhaseError, MissingEntryError), match="preds"):
        toy_learner().predict(XS[:, :1], phase=Forgets())


# Every argument of the public API: what is malformed is named when it is given

NAN, INF = float("nan"), float("inf")


def bad(make: Callable[..., object], good: dict[str, Any] | None = None, **wrong: Sequence[Any]) -> list[Any]:
    """List malformed calls: each of the values for each argument, in the place of a good one."""
    name = getattr(make, "__qualname__", repr(make)).removeprefix("a_")
    return [
        pytest.param(make, {**(good or {}), argument: value}, id=f"{name}({argument}={short(value)})")
        for argument, values in wrong.items()
        for value in values
    ]


def short(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str) and len(value) > 40:
        return f"{len(value)} letters"
    if isinstance(value, dict):
        return f"{{{', '.join(short(key) for key in value)}}}"
    return (
        re.sub(r" at 0x[0-9a-f]+", "", repr(value)).replace("\0", "NUL") if not isinstance(value, Tensor) else "tensor"
    )


def mean(preds: Tensor, ys: Tensor) -> Tensor:
    return (preds - ys).mean()


def a_learner(**options: Any) -> Learner:
    return build(options)


def a_fit(epochs: Any = 1, **options: Any) -> None:
    build({}).fit(epochs, **options)


def an_epoch(phase: Any = None, **options: Any) -> None:
    build({}).epoch(TrainingPhase() if phase is None else phase, **options)


def an_evaluation(**options: Any) -> None:
    build({"data": (GOOD, GOOD)}).evaluate(**options)


def a_prediction(data: Any = XS, **options: Any) -> None:
    build({}).predict(data, **options)


def a_save(path: Any) -> None:
    build({}).save(path)


def a_load(path: Any) -> None:
    build({}).load(path)


def a_load_of_weights(path: Any, **options: Any) -> None:
    build({}).load_weights(path, **options)


def a_state(state: Any) -> None:
    build({}).load_state_dict(state)


def a_callback(callback: Any) -> None:
    build({}).add_callback(callback)


def a_replacement(callback: Any) -> None:
    build({}).replace_callback(callback)


def a_look_up(cls: Any) -> None:
    build({}).get_callback(cls)


def a_removal(cls: Any) -> None:
    build({}).remove_callback(cls)


def all_callbacks(callbacks: Any) -> None:
    build({}).set_callbacks(callbacks)


def a_block(name: Any) -> None:
    build({}).optimizing(name)


def an_update(name: Any = None) -> None:
    build({}).update(name)


def a_backward(loss: Any) -> None:
    build({}).backward(loss)


def a_check(**options: Any) -> None:
    build({}).check(**options)


def a_summary(**options: Any) -> None:
    build({}).summary(**options)


def an_explanation(path: Any) -> None:
    build({}).callbacks.explain(path)


def a_request(reason: Any) -> None:
    build({}).request_stop(reason)


def a_sweep(**options: Any) -> None:
    find_lr(build({}), **options)


def a_search(**options: Any) -> None:
    find_batch_size(build({}), **options)


def a_recomputation(pattern: Any) -> None:
    recompute_activations(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), pattern)


def a_preparation(thing: Any) -> None:
    Accelerator("cpu").prepare(thing)


def a_rate(value: Any = 0.1, hp: Any = LearningRate) -> None:
    set_hyperparameter(build({}), hp, value)


def a_look_at(hp: Any) -> None:
    get_hyperparameter(build({}), hp)


def a_schedule(schedule: Any, unit: Any = "step") -> None:
    build({"callbacks": [Scheduler({LearningRate: schedule}, unit=unit)]}).fit(1)


def a_decay(schedule: Any) -> None:
    build({"callbacks": [Scheduler({WeightDecay: schedule})]}).fit(1)


def a_torch_schedule(factory: Any = None, **options: Any) -> None:
    factory = partial(StepLR, step_size=1) if options else factory
    build({"callbacks": [LRScheduler(factory, **options)]})


def an_average(model: Any = "model", decay: Any = 0.9, **options: Any) -> None:
    build({"callbacks": [EMA(model, decay, **options)]})


def an_attribute(name: Any) -> None:
    Attribute(network(), name)


def histograms(**options: Any) -> None:
    LogHistograms(Memory(), **options)


def metrics_log(backend: Any = None, **options: Any) -> None:
    LogMetrics(Memory() if options else backend, **options)


def a_visualization(function: Any = len, **options: Any) -> None:
    LogVisualization(function, Memory(), **options)


def a_check_of(check: Any = None, **options: Any) -> None:
    SanityCheck(Check("mine", len, **options) if options else check)


def batches(tensors: Any = (XS,), batch_size: Any = 2, **options: Any) -> None:
    TensorBatches(*tensors, batch_size=batch_size, **options)


def a_plan(when: Any, **options: Any) -> None:
    build({"callbacks": [Unfreeze(when, **options)]})


def weights_named(name: Any) -> None:
    _ = build({}).weights[name]


def a_series(name: Any) -> None:
    _ = build({}).history[name]


def a_step(**entries: Any) -> None:
    learner = build({})
    with runstep(learner, TrainingPhase(), **entries):
        pass


def a_deferral(undo: Any) -> None:
    with runepoch(learner := build({}), TrainingPhase()):
        learner.defer(undo)


def some_data(data: Any) -> None:
    build({"data": data})


def some_models(model: Any) -> None:
    build({"model": model})


def a_optimizer(**options: Any) -> None:
    build({"optimizer": partial(SGD, **{"lr": 0.1, **options})})


class Short:
    """Batches whose length is said wrongly."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length  # type: ignore[no-any-return]  # that it is none is the point

    def __iter__(self) -> Iterator[Any]:
        return iter(GOOD)


def a_length(length: Any) -> None:
    build({"data": (Short(length),)}).fit(1)


NUMBERS = [NAN, "1", None, [1]]
COUNTS = [0, -1, 1.5, NAN, "1", None, True]
WHOLE = [-1, 1.5, "1"]
PATHS = [None, 3, "", "a\0b", "x" * 300]
MONITORS = [None, 3, "loss", ""]
MODES = ["minimum", 1]
SPAN = {"total": 4, "start": 1.0, "end": 0.5}

MALFORMED = [
    *bad(some_data, data=[({"my data": GOOD}), {"": GOOD}, {1: GOOD}, {"class": GOOD}, (GOOD, 3), "mnist"]),
    *bad(some_models, model=[{"count": network()}, {"index": network()}, {"a b": network()}, [network()], "net"]),
    *bad(a_optimizer, lr=[NAN, -1.0, "fast", INF], momentum=[NAN, -0.1], weight_decay=[NAN, -1.0]),
    *bad(a_length, length=[1.5, -1, "3"]),
    *bad(a_learner, callbacks=[[[Recorder()]], "Recorder"], default_callbacks=["no", None], seed=[-1, 0.5, "a"]),
    *bad(a_fit, epochs=[-1, 1.5, "3", None, NAN], data=[3, "a", (GOOD,) * 3], steps_per_epoch=[0, -1, 1.5, "2", True]),
    *bad(a_fit, phases=[TrainingPhase, "training", [None], [TrainingPhase], 3], resume=[3, "a\0b", "x" * 300, ""]),
    *bad(an_epoch, phase=[TrainingPhase, "training", 3, FittingPhase()], data=[3, "a", []]),
    *bad(
        an_evaluation, data=[3, []], metrics=[3, mean, [3], ["accuracy"]], phase=[TrainingPhase(), ValidationPhase, 3]
    ),
    *bad(a_prediction, data=[None, 3, []], phase=[TrainingPhase(), 3]),
    *bad(a_save, path=[*PATHS, ".", "no/such/folder/x.pt"]),
    *bad(a_load, path=[*PATHS, ".", "missing.pt"]),
    *bad(a_load_of_weights, path=[*PATHS, ".", "missing.pt"]),
    *bad(a_state, state=[None, {}, [], 3]),
    *bad(a_callback, callback=[None, Recorder, "Recorder", [Recorder()], mean]),
    *bad(a_replacement, callback=[None, Recorder, mean]),
    *bad(a_look_up, cls=["Recorder", Recorder(), None, int]),
    *bad(a_removal, cls=["Recorder", None, 3, int]),
    *bad(all_callbacks, callbacks=[None, Recorder(), Recorder, [3]]),
    *bad(a_block, name=["D", 3, 0.5]),
    *bad(an_update, name=[None, "D", 3]),
    *bad(a_backward, loss=[None, 1.0, "loss", XS, torch.zeros(())]),
    *bad(a_check, phases=[3, [TrainingPhase], TrainingPhase(), ["training"]]),
    *bad(a_summary, depth=[-1, 1.5, "2"]),
    *bad(an_explanation, path=["modle", 3, "", "step..loss"]),
    *bad(a_sweep, start=[0, -1, NAN, "1"], end=[0, NAN, 1e-9], steps=[0, 1, 2.5, "9"], smoothing=[1, -1, NAN, "a"]),
    *bad(a_search, start=[0, -1, 2.5, "9"], largest=[0, NAN, "9"], phase=[ValidationPhase(), TrainingPhase, 3]),
    *bad(a_recomputation, pattern=["1", "a.*", 3, None, ""]),
    *bad(a_preparation, thing=[3, "a", nn.Linear, torch.zeros(3)]),
    *bad(a_sweep, phase=[ValidationPhase(), TrainingPhase, 3], optimizer=["D", 3]),
    *bad(a_rate, value=[NAN, -1.0, "a", None, INF], hp=[3, "lr", int, LearningRate("D"), LearningRate(group=3)]),
    *bad(a_look_at, hp=[None, "lr", Momentum("x"), Betas()]),
    *bad(
        a_schedule,
        schedule=[NAN, -1.0, None, "a", cosine, lambda t: None, lambda t: NAN, lambda t: -1.0, lambda t: "a"],
    ),
    *bad(a_schedule, {"schedule": 0.1}, unit=["steps", None, 3]),
    *bad(a_decay, schedule=[NAN, -1.0, lambda t: NAN, lambda t: INF]),
    *bad(Scheduler, schedules=[{}, None, 3, [], {LearningRate: None}, {3: 0.1}, {"lr": 0.1}, {LearningRate: "a"}]),
    *bad(
        a_torch_schedule,
        factory=[StepLR, None, 3, lambda o: 3, lambda o: None],
        unit=["steps", None],
        monitor=MONITORS[1:],
    ),
    *bad(a_torch_schedule, optimizer=["D", 3]),
    *bad(an_average, model=[None, "x", "model@ema", 3], decay=[NAN, -0.1, 1.5, "a", None], buffers=["x", 1]),
    *bad(an_average, view=["", "a b", 3, None], into=["x", 3]),
    *bad(a_plan, when=[{}, None, 3, {"x": 1}, {"weight": -1}, {"weight": 1.5}, {"weight": None}, {1: 1}]),
    *bad(a_plan, {"when": {"weight": 1}}, unit=["epochs", None]),
    *bad(weights_named, name=["x", 3, "model@ema", ""]),
    *bad(a_series, name=["loss", "training/x", 3, None]),
    *bad(a_step, xs=[XS[:0]]),
    *bad(a_deferral, undo=[None, 3]),
    *bad(LearningRate, optimizer=[3, 0.5], group=[-1, 1.5, "0"]),
    *bad(an_attribute, name=["nope", 3, None]),
    *bad(EarlyStopping, {"criterion": 2}, criterion=[0, -1, 1.5, "a", None, True], monitor=MONITORS),
    *bad(EarlyStopping, {"criterion": 2}, mode=MODES, min_epochs=[*WHOLE, None], min_delta=[NAN, "a", None, -1.0]),
    *bad(Timer, seconds=[0, -1, NAN, "1", True], minutes=[-1, "a"], hours=[None, NAN]),
    *bad(KeepBestModel, monitor=MONITORS, mode=MODES, min_delta=[NAN, -1, "a", None]),
    *bad(Checkpointer, folder=PATHS),
    *bad(Checkpointer, {"folder": "runs"}, every=[0, -1, NAN, INF, "1", None, True], unit=["steps", None]),
    *bad(Checkpointer, {"folder": "runs", "unit": "second"}, every=[0, INF, NAN]),
    *bad(
        Checkpointer,
        {"folder": "runs"},
        keep_last=[0, -1, 1.5, "2"],
        keep_best=[*WHOLE, None],
        monitor=MONITORS,
        mode=MODES,
    ),
    *bad(BatchLimit, limit=COUNTS[:-1]),
    *bad(BatchLimit, {"limit": 1}, phase=[None, "training", 3, TrainingPhase()]),
    *bad(GradientClip, max_norm=[-1, NAN, "a", None, True], norm_type=[0, -1, NAN, "a"], value=[-1, NAN, "a"]),
    *bad(MixUp, alpha=[0, -1, NAN, "a", None, True, INF], num_classes=[1, -1, 2.5, "a"]),
    *bad(CutMix, alpha=[0, NAN, "a"], num_classes=[1, 2.5]),
    *bad(GarbageCollect, every=COUNTS),
    *bad(ProgressBar, interval=[-1, NAN, "a", None], enabled=["yes", 3]),
    *bad(MetricsPrinter, digits=[-1, 1.5, "a", None], time=["yes", 1], stamps=["yes", None]),
    *bad(Traces, functions=["loss", None, {}, {"a": 3}, [mean], mean]),
    *bad(Traces, {"functions": {"a": len}}, phase=[TrainingPhase(), "training", None], reads=["step.loss"]),
    *bad(CSVLogger, path=PATHS),
    *bad(
        StochasticWeightAveraging,
        {"model": "model"},
        start=[-1, 1.5, "a", None],
        every=COUNTS[:-2],
        unit=["steps", None],
    ),
    *bad(SampleImages, {"model": "model"}, count=COUNTS[:-1], every=COUNTS[:-1], columns=COUNTS[:-1], folder=["a\0b"]),
    *bad(EmbeddingMap, reducer=[None, 3, "tsne"], most_rows=[*COUNTS[:-1], 1], features=[3, "a"], folder=["a\0b"]),
    *bad(NeighborImages, model=[None, 3], count=COUNTS[:-1], k=COUNTS[:-1], every=COUNTS[:-1], show=[3, "a"]),
    *bad(ReconstructionImages, images=[3, {"image": 3}], count=COUNTS[:-1], every=COUNTS[:-1]),
    *bad(AttentionMaps, attention=[3, "a"], layer=[0.5, "a", None], heads=COUNTS[:-1]),
    *bad(KNNProbe, model=[None, 3], k=[*COUNTS], temperature=[0, -1, NAN, "a"], every=COUNTS[:-1]),
    *bad(
        LinearProbe,
        {"model": "model", "num_classes": 2},
        num_classes=[1, 0, 1.5, "a", None],
        every=COUNTS[:-1],
        head=[3, "linear"],
        optimizer=[None, 3],
        loss=[3, "mse"],
        schedule=["fast", {"lr": 0.1}],
        metrics=[3, []],
    ),
    *bad(
        FrechetDistance,
        {"model": "model", "extractor": mean, "inputs": torch.zeros(3, 2)},
        model=[None, 3, ""],
        extractor=[None, 3],
        inputs=[None, 3, "a", torch.zeros(0, 2)],
        compare=[None, 3],
        batch_size=COUNTS[:-1],
        every=COUNTS[:-1],
    ),
    *bad(FeatureStats, entry=[None, 3, ""], rows=COUNTS[:-1], every=COUNTS[:-1]),
    *bad(ActivationStats, pattern=[None, 3], every=COUNTS[:-1]),
    *bad(Profile, steps=[3, (0, 0), (-1, 3), "a", (1, 2, 3), (1.5, 2)]),
    *bad(
        CustomCallback,
        {"f": len, "event": StepEnd},
        f=[None, 3],
        event=[None, "StepEnd", StepEnd(), 3],
        phase=["x", None],
    ),
    *bad(
        CustomCallback,
        {"f": len, "event": StepEnd},
        reads=["step.loss", 3],
        writes=["step.loss", 3],
        run_after=[3, ["a"]],
    ),
    *bad(histograms, of=[["x"], "x"], every=COUNTS[:-1], pattern=[3]),
    *bad(metrics_log, every=COUNTS[:-1], phase=["x", None], backend=[None, 3, "runs", Memory]),
    *bad(a_visualization, function=[None, 3], every=COUNTS[:-1]),
    *bad(a_check_of, check=[None, 3, Check], severity=["fatal"]),
    *bad(LogHyperParams, params=[3, "a"]),
    *bad(StopOnNaNLoss, wait=[3, "no"]),
    *bad(throttle, {"callback": EventRecorder(), "event": StepEnd}, callback=[None, Recorder], event=[None, "StepEnd"]),
    *bad(throttle, {"callback": EventRecorder(), "event": StepEnd}, freq=COUNTS[:-2], seconds=[-1, NAN, "a"]),
    *bad(Metric, {"fn": mean}, fn=[None, 3, "accuracy"], name=[3], inputs=["preds", 3, ()], phase=["x", 3]),
    *bad(batches, tensors=[(), (3,), ("a",), (XS, YS[:3]), (XS[:0],)], batch_size=COUNTS[:-1], seed=[-1, 0.5, "a"]),
    *bad(as_dataloader, {"data": XS}, data=[None, 3, "a", mean], batch_size=COUNTS, shuffle=["yes"]),
    *bad(
        split, {"data": XS, "fraction": 0.5}, data=[None, 3], fraction=[-0.1, 1.5, NAN, "a", None], seed=[-1, 0.5, "a"]
    ),
    *bad(overfit, {"data": XS}, data=[None, 3]),
    *bad(Accelerator, device=[3, "tpu9", None], compile=["all", 3, True]),
    *bad(seed_everything, seed=[-1, 2**32, "0", 1.5, None, True]),
    *bad(linear, SPAN, total=[*COUNTS[:-2], 2.5, INF], start=NUMBERS, end=NUMBERS),
    *bad(cosine, SPAN, total=[0, 2.5, NAN], start=NUMBERS, end=[INF, "a"]),
    *bad(exponential, SPAN, total=[0, 2.5], start=[0.0, NAN, "a"], end=[-1.0, None, INF]),
    *bad(polynomial, SPAN, power=[0, -1, NAN, "a", None]),
    *bad(fluxloop.schedules.step, {"every": 2, "start": 1.0}, every=[0, 1.5, NAN], start=NUMBERS, gamma=NUMBERS),
    *bad(triangle, {"total": 4, "start": 0.0, "peak": 1.0}, total=[0, 2.5], start=NUMBERS, peak=NUMBERS),
    *bad(sine, {"total": 4, "start": 0.0, "peak": 1.0}, total=[0, 2.5], peak=NUMBERS),
    *bad(inverse_sqrt, {"warmup": 4, "peak": 1.0}, warmup=[0, 2.5, None], peak=NUMBERS),
    *bad(warmup, {"steps": 4, "then": 1.0}, steps=[0, 2.5, None], then=["a", None, NAN], start=NUMBERS),
    *bad(
        one_cycle,
        {"total": 4, "max_value": 1.0},
        total=[0, 2.5, NAN, None],
        max_value=NUMBERS,
        pct_start=[-1, 2, NAN, "a"],
    ),
    *bad(one_cycle, {"total": 4, "max_value": 1.0}, div=[0, -1, NAN, "a"], div_final=[0, NAN, None]),
    *bad(constant, value=NUMBERS),
    *bad(shift, {"schedule": 1.0, "steps": 1}, schedule=["a", None], steps=[1.5, "a", None]),
    *bad(repeat, {"schedule": 1.0, "every": 2}, schedule=["a", None], every=[0, 1.5, None], times=[0, -1, 1.5, "a"]),
    *bad(Patience, n=COUNTS),
    *bad(NoImprovement, {"n": 2}, n=COUNTS, min_delta=[NAN, -1, "a", None]),
    *bad(Threshold, value=NUMBERS),
    *bad(TimeLimit, seconds=[0, -1, NAN, "a", None]),
    *bad(NumberLimit, n=COUNTS),
    *bad(GL, alpha=[0, -1, NAN, "a", None]),
    *bad(PQ, alpha=[0, NAN, "a"], k=COUNTS[:-2]),
    *bad(TwoViews, transform=[None, 3]),
    *bad(
        MultiCrop,
        {"global_crop": mean, "local_crop": mean},
        local_crop=[None, 3],
        num_local=[-1, 1.5],
        num_global=COUNTS[:3],
    ),
    *bad(ViewDataset, {"dataset": GOOD, "views": mean}, dataset=[None, 3], views=[None, 3]),
    *bad(SimCLRPhase, temperature=[0, -1, NAN, "a", None], views=[3, "a"], gather=[None, 1, "a"]),
    *bad(SupConPhase, temperature=[0, NAN, "a"]),
    *bad(MoCoPhase, queue_size=COUNTS[:-1], temperature=[0, NAN, "a"]),
    *bad(LeJEPAPhase, weight=[-0.1, 1.1, NAN, "a"], num_directions=COUNTS[:3], num_global=COUNTS[:3], gather=[1]),
    *bad(MoCoV3Phase, temperature=[0, NAN, "a"], gather=[None]),
    *bad(MSNPhase, temperature=[0, "a"], sharpening=[0, 1.1, NAN], iterations=[-1, 1.5], entropy=[-1, NAN], masks=[3]),
    *bad(
        IBOTPhase,
        {"patch_size": 2},
        patch_size=COUNTS[:-1],
        patch_weight=[-1, NAN, "a"],
        patch_temperature=[0, "a"],
        masks=[3],
    ),
    *bad(DINOv2Phase, {"patch_size": 2}, koleo=[-1, NAN], iterations=COUNTS[:3], center_momentum=[2, "a"]),
    *bad(IJEPAPhase, {"patch_size": 2}, patch_size=COUNTS[:-1], masks=[3, "a"]),
    *bad(Data2VecPhase, {"patch_size": 2}, layers=COUNTS[:3], beta=[0, NAN, "a"], masks=[3]),
    *bad(RandomMasks, share=[-0.1, 1.1, (0.5, 0.1), (0.1,), "a", None], unmasked=[-1, 2, "a"]),
    *bad(BlockMasks, blocks=COUNTS[:3], share=[2, "a"], ratio=[0, (2, 1), "a"]),
    *bad(MultiBlock, blocks=COUNTS[:3], share=[2, "a"], context=[-1, "a"], least=COUNTS[:3]),
    *bad(NNCLRPhase, queue_size=COUNTS[:-1], temperature=[0, NAN, "a"]),
    *bad(SwAVPhase, queue_size=[-1, 1.5, NAN], temperature=[0, "a"], epsilon=[0, NAN], iterations=COUNTS[:3]),
    *bad(SwAVPhase, queue_from=[-1, 1.5, "a"], num_global=COUNTS[:3]),
    *bad(BarlowTwinsPhase, weight=[-1, NAN, "a", None]),
    *bad(VICRegPhase, invariance=[-1, NAN, "a"], variance=[-1, NAN], covariance=[-1, "a"]),
    *bad(DistillationPhase, temperature=[0, -1, NAN, "a"], weight=[-0.1, 1.1, NAN, "a"]),
    *bad(TripletPhase, margin=[-1, NAN, "a", None]),
    *bad(VAEPhase, beta=[-1, NAN, "a", None], compare=[3, None]),
    *bad(AutoencoderPhase, compare=[3, None, "mse"]),
    *bad(MAEPhase, {"patch_size": 4}, patch_size=COUNTS[:-1], mask_ratio=[-0.1, 0, 1, NAN, "a"]),
    *bad(CycleGANPhase, cycle=[-1, NAN, "a"], identity=[-1, NAN, "a"], pool_size=[-1, 1.5, "a"], loss=["hinge", None]),
    *bad(FlowMatchingPhase, times=["x", 3, None], sigma_min=[-0.1, 1.1, NAN, "a"], conditional=[None, 1]),
    *bad(FlowMatchingPhase, {"conditional": True}, condition_dropout=[-0.1, 1.1, NAN, "a", 0.1], null=[NAN, "a"]),
    *bad(DiffusionPhase, predict=["x", 3, None], schedule=["x", 3, None], steps=[*COUNTS, 1], sigma_data=[0, NAN, "a"]),
    *bad(DiffusionPhase, log_sigma=[3, None, (0.0, 0.0), (NAN, 1.0)], sigma_range=[3, (1.0,), ("a", 1.0)]),
    *bad(PerOptimizerValidationPhase, training=[None, TrainingPhase(), NoLoss]),
    *bad(top_k, k=COUNTS),
    *bad(
        GANPhase,
        loss=["x", 3, None],
        noise=[0, -1, "a", None],
        critic_steps=COUNTS[:-2],
        gradient_penalty=[-1, NAN, "a"],
    ),
    *bad(
        GANPhase,
        r1=[-1, NAN, "a"],
        r2=[-1, NAN, "a"],
        every=COUNTS,
        path_length=[-1, NAN, "a"],
        generator=[3],
        critic=[3],
    ),
    *bad(DINOPhase, num_global=COUNTS[:3], student_temperature=[0, NAN, "a"], teacher_temperature=[0, NAN, "a"]),
    *bad(DINOPhase, center_momentum=[-1, 2, NAN, "a"]),
    *bad(ValidationPhase, every=COUNTS),
    *bad(CSV, path=PATHS),
    *bad(JSONL, path=PATHS),
    *bad(TensorBoard, folder=PATHS),
]

WORDS = "expected|given|there (is|are) no|has no|no metric|no gradient|cannot be written|matches"

TAKEN = {
    "runs the events of a fit alone, as fit(0) does": lambda: a_fit(phases=[]),
    "a text is one kind": lambda: histograms(of="weights"),
    "None weighs all neighbours alike": lambda: KNNProbe(temperature=None),
    "the name is the function's": lambda: Metric(mean, name=""),
    "a negative rate climbs where the optimizer allows it": lambda: constant(-1.0),
    "a fraction of a whole number is that number": lambda: linear(4.0, 1.0, 0.0),
}
"""What looks malformed and is taken, by the reason."""


@pytest.mark.parametrize("reason", TAKEN)
def test_what_looks_malformed_and_has_a_meaning_is_taken(reason: str) -> None:
    TAKEN[reason]()


@pytest.mark.slow(quick=45)
@pytest.mark.parametrize(("make", "arguments"), MALFORMED)
def test_a_malformed_argument_is_named_when_it_is_given(
    make: Callable[..., object],
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FluxloopError, ValueError, TypeError, AttributeError)) as caught:
        make(**arguments)
    ours = Path(fluxloop.__file__).parent
    frame = list(traceback.walk_tb(caught.value.__traceback__))[-1][0]
    said = str(caught.value)
    assert isinstance(caught.value, FluxloopError) or Path(frame.f_code.co_filename).is_relative_to(ours), said
    assert re.search(WORDS, said), said
    assert not list(tmp_path.iterdir()), "files were written"


def test_the_table_of_malformed_arguments_is_large() -> None:
    assert len(MALFORMED) >= 263


# Messages as a whole


def test_no_text_in_the_package_has_a_placeholder_outside_of_an_f_string() -> None:
    assert PLACEHOLDER.search("no model is called {name!r}")
    found = []
    for path in sorted(Path(fluxloop.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        inside |= {node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "bar_format"}
        found += [
            f"{path.name}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside
            if PLACEHOLDER.search(node.value)
        ]
    assert found == []
