"""SwAV: predict from each crop to which prototypes another one was assigned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from fluxloop.errors import PhaseError, describe
from fluxloop.guard.given import check_number
from fluxloop.losses.prototypes import sinkhorn, swav_loss
from fluxloop.phases.joint_embedding import ComparingPhase, CropsPhase, Views
from fluxloop.phases.queue import QueuePhase
from fluxloop.processes.gather import all_gather, compare_rows

if TYPE_CHECKING:
    from fluxloop.state import StepState


class SwAVPhase(QueuePhase, CropsPhase, ComparingPhase):
    """SwAV (Caron et al., 2020): online clustering, with codes swapped between crops.

    1. Draw crops of each row, global ones first. 2. Embed all, normalised; scores are the products with the
    ``prototypes``, whose rows are normalised in place before. 3. Codes: `sinkhorn` of the scores of each global crop,
    together with those of the queue, without gradients. 4. `swav_loss`: predict each code from every other crop.
    Small crops predict, they give no codes. 5. After the update the global crops' embeddings enter the queue.

    The paper freezes the prototypes at first: ``Unfreeze({"prototypes": 100}, unit="step")``.

    Args:
        views: What makes the crops of a batch, such as ``MultiCrop(globally, locally, 6)``; left out, batches hold
            them.
        num_global: How many of the crops, the first ones, are global.
        temperature: Divides the scores that predict.
        epsilon: Divides the scores that are assigned; see `sinkhorn`.
        iterations: Of `sinkhorn`.
        queue_size: Number of past rows that are assigned with those of the batch; 0 for none. The paper has
            3840, for batches of less than a few hundred rows.
        queue_from: After how many updates it is used; it has to be full too. (The paper: after 15 epochs.)
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models: ``encoder``, ``projector`` and ``prototypes``, ``nn.Linear(D, K, bias=False)``. Batches are ``(crop1, crop2,
    ...)`` or ``((crop1, crop2, ...), ys)``. Entries: ``views``, ``features`` (N, F) of the first crop, ``z`` and
    ``scores``, lists of (N, D) and (N, K), ``codes``, a list of (N, K) for the global crops, ``loss``; and
    ``uses_queue`` where there is one. The events are those of `ObjectivePhase`. The encoder runs once per crop.

    Raises:
        PhaseError: A number is out of range, or the prototypes have no weight.
        BatchError: There are fewer crops than `num_global`, or one alone.

    Attributes:
        queue: The embeddings of past rows, shape (queue_size, num_global, D); None before the first step.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> models["prototypes"] = torch.nn.Linear(6, 10, bias=False)
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> noise = lambda rows: rows + 0.1 * torch.randn_like(rows)
        >>> history = learner.fit(1, phases=[SwAVPhase(MultiCrop(noise, noise, num_local=3))])
        >>> len(learner.step.scores), len(learner.step.codes), learner.step.codes[0].shape
        (5, 2, torch.Size([32, 10]))
    """

    parts = ("encoder", "projector", "prototypes")

    def __init__(
        self,
        views: Views | None = None,
        *,
        num_global: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_size: int = 0,
        queue_from: int = 0,
        gather: bool = True,
    ) -> None:
        check_number("SwAVPhase", "queue_size", queue_size, least=0, whole=True, error=PhaseError)
        super().__init__(views, queue_size=max(queue_size, 1), num_global=num_global, gather=gather)
        check_number("SwAVPhase", "temperature", temperature, above=0, error=PhaseError)
        check_number("SwAVPhase", "epsilon", epsilon, above=0, error=PhaseError)
        check_number("SwAVPhase", "iterations", iterations, least=1, whole=True, error=PhaseError)
        check_number("SwAVPhase", "queue_from", queue_from, least=0, whole=True, error=PhaseError)
        self.temperature = temperature
        self.epsilon, self.iterations = epsilon, iterations
        self.queue_size, self.queue_from = queue_size, queue_from
        self._updates = self._entered = 0

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the views or ``xs``, and whether the queue is used in this step."""
        entries = super().entries(batch)
        if self.queue_size:  # an entry, as what a compiled step reads of its phase has to stay what it is
            entries["uses_queue"] = self._updates >= self.queue_from and self._entered >= self.queue_size
        return entries

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed all crops, and compare them with the prototypes."""
        outputs = [self.embed(learner.model, view) for view in self.seen(state)]
        state.features = outputs[0][0]
        state.z = [normalize(embedding, dim=1) for _, embedding in outputs]
        prototypes = self.directions(learner.model.prototypes.weight)
        state.scores = [linear(z, prototypes) for z in state.z]
        with torch.no_grad():
            state.codes = self.assign(learner, state, prototypes)

    def directions(self, weight: Tensor) -> Tensor:
        """Return the prototypes, normalised; in training in place, so that steps are those of the paper."""
        trains = torch.is_grad_enabled() and weight.requires_grad
        with torch.no_grad():
            unit = normalize(weight, dim=1)
            if trains:
                weight.copy_(unit)
        return weight if trains else unit

    def assign(self, learner: Any, state: StepState, prototypes: Tensor) -> list[Tensor]:
        """Assign the rows of the global crops, with those of all processes and of the queue."""
        z, group, own = self.entering(state), self.group(learner), slice(len(state.z[0]))
        if group is not None:
            rows = compare_rows(z, group)
            if rows.counts[rows.rank]:
                z, own = all_gather(z, group, rows), rows.own
            else:  # what it finds weighs nothing; the others wait for it
                all_gather(z, group, rows)
        if "uses_queue" in state and state.uses_queue:
            z = torch.cat([z, self.past(learner, z)])
        scores = [linear(each.contiguous(), prototypes) for each in z.unbind(1)]
        return [sinkhorn(each, self.epsilon, self.iterations)[own] for each in scores]

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Predict each code from the other crops."""
        return swav_loss(state.scores, state.codes, self.temperature)

    def entering(self, state: StepState) -> Tensor:
        """Return the embeddings of the global crops, shape (N, num_global, D)."""
        return torch.stack(state.z[: self.num_global], dim=1).detach()

    def finish(self, learner: Any, state: StepState) -> None:
        """Let the embeddings enter the queue, where there is one."""
        if self.queue_size:
            super().finish(learner, state)

    def _enter(self, learner: Any, rows: Tensor) -> None:
        super()._enter(learner, rows)
        self._updates += 1
        self._entered = min(self._entered + len(rows), self.queue_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the queue, and how many updates and rows it has seen."""
        return {**super().state_dict(), "updates": self._updates, "entered": self._entered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        super().load_state_dict(state)
        self._updates, self._entered = state["updates"], state["entered"]

    def require(self, learner: Any) -> None:
        """Raise for models without a part, and for prototypes that are no matrix."""
        super().require(learner)
        weight = getattr(learner.model.prototypes, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise PhaseError(
                f"{type(self).__name__} was given prototypes that are {describe(learner.model.prototypes)}; expected "
                "nn.Linear(D, K, bias=False), whose weight are K prototypes"
            )
