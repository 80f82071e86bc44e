#!/usr/bin/env bash
# webdataset 1.0.2: neither WebDataset(seed=) nor any generator decides the order of shuffle(); with a seed of its own it is the same in every epoch.
#
# WebDataset(..., seed=1) seeds the order of shards. The order of samples is drawn by .shuffle(n), from a generator that is
# made from the process id and the clock each time the pipeline is iterated: with Python's, NumPy's and torch's generators
# and the data set seeded alike, two runs have other orders. .shuffle(n, seed=1) makes its generator from the seed, each
# time anew, so every epoch has the same order.
#
# Seen with webdataset 1.0.2, torch 2.13.0, Python 3.11, x86_64:
#     all generators and the data set seeded alike, the same order: False
#     shuffle(32, seed=1): in another run the same order: True; in the next epoch the same order: True
# Source: _shuffle in webdataset/filters.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'webdataset==1.0.2'
cat > "$folder/order.py" <<'PYTHON'
import random
import tempfile
from importlib.metadata import version

import numpy
import torch
import webdataset

with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/rows.tar"
    with webdataset.TarWriter(path) as writer:
        for row in range(64):
            writer.write({"__key__": f"{row:04d}", "y.cls": row})

    def pipeline(**options):
        data = webdataset.WebDataset(path, shardshuffle=False, seed=1)
        return data.shuffle(32, **options).decode().to_tuple("y.cls")

    def order(data):
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(0)
        return [label for (label,) in data]

    plain = order(pipeline()) == order(pipeline())
    data = pipeline(seed=1)
    first, second, other = order(data), order(data), order(pipeline(seed=1))

print(f"webdataset {version('webdataset')}, torch {torch.__version__}")
print(f"all generators and the data set seeded alike, the same order: {plain}")
print(
    f"shuffle(32, seed=1): in another run the same order: {first == other}; "
    f"in the next epoch the same order: {first == second}"
)
assert not plain, "a seed decides the order now"
assert first == other == second, "a seed of its own gives another order now"
PYTHON
"$folder/venv/bin/python" "$folder/order.py"
