"""What is trained, the loop that a user writes by hand, the learner that does the same, and the check that it did."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fluxloop import Accelerator, Learner, Metrics, MetricsPrinter, ProgressBar, TrainingPhase, accuracy

Batches = Sequence[tuple[Tensor, Tensor]]
Optimizer = Callable[..., torch.optim.Optimizer]

CLOSE, CLOSE_LOSS = 5e-3, 1e-4
"""How far weights may lie apart where the arithmetic is ordered otherwise (fused, compiled), as a share of the way that
training moved them, and how far their losses as a share of the loss. One update of a hundred left out is over 1e-2."""


class Transformer(nn.Module):
    """Two layers over 32 tokens, their mean classified; without dropout, which draws other numbers on each side."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.position = nn.Parameter(torch.randn(32, 64) / 8)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(xs) + self.position).mean(1))


def mlp(*sizes: int) -> nn.Sequential:
    """Make linear layers with ReLU between them."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """Make two convolutions with batch norm, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


@dataclass(frozen=True)
class Workload:
    """A model and batches for it.

    Args:
        name: As it stands in the tables.
        model: Makes the model.
        shape: Of a batch of inputs; numbers, or tokens where `tokens` is given.
        classes: How many.
        steps: In a block that is timed as one.
        tokens: How many there are.
        pixels: Whether each pixel has a class, not each image.
    """

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    steps: int
    tokens: int = 0
    pixels: bool = False

    def batches(self, count: int, device: str = "cpu") -> Batches:
        """Make the same batches in every call."""
        generator = torch.Generator().manual_seed(0)

        def inputs() -> Tensor:
            if self.tokens:
                return torch.randint(self.tokens, self.shape, generator=generator)
            return torch.randn(self.shape, generator=generator)

        def pair() -> tuple[Tensor, Tensor]:
            labels = (self.shape[0], *self.shape[2:]) if self.pixels else self.shape[:1]
            return inputs().to(device), torch.randint(self.classes, labels, generator=generator).to(device)

        return [pair() for _ in range(count)]


TINY = Workload("tiny MLP 16-32-4, batch 32", partial(mlp, 16, 32, 4), (32, 16), 4, 200)
SMALL = Workload("small MLP 784-256-256-10, batch 128", partial(mlp, 784, 256, 256, 10), (128, 784), 10, 30)
CONV = Workload("convnet 1x28x28, batch 64", convnet, (64, 1, 28, 28), 10, 6)
TRANSFORMER = Workload("transformer 2x64, 32 tokens, batch 16", Transformer, (16, 32), 10, 10, tokens=256)
WORKLOADS = (TINY, SMALL, CONV, TRANSFORMER)

SGD: Optimizer = partial(torch.optim.SGD, lr=1e-3)
ADAMW: Optimizer = partial(torch.optim.AdamW, lr=1e-4)
ADAMW_PLAIN: Optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=False)
OPTIMIZERS = {"SGD": SGD, "AdamW": ADAMW, "AdamW, fused=False": ADAMW_PLAIN}
"""Left to itself fluxloop may choose AdamW's fused implementation; the other side has torch's default."""


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Train as PyTorch's tutorials do."""
    model.train()
    for xs, ys in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(xs), ys)
        loss.backward()
        optimizer.step()


@contextmanager
def tracking(steps: int, device: str = "cpu") -> Iterator[Callable[[Tensor, Tensor, Tensor], None]]:
    """Give what takes in (predictions, targets, loss) of a step: sums on the device, and a tqdm bar."""
    total_loss, total_hits = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    rows = 0
    with tqdm(total=steps, file=io.StringIO(), leave=False) as bar:

        def track(preds: Tensor, ys: Tensor, loss: Tensor) -> None:
            nonlocal total_loss, total_hits, rows
            with torch.no_grad():
                total_loss += loss.detach() * len(ys)
                total_hits += (preds.argmax(1) == ys).sum()
            rows += len(ys)
            bar.update(1)

        yield track
    _ = (total_loss / rows).item(), (total_hits / rows).item()


def tracking_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """Train, and track loss and accuracy on the device, with a tqdm bar."""
    model.train()
    device = str(next(model.parameters()).device)
    with tracking(len(batches), device) as track:
        for xs, ys in batches:
            optimizer.zero_grad()
            preds = model(xs)
            loss = cross_entropy(preds, ys)
            loss.backward()
            optimizer.step()
            track(preds, ys, loss)


@dataclass
class Side:
    """One way to train: calling it trains on all batches once."""

    model: nn.Module
    run: Callable[[], object]
    optimizer: torch.optim.Optimizer
    before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = tensors_of(self.model)

    def __call__(self) -> object:
        return self.run()


def plain_side(model: nn.Module, batches: Batches, optimizer: Optimizer, tracked: bool = False) -> Side:
    """Make the hand-written loop."""
    built = optimizer(model.parameters())
    epoch = tracking_epoch if tracked else plain_epoch
    return Side(model, lambda: epoch(model, built, batches), built)


