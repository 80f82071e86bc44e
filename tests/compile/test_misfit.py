"""What a graph rests on is found again at each step, by who it is and by what it says."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fluxloop import TrainingPhase, ValidationPhase
from fluxloop.compile.conditions import holders_of
from fluxloop.compile.misfit import Holders, Options, Reads


def test_holders_are_found_as_they_are_named_also_where_a_phase_has_changed() -> None:
    phase: Any = TrainingPhase()
    callback: Any = object()
    holders = Holders([callback])
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(phase, "count", 1),
        lambda: setattr(phase, "twin", ValidationPhase()),
        lambda: setattr(phase, "count", ValidationPhase()),
        lambda: setattr(phase, "twin", 3),
        lambda: delattr(phase, "count"),
    ]
    for change in changes:
        change()
        for _ in range(2):
            found = holders.of(phase)
            wanted = [*holders_of(phase), callback]
            assert len(found) == len(wanted)
            assert all(a is b for a, b in zip(found, wanted, strict=True))


def reads_of(holder: Any, *names: str, held: tuple[str, ...] = ()) -> Reads:
    return Reads({(0, name): getattr(holder, name) for name in names}, [(0, name) for name in held], [holder])


@pytest.mark.parametrize("names", [("rate",), ("rate", "kind", "sizes")])
def test_reads_fit_until_one_says_something_else(names: tuple[str, ...]) -> None:
    holder = SimpleNamespace(rate=0.5, kind="a", sizes=[1, 2])
    reads = reads_of(holder, *names)
    assert reads.misfit([holder]) is None
    other = SimpleNamespace(rate=float("0.5"), kind="".join(["a"]), sizes=[1, 2])  # equal, and other objects
    assert reads.misfit([other]) is None
    holder.rate = 0.25
    assert "rate = 0.25, which was 0.5" in str(reads.misfit([holder]))
    del holder.rate
    assert "rate = None, which was 0.5" in str(reads.misfit([holder]))


def test_a_list_that_was_read_and_changes_in_place_is_no_fit() -> None:
    holder = SimpleNamespace(sizes=[1, 2])
    reads = reads_of(holder, "sizes")
    holder.sizes.append(3)
    assert "sizes = [1, 2, 3]" in str(reads.misfit([holder]))


def test_a_tensor_that_is_held_fits_by_its_form() -> None:
    holder: Any = SimpleNamespace(queue=torch.zeros(3))
    reads = reads_of(holder, held=("queue",))
    holder.queue = torch.ones(3)
    assert reads.misfit([holder]) is None
    holder.queue = torch.ones(4)
    assert reads.misfit([holder]) == "the shape of SimpleNamespace.queue"
    holder.queue = None
    assert reads.misfit([holder]) == "the shape of SimpleNamespace.queue"


def slot_of(**options: Any) -> Any:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, **options)
    return SimpleNamespace(optimizer=optimizer, label="the optimizer")


def test_options_fit_until_one_changes_comes_or_goes() -> None:
    slot = slot_of(momentum=0.9)
    group = slot.optimizer.param_groups[0]
    options = Options([slot], {(id(group), "lr")})
    group["lr"] = 0.2  # an input of the graph
    assert options.misfit() is None
    group["momentum"] = 0.8
    assert options.misfit() == "the optimizer: momentum = 0.8"
    group["momentum"] = 0.9
    assert options.misfit() is None
    group["note"] = 1
    assert options.misfit() is not None
    del group["note"]
    assert options.misfit() is None
    del group["momentum"]
    assert options.misfit() == "the optimizer: momentum = None"
    slot.optimizer.param_groups[0] = {**group, "momentum": 0.9}
    assert options.misfit() == "the groups of the optimizer"


def test_a_group_whose_options_are_all_inputs_fits_until_another_comes() -> None:
    slot = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"params": [], "lr": 0.1}]), label="the optimizer")
    group = slot.optimizer.param_groups[0]
    options = Options([slot], {(id(group), "lr")})  # type: ignore[list-item]  # it stands for one
    assert options.misfit() is None
    group["momentum"] = 0.9
    assert options.misfit() is not None


def test_a_momentum_that_is_an_input_fits_while_there_is_some() -> None:
    slot = slot_of(momentum=0.9)
    group = slot.optimizer.param_groups[0]
    options = Options([slot], {(id(group), "lr"), (id(group), "momentum")})
    group["momentum"] = 0.8
    assert options.misfit() is None
    group["momentum"] = 0.0
    assert options.misfit() == "the optimizer: momentum = 0.0"


def test_an_option_that_changes_inside_of_its_list_is_no_fit() -> None:
    slot = slot_of()
    group = slot.optimizer.param_groups[0]
    group["scales"] = [1, 2]
    options = Options([slot], set())
    assert options.misfit() is None
    group["scales"][1] = 3
    assert options.misfit() == "the optimizer: scales = [1, 3]"
