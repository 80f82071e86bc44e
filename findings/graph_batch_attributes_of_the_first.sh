#!/usr/bin/env bash
# torch_geometric 2.8.1: a batch has the attributes of its first graph; whether others are dropped or an error depends on the order.
#
# Graphs of one data set need not have the same attributes. Batch.from_data_list, which DataLoader calls, takes the names
# from the first one. Where a later graph has one more, it is left out of the batch, without a warning; where a later graph
# lacks one of the first, it is a KeyError. So a loader that shuffles trains for a while without the attribute, and fails
# when a graph that has it comes first.
#
# Seen with torch_geometric 2.8.1, torch 2.13.0, Python 3.11, x86_64:
#     the plain graph first: attributes batch, ptr, x; the weighted graph first: KeyError 'weight'
# Source: collate in torch_geometric/data/collate.py, which goes through the keys of the first graph's stores.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torch_geometric==2.8.1'
cat > "$folder/collate.py" <<'PYTHON'
import torch
import torch_geometric
from torch_geometric.data import Batch, Data

plain, weighted = Data(x=torch.zeros(2, 1)), Data(x=torch.zeros(3, 1), weight=torch.ones(1))
names = sorted(Batch.from_data_list([plain, weighted]).keys())
try:
    Batch.from_data_list([weighted, plain])
    error = "no error"
except KeyError as raised:
    error = f"KeyError {raised}"
print(f"torch_geometric {torch_geometric.__version__}, torch {torch.__version__}")
print(f"the plain graph first: attributes {', '.join(names)}; the weighted graph first: {error}")
assert names == ["batch", "ptr", "x"], "the attribute is in the batch now"
assert error == "KeyError 'weight'", "the other order does something else now"
PYTHON
"$folder/venv/bin/python" "$folder/collate.py"
