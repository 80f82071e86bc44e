"""The same on a GPU: steps, CUDA graphs, waits for the device, and prefetch.

    python benchmarks/gpu.py            # the tables
    python benchmarks/gpu.py --quick    # fewer rounds

Without a CUDA device it says so and measures nothing.

Steps: both sides train the same weights on the same batches, which lie on the device; a block ends
when the device has done all of it. "CPU ratio" is of the host's time alone. ``compile="step"``
makes CUDA graphs.

Waits: how often in a step the host waited for the device, by torch's own warnings
(``torch.cuda.set_sync_debug_mode``) and by the calls in a profiler's trace. The epoch's end, where
metrics reach the host, is within the count.

Prefetch: what share of the time in which batches are copied to the device some kernel ran beside
it, from a trace of training on batches that lie in the host's memory.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Table, arguments, interleave, skip
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from workloads import (
    ADAMW,
    OPTIMIZERS,
    SGD,
    TINY,
    WORKLOADS,
    Optimizer,
    Side,
    Workload,
    audition,
    fluxloop_side,
    make_learner,
    mlp,
    plain_epoch,
    plain_side,
)

from fluxloop import Accelerator, TensorBatches, TrainingPhase

DEVICE = "cuda:0"
COUNTED_STEPS = 100
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls of the CUDA runtime in which the host waits."""

Interval = tuple[float, float]


def then_wait(run: Callable[[], object]) -> None:
    """Run, and wait until the device has done it."""
    run()
    torch.cuda.synchronize()


def waiting(side: Side) -> Side:
    """Have a block end when the device has done all of it."""
    side.run = partial(then_wait, side.run)
    return side


def sides_of(work: Workload, optimizer: Optimizer, tracked: bool, mode: str | None) -> dict[str, Side]:
    """Make the hand-written eager loop and fluxloop on the device, with equal weights and the same batches."""
    batches = work.batches(work.steps, DEVICE)
    model = work.model().to(DEVICE)
    options = {} if mode is None else {"compile": mode}
    return {
        "plain": waiting(plain_side(copy.deepcopy(model), batches, optimizer, tracked)),
        "fluxloop": waiting(fluxloop_side(model, batches, optimizer, tracked, DEVICE, **options)),
    }


def steps(quick: bool, modes: Sequence[str | None]) -> None:
    """Print what steps cost: eager and compiled, against the eager loop."""
    table = Table(
        {
            "workload": "<37",
            "optimizer": "<18",
            "callbacks": "<9",
            "compiled": "<8",
            "plain µs": ">9.1f",
            "fluxloop µs": ">11.1f",
            "ratio": ">6.3f",
            "CPU ratio": ">9.3f",
            "trained": "<9",
        }
    )
    works = (TINY,) if quick else WORKLOADS
    for work, (label, optimizer), mode in itertools.product(works, OPTIMIZERS.items(), modes):
        for tracked in (False, True) if mode is None else (False,):
            make = partial(sides_of, work, optimizer, tracked, mode)
            kind = "defaults" if tracked else "bare"
            # a GPU's kernels may add in another order from run to run
            agreement = audition(make, work, f"{work.name}, {label}, {kind}, compile={mode!r}", exact=False)
            got = interleave(make, units=work.steps, rounds=6 if quick else 30, starts=1 if quick or mode else 3)
            times = got.micro("plain"), got.micro("fluxloop")
            ratios = got.ratio("fluxloop", "plain"), got.cpu_ratio("fluxloop", "plain")
            table.row(work.name, label, kind, mode or "–", *times, *ratios, agreement)


def trace_of(run: Callable[[], object]) -> list[dict[str, Any]]:
    """Give the events of a profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
        events: list[dict[str, Any]] = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def warned_waits(run: Callable[[], object]) -> int:
    """Count torch's warnings of waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def traced_waits(events: Iterable[dict[str, Any]]) -> int:
    """Count the calls that wait; the last is the one that ends the trace."""
    return sum(event["name"] in WAITS for event in events) - 1


