"""Changes of what a critic sees, as many as it takes that it does not learn the real rows by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxloop.augment.per_row import apply_to_some, draw
from fluxloop.augment.views import tell_that_it_draws_once
from fluxloop.errors import DataError, describe
from fluxloop.guard.given import check_called, check_number


def apply_changes(changes: Sequence[Callable[[Tensor], Tensor]], rows: Tensor, probability: float | Tensor) -> Tensor:
    """Return rows (N, ...) of which each is changed in each way with a probability, by a draw of its own.

    Raises:
        DataError: A change makes something else of rows than rows of their shape.
    """
    for change in changes:
        (drawn,) = draw(rows, 1)
        changed = change(rows)
        if not isinstance(changed, Tensor) or changed.shape != rows.shape:
            raise DataError(
                f"AdaptiveAugment was given a change that made {describe(changed)} of {describe(rows)}; expected rows "
                "of the same shape, as changed and unchanged ones are in one batch: random_flip"
            )
        rows = apply_to_some(rows, changed, drawn, probability)
    return rows


class AdaptiveAugment:
    """Change rows, each in each way with a probability that follows a critic's scores of real rows.

    ADA (Karras et al., 2020): a critic that has learned the real rows by heart scores nearly all of them above 0. Where
    the mean sign of its scores is above `target`, the probability rises, else it falls, from 0 to 1. `GANPhase`
    applies it to all that the critic sees, real and fake, with new draws each time, and moves the probability; it
    is kept in checkpoints, and is that of the rows of all processes where several train.

    Args:
        changes: Functions of a batch that draw for each row and that gradients pass through, such as
            ``partial(random_affine, translate=0.125)``; each is applied to each row with the probability, in order.
        target: The mean sign of scores of real rows.
        every: After how many updates of the critic the probability is moved.
        images: In how many real rows it rises from 0 to 1; the paper's 500,000 are for large sets and long trainings.
        probability: What it begins with.

    Raises:
        ValueError: There are no changes, or a number is out of range.
        TypeError: A change cannot be called.
        DataError: When it is called: a change makes rows of another shape.

    Attributes:
        probability: A tensor with one number once it has moved.

    Example:
        >>> from functools import partial
        >>> from fluxloop.augment import random_affine, random_flip
        >>> augment = AdaptiveAugment(random_flip, partial(random_affine, translate=0.125), images=1000)
        >>> models = {"generator": torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4)))}
        >>> models["critic"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
        >>> learner = Learner(models, data=(torch.randn(640, 1, 4, 4),), default_callbacks=False, seed=0)
        >>> history = learner.fit(1, phases=[GANPhase("hinge", noise=2, augment=augment)])
        >>> 0 <= augment.probability <= 1
        tensor(True)
    """

    def __init__(
        self,
        *changes: Callable[[Tensor], Tensor],
        target: float = 0.6,
        every: int = 4,
        images: int = 500_000,
        probability: float = 0.0,
    ) -> None:
        if not changes:
            raise ValueError(
                "AdaptiveAugment() was given no changes; expected functions of a batch: "
                "AdaptiveAugment(random_flip, partial(random_affine, translate=0.125))"
            )
        for change in changes:
            check_called("AdaptiveAugment", "changes", change, "functions of a batch of rows: random_flip")
            tell_that_it_draws_once("AdaptiveAugment", change)
        check_number("AdaptiveAugment", "target", target, least=-1, most=1)
        check_number("AdaptiveAugment", "every", every, least=1, whole=True)
        check_number("AdaptiveAugment", "images", images, least=1)
        check_number("AdaptiveAugment", "probability", probability, least=0, most=1)
        self.changes = changes
        self.target, self.every, self.images = target, int(every), images
        self.probability: float | Tensor = probability
        self._begins_with = probability
        self._updates = 0
        self._seen: Tensor | None = None
        """The sum of the signs since the probability was moved, and of how many rows, shape (2,)."""

    def __call__(self, rows: Tensor, probability: float | Tensor | None = None) -> Tensor:
        """Return rows (N, ...), changed; with the probability as it is, or another."""
        return apply_changes(self.changes, rows, self.probability if probability is None else probability)

    def observe(self, signs: Tensor, updated: bool = True) -> None:
        """Note the sum of signs of scores, and of how many rows, shape (2,); move the probability when it is time.

        Args:
            signs: Of the real rows of all processes. Nothing waits for it: it may lie on any device.
            updated: Whether the critic has been updated since: of several batches that make one, with the last.
        """
        self._seen = signs if self._seen is None else self._seen.to(signs) + signs
        if updated:
            self.count_update()

    def count_update(self) -> None:
        """Note that the critic was updated."""
        self._updates += 1
        if self._updates % self.every == 0 and self._seen is not None:
            total, rows = self._seen.unbind()
            step = (total / rows.clamp(min=1) - self.target).sign() * rows / self.images
            self.probability = (step + torch.as_tensor(self.probability).to(step)).clamp(0, 1)
            self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the probability, and what was seen since it was moved."""
        probability = self.probability.clone() if isinstance(self.probability, Tensor) else self.probability
        seen = {} if self._seen is None else {"seen": self._seen.clone()}
        return {"probability": probability, "updates": self._updates, **seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps; of an empty state, begin anew."""
        self.probability = state.get("probability", self._begins_with)
        self._updates, self._seen = state.get("updates", 0), state.get("seen")

    def __repr__(self) -> str:
        return (
            f"AdaptiveAugment({len(self.changes)} changes, target={self.target}, probability={float(self.probability)})"
        )
