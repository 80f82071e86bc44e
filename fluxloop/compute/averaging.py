"""The gradients of several processes are added up, in buckets that are sent while the backward pass still runs."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxloop.compute.buckets import Bucket, BucketSizes, fill
from fluxloop.compute.gradients import divisor
from fluxloop.errors import LossError, OptimizerError
from fluxloop.processes import sums as adding
from fluxloop.processes.group import Group

VOTES = 4
"""How many votes fit into a message."""

DIFFERS, NUMBER, WEIGHT, FIRST_VOTE = 0, 1, 2, 3
"""What stands where in the numbers that end a message."""
LENGTH = FIRST_VOTE + VOTES
"""How many there are."""

_requires_grad = attrgetter("requires_grad")


class Sums(NamedTuple):
    """What all processes together have said.

    Attributes:
        weights: For each tuple of parameters the summed weight: a number on the CPU, elsewhere a tensor on the device.
        votes: The summed votes; numbers on the CPU, elsewhere a tensor on the device.
    """

    weights: list[float | Tensor]
    votes: list[float] | Tensor


class Averager:
    """Adds up the gradients of all processes.

    What is sent is ``parameter.grad`` as it stands when the backward pass ends: also what was added to
    it by passes before, or put there by hand. A parameter that has no gradient in any process keeps
    none; one that has some in one process gets the sum in all. Each sum is a new tensor, so that
    whoever holds a gradient from before keeps what it was.

    Which parameters are sent in which bucket is agreed upon when a tuple of parameters is first seen,
    and again when other parameters of it require gradients; until then the old buckets are sent. So no
    process ever waits for a message of another size than the others send.

    Args:
        group: The processes.
        name_of: Says what a parameter is called in messages.
        sizes: How much is sent in one message.
        collective: Whether steps are compiled: see `fluxloop.processes.sums.Sums`; and no parameter is hooked.
    """

    def __init__(
        self,
        group: Group,
        name_of: Callable[[nn.Parameter], str | None] | None = None,
        *,
        sizes: BucketSizes | None = None,
        collective: bool = False,
    ) -> None:
        self.group = group
        self._collective = collective
        self._adds = adding.Sums(group, collective=collective)
        self._name_of = name_of
        self._sizes = sizes or BucketSizes()
        self._plans: dict[int, Plan] = {}
        """By the identity of the tuple's first parameter: the optimizers of a learner share none."""
        self._sets: Sequence[tuple[nn.Parameter, ...]] = ()
        self._armed: list[Bucket] = []
        self._next = 0
        """Which of the armed buckets is sent next."""
        self._late: deque[tuple[torch.Event, Tensor, list[Plan]]] = deque()
        self.messages = 0
        """How many messages of gradients have been sent."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Averager:
        """Return one without plans: those of the copied parameters are agreed upon when they are first sent."""
        name_of = copy.deepcopy(self._name_of, memo)
        return Averager(self.group, name_of, sizes=self._sizes, collective=self._collective)

    @property
    def num_buckets(self) -> int:
        """How many buckets the gradients of all optimizers have."""
        return sum(len(plan.buckets) for plan in self._plans.values())

    def plan_of(self, parameters: tuple[nn.Parameter, ...]) -> Plan | None:
        """Return what was agreed upon for a tuple of parameters when it was last sent; None if that is yet to come."""
        plan = self._plans.get(id(parameters[0]) if parameters else 0)
        return plan if plan is not None and plan.agreed else None

    def watching(self, sets: Sequence[tuple[nn.Parameter, ...]]) -> Averager:
        """Send buckets while a backward pass fills them: ``with averager.watching(sets): ...``, then `finish`.

        Args:
            sets: The parameters of each optimizer whose gradients are complete after the pass.

        Raises:
            RuntimeError: The pass before failed after a part of its gradients had been sent.
        """
        if self._next:
            raise RuntimeError(
                "a backward pass ended in an error after a part of its gradients had been sent to the other processes, "
                "which wait for the rest; start all processes again, from the last checkpoint"
            )
        self._sets = sets
        return self

    def __enter__(self) -> None:
        """Arm the buckets."""
        self._armed = []
        for parameters in self._sets:
            plan = self._plans.get(id(parameters[0]) if parameters else 0)
            if plan is None or not plan.agreed:  # which is what `finish` does
                self._armed = []
                return
            self._armed += plan.early
        for bucket in self._armed:
            bucket.arm(self._send_ready)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disarm them."""
        for bucket in self._armed:
            bucket.disarm()

    def _send_ready(self) -> None:
        """Send the buckets that are full, in the one order that all processes keep."""
        while self._next < len(self._armed) and self._armed[self._next].is_full:
            bucket = self._armed[self._next]
            self._next += 1
            bucket.collect()
            self._send(bucket)

    def _send(self, bucket: Bucket, tail: Sequence[Tensor] = ()) -> None:
        bucket.send(self._adds, tail)
        self.messages += 1

    def reduce(
        self,
        sets: Sequence[tuple[nn.Parameter, ...]],
        weights: Sequence[float | Tensor],
        votes: Sequence[float] | Tensor = (),
        *,
        scales: Sequence[float] | None = None,
    ) -> Sums:
        """Add up gradients that are complete without a backward pass; see `finish`.

        Args:
            sets: The parameters of each optimizer.
            weights: One for each.
            votes: Numbers that are added up as well, at most `VOTES`.
            scales: What the losses were multiplied by, for each.
        """
        with self.watching(sets):
            pass
        return self.finish(weights, votes, scales=scales)

    def finish(
        self,
        weights: Sequence[float | Tensor],
        votes: Sequence[float] | Tensor = (),
        *,
        scales: Sequence[float] | None = None,
    ) -> Sums:
        """Send what is missing, wait for all, and put the sums into ``grad``.

        Args:
            weights: One for each tuple of parameters that was given to `watching`: numbers, or tensors of one element.
            votes: Numbers that are added up as well, at most `VOTES`.
            scales: What the losses were multiplied by, for each tuple. Where they are given, gradients are divided by
                the summed weight and by them: so they are those of the weighted mean over all processes. Else they
                are sums.

        Returns:
            The summed weights and votes.

        Raises:
            OptimizerError: The processes train different parameters, or other optimizers than one another.
            LossError: A gradient is of a kind that cannot be sent. In both cases no gradient is changed.
            ValueError: There are more votes.
        """
        if len(votes) > VOTES:
            raise ValueError(f"{len(votes)} votes were given; expected at most {VOTES}")
        if self._late:
            self._check_late()
        plans = [self._plan(parameters) for parameters in self._sets]
        fresh = [plan for plan in plans if not plan.agreed]
        if fresh:
            self._agree(fresh)
        said = self._exchange(plans, weights, votes)
        if said is None:
            self._agree(plans)  # nobody's gradients have changed yet: they are sent once more, in the new buckets
            said = self._exchange(plans, weights, votes)
            assert said is not None  # for type checkers: nothing differs in plans that are new
        for place, plan in enumerate(plans):
            plan.hand_out(None if scales is None else divisor(said.weights[place], scales[place]))
        return said

    def _plan(self, parameters: tuple[nn.Parameter, ...]) -> Plan:
        """Return what is known of a tuple of parameters."""
        key = id(parameters[0]) if parameters else 0
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan(parameters, len(self._plans) + 1)
        plan.parameters = parameters  # a group may have been added
        return plan

    def _exchange(
        self, plans: list[Plan], weights: Sequence[float | Tensor], votes: Sequence[float] | Tensor
    ) -> Sums | None:
        """Send what has not been sent and wait for all of it; return None if the buckets have to be agreed upon."""
        # Each update comes through here: what is rare is asked for by a cheap test, and generators are left out.
        start, self._next = self._next, 0
        if len(plans) > 1 or plans[0].early:
            for bucket in [bucket for plan in plans for bucket in plan.early][start:]:
                bucket.collect()
                self._send(bucket)
        differs, last_plan = False, plans[-1]
        for plan, weight in zip(plans, weights, strict=True):
            last = plan.last
            last.collect()
            tail, differ = plan.tail(weight, votes if plan is last_plan else ())
            self._send(last, tail)
            differs = differs or differ
        for plan in plans:
            for bucket in plan.buckets:
                bucket.receive()
        return self._read(plans, len(votes), differs)

    def _read(self, plans: list[Plan], count: int, differs: bool) -> Sums | None:
        """Read what all have said; return None if somebody's plan differs."""
        said = [plan.last.flat[-LENGTH:] for plan in plans]
        if said[0].is_cpu:
            numbers = [tensor.tolist() for tensor in said]
            if self._differ(numbers, plans):
                return None
            return Sums([entry[WEIGHT] for entry in numbers], numbers[-1][FIRST_VOTE : FIRST_VOTE + count])
        sums = Sums([tensor[WEIGHT] for tensor in said], said[-1][FIRST_VOTE : FIRST_VOTE + count])
        if not differs:  # to read it would wait for the device: it is read in a call after this
            late = torch.stack([tensor[:WEIGHT].double() for tensor in said]).to("cpu", non_blocking=True)
            arrived = torch.Event(said[0].device)
            arrived.record()
            self._late.append((arrived, late, plans))
            return sums
        numbers = [tensor.tolist() for tensor in said]
        if not self._differ(numbers, plans):
            return sums
        if any(0 < entry[DIFFERS] < self.group.size for entry in numbers):
            raise self._one_sided()  # the others will read it in a call after this
        return None

    def _differ(self, numbers: list[list[float]], plans: list[Plan]) -> bool:
        """Return whether somebody has another plan.

        Raises:
            OptimizerError: Other optimizers were updated there.
        """
        differ = False
        for entry, plan in zip(numbers, plans, strict=True):
            if entry[NUMBER] != plan.number * self.group.size:
                raise OptimizerError(
                    f"process {self.group.rank} updates the optimizer of {self._name(plan.parameters, 0)!r} and "
                    "another process one of other parameters; expected the same updates in the same order on every "
                    "one: let no condition decide about a block or learner.update() that only one of them sees"
                )
            differ = differ or entry[DIFFERS] != 0
        return differ

    def _check_late(self) -> None:
        """Read what was said in calls before that did not wait for it, as far as the device has come."""
        while self._late and self._late[0][0].query():
            _, late, plans = self._late.popleft()
            if self._differ(late.tolist(), plans):
                raise self._one_sided()

    def _one_sided(self) -> OptimizerError:
        return OptimizerError(
            "a part of the processes has begun to train other parameters than the rest; expected that parameters are "
            "frozen, unfrozen and added on every process alike, before the same step"
        )

    def _agree(self, plans: list[Plan]) -> None:
        """Make new buckets of what requires gradients now, which has to be the same everywhere.

        Raises:
            OptimizerError: The processes train different parameters.
            LossError: A gradient is of a kind that cannot be sent.
        """
        mine = [self._standing(plan) for plan in plans]
        everybody: list[list[_Standing]] = self.group.gather_objects(mine)
        lengths = [len(said) for said in everybody]
        if len(set(lengths)) > 1:
            raise OptimizerError(f"the processes update different numbers of optimizers at once: {lengths}")
        for plan, said in zip(plans, zip(*everybody, strict=True), strict=True):
            for rank, standing in enumerate(said):
                if standing.refused:
                    raise LossError(f"{standing.refused} (process {rank})")
            _compare([standing.trained for standing in said])
            left = set(chain.from_iterable(standing.left for standing in said))
            plan.make(
                [p for i, p in enumerate(plan.parameters) if p.requires_grad or i in left],
                self._sizes,
                hooks=not self._collective,  # a graph cannot be looked into
            )

    def _standing(self, plan: Plan) -> _Standing:
        """Say what this process is about to send."""
        trained = {
            f"{self._name(plan.parameters, i)}": f"shape {tuple(p.shape)}, {p.dtype}"
            for i, p in enumerate(plan.parameters)
            if p.requires_grad
        }
        left = [i for i, p in enumerate(plan.parameters) if not p.requires_grad and p.grad is not None]
        refused = ""
        for i, parameter in enumerate(plan.parameters):
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                refused = (
                    f"the gradient of {self._name(plan.parameters, i)!r} is sparse, and several processes can only add "
                    "up dense ones: build its layer with sparse=False, as nn.Embedding(..., sparse=False), and use "
                    "Adam in place of SparseAdam"
                )
            elif parameter.device != plan.parameters[0].device or type(parameter.data) is not Tensor:
                refused = (
                    f"{self._name(plan.parameters, i)!r} is a {type(parameter.data).__name__} on {parameter.device}, "
                    f"and {self._name(plan.parameters, 0)!r} is on {plan.parameters[0].device}; several processes need "
                    "all parameters of an optimizer on one device, as plain tensors: leave it to "
                    "Accelerator(strategy=...) where they are"
                )
        return _Standing(trained, left, refused)

    def _name(self, parameters: Sequence[nn.Parameter], index: int) -> str:
        if not parameters:
            return "no parameter"
        name = None if self._name_of is None else self._name_of(parameters[index])
        return name or f"parameter {index}"


