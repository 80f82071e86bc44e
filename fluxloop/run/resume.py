"""A running fit: where it stands, and how it is resumed from a checkpoint.

A resumed fit is a new process. The checkpoint's state is put in place; `FitBegin`, `CycleBegin`
and `EpochBegin` are fired again for what was under way, so that what they open is open; and the
state is put in place a second time, so that what they counted is as it was. Then the epoch goes
on with the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fluxloop.checkpoint.checkpoint import try_to_apply
from fluxloop.checkpoint.misfits import check_fits, check_same_run
from fluxloop.data.feed import Feed
from fluxloop.data.fingerprint import differences, fingerprint
from fluxloop.errors import CheckpointError, describe, warn_user
from fluxloop.loop import Scope, StepScope, runepoch
from fluxloop.persist.plain import from_plain, phase_id, to_plain
from fluxloop.phase import FittingPhase, Phase
from fluxloop.randomness import generator_states, put_generators

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from fluxloop.interfaces import RunLearner

Place = dict[str, Any]
"""Where a fit stands, as plain data: its phases, how many of the cycle are complete, and the place in the data."""


def nothing() -> None:
    """Stand for what there is not to undo."""


def is_under_way(place: Place | None) -> TypeIs[Place]:
    """Tell whether a cycle is under way at a place."""
    return place is not None and bool(place["index"] or place["feed"] is not None)


class FitScope(Scope):
    """A running fit.

    Args:
        learner: Whose fit it is.
        phases: What a cycle runs.
        steps_per_epoch: How many batches an epoch has at most.
        state: Of the checkpoint it goes on from.
        undo: Puts the learner back as it was before that was put in place.

    Attributes:
        index: How many phases of the running cycle are complete.
        feed: The data of the running epoch, None between epochs.
        script: Where the global generators stood when the fit began.
        cut: Whether the fit has ended in the middle of an epoch.
        finished: Whether `FitEnd` was fired.
    """

    __slots__ = (
        "_again",
        "_go_back",
        "_noted",
        "_noting",
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
        self._again = state
        self._go_back = undo
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
        """Have the epoch under way begin with the numbers it began with."""
        self._learner.streams[phase.epoch_stream].index -= 1
        self._order_again(phase)

    def _order_again(self, phase: Phase) -> None:
        self._learner.streams[f"{phase.owner}/data"].index -= 1

    @property
    def goes_on(self) -> bool:
        """Whether the fit goes on from a checkpoint, and has not yet come to where that was written."""
        return self._again is not None

    @property
    def resumed(self) -> bool:
        """Whether the epoch that begins in it goes on from a checkpoint."""
        return self.goes_on and self.feed is not None

    @property
    def batches_used(self) -> int:
        """How many batches of the epoch under way were used before the checkpoint."""
        return int(self._again["place"]["feed"]["batch"]) if self._again is not None and self.is_under_way else 0

    @property
    def is_under_way(self) -> bool:
        """Whether the phase that comes next goes on in the middle of its epoch."""
        return self._again is not None and self._again["place"] is not None and self._again["place"]["feed"] is not None

    def put_again(self, inside: str) -> None:
        """Put the state in place again, once what was under way has begun again.

        Args:
            inside: Where the run has come to: ``"fit"``, ``"cycle"`` or ``"epoch"``; ``"end"`` where nothing is left.
        """
        if self._again is None:
            return
        place = self._again["place"]
        under_way = "fit"
        if is_under_way(place):
            under_way = "cycle" if place["feed"] is None else "epoch"
        if inside in (under_way, "end"):
            try_to_apply(self._learner, self._again, self._go_back, begun=True, running=True)
            if inside == "epoch":
                self._order_again(self.phases[self.index])
            self._again, self._go_back = None, nothing

    def pass_safe_point(self) -> None:
        """Do what waits for a moment between two steps or epochs: checkpoints, and a stop that was asked for.

        Raises:
            CancelFittingException: The fit is to end.
        """
        self._learner._running.pass_safe_point(self._learner.history)

    def take(self, feed: Feed) -> None:
        """Take the data of an epoch that is about to run."""
        self.feed = feed
        feed.limit = self.steps_per_epoch
        self._noting.enter_context(self.noting(self.phases[self.index].owner))
        if self._again is not None:
            feed.go_on(self._again["place"]["feed"], self._go_back)

    def began(self) -> None:
        """Put the epoch's state in place where it goes on from a checkpoint."""
        if self.feed is not None:
            self._noting.close()
            self.put_again("epoch")

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
            self.feed = None
            self.index += 1

    def finish(self) -> None:
        """Let whoever waits for a moment without anything under way have the last one."""
        self.finished = True
        self._learner._running.stop_requested = None
        self.pass_safe_point()

    def place(self) -> dict[str, Any]:
        """Give where the fit stands, as plain data.

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
    """Give where a learner's fit stands; None where it is not fitting.

    Raises:
        CheckpointError: It is in the middle of a step, or of an epoch that cannot be resumed in the middle.
    """
    scope = learner.scope
    if scope is None or (isinstance(scope, runepoch) and scope.parent is None):
        return None
    fitting = scope if isinstance(scope, FitScope) else scope.parent
    ends = isinstance(scope, runepoch) and isinstance(fitting, FitScope) and fitting.feed is None
    if isinstance(scope, StepScope) or not isinstance(fitting, FitScope) or ends:
        raise CheckpointError(
            "the state of a learner was asked for while a step is under way or an epoch ends; expected between two "
            "steps: a Checkpointer waits for that, and so does learner.at_safe_point(function)"
        )
    return None if fitting.cut else fitting.place()


def check_resumes(
    learner: RunLearner,
    state: dict[str, Any],
    epochs: int,
    phases: list[Phase],
    feeds: list[Feed],
    steps_per_epoch: int | None,
) -> None:
    """Raise where a fit is not the one that a checkpoint is of, before anything is changed.

    Args:
        learner: The learner.
        state: That of the checkpoint.
        epochs: How many the fit has in all.
        phases: What a cycle runs.
        feeds: Their data.
        steps_per_epoch: How many batches an epoch has at most.

    Raises:
        CheckpointError: Says what differs.
    """
    check_fits(learner, state)
    check_same_run(learner, state)
    place = state["place"]
    if place is not None:
        _check_place(place, phases, feeds, steps_per_epoch)
    _compare_data(learner, state["data"])
    begun = state["history"]["cycles"] + is_under_way(place)
    if state["history"]["stop_reason"] is None and begun > epochs:
        raise CheckpointError(
            f"fit({epochs}, resume=...) was asked for, and {state['history']['cycles']} epochs are complete"
            f"{' and one is under way' if begun > state['history']['cycles'] else ''}; epochs count from "
            f"the beginning of the run: fit({begun}, resume=...) or more. Where a script has several fits, one after "
            "the other, give each stage a folder of its own"
        )


def _check_place(place: Place, phases: list[Phase], feeds: list[Feed], steps_per_epoch: int | None) -> None:
    """Raise where a fit cannot go on at a place.

    Raises:
        CheckpointError: Says what differs.
    """
    names = [phase_id(phase) for phase in phases]
    if is_under_way(place) and place["phases"] != names:
        raise CheckpointError(f"the fit ran the phases {place['phases']}, and now {names}; expected the same")
    if place.get("steps_per_epoch", steps_per_epoch) != steps_per_epoch:
        raise CheckpointError(
            f"the run was begun with steps_per_epoch={place['steps_per_epoch']}, and is now to go on with "
            f"steps_per_epoch={steps_per_epoch}, which makes it another run; resume with the former one. To train on "
            "from here in a run of its own: learner.load(file), then learner.fit(epochs)"
        )
    if place["feed"] is not None:
        phase = phases[place["index"]]
        if place["feed"]["key"] != phase.data_key:
            raise CheckpointError(
                f"the epoch under way ran on the {place['feed']['key']!r} data, and {phase!r} runs on the "
                f"{phase.data_key!r} data"
            )
        feeds[place["index"]].check_place(place["feed"])


def _compare_data(learner: RunLearner, kept: dict[str, Any]) -> None:
    """Warn of data that a run goes on with between two epochs and that is not the data of the checkpoint."""
    for key, source in vars(learner.data).items():
        differ = differences(kept.get(key, {}).get("fingerprint", {}), fingerprint(source))
        if differ:
            warn_user(
                f"the {key} data ({describe(source)}) is not the same as in the run that wrote the checkpoint: "
                f"{'; '.join(differ)}. The run goes on with what is given now, from the beginning of an epoch"
            )
