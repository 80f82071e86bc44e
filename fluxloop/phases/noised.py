"""What diffusion and flow matching have in common: a model sees noised rows, and its error there is the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from fluxloop.data.feed import Feed
from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.events import LossBegin
from fluxloop.guard.given import check_number
from fluxloop.loop import runepoch
from fluxloop.losses.denoising import row_errors
from fluxloop.phase import inputs_and_labels
from fluxloop.phases.objective import ObjectivePhase, can_run, require_call
from fluxloop.phases.twin import TwinPhase
from fluxloop.randomness import stream_seed

if TYPE_CHECKING:
    from fluxloop.loop import Handle
    from fluxloop.state import StepState


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """Give numbers (N,) the number of dimensions and the type of rows (N, ...), so that each multiplies its row."""
    return values.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))


class NoisedPhase(ObjectivePhase):
    """Base of phases that train a model on rows with noise in them; a subclass says how they are mixed.

    1. Draw noise and a time for each row. 2. Leave out the condition of some rows. 3. Run the model on the mixture.
    4. The loss is the mean over rows of the squared error, for which a subclass says the target.

    Args:
        conditional: Whether the model takes a condition too, ``model(noised, times, ys)``; batches are then pairs.
        condition_dropout: Share of the rows that are trained without their condition, which guidance needs
            (Ho and Salimans, 2022: 0.1 to 0.2).
        null: What stands in the place of a condition that is left out: a class of its own, such as 10 where the
            labels are 0 to 9, or 0.0 for vectors.

    Models: one, ``model(noised, times) -> preds``, of the shape of the rows; `times` are (N,). Batches: ``xs``, or
    ``(xs, ys)``. Entries: ``xs`` and ``ys``, ``noise``, ``times``, ``given``, the condition that the model saw,
    ``noised``, ``preds``, ``target``, ``errors`` (N,), ``loss``. The events are those of `ObjectivePhase`.

    Raises:
        PhaseError: A number is out of range, `null` is missing, the learner has several models, or one that takes other
            arguments.
        BatchError: A batch is something else, or its rows are whole numbers.

    Example:
        >>> class Denoising(NoisedPhase):
        ...     def draw_times(self, xs, generator=None):
        ...         return torch.rand(len(xs), generator=generator)
        ...     def mix(self, state):
        ...         times = state.times[:, None]
        ...         return (1 - times) * state.xs + times * state.noise, state.times, state.xs
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, noised, times):
        ...         return super().forward(noised)
        >>> learner = Learner(Model(4, 4), data=(torch.randn(64, 4),), default_callbacks=False)
        >>> history = learner.fit(1, phases=[Denoising()])
        >>> learner.step.noised.shape, learner.step.errors.shape
        (torch.Size([32, 4]), torch.Size([32]))
    """

    def __init__(self, *, conditional: bool = False, condition_dropout: float = 0.0, null: float | None = None) -> None:
        whose = type(self).__name__
        if type(conditional) is not bool:
            raise PhaseError(f"{whose}(conditional={describe(conditional)}) was given; expected True or False")
        check_number(whose, "condition_dropout", condition_dropout, least=0, most=1, error=PhaseError)
        if null is not None:
            check_number(whose, "null", null, error=PhaseError)
        if condition_dropout and (not conditional or null is None):
            raise PhaseError(
                f"{whose}(condition_dropout={condition_dropout}) was given with conditional={conditional} and "
                f"null={null}; expected a model that takes a condition, and what it is given instead: "
                f"{whose}(conditional=True, condition_dropout=0.1, null=10) where the labels are 0 to 9"
            )
        self.conditional = conditional
        self.condition_dropout = condition_dropout
        self.null = null

    # What a subclass says

    def draw_times(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw a time for each row, shape (N,)."""
        raise NotImplementedError

    def mix(self, state: StepState) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the model is given of ``xs`` and ``noise``, which times it is told, and the target."""
        raise NotImplementedError

    def draw_noise(self, xs: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw standard normal noise of the shape of the rows."""
        return torch.randn(xs.shape, dtype=xs.dtype, device=xs.device, generator=generator)

    def weigh(self, state: StepState) -> Tensor | float:
        """Return what each row's error weighs in the loss, shape (N,), or one number for all."""
        return 1.0

    # The step

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``xs``, and ``ys`` of a batch with conditions."""
        entries = inputs_and_labels(batch)
        xs = entries["xs"]
        if not isinstance(xs, Tensor) or not xs.is_floating_point():
            raise BatchError(
                f"{type(self).__name__} was given rows {describe(xs)}{_kind(xs)}; expected a tensor of floats of about "
                "unit size, to which noise can be added: images / 127.5 - 1 for images of whole numbers 0 to 255"
            )
        if self.conditional and "ys" not in entries:
            raise BatchError(
                f"{type(self).__name__}(conditional=True) was given {describe(batch)} as a batch; expected (xs, ys)"
            )
        return entries

    def forward(self, learner: Any, state: StepState) -> None:
        """Draw noise, times, and whose condition is left out; run the model."""
        state.noise = self.draw_noise(state.xs)
        state.times = self.draw_times(state.xs)
        if self.conditional:
            state.given = self.without_some(state.ys)
        self.predict(learner, state)

    def without_some(self, ys: Any) -> Any:
        """Replace the conditions (N, ...) of some rows by `null`."""
        if not self.condition_dropout:
            return ys
        left_out = torch.rand(len(ys), device=ys.device) < self.condition_dropout
        return ys.masked_fill(left_out.reshape(-1, *[1] * (ys.ndim - 1)), self.null)

    def predict(self, learner: Any, state: StepState) -> None:
        """Run the model on what the entries say."""
        state.noised, told, state.target = self.mix(state)
        state.preds = learner.model(state.noised, told, *([state.given] if self.conditional else []))

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Return the mean error over rows."""
        state.errors = row_errors(state.preds, state.target)
        loss: Tensor = (self.weigh(state) * state.errors).mean()
        return loss

    def require(self, learner: Any) -> None:
        """Raise for several models, and for one that takes other arguments."""
        if not can_run(learner.model):
            raise PhaseError(
                f"{type(self).__name__} runs one model, and the learner has {sorted(map(str, learner.models))}; say "
                "what is run with them in a subclass's predict(learner, state)"
            )
        if type(self).predict is NoisedPhase.predict:
            given = ("noised", "times", "ys") if self.conditional else ("noised", "times")
            require_call(self, learner.model, "model", *given)

    # Sampling

    def guided(self, model: Any, noised: Tensor, told: Tensor, ys: Any, guidance: float) -> Tensor:
        """Return the model's output for a condition, led away from the one without (Ho and Salimans, 2022).

        Args:
            model: The model.
            noised: Rows (N, ...).
            told: Their times, (N,).
            ys: Their conditions; None of a model that takes none.
            guidance: 1 for the condition as it is, 0 without it, and more to make more of it. Other than 1 it runs
                the model twice.
        """
        preds: Tensor = model(noised, told) if ys is None else model(noised, told, ys)
        if guidance == 1 or self.null is None:
            return preds
        without: Tensor = model(noised, told, torch.full_like(ys, self.null))
        return without + guidance * (preds - without)

    def check_sampling(self, ys: Any, steps: int, guidance: float) -> None:
        """Raise for arguments of `sample` that do not fit the phase.

        Raises:
            PhaseError: Says what was expected.
        """
        whose = f"{type(self).__name__}.sample"
        check_number(whose, "steps", steps, least=1, whole=True, error=PhaseError)
        check_number(whose, "guidance", guidance, error=PhaseError)
        if (ys is not None) is not self.conditional:
            raise PhaseError(
                f"{whose} was given {'no conditions' if ys is None else f'conditions {describe(ys)}'} by a phase with "
                f"conditional={self.conditional}; expected sample(model, noise{', ys' if self.conditional else ''})"
            )
        if guidance != 1 and self.null is None:
            raise PhaseError(
                f"{whose}(guidance={guidance}) was given, and the phase has no condition that it leaves out; expected "
                f"guidance=1, or a model trained with {type(self).__name__}(conditional=True, condition_dropout=0.1, "
                "null=...)"
            )


