"""SimCLR with fluxloop's own phase."""

from functools import partial

import torch
from common import EPOCHS, SSL_LR, TEMPERATURE, ssl_setup

from fluxloop import KNNProbe, Learner, SimCLRPhase

model, _, loader, bank, valid = ssl_setup()

# --- counted ---
adam = partial(torch.optim.AdamW, lr=SSL_LR)
callbacks = [
    KNNProbe("encoder", bank=bank),
]
learner = Learner(model, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[SimCLRPhase(temperature=TEMPERATURE)])
# --- end ---

lacks = ("learning-rate schedules", "checkpoints")
result = {
    "weights": {"model": model},
    "losses": {"loss": learner.history["training/loss"][-1]},
    "scores": {"knn": learner.history["validation/knn_encoder"][-1]},
}
