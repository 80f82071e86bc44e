"""Updates of sharded parameters: backward passes as ``fully_shard`` needs them, and what processes have to agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxloop.compute.averaging import Sums
from fluxloop.compute.finite import Finite, bad_gradients, norm_before_clipping, stored_losses
from fluxloop.compute.gradients import are_finite, divide_gradients, elements
from fluxloop.compute.optimizers import Optimizers
from fluxloop.compute.sharding import ShardedModel, sharded_model
from fluxloop.compute.window import Weight, WindowSlot
from fluxloop.compute.windows import WindowedUpdates
from fluxloop.errors import ModelError, OptimizerError
from fluxloop.nested import local_part, sharded_like
from fluxloop.processes.group import Group
from fluxloop.state import StepState

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner

WHOLE = {
    "Adafactor": "computes with rows and columns",
    "LBFGS": "takes all parameters for one vector",
    "Muon": "makes whole matrices orthogonal",
    "Rprop": "compares signs in a way that torch has not for them",
    "SparseAdam": "takes sparse gradients",
}
"""Optimizers that do not step sharded parameters as they step whole ones, with the reason."""


class SummedByTorch:
    """Stands for an `Averager` where torch has added up the gradients themselves: the rest is one small message.

    Args:
        group: The processes.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sets: Sequence[tuple[nn.Parameter, ...]] = ()

    def watching(self, sets: Sequence[tuple[nn.Parameter, ...]]) -> AbstractContextManager[None]:
        """Note whose gradients are complete after a pass; torch sends them while it runs."""
        self._sets = sets
        return nullcontext()

    def finish(
        self,
        weights: Sequence[Weight],
        votes: Sequence[float] | Tensor = (),
        *,
        scales: Sequence[float] | None = None,
    ) -> Sums:
        """Return the summed weights and votes; divide the gradients by weights and scales, where these are given.

        Args:
            weights: One for each tuple of parameters that was given to `watching`: numbers, or tensors of one element.
            votes: Numbers.
            scales: What the losses were multiplied by, for each tuple.
        """
        numbers = [float(number) for number in (*weights, *votes)]
        said = torch.tensor(numbers, dtype=torch.float64, device=self._group.device)
        numbers = self._group.all_reduce(said).tolist()
        for parameters, weight, scale in zip(self._sets, numbers, scales or (), strict=False):
            divide_gradients([local_part(p.grad) for p in parameters if p.grad is not None], weight, scale)
        return Sums([*numbers[: len(weights)]], numbers[len(weights) :])

    def reduce(
        self,
        sets: Sequence[tuple[nn.Parameter, ...]],
        weights: Sequence[Weight],
        votes: Sequence[float] | Tensor = (),
        *,
        scales: Sequence[float] | None = None,
    ) -> Sums:
        """Do the same for gradients that are complete without a backward pass."""
        self._sets = sets
        return self.finish(weights, votes, scales=scales)


class ShardedFinite(Finite):
    """Looks at losses of each process's rows, and at gradients of which each holds a part: what one finds stops all."""

    def require_losses(self, wait: bool) -> None:
        """Stop the fit unless the losses that the running step has stored are finite on all processes.

        Args:
            wait: Is of no consequence here: processes that look at another time would stop in another step.

        Raises:
            CancelFittingException: One is NaN or infinite; names the process.
        """
        self.looked = True
        learner = self._learner
        bad = ""
        for what, loss in stored_losses(learner.step):
            if not isinstance(loss, Tensor) or loss.numel() == 1:
                number = loss.item() if isinstance(loss, Tensor) else float(loss)
                bad = bad or ("" if isfinite(number) else f"{what} became {number}")
        group = learner.accelerator.group
        if group.all_reduce(torch.tensor(float(bool(bad)), device=group.device), "max").item():
            said = {rank: what for rank, what in enumerate(group.gather_objects(bad)) if what}
            self.stop("; ".join(f"{what} on process {rank}" for rank, what in said.items()))

    def require_gradients(self, name: str | None, wait: bool) -> None:
        """Stop the fit unless the gradients that an optimizer is about to use are finite; this waits for the device.

        Args:
            name: Of the optimizer.
            wait: Is of no consequence here: processes that look at another time would stop in another step.

        Raises:
            CancelFittingException: One is NaN or infinite; names the first parameters.
        """
        learner = self._learner
        slot = learner.updates.find(name)
        learner.updates.take_given(slot)
        gradients = {p: local_part(p.grad) for p in slot.parameters if p.grad is not None}
        if not gradients:
            return
        infinite = torch.stack([(~elements(gradient).isfinite().all()).float() for gradient in gradients.values()])
        found = learner.accelerator.group.all_reduce(infinite, "max").tolist()
        bad = [learner.updates.names[p] for p, is_bad in zip(gradients, found, strict=True) if is_bad]
        norm = norm_before_clipping(learner.step, name)  # the same in all processes
        if bad or (norm is not None and not isfinite(norm.item())):
            self.stop(bad_gradients(slot, bad))

    require_clipped = require_gradients
    """All processes take part in each look."""


