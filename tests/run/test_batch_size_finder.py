from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fluxloop import (
    Accelerator,
    BatchError,
    DataError,
    Learner,
    LossError,
    PhaseError,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    find_batch_size,
    runstep,
)
from fluxloop.compute.memory import OutOfMemoryError
from fluxloop.testing import assert_same_bits, bits


class Room(nn.Module):
    """A model with memory for so many rows at a time; dropout and batch norm show whether it was run."""

    def __init__(self, rows: int = 10**6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.rows = rows
        self.seen: list[int] = []

    def forward(self, xs: Tensor) -> Tensor:
        self.seen.append(len(xs))
        if len(xs) > self.rows:
            raise OutOfMemoryError("CUDA out of memory.")
        out: Tensor = self.layers(xs)
        return out


def learner_of(rows: int = 10**6, *, data: Any = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = Room(rows)
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "accelerator": Accelerator("cpu"), **options}
    data = batches() if data is None else data
    return Learner(model, mse_loss, data=(data,), seed=3, default_callbacks=False, **options)


def batches(count: int = 300, batch_size: int = 20) -> TensorBatches:
    torch.manual_seed(1)
    return TensorBatches(torch.randn(count, 3), torch.randn(count, 1), batch_size=batch_size, shuffle=True)


def tried(learner: Learner) -> list[int]:
    return list(dict.fromkeys(learner.model.seen))


@pytest.mark.parametrize(
    ("rows", "found", "sizes"),
    [
        (100, 64, [16, 32, 64, 128]),  # from the power of two below the loader's 20
        (128, 128, [16, 32, 64, 128, 256]),
        (9, 8, [16, 8]),
        (10**6, 256, [16, 32, 64, 128, 256]),  # the data has 300
    ],
)
def test_the_batch_is_doubled_until_the_memory_does_not_suffice_or_halved_until_it_does(
    rows: int, found: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(rows)
    seen: list[int] = []
    monkeypatch.setattr(Room, "seen", property(lambda self: seen, lambda self, value: None), raising=False)
    assert find_batch_size(learner) == found
    assert list(dict.fromkeys(seen)) == sizes
    assert seen.count(16) == 2 or rows < 16


def test_where_nothing_fits_the_error_is_raised() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        find_batch_size(learner_of(0))
    assert "one row takes more memory than there is" in "".join(caught.value.__notes__)


def test_start_and_largest_bound_what_is_tried() -> None:
    assert find_batch_size(learner_of(), start=4, largest=70) == 64
    assert find_batch_size(learner_of(), start=5, largest=70) == 40
    assert find_batch_size(learner_of(), start=64, largest=16) == 16
    assert find_batch_size(learner_of(50), start=40) == 40


@pytest.mark.parametrize("rows", [100, 9])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"precision": "bf16"}, {"precision": "fp16"}], ids=str)
def test_the_learner_its_data_and_random_numbers_are_as_they_were(rows: int, options: dict[str, Any]) -> None:
    def trained(search: bool) -> tuple[Any, ...]:
        learner = learner_of(10**6, accelerator=Accelerator("cpu", **options))
        learner.fit(1)
        learner.model.rows = rows if search else 10**6
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if search:
            find_batch_size(learner)
            learner.model.rows = 10**6
        drawn = torch.rand(1).item(), np.random.rand(), random.random()
        grads = [parameter.grad for parameter in learner.model.parameters()]
        learner.fit(1)
        told = drawn, learner.model.seen, [grad is None for grad in grads], learner.updates.count
        return learner, told, learner.updates.scale_state()

    searched, plain = trained(True), trained(False)
    assert_same_bits(searched[0], plain[0])
    assert searched[1:] == plain[1:]


def test_gradients_that_wait_go_on_waiting() -> None:
    learner, phase = learner_of(100), TrainingPhase()
    xs, ys = next(iter(batches()))
    with runstep(learner, phase, xs=xs, ys=ys) as (_, state):
        learner.backward(mse_loss(learner.model(state.xs), state.ys))
    waiting = [parameter.grad for parameter in learner.model.parameters()]
    find_batch_size(learner)
    assert all(now.grad is then for now, then in zip(learner.model.parameters(), waiting, strict=True))
    with runstep(learner, phase, xs=xs, ys=ys):
        learner.update()
    assert learner.updates.count == 1


