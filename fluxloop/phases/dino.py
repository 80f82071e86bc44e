"""DINO: predict from each crop what the teacher says of the global ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.compute.precision import in_single
from fluxloop.errors import PhaseError
from fluxloop.guard.given import check_number
from fluxloop.losses.distillation import dino_loss
from fluxloop.nested import tensors
from fluxloop.phases.joint_embedding import CropsPhase, TeacherPhase, Views
from fluxloop.processes.gather import mean_of_rows, mean_of_sum
from fluxloop.schedules import Schedule, value_at

if TYPE_CHECKING:
    from fluxloop.state import StepState


class DINOPhase(CropsPhase, TeacherPhase):
    """DINO (Caron et al., 2021): self-distillation without labels, over global and local crops.

    1. Draw crops of each row, global ones first. 2. The student sees all, the teacher the global
    ones, without gradients. 3. `dino_loss`: the student predicts from each crop what the teacher,
    centred and sharpened, says of each other global crop. 4. After the update the centre moves
    towards the mean of the teacher's outputs, of all processes where several train, and `EMA` moves the teacher.

    Args:
        views: What makes the crops of a batch, such as ``MultiCrop(globally, locally, 4)``; left out,
            batches hold them.
        num_global: How many of the crops, the first ones, are global.
        student_temperature: Divides the student's outputs.
        teacher_temperature: Divides the teacher's: a number, or a schedule over training steps
            (the paper warms it up from 0.04 to 0.07).
        center_momentum: Weight of the past in the centre.

    Models are those of `TeacherPhase`; their embeddings are the scores (N, K) of the paper's head.
    Batches are ``(crop1, crop2, ...)`` or ``((crop1, crop2, ...), ys)``. Entries: ``views``,
    ``features`` (N, F) of the student for the first crop, ``student`` and ``teacher``, lists of
    (N, K), ``loss``. The events are those of `ObjectivePhase`. The student runs once per crop; the
    paper's code joins crops of one size, which batch norm would notice.

    Raises:
        PhaseError: `num_global` is less than 1, or another number is out of range.
        BatchError: There are fewer crops than `num_global`, or one alone.

    Attributes:
        center: The centre, shape (K,); None before the first step.

    Example:
        >>> import copy
        >>> student = torch.nn.Linear(4, 8)
        >>> models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> learner.set_callbacks([EMA("student", 0.99, into="teacher")])
        >>> noise = lambda rows: rows + 0.1 * torch.randn_like(rows)
        >>> dino = DINOPhase(MultiCrop(noise, noise, num_local=3))
        >>> history = learner.fit(1, phases=[dino])
        >>> len(learner.step.student), len(learner.step.teacher), dino.center.shape
        (5, 2, torch.Size([8]))
    """

    def __init__(
        self,
        views: Views | None = None,
        *,
        num_global: int = 2,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(views, num_global=num_global)
        check_number(type(self).__name__, "student_temperature", student_temperature, above=0, error=PhaseError)
        if not callable(teacher_temperature):
            check_number(type(self).__name__, "teacher_temperature", teacher_temperature, above=0, error=PhaseError)
        check_number(type(self).__name__, "center_momentum", center_momentum, least=0, most=1, error=PhaseError)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.center: Tensor | None = None
        self._steps = 0
        self._waiting: tuple[Tensor, int] | None = None
        """The sum, and the number, of the teacher's outputs for the batches of an update that is yet to come."""

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return the views or ``xs``, and ``temperature``, the teacher's in this step, where it has a schedule."""
        entries = super().entries(batch)
        if callable(self.teacher_temperature):
            entries["temperature"] = self._now(self.teacher_temperature, entries)
        return entries

    def _now(self, schedule: Schedule, entries: dict[str, Any]) -> Tensor:
        """Return what a schedule says in this step, as a tensor: a compiled step is given it, and stays what it is."""
        double = any(tensor.dtype == torch.float64 for tensor in tensors(entries))
        return torch.tensor(value_at(schedule, self._steps), dtype=torch.float64 if double else torch.float32)

    def forward(self, learner: Any, state: StepState) -> None:
        """Run both networks on their crops."""
        views = self.seen(state)
        outputs = [self.embed(learner.model.student, view) for view in views]
        state.features, state.student = outputs[0][0], [scores for _, scores in outputs]
        with torch.no_grad():
            state.teacher = [self.embed(learner.model.teacher, view)[1] for view in views[: self.num_global]]

    def loss(self, learner: Any, state: StepState) -> Tensor:
        """Compare the student's crops with the teacher's."""
        temperature = self.sharpness(state)
        center = 0.0 if self.center is None else self.center.to(state.student[0].device)
        return dino_loss(state.student, state.teacher, center, self.student_temperature, temperature)

    def sharpness(self, state: StepState) -> Any:
        """Return the teacher's temperature in a step."""
        return state.temperature if callable(self.teacher_temperature) else self.teacher_temperature

    def outputs(self, state: StepState) -> Tensor:
        """Return the teacher's outputs of a step, whose mean the centre moves towards, shape (rows, K)."""
        return torch.cat(state.teacher)

    def finish(self, learner: Any, state: StepState) -> None:
        """Move the centre towards the mean of the batch, or of the batches that make an update, with the last one."""
        group, outputs = learner.accelerator.group, in_single(self.outputs(state))
        waits = learner.updates.has_open(None)
        if not waits and self._waiting is None:
            self._move(mean_of_rows(outputs, group))
            return
        total, rows = (torch.zeros_like(outputs[0]), 0) if self._waiting is None else self._waiting
        if group is None or not group.spare:  # rows that another process has too count there
            total, rows = total + outputs.sum(0), rows + len(outputs)
        self._waiting = total, rows
        if not waits:
            self._move(mean_of_sum(total, rows, group))

    def _follow_update(self, learner: Any) -> None:
        """Move the centre once the update of an epoch's last batches has been made after its last step."""
        if self._waiting is not None:
            self._move(mean_of_sum(*self._waiting, learner.accelerator.group))

    def _move(self, mean: Tensor) -> None:
        """Move the centre towards a mean, at the end of a step."""
        self.center = self._moved(self.center, mean)
        self._steps += 1
        self._waiting = None

    def _moved(self, center: Tensor | None, mean: Tensor) -> Tensor:
        """Return a centre, or zeros, moved towards a mean."""
        old = torch.zeros_like(mean) if center is None else center.to(mean)
        return old * self.center_momentum + mean * (1 - self.center_momentum)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the centre, the number of steps, and what waits to move the centre."""
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return {"center": self.center, "steps": self._steps, **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what a checkpoint keeps."""
        self.center, self._steps = state["center"], state["steps"]
        waiting = state.get("waiting")
        self._waiting = None if waiting is None else (waiting[0], waiting[1])
