#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compile(optimizer.step) steps float64 parameters with bias corrections of single precision.
#
# torch's optimizers count their steps in a tensor of float32. Eager, that count is read as a number of Python's, and
# beta ** step is computed in double precision. Compiled, it stays a tensor, so that the corrections of Adam and RAdam,
# and what RAdam decides by, are float32 in a float64 model, without a warning. With equal gradients at each of 50 steps
# the weights come apart by 1e-6 and more, where rounding of float64 would be some 1e-16; SGD, which corrects nothing, agrees.
#
# Seen with torch 2.13.0, Python 3.11, x86_64:
#     SGD 2.8e-17 Adam 2.4e-06 RAdam 3.0e-05
# Source: torch/optim/adam.py and radam.py, `_get_value(step)`, which is `step` itself while torch.compile traces.
#
# Fails where that changes. torch.compile needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/compare.py" <<'PYTHON'
import copy

import torch


def apart(kind):
    torch.manual_seed(0)
    eager = torch.nn.Linear(4, 1).double()
    compiled = copy.deepcopy(eager)
    optimizers = [kind(model.parameters(), lr=0.01) for model in (eager, compiled)]
    steps = optimizers[0].step, torch.compile(optimizers[1].step)
    for _ in range(50):
        eager.zero_grad()
        eager(torch.randn(8, 4, dtype=torch.double)).square().mean().backward()
        for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
            other.grad = one.grad.clone()
        for step in steps:
            step()
    return (eager.weight - compiled.weight).abs().max().item()


found = {kind.__name__: apart(kind) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RAdam)}
print(f"torch {torch.__version__}")
print(*(f"{name} {difference:.1e}" for name, difference in found.items()))
assert found["SGD"] < 1e-14, "SGD no longer agrees"
assert 1e-7 < found["Adam"] < 1e-4, "compiled Adam steps float64 in double precision now"
assert 1e-6 < found["RAdam"] < 1e-3, "compiled RAdam steps float64 in double precision now"
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
