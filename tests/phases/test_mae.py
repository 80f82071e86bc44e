from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fluxloop import (
    BatchError,
    Event,
    Learner,
    MAEPhase,
    ObjectiveValidationPhase,
    Phase,
    PhaseError,
    TensorBatches,
    UnsafeCallback,
    on,
    stream_seed,
)
from fluxloop.augment import patchify, unpatchify
from fluxloop.testing import EventRecorder, assert_same_bits, bits

SEED, BATCH, STEPS = 3, 4, 5
CHANNELS, HEIGHT, WIDTH, PATCH, TOKEN = 2, 4, 8, 2, 5
PATCHES, PIXELS = (HEIGHT // PATCH) * (WIDTH // PATCH), CHANNELS * PATCH * PATCH
ADAM = partial(torch.optim.Adam, lr=0.01, fused=False)

small = st.integers(1, 3)


class Encoder(nn.Module):
    """Embeds kept patches and their places; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Linear(PIXELS, TOKEN)
        self.place = nn.Embedding(PATCHES, TOKEN)
        self.dropout = nn.Dropout(0.2)
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        self.given.append((patches, places))
        return self.dropout(torch.tanh(self.pixels(patches) + self.place(places)))


class Decoder(nn.Module):
    """Puts the tokens in their places, a learned one into the others, and mixes all of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(0.1 * torch.randn(TOKEN))
        self.mix = nn.Linear(PATCHES, PATCHES)
        self.pixels = nn.Linear(TOKEN, PIXELS)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        grid = self.hidden.expand(len(tokens), PATCHES, TOKEN)
        grid = grid.scatter(1, places[:, :, None].expand(-1, -1, TOKEN), tokens)
        return self.pixels(torch.tanh(self.mix(grid.transpose(1, 2)).transpose(1, 2)))


def nets() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"encoder": Encoder(), "decoder": Decoder()}


def images(rows: int = STEPS * BATCH) -> Tensor:
    return torch.randn(rows, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def batches() -> TensorBatches:
    return TensorBatches(images(), batch_size=BATCH)


def learner_of(*callbacks: Any, model: Any = None, data: Any = None) -> Learner:
    return Learner(
        nets() if model is None else model,
        data=(data or batches(), batches()),
        optimizer=ADAM,
        callbacks=callbacks,
        default_callbacks=False,
        seed=SEED,
    )


def patches_by_loop(xs: Tensor, size: int) -> Tensor:
    """Cut images into patches one by one, row by row."""
    height, width = xs.shape[2] // size, xs.shape[3] // size
    return torch.stack(
        [
            torch.stack(
                [
                    image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].reshape(-1)
                    for row in range(height)
                    for column in range(width)
                ]
            )
            for image in xs
        ]
    )


# Patches


@given(n=small, channels=small, rows=small, columns=small, size=small)
@settings(deadline=None, max_examples=30)
def test_unpatchify_is_the_inverse_of_patchify(n: int, channels: int, rows: int, columns: int, size: int) -> None:
    xs = torch.arange(n * channels * rows * columns * size * size).reshape(n, channels, rows * size, columns * size)
    patches = patchify(xs, size)
    assert patches.shape == (n, rows * columns, channels * size * size)
    assert torch.equal(unpatchify(patches, size, rows * size, columns * size), xs)
    assert torch.equal(patchify(unpatchify(patches, size, rows * size, columns * size), size), patches)


@given(n=small, channels=small, rows=small, columns=small, size=small)
@settings(deadline=None, max_examples=30)
def test_patches_are_those_of_a_loop_over_rows_and_columns(
    n: int, channels: int, rows: int, columns: int, size: int
) -> None:
    xs = torch.randn(n, channels, rows * size, columns * size)
    assert torch.equal(patchify(xs, size), patches_by_loop(xs, size))


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 1, 5, 4), 2), ((2, 1, 4, 5), 2), ((2, 4, 4), 2), ((2, 16), 4), ((2, 1, 4, 4), 8)]
)
def test_what_cannot_be_cut_into_patches_is_an_error_that_says_what_can(shape: tuple[int, ...], size: int) -> None:
    words = rf"patches of {size} x {size} were asked for from a Tensor of shape \({', '.join(map(str, shape))}\)"
    with pytest.raises(BatchError, match=words) as raised:
        patchify(torch.zeros(shape), size)
    assert f"H and W multiples of {size}" in str(raised.value)


