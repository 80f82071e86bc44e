"""The base of methods that compare several views of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxloop.errors import BatchError, PhaseError, describe
from fluxloop.guard.given import check_called, check_number
from fluxloop.losses.contrastive import batch_nce
from fluxloop.phase import inputs_and_labels, without_names
from fluxloop.phases.objective import ObjectivePhase, can_run, may_have, require_parts
from fluxloop.processes.gather import join_rows

if TYPE_CHECKING:
    from fluxloop.phase import Phase
    from fluxloop.processes.group import Group
    from fluxloop.state import StepState

Views = Callable[[Any], tuple[Tensor, ...]]


class JointEmbeddingPhase(ObjectivePhase):
    """Embed two views of each row; a subclass writes the loss of ``z1`` and ``z2``.

    The model has an ``encoder``, whose output is the features that other tasks use, and a ``projector``, whose
    output is compared: two models of the learner, or two attributes of one. A single module
    without a ``projector`` is called as it is, and its output is both.

    Args:
        views: Makes the views of a batch on its device, such as ``TwoViews(augment)``; then a batch
            is ``xs`` or ``(xs, ys)``. Left out, batches hold the views: ``(view1, view2)`` or
            ``((view1, view2), ys)``, as `ViewDataset` gives them.

    Entries: ``views`` (and ``xs`` where the phase makes them), ``ys`` where the batch has labels, then
    ``features`` (N, F) of the first view, ``z1`` and ``z2`` (N, D), ``loss``. The events are those of
    `ObjectivePhase`.

    Raises:
        BatchError: A batch holds something else.
        PhaseError: The learner has no ``encoder``, or `views` cannot be called.

    Example:
        >>> class Alike(JointEmbeddingPhase):
        ...     def loss(self, learner, state):
        ...         return torch.nn.functional.mse_loss(state.z1, state.z2)
        >>> models = {"encoder": torch.nn.Linear(4, 8), "projector": torch.nn.Linear(8, 6)}
        >>> learner = Learner(models, data=(torch.randn(64, 4),), default_callbacks=False)
        >>> history = learner.fit(1, phases=[Alike(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> learner.step.z1.shape
        torch.Size([32, 6])
    """

    num_views: int | None = 2
    """How many views there are; None for two or more."""
    advice = "TwoViews(augment)"
    """A call that makes them, for messages."""

    def __init__(self, views: Views | None = None) -> None:
        if views is not None:
            check_called(type(self).__name__, "views", views, "what makes the views: TwoViews(augment)", PhaseError)
        self.views = views

    def entries(self, batch: Any) -> dict[str, Any]:
        """Return ``xs`` where the phase makes the views, else ``views``; and ``ys`` of a batch with labels."""
        if self.views is not None:
            return inputs_and_labels(batch)
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            batch = without_names(batch)
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], (tuple, list)):
            return {"views": self._checked(batch[0]), "ys": batch[1]}
        if isinstance(batch, (tuple, list)) and len(batch) > 2 and isinstance(batch[0], (tuple, list)):
            raise BatchError(
                f"{type(self).__name__} was given a batch of views and {len(batch) - 1} items more; expected (views, "
                "ys), or views alone, with file names behind them or not. Say which item is ys, in a subclass:\n"
                "    def entries(self, batch):\n"
                "        return super().entries((batch[0], batch[1]))"
            )
        return {"views": self._checked(batch)}

    def _checked(self, views: Any) -> tuple[Any, ...]:
        wanted = "two or more" if self.num_views is None else str(self.num_views)
        several = (
            isinstance(views, (tuple, list))
            and len(views) > 1
            and not any([isinstance(view, (tuple, list)) for view in views])
        )
        if not several or len(views) != (self.num_views or len(views)):
            raise BatchError(
                f"{type(self).__name__} was given {describe(views)} as views; expected {wanted} of each row: give the "
                f"phase what makes them, {type(self).__name__}(views={self.advice}), or use ViewDataset"
            )
        first = views[0]
        for view in views[1:]:
            if isinstance(view, Tensor) and isinstance(first, Tensor) and not _have_same_rows(view, first):
                raise BatchError(
                    f"{type(self).__name__} was given the batch ({describe(first)}, {describe(view)}), which are "
                    f"not two views of the same rows; for rows with labels give the phase what makes views: "
                    f"{type(self).__name__}(views={self.advice})"
                )
        return tuple(views)

    def forward(self, learner: Any, state: StepState) -> None:
        """Embed both views."""
        view1, view2 = self.seen(state)
        state.features, state.z1 = self.embed(learner.model, view1)
        _, state.z2 = self.embed(learner.model, view2)

    def seen(self, state: StepState) -> tuple[Tensor, ...]:
        """Return the step's views; where the phase makes them, it does so here, on the device."""
        if self.views is not None:
            state.views = self._checked(self.views(state.xs))
        views: tuple[Tensor, ...] = state.views
        return views

    def embed(self, model: Any, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (N, F) and the embedding (N, D) of a view."""
        projector = getattr(model, "projector", None) if may_have(model, "projector") else None
        if projector is None and can_run(model):
            features = embedding = model(view)
        else:
            features = model.encoder(view)
            embedding = features if projector is None else projector(features)
        return features, embedding

    def require(self, learner: Any) -> None:
        """Raise for models without an encoder."""
        whole = can_run(learner.model) and not hasattr(learner.model, "projector")
        parts = self.parts or (() if whole else ("encoder",))
        require_parts(self, learner.model, *parts)


def _have_same_rows(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors may be views of the same rows; they may be of different size."""
    x, y = a.shape, b.shape
    return a.dtype == b.dtype and (x == y or (len(x) == len(y) and x[:1] == y[:1]))


class CropsPhase(JointEmbeddingPhase):
    """Base of methods with any number of views of each row, of which the first ones are global and the others local.

    Args:
        views: What makes the crops of a batch, such as ``MultiCrop(globally, locally, 4)``; left out, batches hold
            them.
        num_global: How many of the crops, the first ones, are global.

    Raises:
        PhaseError: `num_global` is less than 1.
        BatchError: There are fewer crops than `num_global`, or one alone.
    """

    num_views = None
    advice = "MultiCrop(global_crop, local_crop)"

    def __init__(self, views: Views | None = None, *, num_global: int = 2, **options: Any) -> None:
        super().__init__(views, **options)
        check_number(type(self).__name__, "num_global", num_global, least=1, whole=True, error=PhaseError)
        self.num_global = num_global

    def _checked(self, views: Any) -> tuple[Any, ...]:
        checked = super()._checked(views)
        if len(checked) < self.num_global:
            raise BatchError(
                f"{type(self).__name__} was given {describe(views)} as views; expected {self.num_global} global ones "
                f"and any number of local ones: {type(self).__name__}(views={self.advice})"
            )
        return checked


class ComparingPhase(JointEmbeddingPhase):
    """Base of methods whose loss compares the rows of a batch with each other, as contrastive ones do.

    Where several processes train, these are the rows of all processes: the loss, and its gradient, is that of one
    process on the joined batch. With ``Accelerator(accumulate=k)`` they are those of the small batch. What else there
    is to know is said by `JointEmbeddingPhase`.

    Args:
        views: What makes two views of a batch; left out, batches hold them.
        gather: Whether the rows of other processes count; False: each process compares its own alone.

    Raises:
        PhaseError: `gather` is not True or False.
    """

    def __init__(self, views: Views | None = None, *, gather: bool = True) -> None:
        super().__init__(views)
        if type(gather) is not bool:
            raise PhaseError(f"{type(self).__name__}(gather={gather!r}) was given; expected True or False")
        self.gather = gather

    def group(self, learner: Any) -> Group | None:
        """Return the processes whose rows are compared; None where this one's are alone."""
        group: Group | None = learner.accelerator.group if self.gather else None
        return group

    def find_keys(self, learner: Any, queries: Sequence[Tensor], keys: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the sum of `batch_nce` over pairs of queries and keys (N, D), among the keys of all processes."""
        group, own = self.group(learner), None
        if group is not None:
            keys, rows = join_rows(group, *keys)
            own = rows.own
            if not rows.counts[rows.rank]:  # what it finds weighs nothing; the others wait for it on the way back
                queries, own = [each[:1] for each in queries], slice(1)
        terms = [batch_nce(q, k, temperature, own=own) for q, k in zip(queries, keys, strict=True)]
        return torch.stack(terms).sum()


class TeacherPhase(JointEmbeddingPhase):
    """Have a ``student`` learn from a ``teacher``, its moving average; a subclass writes the loss.

    Both are models of the learner with the parts of a `JointEmbeddingPhase`. The teacher begins as
    a frozen copy, ``copy.deepcopy(student).requires_grad_(False)``, and
    ``EMA("student", 0.99, into="teacher")`` moves it after every update. Batches and arguments are
    those of a `JointEmbeddingPhase`.

    Raises:
        PhaseError: A model is missing, or no callback moves the teacher.

    Example:
        >>> class Alike(TeacherPhase):
        ...     def forward(self, learner, state):
        ...         state.z1, state.z2 = learner.model.student(state.views[0]), learner.model.teacher(state.views[1])
        ...     def loss(self, learner, state):
        ...         return torch.nn.functional.mse_loss(state.z1, state.z2)
        >>> student, teacher = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8).requires_grad_(False)
        >>> learner = Learner({"student": student, "teacher": teacher}, data=((torch.ones(8, 4), torch.ones(8, 4)),))
        >>> learner.fit(1, phases=[Alike()])
        Traceback (most recent call last):
        fluxloop.errors.PhaseError: ...
    """

    parts: tuple[str, ...] = ("student", "teacher")
    moves_teacher = False
    """Whether the phase moves the teacher itself, so that no callback has to."""

    def check(self, learner: Any) -> None:
        """Raise for missing models, and for a teacher that no callback moves."""
        super().check(learner)
        if self.moves_teacher:
            return
        require_moving_teacher(self, learner)


def require_moving_teacher(phase: Phase, learner: Any) -> None:
    """Raise for a teacher that no callback moves.

    Raises:
        PhaseError: Names the phase, a parameter, and what to add.
    """
    for name, _ in learner.model.teacher.named_parameters():
        if not learner.callbacks.writers(f"model.teacher.{name}"):
            raise PhaseError(
                f"{type(phase).__name__} learns from learner.model.teacher, of which no callback moves {name!r}; "
                "add EMA('student', 0.99, into='teacher') to the callbacks (a phase that moves it itself has "
                "moves_teacher = True)"
            )
