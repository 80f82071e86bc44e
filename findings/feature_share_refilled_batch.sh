#!/usr/bin/env bash
# torchmetrics 1.9.0: FeatureShare knows a batch by its object: all that a refilled tensor held counts as the first.
#
# FeatureShare has several metrics of images share features by "caching the input-output pairs of the network". The
# cache is functools.lru_cache around the network's forward, and a tensor's hash is its identity. A batch that is
# copied into the tensor of the last one (the static input of a CUDA graph, a pinned buffer) gets the features of the
# last one, without a warning: real and generated images far apart have a Fréchet distance of 0. The metric alone has
# the right one.
#
# The cache is put into the network that was given, so it works outside the metrics too: a network in training gives the
# same batch the output of its former weights. A deep copy, such as an average of the weights, takes the cached function
# along, which is bound to the network it came from: it computes with the weights of that one, not with its own.
#
# Seen with torchmetrics 1.9.0, torch 2.13.0, Python 3.11, x86_64:
#     Fréchet distance, new tensors: shared 1200.1, alone 1200.1
#     Fréchet distance, one tensor refilled: shared 0.0, alone 1200.1
#     output after the weights were set to 0: same batch 12.0, equal batch 0.0
#     output of a deep copy whose weights were set to 2: 12.0 in place of 24.0
# Source: NetworkCache in torchmetrics/wrappers/feature_share.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torchmetrics==1.9.0'
cat > "$folder/share.py" <<'PYTHON'
import copy
import warnings

import torch
import torchmetrics
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.wrappers import FeatureShare

warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")


class Features(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1) * self.scale


def share(features):
    return FeatureShare([FrechetInceptionDistance(features), KernelInceptionDistance(features, subset_size=8)])


def distance(metric, refill):
    """Return the Fréchet distance of two kinds of images, given in new tensors or in one that is refilled."""
    draws, batch = torch.Generator().manual_seed(0), torch.empty(16, 3, 2, 2)
    for real in (True, False):
        for _ in range(3):
            images = torch.rand(16, 3, 2, 2, generator=draws) + (0 if real else 10)
            metric.update(batch.copy_(images) if refill else images, real=real)
    found = metric.compute()
    return (found["FrechetInceptionDistance"] if isinstance(found, dict) else found).item()


print(f"torchmetrics {torchmetrics.__version__}, torch {torch.__version__}")
found = {}
for refill in (False, True):
    shared, alone = distance(share(Features()), refill), distance(FrechetInceptionDistance(Features()), refill)
    kind = "one tensor refilled" if refill else "new tensors"
    print(f"Fréchet distance, {kind}: shared {abs(shared):.1f}, alone {alone:.1f}")
    found[refill] = shared, alone

features, images = Features(), torch.ones(1, 12)
share(features)
with torch.no_grad():
    features(images)
    features.scale.zero_()
    same, equal = features(images).sum().item(), features(images.clone()).sum().item()
    print(f"output after the weights were set to 0: same batch {same:.1f}, equal batch {equal:.1f}")
    features.scale.fill_(1)
    average = copy.deepcopy(features)
    average.scale.fill_(2)
    seen, wanted = average(images.clone()).sum().item(), (images * average.scale).sum().item()
    print(f"output of a deep copy whose weights were set to 2: {seen:.1f} in place of {wanted:.1f}")

assert abs(found[False][0] - found[False][1]) < 1e-6 and found[False][1] > 1000, "the distance is another one"
assert found[True][1] == found[False][1], "the distance alone is another one"
assert abs(found[True][0]) < 1e-6, "a refilled tensor is a new batch now"
assert (same, equal) == (12, 0), "new weights make a new output now"
assert (seen, wanted) == (12, 24), "a deep copy computes with its own weights now"
PYTHON
"$folder/venv/bin/python" "$folder/share.py"
