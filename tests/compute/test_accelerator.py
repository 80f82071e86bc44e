from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import fluxloop.compute.accelerator
from fluxloop import AbstractTrainingPhase, Accelerator, BatchError, Learner, runstep
from fluxloop.nested import tensors
from fluxloop.testing import Coefficient, assert_same_bits, toy_learner
from processes.launching import run

Pair = namedtuple("Pair", ["left", "right"])


@attrs.define
class Views:
    first: torch.Tensor
    others: list[torch.Tensor]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(*, gpus: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "device"),
    [(0, False, "cpu"), (0, True, "mps:0"), (2, False, "cuda:0"), (1, True, "cuda:0")],
)
def test_auto_takes_the_fastest_device_of_the_machine(machine: Any, gpus: int, mps: bool, device: str) -> None:
    machine(gpus=gpus, mps=mps)
    assert Accelerator().device == torch.device(device)
    assert Accelerator("auto").device == torch.device(device)


@pytest.mark.parametrize(
    ("asked", "device"),
    [("cpu", "cpu"), (torch.device("cpu"), "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps:0")],
)
def test_a_device_asked_for_is_taken_with_the_index_that_its_tensors_have(
    machine: Any, asked: Any, device: str
) -> None:
    machine(gpus=2, mps=True)
    assert Accelerator(asked).device == torch.device(device)
    assert repr(Accelerator(asked)) == f"Accelerator(device={device!r})"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("cuda", "device='cuda' was given, but CUDA is not available; expected 'auto' or 'cpu'"),
        ("cuda:1", "device='cuda:1' was given, but CUDA is not available"),
        (torch.device("cuda"), "device='cuda' was given, but CUDA is not available"),
        ("mps", "device='mps' was given, but MPS is not available; expected 'auto' or 'cpu'"),
        ("xpu", "device='xpu' was given.*not available"),
        ("gpu", "'gpu'.*was given.*'auto'"),
        ("", "''.*was given.*'auto'"),
        (None, "None.*was given.*'auto'"),
    ],
    ids=["cuda", "cuda:1", "device", "mps", "xpu", "unknown", "empty", "None"],
)
def test_a_device_that_is_not_there_is_an_error_that_names_it(machine: Any, asked: Any, words: str) -> None:
    machine()
    with pytest.raises(ValueError, match=words):
        Accelerator(asked)


def test_a_gpu_beyond_those_of_the_machine_is_an_error_that_names_it(machine: Any) -> None:
    machine(gpus=2)
    with pytest.raises(ValueError, match=r"device='cuda:5' was given.*2"):
        Accelerator("cuda:5")


def test_entries_are_placed_in_nested_containers_too() -> None:
    entries: dict[str, Any] = {
        "xs": torch.zeros(2),
        "views": (torch.zeros(2), [torch.zeros(2)], {"a": torch.zeros(2)}),
        "pair": Pair(torch.zeros(2), None),
        "object": Views(torch.zeros(2), [torch.zeros(2)]),
        "weights": nn.Parameter(torch.zeros(2)),
        "names": ["a", "b"],
        "count": 3,
    }
    names = entries["names"]
    Accelerator("meta").place(entries)
    placed = list(tensors(entries))
    assert len(placed) == 8
    assert {tensor.device.type for tensor in placed} == {"meta"}
    assert isinstance(entries["pair"], Pair)
    assert isinstance(entries["object"], Views)
    assert entries["names"] is names
    assert entries["count"] == 3


def test_what_lies_on_the_device_already_is_not_copied() -> None:
    given = {"xs": torch.zeros(2), "nest": (torch.zeros(2), {"a": torch.zeros(1)}), "pair": Pair(torch.zeros(2), 1)}
    entries = dict(given)
    Accelerator("cpu").place(entries)
    assert all(entries[name] is given[name] for name in given)


def test_a_batch_is_not_changed_by_being_placed() -> None:
    views = [torch.zeros(2), torch.zeros(2)]
    Accelerator("meta").place({"views": views})
    assert [view.device.type for view in views] == ["cpu", "cpu"]


def test_a_packed_sequence_is_placed_with_its_batch_sizes_left_on_the_cpu() -> None:
    entries = {"xs": nn.utils.rnn.pack_sequence([torch.zeros(3, 1), torch.zeros(2, 1)])}
    Accelerator("meta").place(entries)
    assert entries["xs"].data.device.type == "meta"
    assert entries["xs"].batch_sizes.device.type == "cpu"


