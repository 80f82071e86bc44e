"""A DCGAN in plain PyTorch."""

import torch
from common import BETAS, CLIP, DECAY, EPOCHS, FOLDER, GAN_LR, NOISE, gan_setup, lr_factor, save_grid
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

gen, disc, loader = gan_setup()

# --- counted ---
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gen, disc = gen.to(device), disc.to(device)
ema = AveragedModel(gen, multi_avg_fn=get_ema_multi_avg_fn(DECAY)).eval()
opt_d = torch.optim.Adam(disc.parameters(), lr=GAN_LR, betas=BETAS)
opt_g = torch.optim.Adam(gen.parameters(), lr=GAN_LR, betas=BETAS)
sched_d = LambdaLR(opt_d, lr_factor)
sched_g = LambdaLR(opt_g, lr_factor)
fixed_noise = torch.randn(64, NOISE, device=device)
parts = {"gen": gen, "disc": disc, "ema": ema, "opt_d": opt_d, "opt_g": opt_g, "sched_d": sched_d, "sched_g": sched_g}
for epoch in range(1, EPOCHS + 1):
    losses = torch.zeros(2, device=device)
    for real in loader:
        real = real.to(device)
        fake = gen(torch.randn(len(real), NOISE, device=device))

        loss_d = softplus(-disc(real)).mean() + softplus(disc(fake.detach())).mean()
        opt_d.zero_grad()
        loss_d.backward()
        clip_grad_norm_(disc.parameters(), CLIP)
        opt_d.step()
        sched_d.step()

        loss_g = softplus(-disc(fake)).mean()
        opt_g.zero_grad()
        loss_g.backward()
        clip_grad_norm_(gen.parameters(), CLIP)
        opt_g.step()
        sched_g.step()

        ema.update_parameters(gen)
        losses += torch.stack([loss_d.detach(), loss_g.detach()]) / len(loader)
    print(f"epoch {epoch}: D loss {losses[0]:.4f}, G loss {losses[1]:.4f}")
    with torch.no_grad():
        save_grid(ema(fixed_noise), FOLDER / f"{epoch:04d}.png")
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, FOLDER / "last.pt")
# --- end ---

result = {
    "weights": {"gen": gen, "disc": disc, "average": ema.module},
    "losses": {"disc": losses[0].item(), "gen": losses[1].item()},
    "grid": FOLDER / f"{EPOCHS:04d}.png",
    "checkpoint": FOLDER / "last.pt",
}
