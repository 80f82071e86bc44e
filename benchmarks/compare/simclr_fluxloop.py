"""SimCLR with fluxloop, in a step of one's own."""

from functools import partial

import torch
from common import EPOCHS, SSL_LR, TEMPERATURE, ssl_setup

from fluxloop import KNNProbe, Learner, TrainingPhase, runstep
from fluxloop.losses import nt_xent

model, _, loader, bank, valid = ssl_setup()


# --- counted ---
class SimCLR(TrainingPhase):
    def step(self, learner, batch):
        with runstep(learner, self, views=batch[0]) as (_, state):
            z1, z2 = (learner.model(view) for view in state.views)
            with learner.optimizing() as block:
                block.loss = nt_xent(z1, z2, TEMPERATURE)


adam = partial(torch.optim.AdamW, lr=SSL_LR)
callbacks = [
    KNNProbe("encoder", bank=bank),
]
learner = Learner(model, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[SimCLR()])
# --- end ---

lacks = ("learning-rate schedules", "checkpoints")
result = {
    "weights": {"model": model},
    "losses": {"loss": learner.history["training/loss"][-1]},
    "scores": {"knn": learner.history["validation/knn_encoder"][-1]},
}