class LooksAround(AbstractTrainingPhase):
    devices: set[str]

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, batch=batch, more={"views": [batch, batch]}) as (_, state):
            self.devices = {tensor.device.type for tensor in tensors(vars(state))}


def test_a_step_gets_its_entries_on_the_device() -> None:
    learner = Learner(Coefficient(), data=([torch.zeros(2, 1)],), accelerator=Accelerator("meta"), seed=0)
    phase = LooksAround()
    learner.epoch(phase)
    assert phase.devices == {"meta"}


def test_models_and_a_loss_module_are_moved_in_place() -> None:
    models = {"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2)}
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))
    learner = Learner(models, loss, accelerator=Accelerator("meta"))
    assert learner.model.a is models["a"]
    assert learner.loss_fn is loss
    moved = [*models["a"].parameters(), *models["b"].buffers(), loss.weight]
    assert {tensor.device.type for tensor in moved} == {"meta"}


def test_the_optimizer_holds_the_parameters_of_the_moved_model() -> None:
    model = nn.Linear(2, 2)
    learner = Learner(model, nn.functional.mse_loss, accelerator=Accelerator("meta"))
    held = learner.optimizer.param_groups[0]["params"]
    assert [id(parameter) for parameter in held] == [id(parameter) for parameter in model.parameters()]


def test_backward_adds_the_gradients_of_the_given_parameters_alone() -> None:
    a, b = Coefficient(2.0), Coefficient(3.0)
    loss = (a(torch.ones(1, 1)) * b(torch.ones(1, 1))).sum()
    Accelerator("cpu").backward(loss, [a.value])
    assert a.value.grad is not None
    assert a.value.grad.item() == 3.0
    assert b.value.grad is None


