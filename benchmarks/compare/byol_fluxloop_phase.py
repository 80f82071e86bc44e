"""BYOL with fluxloop's own phase."""

import copy
from functools import partial

import torch
from common import EPOCHS, FOLDER, SSL_LR, STEPS_PER_EPOCH, TAU, lr_factor, ssl_setup
from torch.optim.lr_scheduler import LambdaLR

from fluxloop import EMA, BYOLPhase, Checkpointer, KNNProbe, Learner, LinearProbe, LRScheduler, cosine

student, predictor, loader, bank, valid = ssl_setup()

# --- counted ---
models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), "predictor": predictor}
adam = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=SSL_LR)
callbacks = [
    LRScheduler(partial(LambdaLR, lr_lambda=lr_factor), unit="step"),
    EMA("student", cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0), into="teacher"),
    LinearProbe("student.encoder"),
    KNNProbe("teacher.encoder", bank=bank),
    Checkpointer(FOLDER / "checkpoints"),
]
learner = Learner(models, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[BYOLPhase()], resume=FOLDER / "checkpoints")
# --- end ---

result = {
    "weights": models,
    "losses": {"loss": learner.history["training/loss"][-1]},
    "scores": {
        "probe": learner.history["validation/linear_student.encoder"][-1],
        "knn": learner.history["validation/knn_teacher.encoder"][-1],
    },
    "checkpoint": learner.get_callback(Checkpointer).last,
}