def waits() -> None:
    """Print how often the host waits in a step."""
    print(f"\nWaits for the device per step, over an epoch of {COUNTED_STEPS} steps of the tiny MLP.\n")
    table = Table({"side": "<8", "callbacks": "<9", "by warnings": ">11.2f", "in the trace": ">12.2f"})
    batches = TINY.batches(COUNTED_STEPS, DEVICE)
    for tracked in (False, True):
        sides = {
            "plain": plain_side(TINY.model().to(DEVICE), batches, ADAMW, tracked),
            "fluxloop": fluxloop_side(TINY.model().to(DEVICE), batches, ADAMW, tracked, DEVICE),
        }
        for name, side in sides.items():
            side()  # warm
            torch.cuda.synchronize()
            counts = warned_waits(side), traced_waits(trace_of(side))
            table.row(name, "defaults" if tracked else "bare", *(count / COUNTED_STEPS for count in counts))


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Join intervals that touch."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def within(spans: Iterable[Interval], others: Iterable[Interval]) -> float:
    """Give how much of intervals, added up, lies within some of the others."""
    joined = merged(others)
    return sum(max(0.0, min(end, b) - max(begin, a)) for begin, end in spans for a, b in joined)


def overlap(events: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Give the ms in which batches were copied to the device, and the share of it beside a kernel of another stream."""
    copies: list[tuple[Interval, Any]] = []
    kernels: dict[Any, list[Interval]] = {}
    for event in events:
        span, stream = (event["ts"], event["ts"] + event["dur"]), event.get("args", {}).get("stream")
        if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]:
            copies.append((span, stream))
        elif event.get("cat") == "kernel":
            kernels.setdefault(stream, []).append(span)
    beside = [
        within([copy], (span for other, spans in kernels.items() if other != stream for span in spans))
        for copy, stream in copies
    ]
    copied = sum(end - begin for (begin, end), _ in copies)
    return copied / 1e3, sum(beside) / copied if copied else 0.0


def messages_overlap(events: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Give the ms in which NCCL sent messages, and the share of them beside a kernel that computes."""
    messages: list[Interval] = []
    computing: list[Interval] = []
    for event in events:
        if event.get("cat") == "kernel":
            kind = messages if "nccl" in event["name"].lower() else computing
            kind.append((event["ts"], event["ts"] + event["dur"]))
    sent = sum(end - begin for begin, end in merged(messages))
    return sent / 1e3, within(merged(messages), computing) / sent if sent else 0.0


def prefetch(quick: bool) -> None:
    """Print how copying and computing overlap, and what a step costs, on batches in the host's memory."""
    print("\nTraining on batches in the host's memory, MLP 4096-4096-4096-10, batch 2048.\n")
    count, size = 8 if quick else 30, 2048
    rows = torch.randn(count * size, 4096), torch.randint(10, (count * size,))
    model = mlp(4096, 4096, 4096, 10).to(DEVICE)
    pinned = DataLoader(TensorDataset(*rows), batch_size=size, pin_memory=True)
    in_memory = TensorBatches(*rows, batch_size=size)

    def plain() -> None:
        moved = ((xs.to(DEVICE, non_blocking=True), ys.to(DEVICE, non_blocking=True)) for xs, ys in pinned)
        plain_epoch(theirs, optimizer, moved)

    theirs = copy.deepcopy(model)
    optimizer = SGD(theirs.parameters())
    sides: dict[str, Callable[[], object]] = {"plain, DataLoader, pinned": plain}
    for name, data in {"fluxloop, DataLoader, pinned": pinned, "fluxloop, TensorBatches": in_memory}.items():
        learner = make_learner(copy.deepcopy(model), data, SGD, device=DEVICE)
        sides[name] = partial(learner.epoch, TrainingPhase())
    timed = {name: partial(then_wait, run) for name, run in sides.items()}
    got = interleave(lambda: timed, units=count, rounds=3 if quick else 12)
    table = Table({"side": "<28", "µs": ">9.1f", "ratio": ">6.3f", "copying ms": ">10.2f", "overlapped": ">10.2f"})
    base = next(iter(sides))
    for name, run in sides.items():
        table.row(name, got.micro(name), got.ratio(name, base), *overlap(trace_of(run)))


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    if not torch.cuda.is_available():
        skip("there is no CUDA device here")
        return
    print(f"On {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}.\n")
    compiles = "compile" in inspect.signature(Accelerator).parameters
    if not compiles:
        print("This fluxloop's Accelerator has no argument compile.\n")
    steps(quick, [None, "model", "step"] if compiles else [None])
    waits()
    prefetch(quick)


if __name__ == "__main__":
    main()
