"""How much memory training takes: fluxloop against a hand-written loop.

    python benchmarks/memory.py            # the tables
    python benchmarks/memory.py --quick    # one model, one process for each figure

Each side runs in fresh processes, in turn. "process MB" is by how much the peak of the resident set
lies above what it was before the model was made, "tensors MB" the peak of what tensors had
allocated, by torch's profiler, in a process of its own; the figure is the median over processes.
The first model's weights, gradients and states are nearly all there is, the second's activations
are: what is kept a step too long shows. The resident set also depends on how the allocator happens
to lay things out: trust the tensors.

The second table is of a long fit with the default callbacks and accuracy: by how much the resident
set grows between its first tenth and its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import Table, arguments
from torch.profiler import ProfilerActivity, profile
from workloads import ADAMW_PLAIN, CONV, TINY, Side, Workload, fluxloop_side, mlp, plain_side, updates_of

WIDE = Workload("wide MLP 2048 x 4, batch 64", partial(mlp, 2048, 2048, 2048, 2048), (64, 2048), 2048, 6)
LARGE_BATCH = Workload("convnet 1x28x28, batch 1024", CONV.model, (1024, 1, 28, 28), 10, 6)
WORKS = {work.name: work for work in (WIDE, LARGE_BATCH)}
SIDES: dict[str, Callable[..., Side]] = {"plain": plain_side, "fluxloop": fluxloop_side}

STATUS = Path("/proc/self/status")
BLOCK = 1000
"""Steps between two looks at the size of the process in a long fit."""


def resident(key: str) -> float:
    """Give a size of this process in MB: ``VmRSS`` is now, ``VmHWM`` the peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def process_peak(train: Callable[[], object]) -> float:
    """Give by how much the peak of the process lies above what it was before, in MB."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    train()
    return resident("VmHWM") - before


def tensor_peak(train: Callable[[], object]) -> float:
    """Give the peak of what tensors had allocated, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    peak: int = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    return peak / 2**20


PEAKS = {"process": process_peak, "tensors": tensor_peak}


def growth(side: str, steps: int) -> float:
    """Give by how much the process grows between the first tenth of a long fit and its end, in MB."""
    batches = TINY.batches(BLOCK)
    train = SIDES[side](TINY.model(), batches, ADAMW_PLAIN, True)
    sizes = []
    for _ in range(steps // BLOCK):
        train()
        sizes.append(resident("VmRSS"))
    return sizes[-1] - sizes[len(sizes) // 10]


def run_alone(side: str, what: str, argument: str) -> dict[str, float]:
    """Measure one side in this process: what a fresh one is started for.

    Args:
        side: One of `SIDES`.
        what: One of `PEAKS`, or "growth".
        argument: The workload's name, or the number of steps.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if what == "growth":
        return {"MB": growth(side, int(argument)), "updates": int(argument)}
    work, trained = WORKS[argument], []
    batches = work.batches(2) * (work.steps // 2)

    def train() -> None:
        trained.append(SIDES[side](work.model(), batches, ADAMW_PLAIN))
        trained[0]()

    peak = PEAKS[what](train)
    return {"MB": peak, "updates": updates_of(trained[0].optimizer) or 0}


def fresh(side: str, what: str, argument: str) -> dict[str, float]:
    """Measure one side in a fresh process."""
    command = [sys.executable, __file__, side, what, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def both(what: str, argument: str, times: int) -> tuple[float, float]:
    """Give the medians over fresh processes of both sides, which have to have made as many updates."""
    got: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for index in range(times):
        for side in SIDES if index % 2 else reversed(SIDES):
            got[side].append(fresh(side, what, argument))
    updates = {result["updates"] for results in got.values() for result in results}
    if len(updates) != 1:
        raise SystemExit(f"{argument}: the sides made {sorted(updates)} updates")
    plain, ours = (median(result["MB"] for result in got[side]) for side in ("plain", "fluxloop"))
    return plain, ours


def main(argv: Sequence[str] | None = None) -> None:
    given: Any = sys.argv[1:] if argv is None else argv
    if len(given) == 3:
        print(json.dumps(run_alone(*given)))
        return
    quick = arguments(__doc__, argv).quick
    if not STATUS.exists():
        raise SystemExit(f"memory.py reads {STATUS}, which only Linux has")
    table = Table({"workload": "<28", "peak of": "<8", "plain MB": ">8.1f", "fluxloop MB": ">11.1f", "ratio": ">6.3f"})
    for name in [WIDE.name] if quick else WORKS:
        for what, times in (("process", 1 if quick else 7), ("tensors", 1)):
            plain, ours = both(what, name, times)
            table.row(name, what, plain, ours, ours / plain)
    print("\nGrowth of the process in a long fit of the tiny MLP.\n")
    table = Table({"steps": "<7", "plain MB": ">8.2f", "fluxloop MB": ">11.2f"})
    steps = 5_000 if quick else 50_000
    table.row(f"{steps:,}", *both("growth", str(steps), 1 if quick else 3))


if __name__ == "__main__":
    main()
