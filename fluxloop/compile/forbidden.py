"""Notice what a step does while it is traced that a graph would do once, or that nobody has tried in one.

Random numbers of Python's and NumPy's generators would be constants of the graph, wherever the
generator lives; so all generators of the process are looked at before and after. Function transforms
(``torch.func``) change what operations mean; those that were compared with eager steps are let through,
and the others are refused.
"""

from __future__ import annotations

import gc
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from types import CellType, FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fluxloop.errors import CompileError

# Random numbers


def generators(held: Iterable[Any] = ()) -> list[Any]:
    """Return the random generators of Python's and NumPy's that the process has, wherever they are held.

    The garbage collector knows them all, but those that a program has frozen (``gc.freeze``). Asking it takes
    some 50 ms, next to seconds of compiling.

    Args:
        held: Generators to return in any case.
    """
    numpy = sys.modules.get("numpy")
    kinds: list[type] = [random.Random]
    known = [getattr(random, "_inst", None), *held]
    if numpy is not None:
        kinds += [numpy.random.Generator, numpy.random.RandomState]
        known.append(getattr(numpy.random.mtrand, "_rand", None))
    for kind in kinds:
        kinds += kind.__subclasses__()
    types = set(kinds) - {random.SystemRandom}  # that one has no state; see `noting_entropy`
    everything = gc.get_objects()
    found = [*known, *compress(everything, map(types.__contains__, map(type, everything)))]
    return list({id(generator): generator for generator in found if type(generator) in types}.values())


def state_of(generator: Any) -> Any:
    """Return where a random generator of Python's or NumPy's stands, so that equal states compare equal."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # the older kind has a normal number in store besides
        return pickle.dumps(generator.get_state(legacy=False))
    return pickle.dumps(generator.bit_generator.state)


def place_of(thing: Any) -> str:
    """Return where an object is held, as a user would look for it: a module's name, an attribute, a closure."""
    numpy = sys.modules.get("numpy")
    if thing is getattr(random, "_inst", None):
        return "Python's random module"
    if numpy is not None and thing is getattr(numpy.random.mtrand, "_rand", None):
        return "numpy.random"
    for holder in gc.get_referrers(thing):
        place = place_in_closure(holder) if isinstance(holder, CellType) else place_in_attributes(holder, thing)
        if place:
            return place
    return f"a {type(thing).__name__}"


def place_in_closure(cell: CellType) -> str:
    """Return the variable of a function that a cell belongs to; empty where no function has it any more."""
    for closure in gc.get_referrers(cell):
        for function in gc.get_referrers(closure):
            if isinstance(closure, tuple) and isinstance(function, FunctionType) and function.__closure__ is closure:
                name = function.__code__.co_freevars[closure.index(cell)]
                return f"{name!r} of {function.__qualname__}"
    return ""


def place_in_attributes(holder: Any, thing: Any) -> str:
    """Return the global variable or attribute under which an object is held; empty where it is neither."""
    own: dict[Any, Any] = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
    name = next((name for name, value in own.items() if value is thing and isinstance(name, str)), None)
    if name is None:
        return ""
    module = own.get("__name__")
    if own is getattr(sys.modules.get(str(module)), "__dict__", None):
        return f"{module}.{name}"
    owners = [o for o in gc.get_referrers(own) if getattr(o, "__dict__", None) is own] if own is holder else [holder]
    return f"{type(owners[0]).__name__}.{name}" if owners else repr(name)


@contextmanager
def noting_draws(held: Iterable[Any] = ()) -> Iterator[list[str]]:
    """Note where random numbers came from that were drawn from generators of Python's and NumPy's meanwhile.

    The list is complete once the context is left.

    Args:
        held: Generators that are known to be in reach.
    """
    noted: list[str] = []
    before = [(generator, state_of(generator)) for generator in generators(held)]
    with noting_entropy(noted):
        yield noted
    drawn = [place_of(generator) for generator, state in before if state_of(generator) != state]
    noted += [place for place in drawn if not place.startswith("sympy.")]  # torch's arithmetic of unknown sizes


@contextmanager
def noting_entropy(noted: list[str]) -> Iterator[None]:
    """Note that Python's `random` or `secrets`, or a generator without a seed, asked the operating system."""
    module: Any = random
    own: Any = getattr(module, "_urandom", None)
    if own is None:  # a private name, without which this is not noticed
        yield
        return

    def asked(size: int) -> bytes:
        noted.append("the operating system's: a generator without a seed, SystemRandom or secrets")
        drawn: bytes = own(size)
        return drawn

    module._urandom = asked
    try:
        yield
    finally:
        module._urandom = own


