#!/usr/bin/env bash
# diffusers 0.42.1: DDIMScheduler with timestep_spacing="linspace" does not step to its own next timestep.
#
# A step of DDIM computes the sample of an earlier timestep from that of the present one. The scheduler takes for it the
# present timestep minus 1000 // steps, whatever the spacing. With "linspace" the timesteps lie 1000 / (steps - 1) apart:
# the sample has then the noise of a timestep above the one at which the model is asked next, at every step, and the last
# but one ends above 0. With "leading" they agree, with "trailing" to rounding. DDPMScheduler takes the next of its
# timesteps.
#
# Seen with diffusers 0.42.1, torch 2.13.0, Python 3.11, x86_64:
#     linspace: timesteps [999, 832, 666, 500, 333, 166, 0], steps to [857, 690, 524, 358, 191, 24, 0]
#     leading: timesteps [852, 710, 568, 426, 284, 142, 0], steps to [710, 568, 426, 284, 142, 0, 0]
# Source: prev_timestep in DDIMScheduler.step of diffusers/schedulers/scheduling_ddim.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'diffusers==0.42.1'
cat > "$folder/steps.py" <<'PYTHON'
import diffusers
import torch
from diffusers import DDIMScheduler


def steps(spacing):
    """Return the timesteps, and to which timestep each step goes: that whose share of signal the sample has."""
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(7)
    shares, reached = scheduler.alphas_cumprod.double(), []
    for timestep in scheduler.timesteps:
        # with no noise predicted, the sample is scaled by sqrt(share there / share here)
        sample = scheduler.step(torch.zeros(1).double(), timestep, torch.ones(1).double()).prev_sample
        reached.append(int((shares - sample**2 * shares[timestep]).abs().argmin()))
    return scheduler.timesteps.tolist(), reached


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
found = {spacing: steps(spacing) for spacing in ("linspace", "leading")}
for spacing, (timesteps, reached) in found.items():
    print(f"{spacing}: timesteps {timesteps}, steps to {reached}")
timesteps, reached = found["leading"]
assert reached[:-1] == timesteps[1:]
timesteps, reached = found["linspace"]
assert all(there > wanted + 20 for there, wanted in zip(reached[:-1], timesteps[1:])), "they agree now"
PYTHON
"$folder/venv/bin/python" "$folder/steps.py"
