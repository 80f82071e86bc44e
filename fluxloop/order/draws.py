"""What handlers draw: from which stream, and how the training's random numbers are kept from it."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from fluxloop.randomness import PYTHON, Memory, Stream, cuda_generators, drawing, preserved, python_memory, start_others

Call = Callable[..., None]

NOTICED = 16
"""How many calls of a handler are looked at."""


def with_own_stream(call: Call, stream: Callable[[], Stream]) -> Call:
    """Wrap a function so that it draws from its own stream and leaves the global generators as they were."""

    def apart(*args: Any) -> None:
        with drawing(stream().next()):
            call(*args)

    return apart


def putting_back(call: Call) -> Call:
    """Wrap a function so that it leaves the global generators as they were, to the last bit."""

    def apart(*args: Any) -> None:
        with preserved():
            call(*args)

    return apart


def noticing(call: Call, tell: Callable[[], object]) -> Call:
    """Wrap a function so that `tell` is called where one of its first calls draws torch's numbers.

    Comparing states takes some 10 µs: later calls are not looked at.

    Args:
        call: The function.
        tell: Called once.
    """
    calls_left = NOTICED

    def noticed(*args: Any) -> None:
        nonlocal calls_left
        if not calls_left:
            call(*args)
            return
        calls_left -= 1
        before = _torchs()
        call(*args)
        if not all(map(torch.equal, before, _torchs())):
            calls_left = 0
            tell()

    return noticed


def _torchs() -> list[torch.Tensor]:
    """Return where torch's global generators stand."""
    return [each.get_state() for each in (torch.default_generator, *cuda_generators())]


def drawing_apart(call: Call, stream: Callable[[], Stream], in_step: bool) -> Call:
    """Wrap a function that does not say whether it draws so that it leaves the global generators as they were.

    It draws torch's numbers as they are there, which are others in each step. NumPy's and Python's go on from step to
    step, and would be the same in each step of an epoch that draws none: they are those of a stream of the function's
    own, which starts both anew after each call that drew one.

    Nothing is compared but four of the numbers: putting states back, in one piece, takes less time than comparing them.

    Args:
        call: The function.
        stream: Returns its stream.
        in_step: Whether NumPy may have a normal number in store, which goes on; between two steps it is dropped.
    """
    python = python_memory()
    if python is None:
        return _slowly(call, stream)
    (pythons, places), slowly, torchs = python, _slowly(call, stream), torch.default_generator
    numpys: Any = None
    own: Stream | None = None
    start: _Start | None = None

    def apart(*args: Any) -> None:
        nonlocal numpys, own, start
        if numpys is None and "numpy" in sys.modules:
            numpys = sys.modules["numpy"].random
        bits: Any = None if numpys is None else numpys.get_bit_generator()
        if not hasattr(bits, "words"):
            slowly(*args)
            return
        memory, words = bits.memory, bits.words
        in_torch, in_python, normal = torchs.get_state(), pythons.tobytes(), PYTHON.gauss_next
        in_numpy = numpys.get_state(legacy=False) if in_step else memory.tobytes()
        devices = cuda_generators()
        in_devices = [(each, each.get_state()) for each in devices] if devices else []
        try:
            own = own or stream()
            if start is None or start.index != own.index or start.base != own.base:
                start = _Start(own, bits, python)
            memory[:], pythons[:], PYTHON.gauss_next = start.in_numpy, start.in_python, None
            if in_step:
                numpys.set_bit_generator(bits)  # drops the normal number in store
            call(*args)
        finally:
            drew = start is None or start.marks != (words[0], words[-1], places[0], places[1])
            if drew and own is not None:
                own.next()
            if drew or numpys.get_bit_generator() is not bits:
                numpys.set_bit_generator(bits)
            if in_step:
                numpys.set_state(in_numpy)
            else:
                memory[:] = in_numpy
            pythons[:], PYTHON.gauss_next = in_python, normal
            torchs.set_state(in_torch)
            for each, state in in_devices:
                each.set_state(state)

    return apart


class _Start:
    """What a use of a stream starts NumPy's and Python's generators from; drawing changes one of the marks at least."""

    __slots__ = ("base", "in_numpy", "in_python", "index", "marks")

    def __init__(self, own: Stream, bits: Any, python: Memory) -> None:
        self.base, self.index = own.base, own.index
        start_others(own.at(own.index))
        self.in_numpy, self.in_python = bits.memory.tobytes(), python.memory.tobytes()
        self.marks = (bits.words[0], bits.words[-1], python.words[0], python.words[1])


def _slowly(call: Call, stream: Callable[[], Stream]) -> Call:
    """Wrap a function likewise, where the states of NumPy's and Python's generators are not copied in one piece."""

    def apart(*args: Any) -> None:
        own = stream()
        with preserved():
            start_others(own.at(own.index))
            before = _others()
            try:
                call(*args)
            finally:
                if _others() != before:
                    own.next()

    return apart


def _others() -> tuple[bytes, Any]:
    """Return where NumPy's and Python's global generators stand."""
    numpy = sys.modules.get("numpy")
    return b"" if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False)), random.getstate()
