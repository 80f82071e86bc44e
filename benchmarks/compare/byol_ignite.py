"""BYOL with Ignite."""

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
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import EMAHandler, LRScheduler, ModelCheckpoint
from ignite.metrics import Accuracy, Average
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.optim.lr_scheduler import LambdaLR

student, predictor, loader, bank, valid = ssl_setup()

# --- counted ---
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
student, predictor, probe = student.to(device), predictor.to(device), nn.Linear(FEATURES, CLASSES, device=device)
averager = EMAHandler(student, momentum=1 - TAU, handle_buffers="ema_train")
teacher = averager.ema_model
models = nn.ModuleDict({"student": student, "predictor": predictor, "teacher": teacher, "probe": probe})
opt = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=SSL_LR)
probe_opt = torch.optim.Adam(probe.parameters(), lr=PROBE_LR)


def step(engine, batch):
    (view1, view2), labels = batch
    view1, view2, labels = view1.to(device), view2.to(device), labels.to(device)
    features = student.encoder(view1)
    p1, p2 = predictor(student.projector(features)), predictor(student(view2))
    with torch.no_grad():
        t1, t2 = teacher(view1), teacher(view2)
    loss = 4 - 2 * (cosine_similarity(p1, t2) + cosine_similarity(p2, t1)).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()

    probe_loss = cross_entropy(probe(features.detach()), labels)
    probe_opt.zero_grad()
    probe_loss.backward()
    probe_opt.step()
    return loss.detach()


@torch.no_grad()
def extract(encoder, rows):
    encoder.eval()
    features, labels = zip(*[(encoder(xs.to(device)), ys.to(device)) for xs, ys in rows], strict=True)
    encoder.train()
    return torch.cat(features), torch.cat(labels)


trainer = Engine(step)
tau = cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0)
averager.attach(trainer)
schedule = LRScheduler(LambdaLR(opt, lr_factor))
trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
Average().attach(trainer, "loss")
evaluator = create_supervised_evaluator(nn.Sequential(student.encoder, probe), {"probe": Accuracy()}, device)


@trainer.on(Events.ITERATION_STARTED)
def set_momentum(engine):
    engine.state.ema_momentum = 1 - tau(engine.state.iteration - 1)


@trainer.on(Events.EPOCH_COMPLETED)
def evaluate(engine):
    evaluator.run(valid)
    student.train()
    features, labels = extract(teacher.encoder, valid)
    knn = (knn_predict(*extract(teacher.encoder, bank), features) == labels).float().mean()
    engine.state.metrics.update(evaluator.state.metrics, knn=knn.item())
    print(f"epoch {engine.state.epoch}: {engine.state.metrics}")


parts = {"models": models, "opt": opt, "probe_opt": probe_opt, "schedule": schedule}
checkpoint = ModelCheckpoint(FOLDER, n_saved=1)
trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint, {"trainer": trainer, **parts})
trainer.run(loader, max_epochs=EPOCHS)
# --- end ---

result = {
    "weights": {"student": student, "teacher": teacher, "predictor": predictor},
    "losses": {"loss": trainer.state.metrics["loss"]},
    "scores": {"probe": trainer.state.metrics["probe"], "knn": trainer.state.metrics["knn"]},
    "checkpoint": checkpoint.last_checkpoint,
}
