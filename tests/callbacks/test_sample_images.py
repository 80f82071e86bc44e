from __future__ import annotations

import copy
import io
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from fluxloop import (
    EMA,
    AutoencoderPhase,
    Callback,
    CallbackConflictError,
    CancelEpochException,
    CustomCallback,
    EpochBegin,
    GANPhase,
    KNNProbe,
    Learner,
    Metrics,
    MissingProducerError,
    ModelError,
    Recorder,
    SampleImages,
    TensorBatches,
    TrainingPhase,
    runstep,
    stream_seed,
)
from fluxloop.images import image_grid, save_image
from fluxloop.testing import assert_observer, assert_order, assert_same_bits, bits

SEED = 2
adam = partial(torch.optim.Adam, lr=0.01)


class GAN(TrainingPhase):
    """The phase that README.md shows."""

    def step(self, learner: Learner, batch: Any) -> None:
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = G(torch.randn(len(state.real), 16, device=state.real.device))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = softplus(-D(state.fake)).mean()


def models(channels: int = 1) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(16, 20), nn.BatchNorm1d(20), nn.Dropout(0.3), nn.Linear(20, channels * 12), nn.Tanh()
    )
    return {
        "G": nn.Sequential(generator, nn.Unflatten(1, (channels, 4, 3))),
        "D": nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels * 12, 1)),
    }


