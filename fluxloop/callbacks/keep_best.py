"""Keep the best weights of a fit, and put them back when it ends."""

from __future__ import annotations

from typing import Any

from attrs import define, field

from fluxloop.callback import Callback, NoConflict, UnsafeCallback, on, resolve_conflict
from fluxloop.callbacks.metrics import Metrics
from fluxloop.callbacks.probe import Announcing
from fluxloop.callbacks.recorder import Recorder
from fluxloop.checkpoint import put_weights, weights_of
from fluxloop.events import CycleEnd, EpochEnd, FitBegin
from fluxloop.monitor import Mode, Monitor
from fluxloop.persist import snapshot
from fluxloop.phase import FittingPhase, Phase


@define
class KeepBestModel(UnsafeCallback):
    """Keep a copy of the weights whenever a metric improves, and put the best back when the fit ends.

    Put back are parameters and buffers of all models, and nothing else: optimizers, counts and
    callbacks stay where training left them. It happens after every handler of `FitEnd`, and after
    the last checkpoint, so files hold what training made; also when the fit ends early or by an
    error. A metric that is NaN is no improvement; where none was recorded, nothing is put back.
    In a second fit the best so far still counts.

    Args:
        monitor: The metric's name, ``"validation/loss"``.
        mode: ``"min"`` where less of it is better, else ``"max"``.
        min_delta: An improvement is more than this, in the metric's unit.

    Raises:
        MetricError: No such metric has been recorded at the end of a cycle.
        ValueError: `min_delta` is less than 0.

    Attributes:
        best: The best value so far, None before the first.
        epoch: The epoch of it, from 1.

    Reads: cbstate.metrics
    Writes: model (when the fit has ended)
    Runs after: Recorder, Metrics, Announcing
    """

    monitor: str = "validation/loss"
    mode: Mode = "min"
    min_delta: float = field(default=0.0, kw_only=True)
    best: float | None = field(default=None, init=False, repr=False)
    epoch: int | None = field(default=None, init=False, repr=False)
    _weights: dict[str, dict[str, Any]] = field(factory=dict, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)

    reads = ("cbstate.metrics",)
    writes = ("model",)
    run_after = (Recorder, Metrics, Announcing)
    draws = False
    in_compiled_step = "after"

    def __attrs_post_init__(self) -> None:
        Monitor(self.monitor, self.mode)
        if not isinstance(self.min_delta, (int, float)) or not self.min_delta >= 0:
            raise ValueError(f"KeepBestModel(min_delta={self.min_delta!r}) was given; expected 0 or more")

    @on(FitBegin, FittingPhase)
    def start(self, event: FitBegin, phase: FittingPhase, learner: Any) -> None:
        """Have the best weights put back at the very end."""
        learner.defer(lambda: self._put_back(learner))

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: Any) -> None:
        """Keep the weights where the metric has a new value, and it is the best."""
        monitor = Monitor(self.monitor, self.mode)
        new = monitor.new(learner.cbstate.metrics, self._seen)
        if new is None:
            return
        self._seen, value = new
        if monitor.better(value, self.best, self.min_delta):
            self.best, self.epoch = value, self._seen
            self._weights = {name or "": snapshot(weights_of(module)) for name, module in learner.models.items()}

    @on(CycleEnd, FittingPhase)
    def check(self, event: CycleEnd, phase: FittingPhase, learner: Any) -> None:
        """Raise for a metric that nobody records."""
        Monitor(self.monitor, self.mode).require(learner.cbstate.metrics)

    def _put_back(self, learner: Any) -> None:
        for name, module in learner.models.items():
            if (name or "") in self._weights:
                put_weights(module, self._weights[name or ""])


@resolve_conflict.register(KeepBestModel, Callback)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _at_the_very_end(keeper: KeepBestModel, other: Callback) -> NoConflict:
    """It writes the weights when nobody's handler runs any more; `run_after` says the rest."""
    return NoConflict()
