"""Train on mixtures of rows: mixup and CutMix."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional

from fluxloop.callback import Callback, Handler, RunFirst, on, resolve_conflict
from fluxloop.errors import DataError, LossError, describe
from fluxloop.events import Event, LossBegin, StepBegin, StepEnd
from fluxloop.guard.given import is_number
from fluxloop.losses.mixed import MixedLoss, MixedTargets
from fluxloop.nested import map_tensors, tensors
from fluxloop.phase import AbstractTrainingPhase, Phase
from fluxloop.randomness import preserved, start_torch, stream_seed

HARD_ONLY = (functional.nll_loss, functional.multi_margin_loss, nn.NLLLoss, nn.MultiMarginLoss)
"""Loss functions that take classes and no probabilities."""


@define
class Mixing(Callback):
    """Base of callbacks that mix each row of a training batch with another one.

    A subclass mixes in `mix`. The step's ``xs`` are replaced at `StepBegin`, and ``ys``:

    - numbers (regression targets, probabilities) are mixed by each row's share;
    - classes, whole numbers, become probabilities, mixed likewise, as soon as the number of classes
      is known: at `LossBegin` from ``preds`` of shape (N, C, …), or at once with `num_classes`;
      torch's cross entropy takes them as it takes classes. After the step ``ys`` are classes again,
      for metrics: each row's class with the larger share;
    - with a `MixedLoss` as loss function they become `MixedTargets`, whatever they are, and after
      the step those with the larger share.

    Validation is not touched. The numbers come from a stream of their own.

    Args:
        alpha: Shares are drawn from the distribution Beta(alpha, alpha), above 0.
        num_classes: Number of classes, for phases that fire no `LossBegin` or store no ``preds``.

    Raises:
        DataError: ``xs`` or ``ys`` cannot be mixed.
        LossError: The loss function takes no probabilities.
        ValueError: A number out of range.

    Reads: step.preds, loss_fn, seed
    Writes: step.xs, step.ys
    """

    alpha: float = 1.0
    num_classes: int | None = field(default=None, kw_only=True)
    _count: int = field(default=0, init=False, repr=False)
    """Batches mixed, which numbers the streams of random numbers."""
    _waiting: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    """Partners and shares of the rows, until the number of classes is known."""
    _after: Any = field(default=None, init=False, repr=False)
    """The targets that metrics get after the step; None for those that stay as they are."""

    reads = ("step.preds", "loss_fn", "seed")
    writes = ("step.xs", "step.ys")
    transient = ("_waiting", "_after")
    draws = False  # what it draws is put back
    _fixed = ("num_classes",)

    def __attrs_post_init__(self) -> None:
        kind = type(self).__name__
        if not is_number(self.alpha) or not 0 < self.alpha < inf:
            raise ValueError(f"{kind}({self.alpha!r}) was given; expected a number above 0: {kind}(0.4)")
        if self.num_classes is not None and (not is_number(self.num_classes, whole=True) or self.num_classes < 2):
            raise ValueError(f"{kind}(num_classes={self.num_classes!r}) was given; expected 2 or more, or None")

    def init(self, learner: Any) -> None:
        """Begin anew."""
        self._count = 0
        self._forget()

    def _forget(self) -> None:
        self._waiting = self._after = None

    def handler(self, event: type[Event], phase: type[Phase]) -> Handler | None:
        """Return no handler inside the step where the number of classes is known when it begins."""
        if self.num_classes is not None and issubclass(event, LossBegin):
            return None
        return super().handler(event, phase)

    def mix(self, xs: Any) -> tuple[Any, Tensor, Tensor]:
        """Mix rows, with random numbers from torch's generator.

        Args:
            xs: The step's.

        Returns:
            The mixed rows, which row each was mixed with (N,), and the share of its own (N,).
        """
        raise NotImplementedError

    @on(StepBegin, AbstractTrainingPhase)
    def replace(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Mix the batch."""
        self._forget()
        xs, ys = learner.step.xs, learner.step.ys
        with preserved(numpy_too=False):
            start_torch(stream_seed(learner.seed, f"callback/{self.name or type(self).__name__}", self._count))
            mixed, order, share = self.mix(xs)
        self._count += 1
        if any(len(leaf) != len(order) for leaf in tensors(ys) if leaf.ndim) or next(tensors(ys), None) is None:
            raise DataError(f"{type(self).__name__} was given targets {describe(ys)}; expected {len(order)} rows")
        learner.step.xs = mixed
        others = map_tensors(lambda leaf: leaf[order] if leaf.ndim else leaf, ys)
        if isinstance(learner.loss_fn, MixedLoss):
            learner.step.ys = MixedTargets(ys, others, share)
            self._after = _plain(learner.step.ys)
        elif not isinstance(ys, Tensor):
            raise DataError(
                f"{type(self).__name__} was given targets that are {describe(ys)}; expected a tensor, or "
                "Learner(..., MixedLoss(loss_fn)) with a loss function that takes them"
            )
        elif ys.is_floating_point():
            learner.step.ys = torch.lerp(others, ys, _beside(share, ys))
        else:
            _check_takes_probabilities(learner.loss_fn)
            self._waiting, self._after = (order, share), _larger(ys, others, share)
            if self.num_classes is not None:
                dtypes = (leaf.dtype for leaf in tensors(mixed) if leaf.is_floating_point())
                self._soften(learner, self.num_classes, next(dtypes, torch.get_default_dtype()))

    @on(LossBegin, AbstractTrainingPhase)
    def soften(self, event: LossBegin, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Mix the classes' probabilities."""
        if self._waiting is None:
            return
        preds = learner.step.preds if "preds" in learner.step else None
        if not isinstance(preds, Tensor) or preds.ndim < 2:
            raise DataError(
                f"{type(self).__name__} reads the number of classes from preds of shape (N, C, …), and they are "
                f"{describe(preds)}; say it: {type(self).__name__}({self.alpha}, num_classes=10)"
            )
        self._soften(learner, preds.shape[1], preds.dtype)

    def _soften(self, learner: Any, num_classes: int, dtype: torch.dtype) -> None:
        if self._waiting is None:
            return
        (order, share), self._waiting = self._waiting, None
        ys = learner.step.ys
        if not ys.is_floating_point():  # else another mixing has done it
            ys = functional.one_hot(ys.long(), num_classes).movedim(-1, 1).to(dtype)
        learner.step.ys = torch.lerp(ys[order], ys, _beside(share, ys))

    @on(StepEnd, AbstractTrainingPhase)
    def end_step(self, event: StepEnd, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Set classes as targets again, for metrics."""
        if self._waiting is not None:
            raise LossError(
                f"{type(phase).__name__} fires no LossBegin, so its loss saw targets that were not mixed; say the "
                f"number of classes: {type(self).__name__}({self.alpha}, num_classes=10)"
            )
        if self._after is not None:
            learner.step.ys = self._after
        self._forget()


@define
class MixUp(Mixing):
    """Train on mixtures of two rows, inputs and targets alike (mixup, Zhang et al., 2018).

    Each row becomes ``w * x + (1 - w) * x[other]``. As in luz, the share w of each row is its own,
    and the larger of a draw from Beta(alpha, alpha) and its complement, so a row stays at least half
    itself; the rows mixed in are a permutation of the batch.

    For the loss, classes become probabilities; after the step, for metrics, they are classes again,
    each row's own. `Mixing` says what becomes of other ``ys``.

    Args:
        alpha: Of the distribution, above 0; with a small one most rows are hardly mixed.
        num_classes: Number of classes, for phases that fire no `LossBegin` or store no ``preds``.

    Raises:
        DataError: ``xs`` (numbers, in any nesting) or ``ys`` cannot be mixed.
        LossError: The loss function takes no probabilities: give it as ``MixedLoss(loss_fn)``.
        ValueError: A number out of range.

    Reads: step.preds, loss_fn, seed
    Writes: step.xs, step.ys

    Example:
        >>> data = ((torch.randn(32, 4), torch.arange(32) % 3),)
        >>> show = CustomCallback(lambda learner: print(tuple(learner.step.ys.shape)), LossBegin)
        >>> learner = Learner(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data=data, default_callbacks=False)
        >>> learner.set_callbacks([MixUp(0.4), show])
        >>> history = learner.fit(1)  # of classes the loss sees probabilities
        (32, 3)
    """

    alpha: float = 0.4
    num_classes: int | None = field(default=None, kw_only=True)

    def mix(self, xs: Any) -> tuple[Any, Tensor, Tensor]:
        """Mix each row with another."""
        first = _first(self, xs)
        share = Beta(self.alpha, self.alpha, validate_args=False).sample((len(first),))
        share = _on_device_of(torch.maximum(share, 1 - share), first)
        order = _on_device_of(torch.randperm(len(first)), first)
        return map_tensors(lambda x: torch.lerp(x[order], x, _beside(share, x)), xs), order, share


@define
class CutMix(Mixing):
    """Replace a box of each image by that of another, and its target in that proportion (Yun et al., 2019).

    Of each image (N, C, H, W) a box of its own is cut: its sides are ``sqrt(1 - w)`` of the image's,
    with w from Beta(alpha, alpha), its centre is anywhere, and what lies outside is cut off. The
    share of the image is that of the area that remains. Of sequences (N, C, L) and rows (N, L) it
    is an interval of length ``1 - w``, of volumes the cube root. Targets of places, such as a mask,
    are not cut but mixed: they need a callback of their own.

    For the loss, classes become probabilities; after the step, for metrics, they are classes again,
    those with the larger share. `Mixing` says what becomes of other ``ys``.

    Args:
        alpha: Of the distribution, above 0; with 1 every share is equally likely.
        num_classes: Number of classes, for phases that fire no `LossBegin` or store no ``preds``.

    Raises:
        DataError: ``xs`` is no tensor of several dimensions, or ``ys`` cannot be mixed.
        LossError: The loss function takes no probabilities: give it as ``MixedLoss(loss_fn)``.
        ValueError: A number out of range.

    Reads: step.preds, loss_fn, seed
    Writes: step.xs, step.ys

    Example:
        >>> data = ((torch.zeros(32, 1, 8, 8), torch.arange(32) % 3),)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> show = CustomCallback(lambda learner: print(learner.step.ys.sum(1).unique()), LossBegin)
        >>> learner = Learner(model, torch.nn.CrossEntropyLoss(), data=data, default_callbacks=False)
        >>> learner.set_callbacks([CutMix(), show])
        >>> history = learner.fit(1)  # the shares of two classes
        tensor([1.])
    """

    alpha: float = 1.0
    num_classes: int | None = field(default=None, kw_only=True)

    def mix(self, xs: Any) -> tuple[Any, Tensor, Tensor]:
        """Cut a box from each image and fill it from another."""
        if not isinstance(xs, Tensor) or xs.ndim < 2:
            raise DataError(f"CutMix was given {describe(xs)}; expected images of shape (N, C, H, W)")
        number, sizes = len(xs), xs.shape[2:] or xs.shape[1:]
        side = (1 - Beta(self.alpha, self.alpha, validate_args=False).sample((number,))) ** (1 / len(sizes))
        edges, area = [], torch.ones(number)
        for size in sizes:
            centre, half = torch.rand(number) * size, side * size / 2
            edges += [edge.round().clamp(0, size) for edge in (centre - half, centre + half)]
            area = area * (edges[-1] - edges[-2])
        order = _on_device_of(torch.randperm(number), xs)
        share, *edges = _on_device_of(torch.stack((1 - area / prod(sizes), *edges)), xs)
        # the boxes are made where the images are: their edges are small
        box = torch.ones((), dtype=torch.bool, device=xs.device)
        for dim, size in enumerate(sizes):
            shape = [number, *[1] * (xs.ndim - 1)]
            begin, end = edges[2 * dim].view(shape), edges[2 * dim + 1].view(shape)
            shape[0], shape[dim - len(sizes)] = 1, size
            places = torch.arange(size, device=xs.device).view(shape)
            box = box & (places >= begin) & (places < end)
        return torch.where(box, xs[order], xs), order, share


@resolve_conflict.register(MixUp, CutMix)  # type: ignore[untyped-decorator]  # multipledispatch has no types
def _one_after_the_other(a: MixUp, b: CutMix) -> RunFirst:
    """Boxes are cut from mixtures."""
    return RunFirst(a)


def _on_device_of(drawn: Tensor, rows: Tensor) -> Tensor:
    """Copy what was drawn to the rows' device, without waiting for it."""
    return drawn.to(rows.device, non_blocking=True)


def _beside(share: Tensor, rows: Tensor) -> Tensor:
    """Shape the shares (N,) so that each stands beside its row."""
    return share.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))


