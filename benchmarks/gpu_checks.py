"""Checks of all that needs a GPU, or several: each row says what was seen.

    python benchmarks/gpu_checks.py               # every row; on as many GPUs as there are
    python benchmarks/gpu_checks.py --only bf16   # rows with "bf16" in their name
    python benchmarks/gpu_checks.py --rehearse    # on the CPU, what does not need a GPU: says nothing of GPUs

It starts itself by ``torchrun`` for the rows of several processes. Without a CUDA device no row is run, and the status
is 0; a row that fails makes it 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import define
from gpu import messages_overlap, overlap, trace_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fluxloop import (
    Accelerator,
    CustomCallback,
    Learner,
    Shard,
    StepBegin,
    StepEnd,
    TensorBatches,
    TrainingPhase,
    find_batch_size,
    recompute_activations,
    synchronise_batch_norm,
)
from fluxloop.compute.memory import is_out_of_memory
from fluxloop.nested import local_part

ADAM = partial(torch.optim.Adam, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class NotRunError(Exception):
    """Why a row cannot be run here."""


def require(good: bool, seen: str) -> str:
    """Return what was seen, or raise where it is not good."""
    if not good:
        raise AssertionError(seen)
    return seen


def require_cuda(device: str) -> None:
    """Raise on the CPU."""
    if not device.startswith("cuda"):
        raise NotRunError("needs a CUDA device")


# What is trained


def net(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def rows(count: int = 512, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(count, 16, generator=generator)
    return xs.to(device), (xs[:, :4].argmax(1)).to(device)


def learner_on(device: str, *callbacks: Any, optimizer: Any = ADAM, batch_size: int = 64, **options: Any) -> Learner:
    batches = TensorBatches(*rows(device=device), batch_size=batch_size)
    accelerator = Accelerator(device, **options)
    quiet: dict[str, Any] = {"callbacks": callbacks, "default_callbacks": False}
    return Learner(net(), cross_entropy, data=(batches,), optimizer=optimizer, accelerator=accelerator, seed=3, **quiet)


def loss_after(learner: Learner, epochs: int = 4) -> float:
    learner.fit(epochs)
    return learner.evaluate(TensorBatches(*rows(device=str(learner.accelerator.device)), batch_size=512))["loss"]


def farthest(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two models' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((_whole(a) - _whole(b)).abs().max().item() for a, b in pairs)


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)  # of a shard
    return (tensor if full is None else full()).detach().cpu()


# Rows of one process


def fp32(device: str) -> str:
    """fp32 trains what a loop by hand does"""
    model, batches = net().to(device), list(TensorBatches(*rows(device=device), batch_size=64))
    optimizer = SGD(model.parameters())
    for xs, ys in batches * 2:
        optimizer.zero_grad()
        cross_entropy(model(xs), ys).backward()
        optimizer.step()
    learner = learner_on(device, optimizer=SGD)
    learner.fit(2)
    apart = farthest(learner.model, model)
    return require(apart < 1e-5, f"weights differ by {apart:.1e} at most")


def precision(kind: str, device: str) -> str:
    """Train in fp32 and in another precision."""
    single, other = loss_after(learner_on(device)), loss_after(learner_on(device, precision=kind))
    return require(abs(other - single) < 0.1 * single, f"loss {other:.4f}, in fp32 {single:.4f}")


def no_waits(device: str) -> str:
    """a default epoch in bf16 never waits for the device"""
    require_cuda(device)
    count = 200
    data = rows(64 * count, device)

    def watch(learner: Any, mode: str, at: int) -> None:
        if learner.cbstate.history[TrainingPhase].steps == at:
            torch.cuda.set_sync_debug_mode(mode)  # type: ignore[no-untyped-call]  # torch has no types there

    callbacks = [
        CustomCallback(
            partial(watch, mode="error", at=count + 3), StepBegin, TrainingPhase, reads=("cbstate.history",)
        ),
        CustomCallback(
            partial(watch, mode="default", at=2 * count), StepEnd, TrainingPhase, reads=("cbstate.history",)
        ),
    ]
    accelerator = Accelerator(device, precision="bf16")
    batches = TensorBatches(*data, batch_size=64)
    learner = Learner(net(), cross_entropy, data=(batches,), callbacks=callbacks, accelerator=accelerator, seed=3)
    try:
        learner.fit(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")  # type: ignore[no-untyped-call]  # as above
    return f"{count - 4} steps with all default callbacks, under set_sync_debug_mode('error')"


def cuda_graphs(device: str) -> str:
    """compile='step' makes CUDA graphs and trains what eager steps do"""
    require_cuda(device)
    eager, compiled = learner_on(device), learner_on(device, compile="step")
    for learner in (eager, compiled):
        learner.fit(2)
    launches = sum("cudaGraphLaunch" in event["name"] for event in trace_of(lambda: compiled.epoch(TrainingPhase())))
    eager.epoch(TrainingPhase())
    apart = farthest(eager.model, compiled.model)
    return require(launches >= 8 and apart < 1e-3, f"{launches} launches in 8 steps, weights differ by {apart:.1e}")


def copies_overlap(device: str) -> str:
    """batches are copied while the device computes"""
    copied, share = overlap(trace_of_large(device))
    return require(share > 0.2, f"{share:.0%} of {copied:.1f} ms of copying beside kernels")


def trace_of_large(device: str, size: int = 4096, count: int = 20) -> list[dict[str, Any]]:
    """Trace the second epoch of a learner whose kernels take long, on so many batches in the host's memory."""
    require_cuda(device)
    data = TensorBatches(torch.randn(size * count, 2048), torch.randint(4, (size * count,)), batch_size=size)
    model = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4))
    quiet: dict[str, Any] = {"default_callbacks": False, "optimizer": SGD}
    learner = Learner(model, cross_entropy, data=(data,), accelerator=Accelerator(device), **quiet)
    learner.fit(1)
    return trace_of(lambda: learner.epoch(TrainingPhase()))


