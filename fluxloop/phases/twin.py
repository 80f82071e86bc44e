"""Validation phases that do what a training phase does: what these twins have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fluxloop.errors import PhaseError, describe
from fluxloop.nested import weight_of
from fluxloop.phase import AbstractTrainingPhase, AbstractValidationPhase

if TYPE_CHECKING:
    from torch import Tensor

    from fluxloop.state import StepState


class TwinPhase(AbstractValidationPhase):
    """Base of phases that do on validation data what an instance of a training phase does, without updates.

    Args:
        training: The training phase.
        name: What its numbers are called by; left out, the class's name. A second twin in one fit needs another one.
        every: In a fit it runs in every so many cycles, and in the last one.

    Raises:
        PhaseError: `training` is of another type, or a name or number cannot be used.

    Example:
        >>> gan = GANPhase()
        >>> twin = GANValidationPhase(gan)
        >>> isinstance(twin, TwinPhase), twin.training is gan
        (True, True)
    """

    of: ClassVar[type[AbstractTrainingPhase]] = AbstractTrainingPhase
    """The type that `training` has to be of."""

    def __init__(self, training: Any, *, name: str | None = None, every: int = 1) -> None:
        super().__init__(name=name, every=every)
        if not isinstance(training, self.of):
            raise PhaseError(
                f"{type(self).__name__} was given {describe(training)}; expected an instance of the training phase, "
                f"of type {self.of.__name__}: {type(self).__name__}(MyPhase())"
            )
        self.training: Any = training

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the entries of the training phase."""
        entries: dict[str, Any] = self.training.entries(batch)
        return entries

    def weight(self, state: StepState) -> float | Tensor:
        """Return what a step weighs in the training phase."""
        weight: float | Tensor = weight_of(self.training, state)
        return weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.training!r})"
