from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    AutoencoderPhase,
    GANPhase,
    Learner,
    MAEPhase,
    ModelError,
    ObjectivePhase,
    ReconstructionImages,
    Recorder,
    TrainingPhase,
    VAEPhase,
    stream_seed,
)
from fluxloop.phases.mae import patchify, unpatchify


def images(rows: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def coder(codes: int = 3) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, codes), nn.Dropout(0.5))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    return {"encoder": encoder, "decoder": decoder}


def learner_of(models: Any, *callbacks: Any, **options: Any) -> Learner:
    given = {"data": (images(), images(seed=1)), "callbacks": [Recorder(), *callbacks], "seed": 2, **options}
    return Learner(models, default_callbacks=False, **given)


def cell(callback: Any, line: int, place: int) -> Tensor:
    """Cut one image out of the picture, pixel by pixel, 0 … 1."""
    assert callback.grid is not None
    top, left = 44 + line * 70, 6 + place * 70
    found: Tensor = callback.grid[:, top : top + 64 : 16, left : left + 64 : 16].float() / 255
    return found


def assert_shows(callback: Any, *columns: Tensor) -> None:
    for place, expected in enumerate(columns):
        for line, image in enumerate(expected):
            torch.testing.assert_close(cell(callback, line, place), image.expand(3, -1, -1), atol=0.003, rtol=0)


def evaluated(learner: Learner) -> tuple[nn.Module, nn.Module]:
    encoder, decoder = learner.model
    return encoder.eval(), decoder.eval()


def test_an_autoencoders_own_output_is_shown_beside_its_input() -> None:
    callback = ReconstructionImages(count=3, folder=None)
    learner = learner_of(coder(), callback)
    learner.fit(2, phases=[AutoencoderPhase()])
    encoder, decoder = evaluated(learner)
    held_out = images(seed=1)[:3]
    with torch.no_grad():
        assert_shows(callback, held_out, decoder(encoder(held_out)))


def test_a_variational_autoencoders_code_is_drawn_alike_in_each_epoch() -> None:
    callback = ReconstructionImages(count=3, folder=None)
    learner = learner_of(coder(6), callback)
    learner.fit(2, phases=[VAEPhase()])
    encoder, decoder = evaluated(learner)
    held_out = images(seed=1)[:3]
    with torch.no_grad():
        mean, logvar = encoder(held_out).chunk(2, 1)
        torch.manual_seed(stream_seed(2, "ReconstructionImages/reconstructions_model"))
        assert_shows(callback, held_out, decoder(mean + (logvar / 2).exp() * torch.randn_like(mean)))


class Encoder(nn.Linear):
    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        return super().forward(patches)


class Decoder(nn.Linear):
    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        return super().forward(tokens.mean(1)).unflatten(1, (4, 4))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_masked_autoencoder_shows_what_is_seen_and_what_is_predicted_where_it_is_hidden(normalize: bool) -> None:
    torch.manual_seed(1)
    callback = ReconstructionImages(count=3, value_range=(-1.0, 2.0), folder=None)
    learner = learner_of({"encoder": Encoder(4, 5), "decoder": Decoder(5, 16)}, callback)
    learner.fit(2, phases=[MAEPhase(2, mask_ratio=0.5, normalize=normalize)])
    held_out = images(seed=1)[:3]
    torch.manual_seed(stream_seed(2, "ReconstructionImages/reconstructions_model"))
    places = torch.rand(3, 4).argsort(1)[:, :2]
    patches = patchify(held_out, 2)
    seen = torch.zeros(3, 4, 1, dtype=torch.bool).scatter(1, places[:, :, None], True)
    with torch.no_grad():
        preds = learner.model.decoder(
            learner.model.encoder(patches.gather(1, places[:, :, None].expand(-1, -1, 4)), places), places
        )
    if normalize:
        preds = preds * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    columns = [patches, torch.where(seen, patches, 0.5), torch.where(seen, patches, preds), preds]
    whole = [unpatchify(each, 2, 4, 4) for each in columns]
    assert_shows(callback, *(((each + 1) / 3).clamp(0, 1) for each in whole))


def test_the_same_patches_are_hidden_in_each_epoch() -> None:
    torch.manual_seed(1)
    callback = ReconstructionImages(count=3, folder=None)
    learner = learner_of({"encoder": Encoder(4, 5), "decoder": Decoder(5, 16)}, callback)
    shown = []
    for _ in range(2):
        learner.fit(1, phases=[MAEPhase(2)])
        shown.append([cell(callback, line, 1) for line in range(3)])
    assert all(map(torch.equal, *shown))


def test_one_model_without_a_phase_of_its_own_is_run_on_its_inputs() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)))
    callback = ReconstructionImages(count=3, value_range=(-2, 2), folder=None)
    xs = images()
    learner = learner_of(model, callback, loss_fn=mse_loss, data=((xs, xs), (xs, xs)))
    learner.fit(1, phases=[TrainingPhase()])
    with torch.no_grad():
        assert_shows(callback, xs[:3] / 4 + 0.5, (model(xs[:3]) / 4 + 0.5).clamp(0, 1))


class Denoising(ObjectivePhase):
    def forward(self, learner: Any, state: Any) -> None:
        state.noisy = state.xs + 0.3
        state.clean = learner.model.decoder(learner.model.encoder(state.noisy))

    def loss(self, learner: Any, state: Any) -> Tensor:
        return mse_loss(state.clean, state.xs)


def test_what_is_shown_of_a_phase_of_ones_own_is_said() -> None:
    callback = ReconstructionImages(
        images=lambda phase, state: {"noisy": state.noisy, "clean": state.clean, "image": state.xs},
        show=lambda shown: shown / 2,
        count=2,
        folder=None,
    )
    learner = learner_of(coder(), callback)
    learner.fit(1, phases=[Denoising()])
    encoder, decoder = evaluated(learner)
    noisy = images(seed=1)[:2] + 0.3
    with torch.no_grad():
        assert_shows(callback, noisy / 2, decoder(encoder(noisy)) / 2, (noisy - 0.3) / 2)


def test_a_reconstruction_is_shown_in_the_range_of_its_image() -> None:
    callback = ReconstructionImages(
        images=lambda phase, state: {"image": 2 * state.xs - 1, "clean": state.clean}, count=2, folder=None
    )
    learner = learner_of(coder(), callback)
    learner.fit(1, phases=[Denoising()])
    encoder, decoder = evaluated(learner)
    held_out = images(seed=1)[:2]
    with torch.no_grad():
        assert_shows(callback, held_out, decoder(encoder(held_out + 0.3)) / 2 + 0.5)


def test_a_phase_of_which_nothing_can_be_shown_is_told_before_the_first_step() -> None:
    said = ReconstructionImages(images=lambda phase, state: [state.xs], folder=None)
    gan = {"G": nn.Linear(2, 16), "D": nn.Linear(16, 1)}
    cases = [
        (
            coder(),
            ReconstructionImages(),
            Denoising(),
            r"knows no images of Denoising, whose forward stored xs, noisy",
        ),
        (coder(), said, Denoising(), r"images=\.\.\.\) gave a list of length 1; expected images by heading"),
        (
            gan,
            ReconstructionImages(),
            GANPhase(noise=2),
            r"forward of the training phase, and GANPhase\(.*\) has none; write",
        ),
    ]
    for models, callback, phase, words in cases:
        learner = learner_of(models, callback)
        with pytest.raises(ModelError, match=words):
            learner.fit(1, phases=[phase])
        assert learner.updates.count == 0