def make_learner(
    model: nn.Module, batches: Any, optimizer: Optimizer, tracked: bool = False, device: str = "cpu", **options: Any
) -> Learner[nn.Module]:
    """Make the learner that does the same as the hand-written loop.

    Args:
        model: What it trains.
        batches: Its data.
        optimizer: A factory.
        tracked: Whether it has the default callbacks and accuracy, without the line per epoch, which the hand-written
            loop does not print.
        device: Where it trains.
        options: For the `Accelerator`.
    """
    callbacks = [Metrics(accuracy), ProgressBar(enabled=True, file=io.StringIO())] if tracked else []
    learner = Learner(
        model,
        cross_entropy,
        data=(batches,),
        optimizer=optimizer,
        callbacks=callbacks,
        default_callbacks=tracked,
        accelerator=Accelerator(device, **options),
        seed=0,
    )
    learner.remove_callback(MetricsPrinter)
    return learner


def fluxloop_side(
    model: nn.Module, batches: Batches, optimizer: Optimizer, tracked: bool = False, device: str = "cpu", **options: Any
) -> Side:
    """Make fluxloop's side."""
    learner = make_learner(model, batches, optimizer, tracked, device, **options)
    phase = TrainingPhase()
    return Side(model, lambda: learner.epoch(phase), learner.optimizer)


def both_sides(work: Workload, optimizer: Optimizer, tracked: bool = False) -> dict[str, Side]:
    """Make the hand-written loop and fluxloop, with equal weights and the same batches."""
    batches = work.batches(work.steps)
    model = work.model()
    return {
        "plain": plain_side(copy.deepcopy(model), batches, optimizer, tracked),
        "fluxloop": fluxloop_side(model, batches, optimizer, tracked),
    }


# Whether both trained the same


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Copy a model's weights and its buffers of numbers."""
    return [t.detach().clone() for t in model.state_dict().values() if t.is_floating_point()]


def updates_of(optimizer: torch.optim.Optimizer) -> int | None:
    """Give how often an optimizer has stepped, None where it keeps no count, as SGD does not."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return max(counts) if counts else None


def loss_of(model: nn.Module, batches: Batches) -> float:
    """Give the mean loss over batches, in training mode; the model is left as it is."""
    model, device = copy.deepcopy(model).train(), next(model.parameters()).device
    with torch.no_grad():
        losses = [cross_entropy(model(xs.to(device)), ys.to(device)).item() for xs, ys in batches]
    return sum(losses) / len(losses)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer steps through its fused implementation."""
    return any(group.get("fused") for group in optimizer.param_groups)


def distance(ours: Side, theirs: Side) -> float:
    """Give how far two sides' weights lie apart, as a share of the way that training moved theirs."""
    now = tensors_of(theirs.model)
    apart = sum((a - b).pow(2).sum().item() for a, b in zip(tensors_of(ours.model), now, strict=True))
    moved = sum((a - b).pow(2).sum().item() for a, b in zip(now, theirs.before, strict=True))
    return float((apart / moved) ** 0.5) if moved else float("inf")


class DifferentTrainingError(SystemExit):
    """Two sides did not train the same, so their times say nothing."""


def same_training(ours: Side, theirs: Side, batches: Batches, what: str, *, exact: bool) -> str:
    """Compare what two sides have trained.

    Args:
        ours: One side.
        theirs: The other, which began with the same weights.
        batches: What the loss is computed on.
        what: Named in the message.
        exact: Whether the weights have to agree to the bit, because the arithmetic is the same; else within `CLOSE`.

    Returns:
        How they agree, for the table.

    Raises:
        DifferentTrainingError: The number of updates, the weights or the loss differ, or nothing was trained.
    """
    updates = updates_of(ours.optimizer), updates_of(theirs.optimizer)
    if updates[0] != updates[1]:
        raise DifferentTrainingError(f"{what}: the sides made {updates[0]} and {updates[1]} updates")
    apart = distance(ours, theirs)
    if apart > (0 if exact else CLOSE):
        raise DifferentTrainingError(
            f"{what}: the sides' weights lie {apart:.2g} apart, as a share of the way that they moved; expected "
            f"{'the same bits' if exact else f'at most {CLOSE}'}"
        )
    losses = loss_of(ours.model, batches), loss_of(theirs.model, batches)
    if abs(losses[0] - losses[1]) > (0 if exact else CLOSE_LOSS * losses[1]):
        raise DifferentTrainingError(f"{what}: the sides' losses are {losses[0]} and {losses[1]}")
    return "same bits" if exact else f"{apart:.0e}"


def audition(make: Callable[[], dict[str, Side]], work: Workload, what: str, *, exact: bool | None = None) -> str:
    """Train fresh sides once, and compare all with the hand-written loop, before anything is timed.

    Args:
        make: Makes the sides; one is called "plain".
        work: What they train.
        what: Named in the message.
        exact: Whether to the bit; None: where both optimizers step through the same implementation.

    Returns:
        How they agree, for the table; of several sides, the last.

    Raises:
        DifferentTrainingError: They did not train the same.
    """
    torch.manual_seed(0)
    sides = make()
    for side in sides.values():
        side()
    theirs, agreement = sides.pop("plain"), ""
    for name, ours in sides.items():
        same = is_fused(ours.optimizer) == is_fused(theirs.optimizer) if exact is None else exact
        agreement = same_training(ours, theirs, work.batches(min(work.steps, 10)), f"{what}, {name}", exact=same)
    return agreement
