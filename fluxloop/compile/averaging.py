"""Gradients of several processes are added up inside of a graph: the messages of eager steps, as operations on tensors.

What is sent where was agreed upon by an eager step, so that a process whose step runs as it is, and one
whose step is compiled, understand each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from fluxloop.compute.averaging import DIFFERS, FIRST_VOTE, LENGTH, NUMBER, VOTES, WEIGHT, Averager, Plan
from fluxloop.compute.buckets import Bucket
from fluxloop.compute.gradients import divisor
from fluxloop.errors import OptimizerError
from fluxloop.processes.agree import CANCEL


@define(eq=False)
class Agreed:
    """The buckets in which a graph sends gradients.

    Args:
        averager: Of the learner.
        parameters: Of an optimizer.
        buckets: The buckets.
    """

    averager: Averager
    parameters: tuple[nn.Parameter, ...]
    buckets: list[Bucket]

    def misfit(self) -> str | None:
        """Return why gradients are sent otherwise now."""
        plan = self.averager.plan_of(self.parameters)
        return None if plan is not None and plan.buckets is self.buckets else "other parameters that are trained"


@define(frozen=True)
class Message:
    """What was sent in one place of a graph.

    Args:
        places: Of the optimizers whose gradients it held.
        num_events: How many events the step had fired before.
    """

    places: list[int]
    num_events: int


class TracedAverager:
    """What an `Averager` does, while a step is traced.

    Args:
        of: For which it stands.
        leaves: The stand-in of each parameter.
        numbers: The stand-ins of the numbers that go into the graph: of this process's votes.
        learner: The learner's stand-in.

    Attributes:
        is_missing: Whether something was to be sent that has not been agreed upon: the step has to run as it is.
        agreed: The buckets that the graph sends.
        messages: What the graph sends, in order.
        told: For each message whether the processes have understood each other, what the batches of its last optimizer
            weigh together, and the votes.
    """

    def __init__(self, of: Averager, leaves: dict[Any, Tensor], numbers: dict[Any, Tensor], learner: Any) -> None:
        self._of = of
        self._learner = learner
        self._numbers = numbers
        self._leaves = leaves
        self._parameters = {leaf: parameter for parameter, leaf in leaves.items()}
        self.is_missing = False
        self.agreed: list[Agreed] = []
        self.messages: list[Message] = []
        self.told: list[Tensor] = []

    @torch.no_grad()
    def add_up(self, slots: Sequence[tuple[int, Any]]) -> None:
        """Add up the gradients of all processes and divide them by weight and scale, as `Averager.finish` does.

        Args:
            slots: The optimizers' stand-ins, with their places among all.
        """
        plans = [self._plan(slot.parameters) for _, slot in slots]
        known = [plan for plan in plans if plan is not None]
        if len(known) < len(plans):
            self.is_missing = True  # what is traced is not used
            return
        self.messages.append(Message([place for place, _ in slots], len(self._learner.fired)))
        votes = self._learner.votes(self._numbers)
        # in the order of eager steps; all are sent before one is waited for
        sent = {bucket: self._sent(bucket) for plan in known for bucket in plan.early}
        for plan, (_, slot) in zip(known, slots, strict=True):
            tail = self._tail(plan, slot.window.summed, votes if plan is known[-1] else [0.0] * VOTES)
            sent[plan.last] = self._sent(plan.last, tail)
        flat = {bucket: torch.ops._c10d_functional.wait_tensor(tensor) for bucket, tensor in sent.items()}
        fine = [self._understood(plan, flat[plan.last]) for plan in known]
        for plan, (_, slot) in zip(known, slots, strict=True):
            by = divisor(flat[plan.last][WEIGHT - LENGTH], slot.window.scale)
            for bucket in plan.buckets:
                self._hand_out(bucket, flat[bucket] / by)
        said = flat[known[-1].last][-LENGTH:].to(torch.float64)
        self.told.append(torch.cat([torch.stack(fine).all().to(said).reshape(1), said[WEIGHT:]]))
        self._learner.hear(said[FIRST_VOTE:])

    def _plan(self, leaves: tuple[Any, ...]) -> Plan | None:
        """Return what was agreed upon of an optimizer's parameters; None where it is not what takes part now."""
        parameters = tuple(self._parameters[leaf] for leaf in leaves)
        own = [p for p, leaf in zip(parameters, leaves, strict=True) if leaf.requires_grad or leaf.grad is not None]
        plan = self._of.plan_of(parameters)
        if plan is None or len(own) != len(plan.sent) or any(a is not b for a, b in zip(own, plan.sent, strict=True)):
            return None
        self.agreed.append(Agreed(self._of, parameters, plan.buckets))
        return plan

    def _sent(self, bucket: Bucket, tail: Sequence[Tensor] = ()) -> Tensor:
        """Begin to add up a bucket."""
        pieces = [
            bucket.laid_out(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, order).reshape(-1)
            for leaf, order in zip((self._leaves[p] for p in bucket.parameters), bucket.orders, strict=True)
        ]
        flat = torch.cat([piece.to(bucket.dtype) for piece in (*pieces, *tail)])
        name = self._of.group.process_group.group_name
        begun: Tensor = torch.ops._c10d_functional.all_reduce(flat, "sum", name)
        return begun

    def _tail(self, plan: Plan, weight: float | Tensor, votes: Sequence[float | Tensor]) -> list[Tensor]:
        """Return what follows the gradients in the last bucket; see `Plan.tail`."""
        leaves = [self._leaves[parameter] for bucket in plan.buckets for parameter in bucket.parameters]
        device, dtype = leaves[0].device, plan.last.dtype
        used = torch.tensor([float(leaf.grad is not None) for leaf in leaves], dtype=dtype, device=device)
        said = [
            number.detach().to(dtype).reshape(1)
            if isinstance(number, Tensor)
            else torch.full((1,), number, dtype=dtype, device=device)
            for number in (0.0, float(plan.number), weight, *votes)
        ]
        return [used, *said]

    def _understood(self, plan: Plan, flat: Tensor) -> Tensor:
        """Return whether all have sent the same, with the gradients of the same parameters."""
        size, numbers = self._of.group.size, flat[-LENGTH:]
        used = flat[-LENGTH - len(plan.sent) : -LENGTH]
        # one that leaves the step out takes part with no gradient at all
        fine = (numbers[DIFFERS] == 0) & (numbers[NUMBER] == float(plan.number * size))
        alike = ((used == 0) | (used == float(size))).all() | (numbers[FIRST_VOTE + CANCEL] > 0)
        return fine & alike

    def _hand_out(self, bucket: Bucket, flat: Tensor) -> None:
        """Put the sums into ``grad``; a parameter without a gradient keeps none."""
        start = 0
        for parameter, order in zip(bucket.parameters, bucket.orders, strict=True):
            leaf = self._leaves[parameter]
            laid_out = bucket.laid_out(leaf.detach(), order)
            end = start + laid_out.numel()
            if leaf.grad is not None:
                leaf.grad = bucket.as_gradient(flat[start:end].view(laid_out.shape), order).to(leaf.grad.dtype)
            start = end


def check_told(fine: object, whose: str) -> None:
    """Raise unless all processes have understood each other.

    Args:
        fine: Whether they have.
        whose: The phase.

    Raises:
        OptimizerError: They update other parameters than one another.
    """
    if not fine:
        raise OptimizerError(
            f"the processes update other parameters than one another in a compiled step of {whose}; expected the same "
            "optimizers and the same parameters on every one: let no condition that only one of them sees decide what "
            "is trained, or say compiled = False in the phase's class"
        )
