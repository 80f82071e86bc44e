"""How operations are recorded into a graph, and what can be asked of the graph: plumbing around torch.fx."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
import torch._dispatch.python
from torch import Tensor
from torch.fx import GraphModule, Node

from fluxloop.errors import CompileError


def require_torch() -> None:
    """Raise where torch lacks what steps are traced with.

    Raises:
        CompileError: It is too old, or too new.
    """
    try:
        attrgetter("compiler._is_compiling_flag", "_C._functorch.get_interpreter_stack")(torch)
    except AttributeError as error:
        raise CompileError(
            f'Accelerator(compile="step") cannot be used with torch {torch.__version__}; expected 2.10 or newer, '
            'or a newer fluxloop, or compile="model"'
        ) from error


@contextmanager
def as_compilers_trace(gradients: bool) -> Iterator[None]:
    """Record operations as ``torch.compile`` records them.

    Optimizers know of it by a flag. Operations are decomposed before their gradients are computed, since
    the compiler knows some backward operations only by what they are made of. Recurrent layers are decomposed
    only where oneDNN is off: the compiler has no backward for oneDNN's layer. What the user has compiled by
    ``torch.compile`` runs as it is written, as a part of the step.

    Args:
        gradients: Whether gradients are computed.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    (onednn, *_) = torch.backends.mkldnn.set_flags(False) if gradients else (None,)  # type: ignore[no-untyped-call]  # torch's
    try:
        # else it would be traced on its own, and on its way through what watches this trace
        stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with stance, torch._dispatch.python.enable_python_dispatcher():  # decompositions that are written in Python
            yield
    finally:
        torch.compiler._is_compiling_flag = before
        if gradients:
            torch.backends.mkldnn.set_flags(onednn)  # type: ignore[no-untyped-call]  # as above


@contextmanager
def noting_seeds() -> Iterator[list[str]]:
    """Note the calls that set the state of torch's random numbers."""
    noted: list[str] = []
    module: Any = torch.random
    own = module.default_generator

    class Noting:
        def __getattr__(self, name: str) -> Any:
            if name in ("set_state", "manual_seed", "seed"):
                noted.append(name)
            return getattr(own, name)

    # torch.manual_seed, set_rng_state, fork_rng and checkpoints all look the generator up here, by this name
    module.default_generator = Noting()
    try:
        yield noted
    finally:
        module.default_generator = own


def lift_constants(graph: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into inputs, and return them in order.

    A tensor inside the graph would be copied into the compiled function; as an input, it is looked up at every step.
    """
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    found: dict[int, tuple[Tensor, Any]] = {}
    for node in list(graph.graph.nodes):
        tensor = getattr(graph, node.target, None) if node.op == "get_attr" else None
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in found:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(node.target)
            last.meta = dict(node.meta)
            found[id(tensor)] = (tensor, last)
        node.replace_all_uses_with(found[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in found.values()]


SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def write_out_factors(graph: GraphModule) -> None:
    """Multiply by the factors of sums (``alpha=``) in operations of their own.

    The compiler makes one operation of a sum and a product of matrices, such as a gradient, and forgets the factor:
    `findings/compiled_sum_without_its_factor.sh`.
    """
    for node in list(graph.graph.nodes):
        factor = node.kwargs.get("alpha", 1)
        if node.target not in SUMS or factor == 1 or not isinstance(node.args[1], Node):
            continue
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], factor))
        product.meta = dict(node.args[1].meta)
        node.args, node.kwargs = (node.args[0], product), {}
    graph.recompile()


def asks_for_a_float(node: Any) -> bool:
    """Return whether an operation gives Python a number that is no whole one, which is a symbol in the graph."""
    return node.target is torch.ops.aten._local_scalar_dense.default and isinstance(
        node.meta.get("val"), (float, torch.SymFloat)
    )


def draws(node: Any) -> bool:
    """Return whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draws_normal(node: Any) -> bool:
    """Return whether an operation draws normal random numbers."""
    name = getattr(node.target, "__name__", "")
    return draws(node) and ("randn" in name or "normal" in name)
