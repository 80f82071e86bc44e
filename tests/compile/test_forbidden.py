from __future__ import annotations

import gc
import random
import secrets
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fluxloop.compile.forbidden import AsTried, noting_draws
from fluxloop.errors import CompileError

pytestmark = pytest.mark.usefixtures("all_known")

RNG = numpy.random.default_rng(0)
OLDER = numpy.random.RandomState(0)
PYTHONS = random.Random(0)


class Subclass(random.Random):
    """Somebody's own."""


class Holder:
    """Holds generators where attributes alone do not show them."""

    of_the_class = Subclass(0)

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(1)
        self.many = {"a": [random.Random(3)]}


HOLDER = Holder()


def closed_over() -> Callable[[], Any]:
    mine = numpy.random.default_rng(2)
    return lambda: mine.normal()


DRAW_IN_CLOSURE = closed_over()


def noted(draw: Callable[[], Any]) -> list[str]:
    with noting_draws() as found:
        draw()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "place"),
    [
        (lambda: RNG.normal(), "test_forbidden.RNG"),
        (lambda: OLDER.rand(), "test_forbidden.OLDER"),
        (lambda: PYTHONS.gauss(0, 1), "test_forbidden.PYTHONS"),
        (lambda: random.shuffle([1, 2, 3]), "Python's random module"),
        (lambda: random.seed(1), "Python's random module"),
        (lambda: numpy.random.permutation(4), "numpy.random"),
        (lambda: HOLDER.rng.integers(4), "Holder.rng"),
        (lambda: HOLDER.of_the_class.random(), "of_the_class"),
        (lambda: HOLDER.many["a"][0].random(), "a Random"),
        (DRAW_IN_CLOSURE, "'mine' of closed_over"),
        (lambda: secrets.randbelow(4), "the operating system's"),
        (lambda: numpy.random.default_rng().normal(), "the operating system's"),
    ],
)
def test_random_numbers_are_noted_with_where_they_come_from(draw: Callable[[], Any], place: str) -> None:
    (found,) = set(noted(draw))
    assert place in found


@pytest.mark.slow
def test_numbers_of_a_generator_that_is_made_with_a_seed_are_the_same_at_each_step_anyway() -> None:
    assert noted(lambda: numpy.random.default_rng(0).normal()) == []
    assert noted(lambda: random.Random(0).random()) == []


@pytest.mark.slow
def test_a_normal_number_that_was_in_store_is_noted() -> None:
    generator = numpy.random.RandomState(0)
    generator.normal()  # puts a second one in store
    assert noted(generator.normal) == ["a RandomState"]


def test_looking_at_generators_draws_nothing_and_what_was_patched_is_put_back() -> None:
    states = random.getstate(), RNG.bit_generator.state, random._urandom  # type: ignore[attr-defined]  # private
    assert noted(lambda: None) == []
    assert states == (random.getstate(), RNG.bit_generator.state, random._urandom)  # type: ignore[attr-defined]


def test_a_generator_that_the_garbage_collector_does_not_know_is_noted_where_it_is_in_reach() -> None:
    generator = random.Random(0)
    gc.freeze()
    try:
        with noting_draws([generator]) as found:
            generator.random()
    finally:
        gc.unfreeze()
    assert found == ["a Random"]


# Function transforms


def refuse(why: str) -> CompileError:
    return CompileError(why)


def energy(x: Tensor) -> Tensor:
    return x.sin().sum()


@pytest.mark.parametrize(
    "compute",
    [
        lambda xs: grad(energy)(xs[0]),
        lambda xs: vmap(energy)(xs),
        lambda xs: vmap(energy, chunk_size=2)(xs),
        lambda xs: vmap(grad(energy))(xs),
        lambda xs: grad(lambda x: grad(energy)(x).sum())(xs[0]),
        lambda xs: functional_call(torch.nn.Linear(3, 1), {"bias": torch.ones(1)}, xs),
        lambda xs: torch.autograd.functional.hessian(energy, xs[0]),
        lambda xs: torch.rand(3) + xs,
    ],
    ids=["grad", "vmap", "chunks", "per row", "grad of grad", "functional_call", "autograd.functional", "draws"],
)
def test_transforms_that_were_tried_compute_as_they_do_elsewhere(compute: Callable[[Tensor], Any]) -> None:
    xs = torch.arange(6.0).reshape(2, 3)
    torch.manual_seed(0)
    expected = compute(xs)
    torch.manual_seed(0)
    with AsTried(refuse):
        found = compute(xs)
    assert torch.equal(found, expected)


@pytest.mark.slow(quick=5)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use of it
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # of torch 2.14's own decompositions
@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda xs: jvp(energy, (xs,), (xs,)), "forward-mode differentiation"),
        (lambda xs: jacfwd(torch.sin)(xs[0]), "forward-mode differentiation"),
        (lambda xs: hessian(energy)(xs[0]), "forward-mode differentiation"),
        (lambda xs: jacrev(torch.sin)(xs[0]), "vmap over a backward pass"),
        (lambda xs: vmap(vmap(torch.sin))(xs), r"nested function transforms \(vmap, vmap\)"),
        (lambda xs: vmap(lambda x: x + torch.rand(3), randomness="different")(xs), "vmap.randomness='different'."),
        (lambda xs: torch.autograd.functional.jacobian(torch.sin, xs[0], vectorize=True), "is_grads_batched=True"),
        (lambda xs: torch.rand(3, generator=torch.Generator()), "torch.Generator of its own"),
    ],
    ids=["jvp", "jacfwd", "hessian", "jacrev", "vmap of vmap", "randomness", "batched", "generator"],
)
def test_transforms_that_were_not_tried_are_refused_in_words(compute: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(CompileError, match=words), AsTried(refuse):
        compute(torch.ones(2, 3))


# Lists of tensors, and functions that compile to something else

HALF = torch.tensor(0.5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a, b: torch._foreach_add_(a, b, alpha=2.0), "add_"),
        (lambda a, b: torch._foreach_mul_(a, 0.5), "mul_"),
        (lambda a, b: torch._foreach_mul_(a, HALF), "mul_"),
        (lambda a, b: torch._foreach_lerp_(a, b, weight=0.1), "lerp_"),
        (lambda a, b: torch._foreach_lerp_(a, b, HALF), "lerp_"),
        (lambda a, b: torch._foreach_addcmul_(a, b, b, [1.0, 2.0]), "addcmul_"),
        (lambda a, b: torch._foreach_zero_(a), "zero_"),
    ],
)
def test_lists_of_tensors_are_changed_one_by_one_with_what_their_functions_give(change: Any, name: str) -> None:
    def tensors() -> tuple[list[Tensor], list[Tensor]]:
        return [torch.arange(3.0), torch.ones(2)], [torch.full((3,), 2.0), torch.arange(2.0)]

    called: list[str] = []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    expected, found = tensors(), tensors()
    change(*expected)
    with Noting(), AsTried(refuse):
        change(*found)
    assert all(map(torch.equal, expected[0], found[0]))
    assert len(called) == 2
    assert all(name in function and "foreach" not in function for function in called)


def test_a_function_that_the_compiler_computes_otherwise_is_refused() -> None:
    xs, ys = torch.randn(2, 3), torch.tensor([[0, -1, 0], [1, 2, -1]])
    with pytest.raises(CompileError, match="computes another multilabel_margin_loss"), AsTried(refuse):
        torch.nn.functional.multilabel_margin_loss(xs, ys)
