"""Keep less for the backward pass: parts of a model keep their inputs alone, and run their forward again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from types import NoneType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from fluxloop.errors import LossError, ModelError, describe, did_you_mean

M = TypeVar("M", bound=nn.Module)

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that hold others and are never called."""


def recompute_activations(model: M, *patterns: str) -> M:
    """Have parts of a model keep their inputs alone for the backward pass, and compute the rest again there.

    Known as activation checkpointing. A part's activations are dropped after its forward; when its
    gradients are due, its forward runs once more. So memory is what one part takes and not what all of
    them take, for about a third more time. Losses, gradients and weights are the same to the bit:
    dropout draws the same masks again, and running statistics of batch norm move once.

    The model is changed in place: the same object of the same type, with the same attributes and
    names in its ``state_dict``. Without gradients, as in validation, everything runs as before.

    What a part computes has to follow from its arguments, parameters, buffers, train or eval mode and
    random numbers; what else its forward does, such as counting calls in an attribute or calling
    hooks, is done twice (`is_recomputing` tells when). Parts are called as modules: what is
    computed by another method than ``forward`` is kept as ever.

    Args:
        model: A module. Its copies compute again as well.
        patterns: Paths of modules inside it, as in a shell (``*``, ``?``): ``"blocks.*"``,
            ``"encoder.layers.*"``. Of the modules that match one pattern, the outermost are taken.

    Returns:
        The model.

    Raises:
        ModelError: A pattern matches no module, or one that is never called.
        TypeError: It is no module, or there is no pattern.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 1))
        >>> recompute_activations(net, "1") is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recompute_activations was given {describe(model)}; expected a torch.nn.Module")
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        given = ", ".join(map(describe, patterns)) or "no pattern"
        raise TypeError(
            f"recompute_activations was given {given}; expected paths of modules: "
            "recompute_activations(model, 'blocks.*')"
        )
    chosen = {part: None for pattern in patterns for part in _outermost(model, pattern)}
    for part in chosen:  # only now: a pattern that matches nothing changes nothing
        if not isinstance(vars(part).get("forward"), Recomputed):
            vars(part)["forward"] = Recomputed(part, vars(part).get("forward"))
    return model


def _outermost(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Return the outermost modules whose paths match a pattern.

    Raises:
        ModelError: There is none, or one of them is never called.
    """
    named = {path: part for path, part in model.named_modules(remove_duplicate=False) if path}
    found: dict[str, nn.Module] = {}
    for path, part in named.items():  # a module comes before those inside it
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and fnmatchcase(path, pattern):
            found[path] = part
    if not found:
        tops = list(dict.fromkeys(path.partition(".")[0] for path in named))
        raise ModelError(
            f"recompute_activations: no module of {type(model).__name__} matches {pattern!r}; there are "
            f"{', '.join(tops[:20]) or 'none inside it'}"
            f"{'' if len(named) == len(tops) else f', and what is inside them, such as {_deepest(named)!r}'}"
            f"{did_you_mean(pattern, named)}"
        )
    for path, part in found.items():
        if isinstance(part, CONTAINERS):
            raise ModelError(
                f"recompute_activations: {path!r} is a {type(part).__name__}, which only holds modules and is never "
                f"called; expected those inside it: '{path}.*'"
            )
    return list(found.values())


def _deepest(named: dict[str, nn.Module]) -> str:
    return max(named, key=lambda path: path.count("."))


def recomputed_parts(*models: nn.Module) -> list[nn.Module]:
    """Return the parts of models that compute their activations again."""
    return [part for model in models for part in model.modules() if isinstance(vars(part).get("forward"), Recomputed)]


_depth = 0


def is_recomputing() -> bool:
    """Return whether a forward that runs now is one that is computed again: for hooks that count or record calls.

    Example:
        >>> calls = []
        >>> block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        >>> model = torch.nn.Sequential(block, torch.nn.Linear(4, 1))
        >>> hook = block[0].register_forward_hook(lambda *_: calls.append(is_recomputing()))
        >>> recompute_activations(model, "0")(torch.ones(2, 4)).sum().backward()
        >>> calls
        [False, True]
    """
    # Not by thread: on a GPU torch's engine computes in a thread of its own, for which the calling one waits
    return _depth > 0


