"""BYOL with fluxloop, in a phase of one's own."""

import copy
from functools import partial

import torch
from common import EPOCHS, FOLDER, SSL_LR, STEPS_PER_EPOCH, TAU, lr_factor, ssl_setup
from torch.nn.functional import cosine_similarity
from torch.optim.lr_scheduler import LambdaLR

from fluxloop import EMA, Checkpointer, KNNProbe, Learner, LinearProbe, LRScheduler, TrainingPhase, cosine

student, predictor, loader, bank, valid = ssl_setup()


# --- counted ---
class BYOL(TrainingPhase):
    def entries(self, batch):
        return {"views": batch[0], "ys": batch[1]}

    def body(self, learner, handle, state):
        student, teacher, predictor = learner.model
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
    LRScheduler(partial(LambdaLR, lr_lambda=lr_factor), unit="step"),
    EMA("student", cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0), into="teacher"),
    LinearProbe("student.encoder"),
    KNNProbe("teacher.encoder", bank=bank),
    Checkpointer(FOLDER / "checkpoints"),
]
learner = Learner(models, data=(loader, valid), optimizer=adam, callbacks=callbacks)
learner.fit(EPOCHS, phases=[BYOL()], resume=FOLDER / "checkpoints")
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
