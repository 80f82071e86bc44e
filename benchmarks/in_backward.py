"""What optimizers save that step in the backward pass: peak memory and time, against a hand-written loop.

    python benchmarks/in_backward.py            # the tables
    python benchmarks/in_backward.py --quick    # fewer rounds

Six layers of 1024 units, 64 rows. "times the parameters" is the peak of what tensors had allocated while
training, by torch's profiler, by the bytes of the parameters: 4 are parameters, gradients and two averages of
AdamW. Each is measured in a fresh process. Times are those of all sides in one process, interleaved. "hooks by
hand" is what PyTorch's tutorial shows: an optimizer for each parameter, stepped by a hook.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from memory import tensor_peak
from timing import Table, arguments, interleave
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import Batches, Optimizer, Side, Workload, audition, fluxloop_side, mlp, plain_side

WORK = Workload("MLP 1024 x 6, batch 64", partial(mlp, *[1024] * 7), (64, 1024), 1024, 4)
OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "SGD, momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
}


def hooks_side(model: nn.Module, batches: Batches, optimizer: Optimizer) -> Side:
    """Make the loop by hand whose hooks step an optimizer for each parameter."""
    made = {parameter: optimizer([parameter]) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        made[parameter].step()  # type: ignore[index]  # it is one of them
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)

    def epoch(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for xs, ys in batches:
            cross_entropy(model(xs), ys).backward()

    return Side(model, lambda: epoch(batches), next(iter(made.values())))


SIDES: dict[str, Callable[..., Side]] = {
    "plain": plain_side,
    "hooks by hand": hooks_side,
    "fluxloop": fluxloop_side,
    "fluxloop, in backward": partial(fluxloop_side, optimizer_in_backward=True),
}


def all_sides(optimizer: Optimizer) -> dict[str, Side]:
    """Make all sides, with equal weights and the same batches."""
    model, batches = WORK.model(), WORK.batches(WORK.steps)
    return {name: make(deepcopy(model), batches, optimizer) for name, make in SIDES.items()}


def peak(side: str, optimizer: str) -> float:
    """Give the peak of tensors in a training, times the parameters: in this process, which is a fresh one."""
    torch.set_num_threads(1)
    trained = SIDES[side](WORK.model(), WORK.batches(2), OPTIMIZERS[optimizer])
    trained()  # makes the averages
    trained.model.zero_grad()
    parameters = sum(parameter.nbytes for parameter in trained.model.parameters())
    averages = {"AdamW": 2, "SGD": 0, "SGD, momentum": 1}[optimizer] * parameters
    return (parameters + averages + tensor_peak(trained.run) * 2**20) / parameters


def fresh(side: str, optimizer: str) -> float:
    """Give `peak` of a fresh process."""
    command = [sys.executable, __file__, side, optimizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise SystemExit(f"{side} with {optimizer} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> None:
    given: Any = sys.argv[1:] if argv is None else argv
    if len(given) == 2:
        print(json.dumps(peak(*given)))
        return
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    columns = {"optimizer": "<13", "side": "<21", "times the parameters": ">20.2f", "by plain": ">8.3f"}
    table = Table({**columns, "ms a step": ">9.1f", "CPU ratio": ">9.3f", "trained": "<9"})
    for name, optimizer in OPTIMIZERS.items():
        trained = audition(partial(all_sides, optimizer), WORK, name, exact=True)
        got = interleave(partial(all_sides, optimizer), units=WORK.steps, rounds=4 if quick else 24)
        peaks = {side: fresh(side, name) for side in SIDES}
        for side in SIDES:
            own = (peaks[side], peaks[side] / peaks["plain"], got.micro(side) / 1e3, got.cpu_ratio(side, "plain"))
            table.row(name, side, *own, "–" if side == "plain" else trained)


if __name__ == "__main__":
    main()
