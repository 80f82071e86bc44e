"""Train every method of this page on the digits for as many epochs, and measure what each has learned.

    python docs/examples/gallery.py --epochs 20 --seed 0 --out runs/gallery
    python docs/examples/gallery.py --only BYOL --only "flow matching" --out runs/gallery
    python docs/examples/gallery.py --epochs 30 --only SwAV --pictures runs/gallery/pictures

Writes DIR/result.json, to which each run adds, and prints the tables of docs/gallery.md. With --pictures it draws what
the pages of methods show, and adds what is counted in the pictures to the results.
"""

import argparse
import ast
import copy
import inspect
import json
import re
import textwrap
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Rows, conv_encoder, digits, mlp, scores
from gallery_pictures import SHOWN, Figures, draw, draw_translations, draw_way, watchers
from gan_digits import NOISE, make_critic, make_generator, measure, train_judge
from torch import Tensor, nn
from torch.distributions import Binomial

import fluxloop
from fluxloop import (
    EMA,
    Learner,
    MultiCrop,
    ObjectiveValidationPhase,
    Recorder,
    TensorBatches,
    TwoViews,
    cosine,
    seed_everything,
)
from fluxloop.augment import AdaptiveAugment, BlockMasks, MultiBlock, RandomMasks, add_noise, patchify, random_affine
from fluxloop.heads import DINOHead
from fluxloop.images import image_grid, save_image


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


def train_method(name: str, train: Rows, test: Rows, arguments: argparse.Namespace) -> tuple[dict[str, float], Figures]:
    """Train a method; give its scores on held-out images, its lines and seconds, and what its picture shows."""
    seed_everything(arguments.seed)
    phase, models = METHODS[name]()
    data = TensorBatches(*train, batch_size=128, shuffle=True, drop_last=True)
    steps, folder = arguments.epochs * len(data), arguments.pictures
    callbacks = [EMA("student", cosine(total=steps, start=0.98, end=1.0), into="teacher")] * ("student" in models)
    phases = [phase]
    if folder is not None:  # the last step is then one of all held-out images
        phases.append(ObjectiveValidationPhase(phase, every=arguments.epochs))
        callbacks += [Recorder(), *watchers(name, folder, arguments.epochs)]
    learner = Learner(
        models,
        data=(data, TensorBatches(*test, batch_size=len(test[0]))),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
        callbacks=callbacks,
        seed=arguments.seed,
        default_callbacks=False,
    )
    begin = time.process_time()
    learner.fit(arguments.epochs, phases=phases)
    seconds = time.process_time() - begin
    row = {"lines": lines_of(type(phase)), **scores(train, test, features(models)), "seconds": seconds}
    return row, {} if folder is None else draw(name, phase, learner, train, picture_of(name, folder))


def picture_of(name: str, folder: Path) -> Path:
    """Return the file of a method's picture."""
    return folder / f"gallery_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.png"


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


def make_translator() -> nn.Module:
    """Make what turns images from -1 to 1 into others."""
    layers = [nn.Conv2d(*channels, 3, padding=1) for channels in ((1, 16), (16, 16), (16, 1))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Tanh())


def translators() -> dict[str, nn.Module]:
    generators = nn.ModuleDict({"ab": make_translator(), "ba": make_translator()})
    return {"generators": generators, "critics": nn.ModuleDict({"a": make_critic(), "b": make_critic()})}


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
    "CycleGAN": lambda: (fluxloop.CycleGANPhase(identity=0), translators()),
    "VAE": lambda: (fluxloop.VAEPhase(compare=binomial), autoencoder()),
    "flow matching": lambda: (fluxloop.FlowMatchingPhase(), {"model": Denoiser()}),
    "diffusion (velocity)": lambda: (fluxloop.DiffusionPhase("velocity"), {"model": Denoiser(1000)}),
    "diffusion (EDM)": lambda: (fluxloop.DiffusionPhase("edm"), {"model": Denoiser()}),
}


RATES: dict[str, dict[str, Any]] = {
    "generator": {"lr": 2e-3, "betas": (0.0, 0.9)},
    "generators": {"lr": 5e-4, "betas": (0.5, 0.999)},  # at 2e-3 larger translators made all images alike
}


def kinds(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return half of the images, and the negatives of the other half: no image has its pair."""
    half = len(images) // 2
    return images[:half], -images[half : 2 * half]


@torch.no_grad()
def make_samples(made: str, phase: Any, network: Any, images: Tensor) -> Tensor:
    """Make as many images as there are training images, from 0 to 1."""
    if made == "model":
        return (phase.sample(network, torch.randn(images.shape), steps=30).clamp(-1, 1) + 1) / 2
    if made == "generators":
        translated: Tensor = network.ba(-images)
        return (translated + 1) / 2
    samples: Tensor = network(torch.randn(len(images), NOISE if made == "generator" else 16))
    return samples if made == "generator" else samples.sigmoid()


def train_generator(
    name: str, train: Rows, test: Rows, judge: Any, arguments: argparse.Namespace
) -> tuple[dict[str, float], Figures]:
    """Train a generator; compare as many samples as there are training images with the held-out ones."""
    seed_everything(arguments.seed)
    phase, models = GENERATORS[name]()
    made = next((each for each in ("generator", "generators", "model") if each in models), "decoder")
    images = train[0] if made in ("generator", "decoder") else 2 * train[0] - 1
    rows = kinds(images) if made == "generators" else (images,)
    learner = Learner(
        models["model"] if made == "model" else models,
        data=(TensorBatches(*rows, batch_size=64 // len(rows), shuffle=True, drop_last=True),),
        optimizer=partial(torch.optim.Adam, **RATES.get(made, {"lr": 2e-3})),
        callbacks=[EMA(made, 0.995)],
        seed=arguments.seed,
        default_callbacks=False,
    )
    begin = time.process_time()
    learner.fit(3 * arguments.epochs, phases=[phase])
    seconds = time.process_time() - begin
    averaged = learner.weights[f"{made}@ema"].eval()
    samples = make_samples(made, phase, averaged, images)
    row = {"lines": lines_of(type(phase)), **measure(judge, samples, test[0]), "seconds": seconds}
    if arguments.pictures is None:
        return row, {}
    path = picture_of(name, arguments.pictures)
    if made == "generators":
        return row, draw_translations(averaged, test, judge, path)
    if made == "model":
        draw_way(phase, averaged, torch.randn(SHOWN, *images.shape[1:]), 30, path)
    else:
        save_image(image_grid(samples[:64], 16), path, zoom=4)
    return row, {}


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
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures of the chosen methods")
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
            result["methods"][name], shown = train_method(name, train, test, arguments)
        else:
            if judge is None:
                seed_everything(arguments.seed)
                judge, _ = train_judge(train, test, arguments)
                result["generators"]["real training images"] = measure(judge, train[0], test[0])
            result["generators"][name], shown = train_generator(name, train, test, judge, arguments)
        if shown:
            result.setdefault("pictures", {})[name] = shown
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["methods"], REPRESENTATIONS), table(result["generators"], SAMPLES), sep="\n\n")


if __name__ == "__main__":
    main()
