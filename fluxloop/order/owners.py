"""Who owns what of a learner, so that a checkpoint keeps nothing twice, and nothing for the wrong owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.nested import local_part
from fluxloop.order.view import LearnerView
from fluxloop.persist.owners import Owners
from fluxloop.persist.plain import phase_id

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner


def owners_of(learner: RunLearner) -> Owners:
    """Return the owners of what a learner holds: models and their tensors, optimizers, callbacks, phases, data."""
    named: list[tuple[str, Any]] = [("learner", learner), ("learner.accelerator", learner.accelerator)]
    modules = dict(learner.models)
    roots = [*((f"model.{name}" if name else "model", m) for name, m in modules.items())]
    roots += [(f"view {'.'.join(map(str, path))}", m) for path, m in learner.weights.views.items()]
    if isinstance(learner.loss_fn, nn.Module):
        roots.append(("loss_fn", learner.loss_fn))
    places: list[int] = []
    for root, module in roots:
        named += [(f"{root}.{path}".rstrip("."), part) for path, part in module.named_modules()]
        for path, tensor in (*module.named_parameters(), *module.named_buffers()):
            named.append((f"{root}.{path}", tensor))
            # A view of a weight, or its `data`, is another object in the same memory. Sparse tensors have no storage,
            # and lazy ones have none yet.
            if not is_lazy(tensor) and tensor.layout is torch.strided and local_part(tensor).numel():
                places.append(local_part(tensor).untyped_storage().data_ptr())
    named += [(f"optimizer {slot.name or ''}", slot.optimizer) for slot in learner.updates.slots]
    named += [(f"cbstate.{name}", value) for name, value in vars(learner.cbstate).items()]
    named += [("cbstate", learner.cbstate), ("history", learner.history), ("step", learner.step)]
    named += [(f"data.{key}", source) for key, source in vars(learner.data).items()] + [("data", learner.data)]
    named += [(f"callback {node.id}", node.callback.unwrapped) for node in learner.callbacks.graph.nodes]
    # Wrappers have no name: the first name of a thing counts, so a callback that is not wrapped keeps its own
    named += [("", each) for each in learner.callbacks.given()]
    named += [(f"phase {phase_id(phase)}", phase) for phase in learner.phases.values()]
    named += [("", kept.thing) for kept in learner._ledger.phases]
    return Owners(named, places, (LearnerView,))
