"""A running fit: where it stands, and how it goes on from a checkpoint.

A resumed fit is a new process. The checkpoint's state is restored; `FitBegin`, `CycleBegin` and
`EpochBegin` are fired again for what was under way, so that what they open is open; and the state
is restored a second time, so that what they counted is as it was. Then the epoch goes on with the
next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fluxloop.checkpoint.restoring import apply_or_undo
from fluxloop.compute.models import state_of_models
from fluxloop.data.feed import Feed
from fluxloop.errors import CancelFittingException, CheckpointError
from fluxloop.loop import Scope, StepScope, runepoch
from fluxloop.persist.plain import from_plain, phase_id, to_plain
from fluxloop.phase import FittingPhase, Phase
from fluxloop.processes.replicas import APART, check_alike, send, whole
from fluxloop.randomness import generator_states, put_generators

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from fluxloop.interfaces import RunLearner

Place = dict[str, Any]
"""Where a fit stands, as plain data: its phases, how many of the cycle are complete, and the place in the data."""


def nothing() -> None:
    """Do nothing: there is nothing to undo."""


def is_under_way(place: Place | None) -> TypeIs[Place]:
    """Return whether a cycle is under way at a place."""
    return place is not None and bool(place["index"] or place["feed"] is not None)


def bring_together(learner: RunLearner, phase: Phase) -> None:
    """Compare the weights of the processes after an epoch that trains, and give all the buffers of the first one.

    The running statistics of batch norm are those of a process's own rows. Of weights that have come apart, those of
    the first process alone would be saved.

    Raises:
        ProcessError: Names weights that have come apart.
    """
    group = learner.accelerator.group
    if group is not None and phase.gradients:
        named = state_of_models(learner.models, learner.loss_fn)
        check_alike(group, [(name, each) for name, each in named if isinstance(each, nn.Parameter)], APART)
        own = [value for value in vars(phase).values() if isinstance(value, nn.Module)]  # a teacher, or a head
        modules = {id(module): module for module in [*learner.modules(), *learner.weights.views.values(), *own]}
        send(group, whole(buffer for module in modules.values() for buffer in module.buffers()))


class FitScope(Scope):
    """A running fit.

    Args:
        learner: The learner that is fitting.
        phases: What a cycle runs.
        steps_per_epoch: How many batches an epoch has at most.
        state: Of the checkpoint that it goes on from.
        undo: Puts the learner back as it was before that state was restored.

    Attributes:
        index: How many phases of the running cycle are complete.
        feed: The data of the running epoch, None between epochs.
        script: Where the global generators stood when the fit began.
        cut: Whether the fit has ended in the middle of an epoch.
        finished: Whether `FitEnd` was fired.
    """

    __slots__ = (
        "_noted",
        "_noting",
        "_revert",
        "_state",
        "cut",
        "feed",
        "finished",
        "index",
        "phases",
        "script",
        "steps_per_epoch",
    )

    def __init__(
        self,
        learner: RunLearner,
        phases: list[Phase],
        steps_per_epoch: int | None,
        state: dict[str, Any] | None = None,
        undo: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(learner, FittingPhase())
        self.script = generator_states()
        self.phases = phases
        self.steps_per_epoch = steps_per_epoch
        self.feed: Feed | None = None
        self.cut = self.finished = False
        self.index = 0
        self._state = state
        self._revert = undo
        self._noted: set[str] = set()
        self._noting = ExitStack()
        place = None if state is None else state["place"]
        if place is not None:
            self.script = from_plain(place["script"])
            put_generators(self.script)
            self.index = place["index"]
            if place["feed"] is not None:
                self._begin_epoch_again(phases[self.index])

    def _begin_epoch_again(self, phase: Phase) -> None:
        """Set the streams back, so that the epoch under way begins with the random numbers with which it began."""
        self._learner.streams[phase.epoch_stream].index -= 1
        self._order_again(phase)

    def _order_again(self, phase: Phase) -> None:
        """Set the data's stream back, for the order of the epoch under way: beginning it again counts it again."""
        self._learner.streams[f"{phase.owner}/data"].index -= 1

    @property
    def is_resuming(self) -> bool:
        """Whether the fit goes on from a checkpoint, and has not yet reached the place where that was written."""
        return self._state is not None

    @property
    def resumed(self) -> bool:
        """Whether the epoch that begins in it goes on from a checkpoint."""
        return self.is_resuming and self.feed is not None

    @property
    def batches_used(self) -> int:
        """How many batches of the epoch under way were used before the checkpoint."""
        return int(self._state["place"]["feed"]["batch"]) if self._state is not None and self.is_in_epoch else 0

    @property
    def is_in_epoch(self) -> bool:
        """Whether the phase that comes next goes on in the middle of its epoch."""
        return self._state is not None and self._state["place"] is not None and self._state["place"]["feed"] is not None

    def restore(self, inside: str) -> None:
        """Restore the state a second time, once what was under way has begun again.

        Args:
            inside: Where the run stands: ``"fit"``, ``"cycle"`` or ``"epoch"``; ``"end"`` where nothing is left to do.
        """
        if self._state is None:
            return
        place = self._state["place"]
        # The innermost that was under way: only when it has begun again is everything around it open
        under_way = "fit"
        if is_under_way(place):
            under_way = "cycle" if place["feed"] is None else "epoch"
        if inside in (under_way, "end"):
            apply_or_undo(self._learner, self._state, self._revert, begun=True, running=True)
            if inside == "epoch":  # the state just restored has the order counted that the data draws next
                self._order_again(self.phases[self.index])
            self._state, self._revert = None, nothing

    def pass_safe_point(self) -> None:
        """Do what waits for a moment between two steps or epochs: checkpoints, and a stop that was asked for.

        Raises:
            CancelFittingException: The fit is to end.
        """
        learner, group = self._learner, self._learner.accelerator.group
        if group is None:
            learner._running.pass_safe_point(learner.history)
            return
        if self.feed is None:
            group.agreement.between(learner)
        else:
            group.agreement.agree_on_stop(learner)
        stops = learner._running.stop_requested
        try:
            learner._running.pass_safe_point(learner.history)
        except CancelFittingException as signal:
            signal.agreed = stops is not None
            raise

    def begin_epoch(self, feed: Feed) -> None:
        """Take the data of an epoch that is about to run; where a fit is resumed in it, from there on."""
        self.feed = feed
        feed.limit = self.steps_per_epoch
        # Closed in `began`: what handlers of EpochBegin make is noted, and nothing that comes later in the epoch
        self._noting.enter_context(self.noting(self.phases[self.index].owner))
        if self._state is not None:
            feed.go_on(self._state["place"]["feed"], self._revert)

    def began(self) -> None:
        """Restore the state a second time, where the checkpoint was written in this epoch."""
        if self.feed is not None:
            self._noting.close()
            self.restore("epoch")

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note what callbacks make inside, the first time that a fit, a cycle or an epoch of a phase begins."""
        first, callbacks = what not in self._noted, self._learner.callbacks
        self._noted.add(what)
        before = callbacks.new_objects() if first else []
        yield
        if first:
            callbacks.note_made(before)

    def ended(self) -> None:
        """Count a complete phase."""
        if self.feed is not None:
            bring_together(self._learner, self.phases[self.index])
            self.feed = None
            self.index += 1

    def pass_last_safe_point(self) -> None:
        """Pass the last moment without a step under way, after `FitEnd`."""
        self.finished = True
        self._learner._running.stop_requested = None  # the fit has ended: what is asked for now stops nothing
        self._learner._running.pass_safe_point(self._learner.history)

    def place(self) -> dict[str, Any]:
        """Return where the fit stands, as plain data.

        Raises:
            CheckpointError: It is in an epoch that cannot be resumed in the middle.
        """
        place = None
        if self.cut:
            raise CheckpointError("the fit was cut in the middle of an epoch")
        if self.feed is not None:
            phase = self.phases[self.index]
            if type(phase).epoch is not Phase.epoch and not phase.resumable:
                raise CheckpointError(
                    f"{type(phase).__name__} has an epoch() of its own, which cannot be resumed in the middle; "
                    "where it keeps nothing between steps but in attributes, say so in the class: resumable = True"
                )
            if self.feed.obstacle is not None:
                raise CheckpointError(self.feed.obstacle)
            place = self.feed.place()
            if place is None:
                raise CheckpointError("an epoch is just beginning; a state can be kept between two of its steps")
            place["global_generators"] = to_plain(generator_states(), "the random generators")
        names = [phase_id(phase) for phase in self.phases]
        script = to_plain(self.script, "the random generators")
        return {
            "phases": names,
            "index": self.index,
            "feed": place,
            "script": script,
            "steps_per_epoch": self.steps_per_epoch,
        }


def place_of(learner: RunLearner) -> dict[str, Any] | None:
    """Return where a learner's fit stands; None where it is not fitting.

    Raises:
        CheckpointError: It is in the middle of a step, or of an epoch that cannot be resumed in the middle.
    """
    scope = learner.scope
    if scope is None or (isinstance(scope, runepoch) and scope.parent is None):
        return None
    fitting = scope if isinstance(scope, FitScope) else scope.parent
    # At EpochEnd the phase is counted as complete already, and its scope is still open
    ends = isinstance(scope, runepoch) and isinstance(fitting, FitScope) and fitting.feed is None
    if isinstance(scope, StepScope) or not isinstance(fitting, FitScope) or ends:
        raise CheckpointError(
            "the state of a learner was asked for while a step is under way or an epoch ends; expected between two "
            "steps: a Checkpointer waits for that, and so does learner.at_safe_point(function)"
        )
    return None if fitting.cut else fitting.place()