class ShardedUpdates(WindowedUpdates):
    """Updates of parameters of which each process holds a part.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name.

    Raises:
        OptimizerError: An optimizer needs whole parameters.
    """

    finite_type = ShardedFinite
    can_take_part = False  # torch sends parameters and gradients in the middle of the passes

    def __init__(self, learner: StepLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> None:
        for name, optimizer in optimizers.items():
            why = WHOLE.get(type(optimizer).__name__)
            if why is not None:
                raise OptimizerError(
                    f"{type(optimizer).__name__}{'' if name is None else f' ({name!r})'} {why}, and cannot step "
                    "sharded parameters; expected one that steps each element by itself, such as AdamW, or "
                    "Accelerator(strategy='replicate')"
                )
        super().__init__(learner, names, optimizers)
        self.averager: Any = SummedByTorch(learner.accelerator.group)
        self.sharded = self._find()

    def _find(self) -> list[ShardedModel]:
        """List the sharded models, in one order on all processes."""
        parts = (part for module in self._learner.modules() for part in module.modules())  # type: ignore[attr-defined]  # of a learner
        return list(dict.fromkeys(found for part in parts if (found := sharded_model(part)) is not None))

    def rename(self, names: dict[nn.Parameter, str]) -> bool:
        """Use new names of all parameters; return whether any has changed.

        Raises:
            ModelError: One has joined since the models were sharded, and is trained: its gradients would stay apart.
            OptimizerError: A trainable one is in no optimizer; nothing is changed.
        """
        joined = [name for p, name in names.items() if p.requires_grad and not hasattr(p, "to_local")]
        if joined:
            raise ModelError(
                f"{', '.join(joined[:3])}{', …' * (len(joined) > 3)} joined after the models were sharded; expected "
                "all to be there when the learner is made, frozen ones too, or Accelerator(strategy='replicate')"
            )
        return super().rename(names)

    def begin_step(self, state: StepState) -> None:
        """Release what the last update consumed, and what steps before have left."""
        for sharded in self.sharded:
            sharded.output = None
            sharded.close()
        super().begin_step(state)

    def abandon_step(self, state: StepState) -> None:
        """Undo what a step that ended early has done."""
        super().abandon_step(state)
        for sharded in self.sharded:
            sharded.abandon()

    def _reduced(self, slots: Sequence[WindowSlot], compute: Callable[[], None]) -> None:
        """Compute gradients; those of parameters that are not asked for are put back afterwards.

        The graph holds whole parameters, which the optimizers do not know: torch's engine cannot be told by
        ``inputs=`` whose gradients are wanted, and would compute none.
        """
        own = {id(parameter) for slot in slots for parameter in slot.parameters}
        others = [p for p in self.names if id(p) not in own and p.requires_grad]
        before = [(parameter, parameter.grad) for parameter in others]
        for parameter in others:
            parameter.grad = None  # torch adds in place

        def compute_and_send() -> None:
            for sharded in self.sharded:
                sharded.begin_backward()
            compute()
            for sharded in self.sharded:
                sharded.end_backward(not own.isdisjoint(map(id, sharded.parameters)))

        try:
            super()._reduced(slots, compute_and_send)
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient

    def _take_by_hand(self, slot: WindowSlot) -> None:
        """Take gradients that ``loss.backward()`` has computed, which torch has added up over processes.

        What each process's batch weighs cannot be told from the sum any more: all weigh the same.
        """
        gradients = [p.grad for p in slot.parameters if p.grad is not None]
        if gradients and slot.window.size > 1:
            super()._take_by_hand(slot)  # which refuses
        for gradient in gradients:
            local_part(gradient).div_(self._learner.accelerator.world_size)

    def _is_finite(self, slot: WindowSlot) -> bool:
        """Return whether all gradients of an optimizer are finite, in all processes."""
        finite = are_finite([local_part(p.grad) for p in slot.parameters if p.grad is not None])
        group = self._learner.accelerator.group
        return bool(group.all_reduce(torch.tensor(float(finite), device=group.device), "min"))

    def take_given(self, slot: Any) -> None:
        """Use the gradients that somebody has put in the place of ``step.grads``; whole ones are sharded."""
        given = vars(self._learner.step).get("grads")
        if isinstance(given, Mapping) and given is not self.gradients:
            by_name = {name: parameter for parameter, name in self.names.items()}
            self._learner.step.grads = {
                name: sharded_like(gradient, by_name.get(name)) if isinstance(gradient, Tensor) else gradient
                for name, gradient in given.items()
            }
        super().take_given(slot)
