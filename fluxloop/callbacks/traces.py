"""Record any function of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fluxloop.callback import Callback, NoConflict, on, require_call, resolve_conflict
from fluxloop.callbacks.recorder import Recorder
from fluxloop.events import EpochBegin, StepEnd
from fluxloop.guard.given import check_paths
from fluxloop.persist.series import Series
from fluxloop.phase import Phase, check_phase_type
from fluxloop.state import PhaseDict


class Traces(Callback):
    """Record ``f(learner)`` at the end of every step, by phase and name.

    ``cbstate.traces[TrainingPhase]["norm"]`` is the list of (step from 1, value); tensors are
    detached, and stay on their device.

    Args:
        functions: By name. Each is called with the learner view: what a handler gets as ``learner``.
        phase: The phase type to trace.
        reads: What the functions read; left out: everything, so that it runs last.
        name: Tells two of them apart; they may trace side by side, under different names.

    Raises:
        HandlerError: A function takes other arguments.
        ValueError: There is no function.
        PhaseError: `phase` is no phase type.
        CallbackError: `reads` is no tuple of paths.

    Reads: * (or as given)
    Writes: cbstate.traces
    Runs after: Recorder

    Example:
        >>> traces = Traces({"batch": lambda learner: len(learner.step.xs)}, phase=TrainingPhase)
    """

    writes = ("cbstate.traces",)
    run_after = (Recorder,)

    def __init__(
        self,
        functions: dict[str, Callable[[Any], Any]],
        *,
        phase: type[Phase] = Phase,
        reads: Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if (
            not isinstance(functions, Mapping)
            or not functions
            or not all(callable(function) for function in functions.values())
        ):
            raise ValueError(
                f"Traces({functions!r}) was given; expected functions by name: "
                "Traces({'loss': lambda learner: learner.step.loss})"
            )
        for each, function in functions.items():
            require_call(function, 1, "(learner)", f"the function {each!r} of Traces")
        self.functions = dict(functions)
        check_phase_type("Traces", phase)
        self.phase = phase
        check_paths("Traces", "reads", reads)
        self.reads = reads  # type: ignore[misc]  # computed per instance
        self._steps: PhaseDict[int] = PhaseDict(int)

    def init(self, learner: Any) -> None:
        """Publish the traces, once; steps are counted anew."""
        self._steps = PhaseDict(int)
        if "traces" not in learner.cbstate:
            learner.cbstate.traces = PhaseDict(dict)

    @on(EpochBegin)
    def count_on(self, event: EpochBegin, phase: Phase, learner: Any) -> None:
        """Go on counting from the steps that have ended, where this was added later and may see them."""
        if isinstance(phase, self.phase) and {"*", "cbstate", "cbstate.history"}.intersection(self.reads):
            counts = learner.cbstate.history if "history" in learner.cbstate else {}
            self._steps[phase] = counts[phase].steps if counts and phase in counts else self._steps[phase]

    @on(StepEnd)
    def record(self, event: StepEnd, phase: Phase, learner: Any) -> None:
        """Record this step."""
        if not isinstance(phase, self.phase):
            return
        self._steps[phase] += 1
        traces = learner.cbstate.traces[phase]
        for name, function in self.functions.items():
            value = function(learner)
            recorded = value.detach().clone() if isinstance(value, Tensor) else value
            traces.setdefault(name, Series()).append((self._steps[phase], recorded))

    def __repr__(self) -> str:
        return f"Traces({', '.join(self.functions)})"


@resolve_conflict.register(Traces, Traces)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _side_by_side(a: Traces, b: Traces) -> NoConflict:
    """Two traces write different names of one table.

    Raises:
        ValueError: They share a name.
    """
    shared = sorted(a.functions.keys() & b.functions.keys())
    if shared:
        raise ValueError(f"two Traces trace {shared}; expected different names")
    return NoConflict()
