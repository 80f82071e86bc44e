"""What importing fluxloop adds to importing torch.

    python benchmarks/import_time.py

Each run is a fresh process that imports torch and then fluxloop; the figure is the median over
runs of the time of the second import.
"""

from __future__ import annotations

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


def main() -> None:
    times = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(RUNS)
    ]
    low, high = min(times), max(times)
    print(f"importing fluxloop after torch: median {median(times):.1f} ms of {RUNS} runs ({low:.1f} … {high:.1f})")


if __name__ == "__main__":
    main()
