"""Embeddings learned from labels: supervised contrastive, and triplets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import triplet_margin_loss

from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.guard.given import check_number
from fluxloop.losses.contrastive import supervised_contrastive
from fluxloop.phase import without_names
from fluxloop.phases.joint_embedding import ComparingPhase, Views
from fluxloop.phases.objective import ObjectivePhase, can_run, require_parts
from fluxloop.processes.gather import all_gather, join_rows

if TYPE_CHECKING:
    from fluxloop.state import StepState


class SupConPhase(ComparingPhase):
    """Supervised contrastive learning (Khosla et al., 2020): rows of one class are each other's positives.

    1. Draw two views of each row. 2. Embed both. 3. `supervised_contrastive` over the 2N embeddings
    with the labels.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        temperature: Divides the cosine similarities.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models, batches, entries and events are those of `JointEmbeddingPhase`; batches have labels.

    Raises:
        BatchError: A batch has no labels.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=((torch.randn(64, 4), torch.arange(64) % 4),), default_callbacks=False)
        >>> views = TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows))
        >>> history = learner.fit(1, phases=[SupConPhase(views, temperature=0.1)])
        >>> learner.step.z1.shape, learner.step.ys.shape
        (torch.Size([32, 6]), torch.Size([32]))
    """

    def __init__(self, views: Views | None = None, *, temperature: float = 0.07, gather: bool = True) -> None:
        super().__init__(views, gather=gather)
        check_number("SupConPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return views and labels.

        Raises:
            BatchError: The batch has no labels.
        """
        entries = super().entries(batch)
        if "ys" not in entries:
            raise BatchError(f"SupConPhase was given {describe(batch)} as a batch; expected labels too, (xs, ys)")
        return entries

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Pull together what has one label."""
        z1, z2, ys, group = state.z1, state.z2, state.ys, self.group(learner)
        if group is not None:
            (z1, z2), rows = join_rows(group, z1, z2)
            ys = all_gather(ys, group, rows)
        return supervised_contrastive(torch.cat([z1, z2]), torch.cat([ys, ys]), self.temperature)


class TripletPhase(ObjectivePhase):
    """Triplets (Weinberger and Saul, 2009; FaceNet, Schroff et al., 2015): nearer to one's own kind.

    1. Embed an anchor, a positive of the same kind and a negative of another. 2. The distance to
    the positive is to be smaller than that to the negative by `margin`.

    Args:
        margin: Of `torch.nn.functional.triplet_margin_loss`: a distance, 0 or more.

    Model: one module, or a model named ``encoder``. Batches: ``(anchor, positive, negative)``, alone or with
    labels: ``((anchor, positive, negative), ys)``. Entries: those three, ``ys`` where there are labels, ``features``,
    the anchor's embedding, ``z_positive``, ``z_negative`` (N, D), ``loss``. The events are those of
    `ObjectivePhase`. Each row has its own positive and negative: rows of other processes play no part.

    Raises:
        BatchError: A batch holds something else.
        PhaseError: There is no ``encoder``, or `margin` is less than 0.

    Example:
        >>> anchors, positives, negatives = torch.randn(3, 64, 4)
        >>> learner = Learner(torch.nn.Linear(4, 8), data=((anchors, positives, negatives),), default_callbacks=False)
        >>> history = learner.fit(1, phases=[TripletPhase(margin=0.5)])
        >>> learner.step.features.shape, learner.step.z_negative.shape
        (torch.Size([32, 8]), torch.Size([32, 8]))
    """

    def __init__(self, margin: float = 1.0) -> None:
        check_number("TripletPhase", "margin", margin, least=0, error=PhaseError)
        self.margin = margin

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the three inputs."""
        batch = without_names(batch)
        nested = isinstance(batch, (tuple, list)) and len(batch) == 2
        triplet = batch[0] if nested else batch
        if not isinstance(triplet, (tuple, list)) or len(triplet) != 3:
            raise BatchError(
                f"TripletPhase was given {describe(batch)} as a batch; expected (anchor, positive, negative): "
                "data=((anchors, positives, negatives),)"
            )
        labels = {"ys": batch[1]} if nested else {}
        return dict(zip(("anchor", "positive", "negative"), triplet, strict=True)) | labels

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed all three."""
        encoder: Any = learner.model if can_run(learner.model) else learner.model.encoder
        state.features = encoder(state.anchor)
        state.z_positive, state.z_negative = encoder(state.positive), encoder(state.negative)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the two distances."""
        return triplet_margin_loss(state.features, state.z_positive, state.z_negative, margin=self.margin)

    def require(self, learner: Any) -> None:
        """Raise for models without an encoder."""
        if not can_run(learner.model):
            require_parts(self, learner.model, "encoder")
