"""What importing fluxloop adds to importing torch.

    python benchmarks/import_time.py

Each run is a fresh process that imports torch and then fluxloop; the figure is the median over
runs of the time of the second import, once its bytecode is cached (as installing does).
"""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median

CODE = """
import time
import torch
start = time.perf_counter()
import fluxloop
print((time.perf_counter() - start) * 1e3)
"""
RUNS = 15
"""Fresh processes measured."""

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def measure() -> float:
    """Give the milliseconds that one fresh process takes."""
    command = [sys.executable, "-c", CODE]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout)


def main() -> None:
    measure()  # writes the bytecode
    times = [measure() for _ in range(RUNS)]
    low, high = min(times), max(times)
    print(f"importing fluxloop after torch: median {median(times):.1f} ms of {RUNS} runs ({low:.1f} … {high:.1f})")


if __name__ == "__main__":
    main()
