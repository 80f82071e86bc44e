from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from fluxloop import (
    AbstractTrainingPhase,
    Accelerator,
    BatchLimit,
    Checkpointer,
    CombinedLoader,
    DataError,
    Learner,
    ObjectivePhase,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    find_lr,
)
from fluxloop.data.loaders import name_data
from fluxloop.testing import assert_resumes_exactly, assert_same_bits


def rows(count: int, size: int, shuffle: bool = False) -> TensorBatches:
    return TensorBatches(torch.arange(count), batch_size=size, shuffle=shuffle)


def lists(batches: Any) -> Any:
    if isinstance(batches, dict):
        return {name: lists(batch) for name, batch in batches.items()}
    if isinstance(batches, (list, tuple)):
        return [lists(batch) for batch in batches]
    return batches.tolist() if isinstance(batches, Tensor) else batches


MODES: dict[str, list[Any]] = {
    "min_size": [{"a": 1, "b": 4}, {"a": 2, "b": 5}],
    "max_size": [{"a": 1, "b": 4}, {"a": 2, "b": 5}, {"a": None, "b": 6}, {"a": None, "b": 7}, {"a": None, "b": 8}],
    "max_size_cycle": [{"a": 1, "b": 4}, {"a": 2, "b": 5}, {"a": 1, "b": 6}, {"a": 2, "b": 7}, {"a": 1, "b": 8}],
    "sequential": [1, 2, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize(("mode", "expected"), MODES.items())
def test_a_mode_says_when_an_epoch_ends_and_what_becomes_of_shorter_loaders(mode: str, expected: list[Any]) -> None:
    both = CombinedLoader({"a": [1, 2], "b": [4, 5, 6, 7, 8]}, mode=mode)
    assert list(both) == list(both) == expected
    assert len(both) == len(expected)
    assert list(CombinedLoader({"b": [4, 5, 6, 7, 8], "a": [1, 2]}, mode=mode))[:2] == (
        expected[:2] if mode != "sequential" else [4, 5]
    )


def test_a_batch_has_the_structure_of_what_was_given() -> None:
    assert list(CombinedLoader([[1], [2]])) == [[1, 2]]
    assert list(CombinedLoader(([1], [2]))) == [(1, 2)]
    inside = CombinedLoader([[1, 2], [3]])
    assert list(CombinedLoader({"x": inside, "y": [5, 6]})) == [{"x": [1, 3], "y": 5}, {"x": [2, 3], "y": 6}]
    assert CombinedLoader({"x": [1]}).loaders == {"x": [1]}


def test_a_length_is_known_where_all_lengths_are() -> None:
    stream = CombinedLoader({"a": [1], "b": (n for n in range(3))}, mode="max_size")
    with pytest.raises(TypeError, match=r"its loaders \['b'\] have none"):
        len(stream)
    assert list(stream) == [{"a": 1, "b": 0}, {"a": None, "b": 1}, {"a": None, "b": 2}]


def test_rows_become_loaders_that_shuffle() -> None:
    both = CombinedLoader({"a": torch.arange(64), "b": TensorDataset(torch.arange(40)), "c": rows(4, 2)})
    assert [len(part) for part in both.parts] == [2, 2, 2]
    batches = list(both)
    order = torch.cat([batch["a"] for batch in batches]).tolist()
    assert sorted(order) == list(range(64)) != order
    assert lists(batches[0]["c"]) == [0, 1]
    assert lists(list(both)) != lists(batches)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: CombinedLoader({"a": [1]}, mode="max_size_cycl"),
            r"expected one of .*; did you mean 'max_size_cycle'\?$",
        ),
        (lambda: CombinedLoader({}), "a dict of length 0; expected a dict of loaders"),
        (lambda: CombinedLoader(rows(4, 2)), "a TensorBatches; expected a dict of loaders"),  # type: ignore[arg-type]
        (lambda: CombinedLoader([[1], iter([2])]), r"the loader '1' .* can be iterated once only"),
        (lambda: CombinedLoader({"a": 3}), "3 was given as data"),
    ],
)
def test_what_cannot_be_combined_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make()


def test_a_loader_that_gives_nothing_when_it_begins_anew_is_an_error() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = [1]

        def __iter__(self) -> Iterator[int]:
            left, self.left = self.left, []
            return iter(left)

    with pytest.raises(DataError, match=r"the loader 'a' .* gave no batch when it began anew"):
        list(CombinedLoader({"a": Once(), "b": [1, 2]}))


# In a learner


class Noisy(Dataset[Tensor]):
    """Rows that draw."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)]) + torch.rand(1)


class Place:
    """Keeps its place itself, and shuffles."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.order: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        if not self.order:
            self.order = [*torch.randperm(self.count).tolist(), -1]
        while self.order[0] >= 0:
            yield torch.full((2, 1), float(self.order.pop(0)))
        self.order = []

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = list(state["order"])


def floats(count: int) -> Tensor:
    return torch.arange(float(count)).unsqueeze(1)


