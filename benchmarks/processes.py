"""What a training step of several processes costs: fluxloop against a loop written by hand with DDP.

    python benchmarks/processes.py            # the table
    python benchmarks/processes.py --quick    # fewer rounds, two processes

All processes run on this machine (gloo), with one thread each. Each side trains the same model from the
same weights on the same batches; a process takes every W-th. The sides take turns, some steps each, all
of fluxloop's in one long epoch. "CPU µs" is the CPU time of a step, of all threads of all processes
together; its ratio is the median of the rounds' ratios, and "middle half" says between which two the
middle half of these lies. "with views" is the ratio of DDP with ``gradient_as_bucket_view=True``.
"µs" are those of a step on the clock of the first process; where there are more processes than cores
the clock says little, as they wait for one another.

"epoch CPU µs" is what an epoch of fluxloop costs beside its steps, which the loop written by hand has
nothing of. "messages" is how many an update sends, and "buckets" in how many the gradients are divided.
The optimizer of both sides is the fused one, where there is one.

On Linux all is measured twice: with cores "as they are", which go idle while a process waits, and with cores
"kept awake" by a process of the lowest priority on each of them. To wake an idle core of a virtual machine is its
host's work, and counts as CPU time of the process that wakes it: on some machines more than the message itself.
"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from timing import Lap, Measured, Stopwatch, Table, arguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from workloads import Optimizer, Side, Workload, audition, make_learner, mlp, plain_epoch

from fluxloop import Accelerator, Callback, Learner, StepEnd, TrainingPhase, on

COLUMNS = {
    "workload": "<33",
    "optimizer": "<9",
    "processes": ">9",
    "cores": "<11",
    "rounds": ">6.0f",
    "DDP µs": ">7.0f",
    "fluxloop µs": ">11.0f",
    "DDP CPU µs": ">10.0f",
    "fluxloop CPU µs": ">15.0f",
    "CPU ratio": ">9.3f",
    "middle half": ">13",
    "with views": ">10.3f",
    "epoch CPU µs": ">12.0f",
    "messages": ">8.1f",
    "buckets": ">7.0f",
    "trained": "<9",
}

SMALL = Workload("MLP of 1,864 parameters, batch 32", partial(mlp, 16, 32, 32, 8), (32, 16), 8, 20)
LARGE = Workload("MLP of 1,006,600, batch 32", partial(mlp, 256, 800, 800, 200), (32, 256), 200, 5)
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "Adam": partial(torch.optim.Adam, lr=1e-4, fused=True),
}
CORES = ("as they are", "kept awake")
STARTS = 4
"""How often the sides are made anew: where the allocator puts their weights changes the time of larger models."""
WARM_UP = 3
"""Rounds of each start that are not measured."""


class TakeTurns(Callback):
    """Measures blocks of a learner's steps, and between them those of other sides.

    Args:
        steps: In a block.
        others: The other sides.
    """

    draws = False

    def __init__(self, steps: int, others: Mapping[str, Callable[[], object]]) -> None:
        super().__init__()
        self.steps, self.others = steps, others
        self.count = 0
        self.laps: dict[str, list[Lap]] = {name: [] for name in ("fluxloop", *others)}
        self.watch = Stopwatch()

    @on(StepEnd, TrainingPhase)
    def take_turns(self, event: StepEnd, phase: TrainingPhase, learner: Any) -> None:
        self.count += 1
        if self.count % self.steps:
            return
        if self.watch.begun is not None:
            self.laps["fluxloop"].append(self.watch.stop())
            for name in list(self.others) if len(self.laps["fluxloop"]) % 2 else reversed(list(self.others)):
                watch = Stopwatch()
                watch.start()
                self.others[name]()
                self.laps[name].append(watch.stop())
        self.watch.start()


def by_hand(model: nn.Module, work: Workload, optimizer: Optimizer, **options: bool) -> Side:
    """Make the hand-written loop with DDP."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, batches = copy.deepcopy(model), work.batches(work.steps * size)[rank::size]
    parallel, built = DistributedDataParallel(model, **options), optimizer(model.parameters())
    return Side(model, lambda: plain_epoch(parallel, built, batches), built)