class _Standing(NamedTuple):
    """What a process is about to send of a tuple of parameters.

    Attributes:
        trained: What requires a gradient: by name, with shape and type.
        left: The places of what does not, and has a gradient from before it was frozen.
        refused: Why it cannot be sent; empty if it can.
    """

    trained: dict[str, str]
    left: list[int]
    refused: str


class Plan:
    """Which parameters of a tuple are sent in which buckets.

    Args:
        parameters: Those of an optimizer, frozen ones too.
        number: Which of the tuples this is; the same on all processes.
    """

    def __init__(self, parameters: tuple[nn.Parameter, ...], number: int) -> None:
        self.parameters = parameters
        self.number = number
        self.sent: tuple[nn.Parameter, ...] = ()
        self.buckets: list[Bucket] = []
        self.early: list[Bucket] = []
        """Those that can be sent before the last gradient is there."""
        self.agreed = False
        self.new = False
        """Whether it was agreed upon in this call. So nothing differs; and hooks may have come after the pass began."""

    def __del__(self) -> None:
        """Take the hooks from parameters that live on."""
        for bucket in self.buckets:
            bucket.forget()

    def make(self, sent: list[nn.Parameter], sizes: BucketSizes, *, hooks: bool) -> None:
        """Make the buckets."""
        for bucket in self.buckets:
            bucket.forget()
        self.sent = tuple(sent)
        self.buckets = fill(sent, sizes)
        self.early, self.last = self.buckets[:-1], self.buckets[-1]
        self.agreed = self.new = True
        for bucket in self.early if hooks else ():
            bucket.hook()
        self._dtype = self.last.dtype
        device = self.parameters[0].device if self.parameters else None
        self._all_used = torch.ones(len(sent), dtype=self._dtype, device=device)
        self._numbers: list[float] = []
        self._said = self._all_used

    def tail(self, weight: float | Tensor, votes: Sequence[float] | Tensor) -> tuple[list[Tensor], bool]:
        """Return what follows the gradients in the last bucket, and whether this process's plan differs.

        It is a number for each parameter, 1 where it has a gradient; and whether other parameters take
        part now, the plan's number, the weight, the votes.
        """
        own = self.parameters
        if not all(map(_requires_grad, own)):
            own = tuple(p for p in own if p.requires_grad or p.grad is not None)
        same = self.new or (len(own) == len(self.sent) and all(map(is_, own, self.sent)))
        differs, unused = not same, False
        for bucket in self.buckets:
            unused, differs = unused or bool(bucket.unused), differs or bucket.refused
        flags = self._all_used
        if unused:
            start, places = 0, []
            for bucket in self.buckets:
                places += [start + place for place in bucket.unused]
                start += len(bucket.parameters)
            flags = flags.index_fill(0, torch.tensor(places, device=flags.device), 0)
        numbers = [float(differs), float(self.number), 0.0, *[0.0] * VOTES]
        if not isinstance(weight, Tensor):
            numbers[WEIGHT] = weight
        if not isinstance(votes, Tensor):
            numbers[FIRST_VOTE : FIRST_VOTE + len(votes)] = votes
        if numbers != self._numbers:
            self._said = torch.tensor(numbers, dtype=self._dtype).to(flags.device)
            self._numbers = numbers
        said = self._said
        if isinstance(weight, Tensor) or isinstance(votes, Tensor):
            said = said.clone()
            if isinstance(weight, Tensor):
                said[WEIGHT] = weight.detach().reshape(())
            if isinstance(votes, Tensor):
                said[FIRST_VOTE : FIRST_VOTE + len(votes)] = votes.detach()
        return [flags, said], differs

    def hand_out(self, divisor: float | Tensor | None) -> None:
        """Put the sums into ``grad``, divided by something."""
        self.new = False
        used: list[float] | None = None
        start = 0
        for bucket in self.buckets:
            if bucket.unused:
                used = used or self.last.flat[-LENGTH - len(self.sent) : -LENGTH].tolist()
                bucket.hand_out({place for place in bucket.unused if not used[start + place]}, divisor)
            else:
                bucket.hand_out((), divisor)
            start += len(bucket.parameters)


def _compare(trained: list[dict[str, str]]) -> None:
    """Raise if the processes train different parameters.

    Raises:
        OptimizerError: Names one, and the processes.
    """
    for name in dict.fromkeys(chain.from_iterable(trained)):
        kinds = [said.get(name) for said in trained]
        if len(set(kinds)) == 1:
            continue
        without = [rank for rank, kind in enumerate(kinds) if kind is None]
        if without:
            others = [rank for rank, kind in enumerate(kinds) if kind is not None]
            what = f"{name!r} is trained by the processes {others} and not by {without}"
        else:
            what = f"{name!r} differs: " + ", ".join(f"{kind} in process {i}" for i, kind in enumerate(kinds))
        raise OptimizerError(
            f"the processes train different parameters: {what}. Expected the same on every one: freeze, unfreeze and "
            "add parameters on all of them before the same step, and let no condition decide that only one of them sees"
        )
