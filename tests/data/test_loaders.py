from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fluxloop import Checkpointer, DataError, Learner, ObjectivePhase, TensorBatches, as_dataloader, split, stream_seed
from fluxloop.data.loaders import name_data
from fluxloop.nested import tensors
from toys import Numbers, Stream

Views = namedtuple("Views", ["left", "right"])
quick = settings(deadline=None, max_examples=60)


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.rows


class DuckTyped:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if index >= 5:
            raise IndexError
        return index


def lengths(batches: Any) -> list[int]:
    return [len(next(tensors(batch))) for batch in batches]


def rows_of(batches: Any) -> list[int]:
    return [int(row) for batch in batches for row in next(tensors(batch))]


# TensorBatches


@quick
@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.none() | st.integers(0, 2**32 - 1),
)
def test_every_row_comes_exactly_once_per_epoch(
    rows: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int | None
) -> None:
    if drop_last and batch_size > rows:
        with pytest.raises(DataError, match=f"{rows} rows make no full batch of {batch_size}.*drop_last=False"):
            TensorBatches(torch.arange(rows), batch_size=batch_size, drop_last=True)
        return
    loader = TensorBatches(torch.arange(rows), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert lengths(batches[:-1]) == [batch_size] * (len(batches) - 1)
        seen = rows_of(batches)
        kept = rows - rows % batch_size if drop_last else rows
        assert len(seen) == len(set(seen)) == kept
        assert set(seen) <= set(range(rows))
        if not shuffle:
            assert seen == list(range(kept))


@quick
@given(rows=st.integers(1, 30), batch_size=st.integers(1, 35), drop_last=st.booleans())
def test_unshuffled_batches_equal_those_of_a_dataloader(rows: int, batch_size: int, drop_last: bool) -> None:
    xs, ys = torch.rand(rows, 3), torch.arange(rows)
    reference = list(DataLoader(TensorDataset(xs, ys), batch_size=batch_size, drop_last=drop_last))
    if not reference:
        return
    ours = list(TensorBatches(xs, ys, batch_size=batch_size, drop_last=drop_last))
    assert len(ours) == len(reference)
    for (x, y), (reference_x, reference_y) in zip(ours, reference, strict=True):
        assert torch.equal(x, reference_x)
        assert torch.equal(y, reference_y)


@pytest.mark.slow
@quick
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_with_a_seed_the_order_depends_on_seed_and_epoch_alone(seed: int, epoch: int) -> None:
    torch.manual_seed(epoch)
    loader = TensorBatches(torch.arange(20), batch_size=3, shuffle=True, seed=seed)
    loader.set_epoch(epoch)
    before = torch.get_rng_state()
    order = rows_of(loader)
    assert torch.equal(torch.get_rng_state(), before), "a seeded loader drew from the global generator"
    generator = torch.Generator().manual_seed(stream_seed(seed, "TensorBatches", epoch))
    assert order == torch.randperm(20, generator=generator).tolist()


def test_a_seeded_loader_gives_a_new_order_each_time_and_the_same_orders_again() -> None:
    def orders(seed: int) -> list[list[int]]:
        loader = TensorBatches(torch.arange(50), batch_size=7, shuffle=True, seed=seed)
        return [rows_of(loader) for _ in range(3)]

    first, second, third = orders(1)
    assert first != second != third != first
    assert orders(1) == [first, second, third]
    assert orders(2)[0] != first


def test_without_a_seed_the_order_is_torchs_to_decide() -> None:
    loader = TensorBatches(torch.arange(30), batch_size=4, shuffle=True)
    torch.manual_seed(5)
    first, second = rows_of(loader), rows_of(loader)
    torch.manual_seed(5)
    assert [rows_of(loader), rows_of(loader)] == [first, second]
    assert first != second


def test_rows_that_belong_together_stay_together_when_shuffled() -> None:
    xs = torch.arange(20)
    loader = TensorBatches({"xs": xs, "both": (10 * xs, 100 * xs)}, batch_size=6, shuffle=True, seed=0)
    for batch in loader:
        assert torch.equal(batch["both"][0], 10 * batch["xs"])
        assert torch.equal(batch["both"][1], 100 * batch["xs"])


def test_a_batch_has_the_structure_of_what_was_given() -> None:
    xs, ys = torch.arange(4), torch.arange(4)
    assert isinstance(next(iter(TensorBatches(xs, batch_size=2))), Tensor)
    assert [type(part) for part in next(iter(TensorBatches(xs, ys, batch_size=2)))] == [Tensor, Tensor]
    assert len(next(iter(TensorBatches(xs, ys, xs, batch_size=2)))) == 3
    assert sorted(next(iter(TensorBatches({"a": xs, "b": ys}, batch_size=2)))) == ["a", "b"]
    (left, right), target = next(iter(TensorBatches((xs, ys), xs, batch_size=2)))
    assert left.tolist() == right.tolist() == target.tolist() == [0, 1]
    views = next(iter(TensorBatches(Views(xs, ys), batch_size=2)))
    assert isinstance(views, Views)
    assert views.left.tolist() == [0, 1]


def test_unshuffled_batches_are_views_and_shuffled_ones_copies() -> None:
    xs = torch.zeros(4)
    next(iter(TensorBatches(xs, batch_size=2))).add_(1)
    assert xs.tolist() == [1, 1, 0, 0]
    for batch in TensorBatches(xs, batch_size=2, shuffle=True):
        batch.add_(5)
    assert xs.tolist() == [1, 1, 0, 0]


def by_hand(data: tuple[Tensor, ...], batch_size: int, seed: int, epoch: int = 0) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(stream_seed(seed, "TensorBatches", epoch))
    order = torch.randperm(len(data[0]), generator=generator)
    return [tuple(tensor[rows] for tensor in data) for rows in order.split(batch_size)]  # type: ignore[no-untyped-call]


def assert_same(given: Any, expected: list[tuple[Tensor, ...]]) -> None:
    """Compare batches: bits, types and strides."""
    given = list(given)
    assert len(given) == len(expected)
    for ours, theirs in zip(given, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert [(type(part), part.dtype, part.stride()) for part in ours] == [
            (type(part), part.dtype, part.stride()) for part in theirs
        ]


class Wide(Tensor):
    """A tensor of the user's own."""


LAYOUTS = {
    "small": lambda rows: (torch.randn(rows, 16), torch.arange(rows)),
    "large": lambda rows: (torch.randn(rows, 3, 20, 50), torch.arange(rows)),
    "images of one channel": lambda rows: (torch.randn(rows, 1, 8, 8),),
    "bytes": lambda rows: (torch.randint(256, (rows, 5), dtype=torch.uint8), torch.rand(rows) < 0.5),
    "no width": lambda rows: (torch.zeros(rows, 0),),
    "columns": lambda rows: (torch.randn(3, rows).T, torch.arange(rows)),
    "every other": lambda rows: (torch.randn(rows, 8)[:, ::2], torch.arange(2 * rows)[::2]),
    "channels last": lambda rows: (torch.randn(rows, 3, 4, 5).to(memory_format=torch.channels_last),),
    "channel last": lambda rows: (torch.randn(rows, 1, 4, 5).to(memory_format=torch.channels_last),),
    "of a class of its own": lambda rows: (torch.randn(rows, 4).as_subclass(Wide), torch.arange(rows)),
    "complex": lambda rows: (torch.randn(rows, 4, dtype=torch.complex64).conj(),),
}


@pytest.mark.slow(quick=13)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 5, 32, 64])
def test_shuffled_batches_are_those_indexed_by_hand(layout: Any, batch_size: int) -> None:
    data = layout(2500 if batch_size == 32 else 150)
    expected = by_hand(data, batch_size, seed=4)
    assert_same(TensorBatches(tuple(data), batch_size=batch_size, shuffle=True, seed=4), expected)
    loader = TensorBatches(tuple(data), batch_size=batch_size, shuffle=True, seed=4)
    for first in (1, len(expected) // 2, len(expected)):
        loader.set_epoch(0)
        assert_same(loader.from_batch(first), expected[first:])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_batches_in_order_are_those_sliced_by_hand(layout: Any) -> None:
    data = layout(300)
    expected = [tuple(tensor[start : start + 4] for tensor in data) for start in range(0, 300, 4)]
    loader = TensorBatches(tuple(data), batch_size=4)
    assert_same(loader, expected)
    assert_same(loader.from_batch(70), expected[70:])


@pytest.mark.parametrize("shuffle", [False, True])
def test_nested_data_comes_in_the_same_batches(shuffle: bool) -> None:
    xs, ys = torch.arange(300), 10 * torch.arange(300)
    nested = {"a": xs, "b": (ys, {"c": Views(xs, ys)})}
    for batch in TensorBatches(nested, batch_size=8, shuffle=shuffle, seed=0):
        assert list(batch) == ["a", "b"]
        assert [type(batch["b"]), type(batch["b"][1]), type(batch["b"][1]["c"])] == [tuple, dict, Views]
        assert [tensor.tolist() for tensor in tensors(batch)] == [batch["a"].tolist(), (10 * batch["a"]).tolist()] * 2


def test_what_was_used_before_is_not_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []

    def gather(tensor: Tensor) -> Any:
        return lambda rows: gathered.extend(rows.tolist()) or tensor[rows]  # type: ignore[func-returns-value]

    monkeypatch.setattr("fluxloop.data.loaders._gather", gather)
    rest = rows_of(TensorBatches(torch.arange(100), batch_size=8, shuffle=True, seed=0).from_batch(9))
    assert gathered == rest
    assert len(rest) == 28


def test_a_batch_can_be_changed_while_the_gradient_of_another_waits() -> None:
    weight = torch.ones(4, requires_grad=True)
    first, second, *_ = TensorBatches(torch.ones(64, 4), batch_size=16, shuffle=True)
    loss = (first * weight).sum()
    second.mul_(5).add_(weight)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [16] * 4


def test_batches_read_ahead_without_autograd_can_be_trained_on() -> None:
    weight = torch.ones(4, requires_grad=True)
    for shuffle in (False, True):
        batches = iter(TensorBatches(torch.ones(64, 4), batch_size=16, shuffle=shuffle))
        with torch.inference_mode():
            next(batches)
        (next(batches) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [32] * 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_gradients_reach_the_rows_of_each_batch(shuffle: bool) -> None:
    latents = torch.zeros(64, 4, requires_grad=True)
    for rows, _ in TensorBatches(latents, torch.arange(64), batch_size=16, shuffle=shuffle):
        (3 * rows).sum().backward()
        assert "Split" not in rows.grad_fn.name(), "its gradient costs as much as that of many batches"
    assert latents.grad is not None
    assert torch.equal(latents.grad, torch.full((64, 4), 3.0))


@pytest.mark.parametrize(("width", "batch_size"), [(16, 32), (13, 50), (3, 7), (784, 128)])
def test_shuffled_batches_lie_where_tensors_of_their_own_do(width: int, batch_size: int) -> None:
    loader = TensorBatches(torch.zeros(1000, width), torch.zeros(1000), batch_size=batch_size, shuffle=True)
    assert {part.data_ptr() % 64 for batch in loader for part in batch} == {0}


def test_a_batch_that_is_kept_keeps_few_others_in_memory() -> None:
    for width, most in ((16, 256 * 1024), (112, 256 * 1024), (4000, 32 * 16_000)):
        batch = next(iter(TensorBatches(torch.zeros(2048, width), batch_size=32, shuffle=True)))
        assert batch.untyped_storage().nbytes() <= most


def test_the_order_is_drawn_on_the_cpu_whatever_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            torch.manual_seed(0)
            data = torch.arange(64, device="cpu")
            orders.append([rows_of(TensorBatches(data, batch_size=8, shuffle=True, seed=seed)) for seed in (None, 1)])
    assert orders[0] == orders[1]
    elsewhere = TensorBatches(torch.zeros(70, 3, device="meta"), batch_size=16, shuffle=True)
    assert [(batch.device.type, len(batch)) for batch in elsewhere] == [("meta", 16)] * 4 + [("meta", 6)]
    devices: set[str] = set()
    monkeypatch.setattr(
        "fluxloop.data.loaders._gather", lambda tensor: lambda rows: (devices.add(rows.device.type), tensor[rows])[1]
    )
    assert len(list(elsewhere)) == 5
    assert devices == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA to pin memory")
@pytest.mark.parametrize("width", [16, 4000])
def test_what_is_gathered_from_pinned_memory_is_pinned(width: int) -> None:
    data = torch.randn(640, width).pin_memory(), torch.arange(640)
    loader = TensorBatches(*data, batch_size=32, shuffle=True, seed=0)
    assert_same(loader, by_hand(data, 32, seed=0))
    assert {(x.is_pinned(), y.is_pinned()) for x, y in loader} == {(True, False)}


def test_arrays_are_used_where_they_are() -> None:
    array = np.zeros((4, 2), dtype=np.float32)
    loader = TensorBatches(array, batch_size=4)
    array[0] = 7
    assert next(iter(loader))[0].tolist() == [7, 7]


def test_two_iterations_at_once_do_not_disturb_each_other() -> None:
    loader = TensorBatches(torch.arange(6), batch_size=2)
    assert [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)] == [
        ([0, 1], [0, 1]),
        ([2, 3], [2, 3]),
        ([4, 5], [4, 5]),
    ]


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "4", True, None])
def test_a_batch_size_that_is_no_number_of_rows_is_refused(batch_size: Any) -> None:
    with pytest.raises(DataError, match=r"batch_size=.* was given; expected a number of rows, 1 or more") as caught:
        TensorBatches(torch.zeros(4), batch_size=batch_size)
    assert repr(batch_size) in str(caught.value)