def reals(channels: int = 1) -> Tensor:
    return torch.rand(24, channels, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "samples"


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    return Learner(
        models() if model is None else model,
        callbacks=[Recorder(), *callbacks],
        seed=SEED,
        **{
            "data": (TensorBatches(reals(), batch_size=8, shuffle=True),),
            "optimizer": adam,
            "default_callbacks": False,
            **options,
        },
    )


def train(learner: Learner, epochs: int = 2) -> Learner:
    learner.fit(epochs, phases=[GAN()])
    return learner


def first_noise(rows: int = 8) -> Tensor:
    """Give what the first step's generator is given."""
    torch.manual_seed(stream_seed(SEED, "training/step", 0))
    return torch.randn(rows, 16)


def in_eval(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(*inputs)


class Seen(list[tuple[Any, ...]]):
    """Makes images by calling the module, and keeps what it was called with."""

    def __call__(self, module: nn.Module, *inputs: Any) -> Any:
        self.append(inputs)
        return module(*inputs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# What it saves


def test_in_the_gan_of_the_readme_it_saves_a_grid_after_each_epoch(folder: Path) -> None:
    samples = SampleImages("G")
    learner = train(learner_of(samples))
    assert names(folder) == ["G-0001.png", "G-0002.png"]
    expected = image_grid(in_eval(learner.model.G, first_noise()), 8)
    assert samples.grid is not None
    assert torch.equal(samples.grid, expected)
    assert learner.cbstate.images["G"] is samples.grid
    assert samples.grid.dtype is torch.uint8


def test_the_pixels_of_the_file_are_those_of_the_grid_enlarged(folder: Path) -> None:
    samples = SampleImages("G", count=4, columns=2)
    train(learner_of(samples), 1)
    assert samples.grid is not None
    found, grid = pixels(folder / "G-0001.png"), samples.grid[0].numpy()
    zoom = found.shape[0] // grid.shape[0]
    assert found.shape == (grid.shape[0] * zoom, grid.shape[1] * zoom)
    assert np.array_equal(found, grid.repeat(zoom, 0).repeat(zoom, 1))
    assert 350 < min(found.shape) < 750


def test_images_with_three_channels_are_saved_in_colour(folder: Path) -> None:
    samples = SampleImages("G")
    learner = learner_of(samples, model=models(3), data=(reals(3),))
    train(learner, 1)
    assert samples.grid is not None
    found = pixels(folder / "G-0001.png")
    assert found.shape[2] == 3
    zoom = found.shape[0] // samples.grid.shape[1]
    assert np.array_equal(found[::zoom, ::zoom], samples.grid.permute(1, 2, 0).numpy())


def test_the_input_is_the_first_that_the_generator_gets_and_stays(folder: Path) -> None:
    seen: list[Tensor] = []

    def make(module: nn.Module, noise: Tensor) -> Tensor:
        seen.append(noise.clone())
        assert not module.training
        assert not torch.is_grad_enabled()
        return module(noise)

    train(learner_of(SampleImages("G", make=make, count=5)), 3)
    assert len(seen) == 3
    assert all(torch.equal(noise, first_noise()[:5]) for noise in seen)


class TwoDraws(TrainingPhase):
    """Calls the generator twice in a step, and overwrites the noise afterwards."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, real=batch) as (_, state):
            for _ in range(2):
                noise = torch.randn(len(state.real), 16)
                with learner.optimizing("G") as g:
                    g.loss = softplus(-learner.model.D(learner.model.G(noise))).mean()
                noise.zero_()


def test_the_input_is_the_first_of_a_step_and_not_changed_by_what_the_training_does_to_its_own() -> None:
    seen = Seen()
    learner_of(SampleImages("G", make=seen)).fit(1, phases=[TwoDraws()])
    ((noise,),) = seen
    assert torch.equal(noise, first_noise())


@pytest.mark.parametrize("inputs", ["tensor", "tuple"])
def test_an_input_can_be_given(inputs: str) -> None:
    noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    samples = SampleImages("G", inputs=noise if inputs == "tensor" else (noise,), columns=3)
    learner = train(learner_of(samples), 1)
    assert torch.equal(samples.grid, image_grid(in_eval(learner.model.G, noise), 3))  # type: ignore[arg-type]  # made by now


def test_a_generator_of_several_inputs_gets_them_all() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(3, 16), nn.Linear(16, 12)

        def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
            return self.out(noise + self.table(labels)).view(-1, 1, 4, 3)

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(12, 3)

        def forward(self, xs: Tensor, labels: Tensor) -> Tensor:
            return self.out(xs.flatten(1)).gather(1, labels[:, None])

    seen = Seen()
    samples = SampleImages("G", count=3, make=seen)
    learner = learner_of(
        samples, model={"G": Conditional(), "D": Critic()}, data=((reals(), torch.arange(24) % 3),), optimizer=adam
    )
    learner.fit(1, phases=[GANPhase(noise=16, conditional=True)])
    ((noise, labels),) = seen
    assert (noise.shape, labels.shape) == ((3, 16), (3,))
    assert torch.equal(samples.grid, image_grid(in_eval(learner.model.G, noise, labels)))  # type: ignore[arg-type]  # made by now


def test_a_generator_called_with_keywords_is_sampled_too(folder: Path) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(16, 12)

        def forward(self, *, noise: Tensor) -> Tensor:
            return self.out(noise).view(-1, 1, 4, 3)

    class Phase(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, real=batch) as (_, state):
                learner.backward(mse_loss(learner.model(noise=torch.randn(len(state.real), 16)), state.real))
                learner.update()

    samples = SampleImages()
    learner = learner_of(samples, model=Keyword())
    learner.fit(1, phases=[Phase()])
    assert names(folder) == ["model-0001.png"]
    with torch.no_grad():
        expected = image_grid(learner.model(noise=first_noise()))
    assert torch.equal(samples.grid, expected)  # type: ignore[arg-type]  # made by now


class CriticAlone(TrainingPhase):
    """Trains the critic and calls no generator."""

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, real=batch) as (_, state):
            with learner.optimizing("D") as block:
                block.loss = softplus(-learner.model.D(state.real)).mean()


def test_a_model_that_is_never_called_says_to_give_an_input() -> None:
    with pytest.raises(ModelError, match=r"SampleImages\('G'.*inputs="):
        learner_of(SampleImages("G")).fit(1, phases=[CriticAlone()])


def test_the_generator_may_be_called_first_in_the_second_phase_of_a_cycle(folder: Path) -> None:
    learner_of(SampleImages("G")).fit(1, phases=[CriticAlone(), GAN()])
    assert names(folder) == ["G-GAN-0001.png"]  # whose epoch ends beside that of the first


def test_the_files_of_two_phases_of_a_cycle_do_not_take_each_others_place(folder: Path) -> None:
    class Later(GAN):
        name = "later half"

    learner = learner_of(SampleImages("G"))
    learner.fit(2, phases=[GAN(), Later()])
    assert names(folder) == ["G-GAN-0001.png", "G-GAN-0002.png", "G-later half-0001.png", "G-later half-0002.png"]
    learner.epoch(GAN())
    learner.epoch(Later())
    assert {"G-GAN-0003.png", "G-later half-0003.png"} < {*names(folder)}
    assert len(names(folder)) == 6


def test_an_epoch_that_is_cancelled_before_the_generator_is_called_has_no_images(folder: Path) -> None:
    def cancel(learner: Any) -> None:
        raise CancelEpochException

    learner = learner_of(SampleImages("G"), CustomCallback(cancel, EpochBegin, reads=()))
    learner.epoch(GAN())
    assert not folder.exists()


def test_it_saves_after_every_so_many_epochs(folder: Path) -> None:
    train(learner_of(SampleImages("G", every=2)), 5)
    assert names(folder) == ["G-0002.png", "G-0004.png"]


def test_the_files_of_a_second_stage_do_not_take_the_place_of_those_of_the_first(folder: Path) -> None:
    class Later(GAN):
        pass

    learner = train(learner_of(SampleImages("G")))
    learner.fit(2, phases=[Later()])
    assert names(folder) == [f"G-{epoch:04d}.png" for epoch in (1, 2, 3, 4)]


@pytest.mark.parametrize("option", ["every", "count", "columns"])
@pytest.mark.parametrize("number", [0, -1])
def test_no_epochs_images_or_columns_are_refused(option: str, number: int) -> None:
    with pytest.raises(
        ValueError, match=rf"SampleImages\({option}={number}\) was given; expected a whole number, 1 or more"
    ):
        SampleImages("G", **{option: number})


def test_it_saves_into_a_folder_of_ones_own_or_nowhere(tmp_path: Path, folder: Path) -> None:
    train(learner_of(SampleImages("G", folder=tmp_path / "a" / "b")), 1)
    assert names(tmp_path / "a" / "b") == ["G-0001.png"]
    silent = SampleImages("G", folder=None)
    train(learner_of(silent), 1)
    assert silent.grid is not None
    assert not folder.exists()


def test_the_reconstructions_of_an_autoencoders_decoder_can_be_watched(folder: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
            self.decoder = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 4, 3)))

    seen = Seen()
    learner = learner_of(SampleImages("decoder", count=6, make=seen), model=Autoencoder())
    learner.fit(1, phases=[AutoencoderPhase()])
    assert names(folder) == ["decoder-0001.png"]
    assert [tuple(code.shape) for (code,) in seen] == [(6, 2)]


# Which weights


def test_the_files_say_which_weights_they_saw(folder: Path) -> None:
    live, average = SampleImages("G"), SampleImages("G@ema")
    learner = learner_of(EMA("G", 0.5), live, average)
    assert_order(learner, EMA, "SampleImages-2")
    train(learner)
    assert names(folder) == ["G-0001.png", "G-0002.png", "G@ema-0001.png", "G@ema-0002.png"]
    for name, samples in (("G", live), ("G@ema", average)):
        expected = image_grid(in_eval(learner.weights[name], first_noise()))
        assert torch.equal(samples.grid, expected)  # type: ignore[arg-type]  # made by now
        assert torch.equal(learner.cbstate.images[name], expected)
    assert not torch.equal(live.grid, average.grid)  # type: ignore[arg-type]  # made by now


def test_unknown_weights_are_an_error_when_the_learner_is_built() -> None:
    with pytest.raises(ModelError, match="no weights 'g'"):
        learner_of(SampleImages("g"))
    with pytest.raises(MissingProducerError, match=r"reads 'model\.G@ema'.*EMA\('G', 0\.999\)"):
        learner_of(SampleImages("G@ema"))


def test_two_of_the_same_weights_would_overwrite_each_others_files_and_need_a_name(folder: Path) -> None:
    with pytest.raises(CallbackConflictError, match=r"both write 'G' images; .*SampleImages\('G', name='second'\)"):
        learner_of(SampleImages("G"), SampleImages("G", count=4))
    learner = train(learner_of(SampleImages("G"), SampleImages("G", count=4, name="few")), 1)
    assert names(folder) == ["G-0001.png", "G-few-0001.png"]
    assert sorted(learner.cbstate.images) == ["G", "G-few"]


# Watching changes nothing


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("model", ["G", "G@ema"])
def test_training_is_the_same_to_the_bit_with_and_without_it(model: str) -> None:
    emas = [EMA("G", 0.9)] if "@" in model else []
    plain = train(learner_of(*map(copy.copy, emas)), 3)
    watched = train(learner_of(*emas, SampleImages(model), SampleImages("D", shape=(1, 1, 1))), 3)
    assert_same_bits(plain, watched)
    assert [m.training for m in plain.model.G.modules()] == [m.training for m in watched.model.G.modules()]


def test_a_supervised_training_is_observed_without_a_trace() -> None:
    def make() -> Learner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 6))
        xs = torch.randn(16, 3)
        learner = learner_of(Metrics(), model=model, data=(TensorBatches(xs, xs.repeat(1, 2), batch_size=4),))
        learner.loss_fn = mse_loss
        return learner

    assert_observer(SampleImages(shape=(1, 2, 3)), make)


def test_a_generator_that_draws_in_eval_mode_has_numbers_of_its_own() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(16, 12)

        def forward(self, noise: Tensor) -> Tensor:
            return (self.out(noise) + torch.randn(len(noise), 12) + np.random.rand()).float().view(-1, 1, 4, 3)

    def make() -> dict[str, nn.Module]:
        torch.manual_seed(0)
        return {"G": Draws(), "D": models()["D"]}

    plain = train(learner_of(model=make()), 2)
    samples = SampleImages("G")
    watched = train(learner_of(samples, model=make()), 2)
    again = SampleImages("G")
    train(learner_of(again, model=make()), 2)
    assert_same_bits(plain, watched)
    assert torch.equal(samples.grid, again.grid)  # type: ignore[arg-type]  # made by now


def test_modes_and_random_numbers_are_put_back_after_an_error() -> None:
    def broken(module: nn.Module, noise: Tensor) -> Tensor:
        torch.rand(5)
        raise RuntimeError("no image")

    learner = learner_of(SampleImages("G", make=broken))
    learner.model.G[0][2].eval()
    modes = [module.training for module in learner.model.G.modules()]
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no image"):
        train(learner, 1)
    assert [module.training for module in learner.model.G.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not learner.model.G._forward_pre_hooks


def test_it_leaves_no_hook_on_the_generator() -> None:
    hooks: list[int] = []

    class Look(GAN):
        def step(self, learner: Learner, batch: Any) -> None:
            super().step(learner, batch)
            hooks.append(len(learner.model.G._forward_pre_hooks))

    learner_of(SampleImages("G")).fit(1, phases=[Look()])
    assert hooks == [0, 0, 0]


# Images, and what is none


def test_rows_of_numbers_are_refused_with_the_shape_to_give() -> None:
    rows = {"G": nn.Linear(16, 12), "D": nn.Linear(12, 1)}
    data = {"data": (reals().flatten(1),)}
    with pytest.raises(ModelError, match=r"SampleImages\('G'\) got a Tensor of shape \(24, 12\).*shape=\(1, H, W\)"):
        train(learner_of(SampleImages("G"), model=rows, **data), 1)
    seen = Seen()
    samples = SampleImages("G", shape=(1, 4, 3), make=seen)
    learner = train(learner_of(samples, model=rows, **data), 1)
    expected = in_eval(learner.model.G, *seen[0]).view(-1, 1, 4, 3)
    assert torch.equal(samples.grid, image_grid(expected))  # type: ignore[arg-type]  # made by now


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda noise: noise.view(-1, 2, 8, 1), r"a Tensor of shape \(8, 2, 8, 1\)"),
        (lambda noise: [noise], "a list of length 1"),
        (lambda noise: {"images": noise}, "a dict of length 1"),
        (lambda noise: noise.mean(), r"a Tensor of shape \(\)"),
    ],
)
def test_what_is_no_image_is_named(made: Callable[[Tensor], Any], words: str) -> None:
    samples = SampleImages("G", make=lambda module, noise: made(noise))
    with pytest.raises(ModelError, match=f"{words} from the model; expected images"):
        train(learner_of(samples, data=([reals()[:8]],)), 1)


def test_images_without_a_channel_have_one() -> None:
    samples = SampleImages("G", make=lambda module, noise: module(noise)[:, 0])
    learner = train(learner_of(samples), 1)
    assert torch.equal(samples.grid, image_grid(in_eval(learner.model.G, first_noise())))  # type: ignore[arg-type]  # made by now


def test_a_numbers_range_can_be_said() -> None:
    samples = SampleImages("G", value_range=(-2.0, 2.0))
    learner = train(learner_of(samples), 1)
    images = in_eval(learner.model.G, first_noise())
    assert torch.equal(samples.grid, image_grid(images, value_range=(-2.0, 2.0)))  # type: ignore[arg-type]  # made by now
    assert not torch.equal(samples.grid, image_grid(images))  # type: ignore[arg-type]  # made by now


def grid_by_hand(images: np.ndarray, columns: int, low: float, high: float) -> np.ndarray:
    """Place images pixel by pixel."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = np.full((channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 51)  # a fifth of 255
    for place in range(count):
        for channel in range(channels):
            for y in range(height):
                for x in range(width):
                    share = min(max((images[place, channel, y, x] - low) / (high - low), 0), 1)
                    row, column = place // columns, place % columns
                    grid[channel, 1 + row * (height + 1) + y, 1 + column * (width + 1) + x] = round(share * 255)
    return grid


@pytest.mark.parametrize(("count", "columns"), [(1, 8), (5, 2), (6, 3), (7, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_its_place(count: int, columns: int, channels: int) -> None:
    images = torch.rand(count, channels, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    images = (images * 255).round() / 255
    found = image_grid(images, columns)
    assert np.array_equal(found.numpy(), grid_by_hand(images.double().numpy(), min(columns, count), 0.0, 1.0))


def test_the_range_of_a_grid_is_from_minus_one_where_there_are_negative_values() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 7.0]).view(4, 1, 1, 1)
    assert image_grid(images, 4)[0, 1, 1::2].tolist() == [0, 128, 255, 255]
    assert image_grid(images.clamp(min=0), 4)[0, 1, 1::2].tolist() == [0, 0, 255, 255]
    assert image_grid(images, 4, (-7.0, 7.0))[0, 1, 1::2].tolist() == [109, 128, 146, 255]


def test_a_grid_without_lines_is_the_images_side_by_side() -> None:
    images = torch.rand(2, 1, 2, 2)
    grid = image_grid(images, 2, padding=0)
    assert grid.shape == (1, 2, 4)
    assert torch.equal(grid[0, :, :2], (images[0, 0] * 255).round().to(torch.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("zoom", [1, 3])
def test_a_saved_grid_can_be_read_back(tmp_path: Path, channels: int, zoom: int) -> None:
    grid = (255 * torch.rand(channels, 4, 5)).to(torch.uint8)
    path = tmp_path / "new" / "grid.png"
    save_image(grid, path, zoom=zoom)
    found = pixels(path)
    expected = grid.permute(1, 2, 0).numpy()
    expected = (expected if channels == 3 else expected[:, :, 0]).repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(found, expected)


# Without Pillow


def test_without_pillow_it_says_what_to_install_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'torch-fluxloop\[images\]'"):
        learner_of(SampleImages("G"))
    with pytest.raises(ImportError, match="needs Pillow"):
        save_image(torch.zeros(1, 2, 2, dtype=torch.uint8), Path("x.png"))
    learner = train(learner_of(SampleImages("G", folder=None)), 1)
    assert learner.cbstate.images["G"].shape[0] == 1


def test_the_extra_that_the_message_names_is_one_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert re.search(r"^images = \[.*pillow", extras, re.MULTILINE | re.IGNORECASE)


# State


def test_the_input_goes_on_from_its_state() -> None:
    whole = SampleImages("G")
    train(learner_of(whole), 2)
    first = SampleImages("G")
    learner = train(learner_of(first), 1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SampleImages("G")
    learner.replace_callback(second)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(learner, 1)
    assert torch.equal(second.grid, whole.grid)  # type: ignore[arg-type]  # made by now


def test_beside_the_default_callbacks_and_a_probe_it_watches_a_gan(capsys: pytest.CaptureFixture[str]) -> None:
    xs, ys = reals(), torch.arange(24) % 2
    learner = learner_of(
        EMA("G"),
        SampleImages("G@ema"),
        KNNProbe("D.0", bank=(xs, ys), queries=(xs, ys), k=1),
        default_callbacks=True,
    )
    before = bits(learner)
    train(learner, 1)
    assert learner.history["validation/knn_d.0"] == [1.0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in bits(learner).items())
