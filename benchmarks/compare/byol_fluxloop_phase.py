"""BYOL with fluxloop's own phase."""

import copy

import torch
from common import EPOCHS, SSL_LR, STEPS_PER_EPOCH, TAU, ssl_setup

from fluxloop import EMA, BYOLPhase, KNNProbe, Learner, LinearProbe, cosine

student, predictor, loader, bank, valid = ssl_setup()

# --- counted ---
models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), "predictor": predictor}
adam = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=SSL_LR)
callbacks = [
    EMA("student", cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0), into="teacher"),
    LinearProbe("student.encoder"),
    KNNProbe("teacher.encoder", bank=bank),
]
learner = Learner(models, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[BYOLPhase()])
# --- end ---

lacks = ("learning-rate schedules", "checkpoints")
result = {
    "weights": models,
    "losses": {"loss": learner.history["training/loss"][-1]},
    "scores": {
        "probe": learner.history["validation/linear_student.encoder"][-1],
        "knn": learner.history["validation/knn_teacher.encoder"][-1],
    },
}
