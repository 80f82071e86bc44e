#!/usr/bin/env bash
# torch 2.13.0: torch.manual_seed formats the caller's stack three times at each call where no accelerator is initialised.
#
# torch.manual_seed seeds all kinds of devices. One that is not initialised is seeded later: the seed is queued, and with it
# the formatted stack trace of who called, for an error message that may never come. That is done for CUDA, XPU and MTIA, at
# each call, also in a build for the CPU alone, so a seed costs more the deeper the caller is. Seeding the generator itself,
# torch.default_generator.manual_seed, does none of it.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, x86_64:
#     stacks formatted in 10 seedings: torch.manual_seed 30, default_generator 0
#     (one call took 0.11 ms at the top of a script and 0.58 ms 60 calls deep, the generator's own 0.001 ms)
# Source: _lazy_call in torch/cuda/__init__.py, torch/xpu/__init__.py and torch/mtia/__init__.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/seed.py" <<'PYTHON'
import traceback

import torch

count, real = 0, traceback.format_stack


def counted(*args, **kwargs):
    global count
    count += 1
    return real(*args, **kwargs)


def seedings(seed):
    """Return how often the stack is formatted in ten seedings."""
    global count
    count = 0
    for _ in range(10):
        seed(0)
    return count


traceback.format_stack = counted
if torch.cuda.is_initialized():
    raise SystemExit("CUDA is initialised; nothing to see")
often, never = seedings(torch.manual_seed), seedings(torch.default_generator.manual_seed)
print(f"torch {torch.__version__}")
print(f"stacks formatted in 10 seedings: torch.manual_seed {often}, default_generator {never}")
assert often >= 10, "the stack is not formatted at each call now"
assert never == 0
PYTHON
"$folder/venv/bin/python" "$folder/seed.py"
