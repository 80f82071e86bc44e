"""Where the inputs of a compiled step lie in memory, as far as what it computes rests on that.

A graph knows which of its inputs shared memory when it was traced, and changes weights at any time before it ends: a
batch that is a view of a weight would be read after the change. And an operation that says where in memory a tensor
begins says so of another one in each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from fluxloop.nested import tensors

if TYPE_CHECKING:
    from fluxloop.compile.tracing import Traced

STORAGE, PLACE = Tensor.untyped_storage, attrgetter("_cdata")
"""What gives the memory of a tensor, and of that a number that is equal where it is the same: called at every step."""


class Memory:
    """Finds inputs that lie in memory otherwise than a graph can take.

    Args:
        traced: The step.

    Attributes:
        given: Which inputs may lie elsewhere in each step: tensors of the phase and callbacks, and entries.
        places: Where weights and states lie, as `PLACE` and `STORAGE` tell it, that the step may change. `misfit` is
            asked where one of those that are given lies there too.
        is_particular: Whether it has to be asked at each step.
    """

    def __init__(self, traced: Traced) -> None:
        inputs = traced.inputs
        first = len(inputs.fixed) + len(inputs.options)
        entries = [tensor for value in inputs.entries.values() for tensor in tensors(value)]
        self.given = slice(first, first + len(inputs.held) + len(entries))
        self._fixed = inputs.fixed if inputs.phase.gradients else []
        changed = {len(inputs.fixed) + number - first for number in traced.changed}
        self._changed = [number for number in range(len(inputs.held) + len(entries)) if number in changed]
        self.places = self._places_of_fixed()
        self._shared = self._sharing(traced.example)
        self._begin = told_where_to_begin(traced.graph)
        self.is_particular = bool(self._changed or self._begin or any(self._shared[0]))

    def misfit(self, inputs: Sequence[Tensor]) -> str | None:
        """Return what is wrong with the inputs of a step."""
        if not self.places.isdisjoint(map(PLACE, map(STORAGE, inputs[self.given]))):
            self.places = self._places_of_fixed()  # somebody may have given a weight other memory since
        if self._sharing(inputs) != self._shared:
            return (
                "an entry or a tensor of the phase or a callback shares memory with a weight, a state or another one "
                "that the step changes, or does so no longer, and the graph was made otherwise; give it a copy "
                "(.clone())"
            )
        if self._begin and any(inputs[number].storage_offset() for number in self._begin):
            return (
                "as_strided says where in memory a tensor begins, which the compiler counts from the tensor's own "
                "beginning, and here it begins elsewhere; give it a copy (.clone()), or leave storage_offset out"
            )
        return None

    def _places_of_fixed(self) -> set[int]:
        return {*map(PLACE, map(STORAGE, self._fixed))}

    def _sharing(self, inputs: Sequence[Tensor]) -> Any:
        places = [*map(PLACE, map(STORAGE, inputs[self.given]))]
        return (
            [place in self.places for place in places],
            [[place == places[number] for place in places] for number in self._changed],
        )


def told_where_to_begin(graph: GraphModule) -> list[int]:
    """Return the numbers of the inputs that an operation reads from a place in their memory that it names."""
    nodes = list(graph.graph.nodes)
    read = [
        PLACE(STORAGE(node.args[0].meta["val"]))
        for node in nodes
        if "as_strided" in str(node.target) and len(node.args) > 3 and node.args[3] is not None
    ]
    inputs = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    return [n for n, each in enumerate(inputs) if read and (each is None or PLACE(STORAGE(each)) in read)]
