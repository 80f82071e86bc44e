"""Norms and clipping of gradients that are whole; of sharded ones `test_sharded_updates` has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fluxloop.compute.clipping import clip_norm, norm_of


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for parameter in made[:2]:
        parameter.grad = torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_whole_gradients_are_clipped_to_the_bits_of_torch(norm_type: float) -> None:
    ours, theirs = parameters(), parameters()
    assert torch.equal(clip_norm(ours, 0.5, norm_type), clip_grad_norm_(theirs, 0.5, norm_type))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0, float("inf")])
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "of two types", "with a graph", "transposed", "nan", "inf"])
def test_gradients_of_every_kind_are_clipped_to_the_bits_of_torch(kind: str, largest: float) -> None:
    ours, theirs = parameters(), parameters()
    for made in (ours, theirs):
        if kind in ("float64", "bfloat16"):
            for parameter in made:
                parameter.data = parameter.data.to(getattr(torch, kind))
                parameter.grad = None if parameter.grad is None else parameter.grad.to(parameter.dtype)
        elif kind == "of two types":
            made[2].data = made[2].data.double()
            made[2].grad = torch.ones_like(made[2])
        elif kind == "with a graph":
            (made[0].grad,) = torch.autograd.grad((made[0] ** 3).sum(), made[:1], create_graph=True)
        elif kind == "transposed":
            made[0].grad = torch.arange(12.0).reshape(4, 3).T
        elif made[0].grad is not None:
            made[0].grad[0, 0] = float(kind)
    norms = clip_norm(ours, largest, 2.0), clip_grad_norm_(theirs, largest, 2.0)
    assert torch.equal(*(norm.nan_to_num(-1.0) for norm in norms))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad.nan_to_num(-1.0), b.grad.nan_to_num(-1.0))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_the_norm_of_all_gradients_is_that_of_one_vector(norm_type: float) -> None:
    gradients = [parameter.grad for parameter in parameters() if parameter.grad is not None]
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(norm_of(gradients, norm_type), torch.linalg.vector_norm(vector, norm_type))


def test_no_gradients_have_no_length() -> None:
    assert norm_of([], 2.0) == 0
