"""Train every method of this page on the digits for as many epochs, and measure what each has learned.

    python docs/examples/gallery.py --epochs 20 --seed 0 --out runs/gallery
    python docs/examples/gallery.py --only BYOL --only "flow matching" --out runs/gallery

Writes DIR/result.json, to which each run adds, and prints the tables of docs/gallery.md.
"""

import argparse
import ast
import copy
import inspect
import json
import textwrap
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Rows, conv_encoder, digits, mlp, scores
from gan_digits import NOISE, make_critic, make_generator, measure, train_judge
from torch import Tensor, nn
from torch.distributions import Binomial

import fluxloop
from fluxloop import EMA, Learner, MultiCrop, TensorBatches, TwoViews, cosine, seed_everything
from fluxloop.augment import AdaptiveAugment, BlockMasks, MultiBlock, RandomMasks, add_noise, patchify, random_affine
from fluxloop.heads import DINOHead


def augment(images: Tensor) -> Tensor:
    """Turn, move and scale each image a little, and add noise."""
    return add_noise(random_affine(images, degrees=20, translate=0.12, scale=(0.75, 1.3)), 0.1)


def part(images: Tensor) -> Tensor:
    """Show a part of each image, in 6 x 6 pixels."""
    return add_noise(random_affine(images, degrees=15, translate=0.15, scale=(1.1, 1.6), size=6), 0.1)


VIEWS, CROPS = TwoViews(augment), MultiCrop(augment, part, num_local=2)


class ViT(nn.Module):
    """A transformer of two blocks over patches of 2 x 2 pixels; gives the class token and the patches."""

    unused: tuple[str, ...] = ()
    """What a subclass does without: an optimizer that holds it would leave it alone, and a fit warn of that."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(4, size)
        self.places = nn.Parameter(0.1 * torch.randn(16, size))
        self.token, self.hidden = (nn.Parameter(0.1 * torch.randn(size)) for _ in range(2))
        layer = partial(nn.TransformerEncoderLayer, size, 4, 2 * size, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.ModuleList([layer(), layer()]), nn.LayerNorm(size)
        for name in self.unused:  # made first: all of these networks begin with the same numbers
            delattr(self, name)

    def layers(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        tokens = self.embed(patchify(images, 2))
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.hidden, tokens)
        tokens = tokens + self.places[: tokens.shape[1]]
        return self.run(torch.cat([self.token.expand(len(images), 1, -1), tokens], dim=1))

    def run(self, tokens: Tensor) -> list[Tensor]:
        found = []
        for block in self.blocks:
            tokens = block(tokens)
            found.append(tokens)
        return [*found[:-1], self.norm(tokens)]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Any:
        tokens = self.layers(images, mask)[-1]
        return tokens[:, 0], tokens[:, 1:]


class Layers(ViT):
    """Gives the patches after each block."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Any:
        return [tokens[:, 1:] for tokens in self.layers(images, mask)]


class Some(ViT):
    """Sees some patches, each with its place."""

    unused = ("token", "hidden")

    def forward(self, patches: Tensor, places: Tensor) -> Any:
        return self.run(self.embed(patches) + self.places[places])[-1]


class Predictor(ViT):
    """Says by tokens at some places what stands at others."""

    unused = ("embed", "token")

    def forward(self, tokens: Tensor, places: Tensor, wanted: Tensor) -> Any:
        asked = self.hidden + self.places[wanted]
        return self.run(torch.cat([tokens + self.places[places], asked], dim=1))[-1][:, places.shape[1] :]


class Decoder(ViT):
    """Draws all patches by tokens at some places."""

    unused = ("embed", "token")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, tokens: Tensor, places: Tensor) -> Any:
        whole = self.hidden.expand(len(tokens), 16, -1).scatter(1, places[:, :, None].expand_as(tokens), tokens)
        return self.head(self.run(whole + self.places)[-1])


