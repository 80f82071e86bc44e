"""What a batch costs before anything is done with it: `TensorBatches` and loaders, interleaved in one process.

    python benchmarks/data.py            # the table
    python benchmarks/data.py --quick    # fewer rounds

Each side gives all rows of the same tensors once per epoch, in batches: floats of the shape named, and a
class. The first side, a ``DataLoader`` over a ``TensorDataset`` as PyTorch's tutorials write it, is what
the others are compared with:

- *by hand*: ``xs[rows], ys[rows]`` for the rows of each batch, from one ``randperm`` per epoch;
- *2 workers*: the loader with ``num_workers=2, persistent_workers=True``;
- *in a learner*: an epoch of a fluxloop phase whose step does nothing, so it is what the learner adds to
  fetching (or takes away: it fetches whole batches from such a loader);
- *TensorBatches*, alone and in a learner.

Per round each side runs an epoch, in alternating order. Wall time and CPU time (of this process alone: not
that of workers) are medians over rounds of the time per batch, and the ratios medians of the rounds' ratios.
Before that all sides are checked to give the same number of batches and the same rows. One thread.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator, Learner, TensorBatches, TrainingPhase

WORK: dict[str, tuple[tuple[int, ...], int, int]] = {
    # shape of a row, batch size, batches per epoch
    "tiny (16), batch 32": ((16,), 32, 300),
    "mlp (784), batch 128": ((784,), 128, 60),
    "conv (1×28×28), batch 64": ((1, 28, 28), 64, 100),
}

WARM_UP = 2
REFERENCE = "DataLoader"


def interleaved(
    sides: dict[str, Callable[[], int]], rounds: int, reference: str
) -> dict[str, tuple[float, float, float, float]]:
    """Run all sides in turn, each round in the other direction.

    Args:
        sides: By name, what does a side's work and gives how many units it did.
        rounds: How often.
        reference: The side that the others are compared with.

    Returns:
        By name, the medians of wall and CPU time per unit in µs, and of the rounds' ratios of both.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + WARM_UP):
        for name in list(sides) if index % 2 else reversed(sides):
            gc.collect()
            start, start_cpu = time.perf_counter(), time.process_time()
            units = sides[name]()
            if index >= WARM_UP:
                cpu[name].append((time.process_time() - start_cpu) / units * 1e6)
                wall[name].append((time.perf_counter() - start) / units * 1e6)

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return median(ours / other for ours, other in zip(times[name], times[reference], strict=True))

    return {name: (median(wall[name]), median(cpu[name]), ratio(wall, name), ratio(cpu, name)) for name in sides}


class Fetching(TrainingPhase):
    """Takes batches and does nothing with them."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self.take = take

    def step(self, learner: Learner[Any], batch: Any) -> None:
        self.take(batch)


class ByHand:
    """A loop over whole batches as one would write it."""

    def __init__(self, xs: Tensor, ys: Tensor, batch_size: int, shuffle: bool) -> None:
        self.xs, self.ys, self.batch_size, self.shuffle = xs, ys, batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.xs)) if self.shuffle else None
        for start in range(0, len(self.xs), self.batch_size):
            rows = slice(start, start + self.batch_size) if order is None else order[start : start + self.batch_size]
            yield self.xs[rows], self.ys[rows]


Epoch = Callable[[Callable[[Any], None]], None]


def alone(source: Iterable[Any]) -> Epoch:
    """Give what calls a function with each batch of a source."""

    def run(take: Callable[[Any], None]) -> None:
        for batch in source:
            take(batch)

    return run


def in_learner(source: Iterable[Any]) -> Epoch:
    """Give what does the same in an epoch of a learner."""
    learner = Learner(nn.Linear(1, 1), data=(source,), default_callbacks=False, accelerator=Accelerator("cpu"), seed=0)
    return lambda take: learner.epoch(Fetching(take))


def make_sides(xs: Tensor, ys: Tensor, batch_size: int, shuffle: bool) -> dict[str, Epoch]:
    rows = TensorDataset(xs, ys)

    def loader(**options: Any) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, **options)

    def batches() -> TensorBatches:
        return TensorBatches(xs, ys, batch_size=batch_size, shuffle=shuffle)

    workers = {"num_workers": 2, "persistent_workers": True}
    return {
        REFERENCE: alone(loader()),
        "DataLoader in a learner": in_learner(loader()),
        "DataLoader, 2 workers": alone(loader(**workers)),
        "DataLoader, 2 workers, in a learner": in_learner(loader(**workers)),
        "by hand": alone(ByHand(xs, ys, batch_size, shuffle)),
        "TensorBatches": alone(batches()),
        "TensorBatches in a learner": in_learner(batches()),
    }


def check(name: str, epoch: Epoch, xs: Tensor, count: int) -> None:
    """Stop where a side does not give `count` batches with each row once."""
    batches: list[tuple[Tensor, Tensor]] = []
    epoch(batches.append)
    rows = torch.cat([rows for _, rows in batches])
    same = torch.equal(torch.cat([batch for batch, _ in batches]), xs[rows])
    if len(batches) != count or not same or not torch.equal(rows.sort().values, torch.arange(len(xs))):
        raise SystemExit(f"{name}: expected {count} batches with each row once")


def count_batches(epoch: Epoch) -> Callable[[], int]:
    def run() -> int:
        count = 0

        def take(batch: Any) -> None:
            nonlocal count
            count += 1

        epoch(take)
        return count

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    rounds = 10 if arguments.quick else 40
    print(f"torch {torch.__version__}, one thread, medians of {rounds} interleaved rounds, µs per batch")
    print(f"{'workload':<26}{'order':<10}{'side':<37}{'wall':>9}{'CPU':>9}{'ratio':>8}{'of CPU':>8}")
    for name, (shape, size, count) in WORK.items():
        xs = torch.randn(count * size, *shape, generator=torch.Generator().manual_seed(0))
        ys = torch.arange(len(xs))
        for shuffle in (True, False):
            sides = make_sides(xs, ys, size, shuffle)
            for side, epoch in sides.items():
                check(f"{name}, {side}", epoch, xs, count)
            results = interleaved({side: count_batches(epoch) for side, epoch in sides.items()}, rounds, REFERENCE)
            for side, (wall, cpu, ratio, cpu_ratio) in results.items():
                order = "shuffled" if shuffle else "in order"
                figures = f"{wall:>9.2f}{cpu:>9.2f}{ratio:>8.3f}{cpu_ratio:>8.3f}"
                print(f"{name:<26}{order:<10}{side:<37}{figures}", flush=True)


if __name__ == "__main__":
    main()
