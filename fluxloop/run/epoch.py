"""One epoch of a phase: the data on which it runs, and warnings at its end of what went wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fluxloop.checkpoint.restoring import meet_phases
from fluxloop.compute.memory import drop_frames, is_out_of_memory
from fluxloop.data.feed import Feed
from fluxloop.data.loaders import load
from fluxloop.data.loading import is_workers_death, worker_died
from fluxloop.data.passes import untouched
from fluxloop.data.share import unspoken
from fluxloop.errors import CancelEpochException, DataError, did_you_mean, warn_user
from fluxloop.events import UpdateBegin, UpdateEnd
from fluxloop.guard.assign import put
from fluxloop.phase import Phase
from fluxloop.randomness import preserved
from fluxloop.run.phases import check_names, check_runs
from fluxloop.state import State

if TYPE_CHECKING:
    from fluxloop.callback import Callback
    from fluxloop.interfaces import RunLearner
    from fluxloop.run.scope import FitScope

UPDATE_EVENTS = (UpdateBegin, UpdateEnd)


def run_epoch(learner: RunLearner, phase: Phase, data: Any = None, scope: FitScope | None = None) -> None:
    """Run one epoch of a phase; see `Learner.epoch`.

    Args:
        learner: The learner.
        phase: The phase.
        data: Instead of the learner's data for that phase.
        scope: The fit whose cycle runs it; left out, it runs by itself.
    """
    _meet(learner, phase)
    running = learner._running
    saved, outer = learner.data, (learner.num_batches, running.phase, running.feed)
    running.phase, running.feed = phase, None
    if data is not None:
        key = phase.data_key or ("training" if phase.gradients else "")  # shuffled where it trains
        put(learner, "data", State({**vars(learner.data), phase.data_key: load(data, key)}))
    try:
        # an epoch inside another one does not end for a stop that was asked for: the outer one does, after it
        batches = feed(learner, phase, scope.pass_safe_point if scope is not None else lambda: None)
        if data is not None:
            batches.name = "given"
        batches.check()
        if phase.gradients:
            learner.meet_parameters()
        learner.phases[type(phase)] = phase
        if scope is not None:
            scope.begin_epoch(batches)
            learner._ledger.begun_data.add(phase.data_key)
        learner.num_batches, running.feed = batches.num_batches, batches
        # In an epoch that goes on a state is restored after it has begun: counts from before say nothing of its steps
        goes_on = scope is not None and scope.is_resuming
        stood = learner.updates.standing() if phase.gradients and not goes_on else None
        steps = None if goes_on else learner.streams[phase.step_stream].index
        with _watched(learner), preserved(), _left_alone(learner, phase, batches.source):
            phase.epoch(learner, batches)
        if stood is not None:
            _warn_of_updates_by_hand(learner, phase, stood)
        if batches.count and steps == learner.streams[phase.step_stream].index and not learner.streams.prefix:
            _warn_of_no_step(learner, phase, batches.count, stood)
    except CancelEpochException:
        pass  # raised by a handler of EpochBegin, after EpochEnd was fired
    except RuntimeError as error:
        if is_out_of_memory(error):
            drop_frames(error)  # those of the phase too, which was still running when its step ended
        if not is_workers_death(error):
            raise
        raise worker_died(error) from error
    finally:
        put(learner, "data", saved)
        learner.num_batches, running.phase, running.feed = outer


@contextmanager
def _watched(learner: RunLearner) -> Iterator[None]:
    """Have processes watch each other in an epoch that no fit runs, and know nothing of a step around it."""
    alone = nullcontext() if learner._running.fitting else watching(learner)
    with alone, unspoken(learner.accelerator.group):
        yield


def watching(learner: RunLearner) -> AbstractContextManager[None]:
    """Return a context in which the processes that train together watch each other, where there are several."""
    group = learner.accelerator.group
    return nullcontext() if group is None else group.watching()


def _meet(learner: RunLearner, phase: Phase) -> None:
    """Check that a phase can run, and take note of one that no fit has taken note of."""
    check_runs(learner, phase)
    check_names(learner, [phase])
    if not learner._running.fitting:
        meet_phases(learner, [phase])


def _warn_of_no_step(learner: RunLearner, phase: Phase, batches: int, stood: tuple[int, int] | None) -> None:
    """Warn where the steps of a phase fired no event and trained nothing."""
    if type(phase).epoch is Phase.epoch and (stood is None or learner.updates.standing() == stood):
        warn_user(
            f"{phase!r} was given {batches} batches and did no step with them: no event was fired, and nothing was "
            "counted or recorded. Expected runstep in its step:\n"
            "    with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):\n"
            "        ..."
        )


def _warn_of_updates_by_hand(learner: RunLearner, phase: Phase, stood: tuple[int, int]) -> None:
    """Warn once where a phase steps its optimizers by hand, so that callbacks wait for `UpdateEnd` in vain.

    Args:
        learner: The learner.
        phase: The phase, after an epoch.
        stood: Where the updates stood before it.
    """
    count, changes = learner.updates.standing()
    if count != stood[0] or changes == stood[1] or phase.name in learner.updates.told_by_hand:
        return
    heard = {id for event in UPDATE_EVENTS for *_, id in learner.callbacks.table(type(phase))[event]}
    deaf = [node.id for node in learner.callbacks.graph.nodes if node.id in heard and _needs_updates(node.callback)]
    if deaf:
        learner.updates.told_by_hand.add(phase.name)
        warn_user(
            f"{phase!r} changed weights and made no update through the learner, so {', '.join(deaf)} heard of none: "
            "what acts at UpdateBegin and UpdateEnd hears of learner.update() alone. Call it instead of "
            "optimizer.step(), and learner.update(closure=closure) instead of optimizer.step(closure)"
        )


def _needs_updates(callback: Callback) -> bool:
    """Return whether a callback acts at updates in particular.

    The default ones only count them, or look at gradients; `EMA` sees those made by hand from the weights.
    """
    inner = callback.unwrapped
    others = {"Recorder", "StopOnNaNLoss", "EMA"} & {cls.__name__ for cls in type(inner).__mro__}
    named = any(event in UPDATE_EVENTS for event, _ in callback.handles())
    return named and not others and getattr(inner, "unit", "step") != "epoch"


def _left_alone(learner: RunLearner, phase: Phase, source: Any) -> AbstractContextManager[None]:
    """Return a context in which a phase that only watches moves no loader's generators and no workers of others."""
    if phase.gradients and not learner.streams.prefix:
        return nullcontext()
    others = [other for key, other in vars(learner.data).items() if key != phase.data_key]
    shared = bool(learner.streams.prefix) or any(other is source for other in others)
    return untouched(source, workers_too=shared or phase.data_key == "training")