class Mean(nn.Module):
    """The mean patch of a whole image: the features of a transformer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.network, Some):
            return self.network(patchify(images, 2), torch.arange(16).expand(len(images), -1)).mean(1)
        return self.network.layers(images)[-1][:, 1:].mean(1)


# What each method is given: its phase, its models, and which of these gives features


def two_networks(**more: nn.Module) -> dict[str, nn.Module]:
    """Make an encoder and a projector, and more."""
    return {"encoder": conv_encoder(), "projector": mlp(256, 128, 64), **more}


def teacher(student: nn.Module, **more: nn.Module) -> dict[str, nn.Module]:
    """Make the moving average of a student."""
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False), **more}


def networks(head: nn.Module | None = None, **more: nn.Module) -> dict[str, nn.Module]:
    """Make a student of an encoder and a projector, and its teacher."""
    projector = mlp(256, 128, 64) if head is None else head
    return teacher(nn.ModuleDict({"encoder": conv_encoder(), "projector": projector}), **more)


def patches(*heads: str) -> dict[str, nn.Module]:
    """Make a transformer with heads, and its teacher."""
    made = {name: DINOHead(64, prototypes=64, hidden=128, bottleneck=32) for name in heads}
    return teacher(nn.ModuleDict({"encoder": ViT(), **made}))


MASKS = RandomMasks((0.1, 0.5), unmasked=0.5)
BLOCKS = MultiBlock(share=(0.15, 0.25), least=4)
HIDDEN = BlockMasks(4, share=(0.1, 0.25))

Made = tuple[Any, dict[str, nn.Module]]
METHODS: dict[str, Callable[[], Made]] = {
    "SimCLR": lambda: (fluxloop.SimCLRPhase(VIEWS, temperature=0.2), two_networks()),
    "Barlow Twins": lambda: (fluxloop.BarlowTwinsPhase(VIEWS), two_networks()),
    "VICReg": lambda: (fluxloop.VICRegPhase(VIEWS), two_networks()),
    "SimSiam": lambda: (fluxloop.SimSiamPhase(VIEWS), two_networks(predictor=mlp(64, 32, 64))),
    "NNCLR": lambda: (fluxloop.NNCLRPhase(VIEWS, queue_size=512), two_networks(predictor=mlp(64, 128, 64))),
    "SwAV": lambda: (fluxloop.SwAVPhase(CROPS), two_networks(prototypes=nn.Linear(64, 60, bias=False))),
    "LeJEPA": lambda: (fluxloop.LeJEPAPhase(CROPS, num_directions=256), two_networks()),
    "BYOL": lambda: (fluxloop.BYOLPhase(VIEWS), networks(predictor=mlp(64, 128, 64))),
    "MoCo": lambda: (fluxloop.MoCoPhase(VIEWS, queue_size=512), networks()),
    "MoCo v3": lambda: (fluxloop.MoCoV3Phase(VIEWS), networks(predictor=mlp(64, 128, 64))),
    "MSN": lambda: (fluxloop.MSNPhase(CROPS), networks(prototypes=nn.Linear(64, 60, bias=False))),
    "DINO": lambda: (fluxloop.DINOPhase(CROPS), networks(DINOHead(256, prototypes=128, hidden=256, bottleneck=64))),
    "iBOT": lambda: (fluxloop.IBOTPhase(VIEWS, patch_size=2, masks=MASKS), patches("projector")),
    "DINOv2": lambda: (
        fluxloop.DINOv2Phase(VIEWS, patch_size=2, masks=MASKS),
        patches("projector", "patch_projector"),
    ),
    "I-JEPA": lambda: (fluxloop.IJEPAPhase(2, masks=BLOCKS), teacher(Some(), predictor=Predictor())),
    "data2vec": lambda: (
        fluxloop.Data2VecPhase(2, masks=HIDDEN, layers=2),
        teacher(Layers(), predictor=nn.Linear(64, 64)),
    ),
    "MAE": lambda: (fluxloop.MAEPhase(2), {"encoder": Some(), "decoder": Decoder()}),
    "SupCon (with labels)": lambda: (fluxloop.SupConPhase(VIEWS), two_networks()),
}


def features(models: Any) -> nn.Module:
    """Return what gives features of whole images."""
    network = models["student"] if "student" in models else models["encoder"]
    network = network["encoder"] if isinstance(network, nn.ModuleDict) else network
    return Mean(network) if isinstance(network, ViT) else network


def train_method(name: str, train: Rows, test: Rows, arguments: argparse.Namespace) -> dict[str, float]:
    """Train a method; give its scores on held-out images, its lines, and the processor's seconds."""
    seed_everything(arguments.seed)
    phase, models = METHODS[name]()
    data = TensorBatches(*train, batch_size=128, shuffle=True, drop_last=True)
    steps = arguments.epochs * len(data)
    learner = Learner(
        models,
        data=(data,),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=[EMA("student", cosine(total=steps, start=0.98, end=1.0), into="teacher")] * ("student" in models),
        seed=arguments.seed,
        default_callbacks=False,
    )
    begin = time.process_time()
    learner.fit(arguments.epochs, phases=[phase])
    seconds = time.process_time() - begin
    return {"lines": lines_of(type(phase)), **scores(train, test, features(models)), "seconds": seconds}


