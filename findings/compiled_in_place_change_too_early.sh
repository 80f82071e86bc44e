#!/usr/bin/env bash
# torch 2.10.0 and 2.11.0, on the CPU: a compiled function changes its input in place before all that reads it has done so.
#
# A function takes the mean from the rows of `x`, adds up what is left over the rows, changes `x` in place, and then
# `weight` by the sum: a layer's gradient and its update. Under torch.compile the sum is computed from the rows that have
# been changed already, without a word; the same function with 4 rows in place of 64 is right, as its sum is written out.
# TorchInductor's loops in C++ are given a common shape before they are fused, which computes anew what each operation
# depends on (SchedulerNode.recompute_size_and_body) and forgets the dependencies that have no tensor to hand on: "after
# the last reader". Since 2.12.0 they are kept; `max_fusion_size: 1`, of the options for torch.compile, avoids it before.
#
# Seen with torch 2.11.0 (CPU), Python 3.11, x86_64; the same with 2.10.0, and no difference with 2.12.0 to 2.14.1:
#     torch 2.11.0, 64 rows: the weight differs from eager by up to 10.0 % of how far it moved
#     torch 2.11.0, 64 rows, max_fusion_size 1: the weight differs from eager by up to 0.0 % of how far it moved
#     torch 2.11.0, 4 rows: the weight differs from eager by up to 0.0 % of how far it moved
# Source: torch/_inductor/scheduler.py, torch/_inductor/codegen/cpp.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.11.0' 'numpy==2.4.6'
cat > "$folder/change.py" <<'PYTHON'
import torch

torch.set_num_threads(1)


def change(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    loss = (centred * weight).sum()
    gradient = centred.sum(0)
    x.add_(centred * 0.1)
    weight.add_(gradient * 0.1)
    return loss


def off(rows, **options):
    """Return by how much the compiled function's weight differs, as a share of how far the eager one's moved."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 6), torch.ones(6)
    eager, compiled = (x.clone(), weight.clone()), (x.clone(), weight.clone())
    change(*eager)
    torch.compile(change, options=options)(*compiled)
    torch._dynamo.reset()
    share = (eager[1] - compiled[1]).abs().max() / (eager[1] - weight).abs().max()
    told = "".join(f", {name} {value}" for name, value in options.items())
    print(f"torch {torch.__version__.partition('+')[0]}, {rows} rows{told}: ", end="")
    print(f"the weight differs from eager by up to {share:.1%} of how far it moved".replace("%", " %"))
    return share


assert off(64) > 0.05, "it differed by a tenth before"
assert off(64, max_fusion_size=1) < 1e-5
assert off(4) < 1e-5
PYTHON
"$folder/venv/bin/python" "$folder/change.py"