@pytest.mark.parametrize(
    ("given_tensors", "words"),
    [
        ((), r"no tensor was given; expected TensorBatches\(xs, ys, batch_size=32\)"),
        ((torch.zeros(0, 3),), "no rows; expected at least one"),
        ((torch.zeros(3), torch.zeros(4)), r"\[3, 4\] rows; expected the same number of rows"),
        (({"a": torch.zeros(2), "b": np.zeros(5)},), r"\[2, 5\] rows; expected the same number"),
        ((torch.tensor(1.0),), "no rows"),
        (("text",), "'text' was given as data; expected tensors or arrays"),
        ((torch.zeros(2), None), "None was given as data; expected tensors or arrays"),
        ((torch.zeros(2), 3), "3 was given as data; expected tensors or arrays"),
    ],
)
def test_tensors_that_make_no_batches_are_refused(given_tensors: tuple[Any, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        TensorBatches(*given_tensors, batch_size=2)


# as_dataloader


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(100),
        torch.zeros(100, 3),
        np.zeros(100),
        np.zeros((100, 2, 2)),
        (torch.zeros(100, 3), np.zeros(100)),
        {"image": torch.zeros(100, 3), "label": np.zeros(100)},
        Views(torch.zeros(100, 3), torch.zeros(100, 3)),
        (Views(torch.zeros(100, 3), torch.zeros(100, 3)), {"label": torch.zeros(100)}),
        TensorDataset(torch.zeros(100, 3), torch.zeros(100)),
        Numbers(100),
        Stream(100),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_holds_rows_becomes_batches_of_32(data: Any) -> None:
    batches = list(as_dataloader(data))
    assert lengths(batches) == [32, 32, 32, 4]
    assert lengths(as_dataloader(data, batch_size=50)) == [50, 50]
    assert lengths(as_dataloader(data, batch_size=30, drop_last=True)) == [30, 30, 30]


def test_the_batch_size_holds_for_bare_tensors_and_arrays() -> None:
    assert len(as_dataloader(torch.zeros(90, 2), batch_size=2)) == 45
    assert len(as_dataloader(np.zeros(90), batch_size=2)) == 45


def test_a_last_batch_that_is_not_full_is_kept() -> None:
    assert lengths(as_dataloader(torch.zeros(10), batch_size=32)) == [10]


@pytest.mark.parametrize("data", [torch.arange(40), np.arange(40), Numbers(40)], ids=lambda data: type(data).__name__)
def test_shuffling_gives_another_order_each_epoch_and_every_row_once(data: Any) -> None:
    loader = as_dataloader(data, batch_size=8, shuffle=True)
    first, second = rows_of(loader), rows_of(loader)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first != list(range(40))


def test_a_dataset_takes_any_option_of_dataloader() -> None:
    loader = as_dataloader(Numbers(10), batch_size=4, drop_last=True, collate_fn=lambda rows: rows)
    assert isinstance(loader, DataLoader)
    assert list(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_seed_decides_the_order_of_tensors() -> None:
    first, again, other = (rows_of(as_dataloader(torch.arange(40), shuffle=True, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(5), batch_size=2),
        lambda: TensorBatches(torch.arange(5), batch_size=2),
        lambda: [torch.arange(2), torch.arange(3)],
        lambda: iter([torch.arange(2)]),
        lambda: (torch.arange(n) for n in (2, 3)),
        lambda: range(5),
    ],
    ids=["DataLoader", "TensorBatches", "list of batches", "iterator", "generator", "range"],
)
def test_what_makes_batches_already_is_returned_as_it_is(make: Any) -> None:
    source = make()
    assert as_dataloader(source) is source


def test_rows_to_be_looked_up_by_index_become_batches() -> None:
    assert rows_of(as_dataloader(DuckTyped())) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (torch.zeros(4), {"num_workers": 2}, r"\['num_workers'\] were given for tensors in memory.*give a Dataset"),
        ((torch.zeros(4),), {"pin_memory": True}, r"\['pin_memory'\] were given for tensors in memory"),
        (np.zeros(4), {"nonsense": 1, "drop_last": True}, r"\['nonsense'\] were given for tensors"),
        ([torch.zeros(4)], {"batch_size": 2}, "options were given for a list of length 1, which already makes batches"),
        ([torch.zeros(4)], {"shuffle": True}, "options were given for a list of length 1"),
        (iter([1]), {"drop_last": True}, "options were given for a list_iterator, which already makes batches"),
        (DataLoader(Numbers(4)), {"shuffle": True}, "options were given for a DataLoader, which already makes batches"),
        (TensorBatches(torch.zeros(4), batch_size=2), {"batch_size": 4}, "given for a TensorBatches"),
        (Stream(4), {"shuffle": True}, "shuffle=True was given for an IterableDataset.*shuffle inside it"),
        (Numbers(4), {"seed": 1}, "seed"),
        (torch.zeros(4), {"batch_size": 0}, "batch_size=0 was given; expected a number of rows"),
    ],
)
def test_options_that_do_not_apply_are_refused(data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_dataloader(data, **options)


@pytest.mark.parametrize(
    ("data", "given_as"),
    [
        (None, "None"),
        (3, "3"),
        (2.5, "2.5"),
        ("path/to/data", "'path/to/data'"),
        (b"bytes", "b'bytes'"),
        (len, "builtin_function_or_method"),
        (torch.nn.Linear(1, 1), "a Linear"),
        ((torch.zeros(3), "label"), "'label'"),
        ({"xs": torch.zeros(3), "ys": None}, "None"),
        (np.float64(3.0), "float64"),
        ((np.array(["cat", "dog"]), np.zeros(2)), "ndarray"),
    ],
    ids=range(11),
)
def test_what_cannot_be_loaded_is_refused_with_what_could_be(data: Any, given_as: str) -> None:
    with pytest.raises(DataError, match="expected tensors or arrays, a tuple or dict of them") as caught:
        as_dataloader(data)
    assert given_as in str(caught.value)


# split


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.full((n, 3), float(n)) for n in (1, 2, 3, 4)], layout=torch.jagged)