def _first(mixing: Mixing, xs: Any) -> Tensor:
    """Return the first tensor of inputs that can be mixed.

    Raises:
        DataError: There is none, or one holds no rows of numbers.
    """
    found = list(tensors(xs))
    for leaf in found:
        if not leaf.is_floating_point() or leaf.ndim == 0 or len(leaf) != len(found[0]):
            raise DataError(
                f"{type(mixing).__name__} was given {describe(leaf)} of {leaf.dtype} in xs; expected rows of floating "
                "point numbers: convert them, such as xs.float() / 255"
            )
    if not found:
        raise DataError(f"{type(mixing).__name__} was given {describe(xs)} as xs; expected a tensor")
    return found[0]


def _larger(ys: Any, others: Any, share: Tensor) -> Any:
    """Return the targets with the larger share, row by row."""
    both = iter(list(tensors(others)))

    def choose(leaf: Tensor) -> Tensor:
        other = next(both)
        return torch.where(share.view(-1, *[1] * (leaf.ndim - 1)) >= 0.5, leaf, other) if leaf.ndim else leaf

    return map_tensors(choose, ys)


def _plain(targets: Any) -> Any:
    """Return the targets with the larger share, of mixtures of mixtures too."""
    if not isinstance(targets, MixedTargets):
        return targets
    return _larger(_plain(targets.first), _plain(targets.second), targets.weight)


def _check_takes_probabilities(loss_fn: Any) -> None:
    """Raise for a loss function that is known to take classes alone.

    Raises:
        LossError: Says what to give instead.
    """
    given = getattr(loss_fn, "func", loss_fn)
    if any(given is hard or (isinstance(hard, type) and isinstance(given, hard)) for hard in HARD_ONLY):
        name = getattr(given, "__name__", f"nn.{type(given).__name__}()")
        raise LossError(
            f"the loss function {name} takes classes and no probabilities; give it as MixedLoss({name}), which blends "
            "the losses of both classes row by row"
        )