def test_updates_of_several_batches_are_tried_to_the_point_where_gradients_wait_beside_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = learner_of(accelerator=Accelerator("cpu", accumulate=3))
    seen: list[int] = []
    monkeypatch.setattr(Room, "seen", property(lambda self: seen, lambda self, value: None), raising=False)
    find_batch_size(learner, start=8, largest=8)
    assert seen == [8] * 5


def test_with_fp16_a_size_is_tried_until_the_scale_lets_the_optimizer_make_its_averages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    plain = torch.optim.Adam.step

    def step(self: Any, closure: Any = None) -> Any:
        made.append(len(self.state))
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    learner = learner_of(accelerator=Accelerator("cpu", precision="fp16"))
    learner.loss_fn = lambda preds, ys: 1e4 * mse_loss(preds, ys)  # infinite with the scale that it begins with
    find_batch_size(learner, start=8, largest=8)
    assert made
    assert learner.updates.scale_state()["scale"]["value"] == 2**16


def test_a_step_of_a_users_own_and_any_batch_of_tensors_are_tried() -> None:
    class Own(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> Any:
            with runstep(learner, self, **batch["inputs"], ys=batch["ys"]) as (_, state):
                learner.backward(mse_loss(learner.model(state.xs), state.ys) * state.scale)
                learner.update()

    torch.manual_seed(1)
    batch = {"inputs": {"xs": torch.randn(8, 3), "scale": torch.tensor(2.0)}, "ys": torch.randn(8, 1)}
    assert find_batch_size(learner_of(100, data=[batch]), phase=Own(), largest=1000) == 64


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (DataLoader(TensorDataset(torch.randn(50, 3), torch.randn(50, 1)), batch_size=4), 32),
        ([(torch.randn(8, 3), torch.randn(8, 1))] * 3, 16),
    ],
    ids=["loader", "list"],
)
def test_no_more_rows_are_tried_than_the_data_has(source: Any, found: int) -> None:
    assert find_batch_size(learner_of(data=source)) == found


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(3), torch.randn(1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"start": 0}, ValueError, "start=0"),
        ({"largest": 2.5}, ValueError, "largest=2.5"),
        ({"phase": ValidationPhase()}, PhaseError, "does not train"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    data = batches()
    learner = Learner(Room(), mse_loss, data=(data, data), default_callbacks=False, accelerator=Accelerator("cpu"))
    with pytest.raises(error, match=words):
        find_batch_size(learner, **given)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (lambda: DataLoader(Endless(), batch_size=4), ValueError, "does not know how many rows .*largest=1024"),
        (lambda: iter([(torch.randn(4, 3), torch.randn(4, 1))]), DataError, "iterated once only"),
        (lambda: [torch.tensor(1.0)] * 2, BatchError, "no tensor has its 1 rows"),
    ],
    ids=["endless", "once", "scalar"],
)
def test_data_that_cannot_be_tried_is_refused(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        find_batch_size(learner_of(data=data()))


def test_data_without_a_length_is_tried_up_to_a_size_that_is_said() -> None:
    assert find_batch_size(learner_of(50, data=DataLoader(Endless(), batch_size=4)), largest=1024) == 32


def test_other_errors_of_a_step_are_raised_and_everything_is_put_back() -> None:
    learner = learner_of()
    learner.loss_fn = lambda preds, ys: preds.detach().mean()
    before = bits(learner)
    with pytest.raises(LossError):
        find_batch_size(learner)
    after = bits(learner)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_it_is_refused_while_the_learner_runs() -> None:
    class Asks(TrainingPhase):
        def step(self, learner: Any, batch: Any) -> Any:
            find_batch_size(learner)

    with pytest.raises(PhaseError, match="while the learner is running"):
        learner_of().fit(1, phases=[Asks()])
