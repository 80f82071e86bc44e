#!/usr/bin/env bash
# accelerate 1.15.0, torchdata 0.11.0: with use_stateful_dataloader a shuffled loader goes on with rows that were seen before.
#
# DataLoaderConfiguration(use_stateful_dataloader=True) is what accelerate's documentation gives for going on in the middle
# of an epoch. For a shuffled loader accelerate hands torchdata torch's own RandomSampler, which has no state: what
# state_dict() gives counts the batches that were given, and holds neither their order nor a seed. A loader that loads it
# draws a new order and leaves out as many batches of that. With use_seedable_sampler=True and a data_seed the rows left are
# the right ones.
#
# Seen with accelerate 1.15.0, torchdata 0.11.0, torch 2.13.0, Python 3.11, x86_64, after 3 of 6 batches of 24 rows:
#     use_seedable_sampler=False: 5 rows of an epoch are seen twice, and as many never
#     use_seedable_sampler=True: 0 rows of an epoch are seen twice, and as many never
# Source: DataLoaderAdapter and prepare_data_loader in accelerate/data_loader.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torchdata==0.11.0' 'accelerate==1.15.0'
cat > "$folder/resume.py" <<'PYTHON'
import copy
import warnings
from importlib.metadata import version

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")


def make(seedable, seed):
    torch.manual_seed(seed)  # another process has drawn other numbers before
    options = DataLoaderConfiguration(
        use_stateful_dataloader=True, use_seedable_sampler=seedable, data_seed=7 if seedable else None
    )
    loader = DataLoader(TensorDataset(torch.arange(24)), batch_size=4, shuffle=True)
    return Accelerator(cpu=True, dataloader_config=options).prepare(loader)


def seen_twice(seedable):
    loader, seen = make(seedable, 1), []
    for number, (rows,) in enumerate(loader, 1):
        seen += rows.tolist()
        if number == 3:
            state = copy.deepcopy(loader.state_dict())
            break
    loaded = make(seedable, 2)
    loaded.load_state_dict(state)
    seen += [row for (rows,) in loaded for row in rows.tolist()]
    assert len(seen) == 24, "an epoch has another number of rows"
    return 24 - len(set(seen))


print(f"accelerate {version('accelerate')}, torchdata {version('torchdata')}, torch {torch.__version__}")
found = {seedable: seen_twice(seedable) for seedable in (False, True)}
for seedable, twice in found.items():
    print(f"use_seedable_sampler={seedable}: {twice} rows of an epoch are seen twice, and as many never")
assert found[True] == 0, "the seedable sampler goes on with other rows too"
assert found[False] > 0, "the order is in the state now"
PYTHON
"$folder/venv/bin/python" "$folder/resume.py"
