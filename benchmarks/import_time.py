"""What importing fluxloop adds to importing torch, and what a first learner adds to that.

    python benchmarks/import_time.py

Fresh processes in turn, with the bytecode cached (as installing does): one imports torch alone, the
others go on to fluxloop, to its `Learner`, or to every public name. In each, the time from torch's
import on is taken, wall and CPU. What all its imports took, less what the process with torch alone took in
the same round, says the same with the noise of importing torch in it, and a garbage collection over torch's
objects where fluxloop brings it on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

CODE = """
from time import perf_counter, process_time
start = process_time()
import torch
wall, cpu = perf_counter(), process_time()
{}
print((perf_counter() - wall) * 1e3, (process_time() - cpu) * 1e3, (process_time() - start) * 1e3)
"""
SIDES = ("import fluxloop", "from fluxloop import Learner", "from fluxloop import *")
"""What is measured after it."""

RUNS = 15
"""Fresh processes measured of each."""

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def measure(code: str) -> tuple[float, float, float]:
    """Give the ms that a fresh process takes for some code after torch: wall, CPU, CPU with torch's import."""
    command = [sys.executable, "-c", CODE.format(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    wall, cpu, whole = map(float, done.stdout.split())
    return wall, cpu, whole


def main() -> None:
    for code in SIDES:
        measure(code)  # writes the bytecode
    rounds = [(measure("")[2], {code: measure(code) for code in SIDES}) for _ in range(RUNS)]
    print(f"ms after import torch, medians of {RUNS} fresh processes each (smallest … largest)")
    for code in SIDES:
        walls, cpus = ([sides[code][i] for _, sides in rounds] for i in (0, 1))
        overs = [sides[code][2] - alone for alone, sides in rounds]
        print(
            f"{code:29} wall {median(walls):6.1f} ({min(walls):.1f} … {max(walls):.1f})   "
            f"CPU {median(cpus):6.1f}   CPU over torch alone {median(overs):6.1f}"
        )


if __name__ == "__main__":
    main()
