"""A DCGAN with Ignite."""

from operator import itemgetter

import torch
from common import BETAS, CLIP, DECAY, EPOCHS, FOLDER, GAN_LR, NOISE, gan_setup, lr_factor, save_grid
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler, LRScheduler, ModelCheckpoint
from ignite.metrics import Average
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

gen, disc, loader = gan_setup()

# --- counted ---
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gen, disc = gen.to(device), disc.to(device)
opt_d = torch.optim.Adam(disc.parameters(), lr=GAN_LR, betas=BETAS)
opt_g = torch.optim.Adam(gen.parameters(), lr=GAN_LR, betas=BETAS)
fixed_noise = torch.randn(64, NOISE, device=device)


def step(engine, real):
    real = real.to(device)
    fake = gen(torch.randn(len(real), NOISE, device=device))

    loss_d = softplus(-disc(real)).mean() + softplus(disc(fake.detach())).mean()
    opt_d.zero_grad()
    loss_d.backward()
    clip_grad_norm_(disc.parameters(), CLIP)
    opt_d.step()

    loss_g = softplus(-disc(fake)).mean()
    opt_g.zero_grad()
    loss_g.backward()
    clip_grad_norm_(gen.parameters(), CLIP)
    opt_g.step()
    return {"loss_d": loss_d.detach(), "loss_g": loss_g.detach()}


trainer = Engine(step)
averager = EMAHandler(gen, momentum=1 - DECAY)
averager.attach(trainer)
ema = averager.ema_model
sched_d, sched_g = LRScheduler(LambdaLR(opt_d, lr_factor)), LRScheduler(LambdaLR(opt_g, lr_factor))
for schedule in (sched_d, sched_g):
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
for name in ("loss_d", "loss_g"):
    Average(output_transform=itemgetter(name)).attach(trainer, name)


@trainer.on(Events.EPOCH_COMPLETED)
def log_and_sample(engine):
    print(f"epoch {engine.state.epoch}: {engine.state.metrics}")
    with torch.no_grad():
        save_grid(ema(fixed_noise), FOLDER / f"{engine.state.epoch:04d}.png")


parts = {"gen": gen, "disc": disc, "ema": ema, "opt_d": opt_d, "opt_g": opt_g, "sched_d": sched_d, "sched_g": sched_g}
checkpoint = ModelCheckpoint(FOLDER, n_saved=1)
trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint, {"trainer": trainer, **parts})
trainer.run(loader, max_epochs=EPOCHS)
# --- end ---

result = {
    "weights": {"gen": gen, "disc": disc, "average": ema},
    "losses": {"disc": trainer.state.metrics["loss_d"], "gen": trainer.state.metrics["loss_g"]},
    "grid": FOLDER / f"{EPOCHS:04d}.png",
    "checkpoint": checkpoint.last_checkpoint,
}
