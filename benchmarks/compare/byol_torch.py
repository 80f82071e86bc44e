"""BYOL in plain PyTorch."""

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
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.optim.lr_scheduler import LambdaLR

student, predictor, loader, bank, valid = ssl_setup()

# --- counted ---
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
teacher, probe = copy.deepcopy(student).requires_grad_(False), nn.Linear(FEATURES, CLASSES)
models = nn.ModuleDict({"student": student, "predictor": predictor, "teacher": teacher, "probe": probe}).to(device)
optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=SSL_LR)
probe_optimizer = torch.optim.Adam(probe.parameters(), lr=PROBE_LR)
schedule = LambdaLR(optimizer, lr_factor)
parts = {"models": models, "optimizer": optimizer, "probe_optimizer": probe_optimizer, "schedule": schedule}
tau = cosine(EPOCHS * STEPS_PER_EPOCH, TAU, 1.0)


@torch.no_grad()
def extract(encoder, rows):
    encoder.eval()
    features, labels = zip(*[(encoder(xs.to(device)), ys.to(device)) for xs, ys in rows], strict=True)
    encoder.train()
    return torch.cat(features), torch.cat(labels)


step = 0
for epoch in range(1, EPOCHS + 1):
    mean_loss = torch.zeros((), device=device)
    for (view1, view2), labels in loader:
        view1, view2, labels = view1.to(device), view2.to(device), labels.to(device)
        features = student.encoder(view1)
        p1, p2 = predictor(student.projector(features)), predictor(student(view2))
        with torch.no_grad():
            t1, t2 = teacher(view1), teacher(view2)
        loss = 4 - 2 * (cosine_similarity(p1, t2) + cosine_similarity(p2, t1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        probe_loss = cross_entropy(probe(features.detach()), labels)
        probe_optimizer.zero_grad()
        probe_loss.backward()
        probe_optimizer.step()

        with torch.no_grad():
            for average, live in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(live, 1 - tau(step))
        step += 1
        mean_loss += loss.detach() / len(loader)
    features, labels = extract(student.encoder, valid)
    probe_accuracy = (probe(features).argmax(1) == labels).float().mean()
    features, labels = extract(teacher.encoder, valid)
    knn_accuracy = (knn_predict(*extract(teacher.encoder, bank), features) == labels).float().mean()
    print(f"epoch {epoch}: loss {mean_loss:.4f}, probe {probe_accuracy:.4f}, knn {knn_accuracy:.4f}")
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"epoch": epoch, "step": step, **state}, FOLDER / "last.pt")
# --- end ---

result = {
    "weights": {"student": student, "teacher": teacher, "predictor": predictor},
    "losses": {"loss": mean_loss.item()},
    "scores": {"probe": probe_accuracy.item(), "knn": knn_accuracy.item()},
    "checkpoint": FOLDER / "last.pt",
}
