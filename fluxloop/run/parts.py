"""The parts of a learner: what may be assigned to it, and what becomes of new modules and parameters."""

from __future__ import annotations

from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from fluxloop.compute.models import arrange_like
from fluxloop.compute.optimizers import parameter_names
from fluxloop.data.loaders import name_data
from fluxloop.errors import AssignmentError, LossError, describe
from fluxloop.guard.assign import FIXED, check_known, put
from fluxloop.order.owners import owners_of
from fluxloop.persist.owners import of_learners
from fluxloop.persist.walk import Walk
from fluxloop.persist.watched import Watched
from fluxloop.state import State

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def accept(learner: RunLearner, name: str, value: Any, any_name: bool) -> Any:
    """Check what a user assigns to a learner, and return what takes its place there.

    Args:
        learner: The learner.
        name: The attribute.
        value: What was assigned.
        any_name: Whether the learner may get attributes that fluxloop does not know.

    Raises:
        AssignmentError: There is no such attribute, or it cannot be replaced; says what to type.
    """
    if name == "data":
        return _accept_data(learner, value)
    if name == "loss_fn":
        _accept_loss(learner, value)
    elif not any_name or name in FIXED:
        check_known(learner, name, value)
    return value


def _accept_data(learner: RunLearner, data: Any) -> State:
    """Name and load data that replaces the learner's.

    Raises:
        AssignmentError: An epoch or a fit is running.
        DataError: It cannot be loaded.
    """
    if learner._running.fitting or learner._running.phase is not None:
        raise AssignmentError(
            "learner.data was assigned during a fit or an epoch, which ends with the data it began with; give it "
            "to the next one: learner.fit(epochs, data), or end this one first: learner.request_stop('new data')"
        )
    return data if isinstance(data, State) else name_data(data)


def _accept_loss(learner: RunLearner, loss_fn: Any) -> None:
    """Prepare a loss function that replaces the learner's.

    Raises:
        LossError: It is none.
        OptimizerError: It has trainable parameters that are in no optimizer.
    """
    check_loss_fn(loss_fn)
    meet_parameters(learner, loss_fn)  # may refuse: so before the function is moved to a device and watched
    if isinstance(loss_fn, nn.Module) and loss_fn is not learner.loss_fn:
        learner.accelerator.place_model(loss_fn)
        learner.accelerator.shard_models({}, loss_fn)
        watch_module(learner, loss_fn)
    learner._ledger.loss = watch_loss(learner, loss_fn)


def check_loss_fn(loss_fn: object) -> None:
    """Raise for something that cannot be called as a loss function is.

    Raises:
        LossError: Says what was expected.
    """
    if loss_fn is not None and (not callable(loss_fn) or isinstance(loss_fn, type)):
        hint = f": {loss_fn.__name__}()" if isinstance(loss_fn, type) else ""
        raise LossError(
            f"loss_fn={describe(loss_fn)} was given; expected a function (preds, ys) -> scalar, or a module{hint}"
        )


def meet_parameters(learner: RunLearner, loss_fn: Any) -> None:
    """Note parameters that joined the models or a loss function, were replaced or unfrozen.

    Raises:
        OptimizerError: Trainable ones are in no optimizer; says what to type.
    """
    if learner.updates.rename(parameter_names(learner.models, loss_fn)):
        # Of the live models: while a phase runs averaged weights, learner.model is those
        params = arrange_like(learner.weights.given, {k: tuple(m.parameters()) for k, m in learner.models.items()})
        put(learner, "params", params)
        for module in learner.models.values():
            learner.accelerator.place_model(module)
            watch_module(learner, module)


def watch_module(learner: RunLearner, module: nn.Module) -> None:
    """Watch the new parts of a module, so that changes of their attributes are seen."""
    of_learners.update(module.modules())
    known = learner._ledger.modules.get(module)
    if known is None:
        parts = dict(module.named_modules())
        learner._ledger.modules[module] = Walk(parts, type(module).__name__, owners_of(learner), parts=True)
    else:
        known.join(dict(module.named_modules()), owners_of(learner))


def watch_loss(learner: RunLearner, loss_fn: object) -> Watched | None:
    """Watch a loss function that may have attributes; return None for others."""
    plain = loss_fn is None or isinstance(loss_fn, (nn.Module, BuiltinFunctionType))
    return None if plain else Watched(loss_fn, "loss_fn", owners_of(learner))
