"""BYOL with fluxloop, in a step of one's own."""

import copy

import torch
from common import EPOCHS, SSL_LR, STEPS_PER_EPOCH, TAU, ssl_setup
from torch.nn.functional import cosine_similarity

from fluxloop import EMA, KNNProbe, Learner, LinearProbe, TrainingPhase, cosine, runstep

student, predictor, loader, bank, valid = ssl_setup()


# --- counted ---
class BYOL(TrainingPhase):
    def step(self, learner, batch):
        student, teacher, predictor = learner.model
        with runstep(learner, self, views=batch[0], ys=batch[1]) as (_, state):
            view1, view2 = state.views
            state.features = student.encoder(view1)
            p1, p2 = predictor(student.projector(state.features)), predictor(student(view2))
            with torch.no_grad():
                t1, t2 = teacher(view1), teacher(view2)
            with learner.optimizing() as block:
                block.loss = 4 - 2 * (cosine_similarity(p1, t2) + cosine_similarity(p2, t1)).mean()


models = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), "predictor": predictor}
adam = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=SSL_LR)
callbacks = [
    EMA("student", cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0), into="teacher"),
    LinearProbe("student.encoder"),
    KNNProbe("teacher.encoder", bank=bank),
]
learner = Learner(models, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[BYOL()])
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