def loaders(workers: int = 0) -> dict[str, Any]:
    options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    own = torch.Generator().manual_seed(7)
    return {
        "tensors": TensorBatches(floats(7), batch_size=2, shuffle=True),
        "seeded": TensorBatches(floats(4), batch_size=2, shuffle=True, seed=3),
        "noisy": DataLoader(Noisy(20), batch_size=2, shuffle=True, **options),
        "own": DataLoader(TensorDataset(floats(6)), batch_size=2, shuffle=True, generator=own),
        "place": Place(3),
        "list": [floats(1), floats(2), floats(3)],
        "both": CombinedLoader([TensorBatches(floats(3), batch_size=1, shuffle=True), [floats(2)]]),
    }


class Together(AbstractTrainingPhase):
    """Trains on whatever a batch holds, and notes it."""

    transient = ("seen",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def step(self, learner: Any, batch: Any) -> Any:
        self.seen.append(lists(batch))
        return Sum.step(self, learner, batch)  # type: ignore[arg-type]


class Sum(ObjectivePhase):
    def entries(self, batch: Any) -> dict[str, Any]:
        return {"batch": batch}

    def loss(self, learner: Any, state: Any) -> Tensor:
        found = [t for t in _tensors(state.batch) if t.is_floating_point()]
        return torch.stack([learner.model(t).square().mean() for t in found]).sum()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif batch is not None:
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(item)


class Seen(Sum):
    transient = ("seen",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def entries(self, batch: Any) -> dict[str, Any]:
        self.seen.append(lists(batch))
        return {"batch": batch}


def make(*callbacks: Any, mode: str = "max_size_cycle", workers: int = 0, seed: int = 1) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return Learner(
        model,
        data={"training": CombinedLoader(loaders(workers), mode)},
        optimizer=partial(torch.optim.SGD, lr=1e-4),
        callbacks=list(callbacks),
        accelerator=Accelerator("cpu"),
        default_callbacks=False,
        seed=seed,
    )


def trained(learner: Learner, epochs: int, **how: Any) -> list[Any]:
    phase = Seen()
    learner.fit(epochs, phases=[phase], **how)
    return phase.seen


class KillError(RuntimeError):
    pass


def killed_after(steps: int) -> Any:
    class Killing(Seen):
        def entries(self, batch: Any) -> dict[str, Any]:
            if len(self.seen) == steps:
                raise KillError
            return super().entries(batch)

    Killing.__name__, Killing.__qualname__ = Seen.__name__, Seen.__qualname__
    return Killing()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [3, 21])
def test_an_epoch_is_resumed_in_the_middle_to_the_bit(mode: str, at: int, tmp_path: Path) -> None:
    whole = make(mode=mode)
    batches = trained(whole, 3)
    at = min(at, len(batches) - 1)
    folder = tmp_path / "run"
    with pytest.raises(KillError):
        make(Checkpointer(folder, unit="step"), mode=mode).fit(3, phases=[killed_after(at)], resume=folder)
    torch.manual_seed(99)
    resumed = make(Checkpointer(folder, unit="step"), mode=mode)
    assert trained(resumed, 3, resume=folder) == batches[at:]
    resumed.set_callbacks([])
    assert_same_bits(whole, resumed)


@pytest.mark.slow
def test_an_epoch_is_resumed_with_workers_as_without(tmp_path: Path) -> None:
    batches = trained(make(), 2)
    folder = tmp_path / "run"
    with pytest.raises(KillError):
        make(Checkpointer(folder, unit="step"), workers=1).fit(2, phases=[killed_after(7)], resume=folder)
    gc.collect()
    assert trained(make(Checkpointer(folder, unit="step"), workers=1), 2, resume=folder) == batches[7:]
    gc.collect()


def test_a_shorter_loader_takes_a_new_order_each_time_it_begins_anew() -> None:
    seen = trained(make(), 2)
    assert len(seen) == 20
    for name, size in (("tensors", 4), ("own", 3), ("noisy", 10), ("place", 3), ("seeded", 2)):
        passes = [str([batch[name] for batch in seen[at : at + size]]) for at in range(0, 10 - size + 1, size)]
        passes += [
            str([batch[name] for batch in seen[10 + at : 10 + at + size]]) for at in range(0, 10 - size + 1, size)
        ]
        assert len(set(passes)) > len(passes) // 3, name
    firsts = [batch["tensors"] for batch in seen[:4]], [batch["tensors"] for batch in seen[4:8]]
    assert [sorted(chain(*batches)) for batches in firsts] == [[[float(n)] for n in range(7)]] * 2


def test_the_orders_follow_from_the_seed_alone() -> None:
    first = trained(make(), 1)
    torch.manual_seed(5)
    assert trained(make(), 1) == first
    assert trained(make(seed=2), 1) != first


def test_a_loader_beside_it_changes_nothing_for_a_loader() -> None:
    def tensors(**others: Any) -> list[Any]:
        learner = make()
        learner.data.training = CombinedLoader({"a": TensorBatches(floats(8), batch_size=1, shuffle=True), **others})
        return [batch["a"] for batch in trained(learner, 2)]

    assert tensors() == tensors(b=TensorBatches(floats(6), batch_size=2, shuffle=True), c=[floats(1)])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_watching_the_same_loader_changes_nothing(mode: str) -> None:
    def plain() -> list[Any]:
        return trained(make(mode=mode), 2)

    class Look(ValidationPhase):
        data_key = "training"

        def entries(self, batch: Any) -> dict[str, Any]:
            return {"batch": batch}

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            state.seen = True

    watched = make(mode=mode)
    phase = Seen()
    watched.fit(2, phases=[phase, Look()])
    again = make(mode=mode)
    find_lr(again, phase=Seen(), steps=3)
    again.summary()
    assert phase.seen == trained(again, 2) == plain()


def test_a_copy_trains_on_as_the_original() -> None:
    learner = make()
    trained(learner, 1)
    other = copy.deepcopy(learner)
    assert trained(other, 1) == trained(learner, 1)
    assert_same_bits(learner, other)


@pytest.mark.slow
def test_a_state_is_loaded_into_a_learner_that_has_trained(tmp_path: Path) -> None:
    learner = make()
    trained(learner, 1)
    learner.save(tmp_path / "state.pt")
    then = trained(learner, 1)
    learner.load(tmp_path / "state.pt")
    assert trained(learner, 1) == then
    new = make()
    new.load(tmp_path / "state.pt")
    assert trained(new, 1) == then


@pytest.mark.slow
def test_an_epoch_can_be_limited() -> None:
    whole = trained(make(), 2)
    assert trained(make(), 2, steps_per_epoch=4) == [*whole[:4], *trained(make(), 2, steps_per_epoch=4)[4:]]
    limited = trained(make(BatchLimit(4)), 2)
    assert limited[:4] == whole[:4]
    assert len(limited) == 8


def test_what_of_it_cannot_be_resumed_in_the_middle_is_named(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(floats(4))

    learner = make(Checkpointer(tmp_path / "run", unit="step"))
    learner.data.training = CombinedLoader({"a": [floats(1)], "b": DataLoader(Stream(), batch_size=1)})
    with pytest.warns(UserWarning, match=r"the 'training/b' data \(a DataLoader\) cannot be resumed in the middle"):
        trained(learner, 1)


def test_loaders_are_told_their_passes() -> None:
    class Told(RandomSampler):
        def __init__(self, count: int) -> None:
            super().__init__(range(count))
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    short, long = Told(2), Told(5)
    both = {
        "a": DataLoader(TensorDataset(floats(2)), sampler=short, batch_size=1),
        "b": DataLoader(TensorDataset(floats(5)), sampler=long, batch_size=1),
    }
    learner = make()
    learner.data.training = CombinedLoader(both)
    trained(learner, 2)
    assert short.epochs == [0, 1, 2, 3, 4, 5]
    assert long.epochs == [0, 1]
    learner.data.training.set_epoch(9)
    assert (short.epochs[-1], long.epochs[-1]) == (9, 9)


@pytest.mark.slow
def test_it_resumes_exactly_and_is_watched_without_a_trace() -> None:
    class Pairs(TrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch["a"], "ys": batch["b"]}

    def pairs() -> Learner:
        learner = make()
        learner.loss_fn = nn.functional.mse_loss
        learner.data.training = CombinedLoader({n: TensorBatches(floats(6), batch_size=2, shuffle=True) for n in "ab"})
        return learner

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_resumes_exactly(pairs, epochs=2, phases=lambda: [Pairs()])


def by_hand(loaders: list[list[int]], mode: str) -> list[Any]:
    """What Lightning documents of its modes, as plain Python."""
    if mode == "sequential":
        return [batch for batches in loaders for batch in batches]
    if mode == "min_size":
        return [list(batches) for batches in zip(*loaders, strict=False)]
    longest = max(map(len, loaders))
    if mode == "max_size":
        return [[batches[n] if n < len(batches) else None for batches in loaders] for n in range(longest)]
    return [[batches[n % len(batches)] for batches in loaders] for n in range(longest)]


@pytest.mark.slow
@given(
    loaders=st.lists(st.lists(st.integers(), min_size=1, max_size=7), min_size=1, max_size=4),
    mode=st.sampled_from(sorted(MODES)),
    sized=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_loaders_are_combined_as_by_hand(loaders: list[list[int]], mode: str, sized: bool) -> None:
    class Unsized:
        def __init__(self, batches: list[int]) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[int]:
            return iter(self.batches)

    given = loaders if sized else [Unsized(batches) for batches in loaders]
    combined = CombinedLoader(given, mode)
    assert list(combined) == by_hand(loaders, mode)
    if sized:
        assert len(combined) == len(by_hand(loaders, mode))


def test_a_list_with_a_combined_loader_is_data_as_a_tuple_of_it_is() -> None:
    both, alone = CombinedLoader({"a": [1, 2], "b": [4, 5]}), TensorBatches(torch.zeros(4, 1), batch_size=2)
    named = name_data([both, alone])
    assert named.training is both
    assert named.validation is alone
