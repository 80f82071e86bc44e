"""Metrics, and the trackers that follow them through an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from fluxloop.errors import MetricError, describe
from fluxloop.guard.assign import fields_of_the_class
from fluxloop.metrics.averages import Mean, MovingAverage, counted
from fluxloop.metrics.classification import HITS
from fluxloop.metrics.inputs import named_entries, reader, without_graph
from fluxloop.metrics.joining import keep_apart, merged, tell_apart
from fluxloop.nested import map_tensors
from fluxloop.persist.attributes import plain_attributes
from fluxloop.phase import Phase
from fluxloop.state import LossName, StepState


@fields_of_the_class
@frozen
class Averaged:
    """A metric of an epoch that is a function of an average over its rows, such as a root of a mean.

    Calling it on one batch gives ``finish(mean(preds, ys))``; over an epoch `mean` is averaged
    first (weighted by batch size) and `finish` applied to the result.

    Args:
        mean: Function ``(preds, ys) -> scalar``, a mean over rows.
        finish: Applied to the average.
        name: Its name.

    Example:
        >>> rmse = Averaged(mse, torch.sqrt, "rmse")
        >>> rmse(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0])).item()
        2.0
    """

    mean: Callable[..., Tensor]
    finish: Callable[[Tensor], Tensor]
    name: str

    def __call__(self, *inputs: Any) -> Tensor:
        """Compute the metric on one batch."""
        return self.finish(self.mean(*inputs))


def _names(inputs: Any) -> tuple[str, ...]:
    """Raise `MetricError` for anything but several names."""
    names = tuple(inputs) if isinstance(inputs, Iterable) and not isinstance(inputs, str) else ()
    if not names or not all(isinstance(name, str) for name in names):
        meant = (inputs,) if isinstance(inputs, str) else ("preds", "ys")
        raise MetricError(f"Metric(inputs={inputs!r}) was given; expected names: inputs={meant!r}")
    return names


@fields_of_the_class
@define
class Metric:
    """A metric, with its name, its inputs and the phases it is computed in.

    Args:
        fn: A function ``(*inputs) -> scalar`` whose values are averaged over the epoch, each step
            with its weight (`Phase.weight`: its rows, unless the phase says otherwise); or any object
            with ``update(*inputs)``, ``compute()`` and ``reset()`` (every torchmetrics metric); each
            phase gets a copy of that.
        name: The name under which it is recorded, in lower case; left out, the function's or class's name.
        phase: The phase type in which it is computed; left out, every phase.
        inputs: The step entries it is given, in order.
        optional: Whether steps that do not store its inputs are left out: for an entry that a step
            has now and then, such as a penalty computed in every sixteenth. An epoch without any
            has no value.
        higher_is_better: Which way is better, for monitors without a `mode`; left out, what `fn` says by an
            attribute of that name, as torchmetrics' metrics do.

    Raises:
        MetricError: `fn` is neither a function nor such an object, or another argument is of another kind.

    Example:
        >>> distance = Metric(lambda z1, z2: (z1 - z2).norm(dim=1).mean(), name="distance", inputs=("z1", "z2"))
        >>> distance.name
        'distance'
    """

    fn: Any
    name: str = ""
    phase: type[Phase] = Phase
    inputs: tuple[str, ...] = field(default=("preds", "ys"), converter=_names)
    optional: bool = field(default=False, kw_only=True)
    higher_is_better: bool | None = field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.fn, type) or not (callable(self.fn) or accumulates(self.fn)):
            raise MetricError(
                f"{describe(self.fn)} was given as a metric; expected a function (preds, ys) -> scalar, or an "
                "object with update, compute and reset"
                + (f": {self.fn.__name__}(...)" if isinstance(self.fn, type) else "")
            )
        if not (isinstance(self.phase, type) and issubclass(self.phase, Phase)):
            raise MetricError(
                f"Metric(phase={describe(self.phase)}) was given; expected a phase type, e.g. phase=ValidationPhase"
            )
        if not isinstance(self.name, str):
            raise MetricError(f"Metric(name={self.name!r}) was given; expected a name, a text")
        if not self.name:
            inner = getattr(self.fn, "func", self.fn)  # a functools.partial
            own = getattr(self.fn, "name", None)
            name = own if isinstance(own, str) else str(getattr(inner, "__name__", type(self.fn).__name__))
            if name == "<lambda>":
                raise MetricError("a lambda was given as a metric without a name; write Metric(f, name='...')")
            self.name = name
        self.name = self.name.lower()

    @property
    def is_known(self) -> bool:
        """Whether it is fluxloop's or torchmetrics' own, and draws no random numbers."""
        fn = getattr(self.fn, "func", self.fn)
        module = getattr(fn, "__module__", None) or type(fn).__module__
        return isinstance(module, str) and module.split(".")[0] in ("fluxloop", "torchmetrics")

    def is_left_out(self, step: Any) -> bool:
        """Return whether a step is left out: the metric is optional, and the step lacks one of its inputs."""
        return self.optional and not all(name in step for name in self.inputs)

    def start(self) -> Tracker:
        """Begin an epoch: return the tracker that follows this metric through it."""
        return ObjectTracker(self) if accumulates(self.fn) else MeanTracker(self)


def accumulates(metric: object) -> bool:
    """Return whether an object accumulates by itself, as torchmetrics' metrics do."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


