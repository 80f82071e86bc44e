"""What a compiled step is given lies in memory as the graph takes it, or the step is refused before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_training import learner, mlp, weights
from torch import Tensor
from torch.nn import functional

from fluxloop import BackwardBegin, BackwardEnd, CompileError, LossBegin, TrainingPhase

pytestmark = pytest.mark.usefixtures("imported", "plain")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(5, 32, 16, generator=generator), torch.randint(4, (5, 32), generator=generator)
    return list(zip(xs, ys, strict=True))  # views of two tensors, each with a place of its own


class Phase(TrainingPhase):
    """Computes its predictions by a function, of the learner, the entries and the phase."""

    def __init__(self, function: Callable[[Any, Any, Any], Tensor]) -> None:
        self.function = function

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        state.preds = self.function(learner, state, self)
        handle(LossBegin())
        state.loss = learner.loss_fn(state.preds, state.ys)
        handle(BackwardBegin())
        learner.backward(state.loss)
        handle(BackwardEnd())
        learner.update()


def test_a_batch_that_is_a_view_of_a_weight_is_refused_where_the_graph_was_made_for_another() -> None:
    data = batches()
    made = learner(data=(data,))
    made.fit(1)
    data[3] = (made.model[0].weight.detach(), data[3][1])  # a weight of the same shape
    before = weights(made)
    with pytest.raises(CompileError, match=r"shares memory with a weight.*\.clone\(\)"):
        made.fit(1)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))  # by the steps before it
    data[3] = (made.model[0].weight.detach().clone(), data[3][1])
    made.fit(1)


@pytest.mark.parametrize("shares_at_first", [False, True])
def test_a_tensor_of_a_phase_shares_memory_with_a_weight_only_where_it_always_did(shares_at_first: bool) -> None:
    def anchored(learner: Any, state: Any, phase: Any) -> Tensor:
        pull: Tensor = (learner.model[0].weight - phase.anchor).sum()
        return learner.model(state.xs) + pull + phase.anchor.mean()

    found = []
    for compile in (False, "step"):
        made, phase = learner(compile, data=(batches(),)), Phase(anchored)
        phase.anchor = made.model[0].weight.detach() if shares_at_first else made.model[0].weight.detach().clone()
        made.fit(2, phases=[phase])
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    phase.anchor = phase.anchor.clone() if shares_at_first else made.model[0].weight.detach()
    before = weights(made)
    with pytest.raises(CompileError, match="shares memory"):
        made.fit(1, phases=[phase])
    # the first step of a fit is compared, and refused, before it runs
    assert all(map(torch.equal, before, weights(made)))


def test_entries_of_which_one_is_changed_share_memory_only_where_they_did() -> None:
    def shifted(learner: Any, state: Any, phase: Any) -> Tensor:
        state.xs.add_(1)
        return learner.model(state.xs + state.zs)

    class WithThree(Phase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return dict(zip(("xs", "ys", "zs"), batch, strict=True))

    data = [(xs.clone(), ys, xs.clone()) for xs, ys in batches()]
    made = learner(data=(data,))
    made.fit(1, phases=[WithThree(shifted)])
    data[3] = (data[3][0], data[3][1], data[3][0][:])
    with pytest.raises(CompileError, match="shares memory"):
        made.fit(1, phases=[WithThree(shifted)])


@pytest.mark.parametrize("begins", [0, None])
def test_as_strided_counts_from_where_memory_begins(begins: int | None) -> None:
    def strided(learner: Any, state: Any, phase: Any) -> Tensor:
        return learner.model(state.xs.as_strided((32, 16), (16, 1), begins))

    made = learner(data=(batches(),))
    if begins is None:
        made.fit(1, phases=[Phase(strided)])
    else:
        with pytest.raises(CompileError, match=r"as_strided.*leave storage_offset out"):
            made.fit(1, phases=[Phase(strided)])
    copied = learner(data=([(xs.clone(), ys) for xs, ys in batches()],))
    copied.fit(1, phases=[Phase(strided)])


def test_batches_that_are_views_of_one_tensor_fit() -> None:
    found = []
    for compile in (False, "step"):
        made = learner(compile, data=(batches(),), model=mlp, loss_fn=functional.cross_entropy)
        made.fit(2)
        found.append(weights(made))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
