"""Keep the best weights of a fit, and put them back when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import define, field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fluxloop.callback import Callback, NoConflict, UnsafeCallback, on, resolve_conflict
from fluxloop.callbacks.metrics import Metrics, RecordsMetrics
from fluxloop.callbacks.recorder import Recorder
from fluxloop.checkpoint.misfits import weights_differ
from fluxloop.checkpoint.weights_file import weights_of, with_metadata
from fluxloop.compute.modes import switch_optimizers
from fluxloop.errors import CallbackConflictError, ModelError, warn_user
from fluxloop.events import CycleEnd, EpochEnd, FitBegin
from fluxloop.guard.given import is_number
from fluxloop.monitor import Mode, Monitor
from fluxloop.persist.plain import from_plain, snapshot, to_plain
from fluxloop.phase import FittingPhase, Phase

Weights = dict[str, dict[str, Any]]
"""By path, what a module saves by itself, and buffers that it leaves out."""


@define
class KeepBestModel(UnsafeCallback):
    """Keep a copy of the weights whenever a metric improves, and put the best back when the fit ends.

    Put back are parameters and buffers of all models, of a loss function that is a module and, where
    the metric was measured on averaged weights (``"validation/loss@ema"``), of those averages too.
    Optimizers, counts and callbacks stay where training left them, except optimizers with ``train()`` and
    ``eval()``, which hold weights themselves: their state is put back, too. It
    happens after every handler of `FitEnd`, and after the last checkpoint, so files hold what training
    made; also when the fit ends early or by an error. A metric that is NaN is no improvement; where
    none was recorded, nothing is put back.

    Each fit begins anew, whatever another fit, or another learner with the same callback, has reached;
    a resumed one goes on with the best so far. There is one copy, on the device of the weights: as
    much memory as they take.

    Args:
        monitor: The metric's name, ``"validation/loss"``.
        mode: ``"min"`` where less of it is better, else ``"max"``. Left out, what the metric says of itself.
        min_delta: An improvement is more than this, in the metric's unit.

    Raises:
        CallbackConflictError: Another one is among the callbacks: both would put weights back.
        MetricError: When a fit begins: it will not record the metric, or nobody knows which way that is better.
        ModelError: The best weights of a resumed run do not fit the models.
        ValueError: `min_delta` is less than 0.

    Attributes:
        best: The best value so far, None before the first.
        epoch: The epoch of it, from 1.

    Reads: cbstate.metrics
    Writes: model (when the fit has ended; a loss function that is a module, and averages that were measured, too)
    Runs after: Recorder, Metrics, RecordsMetrics

    Example:
        >>> learner = testing.toy_learner(Recorder(), Metrics(), KeepBestModel("validation/loss"))
        >>> history = learner.fit(3)
        >>> best = learner.get_callback(KeepBestModel)
        >>> best.best == min(history["validation/loss"]), 1 <= best.epoch <= 3
        (True, True)
    """

    monitor: str = "validation/loss"
    mode: Mode | None = None
    min_delta: float = field(default=0.0, kw_only=True)
    best: float | None = field(default=None, init=False, repr=False)
    epoch: int | None = field(default=None, init=False, repr=False)
    _weights: Weights = field(factory=dict, init=False, repr=False)
    """The best weights so far, by path."""
    _optimizers: list[Any] = field(factory=list, init=False, repr=False)
    """The states of optimizers that hold weights themselves, at that time."""
    _seen: int = field(default=0, init=False, repr=False)
    """The epoch of the newest value of the metric that was looked at."""
    _watched: Monitor = field(init=False, repr=False)

    reads = ("cbstate.metrics",)
    writes = ("model",)
    run_after = (Recorder, Metrics, RecordsMetrics)
    draws = False
    _fixed = ("monitor", "mode")
    in_compiled_step = "after"

    def __attrs_post_init__(self) -> None:
        self._watched = Monitor(self.monitor, self.mode).after(getattr(self, "_watched", None))
        if not is_number(self.min_delta) or not self.min_delta >= 0:
            raise ValueError(f"KeepBestModel(min_delta={self.min_delta!r}) was given; expected 0 or more")

    @property
    def monitors(self) -> list[Monitor]:
        """The metric."""
        return [self._watched]

    def init(self, learner: Any) -> None:
        """Forget what another learner has reached."""
        self.best, self.epoch, self._weights, self._optimizers, self._seen = None, None, {}, [], 0

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Begin anew, unless a fit goes on; have the best weights put back at the very end.

        Raises:
            ModelError: Those of a resumed run do not fit the models.
        """
        if not event.resumed:
            self.init(learner)
            self._seen = self._watched.newest_epoch(learner.cbstate.metrics)  # a former fit's
        wrong = list(self._misfits(learner))
        if wrong:
            raise ModelError("the best weights so far do not fit the models:\n  " + "\n  ".join(wrong))
        learner.defer(lambda: self._put_back(learner))

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Keep the weights where the metric has a new value, and it is the best."""
        monitor = self._watched
        new = monitor.new(learner.cbstate.metrics, self._seen)
        if new is None:
            return
        self._seen, value = new
        if monitor.better(value, self.best, self.min_delta):
            self.best, self.epoch = value, self._seen
            modes = learner.updates.modes
            undo = switch_optimizers(modes, False)  # schedule-free optimizers hold the weights that were evaluated
            former = self._weights
            self._weights = {path: _copied(module, former.get(path, {})) for path, module in self._modules(learner)}
            self._optimizers = [snapshot(to_plain(mode.optimizer.state_dict(), "an optimizer")) for mode in modes]
            undo()

    @on(CycleEnd, FittingPhase)
    def check(self, event: CycleEnd, phase: FittingPhase, learner: Any) -> None:
        """Raise for a metric that nobody records."""
        self._watched.require(learner.cbstate.metrics)

    def _modules(self, learner: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that training changes, and the averages that were measured, each with its path."""
        for name, module in learner.models.items():
            yield ("model" if name is None else f"model.{name}"), module
        if isinstance(learner.loss_fn, nn.Module):
            yield "loss_fn", learner.loss_fn
        view = self.monitor.rpartition("@")[2].lower() if "@" in self.monitor else ""
        for name in learner.weights:
            if view and name.rpartition("@")[2].lower() == view:
                yield f"model.{name}", learner.weights[name]

    def _misfits(self, learner: Any) -> Iterator[str]:
        for path, module in self._modules(learner):
            if path in self._weights:
                yield from weights_differ(module, self._weights[path]["state"], path)

    def _put_back(self, learner: Any) -> None:
        wrong = list(self._misfits(learner))
        if wrong:
            warn_user(
                f"the best weights, of epoch {self.epoch}, are not put back: the models have changed since\n  "
                + "\n  ".join(wrong)
            )
            return
        for path, module in self._modules(learner):
            if path in self._weights:
                _load(module, self._weights[path])
        for mode, state in zip(learner.updates.modes, self._optimizers, strict=False):
            mode.optimizer.load_state_dict(from_plain(state))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the best value, its epoch, and the weights."""
        return {
            "best": self.best,
            "epoch": self.epoch,
            "seen": self._seen,
            "weights": self._weights,
            "optimizers": self._optimizers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self.best, self.epoch, self._seen = state["best"], state["epoch"], state["seen"]
        self._weights = {
            path: {part: {name: _copy(value) for name, value in items.items()} for part, items in kept.items()}
            for path, kept in state["weights"].items()
        }
        self._optimizers = snapshot(state.get("optimizers", []))


def _copied(module: nn.Module, former: dict[str, Any]) -> dict[str, Any]:
    """Copy what a module saves by itself, and the buffers that it leaves out; into a former copy where that fits."""
    saved = weights_of(module)
    saved["buffers"] = {name: tensor for name, tensor in module.named_buffers() if name not in saved["state"]}
    return {
        part: {name: _copy(value, former.get(part, {}).get(name)) for name, value in items.items()}
        for part, items in saved.items()
    }


def _copy(value: Any, into: Any = None) -> Any:
    """Copy a tensor on its device, into another one of its kind where there is one; or other plain data."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return snapshot(value)
    value = value.detach()
    if isinstance(into, Tensor) and not is_lazy(into) and _kind(into) == _kind(value):
        return into.copy_(value)
    return value.clone()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _load(module: nn.Module, saved: dict[str, Any]) -> None:
    """Load what `_copied` has returned into a module."""
    own = {name: value if isinstance(value, Tensor) else from_plain(value) for name, value in saved["state"].items()}
    module.load_state_dict(with_metadata(own, from_plain(saved["metadata"])))
    buffers = dict(module.named_buffers())
    for name in saved["buffers"].keys() & buffers:
        buffers[name].detach().copy_(saved["buffers"][name])


@resolve_conflict.register(KeepBestModel, Callback)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _at_the_very_end(keeper: KeepBestModel, other: Callback) -> NoConflict:
    """It writes the weights when no handler runs any more; `run_after` says the rest."""
    return NoConflict()


@resolve_conflict.register(KeepBestModel, KeepBestModel)  # type: ignore[untyped-decorator]  # as above
def _one_of_them(a: KeepBestModel, b: KeepBestModel) -> None:
    """Two of them cannot both put their weights back.

    Raises:
        CallbackConflictError: Says what to use for the second.
    """
    mode = "" if b.mode is None else f", mode={b.mode!r}"
    raise CallbackConflictError(
        f"{a!r} and {b!r} would both put their best weights back when the fit ends, and one would be lost; keep one, "
        f"and have the other's best in files: Checkpointer(folder, keep_best=1, monitor={b.monitor!r}{mode})"
    )
