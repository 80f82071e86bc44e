from __future__ import annotations

import gc

import pytest

from fluxloop.data.notes import Notes


class Thing:
    __hash__ = None  # type: ignore[assignment]  # as data sets with an __eq__ of their own are

    def __eq__(self, other: object) -> bool:
        return True


@pytest.mark.slow
def test_a_note_is_of_one_object_and_goes_with_it() -> None:
    notes: Notes[int] = Notes()
    one, other = Thing(), Thing()
    notes.put(one, 1)
    assert (notes.get(one), notes.get(other)) == (1, None)
    notes.put(one, None)
    notes.put(one, 3)
    notes.put(other, 2)
    assert (notes.get(one), notes.get(other)) == (3, 2)
    del one
    gc.collect()
    assert len(notes._notes) == 1


def test_nothing_is_noted_of_what_cannot_be_referred_to_weakly() -> None:
    notes: Notes[int] = Notes()
    rows = [1]
    notes.put(rows, 1)
    assert notes.get(rows) is None
