"""Processes agree: a stop, a cancel or a loss that is not finite acts on all of them, at the same step.

What one process wants rides in the last message of each update's gradients, as *votes* that are added up, and costs no
message of its own. Who reads that somebody wants something asks what, and all act alike.

A step that is cancelled on one process needs more: the others wait for its part of a message, and it cannot know of
which. So it asks: the threads that watch (`watch`) answer where their main threads are. Where these wait in a message
of the same step, it takes part with weight 0, and all leave the step out. Where they are past it, they are left alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluxloop.errors import (
    CancelEpochException,
    CancelFittingException,
    CancelSignal,
    CancelStepException,
    ProcessError,
)

KINDS: tuple[type[CancelSignal], ...] = (CancelStepException, CancelEpochException, CancelFittingException)
"""The signals, from the one that ends least to the one that ends most."""
STOP, CANCEL = 0, 1
"""The places of the votes: to stop after this step, and to leave this step out."""
BETWEEN = "between"
"""Stands for a message between epochs, which has votes alone."""
PATIENCE = 5.0
"""Seconds after which a process that waits in a message of another kind is taken to wait for the one that cancels."""


def kind_of(signal: CancelSignal) -> int:
    """Return the place of a signal in `KINDS`."""
    return max((place for place, kind in enumerate(KINDS) if isinstance(signal, kind)), default=0)


class Agreement:
    """What this process wants, and where it is, for the others.

    Args:
        group: The processes.

    Attributes:
        sent: How many messages with votes this process has begun to take part in.
        inside: What the message that it is in holds: the places of optimizers, or `BETWEEN`; None for none. In a graph
            those of each of its messages.
        steps: How many steps have begun.
        in_step: Whether one is under way.
    """

    def __init__(self, group: Any) -> None:  # a Group, which is made of this
        self.group = group
        self.sent = self.steps = 0
        self.inside: list[int] | list[list[int]] | str | None = None
        self.in_step = False
        self._cancelled: int | None = None
        self._left = False
        self._wish: CancelSignal | None = None
        self._stops = False
        self._ends: dict[int, list[int]] = {}
        """By step, since the last message: how many batches each optimizer had counted when it ended."""
        self._learner: Any = None
        if group.watcher is not None:
            group.watcher.answer = self.place

    # Where this process is

    def begin_step(self, learner: Any) -> None:
        """Count a step that begins."""
        self._learner = learner
        self.steps += 1
        self.in_step = True

    def end_step(self, learner: Any) -> None:
        """Note that a step has ended."""
        self._ends[self.steps] = [slot.window.count for slot in learner.updates.slots]
        self.in_step = False

    def place(self) -> str:
        """Return where this process is, as text; called by the thread that watches, too."""
        updates = None if self._learner is None else self._learner.updates
        return json.dumps(
            {
                "sent": self.sent,
                "inside": self.inside,
                "step": self.steps,
                "in_step": self.in_step,
                "cancelled": self._cancelled,
                "left": self._left,
                "updates": 0 if updates is None else updates.count,
                "ends": dict(self._ends),
                "messages": self.group.messages,
            }
        )

    # Messages with votes

    def before(self, learner: Any, slots: Sequence[Any] = ()) -> None:
        """Note that this process begins to take part in a message.

        Args:
            learner: Whose gradients it holds.
            slots: Those of the optimizers; left out, it holds votes alone.
        """
        self._learner = learner
        self.inside = [learner.updates.slots.index(slot) for slot in slots] or BETWEEN
        self.sent += 1

    def before_graph(self, learner: Any, messages: list[list[int]]) -> None:
        """Note that this process begins a graph, which sends several messages before anybody hears of them.

        Args:
            learner: Whose gradients they hold.
            messages: The places of the optimizers, of each.
        """
        self._learner = learner
        self.inside = messages
        self.sent += 1

    def after_graph(self, learner: Any, votes: list[list[float]], signal: CancelSignal | None) -> None:
        """Act on what all want, once a graph has run.

        Args:
            learner: The learner.
            votes: The summed ones of each message.
            signal: What this process has raised in it; None for nothing.

        Raises:
            CancelSignal: As `after` does.
        """
        self.sent += len(votes) - 1
        if signal is not None:
            self._wish = signal
        self.after(learner, [sum(each) for each in zip(*votes, strict=True)])

    def votes(self, learner: Any) -> list[float]:
        """Return what this process wants."""
        return [float(learner._running.wish is not None), float(self._wish is not None), 0.0, 0.0]

    def after(self, learner: Any, votes: Sequence[float] | Tensor) -> None:
        """Act on what all want, once a message has come.

        Raises:
            CancelSignal: Somebody leaves out the step, or ends the epoch or the fit; the same on all processes.
        """
        self.inside = None
        self._ends.clear()
        said = votes.tolist() if isinstance(votes, Tensor) else votes
        self._stops = self._stops or said[STOP] > 0
        if said[CANCEL] > 0:
            signal, self._wish = self._wish, None
            raise self._exchange(learner, signal)

    def between(self, learner: Any) -> None:
        """Agree between two epochs, where no gradients are sent.

        Raises:
            CancelFittingException: The fit ends, for one of the processes.
        """
        self._wish = None  # the epoch that was to end has ended
        self._vote(learner, self.votes(learner))
        self.agree_on_stop(learner)

    def _vote(self, learner: Any, votes: list[float]) -> None:
        self.before(learner)
        self.after(learner, self.group.all_reduce(torch.tensor(votes, device=self.group.device)))

    def agree_on_stop(self, learner: Any) -> None:
        """Have the fit stop here, with one reason on all processes, where one of them has asked for it."""
        if self._stops:
            self._stops = False
            wishes = self.group.gather_objects(learner._running.wish)
            learner._running.stop_requested = next((wish for wish in wishes if wish is not None), None)
            learner._running.wish = None

    def _exchange(self, learner: Any, signal: CancelSignal | None) -> CancelSignal:
        """Tell each other what to do, and return the signal that ends most.

        Args:
            learner: The learner.
            signal: What this process has raised; None for nothing.
        """
        not_finite = getattr(signal, "is_not_finite", False)
        mine = None if signal is None else (kind_of(signal), signal.reason, not_finite)
        said = [each for each in self.group.gather_objects(mine) if each is not None]
        kind = max(each[0] for each in said)
        reason = next(each[1] for each in said if each[0] == kind)
        if any(each[2] for each in said) and not not_finite:
            learner.finite.put_back_buffers()
        agreed: CancelSignal = KINDS[kind](reason)
        agreed.agreed = True
        return agreed

    # A cancel on this process

    def settle_step(self, learner: Any, signal: CancelSignal, trains: bool) -> CancelSignal:
        """Return the signal with which a step is left, once the others know of it.

        Args:
            learner: The learner.
            signal: What was raised in the step, on this process and perhaps on all.
            trains: Whether the step computes gradients; in others, what ends no more than the epoch is no concern of
                other processes.
        """
        kind = kind_of(signal)
        ends_fit = kind == kind_of(CancelFittingException())
        if signal.agreed or self.group.watcher is None or not (trains or (ends_fit and learner._running.fitting)):
            return signal
        settled = self._settle(learner, signal)
        if settled is not None:
            return settled
        if isinstance(signal, CancelStepException):
            return signal
        if ends_fit:
            if not learner._running.fitting:
                return signal
            learner._running.wish = signal.reason or "cancelled"
            return CancelStepException(signal.reason) if trains else CancelEpochException(signal.reason)
        self._wish = signal
        return CancelStepException(signal.reason)

    @contextmanager
    def beginning(self, learner: Any, phase: Any) -> Iterator[None]:
        """Have an epoch be left on all processes where one of them cancels it, or the fit, as it begins.

        Args:
            learner: The learner.
            phase: The phase that begins an epoch.

        Raises:
            CancelSignal: All end the epoch, or somebody the fit; the same on all processes.
            ProcessError: Some end the epoch alone: their callbacks have not begun it, and those of the others have.
        """
        together = phase.data_key and (phase.gradients or learner._running.fitting)
        if not together or self.in_step or learner.streams.prefix:  # one process may run it by itself
            yield
            return
        self._wish = None
        try:
            yield
        except (CancelEpochException, CancelFittingException) as signal:
            self._wish = signal
        cancels = self._wish is not None
        try:
            self._vote(learner, self.votes(learner))
        except CancelEpochException as agreed:
            ranks = [rank for rank, each in enumerate(self.group.gather_objects(cancels)) if each]
            if len(ranks) == self.group.size:
                raise
            raise ProcessError(
                f"the processes {ranks} alone cancelled an epoch of {phase!r} as it began "
                f"({type(agreed).__name__}({agreed.reason!r}) at EpochBegin), and callbacks of the others have begun "
                "it; expected the cancel on all processes, or at StepBegin",
                ranks,
            ) from agreed

    @contextmanager
    def ending(self, learner: Any) -> Iterator[None]:
        """Have the fit that runs inside end on all processes where it is cancelled on one, outside of a step.

        Raises:
            CancelFittingException: It was cancelled.
        """
        self._wish, self._stops, self.in_step = None, False, False
        self.steps = 0  # one of the processes may have run an epoch by itself before
        try:
            yield
        except CancelFittingException as signal:
            if signal.agreed or self.group.watcher is None:
                raise
            settled = self._settle(learner, signal, left=True)
            raise settled or signal from signal

    def _settle(self, learner: Any, signal: CancelSignal, left: bool = False) -> CancelSignal | None:
        """Find out where the others are, and leave together with them; return None where they are past this step.

        Args:
            learner: The learner.
            signal: What this process has raised.
            left: Whether it has left the epoch, too.
        """
        watcher = self.group.watcher
        assert watcher is not None  # for type checkers: who calls this has looked
        self._learner, self._cancelled, self._left = learner, kind_of(signal), left
        number, asked, pause, since = str(self.sent), 0.0, 0.002, time.monotonic()
        can_take_part = getattr(learner.updates, "can_take_part", True)
        watcher.reply(number, self.place())
        try:
            while True:
                others = [json.loads(text) for text in watcher.answers(number).values()]
                inside = next((each for each in others if self._waits(each)), None)
                if inside is not None and can_take_part:
                    return self._take_part(learner, signal, inside["inside"])
                if len(others) == self.group.size - 1 and all(self._cancels_too(each) for each in others):
                    self.sent += 1
                    self._ends.clear()
                    return self._exchange(learner, signal)
                passed = next((each for each in others if self._is_past(each)), None)
                if passed is not None:
                    self._fall_in(learner, signal, passed)
                    return None
                stuck = any(self._is_stuck(each, can_take_part) for each in others)
                if stuck and time.monotonic() > since + PATIENCE:
                    raise self._stuck(learner, signal)
                if time.monotonic() > asked + 0.5:
                    asked = time.monotonic()
                    watcher.ask(number)
                watcher.check()
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
        finally:
            self._cancelled, self._left = None, False

    def _waits(self, other: dict[str, Any]) -> bool:
        """Return whether another process waits for this one in a message, of the step that was cancelled."""
        of_step = other["step"] == self.steps and other["in_step"]
        return other["sent"] == self.sent + 1 and other["inside"] is not None and (of_step or self._left)

    def _cancels_too(self, other: dict[str, Any]) -> bool:
        """Return whether another process has cancelled the same step, or the fit."""
        alike = other["step"] == self.steps or other["left"] or self._left
        # one that has seen that all cancel is in the exchange already, and waits there for this one
        exchanges = other["sent"] == self.sent + 1 and other["inside"] is None
        return other["cancelled"] is not None and (other["sent"] == self.sent or exchanges) and alike

    def _is_past(self, other: dict[str, Any]) -> bool:
        """Return whether another process has gone on beyond the step that was cancelled."""
        if self._left or other["left"]:
            return False
        return other["step"] > self.steps or (other["step"] == self.steps and not other["in_step"])

    def _is_stuck(self, other: dict[str, Any], can_take_part: bool) -> bool:
        """Return whether another process is in a message of the step in which this one cannot take part."""
        if other["cancelled"] is not None or not (self._left or (other["step"] == self.steps and other["in_step"])):
            return False
        return not can_take_part or (other["inside"] is None and other["messages"] > self.group.messages)

    def _stuck(self, learner: Any, signal: CancelSignal) -> ProcessError:
        return ProcessError(
            f"process {self.group.rank} cancelled a step ({type(signal).__name__}({signal.reason!r}) in "
            f"{learner.where()}) while others wait for its part of the step: of rows that are gathered for a "
            "contrastive loss, of sharded parameters, or of the first loss in fp16; expected the cancel on all "
            "processes"
        )

    def _take_part(self, learner: Any, signal: CancelSignal, inside: list[Any] | str) -> CancelSignal:
        """Take part in the messages in which the others wait, with no weight; return the signal for all."""
        votes = [0.0, 1.0, 0.0, 0.0]
        self._wish = signal
        try:
            if isinstance(inside, str):
                self._vote(learner, votes)
            else:
                said: Any = ()
                for places in inside if isinstance(inside[0], list) else [inside]:
                    slots = [learner.updates.slots[place] for place in places]
                    self.before(learner, slots)
                    said = _take_part_with_nothing(learner.updates.averager, slots, votes)
                self.after(learner, said)
        except CancelSignal as agreed:
            return agreed
        raise ProcessError("the votes of a message say that no process has cancelled a step, and this one has")

    def _fall_in(self, learner: Any, signal: CancelSignal, other: dict[str, Any]) -> None:
        """Count batches as the others have, which were not stopped.

        Raises:
            ProcessError: They have updated weights that this process leaves as they were.
        """
        if other["updates"] > learner.updates.count:
            raise ProcessError(
                f"process {self.group.rank} cancelled an update that the others have made "
                f"({type(signal).__name__}({signal.reason!r}) in {learner.where()}), so that the weights differ from "
                "now on; expected the cancel on all processes, or before the gradients are averaged: at BackwardBegin, "
                "or earlier"
            )
        for slot, count in zip(learner.updates.slots, other["ends"].get(str(self.steps), ()), strict=False):
            slot.window.count = max(slot.window.count, count)


def _take_part_with_nothing(averager: Any, slots: list[Any], votes: list[float]) -> Sequence[float] | Tensor:
    """Take part in a message of gradients without any, and without a weight; return the summed votes."""
    taken = [slot.take() for slot in slots]
    try:
        said: Sequence[float] | Tensor
        said = averager.reduce([slot.parameters for slot in slots], [0.0] * len(slots), votes).votes
        return said
    finally:
        for slot, gradients in zip(slots, taken, strict=True):
            slot.put(gradients)


Kind = TypeVar("Kind", bound=type)


@cache
def together(kind: Kind) -> Kind:
    """Return the class of steps that are left by all processes alike, made of one of steps of a single process."""
    made: Kind = type(f"Together{kind.__name__}", (_Together, kind), {"__slots__": ("_counted",)})  # type: ignore[assignment]  # it is one
    return made


class _Together:
    """What a step does in several processes beside what it does in one."""

    __slots__ = ()

    def __enter__(self: Any) -> Any:
        learner = self._learner
        agreement: Agreement = learner.accelerator.group.agreement
        # A step inside another one, or of an evaluation, is not one of those that all processes go through together
        self._counted = not agreement.in_step and not learner.streams.prefix
        if not self._counted:
            return super().__enter__()  # type: ignore[misc]  # of the class of steps
        agreement.begin_step(learner)
        try:
            return super().__enter__()  # type: ignore[misc]
        except CancelSignal as signal:
            try:
                raise agreement.settle_step(learner, signal, self.phase.gradients) from signal
            finally:
                agreement.end_step(learner)
        except BaseException:
            agreement.in_step = False
            raise

    def __exit__(self: Any, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not self._counted:
            handled: bool = super().__exit__(kind, error, traceback)  # type: ignore[misc]
            return handled
        learner, trains = self._learner, self.phase.gradients
        agreement: Agreement = learner.accelerator.group.agreement
        left = error
        try:
            if isinstance(error, CancelSignal):
                left = agreement.settle_step(learner, error, trains)
            try:
                handled = super().__exit__(None if left is None else type(left), left, traceback)  # type: ignore[misc]
            except CancelSignal as late:  # raised when the step had done what it does
                settled = agreement.settle_step(learner, late, trains)
                if isinstance(settled, CancelStepException):
                    return False
                raise settled from late
        finally:
            agreement.end_step(learner)
        if left is not error and left is not None and not handled:
            raise left from error
        return handled