# The loop by hand


def train_by_hand(ratio: float, normalize: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """Train both networks in plain PyTorch."""
    both = nets()
    optimizers = [ADAM(net.parameters()) for net in both.values()]
    losses = []
    for step, xs in enumerate(batches()):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        patches = patches_by_loop(xs, PATCH)
        kept = round(PATCHES * (1 - ratio))
        places = torch.rand(len(xs), PATCHES).argsort(1)[:, :kept]
        visible = torch.stack([patches[row, places[row]] for row in range(len(xs))])
        hidden = torch.ones(len(xs), PATCHES, dtype=torch.bool)
        for row in range(len(xs)):
            hidden[row, places[row]] = False
        preds = both["decoder"](both["encoder"](visible, places), places)
        if normalize:
            centred = patches - patches.mean(-1, keepdim=True)
            patches = centred / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        errors = ((preds - patches) ** 2).mean(-1)
        loss = (errors * hidden).sum() / hidden.sum()
        assert torch.allclose(loss, errors[hidden].mean())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return both, losses


class Steps(UnsafeCallback):
    """Note the events, the entries at each, and the loss of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, set[str]]] = []
        self.losses: list[Tensor] = []

    @on(Event, MAEPhase)
    def note(self, event: Event, phase: Phase, learner: Learner) -> None:
        self.seen.append((type(event).__name__, set(vars(learner.step))))
        if type(event).__name__ == "StepEnd":
            self.losses.append(learner.step.loss.detach())


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("normalize", [False, True], ids=["pixels", "normalized pixels"])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_losses_and_weights_equal_those_of_a_hand_written_loop(ratio: float, normalize: bool) -> None:
    log = Steps()
    learner = learner_of(log)
    learner.fit(1, phases=[MAEPhase(PATCH, mask_ratio=ratio, normalize=normalize)])
    expected, losses = train_by_hand(ratio, normalize)
    assert log.losses == losses
    for name, net in expected.items():
        found, wanted, initial = (m.state_dict() for m in (learner.models[name], net, nets()[name]))
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
        assert [key for key in initial if torch.equal(found[key], initial[key])] == []


def test_the_events_and_the_entries_are_those_of_the_documentation() -> None:
    log = Steps()
    learner_of(log, data=[(images(BATCH), torch.zeros(BATCH))]).epoch(MAEPhase(PATCH))
    given = {"xs", "ys"}
    coded = given | {"patches", "places", "mask", "features", "preds"}
    lost = coded | {"loss"}
    done = lost | {"grads"}
    updates = [("UpdateBegin", done), ("UpdateEnd", done)] * 2
    assert log.seen[1:-1] == [
        ("StepBegin", given),
        ("LossBegin", coded),
        ("BackwardBegin", lost),
        ("BackwardEnd", done),
        *updates,
        ("StepEnd", done),
    ]


# What is hidden


def one_step(phase: MAEPhase, model: Any = None) -> Learner:
    learner = learner_of(model=model)
    learner.epoch(ObjectiveValidationPhase(phase), [images(BATCH)])
    return learner


def test_the_entries_have_the_shapes_of_the_documentation() -> None:
    learner = one_step(MAEPhase(PATCH))
    step, kept = learner.step, PATCHES // 4
    assert torch.equal(step.patches, patches_by_loop(images(BATCH), PATCH))
    assert step.places.shape == (BATCH, kept)
    assert step.mask.shape == (BATCH, PATCHES)
    assert step.mask.dtype == torch.bool
    assert step.features.shape == (BATCH, TOKEN)
    assert step.preds.shape == (BATCH, PATCHES, PIXELS)
    assert step.loss.shape == ()
    tokens = learner.model.encoder.eval()(*learner.model.encoder.given[-1])
    assert torch.equal(step.features, tokens.mean(1))


def test_the_encoder_sees_the_kept_patches_at_their_places_and_the_mask_is_all_others() -> None:
    learner = one_step(MAEPhase(PATCH, mask_ratio=0.5))
    step = learner.step
    ((visible, places),) = learner.model.encoder.given
    assert torch.equal(places, step.places)
    for row in range(BATCH):
        kept = places[row].tolist()
        assert len(set(kept)) == PATCHES // 2
        assert torch.equal(visible[row], step.patches[row, kept])
        assert (~step.mask[row]).nonzero().flatten().tolist() == sorted(kept)
    assert len({tuple(sorted(row)) for row in places.tolist()}) > 1  # each image has its own


def test_every_patch_is_hidden_sometimes_and_seen_sometimes() -> None:
    learner = learner_of(data=TensorBatches(images(64), batch_size=64))
    learner.epoch(MAEPhase(PATCH, mask_ratio=0.5))
    often = learner.step.mask.float().mean(0)
    assert often.min() > 0.25
    assert often.max() < 0.75


def square(patches: int) -> Tensor:
    """Make images of so many patches of one pixel, in a row."""
    return torch.randn(2, 1, 1, patches)


class Anything(nn.Module):
    """Stands for a network: gives zeros of a shape that fits."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.weight * torch.zeros(len(tokens), self.patches, 1)


def hidden(patches: int, ratio: float) -> list[int]:
    learner = learner_of(model={"encoder": Anything(1), "decoder": Anything(patches)})
    learner.epoch(ObjectiveValidationPhase(MAEPhase(1, mask_ratio=ratio)), [square(patches)])
    return learner.step.mask.sum(1).tolist()


@pytest.mark.slow
@given(patches=st.integers(2, 40), ratio=st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=30)
def test_the_hidden_share_is_the_mask_ratio_to_less_than_one_patch(patches: int, ratio: float) -> None:
    first, second = hidden(patches, ratio)
    assert first == second
    assert 0 < first < patches
    assert abs(first - ratio * patches) < 1 or first in (1, patches - 1)


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"), [(16, 0.75, 12), (16, 0.5, 8), (10, 0.9, 9), (20, 0.8, 16), (100, 0.9, 90)]
)
def test_the_hidden_share_is_exact_where_it_can_be(patches: int, ratio: float, expected: int) -> None:
    assert hidden(patches, ratio) == [expected] * 2


