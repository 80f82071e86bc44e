"""One loss per named optimizer: luz's default step, without its leak between optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.events import LossBegin
from fluxloop.phase import AbstractTrainingPhase
from fluxloop.phases.supervised import unpack
from fluxloop.phases.twin import TwinPhase

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.state import StepState


class PerOptimizerPhase(AbstractTrainingPhase):
    """Run forward, loss, backward and update once per optimizer, in the order of their names.

    Write the loss of each optimizer in `loss`. The loss of one changes only its own parameters.
    For batches that are no pairs override `entries`, for several models override `forward`.

    Events per optimizer, after `StepBegin`: `LossBegin` (``preds``), `BackwardBegin`
    (``losses[name]``), `BackwardEnd` (``grads``), `UpdateBegin`, `UpdateEnd`; then `StepEnd`.

    Raises:
        PhaseError: There is no `loss`.
        BatchError: A batch is no pair, and `entries` is the phase's own.

    Example:
        >>> class TwoRates(PerOptimizerPhase):
        ...     def loss(self, learner, state, name):
        ...         loss = learner.loss_fn(state.preds, state.ys)
        ...         return loss + learner.model.fc1.weight.abs().sum() if name == "fc1" else loss
    """

    def loss(self, learner: Any, state: StepState, name: str | None) -> Tensor:
        """Return the loss of the optimizer `name`, a scalar; the name is None for a single optimizer."""
        raise PhaseError(
            f"{type(self).__name__} says no loss; write one:\n"
            "    def loss(self, learner, state, name):\n"
            "        return learner.loss_fn(state.preds, state.ys)"
        )

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the entries that a step begins with: ``xs`` and ``ys`` of a pair."""
        xs, ys = unpack(self, batch)
        return {"xs": xs, "ys": ys}

    def forward(self, learner: Any, state: StepState, name: str | None) -> None:
        """Store ``state.preds`` for the optimizer `name`; with several models, nothing."""
        if callable(learner.model):
            state.preds = learner.model(state.xs)

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Train each optimizer's parameters on one batch."""
        for name in learner.optimizer_names:
            with learner.optimizing(name) as block:
                self.forward(learner, state, name)
                handle(LossBegin())
                block.loss = self.loss(learner, state, name)


class PerOptimizerValidationPhase(TwinPhase):
    """The validation twin of a `PerOptimizerPhase`: the same losses, without updates.

    Args:
        training: The phase whose ``entries``, ``forward`` and ``loss`` it runs.

    Events: `StepBegin`, per optimizer `LossBegin`, then `StepEnd`; ``losses[name]`` are stored.

    Raises:
        PhaseError: `training` is no `PerOptimizerPhase`.

    The arguments `name` and `every` are those of `TwinPhase`.

    Example:
        >>> class Both(PerOptimizerPhase):
        ...     def loss(self, learner, state, name):
        ...         return learner.model._asdict()[name](state.xs).square().mean()
        >>> both = Both()
        >>> models = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)}
        >>> xs = torch.randn(64, 1)
        >>> learner = Learner(models, data=((xs, xs), (xs, xs)), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), Metrics()])
        >>> history = learner.fit(1, phases=[both, PerOptimizerValidationPhase(both)])
        >>> sorted(history.metrics[PerOptimizerValidationPhase])
        ['loss_a', 'loss_b']
    """

    of = PerOptimizerPhase

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Compute each optimizer's loss on one batch."""
        named = learner.optimizer_names != (None,)
        for name in learner.optimizer_names:
            self.training.forward(learner, state, name)
            handle(LossBegin())
            loss = self.training.loss(learner, state, name)
            if named:
                vars(state).setdefault("losses", {})[name] = loss
            else:
                state.loss = loss
