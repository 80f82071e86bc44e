"""A compiled step called without torch's layers: only where they do nothing, and with what they do kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fluxloop.compile.direct import Call
from fluxloop.compile.graphs import lower

pytestmark = pytest.mark.usefixtures("imported")

Layers = Callable[[Callable[[list[Tensor]], Any], tuple[Tensor, ...]], Any]


class Inner:
    """Stands for the function inside of torch's layers: it adds the second input to the first, and doubles that."""

    def __init__(self) -> None:
        self.calls = 0
        self.current_callable: Any = self._run

    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        weight, step = inputs
        inputs.clear()
        assert not torch.is_grad_enabled()
        weight.data.add_(step)  # as kernels change memory: autograd counts nothing
        return [weight.data * 2]


def in_layers(layers: Layers | None = None) -> tuple[Inner, Callable[..., Any], list[int]]:
    """Put an inner function into layers as torch's; also list where the layers were gone through."""
    inner, gone_through = Inner(), list[int]()

    def compiled(*inputs: Tensor) -> Any:
        gone_through.append(1)
        with torch.no_grad():
            if layers is not None:
                return layers(lambda given: inner.current_callable(given), inputs)
            return inner.current_callable(list(inputs))

    compiled.__wrapped__ = inner  # type: ignore[attr-defined]  # as torch's layers say what they are around
    return inner, compiled, gone_through


def test_the_first_call_goes_through_all_layers_and_later_ones_past_them() -> None:
    inner, compiled, gone_through = in_layers()
    weight, step = torch.zeros(3, requires_grad=True), torch.ones(3)
    call = Call(compiled, [weight])
    outputs = [call.first([weight, step], 1), call([weight, step]), call([weight, step])]
    assert call.is_direct
    assert (len(gone_through), inner.calls) == (1, 3)
    assert [output[0].tolist() for output in outputs] == [[2.0] * 3, [4.0] * 3, [6.0] * 3]
    assert torch.is_grad_enabled()
    assert weight._version == 3


def doubled_output(run: Callable[[list[Tensor]], Any], inputs: tuple[Tensor, ...]) -> Any:
    return [*run(list(inputs)), inputs[0]]


def another_output(run: Callable[[list[Tensor]], Any], inputs: tuple[Tensor, ...]) -> Any:
    return [output.view(-1) for output in run(list(inputs))]


def another_input(run: Callable[[list[Tensor]], Any], inputs: tuple[Tensor, ...]) -> Any:
    return run([inputs[0].detach(), inputs[1]])


def twice(run: Callable[[list[Tensor]], Any], inputs: tuple[Tensor, ...]) -> Any:
    run(list(inputs))
    return run(list(inputs))


@pytest.mark.parametrize("layers", [doubled_output, another_output, another_input, twice])
def test_layers_that_do_something_are_gone_through_at_each_call(layers: Layers) -> None:
    _, compiled, gone_through = in_layers(layers)
    weight, step = torch.zeros(3, requires_grad=True), torch.ones(3)
    call = Call(compiled, [weight])
    call.first([weight, step], 1)
    call([weight, step])
    assert not call.is_direct
    assert len(gone_through) == 2
    assert weight._version == 2


def test_a_step_that_runs_under_autocast_keeps_the_layer_that_switches_it_off() -> None:
    _, compiled, _ = in_layers()
    weight, step = torch.zeros(3), torch.ones(3)
    call = Call(compiled, [weight])
    with torch.autocast("cpu", torch.bfloat16):
        call.first([weight, step], 1)
    assert not call.is_direct


def test_an_error_at_the_first_call_or_a_later_one_leaves_all_as_it_was() -> None:
    inner, compiled, _ = in_layers()
    own = inner.current_callable
    weight = torch.zeros(3)
    call = Call(compiled, [weight])
    with pytest.raises(RuntimeError, match="must match"):
        call.first([weight, torch.ones(2)], 1)
    assert inner.current_callable is own
    call.first([weight, torch.ones(3)], 1)
    with pytest.raises(RuntimeError, match="must match"):
        call([weight, torch.ones(2)])
    assert torch.is_grad_enabled()


def test_what_has_no_layers_is_called_as_it_is() -> None:
    call = Call(lambda *inputs: [inputs[0] + 1], [])
    assert call.first([torch.zeros(1)], 1)[0].item() == 1
    assert not call.is_direct
    assert next(iter(call([torch.ones(1)]))).item() == 2


@pytest.mark.slow
def test_changes_that_torchs_own_layers_count_are_counted_without_them() -> None:
    def step(weight: Tensor, average: Tensor, rows: Tensor) -> list[Tensor]:
        weight.sub_(0.1 * rows.sum())
        average.lerp_(weight, 0.5)
        rows.mul_(2)
        return [weight.sum()]

    def inputs() -> list[Tensor]:
        return [torch.ones(3), torch.zeros(3), torch.ones(3)]

    graph = make_fx(step, tracing_mode="fake")(*inputs())
    given = inputs()
    call = Call(lower(graph, inputs(), torch.device("cpu")), [])
    call.first(given, 2)
    assert call.is_direct
    rows = torch.ones(3)
    given[2] = rows
    before = [tensor._version for tensor in given]
    call(list(given))
    assert all(tensor._version > old for tensor, old in zip(given, before, strict=True))
    assert rows.tolist() == [2.0] * 3
    graph_before = (given[0].clone().requires_grad_() * given[1]).sum()  # it needs the average as it is now
    call([given[0], given[1], torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph_before.backward()


@pytest.mark.slow
def test_normal_numbers_are_those_of_an_eager_step_on_the_cpu() -> None:
    def step(rows: Tensor) -> list[Tensor]:
        return [rows + torch.randn(4, 5), torch.randn_like(rows)]

    rows = torch.zeros(4, 5)
    compiled = lower(make_fx(step, tracing_mode="fake")(rows), [rows], torch.device("cpu"))
    call = Call(compiled, [])
    for number in range(3):
        torch.manual_seed(number)
        found = call.first([rows], 0) if number == 0 else list(call([rows]))
        after = torch.rand(1)
        torch.manual_seed(number)
        wanted = step(rows)
        assert all(map(torch.equal, found, wanted))
        assert torch.equal(torch.rand(1), after)
