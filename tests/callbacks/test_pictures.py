"""What all callbacks have in common that draw a picture of held-out rows after each epoch."""

from __future__ import annotations

import copy
import random
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
from torch.nn.functional import cross_entropy

import fluxloop.compile.graphs
from fluxloop import (
    EMA,
    Accelerator,
    AttentionMaps,
    Callback,
    CallbackConflictError,
    DataError,
    EmbeddingMap,
    Learner,
    LogImages,
    Metrics,
    ModelError,
    NeighborImages,
    ReconstructionImages,
    Recorder,
    SampleImages,
    TensorBatches,
    TrainingPhase,
)
from fluxloop.logging import Memory
from fluxloop.testing import assert_observer, assert_resumes_exactly, assert_same_bits
from processes.launching import run

SIZE = 8


class Net(nn.Module):
    """A transformer with dropout, batch norm and a count in a buffer, that gives an image of its input's shape."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 16 * channels)

    def forward(self, xs: Tensor) -> Tensor:
        tokens = self.block(self.norm(self.embed(xs)).flatten(2).transpose(1, 2))
        return nn.functional.pixel_shuffle(self.out(tokens).transpose(1, 2).unflatten(2, (2, 2)), 4)


def images(seed: int = 0, rows: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(rows, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)), torch.arange(rows) % 3


def loss_fn(preds: Tensor, ys: Tensor) -> Tensor:
    return cross_entropy(preds.flatten(1)[:, :3], ys)


def learner_of(*callbacks: Callback, data: Any = None, channels: int = 1, **options: Any) -> Learner:
    torch.manual_seed(1)
    given = {"default_callbacks": False, "seed": 2, "optimizer": partial(torch.optim.Adam, lr=0.01, fused=False)}
    data = (TensorBatches(*images(), batch_size=4, shuffle=True), images(1)) if data is None else data
    return Learner(Net(channels), loss_fn, data=data, callbacks=[Recorder(), *callbacks], **{**given, **options})


MAKE: dict[str, Callable[..., Any]] = {
    "embedding": EmbeddingMap,
    "neighbors": partial(NeighborImages, count=3, k=2),
    "reconstructions": partial(ReconstructionImages, count=3),
    "attention": partial(AttentionMaps, count=3),
}

each = pytest.mark.parametrize("kind", MAKE)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@each
def test_the_picture_is_saved_shared_and_logged_after_each_epoch(kind: str) -> None:
    memory = Memory()
    callback = MAKE[kind]()
    learner = learner_of(callback, LogImages(memory))
    learner.fit(2)
    label = f"{kind}_model"
    assert [path.name for path in sorted(Path("pictures").iterdir())] == [f"{label}-0001.png", f"{label}-0002.png"]
    assert torch.equal(learner.cbstate.images[label], callback.grid)
    assert torch.equal(pixels(Path(f"pictures/{label}-0002.png")), callback.grid)
    assert not torch.equal(pixels(Path(f"pictures/{label}-0001.png")), callback.grid)
    assert [(record.step, record.group, record.name) for record in memory.records] == [
        (epoch, ("epoch", "images"), label) for epoch in (1, 2)
    ]


def left_by(learner: Learner) -> list[Any]:
    """What a fit leaves beside weights: gradients, modes, hooks, what is trained, and the global generators."""
    parts, weights = [*learner.model.modules()], [*learner.model.parameters()]
    return [
        [None if each.grad is None else each.grad.tolist() for each in weights],
        [each.requires_grad for each in weights],
        [part.training for part in parts],
        [(len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks)) for part in parts],
        [sorted(vars(part)) for part in parts],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]  # of the Mersenne twister
        random.getstate(),
    ]


@each
def test_watching_changes_nothing(kind: str) -> None:
    assert_observer(MAKE[kind](), learner_of)
    watched, plain = learner_of(Metrics(), MAKE[kind]()), learner_of(Metrics())
    left = []
    for learner in (watched, plain):
        learner.model.block.eval()
        learner.model.out.register_forward_hook(lambda *_: None)
        learner.model.embed.bias.requires_grad_(False)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        learner.fit(2)
        left.append(left_by(learner))
    assert left[0] == left[1]
    assert any(gradient is not None for gradient in left[0][0])
    assert_same_bits(watched, plain)  # weights, statistics of batch norm, optimizer
    assert list(watched.history["training/loss"]) == list(plain.history["training/loss"])


@each
def test_a_resumed_run_ends_the_same_and_draws_the_same_pictures(kind: str, tmp_path: Path) -> None:
    assert_resumes_exactly(lambda: learner_of(MAKE[kind]()), epochs=2)
    first, second = learner_of(MAKE[kind](folder="first")), learner_of(MAKE[kind](folder="second"))
    first.fit(1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.fit(1)
    second.fit(1)
    name = f"{kind}_model-0002.png"
    assert torch.equal(pixels(Path("first") / name), pixels(Path("second") / name))


@each
def test_pictures_are_no_part_of_a_checkpoint_but_the_shared_one(kind: str) -> None:
    learner = learner_of(MAKE[kind]())
    learner.fit(1)
    kept = learner.state_dict()["callbacks"]
    assert not [tensor for tensor in torch.utils._pytree.tree_leaves(kept) if isinstance(tensor, Tensor)]


@each
def test_a_copied_learner_draws_on(kind: str) -> None:
    learner = learner_of(MAKE[kind](folder=None))
    learner.fit(1)
    copied = copy.deepcopy(learner)
    copied.fit(1)
    learner.fit(1)
    label = f"{kind}_model"
    assert torch.equal(copied.cbstate.images[label], learner.cbstate.images[label])


@each
@pytest.mark.parametrize("compile", ["step", "model"])
def test_of_compiled_trainings_the_same_is_drawn(kind: str, compile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
    if compile == "model":
        monkeypatch.setattr(torch, "compile", lambda call, **options: partial(_hidden, call))
    compiled = learner_of(MAKE[kind](), accelerator=Accelerator("cpu", compile=compile))
    compiled.fit(1)
    plain = learner_of(MAKE[kind](), optimizer=partial(torch.optim.SGD, lr=0.0))  # with these weights, which stay
    plain.model.load_state_dict(compiled.model.state_dict())
    plain.model.norm.momentum = 0.0
    plain.fit(1)
    assert torch.equal(*(learner.cbstate.images[f"{kind}_model"] for learner in (compiled, plain)))


def _hidden(call: Any, *args: Any) -> Any:
    """Run a model as torch's compiler does: hidden from what looks at functions."""
    with torch._C.DisableTorchFunction():
        return call(*args)


