"""Train a small VQGAN on the digits: four codes for each image, and a critic that begins late.

    python docs/examples/vqgan_digits.py --epochs 60 --seed 0 --out runs/vqgan_digits

Writes DIR/result.json and DIR/reconstructions.png: held-out images, and what is left of them in four codes each,
by a network that was trained without a critic and by one that was trained with it.
"""

from functools import partial
from typing import Any

import torch
from common import digits, parse, write_result
from gan_digits import make_critic, measure, train_judge
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, relu

from fluxloop import AbstractTrainingPhase, Learner, LossBegin, TensorBatches
from fluxloop.images import image_grid, save_image


class Codebook(nn.Module):
    """Vectors, of which the nearest stands for what it is given; each follows the mean of what it stands for."""

    def __init__(self, codes: int = 32, size: int = 16, decay: float = 0.95) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", 0.1 * torch.randn(codes, size))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.vectors.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Give the nearest vectors of (N, D, H, W), and their numbers (N, H, W)."""
        rows = z.movedim(1, -1)
        numbers = torch.cdist(rows.flatten(0, 2).float(), self.vectors).argmin(1)
        if self.training:
            self.follow(rows.flatten(0, 2).detach().float(), numbers)
        found = self.vectors[numbers].view(rows.shape).movedim(-1, 1)
        return found, numbers.view(rows.shape[:-1])

    def follow(self, rows: Tensor, numbers: Tensor) -> None:
        """Move the averages; a vector that stands for next to nothing becomes one of the rows."""
        chosen = nn.functional.one_hot(numbers, len(self.vectors)).to(rows)
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(chosen.T @ rows, 1 - self.decay)
        idle = (self.counts < 0.3)[:, None]
        others = rows[torch.randint(len(rows), (len(self.vectors),), device=rows.device)]
        self.sums.copy_(torch.where(idle, others, self.sums))
        self.counts.copy_(torch.where(idle[:, 0], 1.0, self.counts))
        self.vectors.copy_(self.sums / self.counts[:, None])


class Autoencoder(nn.Module):
    """An image in 2 x 2 codes, and the image that is made of these."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU(), nn.Conv2d(64, 16, 1)
        )
        self.codebook = Codebook()
        self.decoder = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(64, 64, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the reconstruction, what the encoder said, and the vectors in its place."""
        z = self.encoder(images)
        vectors, _ = self.codebook(z)
        straight_through = z + (vectors - z).detach()  # the decoder's gradient reaches the encoder as it is
        return self.decoder(straight_through), z, vectors


class VQGANPhase(AbstractTrainingPhase):
    """VQGAN (Esser et al., 2021) without its perceptual loss, for which digits of 8 x 8 pixels have no network.

    Args:
        critic_from: After how many steps the critic begins; never, if None.
        weight: Of the adversarial loss, beside the weight that balances its gradient with the reconstruction's.
        commitment: Weight of the distance of what the encoder says to its code.
    """

    def __init__(self, critic_from: int | None = 0, *, weight: float = 0.1, commitment: float = 0.25) -> None:
        self.critic_from, self.weight_of_critic, self.commitment = critic_from, weight, commitment
        self.steps = 0

    def entries(self, batch: Any) -> dict[str, Any]:
        begun = self.critic_from is not None and self.steps >= self.critic_from
        return {"images": batch, "has_critic": begun}

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        network, critic = learner.model.network, learner.model.critic
        with learner.optimizing("network") as block:
            state.preds, z, vectors = network(state.images)
            handle(LossBegin())
            state.error = l1_loss(state.preds, state.images)
            block.loss = state.error + self.commitment * mse_loss(z, vectors.detach())
            if state.has_critic:
                passing = -critic(state.preds).mean()
                state.balance = self.balance(network.decoder[-1].weight, state.error, passing)
                block.loss = block.loss + self.weight_of_critic * state.balance * passing
        if state.has_critic:
            with learner.optimizing("critic") as block:
                real, fake = critic(state.images), critic(state.preds.detach())
                block.loss = (relu(1 - real).mean() + relu(1 + fake).mean()) / 2

    @staticmethod
    def balance(weight: Tensor, error: Tensor, passing: Tensor) -> Tensor:
        """Weigh the critic so that its gradient at the last layer is as long as the reconstruction's."""
        ours, others = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (error, passing))
        return (ours / (others + 1e-4)).clamp(max=1e4).detach()

    def finish(self, learner: Any, state: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def train(phase: VQGANPhase, images: Tensor, arguments: Any) -> Autoencoder:
    torch.manual_seed(arguments.seed)
    network = Autoencoder()
    learner = Learner(
        {"network": network, "critic": make_critic()},
        data=(TensorBatches(images, batch_size=64, shuffle=True, drop_last=True),),
        optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9)),
        seed=arguments.seed,
    )
    learner.fit(arguments.epochs, phases=[phase])
    return network.eval()


def main() -> None:
    arguments = parse("vqgan_digits", 60, "Train a small VQGAN on scikit-learn's digits.")
    (images, _), (test, _) = digits()
    judge, scores = train_judge(*digits(), arguments)
    late = arguments.epochs // 2 * (len(images) // 64)
    result: dict[str, Any] = {"judge": scores, "real": measure(judge, test, test)}
    pictures = [test[:32]]
    for name, begins in {"without a critic": None, "with a critic": late}.items():
        network = train(VQGANPhase(begins), images, arguments)
        with torch.no_grad():
            preds = network(test)[0]
            numbers = network.codebook(network.encoder(test))[1]
        measured = measure(judge, preds.clamp(0, 1), test)
        result[name] = {"error": l1_loss(preds, test).item(), "codes": len(numbers.unique()), **measured}
        pictures.append(preds[:32].clamp(0, 1))
    rows = [torch.cat([each[i : i + 16] for each in pictures]) for i in (0, 16)]
    save_image(image_grid(torch.cat(rows), 16), arguments.out / "reconstructions.png", zoom=3)
    write_result(arguments, **result)


if __name__ == "__main__":
    main()
