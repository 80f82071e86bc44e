#!/usr/bin/env bash
# torchmetrics 1.9.0: the state_dict of Running has its window and not its place in it; a loaded one drops a value that should stay.
#
# Running(metric, window=3) keeps the states of the last three updates in slots and overwrites the oldest. How many updates
# there have been, which says where the next one goes, is a plain attribute that state_dict leaves out, also with
# persistent(True). A loaded metric writes its next value into the first slot: unless the number of updates was a multiple
# of the window, a newer value is lost and an older one stays.
#
# Seen with torchmetrics 1.9.0, torch 2.13.0, Python 3.11, x86_64:
#     sum of the last three of 1, 10, 100, 1000, 5: going on 1105, after loading 115
# Source: Running._num_vals_seen in torchmetrics/wrappers/running.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torchmetrics==1.9.0'
cat > "$folder/resume.py" <<'PYTHON'
import copy

import torch
import torchmetrics
from torchmetrics import SumMetric
from torchmetrics.wrappers import Running


def make():
    metric = Running(SumMetric(), window=3)
    metric.persistent(True)
    return metric


going_on, loaded = make(), make()
for value in (1.0, 10.0, 100.0, 1000.0):
    going_on.update(torch.tensor(value))
loaded.load_state_dict(copy.deepcopy(going_on.state_dict()))
for metric in (going_on, loaded):
    metric.update(torch.tensor(5.0))
first, second = going_on.compute().item(), loaded.compute().item()
print(f"torchmetrics {torchmetrics.__version__}, torch {torch.__version__}")
print(f"sum of the last three of 1, 10, 100, 1000, 5: going on {first:.0f}, after loading {second:.0f}")
assert first == 1105, "the sum is another one"
assert second == 115, "the loaded metric goes on as the other one now"
PYTHON
"$folder/venv/bin/python" "$folder/resume.py"