@each
def test_averaged_weights_are_another_model(kind: str) -> None:
    if kind == "reconstructions":
        return  # it runs the phase, on the models that it trains
    callbacks = [MAKE[kind](), MAKE[kind]("model@ema"), EMA("model", 0.5)]
    learner = learner_of(*callbacks)
    learner.fit(1)
    live, average = (learner.cbstate.images[f"{kind}_{name}"] for name in ("model", "model@ema"))
    assert live.shape != average.shape or not torch.equal(live, average)


@each
def test_every_second_epoch_and_rows_of_its_own(kind: str) -> None:
    learner = learner_of(MAKE[kind](every=2, queries=images(5)), data=(images(),))
    learner.fit(4)
    assert sorted(path.name[-8:-4] for path in Path("pictures").iterdir()) == ["0002", "0004"]


@each
def test_what_is_missing_is_said_before_the_first_step(kind: str) -> None:
    learner = learner_of(MAKE[kind](), data=(images(),))
    with pytest.raises(DataError, match=r"on the validation data, and the learner has none; .*queries="):
        learner.fit(1)
    once = learner_of(MAKE[kind](), data=(images(), iter([images()])))
    with pytest.raises(DataError, match="can be iterated once only"):
        once.fit(1)
    if kind not in ("embedding",):
        rows = torch.rand(12, 5), torch.arange(12)
        with pytest.raises((ModelError, RuntimeError), match=r"expected images of shape|conv2d"):
            learner_of(MAKE[kind](queries=rows)).fit(1)
    for untrained in (learner, once):
        assert untrained.updates.count == 0


@each
def test_rows_and_models_are_tried_once_in_a_fit(kind: str) -> None:
    class Counted(type(MAKE[kind]())):  # type: ignore[misc]
        tries = 0

        def try_out(self, phase: Any, learner: Any) -> None:
            type(self).tries += 1
            super().try_out(phase, learner)

    learner = learner_of(Counted(folder=None))
    learner.fit(3)
    assert Counted.tries == 1
    learner.fit(1)
    assert Counted.tries == 2


@each
def test_two_training_phases_may_take_turns_on_the_same_data(kind: str) -> None:
    class Another(TrainingPhase):
        pass

    learner = learner_of(MAKE[kind]())
    learner.fit(1)
    learner.fit(2, phases=[TrainingPhase(), Another()])
    found = sorted(path.name.partition("_model-")[2] for path in Path("pictures").iterdir())
    assert found == ["0001.png", "0002.png", "0003.png", "Another-0002.png", "Another-0003.png"]
    assert learner.history[Another].epochs == 2