def test_hidden_patches_alone_count() -> None:
    class Wrong(Decoder):
        """Is right about hidden patches, and anywhere else at the places it has seen."""

        def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
            preds = patches_by_loop(images(BATCH), PATCH) + 0 * self.hidden.sum()
            return preds.scatter_add(1, places[:, :, None].expand(-1, -1, PIXELS), torch.full_like(preds, 1e6))

    assert one_step(MAEPhase(PATCH), {"encoder": Encoder(), "decoder": Wrong()}).step.loss == 0


def test_predictions_at_places_that_were_seen_get_no_gradient() -> None:
    gradients: list[Tensor] = []
    learner = learner_of(data=[images(BATCH)])
    learner.model.decoder.register_forward_hook(
        lambda module, inputs, output: output.register_hook(gradients.append) and None
    )
    learner.epoch(MAEPhase(PATCH))
    mask = learner.step.mask
    assert gradients[0][~mask].abs().max() == 0
    assert gradients[0][mask].abs().min() > 0


def test_normalized_targets_have_no_mean_and_variance_one() -> None:
    class Zero(Decoder):
        def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
            return torch.zeros(len(tokens), PATCHES, PIXELS) + 0 * self.hidden.sum()

    xs = 5 + 3 * images(BATCH)
    learner = learner_of(model={"encoder": Encoder(), "decoder": Zero()})
    learner.epoch(ObjectiveValidationPhase(MAEPhase(PATCH, normalize=True)), [xs])
    assert learner.step.loss.item() == pytest.approx((PIXELS - 1) / PIXELS, rel=1e-4)  # the variance is unbiased
    learner.epoch(ObjectiveValidationPhase(MAEPhase(PATCH)), [xs])
    assert learner.step.loss.item() > 20


