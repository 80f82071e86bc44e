"""What a loss reaches through its graph: which parameters it has gradients for, and why it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxloop.compute.slots import Slot
from fluxloop.errors import LossError, describe
from fluxloop.state import StepState

IN_INFERENCE_MODE = "torch.inference_mode() is on, and it makes no graph; expected the training outside of that block"


def loss_error(loss: object, whose: str) -> LossError:
    """Make the error for a loss that is no real scalar, or that has no gradient.

    Args:
        loss: The loss.
        whose: What follows "the loss" in the message: " of optimizer 'D'".
    """
    if not isinstance(loss, Tensor):
        return LossError(f"the loss{whose} is {describe(loss)}; expected a tensor with one element")
    if loss.numel() != 1:
        return LossError(
            f"the loss{whose} has shape {tuple(loss.shape)}; expected a scalar: reduce it with .mean() or .sum(), "
            "or give the loss function reduction='mean'"
        )
    if loss.is_complex():
        return LossError(f"the loss{whose} is complex ({loss.dtype}); expected a real number: loss.abs() or loss.real")
    if torch.is_inference_mode_enabled():
        why = IN_INFERENCE_MODE
    elif not torch.is_grad_enabled():
        why = "gradients are off here: is this a validation phase, or a torch.no_grad() block?"
    else:
        why = "it was detached, computed from constants, or everything it depends on is frozen"
    return LossError(f"no gradient can be computed from the loss{whose}: {why}")


def leaks(
    names: Mapping[nn.Parameter, str], slots: Sequence[Slot], slot: Slot, loss: Tensor, state: StepState
) -> list[str]:
    """Say where a block's loss reaches the parameters of other optimizers.

    Inside the block those are frozen, so it can only be through what was computed before it: an
    entry that should have been detached.

    Args:
        names: Of all parameters.
        slots: All optimizers.
        slot: The block's.
        loss: The block's.
        state: The entries of the step.
    """
    # The graph itself is walked, as a backward pass would change gradients, and release the graph that the block needs.
    own, reached = set(slot.parameters), reached_by(loss)
    foreign = [p for p in names if p in reached and p not in own]
    if not foreign:
        return []
    owner = {p: other.label for other in slots for p in other.parameters}
    nodes = _nodes(loss)
    through = [
        f"step.{name}"
        for name, value in vars(state).items()
        if isinstance(value, Tensor)
        and value is not loss
        and value.grad_fn in nodes
        and not reached_by(value).isdisjoint(foreign)
    ]
    where = f" through {', '.join(through)}; write .detach() there" if through else "; detach it"
    return [
        f"the loss of {slot.label} also reaches {len(foreign)} parameters of {owner.get(foreign[0], 'no optimizer')} "
        f"({names[foreign[0]]}, …){where}: the extra gradients are not used, but cost a backward pass"
    ]


def reached_by(tensor: Tensor) -> set[Tensor]:
    """Collect the leaves that a tensor's gradient reaches."""
    return {leaf for node in _nodes(tensor) if (leaf := getattr(node, "variable", None)) is not None}


def _nodes(tensor: Tensor) -> set[object]:
    """Collect the nodes of a tensor's autograd graph."""
    todo: list[Any] = [tensor.grad_fn]
    seen: set[object] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(next_node for next_node, _ in node.next_functions)
    return seen


def unclear_owner(names: Sequence[str | None], second: bool) -> LossError:
    """Return the error of a loss that nobody knows the owner of.

    Args:
        names: Those of the optimizers.
        second: Whether it is the second loss of one step.
    """
    what = "called twice in one step" if second else "called while gradients of another loss wait"
    return LossError(
        f"learner.backward was {what}, and the learner has the optimizers {[*names]}: both losses would reach all of "
        f"them. Say whose loss it is:\n    with learner.optimizing({names[0]!r}) as block:\n        block.loss = ..."
    )