class Tracker:
    """Follows one metric through one epoch of one phase."""

    @property
    def started(self) -> bool:
        """Whether a step was added."""
        return True

    def update(self, step: Any, weight: float | Tensor) -> None:
        """Add a step.

        Args:
            step: The step's entries.
            weight: The step's weight in a mean; see `Phase.weight`.
        """
        raise NotImplementedError

    def compute(self) -> dict[str, Any]:
        """Return the values of the epoch so far by name; nothing where there is none."""
        raise NotImplementedError

    def latest(self) -> dict[str, Tensor]:
        """Return the last step's values by name; nothing where a metric has none."""
        return {}

    def keep_apart(self) -> None:
        """Have a metric that knows of other processes compute what it has seen in this one: `joined` does the rest."""

    def told(self) -> Any:
        """Return what other processes need to know of it, as plain data on the host; None before the first step."""
        raise NotImplementedError

    def joined(self, told: list[Any]) -> dict[str, Any]:
        """Return the values of the epoch over all processes.

        Args:
            told: What `told` returned in each process that saw a step, in the order of their numbers.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of an epoch keeps."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        raise NotImplementedError


MOST_HITS = 4096
"""How many truth values of a step are kept to be counted with those of other steps: half a megabyte in all."""


class MeanTracker(Tracker):
    """Averages a function of the step's entries, weighted by batch size."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        averaged = metric.fn if isinstance(metric.fn, Averaged) else None
        self._fn = averaged.mean if averaged else metric.fn
        self._finish = averaged.finish if averaged else None
        self._is_known = metric.is_known
        self._hits = HITS.get(metric.fn) if isinstance(metric.fn, FunctionType) else None
        self._read = reader(metric.inputs)
        self._mean = Mean()
        self._last: Tensor | None = None
        self._over = 1

    def update(self, step: Any, weight: float | Tensor) -> None:
        """Compute the function on this step's entries."""
        if self.metric.optional and self.metric.is_left_out(step):
            return
        try:
            inputs = self._read(step)
        except AttributeError:  # said with the metric's name
            inputs = named_entries(step, self.metric.inputs, self.metric.name)
        if self._hits is not None:  # what is true is counted, and divided, for many steps at once; it has no graph
            hits = self._hits(*inputs)
            self._over = over = hits.numel()
            self._last = last = hits if over <= MOST_HITS else hits.count_nonzero()
            self._mean.add(last, weight, over)
            return
        inputs = without_graph(inputs)
        if self._is_known:  # computes with nothing that has a gradient but its inputs
            value = self._fn(*inputs)
        else:
            with torch.no_grad():
                value = self._fn(*inputs)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        if value.ndim and value.numel() != 1:
            raise MetricError(
                f"the metric {self.metric.name!r} gave {describe(value)}; expected a scalar: take its mean, "
                "or use an object with update, compute and reset"
            )
        value = value.detach() if value.requires_grad else value
        self._last = value if value.ndim == 0 else value.reshape(())
        self._mean.add(self._last, weight)

    @property
    def started(self) -> bool:
        """Whether the function was computed."""
        return self._last is not None

    def compute(self) -> dict[str, Any]:
        """Return the average so far."""
        mean = self._mean.compute()
        if mean is None:
            return {}
        return {self.metric.name: self._finish(mean) if self._finish else mean}

    def told(self) -> Any:
        """Return the sum so far, and its weight."""
        return self._mean.told()

    def joined(self, told: list[Any]) -> dict[str, Any]:
        """Return the average over all processes."""
        mean = Mean.joined(told)
        if mean is None:
            return {}
        return {self.metric.name: self._finish(mean) if self._finish else mean}

    def latest(self) -> dict[str, Tensor]:
        """Return the last step's value."""
        if self._last is None:
            return {}
        last = self._last if self._hits is None else counted(self._last) / self._over
        return {self.metric.name: self._finish(last) if self._finish else last}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"mean": self._mean.state_dict(), "last": self._last, "over": self._over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._mean.load_state_dict(state["mean"])
        self._last, self._over = state["last"], state.get("over", 1)


