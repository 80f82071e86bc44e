#!/usr/bin/env bash
# torch 2.13.0: a destroyed process group lives on where DTensor was imported in it: its threads, and later sums go through it.
#
# The functions of torch.distributed.nn.functional have the default argument group=group.WORLD, which Python evaluates
# once, when the module is imported. Imported before init_process_group it is None, and each call uses the group that
# there is. Imported after it, which torch.distributed._shard does (so fully_shard's and DTensor's users do without a
# word of it), it is that process group for good: destroy_process_group() does not end gloo's three threads, and
# all_reduce in a later group, of each process alone here, adds up over the processes of the destroyed one.
#
# Seen with torch 2.13.0 (CPU, gloo, two processes), Python 3.11, x86_64:
#     imported before: gloo's threads after the group was destroyed: 0; sum of ones in a group of 1 process: 1
#     imported after: gloo's threads after the group was destroyed: 3; sum of ones in a group of 1 process: 2
# Source: torch/distributed/nn/functional.py; imported by torch/distributed/_shard/sharded_tensor/reshard.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/groups.py" <<'PYTHON'
import importlib
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

warnings.simplefilter("ignore", FutureWarning)
when, expected = sys.argv[1], {"before": (0, 1), "after": (3, 2)}[sys.argv[1]]
if when == "before":
    importlib.import_module("torch.distributed._shard")
dist.init_process_group("gloo")
if when == "after":
    importlib.import_module("torch.distributed._shard")
functional = importlib.import_module("torch.distributed.nn.functional")
rank = dist.get_rank()
assert functional.all_reduce(torch.ones(1)).item() == 2, "two processes add up two ones"
dist.destroy_process_group()
threads = sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
total = functional.all_reduce(torch.ones(1)).item()
if rank == 0:
    print(f"torch {torch.__version__}, imported {when}: gloo's threads after the group was destroyed: {threads}; ", end="")
    print(f"sum of ones in a group of {dist.get_world_size()} process: {total:.0f}", flush=True)
assert (threads, total) == expected, f"it was {expected} before"
os._exit(0)
PYTHON
for when in before after; do
    "$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/groups.py" "$when"
done
