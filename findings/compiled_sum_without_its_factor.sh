#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compile forgets the factor of a sum (alpha=) where a product of matrices is added, or added to.
#
# torch.add(a, b, alpha=k) is a + k * b. Compiled, and with a product of matrices (mm) as one of the two, both are made one
# addmm, and k counts as 1, without a warning. A product of something else, or one that is multiplied by k in an operation
# of its own, is right. A weight's gradient in a linear layer is such a product, so that a compiled optimizer that steps by
# average.mul_(beta).add_(gradient, alpha=1 - beta) moves its average by the whole gradient.
#
# Seen with torch 2.13.0, Python 3.11, x86_64 (the largest difference from eager):
#     added 2.1900 added to 1.0894 an average 2.1900 written out 0.0000 of elements 0.0000
# Source: the documentation of torch.add.
#
# Fails where that changes. torch.compile needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6'
cat > "$folder/compare.py" <<'PYTHON'
import torch

generator = torch.Generator().manual_seed(0)
total, a, b = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (3, 4), (4, 5)))
SUMS = {
    "added": lambda: torch.add(total, a @ b, alpha=0.5),
    "added to": lambda: torch.add(a @ b, total, alpha=0.5),
    "an average": lambda: total.clone().mul_(0.5).add_(a @ b, alpha=0.5),
    "written out": lambda: total + 0.5 * (a @ b),
    "of elements": lambda: torch.add(total, total * total, alpha=0.5),
}
apart = {name: (torch.compile(total_of)() - total_of()).abs().max().item() for name, total_of in SUMS.items()}
print(f"torch {torch.__version__}")
print(*(f"{name} {value:.4f}" for name, value in apart.items()))
assert min(apart[name] for name in ("added", "added to", "an average")) > 0.1, "compiled sums keep their factor now"
assert max(apart[name] for name in ("written out", "of elements")) < 1e-5, "other compiled sums are wrong too"
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