class ObjectTracker(Tracker):
    """Feeds a copy of an object that accumulates by itself."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._object = copy.deepcopy(metric.fn)
        self._object.reset()
        self._updated = False

    def update(self, step: Any, weight: float | Tensor) -> None:
        """Update the object with this step's entries."""
        if self.metric.is_left_out(step):
            return
        inputs = without_graph(named_entries(step, self.metric.inputs, self.metric.name))
        if not self._updated and hasattr(self._object, "to") and isinstance(inputs[0], Tensor):
            self._object = self._object.to(inputs[0].device)  # torchmetrics' metrics begin on the CPU
        with torch.no_grad():
            self._object.update(*inputs)
        self._updated = True

    @property
    def started(self) -> bool:
        """Whether the object was updated."""
        return self._updated

    def compute(self) -> dict[str, Any]:
        """Compute the object's value; a mapping (a collection) gives one per key."""
        if not self._updated:
            return {}
        value = self._object.compute()
        if isinstance(value, Mapping):
            return {str(key).lower(): item for key, item in value.items()}
        return {self.metric.name: value}

    def keep_apart(self) -> None:
        """Have torchmetrics' metrics compute what they have seen here, rather than ask other processes themselves."""
        keep_apart(self._object)

    def told(self) -> Any:
        """Return the object's attributes that are plain data, on the host."""
        return map_tensors(lambda tensor: tensor.detach().cpu(), self.state_dict()) if self._updated else None

    def joined(self, told: list[Any]) -> dict[str, Any]:
        """Return the value of an object that has seen what the objects of all processes have."""
        first, *others = [self._of(state) for state in told]
        if others and not merged(first._object, [other._object for other in others]):
            tell_apart(self.metric.name, first._object)
        return first.compute()

    def _of(self, state: dict[str, Any]) -> ObjectTracker:
        """Return another tracker in the state that one has told, with its object on the host."""
        other = ObjectTracker(self.metric)
        other.keep_apart()
        other.load_state_dict(state)
        if hasattr(other._object, "to"):
            other._object = other._object.to("cpu")
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: whether it was updated, and the object's attributes that are plain data."""
        return {"updated": self._updated, "parts": [plain_attributes(part) for part in self._parts()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._updated = state["updated"]
        for part, kept in zip(self._parts(), state["parts"], strict=True):
            for name, value in kept.items():
                object.__setattr__(part, name, value)

    def _parts(self) -> list[Any]:
        return list(self._object.modules()) if isinstance(self._object, nn.Module) else [self._object]


class Loss:
    """The loss of each step, averaged over the epoch, each step with its weight (`Phase.weight`).

    A step with ``loss`` gives ``"loss"``; one with ``losses`` by optimizer gives ``"loss_<name>"``
    for each, in lower case; one with neither gives nothing. A block that names its loss,
    ``learner.optimizing("D", loss="r1")``, gives ``"r1"``, the mean over the steps that have it.

    Args:
        phase: The phase type it is computed in.

    Example:
        >>> metrics = Metrics(accuracy)  # the loss comes first, and by itself
        >>> [type(metric).__name__ for metric in metrics.metrics]
        ['Loss', 'Metric']
    """

    name = "loss"

    def __init__(self, phase: type[Phase] = Phase) -> None:
        self.phase = phase

    def start(self) -> Tracker:
        """Begin an epoch."""
        return LossTracker(Mean)


class SmoothLoss:
    """An exponential moving average of the loss over steps, with the bias of its start corrected.

    After t steps it is ``sum(decay**(t-i) * loss_i) / sum(decay**(t-i))`` (Kingma and Ba 2015,
    section 3, for the correction). Recorded as ``"smoothloss"``.

    Args:
        decay: Weight of the past: 0.98 averages over about 50 steps.
        phase: The phase type it is computed in.

    Raises:
        MetricError: The decay does not lie in [0, 1).

    Example:
        >>> from fluxloop.testing import toy_learner
        >>> history = toy_learner(Recorder(), Metrics(SmoothLoss(0.9)), num_batches=4).fit(2)
        >>> len(history["training/smoothloss"])
        2
    """

    name = "smoothloss"

    def __init__(self, decay: float = 0.98, phase: type[Phase] = Phase) -> None:
        if not 0 <= decay < 1:
            raise MetricError(f"decay={decay} was given; expected a weight of the past in [0, 1), e.g. 0.98")
        self.decay = decay
        self.phase = phase

    def start(self) -> Tracker:
        """Begin an epoch."""
        return LossTracker(partial(MovingAverage, self.decay), "smoothloss")


class LossTracker(Tracker):
    """Follows the loss, or the losses by optimizer, of each step."""

    def __init__(self, average: Callable[..., Mean | MovingAverage], name: str = "loss") -> None:
        self._average = average
        self._name = name
        self._averages: dict[str, Mean | MovingAverage] = {}
        self._names: dict[Any, str] = {}

    def update(self, step: Any, weight: float | Tensor) -> None:
        """Add the loss of a step."""
        if type(step) is StepState:  # as always but where somebody looks on: without a call for each question
            entries = step.__dict__
            if "losses" not in entries:
                if "loss" in entries:
                    self._add(self._name, entries["loss"], weight)
                return
        if "loss" in step:
            self._add(self._name, step.loss, weight)
        losses = step.losses if "losses" in step else None
        if isinstance(losses, Mapping):
            for key, loss in losses.items():
                name = self._names.get(key) if type(key) is str else self._named(key)
                if name is None:
                    name = self._names[key] = self._named(key)
                if isinstance(key, LossName) and self._is_taken(name, key, step):
                    raise MetricError(f"two losses of a step are recorded as {name!r}; name the block's otherwise")
                self._add(name, loss, weight)

    def _named(self, key: Any) -> str:
        """Return what the loss under a key is recorded as."""
        return (key if self._name == "loss" and isinstance(key, LossName) else f"{self._name}_{key}").lower()

    def _is_taken(self, name: str, key: LossName, step: Any) -> bool:
        """Return whether another loss of the step is recorded under the name that a block gave to its own."""
        others = [f"{self._name}_{other}".lower() for other in step.losses if other != key]
        return name in others or (name == self._name and "loss" in step)

    def _add(self, name: str, loss: Any, weight: float | Tensor) -> None:
        average = self._averages.get(name)
        if average is None:
            average = self._averages[name] = self._average()
        value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss)
        average.add(value.mean() if value.ndim else value, weight)

    def compute(self) -> dict[str, Any]:
        """Return the average losses so far."""
        means = {name: average.compute() for name, average in self._averages.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def latest(self) -> dict[str, Tensor]:
        """Return the last step's loss, or the moving average after it."""
        return {name: average.latest() for name, average in self._averages.items()}

    def keep_apart(self) -> None:
        """Keep the steps of a moving average, which is joined step by step."""
        if isinstance(self._average(), MovingAverage):
            self._average = partial(self._average, keeps_steps=True)

    def told(self) -> Any:
        """Return what each average tells of itself."""
        return {name: average.told() for name, average in self._averages.items()} or None

    def joined(self, told: list[Any]) -> dict[str, Any]:
        """Return the average losses over all processes, which need not have had the same ones."""
        names = dict.fromkeys(name for each in told for name in each)
        joining = self._average()
        means = {name: joining.joined([each[name] for each in told if each.get(name)]) for name in names}
        return {name: mean for name, mean in means.items() if mean is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self._averages = {name: self._average() for name in state}
        for name, kept in state.items():
            self._averages[name].load_state_dict(kept)
