"""Step some parameters of an optimizer before the others, with the result of one step of all; who cannot is refused."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fluxloop.compute.fused import ADAMS
from fluxloop.errors import OptimizerError
from fluxloop.persist.sameness import same_bits
from fluxloop.randomness import preserved

Step = Callable[[Optimizer], object]

STEPPERS: tuple[type[Optimizer], ...] = (
    *ADAMS,
    *(
        getattr(torch.optim, name)
        for name in (
            *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop"),
            *("SGD", "SparseAdam"),
        )
        if hasattr(torch.optim, name)  # older releases lack some
    ),
)
"""Torch's optimizers that step each parameter by its own gradient and state alone. Any other one is tried out."""

TRIED_STEPS = 12
"""How many steps of an unknown optimizer are compared: some do something else in every fifth or tenth."""


class Apart:
    """One step of an optimizer in several parts.

    The optimizer is shown groups with a few of its parameters, and the options with which the step began. So
    its class does the arithmetic, its `state` is the one that checkpoints keep, and an option that it counts up,
    as some do in their groups, is counted once in a step.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = optimizer.param_groups
        self._options = [_options(group) for group in self.groups]
        self._changed: dict[int, dict[str, Any]] = {}
        """Options that steps have changed, by the number of each group of which something was stepped."""

    def step(self, chosen: Mapping[int, Sequence[Tensor]], step: Step) -> None:
        """Step some parameters.

        Args:
            chosen: They, by the number of their group.
            step: Steps an optimizer.
        """
        shown = {number: {**self._options[number], "params": [*params]} for number, params in chosen.items()}
        self.optimizer.param_groups = [*shown.values()]
        try:
            step(self.optimizer)
        finally:
            self.optimizer.param_groups = self.groups
        for number, group in shown.items():
            before, changed = self._options[number], self._changed.setdefault(number, {})
            for name, value in group.items():
                if name != "params" and (name not in before or before[name] is not value):
                    changed[name] = value

    def end(self, step: Step) -> None:
        """Step the groups of which nothing was stepped, as a step of all does; then keep the options that it changed.

        Args:
            step: Steps an optimizer.
        """
        left = {number: group["params"] for number, group in enumerate(self.groups) if number not in self._changed}
        if left:
            self.step(left, step)
        for number, changed in self._changed.items():
            self.groups[number].update(changed)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def require_apart(optimizer: Optimizer, label: str) -> None:
    """Raise for an optimizer that cannot step its parameters one after another.

    Of torch's it is known. Of others a copy with a few of the parameters is stepped both ways, with random
    gradients.

    Args:
        optimizer: The optimizer.
        label: What it is called.

    Raises:
        OptimizerError: It cannot; says why.
    """
    kind = type(optimizer)
    why = None
    if any(group.get("differentiable") for group in optimizer.param_groups):
        why = "is differentiable=True, and its step is to be a part of a graph"
    elif isinstance(optimizer, torch.optim.LBFGS):
        why = "takes all parameters for one vector, and computes gradients by a closure"
    elif kind not in STEPPERS:
        why = _tried(optimizer)
    if why is not None:
        raise OptimizerError(
            f"Accelerator(optimizer_in_backward=True) steps each parameter as soon as its gradient is complete, and "
            f"{label}, {kind.__name__}, {why}; expected one that steps each parameter by its own gradient, such as "
            "torch.optim.AdamW, or optimizer_in_backward=False"
        )


def _tried(optimizer: Optimizer) -> str | None:
    """Step a copy with all parameters at once and another with one after another; return what differs, if anything."""
    chosen = _few(optimizer)
    with preserved():
        try:
            together, apart = _copy(optimizer, chosen), _copy(optimizer, chosen)
            for number in range(TRIED_STEPS):
                gradients = _gradients(together, number)
                torch.manual_seed(number)
                _step_together(together, gradients)
                torch.manual_seed(number)
                _step_apart(apart, gradients)
            differing = _differing(together, apart)
        except Exception as error:
            said = str(error).strip().splitlines()
            if "closure" in str(error):
                return "computes gradients by a closure"
            return f"could not be tried out ({type(error).__name__}: {said[0] if said else ''})"
    return None if differing is None else f"steps them otherwise alone than all at once ({differing} differ)"


def _few(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    """Choose a few small parameters of each group: two, and one of each number of dimensions."""
    chosen = []
    for group in optimizer.param_groups:
        by_size = sorted(group["params"], key=Tensor.numel)
        kinds = {parameter.ndim: parameter for parameter in reversed(by_size)}
        chosen.append([p for p in group["params"] if any(p is each for each in (*kinds.values(), *by_size[:2]))])
    return chosen


def _copy(optimizer: Optimizer, chosen: list[list[nn.Parameter]]) -> Optimizer:
    """Copy an optimizer with some of its parameters; a new one in double precision, where small differences show."""
    fresh = not any(optimizer.state.values())
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(torch.float64 if fresh and p.dtype is torch.float32 else p.dtype, copy=True))
        for params in chosen
        for p in params
    }
    made: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name not in ("state", "param_groups", "step"):  # a scheduler of torch's wraps `step`
            made.__dict__[name] = copy.deepcopy(value, memo)
    made.state = defaultdict(dict)
    for key, entries in optimizer.state.items():
        if id(key) in memo or not isinstance(key, Tensor):  # some keep what is of all parameters under a name
            made.state[memo.get(id(key), key)] = copy.deepcopy(entries, memo)
    made.param_groups = [
        {**copy.deepcopy(_options(group), memo), "params": [memo[id(p)] for p in params]}
        for group, params in zip(optimizer.param_groups, chosen, strict=True)
    ]
    train = getattr(made, "train", None)
    if callable(train):
        train()
    return made


def _parameters(optimizer: Optimizer) -> list[tuple[int, nn.Parameter]]:
    return [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]


def _gradients(optimizer: Optimizer, number: int) -> list[Tensor]:
    """Draw gradients, of another size in each step and for each parameter: so bounds and means of all of them show."""
    torch.manual_seed(1000 + number)
    sizes = (1.0, 1e2, 1e-2)
    return [
        torch.randn_like(parameter) * sizes[number % 3] * sizes[place % 3]
        for place, (_, parameter) in enumerate(_parameters(optimizer))
    ]


def _step_together(optimizer: Optimizer, gradients: list[Tensor]) -> None:
    for (_, parameter), gradient in zip(_parameters(optimizer), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for _, parameter in _parameters(optimizer):
        parameter.grad = None


def _step_apart(optimizer: Optimizer, gradients: list[Tensor]) -> None:
    """Step the last parameter first, as a backward pass does: one that draws draws other numbers for each then."""
    parts = Apart(optimizer)
    for (number, parameter), gradient in zip(reversed(_parameters(optimizer)), reversed(gradients), strict=True):
        parameter.grad = gradient.clone()
        parts.step({number: [parameter]}, lambda each: each.step())
        parameter.grad = None
    parts.end(lambda each: each.step())


def _of_all(optimizer: Optimizer) -> dict[Any, Any]:
    return {key: entries for key, entries in optimizer.state.items() if not isinstance(key, Tensor)}


def _differing(one: Optimizer, other: Optimizer) -> str | None:
    """Return what of two optimizers differs after the same steps; None where all is the same to the bit."""
    pairs = list(zip(_parameters(one), _parameters(other), strict=True))
    if not all(same_bits(p.detach(), q.detach()) for (_, p), (_, q) in pairs):
        return "weights"
    for (_, p), (_, q) in pairs:
        if not same_bits(one.state.get(p, {}), other.state.get(q, {})):
            return "states"
    if not same_bits(_of_all(one), _of_all(other)):
        return "states of all parameters together"
    for group, group_apart in zip(one.param_groups, other.param_groups, strict=True):
        if not same_bits(_options(group), _options(group_apart)):
            return "options"
    plain = (bool, int, float, str, Tensor)
    for name, value in vars(one).items():
        if isinstance(value, plain) and name != "_opt_called" and not same_bits(value, vars(other).get(name)):
            return f"values of its attribute {name!r}"
    return None
