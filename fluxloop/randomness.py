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
- a callback that says it draws has ``(seed, "callback/<id>", times called)`` for all three; any
  other handler, inside an epoch, ``(seed, "callback/<id>/apart", calls that drew)`` for NumPy's
  and Python's, and torch's of the training. All are put back.

Measured on one core: starting torch's generator costs 1.3 µs, NumPy's 2.0, Python's 4.5, so only
torch's is started at every step. Saving and restoring torch's costs 1.3, those of the others, through
their own functions, 85 and 13: number by number. Copied in one piece, from where they lie in memory,
it is 0.25 each; NumPy's normal number in store, which lies elsewhere, adds 3 in the middle of a step.
Comparing a state with a copy takes longer than putting it back: `torch.equal` 4.5 µs.
"""

from __future__ import annotations

import ctypes
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from hashlib import blake2b
from types import TracebackType
from typing import Any, NamedTuple

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
    start_others(number)


def start_others(number: int) -> None:
    """Start the global generators of NumPy (where it is loaded) and Python from `number`."""
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
    start_others(seed)
    return seed


def cuda_generators() -> tuple[torch.Generator, ...]:
    """Return the global generators of the devices; none before CUDA is used."""
    if not torch.cuda.default_generators:
        return ()
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types there
    return torch.cuda.default_generators if initialized else ()  # not those that a forked process inherits


def generator_states() -> dict[str, Any]:
    """Return the states of the global generators of torch (every device), NumPy (where it is loaded) and Python."""
    numpy = sys.modules.get("numpy")
    return {
        "torch": torch.default_generator.get_state(),
        "cuda": [each.get_state() for each in cuda_generators()] or None,
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


PYTHON: Any = random._inst
"""Python's global generator."""


class Memory(NamedTuple):
    """Where a generator's state lies: its 624 numbers of 32 bits, and its place among them.

    Args:
        memory: As bytes.
        words: As numbers.
    """

    memory: memoryview
    words: memoryview


@cache
def python_memory() -> Memory | None:
    """Return where the state of Python's global generator lies; None in a Python where that is not known."""
    size, header = 4 * 625, object.__basicsize__
    if sys.implementation.name != "cpython" or random.Random.__mro__[1].__basicsize__ - header < size:
        return None
    memory = memoryview((ctypes.c_char * size).from_address(id(PYTHON) + header)).cast("B")
    words = memory.cast("I")
    *key, place = random.getstate()[1]
    return Memory(memory, words) if list(words) == [place, *key] else None


def _python_state() -> Any:
    """Return the state of Python's global generator, for `_put_python`."""
    python = python_memory()
    return random.getstate() if python is None else (python.memory.tobytes(), PYTHON.gauss_next)


def _put_python(state: Any) -> None:
    """Put Python's global generator where `_python_state` found it."""
    python = python_memory()
    if python is None:
        random.setstate(state)
    else:
        python.memory[:], PYTHON.gauss_next = state


@cache
def quick_bits() -> Any:
    """Return the class of NumPy's bit generators that are quickly copied; None where this release has no such.

    They are of NumPy's own numbers, and give their state in 1 µs instead of 40. Where it lies is said by NumPy;
    read and set there, it has to be the same as by NumPy's own way.
    """
    import numpy

    MT19937, size = numpy.random.MT19937, 4 * 625  # noqa: N806  # a class

    class Twister(MT19937):  # type: ignore[misc, valid-type]  # where NumPy is loaded alone
        def __init__(self, seed: int = 0) -> None:
            super().__init__(seed)
            place: int = self.ctypes.state_address
            if not id(self) < place <= id(self) + MT19937.__basicsize__ - size:
                raise RuntimeError("NumPy keeps the state of its bit generator outside of the object")
            self.memory = memoryview((ctypes.c_char * size).from_address(place)).cast("B")
            self.words = self.memory.cast("I")
            self._key = numpy.frombuffer(self.words, numpy.uint32)[:-1]

        @property
        def state(self) -> Any:
            return {"bit_generator": "MT19937", "state": {"key": self._key.copy(), "pos": self.words[-1]}}

        @state.setter
        def state(self, state: Any) -> None:
            if type(state) is dict and state.get("bit_generator") == "MT19937":
                self._key[:], self.words[-1] = state["state"]["key"], int(state["state"]["pos"])
            else:  # another form, or an error, which NumPy words
                plain = MT19937()
                plain.state = state
                self.state = plain.state

        def __reduce__(self) -> Any:
            plain = MT19937()  # whoever loads it needs nothing of fluxloop's
            plain.state = self.state
            return plain.__reduce__()

    def agree(bits: Any, other: Any) -> bool:
        states = bits.state["state"], MT19937.state.__get__(other)["state"]
        return numpy.array_equal(*(each["key"] for each in states)) and states[0]["pos"] == states[1]["pos"]

    try:
        made, other = Twister(0), MT19937(1)
    except (RuntimeError, AttributeError):
        return None
    if not agree(made, made):
        return None
    made.state = other.state
    return Twister if agree(made, made) and agree(made, other) else None