class Wide(nn.Module):
    """A network that takes much memory for each row, in blocks."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16384), nn.GELU(), nn.Dropout(0.1), nn.Linear(16384, 16)) for _ in range(blocks)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, xs: Tensor) -> Tensor:
        for block in self.blocks:
            xs = xs + block(xs)
        return self.head(xs)


def wide_learner(device: str, model: nn.Module, count: int, batch_size: int) -> Learner:
    batches = TensorBatches(*rows(count), batch_size=batch_size)
    accelerator = Accelerator(device)
    quiet: dict[str, Any] = {"default_callbacks": False, "optimizer": SGD, "seed": 0}
    return Learner(model, cross_entropy, data=(batches,), accelerator=accelerator, **quiet)


def out_of_memory(device: str) -> str:
    """out of memory is named, memory comes back, and the learner trains on"""
    require_cuda(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, 2 * 2**30 / torch.cuda.get_device_properties(device).total_memory)
    )
    try:
        learner = wide_learner(device, Wide(), 2**17, 2**16)
        learner.fit(1, data=(TensorBatches(*rows(32), batch_size=32),))
        before = torch.cuda.memory_allocated()
        try:
            learner.fit(1)
        except torch.OutOfMemoryError as error:
            told, kept = "\n".join(error.__notes__), torch.cuda.memory_allocated() - before
            require("in a step with 65536 rows" in told, f"the note is {told!r}")
            require(kept < 2**25, f"{kept / 2**20:.0f} MiB live on with the error")
        else:
            raise AssertionError("65536 rows fit into 2 GiB")
        found = find_batch_size(learner)
        learner.fit(1, data=(TensorBatches(*rows(2 * found), batch_size=found),))
        try:
            learner.fit(1, data=(TensorBatches(*rows(4 * found), batch_size=4 * found),))
        except torch.OutOfMemoryError:
            return f"{kept / 2**20:.1f} MiB live on with the error; find_batch_size found {found} for 2 GiB"
        raise AssertionError(f"find_batch_size found {found}, and {4 * found} fit as well")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def recomputed(device: str) -> str:
    """recompute_activations takes less memory and has the same gradients"""
    torch.manual_seed(0)
    plain = Wide().to(device)
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    xs = torch.randn(512, 16, device=device)
    peaks = []
    for model in (plain, again):
        torch.manual_seed(1)
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        model(xs).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else 0.0)
    pairs = zip(plain.parameters(), again.parameters(), strict=True)
    apart = max((a.grad - b.grad).abs().max().item() for a, b in pairs if a.grad is not None and b.grad is not None)
    good = apart < 1e-6 and (peaks[1] < 0.7 * peaks[0] or not device.startswith("cuda"))
    return require(good, f"peak {peaks[1]:.0f} MiB in place of {peaks[0]:.0f}, gradients differ by {apart:.1e}")


def channels_last(device: str) -> str:
    """a model in channels-last format stays in it, in bf16, with fused Adam"""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4)).to(memory_format=torch.channels_last)
    seen: list[bool] = []
    model[3].register_forward_hook(
        lambda module, given, made: seen.append(made.is_contiguous(memory_format=torch.channels_last))
    )
    batches = TensorBatches(torch.randn(64, 3, 16, 16), torch.arange(64) % 4, batch_size=16)
    accelerator = Accelerator(device, precision="bf16")
    learner = Learner(
        model, cross_entropy, data=(batches,), optimizer=ADAM, default_callbacks=False, accelerator=accelerator
    )
    learner.fit(2)
    average = learner.optimizer.state[model[3].weight]["exp_avg"]
    fused = learner.optimizer.param_groups[0]["fused"]
    kept = average.is_contiguous(memory_format=torch.channels_last)
    return require(all(seen) and kept and fused, f"activations {all(seen)}, averages {kept}, fused {fused}")


ALONE: dict[str, Callable[[str], str]] = {
    "fp32": fp32,
    "bf16": partial(precision, "bf16"),
    "fp16": partial(precision, "fp16"),
    "no waits, bf16": no_waits,
    "CUDA graphs": cuda_graphs,
    "copies overlap": copies_overlap,
    "out of memory": out_of_memory,
    "recomputed activations": recomputed,
    "channels last, bf16": channels_last,
}


# Rows of several processes: each trains its part, and the whole by itself


def together(device: str, **options: Any) -> str:
    """Train in all processes, and alone on the joined batches."""
    size = int(os.environ["WORLD_SIZE"])
    whole = learner_on(device, batch_size=32 * size, optimizer=SGD, strategy="none")
    ours = learner_on(device, batch_size=32, optimizer=SGD, **options)
    start = copy.deepcopy(whole.model)
    for learner in (whole, ours):
        learner.fit(2)
    apart, moved = farthest(ours.model, whole.model), farthest(whole.model, start)
    near = apart < (0.05 if options.get("precision") else 1e-3) * moved
    return require(near, f"weights differ by {apart:.1e}, training moved them by {moved:.1e}")


def messages_beside_backward(device: str) -> str:
    """Sum gradients up over processes while the backward pass goes on."""
    sent, share = messages_overlap(trace_of_large(device))
    return require(share > 0.2, f"{share:.0%} of {sent:.1f} ms of messages beside kernels that compute")


def in_windows(device: str) -> str:
    """Train with two batches to an update."""
    size = int(os.environ["WORLD_SIZE"])
    whole = learner_on(device, batch_size=64 * size, optimizer=SGD, strategy="none")
    ours = learner_on(device, batch_size=32, optimizer=SGD, accumulate=2)
    for learner in (whole, ours):
        learner.fit(2)
    apart = farthest(ours.model, whole.model)
    return require(apart < 1e-4, f"weights differ by {apart:.1e}")


def offloaded(device: str) -> str:
    """Keep sharded parameters, and what the optimizer has of them, in the host's memory."""
    held = learner_on(device, optimizer=SGD, strategy=Shard(offload=True))
    held.fit(1)
    states = (*held.model.parameters(), *(each["momentum_buffer"] for each in held.optimizer.state.values()))
    kinds = {local_part(each).device.type for each in states}
    require(kinds == {"cpu"}, f"parameters and momentum are on {sorted(kinds)}")
    return together(device, strategy=Shard(offload=True))


