"""The supervised phases: what ``fit`` runs unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxloop.errors import BatchError, LossError, PhaseError, describe
from fluxloop.events import BackwardBegin, BackwardEnd, LossBegin
from fluxloop.nested import arguments_among, as_written, call_with, fits_by_name
from fluxloop.phase import AbstractTrainingPhase, AbstractValidationPhase, Phase, without_names

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.state import StepState


def unpack(phase: Phase, batch: Any) -> tuple[Any, Any]:
    """Unpack a batch into ``(xs, ys)``; file names behind them are passed over.

    Raises:
        BatchError: It is no pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) != 2:
        batch = without_names(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise BatchError(
        f"{type(phase).__name__} was given {describe(batch)} as a batch; expected a pair (xs, ys). For "
        "tensors write data=((xs, ys),), or data=((xs, ys), (valid_xs, valid_ys)); for batches of another "
        "shape write a phase with entries(batch) and a body of its own"
    )


def check_supervised(phase: Phase, learner: Any) -> None:
    """Raise for a learner that cannot run a supervised phase.

    Raises:
        PhaseError: The learner has several models.
        LossError: The learner has no loss function.
    """
    if not callable(learner.model):
        raise PhaseError(
            f"{type(phase).__name__} runs one model, and the learner has {sorted(map(str, learner.models))}; "
            "write a phase that says what a step does with them: learner.fit(..., phases=[MyPhase()])"
        )
    if learner.loss_fn is None:
        raise LossError(
            f"{type(phase).__name__} needs a loss function, and the learner has none; "
            "give one: Learner(model, torch.nn.functional.cross_entropy, ...)"
        )


def runs(phase: Phase, cls: type[Phase]) -> bool:
    """Return whether a phase's step is that of a class: neither its step nor its body is its own."""
    return (type(phase).step, type(phase).body) == (cls.step, cls.body)


class TrainingPhase(AbstractTrainingPhase):
    """Supervised training: forward, loss, backward, update.

    Batches are pairs ``(xs, ys)``, of any nesting of tensors that the model and the loss function take.
    The events in order, and what the step stores by then:

    ===============  ===========================================
    `StepBegin`      ``xs``, ``ys``
    `LossBegin`      ``preds``, the model's output for ``xs``
    `BackwardBegin`  ``loss``, a scalar
    `BackwardEnd`    ``grads``, by the parameters' names
    `UpdateBegin`
    `UpdateEnd`
    `StepEnd`
    ===============  ===========================================

    Every stage reads the state again: what a callback puts there is used next.

    Raises:
        BatchError: A batch is no pair.
        PhaseError: The learner has several models.
        LossError: The learner has no loss function, or the loss is no scalar or has no gradient.

    Example:
        >>> learner = testing.toy_learner(Recorder(), num_batches=4)
        >>> learner.epoch(TrainingPhase())
        >>> sorted(vars(learner.step)), learner.history[TrainingPhase].steps
        (['grads', 'loss', 'preds', 'xs', 'ys'], 4)
    """

    stores_loss = True

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``xs`` and ``ys``.

        Raises:
            BatchError: The batch is no pair.
        """
        xs, ys = unpack(self, batch)
        return {"xs": xs, "ys": ys}

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Train on one batch.

        Raises:
            LossError: The loss is no scalar, or has no gradient.
        """
        state.preds = learner.model(state.xs)
        handle(LossBegin())
        state.loss = learner.loss_fn(state.preds, state.ys)
        handle(BackwardBegin())
        learner.backward(state.loss)
        handle(BackwardEnd())
        learner.update()

    def check(self, learner: Any) -> None:
        """Raise for a learner that this phase's own step cannot run; a subclass's step has its own needs."""
        if runs(self, TrainingPhase):
            check_supervised(self, learner)


class ValidationPhase(AbstractValidationPhase):
    """Supervised validation: forward and loss.

    Batches are pairs ``(xs, ys)``. The events in order, and what the step stores by then:
    `StepBegin` (``xs``, ``ys``), `LossBegin` (``preds``), `StepEnd` (``loss``).

    Args:
        name: What its numbers are called by; left out, the class's name.
        every: In a fit it runs in every so many cycles, and in the last one.

    Raises:
        BatchError: A batch is no pair.
        PhaseError: The learner has several models.
        LossError: The learner has no loss function.

    Example:
        >>> learner = testing.toy_learner(Recorder(), num_batches=4)
        >>> learner.epoch(ValidationPhase())
        >>> learner.history[ValidationPhase].steps, learner.step.preds.requires_grad
        (4, False)
    """

    stores_loss = True

    entries = TrainingPhase.entries

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Validate on one batch."""
        state.preds = learner.model(state.xs)
        handle(LossBegin())
        state.loss = learner.loss_fn(state.preds, state.ys)

    def check(self, learner: Any) -> None:
        """Raise for a learner that this phase's own step cannot run; a subclass's step has its own needs."""
        if runs(self, ValidationPhase):
            check_supervised(self, learner)


class PredictionPhase(AbstractValidationPhase):
    """Prediction: what ``learner.predict`` runs.

    A batch is the model's input, or a tuple or list that begins with it (targets are left out); a
    dict is given by names where these are arguments of the model's ``forward``, else as it is.
    Of a model with a method ``predict`` that method is called. The step stores ``xs``, then ``preds``.

    Raises:
        PhaseError: The learner has several models.
        BatchError: A dict has other names, and the model takes no dict.

    Example:
        >>> class Sums(PredictionPhase):
        ...     def body(self, learner, handle, state):
        ...         state.preds = state.xs.sum(1)
        >>> learner, rows = testing.toy_learner(), torch.ones(2, 1)
        >>> learner.predict(rows), learner.predict(rows, phase=Sums())
        (tensor([[0.], [0.]]), tensor([1., 1.]))
    """

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``xs``."""
        return {"xs": batch[0] if isinstance(batch, (tuple, list)) and batch else batch}

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Predict one batch."""
        predict, xs = getattr(learner.model, "predict", learner.model), state.xs
        try:
            state.preds = call_with(predict, xs)
        except (AttributeError, TypeError) as error:
            if not isinstance(xs, Mapping) or type(xs).__name__ not in str(error) or fits_by_name(predict, xs):
                raise  # the model takes such a batch: what went wrong is its own
            name = next(iter(arguments_among(predict, xs) or xs), "xs")
            given = ", ".join(map(repr, xs)) or "nothing"
            raise BatchError(
                f"{type(self).__name__} was given {describe(xs)} with {given}, whose names are not the "
                f"arguments of {type(as_written(learner.model)).__name__}, and gave it the whole: {error}; "
                f"expected its input alone: learner.predict(data[{name!r}]), a dict of its arguments by name, or "
                "a phase whose entries(batch) says which is the input: learner.predict(data, phase=MyPhase())"
            ) from error

    def check(self, learner: Any) -> None:
        """Raise for a learner that this phase's own step cannot run; a subclass's step has its own needs."""
        if runs(self, PredictionPhase) and not callable(learner.model):
            raise PhaseError(
                f"predict runs one model, and the learner has {sorted(map(str, learner.models))}; write a phase "
                "whose step stores state.preds: learner.predict(data, phase=MyPhase())"
            )


class AveragedValidationPhase(ValidationPhase):
    """Supervised validation of the averaged weights that ``EMA("model", decay)`` keeps.

    ``learner.model`` is the averaged copy while it runs; the trained weights are not touched. Its
    metrics carry the name of the weights view: ``"validation/loss@ema"``. For another weights view, or
    another phase, write a subclass with ``model_view = "swa"``. The rest is as in `ValidationPhase`.

    Example:
        >>> learner = testing.toy_learner(Recorder(), Metrics(), EMA("model", 0.9))
        >>> history = learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
        >>> len(history["validation/loss"]), len(history["validation/loss@ema"])
        (2, 2)
    """

    model_view = "ema"
