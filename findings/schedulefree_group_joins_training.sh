#!/usr/bin/env bash
# schedulefree 1.4.1: a parameter group that is added in train mode is stepped, not averaged by eval(), and moved wrongly by the next train().
#
# Its optimizers keep a mode for each group. step() looks at the mode of the first group alone, and add_param_group gives a
# new group the mode of a new optimizer, eval. So a part that is unfrozen and added while training is stepped with the rest.
# eval() then leaves its weights at the point where gradients are computed, as if they were the average, and the following
# train() moves them away from where they were. Calling eval() before and train() after adding it is right. No error, no
# warning.
#
# Seen with schedulefree 1.4.1, torch 2.13.0, Python 3.11, x86_64:
#     added in train mode: eval() moves it by 0.0000, train() leaves it off by 0.0503
#     added in eval mode:  eval() moves it by 0.0559, train() leaves it off by 0.0000
# Source: train, eval and step in schedulefree/adamw_schedulefree.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'schedulefree==1.4.1'
cat > "$folder/join.py" <<'PYTHON'
from importlib.metadata import version

import torch
from schedulefree import AdamWScheduleFree
from torch.nn.functional import mse_loss


def moves(turn):
    """Add a layer after the optimizer was put into train mode; return how far eval() and train() move it after 20 steps."""
    torch.manual_seed(0)
    xs = torch.randn(64, 4)
    body, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    optimizer = AdamWScheduleFree(head.parameters(), lr=0.05)
    optimizer.train()
    if turn:
        optimizer.eval()
    optimizer.add_param_group({"params": list(body.parameters())})
    if turn:
        optimizer.train()
    for _ in range(20):
        optimizer.zero_grad()
        mse_loss(head(body(xs)), xs.sum(1, keepdim=True)).backward()
        optimizer.step()
    weights = [body.weight.detach().clone()]
    for switch in (optimizer.eval, optimizer.train):
        switch()
        weights.append(body.weight.detach().clone())
    return [(weights[0] - each).abs().max().item() for each in weights[1:]]


wrong, right = moves(turn=False), moves(turn=True)
print(f"schedulefree {version('schedulefree')}, torch {torch.__version__}")
print(f"added in train mode: eval() moves it by {wrong[0]:.4f}, train() leaves it off by {wrong[1]:.4f}")
print(f"added in eval mode:  eval() moves it by {right[0]:.4f}, train() leaves it off by {right[1]:.4f}")
assert right[0] > 0.01 and right[1] < 1e-6
assert wrong[0] == 0 and wrong[1] > 0.01, "a group that joins in train mode is averaged now"
PYTHON
"$folder/venv/bin/python" "$folder/join.py"
