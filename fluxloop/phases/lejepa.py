"""LeJEPA: views alike, and embeddings that are normally distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.isotropic import draw_directions, lejepa_loss
from fluxloop.phases.joint_embedding import ComparingPhase, CropsPhase, Views
from fluxloop.processes.gather import gather_equal

if TYPE_CHECKING:
    from fluxloop.state import StepState


class LeJEPAPhase(CropsPhase, ComparingPhase):
    """LeJEPA (Balestriero and LeCun, 2025): no teacher, no stop-gradient, one weight.

    1. Draw views of each row, global ones first. 2. Embed all. 3. `lejepa_loss`: each view's embedding is pulled to
    the mean of the global views', and the rows of each view to a standard normal distribution, along directions that
    are drawn anew for each step. The size of the second term grows with the rows of a batch, of all processes.

    Args:
        views: What makes the views of a batch, such as ``MultiCrop(globally, locally, 6)``; left out, batches hold
            them.
        num_global: How many of the views, the first ones, are global.
        weight: Of the second term, from 0 to 1; the paper's λ.
        num_directions: How many directions are drawn.
        gather: Whether the rows of other processes count, where several train; see `ComparingPhase`.

    Models are those of `JointEmbeddingPhase`. Batches are ``(view1, view2, ...)`` or ``((view1, view2, ...), ys)``.
    Entries: ``views``, ``features`` (N, F) of the first view, ``z``, a list of (N, D), ``loss``. The events are those
    of `ObjectivePhase`. The encoder runs once per view.

    Raises:
        PhaseError: A number is out of range.
        BatchError: There are fewer views than `num_global`, or one alone.

    Example:
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> noise = lambda rows: rows + 0.1 * torch.randn_like(rows)
        >>> history = learner.fit(1, phases=[LeJEPAPhase(MultiCrop(noise, noise, num_local=3), num_directions=16)])
        >>> len(learner.step.z), learner.step.z[0].shape
        (5, torch.Size([32, 6]))
    """

    def __init__(
        self,
        views: Views | None = None,
        *,
        num_global: int = 2,
        weight: float = 0.05,
        num_directions: int = 1024,
        gather: bool = True,
    ) -> None:
        super().__init__(views, num_global=num_global, gather=gather)
        check_number("LeJEPAPhase", "weight", weight, least=0, most=1, error=PhaseError)
        check_number("LeJEPAPhase", "num_directions", num_directions, least=1, whole=True, error=PhaseError)
        self.normal_weight, self.num_directions = weight, num_directions

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed all views."""
        outputs = [self.embed(learner.model, view) for view in self.seen(state)]
        state.features, state.z = outputs[0][0], [embedding for _, embedding in outputs]

    def draw_directions(self, learner: Any, embeddings: Tensor) -> Tensor:
        """Draw the step's directions, shape (D, num_directions), the same for all processes whose rows count.

        Each process gives its share of them: what processes draw differs.
        """
        count, group = self.num_directions, self.group(learner)
        if group is None:
            return draw_directions(embeddings.shape[1], count, embeddings)
        share = -(-count // group.size)
        drawn = draw_directions(embeddings.shape[1], share * group.size, embeddings)
        own = drawn.T[group.rank * share : (group.rank + 1) * share]
        return gather_equal(own, group)[:count].T

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the views with their mean, and the rows with a normal distribution."""
        directions = self.draw_directions(learner, state.z[0])
        return lejepa_loss(state.z, directions, self.num_global, self.normal_weight, group=self.group(learner))
