"""A DCGAN with fluxloop, in a phase of one's own."""

from functools import partial

import torch
from common import BETAS, CLIP, DECAY, EPOCHS, FOLDER, GAN_LR, NOISE, gan_setup, lr_factor
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import LambdaLR

from fluxloop import EMA, Checkpointer, GradientClip, Learner, LRScheduler, SampleImages, TrainingPhase

gen, disc, loader = gan_setup()


# --- counted ---
class GAN(TrainingPhase):
    def entries(self, batch):
        return {"real": batch}

    def body(self, learner, handle, state):
        gen, disc = learner.model
        state.fake = gen(torch.randn(len(state.real), NOISE, device=state.real.device))
        with learner.optimizing("disc") as block:
            block.loss = softplus(-disc(state.real)).mean() + softplus(disc(state.fake.detach())).mean()
        with learner.optimizing("gen") as block:
            block.loss = softplus(-disc(state.fake)).mean()


adam = partial(torch.optim.Adam, lr=GAN_LR, betas=BETAS, fused=False)
callbacks = [
    GradientClip(CLIP),
    LRScheduler(partial(LambdaLR, lr_lambda=lr_factor), unit="step"),
    EMA("gen", DECAY),
    SampleImages("gen@ema", inputs=torch.randn(64, NOISE), folder=FOLDER),
    Checkpointer(FOLDER / "checkpoints"),
]
learner = Learner({"gen": gen, "disc": disc}, data=(loader,), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[GAN()], resume=FOLDER / "checkpoints")
# --- end ---

result = {
    "weights": {"gen": gen, "disc": disc, "average": learner.weights["gen@ema"]},
    "losses": {name: learner.history[f"training/loss_{name}"][-1] for name in ("disc", "gen")},
    "grid": FOLDER / f"gen@ema-{EPOCHS:04d}.png",
    "checkpoint": learner.get_callback(Checkpointer).last,
}