class NoisedValidationPhase(TwinPhase):
    """The validation twin of a diffusion or flow matching phase, with the same noise and times in every epoch.

    So its losses compare over epochs, and over runs of other seeds: what batch number i of an epoch gets depends on i
    alone, and on the process where several share the data. No condition is left out.

    Args:
        training: The phase whose noise, times and errors it uses.

    Events: `StepBegin`, `LossBegin`, `StepEnd`, with the entries of the training phase.

    Raises:
        PhaseError: `training` is no `NoisedPhase`.

    The arguments `name` and `every` are those of `TwinPhase`.

    Example:
        >>> class Velocity(torch.nn.Linear):
        ...     def forward(self, noised, times):
        ...         return super().forward(noised)
        >>> rows, phase = torch.randn(64, 4), FlowMatchingPhase()
        >>> learner = Learner(Velocity(4, 4), data=(rows, rows), default_callbacks=False)
        >>> evaluate = NoisedValidationPhase(phase)
        >>> learner.evaluate(phase=evaluate) == learner.evaluate(phase=evaluate)  # the noise is the same each time
        True
    """

    of = NoisedPhase
    stores_loss = True
    resumable = True
    transient = ("_number", "_rank")
    _number = 0
    _rank = 0

    def epoch(self, learner: Any, data: Iterable[Any]) -> None:
        """Validate on each batch, with noise by its number in the epoch."""
        self._rank = learner.accelerator.rank
        with runepoch(learner, self):
            for number, batch in enumerate(data, 1):
                self._number = data.count if isinstance(data, Feed) else number  # of all: one may go on in the middle
                self.step(learner, batch)
        self._number = 0

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the entries of the training phase, ``noise`` and ``times``."""
        entries = super().entries(batch)
        xs = entries["xs"]
        owner = f"{type(self.training).__name__}/validation@{self._rank}"
        generator = Generator().manual_seed(stream_seed(0, owner, self._number))
        like = torch.empty(xs.shape, dtype=xs.dtype)  # on the CPU, whose numbers are the same on every machine
        noise, times = self.training.draw_noise(like, generator), self.training.draw_times(like, generator)
        return {**entries, "noise": noise, "times": times}

    def body(self, learner: Any, handle: Handle, state: StepState) -> None:
        """Compute the loss on one batch."""
        if self.training.conditional:
            state.given = state.ys
        self.training.predict(learner, state)
        handle(LossBegin())
        state.loss = self.training.loss(learner, state)

    def check(self, learner: Any) -> None:
        """Raise for several models."""
        self.training.require(learner)


def _kind(rows: Any) -> str:
    return f" of {rows.dtype}" if isinstance(rows, Tensor) else ""
