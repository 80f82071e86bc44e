from __future__ import annotations

from typing import Any

import pytest
from compiled_training import learner
from torch import nn

from fluxloop import Accelerator, CompileError, Learner


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({"precision": "fp16"}, "precision='fp16'", "precision='bf16'"),
    ],
)
def test_what_no_graph_can_hold_is_refused_by_name(options: dict[str, Any], given: str, expected: str) -> None:
    with pytest.raises(CompileError, match=rf"compile='step'\) was given with {given}: .*Expected {expected}"):
        Learner(nn.Linear(2, 1), accelerator=Accelerator("cpu", compile="step", **options))
    Learner(nn.Linear(2, 1), accelerator=Accelerator("cpu", **options))


def test_ways_of_its_own_are_refused() -> None:
    class Own(Accelerator):
        def update(self, *given: Any, **named: Any) -> None:
            super().update(*given, **named)

    with pytest.raises(CompileError, match="Own has a backward or update of its own"):
        Learner(nn.Linear(2, 1), accelerator=Own("cpu", compile="step"))
    assert learner().accelerator.compile == "step"
