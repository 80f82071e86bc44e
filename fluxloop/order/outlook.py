"""What a fit is going to record, as far as that can be known before its first step; monitors are checked by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attrs import frozen

from fluxloop.callback import Callback, UnsafeCallback
from fluxloop.errors import MetricError, MissingProducerError, did_you_mean, sentence, warn_user
from fluxloop.monitor import Expected, Monitor, find_series
from fluxloop.phase import Phase, ProbePhase, phase_types
from fluxloop.state import name_of

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def monitors_of(callbacks: Iterable[Callback]) -> list[tuple[Callback, Monitor]]:
    """Return what callbacks watch, with who watches it."""
    return [(each, monitor) for each in callbacks for monitor in each.monitors if isinstance(monitor, Monitor)]


def note_directions(callbacks: Iterable[Callback]) -> None:
    """Set in monitors which way is better, where a callback that records the metric says so."""
    callbacks = list(callbacks)
    watched = monitors_of(callbacks)
    if watched:
        said = [expected for each in callbacks for expected in each.records(None) or ()]
        for _, monitor in watched:
            name = monitor.metric.partition("/")[2]
            plain = name.partition("@")[0]  # of whatever view of the weights
            monitor.known = _mode([expected for expected in said if expected.fits(name) or expected.fits(plain)])


def _mode(said: list[Expected]) -> Any:
    """Return which way is better, as the metric with the most definite name says."""
    for expected in sorted(said, key=lambda each: each.name.count("*")):
        if expected.mode is not None:
            return expected.mode
    return None


def check_monitors(learner: RunLearner, phases: Iterable[Phase]) -> None:
    """Raise for a callback that watches what a fit will not record, or that cannot know which way is better.

    Raises:
        MetricError: Says who watches what, and what there will be.
        MissingProducerError: Nobody records metrics.
    """
    watched = monitors_of(learner.callbacks)
    if watched:
        note_directions(learner.callbacks)
        outlook = Outlook.of(learner, list(phases))
        for callback, monitor in watched:
            if not learner.callbacks.writers("cbstate.metrics"):
                raise MissingProducerError(
                    f"{callback!r} watches {monitor.metric!r}, and no callback records metrics; add Metrics() to the "
                    "callbacks"
                )
            outlook.settle(learner, callback, monitor)
            monitor.require_direction(type(callback).__name__)


def warn_unseen(learner: RunLearner) -> None:
    """Warn about what callbacks watch and what has never had a value, though a fit has ended."""
    metrics = vars(learner.cbstate).get("metrics", {})
    for callback, monitor in monitors_of(learner.callbacks):
        if not find_series(metrics, monitor.metric, monitor.among, missing_ok=True):
            warn_user(
                f"{type(callback).__name__} watches {monitor.metric!r}, which has had no value when the fit "
                f"ended, after {learner.history.cycles} epochs; it had nothing to act on"
            )


@frozen
class Outlook:
    """What a fit is going to record.

    Args:
        phases: What a cycle runs.
        series: Who records what, by phase.
        open: Whether somebody records what cannot be known before.
    """

    phases: list[Phase]
    series: list[tuple[Phase, Expected]]
    open: bool

    @classmethod
    def of(cls, learner: RunLearner, phases: list[Phase]) -> Outlook:
        """Return what a fit of these phases is going to record."""
        series: list[tuple[Phase, Expected]] = []
        is_open = False
        for callback in learner.callbacks:
            # No cycle runs a ProbePhase: callbacks record their own measurements under it
            for phase in (*phases, ProbePhase()):
                recorded = callback.records(phase)
                is_open |= recorded is None
                series += [(phase, expected) for expected in recorded or ()]
        return cls(phases, series, is_open)

    def settle(self, learner: RunLearner, callback: Callback, monitor: Monitor) -> None:
        """Set in a monitor which phases may record its metric, and whether one certainly will.

        Raises:
            MetricError: None will, or several that the name does not tell apart.
        """
        key, _, name = monitor.metric.partition("/")
        fitting = [(phase, expected) for phase, expected in self.series if expected.fits(name)]
        # A phase's own name first: it means that phase alone, also where several run on the data of this key
        found = [each for each in fitting if name_of(each[0]) == key]
        found = found or [each for each in fitting if each[0].data_key == key]
        certain = list(dict.fromkeys(name_of(phase) for phase, expected in found if expected.certain))
        if len(certain) > 1:
            raise MetricError(
                f"{type(callback).__name__} watches {monitor.metric!r}, which {len(certain)} phases record; expected "
                f"the name of one of them: {' or '.join(repr(f'{phase}/{name}') for phase in certain)}"
            )
        monitor.among = tuple(dict.fromkeys(name_of(phase) for phase, _ in found))
        monitor.waits = any(expected.certain or expected.rare for _, expected in found)
        if not found and not self._may_come(learner, monitor.metric):
            known = self._names()
            where = ""
            if key in _keys() and not any(phase.data_key == key for phase in self.phases):
                where = f"The fit runs no phase on {key} data"
                where += "" if key in learner.data else ": give the learner some, data=(train, valid), or watch another"
            said = (
                f"{monitor.purpose}no phase of this fit records {monitor.metric!r}, which {type(callback).__name__} "
                f"watches; it records {known}{did_you_mean(monitor.metric, known)}"
            )
            raise MetricError(f"{sentence(said)} {where}" if where else said)

    def _names(self) -> list[str]:
        """Return the names of what will be recorded."""
        every = {
            (name_of(phase), phase.data_key, expected.name)
            for phase, expected in self.series
            if not expected.name.endswith("*")
        }
        plain = Counter(f"{key}/{name}" for _, key, name in every)
        short = (f"{key}/{name}" for _, key, name in every)
        return sorted(
            s if plain[s] == 1 else f"{phase}/{name}" for (phase, _, name), s in zip(every, short, strict=True)
        )

    def _may_come(self, learner: RunLearner, metric: str) -> bool:
        """Return whether a metric that no phase of the fit records may be there nevertheless."""
        if self.open or find_series(vars(learner.cbstate).get("metrics", {}), metric, missing_ok=True):
            return True
        key, _, name = metric.partition("/")
        runs_on = {name_of(cls) for cls in phase_types()} | set(vars(learner.data))
        if key not in runs_on:
            return False
        others = [expected for callback in learner.callbacks for expected in callback.records(None) or ()]
        return _runs_more(learner, self.phases) and any(expected.fits(name.partition("@")[0]) for expected in others)


def _keys() -> set[str]:
    """Return the data keys of the phase types that there are."""
    return {cls.data_key for cls in phase_types() if cls.data_key}


def _runs_more(learner: RunLearner, phases: list[Phase]) -> bool:
    """Return whether somebody's own code may run further epochs inside the fit."""
    own = [each for each in learner.callbacks if not type(each).__module__.startswith("fluxloop.")]
    own_phases = [phase for phase in phases if not type(phase).__module__.startswith("fluxloop.")]
    hooks = [each for each in learner.callbacks if hasattr(each, "f")]  # a function that may know the learner
    return bool(own_phases or hooks or any(isinstance(each, UnsafeCallback) for each in own))
