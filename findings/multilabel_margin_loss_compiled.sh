#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compile computes another multilabel_margin_loss than eager where rows have fewer targets than classes.
#
# A row's targets end at the first -1: the documentation of nn.MultiLabelMarginLoss pads with it, so that rows may have
# different numbers of targets. Eager follows that, and agrees with the formula written out. Compiled, the loss of the same
# valid rows is several times as large, and its gradient differs by up to 0.6, without a warning.
#
# Seen with torch 2.13.0, Python 3.11, x86_64:
#     eager 0.9470 formula 0.9470 compiled 5.4738 gradients apart by 0.6000
# Source: the documentation of torch.nn.MultiLabelMarginLoss, "only considers a contiguous block of non-negative targets
# that starts at the front".
#
# Fails where that changes. torch.compile needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/compare.py" <<'PYTHON'
import torch
from torch.nn.functional import multilabel_margin_loss

targets = [[0, 3, -1, -1, -1], [2, -1, -1, -1, -1], [1, 4, 0, -1, -1], [3, -1, -1, -1, -1]]
scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def formula(scores):
    total = 0.0
    for row, padded in zip(scores.tolist(), targets, strict=True):
        wanted = [index for index in padded if index >= 0]
        others = [index for index in range(5) if index not in wanted]
        total += sum(max(0.0, 1 - (row[a] - row[b])) for a in wanted for b in others) / 5
    return total / len(targets)


def loss(scores):
    return multilabel_margin_loss(scores, torch.tensor(targets))


results = []
for function in (loss, torch.compile(loss)):
    given = scores.clone().requires_grad_()
    value = function(given)
    value.backward()
    results.append((value.item(), given.grad))
(eager, of_eager), (compiled, of_compiled) = results
apart = (of_eager - of_compiled).abs().max().item()
print(f"torch {torch.__version__}")
print(f"eager {eager:.4f} formula {formula(scores):.4f} compiled {compiled:.4f} gradients apart by {apart:.4f}")
assert abs(eager - formula(scores)) < 1e-5, "eager no longer follows the formula"
assert abs(compiled - eager) > 1, "compiled agrees with eager now"
assert apart > 0.1, "the gradients agree now"
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
