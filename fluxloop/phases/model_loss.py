"""A model that computes its own loss, as those of transformers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import LossError, describe
from fluxloop.phases.objective import ObjectivePhase

if TYPE_CHECKING:
    from fluxloop.state import StepState


class ModelLossPhase(ObjectivePhase):
    """Train a model whose output says its loss, such as those of transformers.

    1. ``output = model(**batch)``: a dict is given by its names, a tuple or list in its order, anything else as it is.
    2. ``loss`` is ``output.loss`` or ``output["loss"]``, or the output itself where that is a scalar.

    Models: one. Batches: what the model takes. Entries: ``batch``, ``output``, ``preds`` where the output has
    ``logits``, ``ys`` where the batch has ``labels`` (so metrics of predictions and labels work), ``loss``. The events
    are those of `ObjectivePhase`. For validation, `ObjectiveValidationPhase` of it.

    A step weighs as many rows as its batch has. Where a loss is a mean over tokens, say so, and the means of an epoch
    are those of all tokens: ``def weight(self, state): return (state.ys[:, 1:] != -100).sum()``.

    Raises:
        LossError: The output has no loss.

    Example:
        >>> class Tagger(torch.nn.Linear):
        ...     def forward(self, inputs, labels=None):
        ...         logits = super().forward(inputs)
        ...         loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        ...         return {"loss": loss, "logits": logits}
        >>> rows = {"inputs": torch.randn(64, 4), "labels": torch.arange(64) % 2}
        >>> learner = Learner(Tagger(4, 2), data=(rows,), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics(accuracy)])
        >>> history = learner.fit(1, phases=[ModelLossPhase()])
        >>> sorted(history.metrics[ModelLossPhase]), learner.predict({"inputs": rows["inputs"]})["logits"].shape
        (['accuracy', 'loss'], torch.Size([64, 2]))
    """

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``batch``, and ``ys`` where it has labels."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        return {"batch": batch} if labels is None else {"batch": batch, "ys": labels}

    def forward(self, learner: Any, state: StepState) -> None:
        """Call the model with the batch."""
        batch = state.batch
        if isinstance(batch, Mapping):
            state.output = learner.model(**batch)
        elif isinstance(batch, (tuple, list)):
            state.output = learner.model(*batch)
        else:
            state.output = learner.model(batch)
        logits = _entry(state.output, "logits")
        if logits is not None:
            state.preds = logits

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Return the loss that the output says.

        Raises:
            LossError: It says none.
        """
        output = state.output
        loss = output if isinstance(output, Tensor) else _entry(output, "loss")
        if not isinstance(loss, Tensor):
            given = list(state.batch) if isinstance(state.batch, Mapping) else describe(state.batch)
            raise LossError(
                f"{type(learner.model).__name__} gave {describe(output)} without a loss for a batch with {given}; "
                "expected output.loss, output['loss'] or a scalar. Models of transformers compute a loss where the "
                "batch has 'labels': data=({'input_ids': ..., 'labels': ...},); for another write an ObjectivePhase"
            )
        return loss

    def check(self, learner: Any) -> None:
        """Raise for a learner with several models.

        Raises:
            LossError: It has several.
        """
        super().check(learner)
        if not callable(learner.model):
            raise LossError(
                f"{type(self).__name__} runs one model that says its loss, and the learner has "
                f"{sorted(map(str, learner.models))}; write an ObjectivePhase whose loss(learner, state) calls them"
            )


def _entry(output: Any, name: str) -> Any:
    """Return an entry of a model's output by its name, or None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
