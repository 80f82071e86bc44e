"""What a training step of several processes costs: fluxloop against a loop written by hand with DDP.

    python benchmarks/processes.py            # the table
    python benchmarks/processes.py --quick    # fewer rounds, two processes

All processes run on this machine (gloo), with one thread each. Each side trains the same model from the
same weights on the same batches; a process takes every W-th. Times are those of the first process: µs
of a step on the clock, and CPU time, of all threads, as a ratio. Where there are more processes than
cores the clock says little, as they wait for one another.

"messages" is how many an update sends, and "buckets" in how many the gradients are divided. The
optimizer of both sides is the fused one, where there is one.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch
from timing import Table, arguments, interleave
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from workloads import Optimizer, Side, Workload, audition, make_learner, mlp, plain_epoch

from fluxloop import Accelerator, Learner, TrainingPhase

COLUMNS = {
    "workload": "<33",
    "optimizer": "<9",
    "processes": ">9",
    "DDP µs": ">9.0f",
    "fluxloop µs": ">11.0f",
    "CPU ratio": ">9.3f",
    "with views": ">10.3f",
    "messages": ">8.1f",
    "buckets": ">7.0f",
    "trained": "<9",
}

SMALL = Workload("MLP of 1,864 parameters, batch 32", partial(mlp, 16, 32, 32, 8), (32, 16), 8, 60)
LARGE = Workload("MLP of 1,006,600, batch 32", partial(mlp, 256, 800, 800, 200), (32, 256), 200, 12)
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "Adam": partial(torch.optim.Adam, lr=1e-4, fused=True),
}


def measure(table: Table | None, work: Workload, label: str, quick: bool) -> None:
    """Measure one row, in all processes; the first one prints it."""
    optimizer, rank, size = OPTIMIZERS[label], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = work.batches(work.steps * size)
    learners: list[Learner[nn.Module]] = []

    def by_hand(model: nn.Module, **options: bool) -> Side:
        model = copy.deepcopy(model)
        parallel, built = DistributedDataParallel(model, **options), optimizer(model.parameters())
        return Side(model, lambda: plain_epoch(parallel, built, batches[rank::size]), built)

    def make() -> dict[str, Side]:
        model = work.model()
        own = copy.deepcopy(model)
        learner = make_learner(own, batches, optimizer)
        learners.append(learner)
        fluxloop = Side(own, lambda: learner.epoch(TrainingPhase()), learner.optimizer)
        return {
            "plain": by_hand(model),
            "with views": by_hand(model, gradient_as_bucket_view=True),
            "fluxloop": fluxloop,
        }

    rounds, starts = (5, 1) if quick else (60, 3)
    agreement = audition(make, work, f"{work.name}, {label}, {size} processes", exact=False)
    got = interleave(make, units=work.steps, rounds=rounds, starts=starts)
    ratios = got.cpu_ratio("fluxloop", "plain"), got.cpu_ratio("with views", "plain")
    updates = learners[-1].updates
    messages, buckets = updates.averager.messages / updates.count, updates.averager.num_buckets
    if table is not None:
        table.row(
            work.name,
            label,
            str(size),
            got.micro("plain"),
            got.micro("fluxloop"),
            *ratios,
            messages,
            buckets,
            agreement,
        )


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        accelerator = Accelerator("cpu")  # which joins the processes: DDP needs that, too
        table = Table(COLUMNS) if accelerator.is_main else None
        for work in (SMALL, LARGE):
            for label in OPTIMIZERS:
                measure(table, work, label, quick)
        return
    for size in (2,) if quick else (2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        subprocess.run(
            [*command, *(["--quick"] if quick else [])], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


if __name__ == "__main__":
    main()
