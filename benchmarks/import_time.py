"""What importing fluxloop adds to importing torch, and what a first learner adds to that.

    python benchmarks/import_time.py

Fresh processes in turn, with the bytecode cached (as installing does): one imports torch alone, the
others import fluxloop after it, go on to its `Learner`, or load every public name. In each the time
after torch's import is taken, and that of all imports together; what the latter has over the process
with torch alone, in the same round, says the same, with the noise of importing torch in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{}
end = time.perf_counter()
print((end - middle) * 1e3, (end - start) * 1e3)
"""
SIDES = ("import fluxloop", "from fluxloop import Learner", "from fluxloop import *")
"""What is measured after it."""

RUNS = 15
"""Fresh processes measured of each."""

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def measure(code: str) -> tuple[float, float]:
    """Give the milliseconds that a fresh process takes for some code after importing torch, and with it."""
    command = [sys.executable, "-c", CODE.format(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    after, whole = map(float, done.stdout.split())
    return after, whole


def main() -> None:
    for code in SIDES:
        measure(code)  # writes the bytecode
    rounds = []
    for _ in range(RUNS):
        alone = measure("")[1]
        rounds.append({code: (after, whole - alone) for code in SIDES for after, whole in [measure(code)]})
    print(f"medians of {RUNS} fresh processes each, ms (smallest … largest)")
    for code in SIDES:
        after, over = ([each[code][i] for each in rounds] for i in (0, 1))
        low, high = min(after), max(after)
        print(f"{code:29} {median(after):6.1f} ({low:.1f} … {high:.1f}); over torch alone {median(over):6.1f}")


if __name__ == "__main__":
    main()