class Recomputed:
    """The forward of a module whose activations are computed again.

    Args:
        module: The module.
        own: What stood in its place as an attribute of the module, if anything did.
    """

    def __init__(self, module: nn.Module, own: Any = None) -> None:
        self.module = module
        self.own = own

    @property
    def __wrapped__(self) -> Any:
        """The forward that it runs, by which the arguments are read that a model takes."""
        return self._forward()

    def _forward(self) -> Any:
        return self.module.__class__.forward.__get__(self.module) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, of which nothing but its arguments is kept."""
        forward = self._forward()
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler computes again by itself what it finds marked so
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if any(map(is_lazy, (*self.module.parameters(), *self.module.buffers()))):
            return forward(*args, **kwargs)  # the first batch, which tells their shapes
        standing = _Standing(self.module)
        contexts = standing.noting(), _Again(standing)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    def __repr__(self) -> str:
        return f"Recomputed({type(self.module).__name__})"


SMALL = 2**16
"""Buffers with so many numbers at most are copied for each forward, as running statistics are; a larger one only
where the forward changes it."""

PLAIN = (bool, int, float, str, NoneType)


class _Standing:
    """Where a module stood when its forward ran, so that it can be run again from there.

    Torch keeps the arguments, its own random numbers and autocast; this is the rest.

    Args:
        module: The module, before its forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = list(module.modules())
        # Train or eval mode, and what counts. No tensors and other objects: those of the step before may have a graph,
        # and that graph others' attributes of the step before it
        self.plain = [{n: v for n, v in vars(part).items() if type(v) in PLAIN} for part in self.parts]
        self.parameters = [
            (part, name, parameter, parameter.requires_grad, parameter._version)
            for part in self.parts
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        self.buffers: list[tuple[nn.Module, str, Tensor, Tensor | None, int]] = [
            (part, name, buffer, buffer.detach().clone(), buffer._version)
            for part in self.parts
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self.others: dict[str, Any] = _other_generators()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Run the forward inside; then let go of what it left as it was."""
        yield
        for place, (part, name, buffer, _, version) in enumerate(self.buffers):
            # Torch does not count the changes that kernels of batch norm make
            same = part._buffers.get(name) is buffer and buffer._version == version
            if same and buffer.numel() > SMALL:
                self.buffers[place] = part, name, buffer, None, version
        now = _other_generators()
        self.others = {name: state for name, state in self.others.items() if not _equal(state, now[name])}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the module where it stood, and back after it.

        Raises:
            LossError: Weights have changed since, in place, or a large buffer has.
        """
        global _depth
        self._check_unchanged()
        before = [(vars(part), dict(vars(part))) for part in self.parts]
        before += [(held, dict(held)) for part in self.parts for held in (part._parameters, part._buffers)]
        frozen = [p for _, _, p, required, _ in self.parameters if p.requires_grad is not required]
        others = _other_generators() if self.others else {}
        _depth += 1
        try:
            self._put()
            for parameter in frozen:  # or more, or fewer, tensors would be kept than in the first forward
                parameter.requires_grad = not parameter.requires_grad
            yield
        finally:
            _depth -= 1
            for parameter in frozen:
                parameter.requires_grad = not parameter.requires_grad
            for held, values in before:
                held.clear()
                held.update(values)
            _put_generators({name: others[name] for name in self.others})

    def _put(self) -> None:
        for part, plain in zip(self.parts, self.plain, strict=True):
            vars(part).update(plain)
        for part, name, parameter, *_ in self.parameters:
            now = part._parameters.get(name)
            # Another one: the first forward ran with others in their place, as torch.func.functional_call puts them
            # there. Parameters that are shards at one time and whole at another are exchanged by torch.
            if now is not parameter and not _is_distributed(now) and not _is_distributed(parameter):
                part._parameters[name] = parameter
        for part, name, _, value, _ in self.buffers:
            if value is not None:  # a copy, which changes in place of the buffer: the same forward may be run once more
                part._buffers[name] = value.clone()
        _put_generators(self.others)

    def _check_unchanged(self) -> None:
        changed = [(part, name) for part, name, p, _, version in self.parameters if p._version != version]
        changed += [
            (part, name) for part, name, b, kept, version in self.buffers if kept is None and b._version != version
        ]
        if changed:
            names = ", ".join(f"{name!r} of {type(part).__name__}" for part, name in changed[:3])
            raise LossError(
                f"{names}{' and others' if len(changed) > 3 else ''} changed between a forward and its backward, which "
                "computes the activations again (recompute_activations) and would give gradients of other weights; "
                "expected every gradient of a forward before the update, or a forward of its own for each loss"
            )


class _Again(AbstractContextManager[None]):
    """Put a module where it stood, for each time that its forward is run again."""

    def __init__(self, standing: _Standing) -> None:
        self._standing = standing
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        entered = self._standing.restored()
        entered.__enter__()
        self._entered.append(entered)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, traceback)


def _is_distributed(parameter: Tensor | None) -> bool:
    return hasattr(parameter, "placements")  # a DTensor; its module takes a second to import


def _other_generators() -> dict[str, Any]:
    """Return the states of Python's and NumPy's global generators; torch's are kept by torch."""
    numpy = sys.modules.get("numpy")
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether two states of a generator are the same; NumPy's has an array in it."""
    return all(bool((a == b).all()) if hasattr(a, "all") else a == b for a, b in zip(one, other, strict=True))


def _put_generators(states: dict[str, Any]) -> None:
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