def make(work: Workload, optimizer: Optimizer) -> dict[str, Side]:
    """Make all sides, with equal weights and the same batches."""
    model = work.model()
    own = copy.deepcopy(model)
    learner = make_learner(own, work.batches(work.steps * dist.get_world_size()), optimizer)
    return {
        "plain": by_hand(model, work, optimizer),
        "with views": by_hand(model, work, optimizer, gradient_as_bucket_view=True),
        "fluxloop": Side(own, lambda: learner.epoch(TrainingPhase()), learner.optimizer),
    }


def take_turns(work: Workload, optimizer: Optimizer, rounds: int) -> tuple[dict[str, list[Lap]], Learner[nn.Module]]:
    """Make all sides, and measure them in turns."""
    model = work.model()
    others = {
        "plain": by_hand(model, work, optimizer),
        "with views": by_hand(model, work, optimizer, gradient_as_bucket_view=True),
    }
    batches = list(work.batches(work.steps * dist.get_world_size()))
    learner = make_learner(model, batches * (rounds + WARM_UP + 1), optimizer)
    turns = TakeTurns(work.steps, others)
    learner.add_callback(turns)
    learner.epoch(TrainingPhase())
    return {name: laps[WARM_UP:] for name, laps in turns.laps.items()}, learner


def of_all(laps: list[Lap]) -> list[Lap]:
    """Add up the CPU time of all processes; wall time stays that of the first."""
    everybody: list[list[Lap]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybody, laps)
    return [Lap(same[0].wall, sum(lap.cpu for lap in same)) for same in zip(*everybody, strict=True)]


def cost_of_an_epoch(work: Workload, optimizer: Optimizer) -> float:
    """Measure the CPU time of an epoch of one step, in µs."""
    learner = make_learner(work.model(), work.batches(dist.get_world_size()), optimizer)
    laps = []
    for _ in range(30):
        watch = Stopwatch()
        watch.start()
        learner.epoch(TrainingPhase())
        laps.append(watch.stop())
    return median(lap.cpu for lap in of_all(laps[WARM_UP:])) * 1e6


def measure(table: Table | None, work: Workload, label: str, rounds: int, starts: int) -> None:
    """Measure one row, in all processes; the first one prints it."""
    optimizer, size = OPTIMIZERS[label], dist.get_world_size()
    agreement = audition(lambda: make(work, optimizer), work, f"{work.name}, {label}, {size} processes", exact=False)
    laps: dict[str, list[Lap]] = {}
    for start in range(starts):
        torch.manual_seed(start)
        found, learner = take_turns(work, optimizer, rounds // starts)
        for name, more in found.items():
            laps.setdefault(name, []).extend(more)
        updates = learner.updates
        messages, buckets = updates.averager.messages / updates.count, updates.averager.num_buckets
        del learner, updates
        gc.collect()
    got = Measured({name: of_all(each) for name, each in laps.items()}, work.steps)
    epoch = cost_of_an_epoch(work, optimizer) - got.cpu_micro("fluxloop")
    if table is not None:
        lower, _, upper = quantiles(got.cpu_ratios("fluxloop", "plain"), n=4)
        table.row(
            *(work.name, label, str(size), CORES["KEPT_AWAKE" in os.environ], len(got.laps["plain"])),
            *(got.micro("plain"), got.micro("fluxloop"), got.cpu_micro("plain"), got.cpu_micro("fluxloop")),
            *(got.cpu_ratio("fluxloop", "plain"), f"{lower:.3f} – {upper:.3f}"),
            *(got.cpu_ratio("with views", "plain"), epoch, messages, buckets, agreement),
        )


@contextmanager
def awake() -> Iterator[None]:
    """Keep the cores from going idle, without taking time from anybody."""
    cores = os.sched_getaffinity(0)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        for core, process in zip(cores, spinning, strict=True):
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        accelerator = Accelerator("cpu")  # which joins the processes: DDP needs that, too
        table = Table(COLUMNS) if accelerator.is_main else None
        for work in (SMALL, LARGE):
            for label in OPTIMIZERS:
                measure(table, work, label, *((8, 1) if quick else (240, STARTS)))
        return
    for size in (2,) if quick else (2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        command += ["--quick"] if quick else []
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if hasattr(os, "SCHED_IDLE"):
            with awake():
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "KEPT_AWAKE": "1"})


if __name__ == "__main__":
    main()
