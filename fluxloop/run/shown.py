"""How a learner is shown: as text, and as a page in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fluxloop.interfaces import RunLearner


class IsShown:
    """The methods of a learner that show it."""

    def __repr__(self: RunLearner) -> str:
        models = ", ".join(
            type(m).__name__ if name is None else f"{name}: {type(m).__name__}" for name, m in self.models.items()
        )
        return (
            f"Learner({models}; seed={self.seed}, {self.accelerator.device})\n"
            f"  data: {', '.join(vars(self.data)) or 'none'}\n"
            f"  callbacks: {' → '.join(self.callbacks.order) or 'none'}"
        )

    def _repr_html_(self: RunLearner) -> str:
        """Return a page for notebooks: models, optimizers, data, the order of the callbacks, and the history."""
        from fluxloop.screen.pages import page

        return page(f"Learner on {self.accelerator.device}, seed {self.seed}", *_parts(self))


def _parts(learner: RunLearner) -> Iterator[str]:
    """Yield what a learner has, each under a title that folds it up."""
    from fluxloop.order.explain import draw_arcs
    from fluxloop.screen.pages import table, titled

    models = [(name or "model", type(model).__name__, _size(model)) for name, model in learner.models.items()]
    yield titled("Models", table(["name", "class", "parameters"], models, [2]))
    optimizers = [
        (slot.name or "optimizer", type(slot.optimizer).__name__, _rates(slot.optimizer))
        for slot in learner.updates.slots
    ]
    if optimizers:
        yield titled("Optimizers", table(["name", "class", "learning rate"], optimizers, [2]))
    data = [(key, type(source).__name__, _batches(source)) for key, source in vars(learner.data).items()]
    if data:
        yield titled("Data", table(["of", "class", "batches"], data, [2]))
    if learner.callbacks.order:
        yield titled("Callbacks, in their order", draw_arcs(learner.callbacks.graph))
    if learner.history.rows():
        yield titled("History", learner.history._repr_html_())


def _size(model: nn.Module) -> str:
    """Return how many numbers the parameters of a model have."""
    parameters = list(model.parameters())
    return "lazy" if any(map(is_lazy, parameters)) else f"{sum(p.numel() for p in parameters):,}"


def _rates(optimizer: Any) -> str:
    """Return the learning rates of an optimizer's groups, each once."""
    rates = [group["lr"] for group in optimizer.param_groups if group.get("lr") is not None]  # some know their own
    return ", ".join(dict.fromkeys(f"{float(rate):.4g}" for rate in rates)) or "-"


def _batches(source: Any) -> str:
    """Return how many batches a source says that it has."""
    try:
        return f"{len(source):,}"
    except (TypeError, ValueError, NotImplementedError):  # a DataLoader over an IterableDataset has one that raises
        return "unknown"
