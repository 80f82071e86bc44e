"""Of a compiled step, what the compiled code itself takes, called again and again with the step's own inputs.

    python benchmarks/compiled_code.py            # the table
    python benchmarks/compiled_code.py --quick    # one workload, fewer rounds

Nothing around a graph can make a step faster than this: no batches, no events, no check whether the graph still
fits, and where autograd counts changes, nobody counts them. It is the smallest ratio that a loop with this
compiler can have. The loop by hand is eager, with torch's default optimizer. One thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from research import COMPILED, HAND, METHODS, STEPS, Method, drawn
from research import sides_of as sides_of_method
from timing import Table, arguments, interleave
from workloads import ADAMW, SGD, TINY, Optimizer, Workload, fluxloop_side, plain_side

from fluxloop.compile.direct import Call

ALONE = "its code alone"
COLUMNS = {
    "workload": "<27",
    "side": "<18",
    "µs": ">8.1f",
    "ratio": ">6.3f",
    "CPU ratio": ">9.3f",
}

Noted = list[tuple[Callable[[list[Any]], object], list[Any]]]


@contextmanager
def noting_calls() -> Iterator[Noted]:
    """Note the compiled code that steps call, and with what.

    Raises:
        SystemExit: A step called it through the layers that torch puts around.
    """
    noted: Noted = []
    run = Call.__call__

    def note(call: Call, inputs: list[Any]) -> Any:
        if call._inner is None:
            raise SystemExit("a step's code is called through the layers that torch puts around it")
        noted.append((call._inner, list(inputs)))
        return run(call, inputs)

    with patch.object(Call, "__call__", note):
        yield noted


def code_of(side: Callable[[], object]) -> Callable[[], None]:
    """Make what calls the compiled code of a side's steps, and nothing else."""
    for _ in range(2):  # the first steps are eager, and see what to call
        side()
    with noting_calls() as noted:
        side()

    @torch.no_grad()
    def call() -> None:
        for code, inputs in noted:
            code(list(inputs))  # which it empties

    return call


def of_method(method: Method) -> dict[str, Callable[[], object]]:
    """Make the sides of one of the methods of `research.py`."""
    made = {side: sides_of_method(method, drawn, torch.rand, only=side)[side] for side in (HAND, COMPILED)}
    return {**made, ALONE: code_of(sides_of_method(method, drawn, torch.rand, only=COMPILED)[COMPILED])}


def of_workload(work: Workload, optimizer: Optimizer) -> dict[str, Callable[[], object]]:
    """Make the sides of a supervised step."""
    model, batches = work.model(), work.batches(STEPS)
    first, second = (fluxloop_side(copy.deepcopy(model), batches, optimizer, compile="step") for _ in range(2))
    return {HAND: plain_side(model, batches, optimizer), COMPILED: first, ALONE: code_of(second)}


def main(argv: Sequence[str] | None = None) -> None:
    quick = arguments(__doc__, argv).quick
    torch.set_num_threads(1)
    rows: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
        f"tiny MLP 16-32-4, {label}": partial(of_workload, TINY, optimizer)
        for label, optimizer in {"SGD": SGD, "AdamW": ADAMW}.items()
    }
    rows |= {method.name: partial(of_method, method) for method in METHODS}
    table = Table(COLUMNS)
    for name, make in list(rows.items())[: 1 if quick else None]:
        torch.compiler.reset()
        got = interleave(make, units=STEPS, rounds=6 if quick else 30)
        for side in got.laps:
            table.row(name, side, got.micro(side), got.ratio(side, HAND), got.cpu_ratio(side, HAND))


if __name__ == "__main__":
    main()
