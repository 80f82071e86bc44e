#!/usr/bin/env bash
# torch 2.13.0: the first torch.compile of a process has torch.distributions check no arguments any more, in all code.
#
# A distribution checks its arguments where it is not told validate_args=False: Normal(0, -1) is a ValueError. The first
# torch.compile(...) of a process, before anything is called, sets that default to False for the whole process, so that
# eager code elsewhere goes on with a negative scale. Nothing says so. To import torch._dynamo alone does not do it, and
# it is done once: Distribution.set_default_validate_args(True) after the first torch.compile stays. With checks on, a
# function that makes a Normal of its inputs is three graphs in place of one, and computes the same.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, x86_64:
#     imported torch._dynamo: Normal(0, -1) is refused
#     torch.compile(f) was written: Normal(0, -1) is accepted
#     set to True, and compiled again: Normal(0, -1) is refused
#     graphs with checks: 3, without: 1
# The same with 2.10.0 and 2.14.1.
# Source: TorchPatcher.patch in torch/_dynamo/eval_frame.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/checks.py" <<'PYTHON'
import torch
from torch.distributions import Distribution, Normal


def seen():
    """Return what becomes of a negative scale."""
    try:
        Normal(0.0, -1.0)
    except ValueError:
        return "refused"
    return "accepted"


def sample(xs):
    normal = Normal(xs, xs.exp())
    return normal.rsample() + normal.log_prob(xs)


def graphs(checks):
    """Return in how many graphs torch.compile cuts the function."""
    Distribution.set_default_validate_args(checks)
    torch._dynamo.reset()
    return torch._dynamo.explain(sample)(torch.ones(4)).graph_count


import torch._dynamo

print(f"torch {torch.__version__}")
imported = seen()
print(f"imported torch._dynamo: Normal(0, -1) is {imported}")
torch.compile(lambda xs: xs + 1, backend="eager")
written = seen()
print(f"torch.compile(f) was written: Normal(0, -1) is {written}")
Distribution.set_default_validate_args(True)
torch.compile(lambda xs: xs + 2, backend="eager")(torch.ones(2))
again = seen()
print(f"set to True, and compiled again: Normal(0, -1) is {again}")
several, one = graphs(True), graphs(False)
print(f"graphs with checks: {several}, without: {one}")
assert imported == "refused", "to import torch._dynamo switches the checks off now"
assert written == "accepted", "torch.compile leaves the checks on now"
assert again == "refused"
assert several > one == 1
PYTHON
"$folder/venv/bin/python" "$folder/checks.py"
