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

Per round each side runs an epoch, in alternating order. µs are medians over rounds of the wall time per batch,
the ratios medians of the rounds' ratios, of wall time and of CPU time (of this process alone: not that of
workers). Before that all sides are checked to give the same number of batches and the same rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timing import Table, arguments, interleave
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Accelerator, Learner, TensorBatches, TrainingPhase

WORK: dict[str, tuple[tuple[int, ...], int, int]] = {
    # shape of a row, batch size, batches per epoch
    "tiny (16), batch 32": ((16,), 32, 300),
    "mlp (784), batch 128": ((784,), 128, 60),
    "conv (1×28×28), batch 64": ((1, 28, 28), 64, 100),
}

REFERENCE = "DataLoader"


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


def main(argv: Sequence[str] | None = None) -> None:
    rounds = 6 if arguments(__doc__, argv).quick else 30
    torch.set_num_threads(1)
    gc.disable()
    print(f"One thread, medians of {rounds} interleaved rounds, µs per batch.\n")
    table = Table({"workload": "<24", "order": "<8", "side": "<35", "µs": ">8.2f", "ratio": ">6.3f", "CPU": ">6.3f"})
    for name, (shape, size, count) in WORK.items():
        xs = torch.randn(count * size, *shape, generator=torch.Generator().manual_seed(0))
        ys = torch.arange(len(xs))
        for shuffle in (True, False):
            epochs = make_sides(xs, ys, size, shuffle)
            for side, epoch in epochs.items():
                check(f"{name}, {side}", epoch, xs, count)
            counted = {side: partial(epoch, lambda batch: None) for side, epoch in epochs.items()}
            got = interleave(lambda sides=counted: sides, units=count, rounds=rounds)
            for side in counted:
                order = "shuffled" if shuffle else "in order"
                table.row(
                    name, order, side, got.micro(side), got.ratio(side, REFERENCE), got.cpu_ratio(side, REFERENCE)
                )


if __name__ == "__main__":
    main()
