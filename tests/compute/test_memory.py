"""A step for which the memory does not suffice: its error, which models raise here, and the learner after it."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import Accelerator, Learner, TensorBatches, TrainingPhase, ValidationPhase, runstep
from fluxloop.compute.memory import OutOfMemoryError, is_out_of_memory

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Tight(nn.Module):
    """A model that has memory for so many rows, in the forward or in the backward pass."""

    def __init__(self, rows: int = 4, error: type[BaseException] = OutOfMemoryError, backward: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)
        self.rows, self.error, self.backward = rows, error, backward
        self.computed: list[Any] = []

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.first(xs).exp()
        self.computed.append(ref(hidden))
        out: Tensor = self.last(hidden.sin())
        if len(xs) > self.rows and not self.backward:
            self.fail(out)
        elif len(xs) > self.rows and out.requires_grad:
            out.register_hook(self.fail)  # before anything of the graph is let go of
        return out

    def fail(self, tensor: Tensor) -> None:
        raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")


def data(rows: int, batch_size: int) -> TensorBatches:
    torch.manual_seed(1)
    return TensorBatches(torch.randn(rows, 3), torch.randn(rows, 1), batch_size=batch_size)


def learner_of(model: nn.Module, **options: Any) -> Learner:
    options = {"accelerator": Accelerator("cpu"), "optimizer": SGD, **options}
    return Learner(model, mse_loss, data=(data(16, 4),), seed=3, default_callbacks=False, **options)


def notes(error: BaseException) -> str:
    return "\n".join(error.__notes__)


def test_the_error_keeps_its_type_and_says_what_the_step_was_and_what_takes_less() -> None:
    learner = learner_of(Tight())
    with pytest.raises(OutOfMemoryError, match="Tried to allocate") as caught:
        learner.fit(1, data=(data(16, 8),))
    told = notes(caught.value)
    assert told.count("out of memory") == 1
    assert "in a step with 8 rows of precision='fp32', accumulate=1, compile=False." in told
    for tip in (
        "batches of 4 rows with Accelerator(accumulate=2)",
        "precision='bf16'",
        "recompute_activations(model, 'blocks.*')",
        "find_batch_size(learner)",
        "the learner can be used on",
        "in TrainingPhase(), epoch 1, step 1",
    ):
        assert tip in told


def test_where_nothing_is_trained_the_advice_is_a_smaller_batch_alone() -> None:
    learner = learner_of(Tight())
    with pytest.raises(OutOfMemoryError) as caught:
        learner.evaluate(data(16, 8))
    assert "in a step with 8 rows of precision='fp32'.\n  To take less: batches of 4 rows." in notes(caught.value)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_errors_are_told_by_their_type_or_their_words(error: Any, found: bool) -> None:
    assert is_out_of_memory(error) is found


def test_what_torch_says_on_this_device_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


def test_other_errors_get_no_such_note() -> None:
    with pytest.raises(ValueError, match="Tried") as caught:
        learner_of(Tight(error=ValueError)).fit(1, data=(data(16, 8),))
    assert "out of memory" not in notes(caught.value)


class Holding(TrainingPhase):
    """A step of a user's own, with variables of its own."""

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.preds = learner.model(state.xs)
            loss = mse_loss(state.preds, state.ys)
            learner.backward(loss)
            learner.update()
        return loss


@pytest.mark.parametrize("phase", [TrainingPhase, Holding])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_the_step_lives_on_while_its_error_does(phase: type[TrainingPhase], backward: bool) -> None:
    model = Tight(backward=backward)
    learner = learner_of(model)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError) as caught:
            learner.fit(1, data=(data(16, 8),), phases=[phase()])
        assert [each() for each in model.computed] == [None]
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        gc.enable()
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("backward", [False, True])
def test_in_a_loop_of_the_users_own_the_step_is_let_go_of_as_well(backward: bool) -> None:
    model = Tight(backward=backward)
    learner, phase = learner_of(model), TrainingPhase()
    with pytest.raises(OutOfMemoryError) as caught:
        phase.step(learner, next(iter(data(16, 8))))
    assert [each() for each in model.computed] == [None]
    assert "in a step with 8 rows" in notes(caught.value)


@pytest.mark.parametrize("backward", [False, True])
def test_the_learner_trains_on_as_if_the_step_had_been_left_out(backward: bool) -> None:
    model = Tight(backward=backward)
    by_hand = copy.deepcopy(model)
    learner = learner_of(model)
    learner.fit(1)
    with pytest.raises(OutOfMemoryError):
        learner.fit(1, data=(data(16, 8),))
    learner.fit(1)
    optimizer = SGD(by_hand.parameters())
    for _ in range(2):
        for xs, ys in data(16, 4):
            optimizer.zero_grad()
            mse_loss(by_hand(xs), ys).backward()
            optimizer.step()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_steps_before_go_on_waiting() -> None:
    model = Tight(backward=True)
    learner, phase = learner_of(model), TrainingPhase()
    small, large = next(iter(data(4, 4))), next(iter(data(8, 8)))
    with runstep(learner, phase, xs=small[0], ys=small[1]) as (_, state):
        learner.backward(mse_loss(learner.model(state.xs), state.ys))
    waiting = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(OutOfMemoryError), runstep(learner, phase, xs=large[0], ys=large[1]) as (_, state):
        learner.backward(mse_loss(learner.model(state.xs), state.ys))
    for parameter, gradient in zip(model.parameters(), waiting, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_batch_of_a_window_that_does_not_fit_is_left_out_of_it() -> None:
    model = Tight(backward=True)
    by_hand, phase = copy.deepcopy(model), TrainingPhase()
    by_hand.rows = 100
    learner = learner_of(model, accelerator=Accelerator("cpu", accumulate=2))
    xs, ys = torch.randn(16, 3), torch.randn(16, 1)
    optimizer = SGD(by_hand.parameters())
    mse_loss(by_hand(torch.cat([xs[:4], xs[12:15]])), torch.cat([ys[:4], ys[12:15]])).backward()
    optimizer.step()
    for rows in (slice(0, 4), slice(4, 12), slice(12, 15)):
        with suppress(OutOfMemoryError):
            phase.step(learner, (xs[rows], ys[rows]))
    assert learner.updates.count == 1
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused", [None, False])
def test_an_optimizer_that_could_not_make_its_averages_makes_them_anew(
    fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tight()
    learner = learner_of(model, optimizer=partial(torch.optim.Adam, fused=fused))
    plain, calls = torch.zeros_like, []

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 4:  # of eight
            raise OutOfMemoryError("CUDA out of memory.")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", fails)
    with pytest.raises(OutOfMemoryError) as caught:
        learner.fit(1)
    assert "An optimizer was stepping: some weights may have moved" in notes(caught.value)
    learner.fit(1)
    assert all({"exp_avg", "exp_avg_sq"} <= set(learner.optimizer.state[each]) for each in model.parameters())


def test_a_validation_that_does_not_fit_leaves_the_training_usable() -> None:
    learner = learner_of(Tight())
    big = {"training": data(16, 4), "validation": data(16, 8)}
    with pytest.raises(OutOfMemoryError) as caught:
        learner.fit(1, data=big, phases=[TrainingPhase(), ValidationPhase()])
    assert "in ValidationPhase()" in notes(caught.value)
    learner.fit(1)
    assert learner.updates.count == 8
