"""BYOL with Lightning, by manual optimization."""

import copy

import torch
from common import (
    CLASSES,
    EPOCHS,
    FEATURES,
    FOLDER,
    PROBE_LR,
    SSL_LR,
    STEPS_PER_EPOCH,
    TAU,
    cosine,
    knn_predict,
    lr_factor,
    ssl_setup,
)
from lightning import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.optim.lr_scheduler import LambdaLR

student, predictor, loader, bank, valid = ssl_setup()


# --- counted ---
class BYOL(LightningModule):
    def __init__(self, student, predictor):
        super().__init__()
        self.automatic_optimization = False
        self.student, self.predictor = student, predictor
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.probe = nn.Linear(FEATURES, CLASSES)
        self.tau = cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([*self.student.parameters(), *self.predictor.parameters()], lr=SSL_LR)
        return [optimizer, torch.optim.Adam(self.probe.parameters(), lr=PROBE_LR)], [LambdaLR(optimizer, lr_factor)]

    def training_step(self, batch, batch_idx):
        (view1, view2), labels = batch
        optimizer, probe_optimizer = self.optimizers()
        step = self.global_step // 2  # it counts the steps of both optimizers
        features = self.student.encoder(view1)
        p1, p2 = self.predictor(self.student.projector(features)), self.predictor(self.student(view2))
        with torch.no_grad():
            t1, t2 = self.teacher(view1), self.teacher(view2)
        loss = 4 - 2 * (cosine_similarity(p1, t2) + cosine_similarity(p2, t1)).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()

        probe_loss = cross_entropy(self.probe(features.detach()), labels)
        probe_optimizer.zero_grad()
        self.manual_backward(probe_loss)
        probe_optimizer.step()

        with torch.no_grad():
            for average, live in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.lerp_(live, 1 - self.tau(step))
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_start(self):
        self.rows = {0: [], 1: []}

    def validation_step(self, batch, batch_idx, dataloader_idx):
        xs, labels = batch
        self.rows[dataloader_idx].append((self.teacher.encoder(xs), labels))
        if dataloader_idx == 1:
            accuracy = (self.probe(self.student.encoder(xs)).argmax(1) == labels).float().mean()
            self.log("probe_accuracy", accuracy, add_dataloader_idx=False, prog_bar=True)

    def on_validation_epoch_end(self):
        bank, valid = (map(torch.cat, zip(*rows, strict=True)) for rows in self.rows.values())
        features, labels = valid
        self.log("knn_accuracy", (knn_predict(*bank, features) == labels).float().mean(), prog_bar=True)


model = BYOL(student, predictor)
trainer = Trainer(max_epochs=EPOCHS, default_root_dir=FOLDER)
trainer.fit(model, loader, [bank, valid])
# --- end ---

metrics = trainer.callback_metrics
result = {
    "weights": {"student": student, "teacher": model.teacher, "predictor": predictor},
    "losses": {"loss": metrics["loss"].item()},
    "scores": {"probe": metrics["probe_accuracy"].item(), "knn": metrics["knn_accuracy"].item()},
    "checkpoint": trainer.checkpoint_callback.best_model_path,
}
