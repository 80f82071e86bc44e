"""A compiled step, called without the layers that torch puts around any compiled function.

Those layers serve functions of every kind: they look for subclasses of tensors, for outputs that are views of
inputs, for changes that have to be made once more outside. For the step of a small model they take a third of the
time of what they call. Whether they do anything for a step is seen at its first call, which goes through all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from fluxloop.compile.kept import Direct, Fresh
from fluxloop.compute.fused import count_changes

Compiled = Callable[..., Any]


class Call:
    """A compiled step, and the shortest way to call it.

    Args:
        compiled: The step, a function of tensors.
        changed: Tensors that it changes in place without autograd's knowledge: each call counts a change of them.
    """

    def __init__(self, compiled: Compiled, changed: Sequence[Tensor]) -> None:
        self._compiled = compiled
        self._changed = list(changed)
        self._places: list[int] = []
        self._inner: Compiled | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the first call has shown that torch's layers do nothing."""
        return self._inner is not None

    def first(self, inputs: Sequence[Tensor], num_fixed: int) -> list[Tensor]:
        """Run the step through all layers, and see what they do.

        Args:
            inputs: Of the step.
            num_fixed: How many of them, the first ones, are the same tensors in every call.
        """
        before = [version_of(tensor) for tensor in inputs]
        with noting_calls(self._compiled) as inner:
            outputs = list(self._compiled(*inputs))
        # an operation that autocast would run otherwise runs as it was traced: one of the layers switches it off
        casts = any(torch.is_autocast_enabled(kind) for kind in {tensor.device.type for tensor in inputs})
        if isinstance(self._compiled, Fresh):  # its first call was to see whether it can be kept
            self._compiled = self._compiled.direct or self._compiled.compiled
        if isinstance(self._compiled, Direct):
            self._inner = self._compiled.run
        elif len(inner) == 1 and inner[0].is_alone(inputs, outputs) and not casts:
            self._inner = inner[0].function
        if self._inner is not None:
            # the layers count changes too
            found = [n for n, (t, old) in enumerate(zip(inputs, before, strict=True)) if version_of(t) != old]
            fixed = [*self._changed, *(inputs[number] for number in found if number < num_fixed)]
            self._changed = list({id(tensor): tensor for tensor in fixed}.values())
            self._places = [number for number in found if number >= num_fixed]
        count_changes(self._changed)
        return outputs

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Run the step; the list may be empty afterwards."""
        changed = [*self._changed, *(inputs[n] for n in self._places)] if self._places else self._changed
        outputs: Sequence[Tensor]
        if self._inner is None:
            outputs = self._compiled(*inputs)
        elif torch.is_grad_enabled():
            torch._C._set_grad_enabled(False)
            try:
                outputs = self._inner(inputs)
            finally:
                torch._C._set_grad_enabled(True)
        else:
            outputs = self._inner(inputs)
        count_changes(changed)  # so that autograd knows that what was computed before is out of date
        return outputs


@frozen(eq=False)
class InnerCall:
    """What reached the function inside of torch's layers, and what it returned.

    Args:
        function: That function; it empties the list of its inputs.
        inputs: What it was given.
        outputs: What it returned.
    """

    function: Compiled
    inputs: list[Any]
    outputs: Sequence[Any]

    def is_alone(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Return whether the layers pass on the very tensors that they get, one for one, in both directions."""
        return all(
            len(found) == len(given) and all(a is b for a, b in zip(found, given, strict=True))
            for found, given in ((self.inputs, inputs), (self.outputs, outputs))
        )


@contextmanager
def noting_calls(compiled: Compiled) -> Iterator[list[InnerCall]]:
    """Note what reaches the function inside of torch's layers; nothing where that cannot be found."""
    holder: Any = inspect.unwrap(compiled)
    function = getattr(holder, "current_callable", None)  # a private name of torch's
    noted: list[InnerCall] = []
    if function is None:
        yield noted
        return

    def noting(inputs: Any) -> Any:
        given = list(inputs)
        outputs = function(inputs)
        noted.append(InnerCall(function, given, outputs))
        return outputs

    holder.current_callable = noting
    try:
        yield noted
    finally:
        holder.current_callable = function


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place, as autograd counts; None where it does not."""
    return None if tensor.is_inference() else tensor._version
