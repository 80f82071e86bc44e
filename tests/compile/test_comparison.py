from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_training import ADAM, learner, mlp, rows, weights
from torch import Tensor, nn

import fluxloop.compile.graphs
from fluxloop import EMA, Accelerator, GradientClip, Learner, StopOnNaNLoss, TrainingPhase
from fluxloop.compile.comparison import apart, moved

pytestmark = pytest.mark.usefixtures("imported")


def told(how: dict[str, Any] | None = None, **options: Any) -> tuple[list[str], list[Tensor]]:
    """Train for one epoch; return the warnings about comparisons, and the weights."""
    made = learner("step", how={"check_compiled": True} if how is None else how, data=(rows(),), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(1)
    return [str(w.message) for w in caught if "compared with" in str(w.message)], weights(made)


def test_each_graph_is_compared_once_and_training_is_as_without(uncompiled: None) -> None:
    texts, checked = told()
    assert len(texts) == 2  # of full batches, and of the smaller last one
    assert all("TrainingPhase()" in text and "0.0e+00" in text and "which is rounding" in text for text in texts)
    silent, plain = told(how={})
    assert silent == []
    assert all(map(torch.equal, checked, plain))


def test_a_fault_of_the_compiler_is_told_by_the_name_of_what_it_falsified(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(graph: Any, inputs: list[Tensor], device: torch.device) -> Any:
        def run(*inputs: Tensor) -> list[Tensor]:
            before = inputs[0].clone()
            outputs = list(torch.no_grad()(graph)(*inputs))
            with torch.no_grad():
                inputs[0].copy_(before + 0.5 * (inputs[0] - before))  # half of the way
            return outputs

        return run

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", faulty)
    texts, _ = told()
    assert "5.0e-01 of what the step computes or changes, in 0.weight, which is no rounding" in texts[0]


def test_steps_that_draw_random_numbers_are_said_not_to_be_compared(uncompiled: None) -> None:
    texts, _ = told(model=lambda: nn.Sequential(mlp(), nn.Dropout()))
    assert texts
    assert all("was not compared" in text and "draws random numbers" in text for text in texts)


def test_the_compilers_own_step_is_within_rounding() -> None:
    texts, _ = told()
    assert texts
    assert all("which is rounding" in text for text in texts)


def convolution() -> nn.Module:
    """A bias before batch norm, whose gradient is zero: what it has is rounding, which Adam makes steps of."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4)
    )


def test_what_is_rounding_through_and_through_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[float] = []

    def noisy(graph: Any, inputs: list[Tensor], device: torch.device) -> Any:
        def run(*inputs: Tensor) -> list[Tensor]:
            rounded = [moved(tensor, 0.0) if tensor.dim() > 1 else tensor for tensor in inputs]
            outputs = list(torch.no_grad()(graph)(*rounded))
            with torch.no_grad():
                for tensor, other in zip(inputs, rounded, strict=True):
                    tensor.copy_(other)
                for fault in faults:
                    inputs[0].mul_(fault)
            return outputs

        return run

    monkeypatch.setattr(fluxloop.compile.graphs, "lower", noisy)
    texts, _ = told(model=convolution, optimizer=ADAM)
    assert all("which is rounding: inputs that differ by their last digits" in text for text in texts)
    faults.append(1.01)
    texts, _ = told(model=convolution, optimizer=ADAM)
    assert all("in 1.weight, which is no rounding" in text for text in texts)


def test_a_comparison_that_is_an_error_leaves_all_as_it_was(uncompiled: None) -> None:
    made = learner("step", how={"check_compiled": True}, data=(rows(),), optimizer=ADAM)
    made.epoch(TrainingPhase(), [tuple(each[:32] for each in rows())])
    before, count = weights(made), made.updates.count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="which is rounding"):
            made.epoch(TrainingPhase(), [tuple(each[:32] for each in rows())])
    assert all(map(torch.equal, before, weights(made)))
    assert made.updates.count == count


def test_a_copy_a_resumed_run_and_windows_are_compared_too(uncompiled: None, tmp_path: Path) -> None:
    def make() -> Learner[Any]:
        how = {"check_compiled": True, "accumulate": 3, "precision": "bf16"}
        callbacks = [EMA("model", 0.9), GradientClip(1.0), StopOnNaNLoss()]
        return learner("step", how=how, data=(rows(),), callbacks=callbacks, default_callbacks=False, optimizer=ADAM)

    def compared(run: Any) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        texts = [str(w.message) for w in caught if "compared with" in str(w.message)]
        assert all("0.0e+00" in text for text in texts)
        return len(texts)

    whole = make()
    num_graphs = compared(lambda: whole.fit(3))
    assert num_graphs >= 3
    whole.save(tmp_path / "half.pt")
    copied, resumed = copy.deepcopy(whole), make()
    compared(lambda: resumed.fit(1))
    resumed.load(tmp_path / "half.pt")
    for other in (whole, copied, resumed):
        assert compared(lambda: other.fit(1)) <= num_graphs + 1  # noqa: B023 - called at once
    for a, b, c in zip(*map(weights, (whole, copied, resumed)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("compile", [False, "model"])
def test_there_has_to_be_a_graph_to_compare(compile: Any) -> None:
    with pytest.raises(ValueError, match="expected compile='step'"):
        Accelerator("cpu", compile=compile, check_compiled=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "before", "expected"),
    [
        ([2.0], [2.0], [0.0], 0.0),
        ([1.0], [2.0], [0.0], 0.5),
        ([1.0], [1.0], [1.0], 0.0),
        ([2.0], [1.0], [1.0], math.inf),
        ([math.nan], [math.nan], [0.0], 0.0),
        ([math.nan], [1.0], [0.0], math.inf),
        ([math.inf], [1.0], [0.0], math.inf),
        ([], [], [], 0.0),
    ],
)
def test_a_difference_is_a_share_of_the_way(
    ours: list[float], theirs: list[float], before: list[float], expected: float
) -> None:
    assert apart(torch.tensor(ours), torch.tensor(theirs), torch.tensor(before)) == expected