def batch_norm(device: str) -> str:
    """Compare statistics of all rows with those of one process."""
    accelerator = Accelerator(device)
    torch.manual_seed(0)
    xs = torch.randn(8 * accelerator.world_size, 5, device=accelerator.device)
    plain = nn.BatchNorm1d(5).to(accelerator.device)
    ours = synchronise_batch_norm(copy.deepcopy(plain))
    own = xs.chunk(accelerator.world_size)[accelerator.rank]
    apart = (accelerator.gather(ours(own)) - plain(xs)).abs().max().item()
    return require(apart < 1e-5, f"outputs differ by {apart:.1e}")


def raw_loop(device: str) -> str:
    """Train in a loop of one's own, with prepare."""

    def train(accelerator: Accelerator, batch_size: int) -> nn.Module:
        model = net()
        optimizer = SGD(model.parameters())
        model, optimizer, batches = accelerator.prepare(model, optimizer, TensorBatches(*rows(), batch_size=batch_size))
        for xs, ys in batches:
            optimizer.zero_grad()
            accelerator.backward(cross_entropy(model(xs), ys))
            optimizer.step()
        return model

    size = int(os.environ["WORLD_SIZE"])
    apart = farthest(train(Accelerator(device), 32), train(Accelerator(device, strategy="none"), 32 * size))
    return require(apart < 1e-4, f"weights differ by {apart:.1e}")