class Denoiser(nn.Module):
    """A perceptron of noised images and their times."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        sizes = pairwise([64 + 16, 256, 256, 256])
        layers = [layer for inputs, outputs in sizes for layer in (nn.Linear(inputs, outputs), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 64))

    def forward(self, noised: Tensor, times: Tensor) -> Tensor:
        angles = (times.float() / self.scale)[:, None] * torch.pi * 2.0 ** torch.arange(8, device=times.device) / 2
        told = torch.cat([noised.flatten(1), angles.sin(), angles.cos()], dim=1)
        return self.net(told).reshape(noised.shape)


def adversaries() -> dict[str, nn.Module]:
    return {"generator": make_generator(), "critic": make_critic()}


def autoencoder() -> dict[str, nn.Module]:
    decoder = nn.Sequential(mlp(16, 128, 256), nn.ReLU(), nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8)))
    return {"encoder": nn.Sequential(nn.Flatten(), mlp(64, 256, 128, 32)), "decoder": decoder}


def binomial(preds: Tensor, images: Tensor) -> Tensor:
    """Give minus the log-likelihood of pixels of 17 shades, a mean over images."""
    return -Binomial(16, logits=preds).log_prob(16 * images).flatten(1).sum(1).mean()


def moved() -> AdaptiveAugment:
    """Make changes that come as the critic begins to know the images."""
    return AdaptiveAugment(partial(random_affine, translate=0.125), partial(random_affine, degrees=10), images=20_000)


gan = partial(fluxloop.GANPhase, noise=NOISE)
GENERATORS: dict[str, Callable[[], Made]] = {
    "WGAN-GP": lambda: (gan("wasserstein", gradient_penalty=10), adversaries()),
    "hinge, R1": lambda: (gan("hinge", r1=0.1), adversaries()),
    "hinge, R1, ADA": lambda: (gan("hinge", r1=0.1, augment=moved()), adversaries()),
    "R3GAN": lambda: (gan("relativistic", r1=0.2, r2=0.2), adversaries()),
    "VAE": lambda: (fluxloop.VAEPhase(compare=binomial), autoencoder()),
    "flow matching": lambda: (fluxloop.FlowMatchingPhase(), {"model": Denoiser()}),
    "diffusion (velocity)": lambda: (fluxloop.DiffusionPhase("velocity"), {"model": Denoiser(1000)}),
    "diffusion (EDM)": lambda: (fluxloop.DiffusionPhase("edm"), {"model": Denoiser()}),
}


def train_generator(name: str, train: Rows, test: Rows, judge: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Train a generator; compare as many samples as there are training images with the held-out ones."""
    seed_everything(arguments.seed)
    phase, models = GENERATORS[name]()
    is_noised, is_gan = isinstance(phase, fluxloop.NoisedPhase), isinstance(phase, fluxloop.GANPhase)
    images = 2 * train[0] - 1 if is_noised else train[0]
    made = "generator" if is_gan else "model" if is_noised else "decoder"
    learner = Learner(
        models["model"] if is_noised else models,
        data=(TensorBatches(images, batch_size=64, shuffle=True, drop_last=True),),
        optimizer=partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.9) if is_gan else (0.9, 0.999)),
        callbacks=[EMA(made, 0.995)],
        seed=arguments.seed,
        default_callbacks=False,
    )
    begin = time.process_time()
    learner.fit(3 * arguments.epochs, phases=[phase])
    seconds = time.process_time() - begin
    averaged = learner.weights[f"{made}@ema"].eval()
    with torch.no_grad():
        if is_noised:
            samples = (phase.sample(averaged, torch.randn(images.shape), steps=30).clamp(-1, 1) + 1) / 2
        else:
            samples = averaged(torch.randn(len(images), NOISE if is_gan else 16))
            samples = samples if is_gan else samples.sigmoid()
    return {"lines": lines_of(type(phase)), **measure(judge, samples, test[0]), "seconds": seconds}


def lines_of(cls: type) -> int:
    """Count the lines of code of a class, without its docstrings and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1:
            node.body = [
                each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
    return len(ast.unparse(tree).splitlines())


def table(rows: dict[str, dict[str, float]], columns: dict[str, tuple[str, str]]) -> str:
    """Write rows as a table of Markdown."""
    names = [*dict.fromkeys(["", *columns])]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in columns.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


REPRESENTATIONS = {
    "kNN, ten labels per class": ("knn_100_labels", ".3f"),
    "linear, ten labels per class": ("linear_100_labels", ".3f"),
    "kNN, all": ("knn", ".3f"),
    "linear, all": ("linear", ".3f"),
    "lines of the phase": ("lines", ".0f"),
    "seconds": ("seconds", ".0f"),
}
SAMPLES = {
    "Fréchet distance": ("frechet", ".2f"),
    "classes": ("classes", ".0f"),
    "evenness": ("evenness", ".3f"),
    "confidence": ("confidence", ".3f"),
    "lines of the phase": ("lines", ".0f"),
    "seconds": ("seconds", ".0f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--only", action="append", choices=[*METHODS, *GENERATORS], help="a method; may be repeated")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seed_everything(arguments.seed)
    train, test = digits()
    chosen = [*METHODS, *GENERATORS] if arguments.only is None else arguments.only
    path = arguments.out / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"methods": {}, "generators": {}}
    result |= {"seed": arguments.seed, "epochs": arguments.epochs}
    result["methods"] = {"pixels": scores(train, test), **result["methods"]}
    untrained = {"untrained convolutions": conv_encoder(), "untrained transformer": Mean(ViT())}
    result["methods"] |= {name: scores(train, test, each) for name, each in untrained.items()}
    judge = None
    for name in chosen:
        if name in METHODS:
            result["methods"][name] = train_method(name, train, test, arguments)
        else:
            if judge is None:
                seed_everything(arguments.seed)
                judge, _ = train_judge(train, test, arguments)
                result["generators"]["real training images"] = measure(judge, train[0], test[0])
            result["generators"][name] = train_generator(name, train, test, judge, arguments)
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["methods"], REPRESENTATIONS), table(result["generators"], SAMPLES), sep="\n\n")


if __name__ == "__main__":
    main()
