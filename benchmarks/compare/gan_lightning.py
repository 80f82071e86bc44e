"""A DCGAN with Lightning, by manual optimization."""

import torch
from common import BETAS, CLIP, DECAY, EPOCHS, FOLDER, GAN_LR, NOISE, gan_setup, lr_factor, save_grid
from lightning import LightningModule, Trainer
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

gen, disc, loader = gan_setup()


# --- counted ---
class GAN(LightningModule):
    def __init__(self, gen, disc):
        super().__init__()
        self.automatic_optimization = False
        self.gen, self.disc = gen, disc
        self.ema = AveragedModel(gen, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.register_buffer("fixed_noise", torch.randn(64, NOISE))

    def configure_optimizers(self):
        opt_d = torch.optim.Adam(self.disc.parameters(), lr=GAN_LR, betas=BETAS)
        opt_g = torch.optim.Adam(self.gen.parameters(), lr=GAN_LR, betas=BETAS)
        return [opt_d, opt_g], [LambdaLR(opt_d, lr_factor), LambdaLR(opt_g, lr_factor)]

    def training_step(self, real, batch_idx):
        opt_d, opt_g = self.optimizers()
        sched_d, sched_g = self.lr_schedulers()
        fake = self.gen(torch.randn(len(real), NOISE, device=self.device))

        with self.toggled_optimizer(opt_d):
            loss_d = softplus(-self.disc(real)).mean() + softplus(self.disc(fake.detach())).mean()
            opt_d.zero_grad()
            self.manual_backward(loss_d)
            self.clip_gradients(opt_d, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            opt_d.step()
            sched_d.step()

        with self.toggled_optimizer(opt_g):
            loss_g = softplus(-self.disc(fake)).mean()
            opt_g.zero_grad()
            self.manual_backward(loss_g)
            self.clip_gradients(opt_g, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            opt_g.step()
            sched_g.step()

        self.ema.update_parameters(self.gen)
        self.log_dict({"loss_d": loss_d, "loss_g": loss_g}, on_step=False, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self):
        self.ema.eval()
        with torch.no_grad():
            save_grid(self.ema(self.fixed_noise), FOLDER / f"{self.current_epoch + 1:04d}.png")


model = GAN(gen, disc)
trainer = Trainer(max_epochs=EPOCHS, default_root_dir=FOLDER)
trainer.fit(model, loader)
# --- end ---

result = {
    "weights": {"gen": gen, "disc": disc, "average": model.ema.module},
    "losses": {"disc": trainer.callback_metrics["loss_d"].item(), "gen": trainer.callback_metrics["loss_g"].item()},
    "grid": FOLDER / f"{EPOCHS:04d}.png",
    "checkpoint": trainer.checkpoint_callback.best_model_path,
}
