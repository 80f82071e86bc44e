#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: the state_dict of CrossBatchMemory leaves out how much of its memory is filled.
#
# The loss compares a batch with the embeddings of former batches. Its state_dict has these embeddings and their labels, and
# not the place at which the next ones go, nor whether the memory has been filled once: both are plain attributes. After
# load_state_dict into a new loss the memory is there and counts as empty: the same batch has another loss, without a
# warning, and the old embeddings are overwritten from the first on.
#
# Seen with pytorch-metric-learning 2.9.0, torch 2.13.0, Python 3.11, x86_64:
#     in the state_dict: embedding_memory, label_memory; next place 24, after loading 0
#     loss of the same batch: going on 8.1484, after loading 3.8017
# Source: CrossBatchMemory in pytorch_metric_learning/losses/cross_batch_memory.py, whose __init__ sets queue_idx and
# has_been_filled beside register_buffer for the two memories.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'pytorch-metric-learning==2.9.0'
cat > "$folder/resume.py" <<'PYTHON'
import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss

draws = torch.Generator().manual_seed(0)


def batch():
    return torch.randn(8, 16, generator=draws), torch.randint(0, 3, (8,), generator=draws)


going_on = CrossBatchMemory(NTXentLoss(), embedding_size=16, memory_size=32)
for _ in range(3):
    going_on(*batch())
loaded = CrossBatchMemory(NTXentLoss(), embedding_size=16, memory_size=32)
loaded.load_state_dict(going_on.state_dict())
names, places = sorted(going_on.state_dict()), (going_on.queue_idx, loaded.queue_idx)
embeddings, labels = batch()
first, second = going_on(embeddings, labels).item(), loaded(embeddings, labels).item()

print(f"pytorch-metric-learning {pytorch_metric_learning.__version__}, torch {torch.__version__}")
print(f"in the state_dict: {', '.join(names)}; next place {places[0]}, after loading {places[1]}")
print(f"loss of the same batch: going on {first:.4f}, after loading {second:.4f}")
assert names == ["embedding_memory", "label_memory"], "the state_dict has something else now"
assert places == (24, 0), "the place is kept now"
assert abs(first - second) > 1, "the losses agree now"
PYTHON
"$folder/venv/bin/python" "$folder/resume.py"
