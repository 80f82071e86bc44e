"""Randomness has owners: who draws from which stream of random numbers, and when.

PyTorch, NumPy and Python each have one global generator that everybody shares, so whoever
draws a number changes everybody else's. Here every consumer has a stream of its own, derived
from the run's seed and the owner's name:

- an epoch of a phase starts all three from ``(seed, "<data_key>/epoch", epochs begun)``, and they
  are put back as they were before when it ends;
- its step i starts torch's from ``(seed, "<data_key>/step", steps begun)``; NumPy's and Python's
  go on from step to step (a normal number that NumPy has in store is dropped when a step begins
  and when it ends);
- the order of the data and its first batch start torch's from ``(seed, "<data_key>/data", epochs
  begun)``, each further fetch from ``(seed, "<data_key>/fetch", further fetches)``; the n-th sample
  that a ``DataLoader`` over map-style data loads in epoch e starts all three from ``(seed,
  "<data_key>/sample/<e>", n)``, in whatever process, and they are put back;
- a callback that says it draws has ``(seed, "callback/<id>", times called)`` for all three; what
  any other handler draws inside an epoch is put back.

Measured on two cores next to a step of a tiny network (137 µs): starting torch's generator costs
1.4 µs, NumPy's 3.9, Python's 5.3, so only torch's is started at every step. Saving and
restoring them costs 1, 70 and 12 µs; swapping NumPy's bit generator instead of copying its state
0.5, but drops the number in store: hence the rule above. So a handler between two steps costs
14 µs of putting back, one in the middle of a step 80, one with ``draws = False`` nothing.
"""

from __future__ import annotations

import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from types import TracebackType
from typing import Any

import torch

MASK = 0xFFFFFFFF


def _mix(number: int) -> int:
    """Scramble 32 bits one to one (the finalizer of MurmurHash3)."""
    number ^= number >> 16
    number = (number * 0x85EBCA6B) & MASK
    number ^= number >> 13
    number = (number * 0xC2B2AE35) & MASK
    return number ^ (number >> 16)


