"""The base of methods that compare a batch with rows of past ones, which they keep in a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.phases.joint_embedding import JointEmbeddingPhase, Views
from fluxloop.processes.gather import all_gather
from fluxloop.randomness import stream_seed

if TYPE_CHECKING:
    from fluxloop.state import StepState


class QueuePhase(JointEmbeddingPhase):
    """Keep rows of past batches: a subclass says which rows of a step enter the queue, and uses `past`.

    After each update the rows of all its batches enter, those of all processes where several train, in place of the
    oldest. The queue is filled with random directions before the first step; they come from the run's seed,
    ``stream_seed(seed, "<name of the class>/queue")``.

    Args:
        views: What makes the views of a batch; left out, batches hold them.
        queue_size: Number of rows in the queue.

    Raises:
        PhaseError: `queue_size` is less than 1.

    Attributes:
        queue: The rows, shape (queue_size, ...); None before the first step.
    """

    def __init__(self, views: Views | None = None, *, queue_size: int, **options: Any) -> None:
        super().__init__(views, **options)
        check_number(type(self).__name__, "queue_size", queue_size, least=1, whole=True, error=PhaseError)
        self.queue_size = queue_size
        self.queue: Tensor | None = None
        self._oldest = 0
        self._waiting: Tensor | None = None
        """The rows of the batches of an update that is yet to come."""

    def entering(self, state: StepState) -> Tensor:
        """Return the rows of a step that are to enter the queue, shape (N, ...)."""
        raise NotImplementedError

    def past(self, learner: Any, rows: Tensor) -> Tensor:
        """Return the queue (queue_size, ...) on the device of rows like its own; what it begins with at first."""
        if self.queue is not None:
            return self.queue.to(rows)
        owner = next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.startswith("fluxloop."))
        generator = torch.Generator().manual_seed(stream_seed(learner.seed, f"{owner}/queue"))
        return normalize(torch.randn(self.queue_size, *rows.shape[1:], generator=generator), dim=-1).to(rows)

    def finish(self, learner: Any, state: StepState) -> None:
        """Put rows in the place of the oldest; those of several batches that make an update with the last one."""
        group, rows = learner.accelerator.group, self.entering(state).detach()
        if group is not None:
            rows = all_gather(rows, group)
        if self._waiting is not None:
            rows = torch.cat([self._waiting.to(rows), rows])
        if learner.updates.has_open(None):
            self._waiting = rows
        else:
            self._enter(learner, rows)

    def _follow_update(self, learner: Any) -> None:
        """Let rows enter once the update of an epoch's last batches has been made after its last step."""
        if self._waiting is not None:
            self._enter(learner, self._waiting)

    def _enter(self, learner: Any, rows: Tensor) -> None:
        """Put rows in the place of the oldest."""
        self._waiting = None
        rows = rows[-self.queue_size :]
        places = (self._oldest + torch.arange(len(rows), device=rows.device)) % self.queue_size
        self.queue = self.past(learner, rows)
        self.queue.index_copy_(0, places, rows)
        self._oldest = (self._oldest + len(rows)) % self.queue_size

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the queue, its oldest place, and the rows that wait to enter it."""
        queue = None if self.queue is None else self.queue.clone()
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {"queue": queue, "oldest": self._oldest, **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps.

        Raises:
            PhaseError: The queue had another size.
        """
        queue, name = state["queue"], type(self).__name__
        if queue is not None and len(queue) != self.queue_size:
            raise PhaseError(
                f"{name}(queue_size={self.queue_size}) was given a state of {len(queue)} rows; expected the same "
                f"size: {name}(queue_size={len(queue)})"
            )
        self.queue = None if queue is None else queue.clone()
        self._oldest = state["oldest"]
        self._waiting = state.get("waiting")
