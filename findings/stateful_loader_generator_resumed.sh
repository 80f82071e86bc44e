#!/usr/bin/env bash
# torchdata 0.11.0: after a resume a StatefulDataLoader with a generator has another order from the next epoch on.
#
# StatefulDataLoader(shuffle=True) goes on exactly from its state_dict, and shuffles the epochs after it as the loader that
# was not stopped would. Where it is given a generator, seeded alike, the epoch that is resumed is the same, and the next
# one is not: the state has the generator as it was when the epoch began, from which the order is drawn again, and not the
# base seed that each epoch's iterator draws from the same generator.
#
# Seen with torchdata 0.11.0, torch 2.13.0, Python 3.11, x86_64:
#     resumed after 3 of 6 batches, without a generator: rest of the epoch the same True, next epoch the same True
#     resumed after 3 of 6 batches, with a generator: rest of the epoch the same True, next epoch the same False
# Source: RandomSampler in torchdata/stateful_dataloader/sampler.py, and the iterators' base seed in stateful_dataloader.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'torchdata==0.11.0'
cat > "$folder/resume.py" <<'PYTHON'
import copy
from importlib.metadata import version

import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def make(with_generator):
    generator = torch.Generator().manual_seed(3) if with_generator else None
    return StatefulDataLoader(list(range(24)), batch_size=4, shuffle=True, generator=generator)


def rows(batches):
    return [batch.tolist() for batch in batches]


def compare(with_generator):
    """Return whether the rest of a resumed epoch, and the next epoch, are those of a loader that was not stopped."""
    torch.manual_seed(0)
    loader = make(with_generator)
    first, second = rows(loader), rows(loader)
    torch.manual_seed(0)
    loader = make(with_generator)
    batches = iter(loader)
    seen = [next(batches).tolist() for _ in range(3)]
    state = copy.deepcopy(loader.state_dict())
    torch.manual_seed(7)
    resumed = make(with_generator)
    resumed.load_state_dict(state)
    return seen + rows(resumed) == first, rows(resumed) == second


print(f"torchdata {version('torchdata')}, torch {torch.__version__}")
plain, given = compare(False), compare(True)
for which, (rest, following) in (("without", plain), ("with", given)):
    print(
        f"resumed after 3 of 6 batches, {which} a generator: rest of the epoch the same {rest}, "
        f"next epoch the same {following}"
    )
assert plain == (True, True)
assert given == (True, False), "a loader with a generator goes on differently now"
PYTHON
"$folder/venv/bin/python" "$folder/resume.py"