def _base(seed: int, owner: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{owner}".encode(), digest_size=4).digest(), "little")


def stream_seed(seed: int, owner: str, index: int = 0) -> int:
    """Return the 32-bit number that an owner's stream starts from.

    A hand-written loop that calls ``torch.manual_seed(stream_seed(seed, "training/step", i))``
    before its step ``i`` draws the numbers that fluxloop's step ``i`` draws. Distinct indices
    below 2**32 of one owner give distinct numbers.

    Args:
        seed: The run's seed (``learner.seed``).
        owner: Name of the stream, as listed in the module's docstring.
        index: Which start of that stream, from 0.

    Example:
        >>> stream_seed(0, "training/step", 1) == stream_seed(0, "training/step", 1)
        True
        >>> len({stream_seed(0, "training/step", index) for index in range(100)})
        100
    """
    return _mix((_base(seed, owner) + index) & MASK)


def start_torch(number: int) -> None:
    """Start torch's global generators from `number`."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types there
        torch.cuda.manual_seed_all(number)


def start_generators(number: int) -> None:
    """Start the global generators of torch, NumPy (where it is loaded) and Python from `number`.

    Example:
        >>> draws = []
        >>> for _ in range(2):
        ...     start_generators(7)
        ...     draws.append(torch.rand(3))
        >>> torch.equal(*draws)
        True
    """
    start_torch(number)
    _start_others(number)


def _start_others(number: int) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)
    random.seed(number)


def forget_normal() -> None:
    """Drop the normal number that NumPy's global generator has in store, if any."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        generator = numpy.random
        generator.set_bit_generator(generator.get_bit_generator())


def start_step(number: int) -> None:
    """Start torch's global generators from `number`; NumPy forgets the normal number it has in store."""
    start_torch(number)
    forget_normal()


def draw_seed() -> int:
    """Draw a seed from torch's global generator."""
    return int(torch.empty((), dtype=torch.int64).random_(0, MASK + 1))


def check_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises:
        ValueError: It is no whole number from 0 to 2**32 - 1 (NumPy takes no other).
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number <= MASK:
        raise ValueError(f"seed={seed!r} was given; expected a whole number from 0 to {MASK}, e.g. seed=0")
    return number


def seed_everything(seed: int) -> int:
    """Seed the global generators of torch (every device), NumPy and Python; return the seed.

    For a script's own random numbers and the initial weights. A `Learner` without a seed of its
    own draws it from torch's generator, so this decides the whole run.

    Raises:
        ValueError: The seed is no whole number from 0 to 2**32 - 1.

    Example:
        >>> seed_everything(3), torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
        (3, True)
    """
    seed = check_seed(seed)
    torch.manual_seed(seed)
    _start_others(seed)
    return seed


def _cuda_states() -> list[torch.Tensor] | None:
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types there
    return torch.cuda.get_rng_state_all() if initialized else None


def generator_states() -> dict[str, Any]:
    """Return the states of the global generators of torch (every device), NumPy (where it is loaded) and Python."""
    numpy = sys.modules.get("numpy")
    return {
        "torch": torch.default_generator.get_state(),
        "cuda": _cuda_states(),
        "numpy": numpy.random.get_state(legacy=False) if numpy is not None else None,
        "python": random.getstate(),
    }


def put_generators(states: dict[str, Any]) -> None:
    """Put the global generators where `generator_states` found them."""
    torch.default_generator.set_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if states["numpy"] is not None:
        import numpy

        numpy.random.set_state(states["numpy"])
    random.setstate(states["python"])


class preserved(AbstractContextManager[None]):  # noqa: N801 - used like a function
    """Put the global generators of torch, NumPy and Python back as they were on leaving.

    Args:
        numpy_too: Whether NumPy's, which takes most of the time, is among them.
    """

    def __init__(self, numpy_too: bool = True) -> None:
        self._numpy_too = numpy_too

    def __enter__(self) -> None:
        numpy = sys.modules.get("numpy") if self._numpy_too else None
        self._torch = torch.default_generator.get_state()
        self._cuda = _cuda_states()
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._python = random.getstate()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.default_generator.set_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        random.setstate(self._python)


@contextmanager
def drawing(number: int) -> Iterator[None]:
    """Start the global generators from `number` for a while, and put them back as they were."""
    with preserved():
        start_generators(number)
        yield


class Stream:
    """One owner's stream of random numbers.

    Args:
        seed: The run's seed.
        owner: Name of the stream.
    """

    __slots__ = ("base", "index")

    def __init__(self, seed: int, owner: str) -> None:
        self.base = _base(seed, owner)
        self.index = 0
        """How often the stream has been used: for an epoch or a step, how many have begun."""

    def next(self) -> int:
        """Return the number that the stream's next use starts from."""
        index = self.index
        self.index = index + 1
        return _mix((self.base + index) & MASK)

    def at(self, index: int) -> int:
        """Return the number that the use of an index starts from."""
        return _mix((self.base + index) & MASK)


OF_A_PROCESS = ("/step", "/epoch")
"""How the names of streams end from which the steps of a process draw, where several train."""


class Streams:
    """The streams of one learner, by owner; created when they are first asked for.

    Args:
        seed: The run's seed.
        prefix: Put before every owner's name: evaluation and prediction have streams apart.
        process: The number of the process whose steps draw numbers of their own; 0, as that of one alone.
    """

    def __init__(self, seed: int, prefix: str = "", process: int = 0) -> None:
        self.seed = seed
        self.prefix = prefix
        self._process = process
        self._streams: dict[str, Stream] = {}

    def __getitem__(self, owner: str) -> Stream:
        stream = self._streams.get(owner)
        if stream is None:
            stream = self._streams[owner] = Stream(self.seed, self._name(owner))
        return stream

    def _name(self, owner: str) -> str:
        """Return what a stream is called: those of steps and epochs are apart in each process but the first."""
        own = self._process and owner.endswith(OF_A_PROCESS)
        return f"{self.prefix}{owner}{f'@{self._process}' if own else ''}"

    def apart(self, owner: str) -> Stream:
        """Return a stream without a count: its user says which number it wants."""
        return Stream(self.seed, self.prefix + owner)

    def positions(self) -> dict[str, int]:
        """Return how often each stream has been used, by owner."""
        return {owner: stream.index for owner, stream in sorted(self._streams.items())}

    def go_on(self, seed: int, positions: dict[str, int]) -> None:
        """Set every stream to where another learner's of that seed was."""
        self.seed = seed
        for owner in {*self._streams, *positions}:
            stream = self[owner]
            stream.base, stream.index = _base(seed, self._name(owner)), positions.get(owner, 0)


def with_own_stream(call: Callable[..., None], stream: Callable[[], Stream]) -> Callable[..., None]:
    """Wrap a function so that it draws from its own stream and leaves the global generators as they were."""

    def apart(*args: Any) -> None:
        with drawing(stream().next()):
            call(*args)

    return apart


def putting_back(call: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function so that it leaves the global generators as they were, to the last bit."""

    def apart(*args: Any) -> None:
        with preserved():
            call(*args)

    return apart


def noticing(call: Callable[..., None], tell: Callable[[], object], numpy_too: bool) -> Callable[..., None]:
    """Wrap a function so that `tell` is called where one of its first calls draws from the global generators.

    Comparing states takes some 30 µs, with NumPy's 110: later calls are not looked at.

    Args:
        call: The function.
        tell: Called once.
        numpy_too: Whether NumPy's global generator is compared.
    """
    calls_left = NOTICED

    def noticed(*args: Any) -> None:
        nonlocal calls_left
        if not calls_left:
            call(*args)
            return
        calls_left -= 1
        torchs, others = _positions(numpy_too)
        call(*args)
        torchs_now, others_now = _positions(numpy_too)
        if others_now != others or not all(map(torch.equal, torchs, torchs_now)):
            calls_left = 0
            tell()

    return noticed


NOTICED = 16
"""How many calls of a handler are looked at."""


def _positions(numpy_too: bool) -> tuple[list[torch.Tensor], Any]:
    """Return where the global generators stand: torch's, and the others'."""
    numpy = sys.modules.get("numpy") if numpy_too else None
    in_numpy = None if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))
    return [torch.default_generator.get_state(), *(_cuda_states() or ())], (in_numpy, random.getstate())


class NumPyAndPythonPreserved(AbstractContextManager[None]):
    """Leave NumPy's and Python's global generators as they were, between two steps; may be entered again.

    NumPy draws from a bit generator of its own meanwhile: swapping costs less than copying a state.

    Args:
        start: Returns the number from which that one starts, each time; None: the code inside seeds it itself.
        python_too: Whether Python's generator is among them.
    """

    def __init__(self, start: Callable[[], int] | None = None, python_too: bool = True) -> None:
        self._start = start
        self._python_too = python_too
        self._scratch: Any = None
        self._numpy: Any = None
        self._python: Any = None

    def __enter__(self) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            self._numpy = numpy.random.get_bit_generator()
            if self._scratch is None:
                self._scratch = numpy.random.MT19937(0)
            numpy.random.set_bit_generator(self._scratch)
            if self._start is not None:
                numpy.random.seed(self._start())
        if self._python_too:
            self._python = random.getstate()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._numpy is not None:
            sys.modules["numpy"].random.set_bit_generator(self._numpy)
            self._numpy = None
        if self._python_too:
            random.setstate(self._python)


class NumPyAndPythonContinued(AbstractContextManager[None]):
    """Let NumPy and Python draw from generators apart, which go on from where they were the last time.

    Args:
        number: What they start from.
    """

    def __init__(self, number: int) -> None:
        numpy = sys.modules.get("numpy")
        self._bits = numpy.random.MT19937(number) if numpy is not None else None
        self._python: Any = random.Random(number).getstate()
        self._own: Any = None

    def __enter__(self) -> None:
        if self._bits is not None:
            self._own = sys.modules["numpy"].random.get_bit_generator()
            sys.modules["numpy"].random.set_bit_generator(self._bits)
        self._former = random.getstate()
        random.setstate(self._python)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._python = random.getstate()
        random.setstate(self._former)
        if self._bits is not None:
            sys.modules["numpy"].random.set_bit_generator(self._own)


def between_steps(call: Callable[..., None], stream: Callable[[], Stream]) -> Callable[..., None]:
    """Wrap a function that runs between two steps so that the next one draws as if it had not run.

    NumPy draws from a bit generator of the function's own meanwhile, started from its stream.
    """
    numpy_apart = NumPyAndPythonPreserved(lambda: stream().next(), python_too=False)

    def apart(*args: Any) -> None:
        with preserved(numpy_too=False), numpy_apart:
            call(*args)

    return apart
