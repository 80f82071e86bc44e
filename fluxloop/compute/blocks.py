"""The update block: whose parameters may change in it, and the gradients and the update on leaving it."""

from __future__ import annotations

from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.compute.reach import leaks
from fluxloop.compute.slots import Slot
from fluxloop.errors import LossError, OptimizerError
from fluxloop.events import BackwardBegin, BackwardEnd
from fluxloop.state import LossName

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner

BACKWARD_BEGIN, BACKWARD_END = BackwardBegin(), BackwardEnd()

requires_grad = attrgetter("requires_grad")


class UpdateBlock:
    """``with learner.optimizing(name) as block:`` says whose parameters may change.

    Set ``block.loss``; on leaving, the gradients of this optimizer's parameters are computed and
    it steps. Inside, the other optimizers' parameters require no gradient.

    Attributes:
        loss: The scalar loss of this optimizer; None makes no update.
    """

    __slots__ = ("_frozen", "_name", "_retain_graph", "_updates", "learner", "loss", "slot")

    def __init__(self, learner: StepLearner, slot: Slot, retain_graph: bool = False, name: str | None = None) -> None:
        if name is not None and (not isinstance(name, str) or not name or "/" in name):
            raise LossError(
                f"optimizing(loss={name!r}) was given; expected the name under which the block's loss is recorded, "
                "without a slash: loss='r1'"
            )
        self._name = None if name is None else LossName(name)
        self._retain_graph = retain_graph
        self.learner = learner
        self._updates = learner.updates
        self.slot = slot
        self.loss: Tensor | None = None

    def __enter__(self) -> UpdateBlock:
        outer = self._updates.block
        if outer is not None:
            raise OptimizerError(
                f"the block of {self.slot.label} was opened inside that of {outer.slot.label}; "
                "close one before the next"
            )
        self._updates.block = self
        self._frozen = [*filter(requires_grad, self.slot.others)]
        for parameter in self._frozen:
            parameter.requires_grad = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The others require gradients again before this block's are computed. Its graph holds none of them, as they
        # were frozen when the loss was computed; and handlers of the events below see the model as it is outside.
        for parameter in self._frozen:
            parameter.requires_grad = True
        try:
            if error is None and self.loss is not None:
                self._train(self.loss)
        except BaseException:
            self._updates.abandon_step(self.learner.step)
            raise
        finally:
            if error is not None:
                self._updates.abandon_step(self.learner.step)
            self._updates.block = None

    def _train(self, given: Tensor) -> None:
        """Store the loss, compute its gradients, step; callbacks may replace the loss in between."""
        learner, slot, updates, name = self.learner, self.slot, self._updates, self._name or self.slot.name
        scope = learner.scope
        entries = vars(learner.step)
        losses: dict[str, Any] = entries if name is None else entries.setdefault("losses", {})
        key = "loss" if name is None else name
        losses.pop(key, None)  # so that the newest comes last
        losses[key] = given
        all_frozen = next(filter(requires_grad, slot.parameters), None) is None
        if all_frozen and isinstance(given, Tensor) and updates.rests(slot):
            losses[key] = given.detach()
            return
        if scope is not None:  # what `learner.fire` does, with a call less
            scope.handle(BACKWARD_BEGIN)
        loss = losses[key]
        if updates.findings is not None:
            updates.findings.extend(leaks(updates.names, updates.slots, slot, loss, learner.step))
        updates.backward(loss, self._retain_graph)
        losses[key] = loss.detach()
        if scope is not None:
            scope.handle(BACKWARD_END)
        updates.update()
