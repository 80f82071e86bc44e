#!/usr/bin/env bash
# torchdata 0.11.0: the order of a shuffling StatefulDataLoader is decided when it is made, not when it is iterated.
#
# torch's DataLoader draws the seed of an epoch's order from the global generator as the epoch begins, so torch.manual_seed
# before the loop decides it. The sampler that StatefulDataLoader puts in its place draws a seed once, in its __init__, and goes
# on from there. A seed set between making the loader and iterating it changes nothing: two runs that are seeded alike have
# other orders, and processes that make their loaders before they are seeded alike do not share one order to divide.
#
# Seen with torchdata 0.11.0, torch 2.13.0, Python 3.11, x86_64:
#     DataLoader: seeded before iterating, twice the same order: True
#     StatefulDataLoader: seeded before iterating, twice the same order: False; seeded before it is made: True
# Source: RandomSampler.__init__ in torchdata/stateful_dataloader/sampler.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torchdata==0.11.0'
cat > "$folder/order.py" <<'PYTHON'
from importlib.metadata import version

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


def order(kind, seeded):
    """Return the order of 64 rows, with a seed set before the loader is made, or after."""
    if seeded == "before making":
        torch.manual_seed(0)
    loader = kind(list(range(64)), batch_size=8, shuffle=True)
    if seeded == "before iterating":
        torch.manual_seed(0)
    return torch.cat(list(loader)).tolist()


def is_repeated(kind, seeded):
    torch.manual_seed(1)
    return order(kind, seeded) == order(kind, seeded)


print(f"torchdata {version('torchdata')}, torch {torch.__version__}")
plain = is_repeated(DataLoader, "before iterating")
late, early = (is_repeated(StatefulDataLoader, when) for when in ("before iterating", "before making"))
print(f"DataLoader: seeded before iterating, twice the same order: {plain}")
print(f"StatefulDataLoader: seeded before iterating, twice the same order: {late}; seeded before it is made: {early}")
assert plain and early
assert not late, "the seed decides now"
PYTHON
"$folder/venv/bin/python" "$folder/order.py"