# The validation twin


def test_the_twin_gives_the_loss_of_held_out_images_without_updates() -> None:
    recorder = EventRecorder()
    learner = learner_of(recorder)
    before = bits(learner)
    learner.epoch(ObjectiveValidationPhase(MAEPhase(PATCH, mask_ratio=0.5)), [images(BATCH)])
    assert recorder.events == ["EpochBegin", "StepBegin", "LossBegin", "StepEnd", "EpochEnd"]
    torch.manual_seed(stream_seed(SEED, "validation/ObjectiveValidationPhase/step", 0))
    places = torch.rand(BATCH, PATCHES).argsort(1)[:, : PATCHES // 2]
    encoder, decoder = (net.eval() for net in nets().values())
    patches = patches_by_loop(images(BATCH), PATCH)
    with torch.no_grad():
        preds = decoder(encoder(torch.stack([patches[i, places[i]] for i in range(BATCH)]), places), places)
    step = learner.step
    assert torch.equal(step.preds, preds)
    assert torch.allclose(step.loss, ((preds - patches) ** 2).mean(-1)[step.mask].mean())
    assert not step.loss.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_the_twin_only_watches_and_is_evaluated() -> None:
    phase = MAEPhase(PATCH)
    plain, watched = learner_of(), learner_of()
    plain.fit(3, phases=[phase])
    watched.fit(3, phases=[phase, ObjectiveValidationPhase(phase)])
    assert_same_bits(plain, watched)
    found = watched.evaluate(phase=ObjectiveValidationPhase(phase))
    assert found.keys() == {"loss"}
    assert found == watched.evaluate(phase=ObjectiveValidationPhase(phase))


# What cannot be


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_a_mask_ratio_that_is_no_share_is_an_error(ratio: float) -> None:
    with pytest.raises(PhaseError, match=rf"mask_ratio={ratio}\) was given; expected a share between 0 and 1"):
        MAEPhase(PATCH, mask_ratio=ratio)


def test_patches_have_a_pixel_at_least() -> None:
    with pytest.raises(PhaseError, match=r"MAEPhase\(0\) was given; expected the size of a patch in pixels"):
        MAEPhase(0)


def test_missing_models_are_an_error_that_says_what_to_write() -> None:
    learner = learner_of(model={"encoder": nn.Linear(PIXELS, 4), "head": nn.Linear(4, PIXELS)})
    words = r"MAEPhase calls learner.model.decoder, and the models are \['encoder', 'head'\]"
    with pytest.raises(PhaseError, match=words):
        learner.fit(1, phases=[MAEPhase(PATCH)])


def test_a_batch_that_is_no_image_is_an_error() -> None:
    learner = learner_of(data=[torch.zeros(BATCH, CHANNELS * HEIGHT * WIDTH)])
    before = bits(learner)
    with pytest.raises(BatchError, match=r"from a Tensor of shape \(4, 64\); expected images of shape \(N, C, H, W\)"):
        learner.fit(1, phases=[MAEPhase(PATCH)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_an_image_of_one_patch_has_nothing_to_hide_and_is_an_error_rather_than_a_loss_of_nan() -> None:
    learner = learner_of(model={"encoder": Anything(1), "decoder": Anything(1)}, data=[square(1)])
    with pytest.raises(BatchError, match=r"MAEPhase\(1\) makes one patch of .* nothing can be hidden"):
        learner.fit(1, phases=[MAEPhase(1)])


def test_channels_can_lie_beside_each_other_as_in_other_code() -> None:
    xs = torch.rand(2, 3, 8, 12)
    patches = patchify(xs, 4, channels_last=True)
    n, c, h, w = xs.shape
    elsewhere = torch.einsum("nchpwq->nhwpqc", xs.reshape(n, c, h // 4, 4, w // 4, 4)).reshape(n, 6, 16 * 3)
    assert torch.equal(patches, elsewhere)
    assert torch.equal(unpatchify(patches, 4, 8, 12, channels_last=True), xs)
    assert not torch.equal(patches, patchify(xs, 4))