OTHER_NAMES = {"training": ("train",), "validation": ("valid", "val", "dev", "eval")}
"""What data sets elsewhere call the data of a phase."""


def _where_it_is(key: str, known: list[str]) -> str:
    """Return a hint at the data that a phase may mean: by a name that is near, or usual elsewhere."""
    near = did_you_mean(key, known)
    other = next((name for name in OTHER_NAMES.get(key, ()) if name in known), None)
    if other is None or key in near:
        return near
    return f"; did you mean {other!r}? Then say so: data={{{key!r}: data[{other!r}]}}"


def feed(learner: RunLearner, phase: Phase, before_batch: Callable[[], object] = lambda: None) -> Feed:
    """Return the data of a phase; one that names none gets what was given to its epoch, or the only data there is.

    Args:
        learner: The learner.
        phase: The phase.
        before_batch: Called before each batch.

    Raises:
        DataError: The learner has none under the phase's key.
    """
    key = phase.data_key
    if not key:
        keys = list(vars(learner.data))
        if "" not in keys and len(keys) != 1:
            if type(phase).epoch is not Phase.epoch:
                return Feed((), phase.owner, learner.streams)
            raise DataError(
                f"{type(phase).__name__} does not say which data it runs on, and there is {sorted(keys) or 'no data'}; "
                f"say so in the class: data_key = {(keys or ['training'])[0]!r}, or give it data: "
                "learner.epoch(phase, data)"
            )
        key = "" if "" in keys else keys[0]
    elif key not in learner.data:
        known = sorted(vars(learner.data))
        raise DataError(
            f"{type(phase).__name__} runs on the {key!r} data, and there is {known or 'no data'}; "
            f"give it to the learner, data={{{key!r}: ...}}, or to this call{_where_it_is(key, known)}"
        )
    source, told = vars(learner.data)[key], learner._ledger.told_lengths
    group = learner.accelerator.group
    return Feed(source, phase.owner, learner.streams, key or "given", before_batch, told, group)