def gathered(device: str) -> str:
    """Compare a loss of all rows with that of one process."""
    accelerator = Accelerator(device)
    torch.manual_seed(0)
    xs = torch.randn(8 * accelerator.world_size, 5, device=accelerator.device)
    own = xs.chunk(accelerator.world_size)[accelerator.rank].clone().requires_grad_()
    mse_loss(accelerator.all_gather(own).cos(), xs.sin()).backward()
    whole = xs.clone().requires_grad_()
    mse_loss(whole.cos(), xs.sin()).backward()
    assert own.grad is not None  # for type checkers
    assert whole.grad is not None
    # the loss is that of all processes, so each gradient comes as often as there are processes
    expected = accelerator.world_size * whole.grad.chunk(accelerator.world_size)[accelerator.rank]
    apart = (own.grad - expected).abs().max().item()
    return require(apart < 1e-6, f"gradients differ by {apart:.1e}")


TOGETHER: dict[str, Callable[[str], str]] = {
    "replicate": partial(together, strategy="replicate"),
    "replicate, bf16": partial(together, strategy="replicate", precision="bf16"),
    "replicate, two batches": in_windows,
    "replicate, messages overlap": messages_beside_backward,
    "shard": partial(together, strategy="shard"),
    "shard, bf16": partial(together, strategy="shard", precision="bf16"),
    "shard, offloaded": offloaded,
    "gathered with gradient": gathered,
    "synchronised batch norm": batch_norm,
    "raw loop": raw_loop,
}


# Running rows


@define
class Outcome:
    """What became of a row."""

    result: str
    seen: str


def run(check: Callable[[str], str], device: str) -> Outcome:
    """Run a row; whatever it raises is its outcome."""
    try:
        return Outcome("passed", check(device))
    except NotRunError as why:
        return Outcome("not run", str(why))
    except Exception as error:
        traceback.print_exc()
        kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
        return Outcome("FAILED", f"{kind}: {str(error).splitlines()[0] if str(error) else ''}")


def work(names: Sequence[str], folder: str, rehearse: bool) -> None:
    """Run rows as one of several processes, and write down what became of each."""
    rank, local = os.environ["RANK"], int(os.environ["LOCAL_RANK"])
    device = "cpu" if rehearse else f"cuda:{local}"
    if not rehearse:
        torch.cuda.set_device(local)
    path = Path(folder) / f"{rank}.json"
    found: dict[str, list[str]] = {}
    for name in names:
        outcome = run(TOGETHER[name], device)
        found[name] = [outcome.result, outcome.seen]
        path.write_text(json.dumps(found))
        if outcome.result == "FAILED":  # the others may wait for this process
            sys.exit(1)


def start(names: Sequence[str], processes: int, rehearse: bool) -> dict[str, Outcome]:
    """Run rows in several processes; after one that failed, the others in new processes."""
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < len(names):
        outcomes |= launch(names[len(outcomes) :], processes, rehearse)
    return outcomes


def launch(names: Sequence[str], processes: int, rehearse: bool) -> dict[str, Outcome]:
    """Start this script in several processes; return the outcomes of rows, up to the first one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        wanted = [part for name in names for part in ("--row", name)]
        options = ["--worker", folder, *(["--rehearse"] if rehearse else []), *wanted]
        done = subprocess.run([*command, __file__, *options], capture_output=True, text=True, check=False)
        said = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    outcomes = {}
    for name in names:
        of_all = [Outcome(*each[name]) if name in each else Outcome("FAILED", "a process ended in it") for each in said]
        missing = [Outcome("FAILED", "a process ended before its first row")] * (processes - len(said))
        bad = [each for each in [*missing, *of_all] if each.result != "passed"]
        outcomes[name] = bad[0] if bad else of_all[0]
        if outcomes[name].result == "FAILED":
            print(done.stdout + done.stderr, file=sys.stderr)
            break
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows and print the table; return the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, what does not need a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--row", action="append", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.worker:
        work(given.row, given.worker, given.rehearse)
        return 0
    there, count = torch.cuda.is_available(), torch.cuda.device_count()
    alone = [name for name in ALONE if given.only in name]
    several = [name for name in TOGETHER if given.only in name]
    if there or given.rehearse:
        device = "cpu" if given.rehearse else "cuda:0"
        outcomes = {name: run(ALONE[name], device) for name in alone}
        processes = 2 if given.rehearse else count
        few = dict.fromkeys(several, Outcome("not run", f"needs several GPUs, and there is {count}"))
        outcomes |= start(several, processes, given.rehearse) if several and processes > 1 else few
    else:
        outcomes = dict.fromkeys([*alone, *several], Outcome("not run", "no GPU"))
    where = "the CPU: a rehearsal, which says nothing of GPUs" if given.rehearse else f"{count} GPUs"
    if there and not given.rehearse:
        where += f" ({torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda})"
    print(f"On {where}, torch {torch.__version__}.\n\n| row | result | seen |\n| --- | --- | --- |")
    for name, outcome in outcomes.items():
        print(f"| {name} | {outcome.result} | {outcome.seen} |")
    return int(any(outcome.result == "FAILED" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