_spare_bits: list[Any] = []
"""Bit generators that nobody uses: making one takes 100 µs."""


def _lend_bits() -> Any:
    """Return a bit generator for NumPy that nobody uses."""
    if _spare_bits:
        return _spare_bits.pop()
    return (quick_bits() or sys.modules["numpy"].random.MT19937)(0)


class preserved(AbstractContextManager[None]):  # noqa: N801 - used like a function
    """Put the global generators of torch, NumPy and Python back as they were on leaving.

    Inside, NumPy draws from a bit generator whose state is copied in one piece, so that what is preserved there again
    costs little.

    Args:
        numpy_too: Whether NumPy's, which takes most of the time where none is around it, is among them.
    """

    def __init__(self, numpy_too: bool = True) -> None:
        self._numpy_too = numpy_too

    def __enter__(self) -> None:
        numpy = sys.modules.get("numpy") if self._numpy_too else None
        self._torch = torch.default_generator.get_state()
        self._cuda = [(each, each.get_state()) for each in cuda_generators()]
        self._numpy: Any = None
        self._lent: Any = None
        if numpy is not None:
            generator = numpy.random
            bits, state = self._numpy = generator.get_bit_generator(), generator.get_state(legacy=False)
            if type(bits) is generator.MT19937 and quick_bits() is not None:
                self._lent = _lend_bits()
                generator.set_bit_generator(self._lent)
                generator.set_state(state)
        self._python = _python_state()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.default_generator.set_state(self._torch)
        for each, state in self._cuda:
            each.set_state(state)
        if self._numpy is not None:
            generator, (bits, state) = sys.modules["numpy"].random, self._numpy
            if generator.get_bit_generator() is not bits:
                generator.set_bit_generator(bits)
            generator.set_state(state)
            if self._lent is not None:
                _spare_bits.append(self._lent)
        _put_python(self._python)


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


class NumPyAndPythonPreserved(AbstractContextManager[None]):
    """Leave NumPy's and Python's global generators as they were, between two steps; may be entered again.

    NumPy draws from a bit generator of its own meanwhile, which the code inside seeds itself.
    """

    def __init__(self) -> None:
        self._scratch: Any = None
        self._numpy: Any = None
        self._python: Any = None

    def __enter__(self) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            self._numpy = numpy.random.get_bit_generator()
            self._scratch = self._scratch or _lend_bits()
            numpy.random.set_bit_generator(self._scratch)
        self._python = _python_state()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._numpy is not None:
            sys.modules["numpy"].random.set_bit_generator(self._numpy)
            self._numpy = None
        _put_python(self._python)


class NumPyAndPythonContinued(AbstractContextManager[None]):
    """Let NumPy and Python draw from generators apart, which go on from where they were the last time.

    Args:
        number: What they start from.
    """

    def __init__(self, number: int) -> None:
        numpy = sys.modules.get("numpy")
        self._bits = numpy.random.MT19937(number) if numpy is not None else None
        former = _python_state()
        random.seed(number)
        self._python = _python_state()
        _put_python(former)
        self._own: Any = None

    def __enter__(self) -> None:
        if self._bits is not None:
            self._own = sys.modules["numpy"].random.get_bit_generator()
            sys.modules["numpy"].random.set_bit_generator(self._bits)
        self._former = _python_state()
        _put_python(self._python)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._python = _python_state()
        _put_python(self._former)
        if self._bits is not None:
            sys.modules["numpy"].random.set_bit_generator(self._own)
