"""MoCo: find the key of each query among those of past batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.contrastive import info_nce
from fluxloop.phases.joint_embedding import TeacherPhase, Views
from fluxloop.processes.gather import all_gather
from fluxloop.randomness import stream_seed

if TYPE_CHECKING:
    from fluxloop.state import StepState


class MoCoPhase(TeacherPhase):
    """MoCo (He et al., 2020): contrast queries with a queue of keys from a moving average.

    1. Draw two views of each row. 2. ``q = student(view1)``, normalised. 3. ``k = teacher(view2)``,
    normalised, without gradients. 4. `info_nce` of each query with its key against the queue.
    5. After the update, the keys enter the queue in place of the oldest; `EMA` moves the teacher.

    The queue is filled with random unit vectors before the first step, as in the paper's code; they
    come from the run's seed, ``stream_seed(seed, "MoCoPhase/queue")``. Where several processes train,
    the keys of all enter the queue, which is the same in all of them. (The paper shuffles rows among processes for
    batch norm; here there is `synchronise_batch_norm`.)

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        queue_size: Number of keys in the queue.
        temperature: Divides the similarities.

    Models are those of `TeacherPhase`: the paper's query and key encoders. Batches and events are
    those of `JointEmbeddingPhase`. Entries: ``views``, ``features`` (N, F), ``queries`` and ``keys``
    (N, D), ``loss``.

    Raises:
        PhaseError: `queue_size` is less than 1.

    Attributes:
        queue: The keys, shape (queue_size, D); None before the first step.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> moco = MoCoPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)), queue_size=128)
        >>> history = learner.fit(1, phases=[moco])
        >>> moco.queue.shape
        torch.Size([128, 8])
    """

    def __init__(self, views: Views | None = None, *, queue_size: int = 4096, temperature: float = 0.07) -> None:
        super().__init__(views)
        check_number("MoCoPhase", "queue_size", queue_size, least=1, whole=True, error=PhaseError)
        self.queue_size = queue_size
        check_number("MoCoPhase", "temperature", temperature, above=0, error=PhaseError)
        self.temperature = temperature
        self.queue: Tensor | None = None
        self._oldest = 0
        self._waiting: Tensor | None = None
        """The keys of the batches of an update that is yet to come."""

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed one view by each network."""
        view1, view2 = self.seen(state)
        state.features, z1 = self.embed(learner.model.student, view1)
        state.queries = normalize(z1, dim=1)
        with torch.no_grad():
            state.keys = normalize(self.embed(learner.model.teacher, view2)[1], dim=1)

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Have each query find its key."""
        return info_nce(state.queries, state.keys, self.negatives(learner, state.keys), self.temperature)

    def negatives(self, learner: Any, keys: Tensor) -> Tensor:
        """Return the queue (queue_size, D) on the keys' device; before the first step, what it begins with."""
        if self.queue is not None:
            return self.queue.to(keys)
        generator = torch.Generator().manual_seed(stream_seed(learner.seed, "MoCoPhase/queue"))
        return normalize(torch.randn(self.queue_size, keys.shape[1], generator=generator), dim=1).to(keys)

    def finish(self, learner: Any, state: StepState) -> None:
        """Put the keys in the place of the oldest; those of several batches that make an update with the last one."""
        group, keys = learner.accelerator.group, state.keys
        if group is not None:
            keys = all_gather(keys, group)
        if self._waiting is not None:
            keys = torch.cat([self._waiting.to(keys), keys])
        if learner.updates.has_open(None):
            self._waiting = keys
        else:
            self._enter(learner, keys)

    def _follow_update(self, learner: Any) -> None:
        """Let keys enter once the update of an epoch's last batches has been made after its last step."""
        if self._waiting is not None:
            self._enter(learner, self._waiting)

    def _enter(self, learner: Any, keys: Tensor) -> None:
        """Put keys in the place of the oldest."""
        self._waiting = None
        keys = keys[-self.queue_size :]
        places = (self._oldest + torch.arange(len(keys), device=keys.device)) % self.queue_size
        self.queue = self.negatives(learner, keys)
        self.queue.index_copy_(0, places, keys)
        self._oldest = (self._oldest + len(keys)) % self.queue_size

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the queue, its oldest place, and the keys that wait to enter it."""
        queue = None if self.queue is None else self.queue.clone()
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {"queue": queue, "oldest": self._oldest, **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            PhaseError: The queue had another size.
        """
        queue = state["queue"]
        if queue is not None and len(queue) != self.queue_size:
            raise PhaseError(
                f"MoCoPhase(queue_size={self.queue_size}) was given a state of {len(queue)} keys; expected the same "
                f"size: MoCoPhase(queue_size={len(queue)})"
            )
        self.queue = None if queue is None else queue.clone()
        self._oldest = state["oldest"]
        self._waiting = state.get("waiting")
