"""What the gallery draws of each method: pictures of held-out digits, and what can be counted in them.

`gallery.py --pictures DIR` calls `draw` after each training. The learner's last step is by then one of an
`ObjectiveValidationPhase`, whose single batch are all held-out images.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Rows, features_of
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm, normalize

from fluxloop import NeighborImages
from fluxloop.augment import patchify, unpatchify
from fluxloop.images import image_grid, save_image

SHOWN = 12
"""How many images stand in a line."""
GREY = 0.5
"""How bright hidden patches are."""

Figures = dict[str, float]


def watchers(name: str, folder: Path, epochs: int) -> list[Any]:
    """Make the callbacks that draw a method at the end of its training."""
    made = {
        "NNCLR": lambda: NeighborImages("encoder", count=6, k=10, folder=folder, every=epochs),
    }
    return [made[name]()] if name in made else []


def draw(name: str, phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw a method into a file, unless a callback has, and count what can be counted."""
    with torch.no_grad():
        return DRAWN[name](phase, learner, train, path) if name in DRAWN else {}


def lines(rows: list[Tensor], path: Path) -> None:
    """Save images (N, 1 or 3, 8, 8), numbers from 0 to 1, the first ones of each entry in a line."""
    coloured = [each[:SHOWN].expand(-1, 3, -1, -1) for each in rows]
    save_image(image_grid(torch.cat(coloured), SHOWN, (0, 1)), path, zoom=4)


def save(figure: Figure, path: Path) -> None:
    """Save a figure of matplotlib in few colours, as a small file."""
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


# Views


