"""What a user says of sharded parameters."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fluxloop import Accelerator, Shard


def test_units_are_classes_and_names_alone_or_several() -> None:
    assert Shard(nn.Linear).units == Shard(units=[nn.Linear]).units == (nn.Linear,)
    assert Shard(units=(nn.Linear, "head")).units == (nn.Linear, "head")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"units": 3}, "expected classes of modules, or names of parts"),
        ({"units": (nn.Linear(2, 2),)}, "expected classes of modules, or names of parts"),
        ({"units": int}, "expected classes of modules, or names of parts"),
        ({"units": nn.Linear, "min_parameters": 10}, "expected one"),
        ({"min_parameters": 0}, "expected a whole number"),
        ({"min_parameters": 1e6}, "expected a whole number"),
        ({"replicas": 0}, "expected a whole number from 1"),
        ({"replicas": "node"}, "'nodes', a copy in each node"),
        ({"offload": 1}, "expected True or False"),
    ],
)
def test_anything_else_is_refused_in_words(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Shard(**given)


def test_copies_divide_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard().num_replicas(8) == 1
    assert Shard(replicas=4).num_replicas(8) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Shard(replicas="nodes").num_replicas(8) == 2
    with pytest.raises(ValueError, match="8 processes; expected a number that divides it"):
        Shard(replicas=3).num_replicas(8)


@pytest.mark.parametrize("strategy", ["shard", Shard(nn.Linear)])
def test_in_one_process_nothing_is_sharded(strategy: Any) -> None:
    accelerator = Accelerator("cpu", strategy=strategy, compile="step")
    assert accelerator.sharding is None
    assert "strategy=" in repr(accelerator)
