from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from fluxloop import EMA, Checkpointer, CheckpointError, Learner, Metrics, Recorder, TensorBatches
from fluxloop.checkpoint.digests import check_sums, checksum, checksums, first_difference, named_tensors
from fluxloop.checkpoint.folder import CHECKSUMS, read, write


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Find the tensors of a file's contents, with the way to each."""
    if isinstance(state, Tensor):
        return [(path, state)]
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return [found for key, item in pairs for found in places(item, (*path, key))]


def put(state: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


def trained_file(path: Path) -> None:
    xs = torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    learner = Learner(
        nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)), nn.Linear(3, 1)),
        nn.functional.mse_loss,
        data=(TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4),),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        callbacks=[Recorder(), Metrics(), EMA("model", 0.9)],
        default_callbacks=False,
        seed=0,
    )
    learner.fit(1)
    learner.save(path)


@pytest.mark.slow
def test_two_tensors_of_one_size_that_were_exchanged_are_named(tmp_path: Path) -> None:
    trained_file(tmp_path / "state.pt")
    whole = torch.load(tmp_path / "state.pt", weights_only=True)
    found = [(path, t) for path, t in places(whole) if path[0] in ("models", "optimizers", "callbacks", "updates")]
    pairs = [
        (first, second)
        for index, first in enumerate(found)
        for second in found[index + 1 :]
        if first[1].nbytes == second[1].nbytes and not torch.equal(first[1], second[1])
    ]
    assert len(pairs) > 100
    for (one, a), (other, b) in random.Random(0).sample(pairs, 20):
        state = copy.deepcopy(whole)
        put(state, one, b)
        put(state, other, a)
        torch.save(state, tmp_path / "exchanged.pt")  # with valid checksums of the zip file's own
        with pytest.raises(CheckpointError, match="is not as it was written") as caught:
            read(tmp_path / "exchanged.pt")
        for path in (one, other):
            assert repr(".".join(str(key) for key in path if key != "")) in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        torch.arange(6).float().reshape(3, 2),
        torch.arange(6).float().view(torch.int32),
        torch.arange(6).double(),
        torch.arange(6).float() + 1e-6,
        torch.arange(5).float(),
    ],
    ids=["shape", "type", "precision", "bytes", "length"],
)
def test_a_checksum_is_of_type_shape_and_bytes(other: Tensor) -> None:
    tensor = torch.arange(6).float()
    assert checksum("a", tensor) == checksum("a", tensor.clone()) != checksum("b", tensor)
    assert checksum("a", other) != checksum("a", tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
        torch.empty(0),
        torch.tensor(3),
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.arange(4).bfloat16(),
    ],
    ids=["transposed", "strided", "conjugate", "empty", "scalar", "channels last", "bfloat16"],
)
def test_a_checksum_is_the_same_after_a_file(tensor: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "state.pt", {"fluxloop": 1, "value": tensor})
    assert torch.equal(read(tmp_path / "state.pt")["value"], tensor)
    assert CHECKSUMS in torch.load(tmp_path / "state.pt", weights_only=True)
    assert CHECKSUMS not in read(tmp_path / "state.pt")


def test_a_tensor_that_was_taken_out_or_added_is_told() -> None:
    state = {"a": torch.zeros(2), "b": [torch.ones(2)]}
    sums = checksums(list(named_tensors(state)))
    assert list(check_sums(state, sums)) == []
    assert "it has 1 tensors" in next(check_sums({"a": torch.zeros(2)}, sums))
    assert "it has 2 tensors and 'none' for" in next(check_sums(state, "none"))


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.save({"fluxloop": 1, "value": torch.ones(2)}, tmp_path / "old.pt")
    assert torch.equal(read(tmp_path / "old.pt")["value"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (numpy.float64(0.1), r"deep.a\[1\] is a numpy.float64, which torch.load"),
        (object(), r"deep.a\[1\] is a builtins.object"),
        ({numpy.int64(3): 1}, r"the key .*3.* of deep.a\[1\] is "),
        (nn.UninitializedParameter(), r"deep.a\[1\] is a torch.nn.parameter.Uninit"),
    ],
)
def test_what_could_never_be_read_again_is_not_written(value: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        write(tmp_path / "state.pt", {"fluxloop": 1, "deep": {"a": [1, value]}})
    assert list(tmp_path.iterdir()) == []


def test_the_first_difference_of_two_contents_is_told_with_its_path() -> None:
    written = {"a": [1, (2.0, float("nan"))], "b": {"c": None}}
    assert first_difference(written, copy.deepcopy(written)) is None
    for other, told in (
        ({"a": [1, (2.0, float("nan"))]}, "the keys of the state are ['a'], and were ['a', 'b']"),
        ({**written, "b": {"c": 0}}, "the state['b']['c'] was None and is 0"),
        ({**written, "a": [1]}, "the state['a'] has 1 items, and had 2"),
        ({**written, "a": [2, (2.0, float("nan"))]}, "the state['a'][0] was 1 and is 2"),
        ({**written, "a": [1, [2.0, float("nan")]]}, "the state['a'][1] was a tuple of length 2 and is a list"),
    ):
        assert told in str(first_difference(written, other))


def test_the_first_file_of_a_run_that_does_not_come_back_is_told_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def careless(state: Any, file: Any) -> None:
        save({**state, "seed": state["seed"] + 1}, file)

    monkeypatch.setattr("fluxloop.checkpoint.folder.torch.save", careless)
    xs = torch.rand(8, 3)
    learner = Learner(
        nn.Linear(3, 1),
        nn.functional.mse_loss,
        data=(TensorBatches(xs, xs.sum(1, keepdim=True), batch_size=4),),
        callbacks=[Checkpointer(tmp_path)],
        default_callbacks=False,
        seed=0,
    )
    with pytest.raises(CheckpointError, match=r"does not come back from there.*the state\['seed'\] was 0 and is 1"):
        learner.fit(1)
    assert list(tmp_path.glob("*.pt")) == []
    monkeypatch.undo()
    learner.fit(1)  # nothing is left in the way