def draw_distribution(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw how embeddings are distributed along random directions."""
    z = learner.step.z[0]
    along = z @ normalize(torch.randn(z.shape[1], 200), dim=0)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes, places = figure.subplots(), torch.linspace(-4, 4, 41)
    for column in along.T[:12]:
        axes.stairs(torch.histogram(column, places, density=True).hist, places, color="tab:blue", alpha=0.35)
    axes.plot(places, (-places.square() / 2).exp() / (2 * torch.pi) ** 0.5, color="black", label="standard normal")
    axes.set(xlabel="embedding of a held-out digit, along 12 directions", yticks=[])
    axes.legend()
    save(figure, path)
    low, high = along.std(0).aminmax()
    tails = ((along - along.mean(0)) / along.std(0)).pow(4).mean()  # 3 of a normal distribution
    return {"least_std": low.item(), "most_std": high.item(), "fourth_moment": tails.item()}


def draw_neighbors(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Count of how many held-out digits the nearest past embedding is of their class."""
    step, models = learner.step, learner.model
    network = nn.Sequential(models.encoder, models.projector)
    images, labels = train
    bank = normalize(features_of(network, images), dim=1)
    queries = normalize(features_of(network, step.xs), dim=1)
    found = {"embeddings": queries @ bank.T, "pixels": -torch.cdist(step.xs.flatten(1), images.flatten(1))}
    return {
        f"same_class_{key}": (labels[each.argmax(1)] == step.ys).float().mean().item() for key, each in found.items()
    }


def draw_likeness(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw how like queries of one view are to the keys of the other."""
    step = learner.step
    likeness = normalize(step.q1, dim=1) @ normalize(step.k2, dim=1).T
    chosen = torch.cat([(step.ys == label).nonzero()[:5, 0] for label in range(10)])
    save_image(image_grid(likeness[chosen][:, chosen][None, None], 1, (-1, 1)), path, zoom=6)
    places = torch.arange(len(likeness))
    found, same = likeness.argmax(1), step.ys[:, None] == step.ys
    others = same & ~torch.eye(len(same), dtype=torch.bool)
    return {
        "own_key": (found == places).float().mean().item(),
        "key_of_class": (step.ys[found] == step.ys).float().mean().item(),
        "cosine_own": likeness.diagonal().mean().item(),
        "cosine_class": likeness[others].mean().item(),
        "cosine_rest": likeness[~same].mean().item(),
    }


def draw_prototypes(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw the held-out digits nearest to each of the prototypes that most training images are assigned to."""
    models, step = learner.model, learner.step
    network = models.teacher if "teacher" in learner.models else models
    network = nn.Sequential(network.encoder, network.projector)
    prototypes = normalize(models.prototypes.weight, dim=1)
    trained, held = (normalize(features_of(network, each), dim=1) @ prototypes.T for each in (train[0], step.xs))
    labels, count = train[1], len(prototypes)
    members = torch.zeros(count, 10).index_put_((trained.argmax(1), labels), torch.ones(len(labels)), accumulate=True)
    chosen = members.sum(1).argsort(descending=True)[:SHOWN]
    nearest = held[:, chosen].topk(6, dim=0).indices
    lines([step.xs[row] for row in nearest], path)
    classes = members.argmax(1)
    return {
        "prototypes_used": int((members.sum(1) > 0).sum()),
        "class_by_prototype": (classes[held.argmax(1)] == step.ys).float().mean().item(),
    }


# Patches


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Return images with hidden patches in grey."""
    return unpatchify(patchify(images, 2).masked_fill(mask[:, :, None], GREY), 2, 8, 8)


def coloured(codes: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return an image of the numbers of codes (N, L): a colour each, and grey where nothing is hidden."""
    hues = torch.stack([torch.arange(count) / count, torch.ones(count), torch.ones(count)], dim=1)
    colours = torch.as_tensor(hsv_to_rgb(hues.numpy()), dtype=torch.float32)[codes]
    shown = torch.where(mask[:, :, None], colours, torch.tensor(GREY))
    return interpolate(shown.mT.unflatten(2, (4, 4)), scale_factor=2.0, mode="nearest")


def draw_codes(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw what is hidden, to which prototypes the teacher assigns it, and which ones the student names."""
    step = learner.step
    mask, view = step.masks[0], step.views[0].clamp(0, 1)
    scores = step.patch_codes[0] if "patch_codes" in step else step.teacher_patches[0] - phase.patch_center
    said, guessed = scores.argmax(2), step.student_patches[0].argmax(2)
    count = scores.shape[2]
    some = (mask.sum(1) >= 4).nonzero()[:SHOWN, 0]
    codes = [coloured(each, mask, count)[some] for each in (said, guessed)]
    lines([view[some], hide(view, mask)[some], *codes], path)
    shares = said[mask].bincount(minlength=count) / mask.sum()
    return {
        "agreement": (said == guessed)[mask].float().mean().item(),
        "commonest_code": shares.max().item(),
        "codes_used": int((shares > 0).sum()),
    }


def nearest_patches(preds: Tensor, targets: Tensor, places: Tensor, images: Tensor) -> Tensor:
    """Return what pixels stand where the targets of training images are nearest to predictions, (N, K, 4).

    Args:
        preds: Shape (N, K, D).
        targets: Of all patches of the training images, (M, L, D).
        places: Which patches are predicted, (N, K).
        images: The training images.
    """
    patches, found = patchify(images, 2), preds.new_zeros(*places.shape, 4)
    for place in range(patches.shape[1]):
        here = places == place
        nearest = torch.cdist(preds[here], targets[:, place]).argmin(1)
        found[here] = patches[nearest, place]
    return found


def errors(preds: Tensor, asked: Tensor, targets: Tensor, places: Tensor, step: Any, images: Tensor) -> Figures:
    """Return squared errors per number, of embeddings and of the nearest patches' pixels, and what means would give."""
    real = patchify(step.xs, 2).gather(1, places[:, :, None].expand(-1, -1, 4))
    shown = {"predicted": preds, "known": asked}
    pixels = {key: nearest_patches(each, targets, places, images) for key, each in shown.items()}
    pixels["mean"] = patchify(images, 2).mean(0)[places]
    return {
        "embedding_error": (preds - asked).square().mean().item(),
        "embedding_error_mean": (targets.mean(0)[places] - asked).square().mean().item(),
        **{f"pixel_error_{key}": (each - real).square().mean().item() for key, each in pixels.items()},
    }


def draw_blocks(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw the context of I-JEPA, and by patches of training images what is predicted in its blocks."""
    step, models, images = learner.step, learner.model, train[0]
    everywhere = torch.arange(16).expand(len(images), -1)
    targets = layer_norm(models.teacher(patchify(images, 2), everywhere), (64,))
    blocks = len(step.preds) // len(step.xs)
    preds, asked = (torch.cat(list(each.chunk(blocks)), dim=1) for each in (step.preds, step.targets))
    places = step.wanted.flatten(1)
    context = torch.ones(len(step.xs), 16, dtype=torch.bool).scatter(1, step.places, False)
    index = places[:, :, None].expand(-1, -1, 4)
    found = nearest_patches(preds, targets, places, images)
    filled = patchify(hide(step.xs, context), 2).scatter(1, index, found)
    lines([step.xs, hide(step.xs, context), unpatchify(filled, 2, 8, 8)], path)
    return errors(preds, asked, targets, places, step, images)


def draw_hidden(phase: Any, learner: Any, train: Rows, path: Path) -> Figures:
    """Draw what data2vec hides, and by patches of training images what it predicts there."""
    step, images = learner.step, train[0]
    layers = [layer_norm(each, (64,)) for each in learner.model.teacher(images, None)[-phase.layers :]]
    targets = layer_norm(torch.stack(layers).mean(0), (64,))
    places = torch.arange(16).expand(len(step.xs), -1)
    found = nearest_patches(step.preds, targets, places, images)
    filled = torch.where(step.mask[:, :, None], found, patchify(step.xs, 2))
    lines([step.xs, hide(step.xs, step.mask), unpatchify(filled, 2, 8, 8)], path)
    rows, which = step.mask.nonzero(as_tuple=True)
    hidden = [each[rows, which][:, None] for each in (step.preds, step.targets)]
    shown = type(step)({"xs": step.xs[rows]})
    return errors(*hidden, targets, which[:, None], shown, images)


DRAWN: dict[str, Callable[[Any, Any, Rows, Path], Figures]] = {
    "LeJEPA": draw_distribution,
    "NNCLR": draw_neighbors,
    "MoCo v3": draw_likeness,
    "SwAV": draw_prototypes,
    "MSN": draw_prototypes,
    "iBOT": draw_codes,
    "DINOv2": draw_codes,
    "I-JEPA": draw_blocks,
    "data2vec": draw_hidden,
}


# Generators


def draw_way(phase: Any, model: nn.Module, noise: Tensor, steps: int, path: Path) -> None:
    """Draw what a model of noised images is given on the way from noise to images, and what comes out."""
    seen: list[Tensor] = []

    def watched(noised: Tensor, times: Tensor) -> Tensor:
        seen.append(noised)
        return model(noised, times)

    made = phase.sample(watched, noise, steps=steps)
    chosen = [seen[round(number * (len(seen) - 1) / 5)] for number in range(6)]
    lines([(each.clamp(-1, 1) + 1) / 2 for each in (*chosen, made)], path)


@torch.no_grad()
def draw_translations(generators: Any, test: Rows, judge: nn.Module, path: Path) -> Figures:
    """Draw held-out digits, the negatives that they become, and these turned back; then negatives, and digits of these.

    A negative is judged by the classifier of digits after it was inverted.
    """
    images, labels = 2 * test[0] - 1, test[1]
    negatives, digits = generators.ab(images), generators.ba(-images)
    back = generators.ba(negatives)
    lines([(each + 1) / 2 for each in (images, negatives, back, -images, digits)], path)
    judged = {"negatives": -negatives, "digits": digits, "untranslated": -images, "real": images}
    right = {key: features_of(judge, (each + 1) / 2).argmax(1) == labels for key, each in judged.items()}
    return {
        **{f"class_of_{key}": each.float().mean().item() for key, each in right.items()},
        "error_of_negatives": (negatives + images).abs().mean().item() / 2,
        "error_of_digits": (digits - images).abs().mean().item() / 2,
        "error_of_cycle": (back - images).abs().mean().item() / 2,
    }
