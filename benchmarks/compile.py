"""What compiling is worth: the whole step, or the model alone, against the hand-written eager loop.

    python benchmarks/compile.py            # the table
    python benchmarks/compile.py --quick    # the smallest alone, fewer rounds

``Accelerator(compile="step")`` makes one graph of forward, loss, backward and update where no
callback looks in between, so the learners have none; ``compile="model"`` is ``torch.compile`` of
the model. "plain" is the eager loop with torch's default optimizer. "build s" is what the first
epoch took beyond a later one, with nothing cached by an earlier run. One thread.

Before anything is timed, each side trains 100 steps from the same weights: "trained" is how far
its weights lie from the eager ones then, as a share of the way that training moved them.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import time
from collections.abc import Sequence

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # before torch is imported, which reads it

import torch
from timing import Table, arguments, interleave, skip
from workloads import (
    ADAMW,
    SGD,
    SMALL,
    TINY,
    WORKLOADS,
    Optimizer,
    Side,
    Workload,
    fluxloop_side,
    plain_side,
    same_training,
)

from fluxloop import Accelerator

MODES = ("step", "model")
CHECKED_STEPS = 100

COLUMNS = {
    "workload": "<37",
    "optimizer": "<9",
    "compiled": "<8",
    "plain µs": ">9.1f",
    "fluxloop µs": ">11.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
    "build s": ">7.1f",
    "trained": "<7",
}


def make(work: Workload, optimizer: Optimizer, steps: int) -> dict[str, Side]:
    """Make the eager loop and both compiled learners, with equal weights and the same batches."""
    batches, model = work.batches(steps), work.model()
    compiled = {mode: fluxloop_side(copy.deepcopy(model), batches, optimizer, compile=mode) for mode in MODES}
    return {"plain": plain_side(model, batches, optimizer), **compiled}


def measure(table: Table, work: Workload, label: str, optimizer: Optimizer, quick: bool) -> None:
    """Measure one workload with one optimizer: a row for each way of compiling."""
    torch.compiler.reset()
    torch.manual_seed(0)
    sides = make(work, optimizer, CHECKED_STEPS)
    first: dict[str, float] = {}
    for name, side in sides.items():
        began = time.perf_counter()
        side()
        first[name] = time.perf_counter() - began
    few, what = work.batches(10), f"{work.name}, {label}, compile="
    trained = {m: same_training(sides[m], sides["plain"], few, f"{what}{m!r}", exact=False) for m in MODES}
    got = interleave(lambda: sides, units=CHECKED_STEPS, rounds=4 if quick else rounds_of(work), warm_up=1)
    for mode in MODES:
        ratios = got.ratio(mode, "plain"), got.cpu_ratio(mode, "plain")
        times = got.micro("plain"), got.micro(mode)
        build = first[mode] - times[1] * CHECKED_STEPS / 1e6
        table.row(work.name, label, mode, *times, *ratios, max(build, 0.0), trained[mode])


def rounds_of(work: Workload) -> int:
    """Give fewer rounds to workloads whose steps are long."""
    return 40 if work.steps >= SMALL.steps else 8


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    if "compile" not in inspect.signature(Accelerator).parameters:
        skip("this fluxloop's Accelerator has no argument compile")
        return
    torch.set_num_threads(1)
    table = Table(COLUMNS)
    works = (TINY,) if quick else WORKLOADS
    for work, (label, optimizer) in itertools.product(works, {"SGD": SGD, "AdamW": ADAMW}.items()):
        measure(table, work, label, optimizer, quick)


if __name__ == "__main__":
    main()
