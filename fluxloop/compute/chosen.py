"""Which updates a learner makes: plain ones, those of windows, of sharded parameters, or inside the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fluxloop.compute.optimizers import Optimizers
from fluxloop.compute.updates import Updates

if TYPE_CHECKING:
    from fluxloop.interfaces import StepLearner


def updates_of(learner: StepLearner, names: dict[nn.Parameter, str], optimizers: Optimizers) -> Updates:
    """Make the updates that a learner's accelerator asks for: plain ones, where nothing is asked for.

    Args:
        learner: The learner.
        names: The names of all parameters.
        optimizers: By name.
    """
    if learner.accelerator.sharding is not None:
        from fluxloop.compute.sharded_updates import ShardedUpdates  # takes a while, and most learners need none of it

        return ShardedUpdates(learner, names, optimizers)
    if learner.accelerator.optimizer_in_backward:
        from fluxloop.compute.in_backward import UpdatesInBackward  # as above

        return UpdatesInBackward(learner, names, optimizers)
    if learner.accelerator.is_plain:
        return Updates(learner, names, optimizers)
    from fluxloop.compute.windows import WindowedUpdates  # as above

    return WindowedUpdates(learner, names, optimizers)
