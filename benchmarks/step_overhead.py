"""What a training step costs: fluxloop against a hand-written loop, interleaved in one process.

    python benchmarks/step_overhead.py            # the table
    python benchmarks/step_overhead.py --quick    # fewer rounds

Each side trains the same model from the same weights on the same batches with the same
optimizer; after every comparison the weights are checked to agree to the bit. One thread. Per round
each side runs a block of steps, in alternating order; the figure is the median over rounds of the
time per step, and the ratio is the median of the rounds' ratios. Both sides are made anew several
times, because where the allocator puts the weights changes the time of the larger model.

"defaults" are the default callbacks plus accuracy, without the line per epoch, against a loop that
tracks loss and accuracy on the device and drives a tqdm bar.
"""

from __future__ import annotations

import argparse
import gc
import io
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fluxloop import Accelerator, Learner, Metrics, MetricsPrinter, ProgressBar, TrainingPhase, accuracy

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


WORK: dict[str, tuple[Callable[[], nn.Module], int, int, int, int]] = {
    # model, inputs, classes, batch size, steps per block
    "tiny 16-32-4, batch 32": (tiny, 16, 4, 32, 300),
    "small 784-256-256-10, batch 128": (small, 784, 10, 128, 40),
}

FRESH_STARTS = 6
WARM_UP = 2

OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=1e-4),
}


def make_batches(inputs: int, classes: int, size: int, count: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, inputs, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """A loop as PyTorch's tutorials write it."""
    loss_fn = nn.functional.cross_entropy
    model.train()
    for xs, ys in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(xs), ys)
        loss.backward()
        optimizer.step()


def tracking_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """The same, tracking loss and accuracy on the device and driving a tqdm bar."""
    loss_fn = nn.functional.cross_entropy
    model.train()
    total_loss = torch.zeros((), dtype=torch.float64)
    total_hits = torch.zeros((), dtype=torch.float64)
    rows = 0
    with tqdm(total=len(batches), file=io.StringIO(), leave=False) as bar:
        for xs, ys in batches:
            optimizer.zero_grad()
            preds = model(xs)
            loss = loss_fn(preds, ys)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                total_loss += loss.detach() * len(xs)
                total_hits += (preds.argmax(1) == ys).sum()
            rows += len(xs)
            bar.update(1)
        _ = (total_loss / rows).item(), (total_hits / rows).item()


def make_sides(name: str, optimizer: Any, defaults: bool) -> tuple[nn.Module, nn.Module, dict[str, Callable[[], None]]]:
    """Make both sides with equal weights and batches; give the models and what trains each for an epoch."""
    make, inputs, classes, size, steps = WORK[name]
    batches = make_batches(inputs, classes, size, steps)
    theirs, ours = make(), make()
    ours.load_state_dict(theirs.state_dict())
    their_optimizer = optimizer(theirs.parameters())
    callbacks: list[Any] = [Metrics(accuracy), ProgressBar(enabled=True, file=io.StringIO())] if defaults else []
    learner = Learner(
        ours,
        nn.functional.cross_entropy,
        data=(batches,),
        optimizer=optimizer,
        callbacks=callbacks,
        default_callbacks=defaults,
        accelerator=Accelerator("cpu"),
        seed=0,
    )
    learner.remove_callback(MetricsPrinter)  # a line per epoch, which the hand-written loop does not print
    phase = TrainingPhase()
    epoch = tracking_epoch if defaults else plain_epoch
    return (
        theirs,
        ours,
        {"plain": lambda: epoch(theirs, their_optimizer, batches), "fluxloop": lambda: learner.epoch(phase)},
    )


def compare(name: str, optimizer: Any, defaults: bool, rounds: int) -> tuple[float, float, float]:
    """Give the medians of µs per step of both sides, and of the rounds' ratios."""
    steps = WORK[name][-1]
    times: dict[str, list[float]] = {"plain": [], "fluxloop": []}
    for start_over in range(FRESH_STARTS):
        torch.manual_seed(start_over)
        theirs, ours, sides = make_sides(name, optimizer, defaults)
        for index in range(rounds // FRESH_STARTS + WARM_UP):
            for side in ["plain", "fluxloop"] if index % 2 else ["fluxloop", "plain"]:
                start = time.perf_counter()
                sides[side]()
                if index >= WARM_UP:
                    times[side].append((time.perf_counter() - start) / steps * 1e6)
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            if not torch.equal(a, b):
                raise SystemExit(f"{name}: the two sides did not train the same")
        gc.collect()
    ratios = [b / a for a, b in zip(times["plain"], times["fluxloop"], strict=True)]
    return median(times["plain"]), median(times["fluxloop"]), median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    rounds = 18 if arguments.quick else 60
    print(f"torch {torch.__version__}, one thread, medians of {rounds} interleaved rounds, µs per step")
    print(f"{'workload':<34}{'optimizer':<11}{'callbacks':<11}{'plain':>8}{'fluxloop':>10}{'ratio':>8}")
    for name in WORK:
        for label, optimizer in OPTIMIZERS.items():
            for defaults in (False, True):
                plain, ours, ratio = compare(name, optimizer, defaults, rounds)
                kind = "defaults" if defaults else "bare"
                print(f"{name:<34}{label:<11}{kind:<11}{plain:>8.1f}{ours:>10.1f}{ratio:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