@each
def test_images_in_colour_and_fewer_rows_than_asked_for(kind: str) -> None:
    few = images(1, rows=2)[0].expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    callback = MAKE[kind]()
    colours = learner_of(callback, data=((few, torch.tensor([0, 1])), (few, torch.tensor([0, 1]))), channels=3)
    colours.fit(1)
    assert callback.grid is not None
    shape = callback.grid.shape
    assert shape[0] == 3
    if kind != "embedding":
        size = 64 if kind != "attention" else 96
        frame = 3 if kind == "neighbors" else 0
        assert shape[1] == 44 + 2 * (size + 2 * frame + 6)
        first = callback.grid[:, 44 + frame : 44 + frame + size, 6 + frame : 6 + frame + size]
        expected = (few[0] * 255).round().repeat_interleave(size // SIZE, 1).repeat_interleave(size // SIZE, 2)
        assert torch.equal(first.float(), expected)


@each
def test_a_quiet_learner_prints_nothing_of_it(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    learner_of(MAKE[kind](), quiet=True).fit(1)
    assert capfd.readouterr() == ("", "")
    assert len(list(Path("pictures").iterdir())) == 1


PROCESSES = """
import torch
from fluxloop import Accelerator, TensorBatches
from callbacks.test_pictures import MAKE, images, learner_of
from processes.launching import report

torch.set_num_threads(1)
found = {}
for kind in MAKE:
    for watched in (False, True):
        callback = MAKE[kind](folder=f"pictures-{kind}")
        learner = learner_of(*[callback] * watched, data=(TensorBatches(*images(), batch_size=2), images(1)))
        learner.fit(1)
        found[kind, watched] = [weight.detach().clone() for weight in learner.model.parameters()]
    found[kind] = callback.grid
report(rank=learner.accelerator.rank, **{str(key): value for key, value in found.items()})
"""


@pytest.mark.slow
def test_of_several_processes_the_first_one_alone_draws() -> None:
    first, second = run(PROCESSES, processes=2).reports
    for kind in MAKE:
        name = f"{kind}_model-0001.png"
        assert [path.name for path in Path(f"pictures-{kind}").iterdir()] == [name]
        assert torch.equal(pixels(Path(f"pictures-{kind}") / name), first[kind])
        assert second[kind] is None
        for report in (first, second):
            watched, plain = report[str((kind, True))], report[str((kind, False))]
            assert all(map(torch.equal, watched, plain))


@each
def test_two_of_a_name_are_told_apart(kind: str) -> None:
    class Another(type(MAKE[kind]())):  # type: ignore[misc]
        pass

    with pytest.raises(CallbackConflictError, match=rf"'{kind}_model' images; give one a name: .*name='second'"):
        learner_of(MAKE[kind](), Another())
    learner = learner_of(MAKE[kind](), MAKE[kind](name="second"), SampleImages(inputs=images()[0], folder=None))
    learner.fit(1)
    assert {f"{kind}_model", f"{kind}_model-second", "model"} == set(learner.cbstate.images)


@each
def test_without_pillow_it_says_so_when_the_learner_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install 'torch-fluxloop\\[images\\]'"):
        learner_of(MAKE[kind]())


@each
def test_bad_arguments_are_refused(kind: str) -> None:
    for name, bad in {"every": 0, "folder": "a\0b"}.items():
        with pytest.raises((ValueError, TypeError), match=name):
            MAKE[kind](**{name: bad})
    if kind != "embedding":
        with pytest.raises((ValueError, TypeError), match="count"):
            MAKE[kind](**{"count": 0})
        with pytest.raises(TypeError, match="show"):
            MAKE[kind](show=3)


@each
def test_rows_that_draw_are_the_same_in_each_epoch(kind: str) -> None:
    class Noisy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.rand(1, SIZE, SIZE), index % 3

    callback = MAKE[kind](queries=torch.utils.data.DataLoader(Noisy(), batch_size=3))
    learner = learner_of(callback, optimizer=partial(torch.optim.SGD, lr=0.0))
    learner.model.norm.momentum = 0.0  # its statistics stay
    learner.fit(1)
    first = callback.grid
    learner.fit(1)
    same = callback.grid == first
    assert bool(same[:, 30:].all())  # below the title, which tells the epoch