# Function transforms

TRIED = ((), ("Grad",), ("Vmap",), ("Vmap", "Grad"), ("Grad", "Grad"))
"""Nestings of function transforms, from the outside in, whose graphs were compared with eager steps."""


WRONG = ("multilabel_margin_loss",)
"""Functions of torch's that the compiler is known to compute otherwise than eager steps do."""


class AsTried(TorchFunctionMode):
    """Let a step call torch's functions as they were tried in compiled steps.

    Raises for function transforms that nobody has tried, for generators of torch's, and for functions that
    compile to something else. Lists of tensors are changed one by one: TorchInductor changes the first of a
    list while gradients of others are still computed from it.

    Args:
        refuse: Makes the error from what is wrong.
    """

    def __init__(self, refuse: Callable[[str], CompileError]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's, unless it is not let through."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WRONG:
            raise self._refuse(f"torch.compile computes another {name} than eager steps do; write it out")
        if (
            name.startswith("_foreach_")
            and name.endswith("_")
            and hasattr(torch.Tensor, name.removeprefix("_foreach_"))
        ):
            return one_by_one(getattr(torch.Tensor, name.removeprefix("_foreach_")), args, kwargs)
        if name == "_foreach_pow" and isinstance(args[0], torch.Tensor):  # of a beta: else it is asked for as a number
            return [args[0] ** exponent for exponent in args[1]]
        found = untried(func, kwargs)
        if found is not None:
            raise self._refuse(
                f"it computes under {found}, which has not been tried in a graph; expected torch.func.grad, vmap, one "
                "in the other, or functional_call"
            )
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise self._refuse(
                "it draws from a torch.Generator of its own, whose state no graph holds; draw without generator=, "
                "from the numbers of the step"
            )
        return func(*args, **kwargs)


def one_by_one(change: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Call a function that changes a tensor for each of a list, with its item of each other list; return them.

    Args:
        change: A method of tensors.
        args: Of the function for lists: the list first.
        kwargs: Its options.
    """
    *args, factor = args if len(args) == 4 else (*args, None)
    if factor is not None:  # of addcmul_ and addcdiv_, where it has to be named
        kwargs = {**kwargs, "value": factor}
    given = [[each] * len(args[0]) if not isinstance(each, (list, tuple)) else each for each in args]
    if change is torch.Tensor.lerp_:  # which takes no weight of another precision, as others take numbers
        given[2:] = [[as_precise(w, to) for w, to in zip(weights, args[0], strict=True)] for weights in given[2:]]
        kwargs = {name: [as_precise(value, to) for to in args[0]] for name, value in kwargs.items()}
    options = {n: [v] * len(args[0]) if not isinstance(v, (list, tuple)) else v for n, v in kwargs.items()}
    return [
        change(*items, **{name: values[number] for name, values in options.items()})
        for number, items in enumerate(zip(*given, strict=True))
    ]


def as_precise(number: Any, to: torch.Tensor) -> Any:
    """Return a tensor in the precision of another one, or a number as it is."""
    return number.to(to.dtype) if isinstance(number, torch.Tensor) else number


def untried(function: Any, options: dict[str, Any]) -> str | None:
    """Describe the function transforms under which a function of torch's is called, unless they were tried.

    Args:
        function: What is called.
        options: Its arguments by name.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation (jvp, jacfwd, hessian, dual_level)"
    if options.get("is_grads_batched"):
        return "torch.autograd.grad(is_grads_batched=True)"
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if not stack:
        return None
    nesting: tuple[str, ...] = tuple(level.key().name for level in stack)
    if nesting not in TRIED:
        return f"nested function transforms ({', '.join(name.lower() for name in nesting)})"
    if nesting[-1:] == ("Vmap",) and function in (torch.autograd.grad, torch.autograd.backward):
        return "vmap over a backward pass (jacrev, or torch.autograd.grad inside vmap)"
    for level in stack:
        if level.key().name == "Vmap":
            randomness = torch._C._functorch.CVmapInterpreterPtr(level).randomness()
            if randomness.name != "Error":
                return f"vmap(randomness={randomness.name.lower()!r})"
    return None
