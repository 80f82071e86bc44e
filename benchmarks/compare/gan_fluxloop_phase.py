"""A DCGAN with fluxloop's own phase."""

from functools import partial

import torch
from common import BETAS, DECAY, EPOCHS, FOLDER, GAN_LR, NOISE, gan_setup

from fluxloop import EMA, GANPhase, Learner, SampleImages

gen, disc, loader = gan_setup()

# --- counted ---
adam = partial(torch.optim.Adam, lr=GAN_LR, betas=BETAS)
callbacks = [
    EMA("gen", DECAY),
    SampleImages("gen@ema", inputs=torch.randn(64, NOISE), folder=FOLDER),
]
learner = Learner({"gen": gen, "disc": disc}, data=(loader,), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[GANPhase("non-saturating", noise=NOISE)])
# --- end ---

lacks = ("gradient clipping", "learning-rate schedules", "checkpoints")
result = {
    "weights": {"gen": gen, "disc": disc, "average": learner.weights["gen@ema"]},
    "losses": {name: learner.history[f"training/loss_{name}"][-1] for name in ("disc", "gen")},
    "grid": FOLDER / f"gen@ema-{EPOCHS:04d}.png",
}
