"""SimCLR in plain PyTorch."""

import torch
from common import EPOCHS, FOLDER, SSL_LR, TEMPERATURE, knn_predict, lr_factor, nt_xent, ssl_setup
from torch.optim.lr_scheduler import LambdaLR

model, _, loader, bank, valid = ssl_setup()

# --- counted ---
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = model.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=SSL_LR)
schedule = LambdaLR(optimizer, lr_factor)


@torch.no_grad()
def extract(encoder, rows):
    encoder.eval()
    features, labels = zip(*[(encoder(xs.to(device)), ys.to(device)) for xs, ys in rows], strict=True)
    encoder.train()
    return torch.cat(features), torch.cat(labels)


for epoch in range(1, EPOCHS + 1):
    mean_loss = torch.zeros((), device=device)
    for views, _ in loader:
        z1, z2 = (model(view.to(device)) for view in views)
        loss = nt_xent(z1, z2, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean_loss += loss.detach() / len(loader)
    features, labels = extract(model.encoder, valid)
    knn_accuracy = (knn_predict(*extract(model.encoder, bank), features) == labels).float().mean()
    print(f"epoch {epoch}: loss {mean_loss:.4f}, knn {knn_accuracy:.4f}")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, FOLDER / "last.pt")
# --- end ---

result = {
    "weights": {"model": model},
    "losses": {"loss": mean_loss.item()},
    "scores": {"knn": knn_accuracy.item()},
    "checkpoint": FOLDER / "last.pt",
}
