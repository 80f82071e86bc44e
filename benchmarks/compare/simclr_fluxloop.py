"""SimCLR with fluxloop, in a phase of one's own."""

from functools import partial

import torch
from common import EPOCHS, FOLDER, SSL_LR, TEMPERATURE, lr_factor, ssl_setup
from torch.optim.lr_scheduler import LambdaLR

from fluxloop import Checkpointer, KNNProbe, Learner, LRScheduler, TrainingPhase
from fluxloop.losses import nt_xent

model, _, loader, bank, valid = ssl_setup()


# --- counted ---
class SimCLR(TrainingPhase):
    def entries(self, batch):
        return {"views": batch[0]}

    def body(self, learner, handle, state):
        z1, z2 = (learner.model(view) for view in state.views)
        with learner.optimizing() as block:
            block.loss = nt_xent(z1, z2, TEMPERATURE)


adam = partial(torch.optim.AdamW, lr=SSL_LR, fused=False)
callbacks = [
    LRScheduler(partial(LambdaLR, lr_lambda=lr_factor), unit="step"),
    KNNProbe("encoder", bank=bank),
    Checkpointer(FOLDER / "checkpoints"),
]
learner = Learner(model, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[SimCLR()], resume=FOLDER / "checkpoints")
# --- end ---

result = {
    "weights": {"model": model},
    "losses": {"loss": learner.history["training/loss"][-1]},
    "scores": {"knn": learner.history["validation/knn_encoder"][-1]},
    "checkpoint": learner.get_callback(Checkpointer).last,
}