def test_backward_adds_the_gradients_of_all_that_the_loss_reaches() -> None:
    a, b = Coefficient(2.0), Coefficient(3.0)
    for _ in range(2):
        loss = (a(torch.ones(1, 1)) * b(torch.ones(1, 1))).sum()
        Accelerator("cpu").backward(loss, [a.value, b.value], alone=True)
    assert (a.value.grad.item(), b.value.grad.item()) == (6.0, 4.0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_an_update_is_the_optimizers_own_step(make: Any) -> None:
    ours, reference = Coefficient(1.0), Coefficient(1.0)
    optimizer, plain = make(ours.parameters(), lr=0.1), make(reference.parameters(), lr=0.1)
    for gradient in (1.0, -2.0, 0.5):
        ours.value.grad = torch.tensor([gradient])
        reference.value.grad = torch.tensor([gradient])
        Accelerator("cpu").update(optimizer)
        plain.step()
        assert torch.equal(ours.value, reference.value)


def test_the_device_is_chosen_when_none_is_given(machine: Any) -> None:
    machine()
    chosen, plain = toy_learner(accelerator=Accelerator("cpu")), toy_learner()
    assert plain.accelerator.device == torch.device("cpu")
    chosen.fit(1)
    plain.fit(1)
    assert_same_bits(chosen, plain)


def test_batches_for_cuda_are_copied_from_pinned_memory_by_a_stream_that_the_computing_one_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            did.append("wait")

    class OnCpu:
        is_cpu, device = True, torch.device("cpu")

        def __init__(self, pinned: bool) -> None:
            self.pinned = pinned

        def is_pinned(self) -> bool:
            return self.pinned

        def pin_memory(self) -> OnCpu:
            did.append("pin")
            return OnCpu(True)

        def to(self, device: torch.device, non_blocking: bool) -> OnCpu:
            assert self.pinned
            assert non_blocking
            did.append(f"copy to {device}")
            return self

        def record_stream(self, stream: object) -> None:
            did.append("record")

    @contextmanager
    def stream(entered: object) -> Iterator[None]:
        did.append("enter")
        yield
        did.append("leave")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(fluxloop.compute.accelerator, "_copy_stream", lambda device: Stream())
    accelerator = Accelerator("cpu")
    accelerator.device = torch.device("cuda", 0)
    accelerator._move(OnCpu(pinned=False))  # type: ignore[arg-type]  # it stands for a tensor
    assert did == ["pin", "enter", "copy to cuda:0", "leave", "wait", "record"]
    did.clear()
    accelerator._move(OnCpu(pinned=True))  # type: ignore[arg-type]  # as above
    assert did == ["enter", "copy to cuda:0", "leave", "wait", "record"]


class Graphs:
    """A batch of a class of its own, as libraries for graphs have: it moves itself."""

    def __init__(self, xs: torch.Tensor) -> None:
        self.xs = xs
        self.moved: list[torch.device] = []

    def to(self, device: torch.device) -> Graphs:
        new = Graphs(self.xs.to(device))
        new.moved = [*self.moved, device]
        return new


class InPlace(Graphs):
    def to(self, device: torch.device) -> None:  # type: ignore[override]  # some give nothing
        self.moved.append(device)


@attrs.define(eq=False)
class Fields:
    xs: torch.Tensor
    moved: bool = False

    def to(self, device: torch.device) -> Fields:
        return Fields(self.xs.to(device), True)


def placed(**entries: Any) -> dict[str, Any]:
    Accelerator("meta").place(entries)
    return entries


def test_a_batch_with_a_way_to_a_device_of_its_own_is_moved() -> None:
    given = Graphs(torch.ones(2))
    entries = placed(batch=given, nested={"pair": (Graphs(torch.ones(1)), 3)}, fields=Fields(torch.ones(1)))
    assert entries["batch"].xs.device.type == entries["fields"].xs.device.type == "meta"
    assert entries["nested"]["pair"][0].xs.device.type == "meta"
    assert entries["nested"]["pair"][1] == 3
    assert entries["fields"].moved
    assert given.xs.device.type == "cpu"
    in_place = InPlace(torch.ones(1))
    assert placed(batch=in_place)["batch"] is in_place
    assert in_place.moved == [torch.device("meta")]


def test_modules_and_classes_in_a_step_are_not_moved_as_a_batch_is() -> None:
    module = nn.Linear(1, 1)
    assert placed(module=module, kind=Graphs) == {"module": module, "kind": Graphs}
    assert module.weight.device.type == "cpu"


def test_an_entry_that_cannot_be_moved_is_named() -> None:
    class Frozen(dict[str, Any]):
        def __init__(self) -> None:
            super().__init__(xs=torch.ones(1))

        def __setitem__(self, key: Any, value: Any) -> None:
            raise TypeError("frozen")

    with pytest.raises(BatchError, match=r"the entry 'batch', a Frozen.*'meta'.*gives no copy"):
        placed(batch=Frozen())
    with pytest.raises(BatchError, match=r"the entry 'length', a Length.*takes 1 positional argument"):
        placed(length=Length())


class Length:
    """Has a ``to`` that takes no device."""

    def to(self) -> None:
        raise AssertionError


def test_a_model_trains_on_batches_that_move_themselves() -> None:
    class Step(AbstractTrainingPhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"graphs": batch}

        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.backward(learner.model(state.graphs.xs).sum())
            learner.update()

    learner = toy_learner(data=([Graphs(torch.ones(2, 1))],))
    learner.fit(1, phases=[Step()])
    assert learner.step.graphs.moved == [torch.device("cpu")]


@pytest.mark.parametrize("checks", [True, False])
def test_to_compile_a_model_leaves_the_checks_of_distributions_as_they_were(
    checks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution: Any = torch.distributions.Distribution

    def switching_off(function: Any) -> Any:  # as the first torch.compile of a process does
        distribution.set_default_validate_args(False)
        return function

    monkeypatch.setattr(torch, "compile", switching_off)
    monkeypatch.setattr(distribution, "_validate_args", checks)
    learner = toy_learner(accelerator=Accelerator("cpu", compile="model"))
    assert distribution._validate_args is checks
    learner.fit(1)
    assert distribution._validate_args is checks


@pytest.mark.slow
def test_distributions_check_their_arguments_after_torchs_compiler_has_run() -> None:
    script = """
        import torch
        from fluxloop import Accelerator
        from fluxloop.testing import toy_learner
        toy_learner(accelerator=Accelerator("cpu", compile="model"))
        try:
            torch.distributions.Normal(0.0, -1.0)
        except ValueError:
            print("refused")
    """
    assert run(script, None, timeout=300, WARM="0").outputs[0].strip().endswith("refused")
