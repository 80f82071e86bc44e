"""What a training step costs: fluxloop against a hand-written loop.

    python benchmarks/step_overhead.py            # the table
    python benchmarks/step_overhead.py --quick    # fewer rounds and rows

Each side trains the same model from the same weights on the same batches. Per round each runs a
block of steps; the ratio is the median of the rounds' ratios.

"defaults" are the default callbacks plus accuracy, without the line per epoch, against a loop that
tracks loss and accuracy on the device and drives a tqdm bar. "AdamW" is the factory as it is, for
which fluxloop may choose the fused implementation, against torch's default; with ``fused=False``
both sides compute the same bits. "trained" says how the weights agreed after a block: to the bit,
or how far they lay apart as a share of the way that training moved them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timing import Table, arguments, interleave, print_added
from workloads import (
    CONV,
    OPTIMIZERS,
    SMALL,
    TINY,
    TRANSFORMER,
    WORKLOADS,
    Batches,
    Side,
    Workload,
    audition,
    both_sides,
    make_learner,
    same_training,
)

from fluxloop import StopOnNaNLoss, TrainingPhase

COLUMNS = {
    "workload": "<37",
    "optimizer": "<18",
    "callbacks": "<9",
    "threads": ">7",
    "plain µs": ">9.1f",
    "fluxloop µs": ">11.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
    "trained": "<9",
}


def rows(quick: bool) -> list[tuple[int, Workload, str, bool]]:
    """List what is measured: threads, workload, optimizer, whether with the default callbacks."""
    if quick:
        alone = [
            (1, work, label, tracked) for work in (TINY, SMALL) for label in OPTIMIZERS for tracked in (False, True)
        ]
        return [*alone, (1, CONV, "AdamW", False), (1, TRANSFORMER, "AdamW", False), (2, TINY, "AdamW", False)]
    every = itertools.product((1, 2), WORKLOADS, OPTIMIZERS, (False, True))
    return [row for row in every if row[0] == 1 or "fused" not in row[2]]


def measure(table: Table, work: Workload, label: str, tracked: bool, threads: int, quick: bool) -> None:
    """Measure one row."""
    torch.set_num_threads(threads)
    optimizer = OPTIMIZERS[label]
    sides: dict[str, Side] = {}

    def make() -> dict[str, Side]:
        sides.update(both_sides(work, optimizer, tracked))
        return dict(sides)

    kind = "defaults" if tracked else "bare"
    what = f"{work.name}, {label}, {kind}, {threads} threads"
    agreement = audition(make, work, what)

    def check() -> None:
        if agreement == "same bits":
            same_training(sides["fluxloop"], sides["plain"], work.batches(2), what, exact=True)

    rounds, starts = (5, 1) if quick else (60 if threads == 1 else 24, 6)
    got = interleave(make, units=work.steps, rounds=rounds, starts=starts, check=check)
    times = got.micro("plain"), got.micro("fluxloop")
    ratios = got.ratio("fluxloop", "plain"), got.cpu_ratio("fluxloop", "plain")
    table.row(work.name, label, kind, str(threads), *times, *ratios, agreement)


def looked_at(quick: bool) -> None:
    """Print what it costs that losses and gradients are looked at before they are used."""
    print("\nWhat `StopOnNaNLoss` adds to a bare step: loss and gradients are looked at, buffers are kept.\n")
    for work in (SMALL, CONV):
        batches = work.batches(work.steps)

        def make(work: Workload = work, batches: Batches = batches) -> dict[str, Callable[[], None]]:
            sides, model = {}, work.model()
            for name, callbacks in (("bare", []), ("with StopOnNaNLoss", [StopOnNaNLoss()])):
                learner = make_learner(copy.deepcopy(model), batches, OPTIMIZERS["AdamW"])
                learner.set_callbacks(callbacks)
                sides[f"{work.name}, AdamW, {name}"] = partial(learner.epoch, TrainingPhase())
            return sides

        rounds, starts = (5, 1) if quick else (60, 6)
        print_added("a step of", interleave(make, units=work.steps, rounds=rounds, starts=starts), [1, 1])


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    table = Table(COLUMNS)
    for threads, work, label, tracked in rows(quick):
        measure(table, work, label, tracked, threads, quick)
    torch.set_num_threads(1)
    looked_at(quick)


if __name__ == "__main__":
    main()