@pytest.mark.parametrize("call", [partial(TensorBatches, batch_size=2), partial(split, fraction=0.5), name_data])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            nested,
            r"a nested tensor of 4 rows was given as data.*DataLoader\(data.unbind\(\), .*layout=torch.jagged\)\)",
        ),
        (lambda: torch.eye(4).to_sparse(), r"layout torch.sparse_coo was given as data.*\(data.to_dense\(\)\)"),
        (lambda: torch.eye(4).to_sparse_csr(), r"layout torch.sparse_csr was given as data.*\(data.to_dense\(\)\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_tensor_that_torch_cannot_cut_into_batches_is_refused(call: Any, make: Any, words: str) -> None:
    for data in ({"xs": make(), "ys": torch.zeros(4)}, make()):
        with pytest.raises(DataError, match=f"(?s){words}"):
            call((data,) if call is name_data else data)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_batches_of_rows_of_several_lengths_train_as_by_hand(layout: torch.layout, tmp_path: Path) -> None:
    rows = [torch.randn(1 + n % 3, 3, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    loader = DataLoader(rows, batch_size=2, collate_fn=partial(torch.nested.as_nested_tensor, layout=layout))  # type: ignore[arg-type]  # a list has rows by number

    class Lengths(ObjectivePhase):
        def loss(self, learner: Any, state: Any) -> Tensor:
            found: Tensor = learner.model(state.xs).to_padded_tensor(0.0).square().sum()
            return found

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    by_hand = copy.deepcopy(model)
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for _ in range(2):
        for first in range(0, 8, 2):
            loss = by_hand(torch.cat(rows[first : first + 2])).square().sum()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    for epochs in (1, 2):  # killed after an epoch, and run again
        learner = Learner(
            copy.deepcopy(model),
            data=(loader,),
            optimizer=partial(torch.optim.SGD, lr=0.01),
            callbacks=[Checkpointer(tmp_path)],
            default_callbacks=False,
        )
        learner.fit(epochs, phases=[Lengths()], resume=tmp_path)
    for found, expected in zip(learner.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@quick
@given(
    rows=st.integers(2, 40),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
    seed=st.none() | st.integers(0, 100),
)
def test_split_gives_every_row_to_exactly_one_part(rows: int, fraction: float, seed: int | None) -> None:
    rest, part = split((torch.arange(rows), 10 * np.arange(rows)), fraction, seed)
    assert sorted(rest[0].tolist() + part[0].tolist()) == list(range(rows))
    assert rest[0].tolist() == sorted(rest[0].tolist())
    assert part[0].tolist() == sorted(part[0].tolist())
    assert torch.equal(rest[1], 10 * rest[0])
    assert torch.equal(part[1], 10 * part[0])
    assert len(part[0]) == min(max(round(rows * fraction), 1), rows - 1)


@quick
@given(rows=st.integers(2, 30), fraction=st.floats(0.01, 0.99))
def test_split_of_a_dataset_gives_subsets_with_every_row_once(rows: int, fraction: float) -> None:
    rest, part = split(Numbers(rows), fraction)
    assert isinstance(rest, Subset)
    assert isinstance(part, Subset)
    assert sorted([*rest, *part]) == list(range(rows))
    assert len(rest) > 0
    assert len(part) > 0


def test_split_keeps_the_structure() -> None:
    xs = torch.arange(10)
    for whole in (xs, (xs, xs), {"a": xs, "b": (xs, xs)}, Views(xs, xs)):
        for part in split(whole, 0.3, seed=0):
            assert type(part) is type(whole)
    rest, part = split(np.arange(10), 0.3, seed=0)
    assert (len(rest), len(part)) == (7, 3)


def test_split_is_decided_by_its_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (split(torch.arange(30), 0.5, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before), "a seeded split drew from the global generator"


def test_split_without_a_seed_is_torchs_to_decide() -> None:
    torch.manual_seed(1)
    first = split(torch.arange(30), 0.5)[1].tolist()
    second = split(torch.arange(30), 0.5)[1].tolist()
    torch.manual_seed(1)
    assert split(torch.arange(30), 0.5)[1].tolist() == first != second


def test_a_part_of_a_split_can_be_split_again() -> None:
    rest, test = split(Numbers(20), 0.25, seed=0)
    train, valid = split(rest, 0.2, seed=0)
    assert sorted([*train, *valid, *test]) == list(range(20))


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.1, 1.5, 2, -1, float("nan"), float("inf"), "0.2", None, True])
def test_a_fraction_that_leaves_a_part_empty_is_refused(fraction: Any) -> None:
    with pytest.raises(DataError, match=r"fraction=.* was given; expected a share above 0 and below 1, e\.g\. 0\.2"):
        split(torch.arange(10), fraction)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(Numbers(4)), "a DataLoader cannot be split by rows.*split it before making a loader"),
        (TensorBatches(torch.zeros(4), batch_size=2), "a TensorBatches cannot be split by rows"),
        ([torch.zeros(4)], "a list of length 1 cannot be split by rows"),
        (Stream(4), "a Stream cannot be split by rows"),
        (SizedStream(4), "a SizedStream cannot be split by rows"),
        (None, "None cannot be split"),
        (iter([1]), "list_iterator cannot be split"),
        ((torch.zeros(3), torch.zeros(4)), r"\[3, 4\] rows"),
        (torch.zeros(1), "1 rows cannot be split; expected 2 or more"),
        (Numbers(1), "1 rows cannot be split; expected 2 or more"),
    ],
)
def test_what_has_no_rows_to_choose_from_is_not_split(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        split(data, 0.5)


class RowsOfALibrary:
    """Rows by number or several at once, and an iterator over them: a data set that is no ``Dataset`` of torch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([float(index)])}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        return [self[index] for index in indices]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(self.count))


def test_rows_of_a_library_are_batched_and_shuffled_and_no_batches_themselves() -> None:
    named = name_data({"training": RowsOfALibrary(64), "validation": RowsOfALibrary(40)})
    assert [len(batch["x"]) for batch in named.validation] == [32, 8]
    order = torch.cat([batch["x"] for batch in named.training]).flatten().tolist()
    assert sorted(order) == list(range(64)) != order


def batched(data: Iterator[Any], size: int) -> Iterator[Any]:
    while rows := list(islice(data, size)):
        yield torch.stack(rows)


def unbatched(data: Iterator[Any]) -> Iterator[Any]:
    for rows in data:
        yield from rows


class Stage:
    """A step of a pipeline, as webdataset has them."""

    def __init__(self, f: Any, *args: Any) -> None:
        self.f, self.args = f, args


class Pipeline(IterableDataset[Any]):
    def __init__(self, *stages: Any) -> None:
        self.pipeline = list(stages)

    def __iter__(self) -> Iterator[Any]:
        data: Any = iter(torch.arange(8.0).unsqueeze(1))
        for stage in self.pipeline:
            data = iter(stage) if isinstance(stage, DataLoader) else stage.f(data, *stage.args)
        return iter(data)


FOUR, ROWS = Stage(batched, 4), Stage(unbatched)


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (Pipeline(), [8]),
        (Pipeline(FOUR), [4, 4]),
        (Pipeline(FOUR, ROWS), [8]),
        (Pipeline(FOUR, ROWS, FOUR), [4, 4]),
        (Pipeline(DataLoader(torch.arange(8.0).unsqueeze(1), batch_size=2)), [2, 2, 2, 2]),  # type: ignore[arg-type]
    ],
    ids=["rows", "batched", "unbatched", "batched again", "a loader inside"],
)
def test_a_pipeline_that_makes_batches_is_not_batched_again(data: Any, sizes: list[int]) -> None:
    assert [len(batch) for batch in as_dataloader(data)] == sizes


def test_a_batch_size_for_a_pipeline_that_makes_batches_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size=8 was given for a Pipeline, whose batched makes batches already"):
        as_dataloader(Pipeline(FOUR), batch_size=8)
