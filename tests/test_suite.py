"""The tests themselves: each file is collected, and each name is a sentence."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def names_in(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)


def test_every_file_with_tests_is_collected_and_no_collected_file_is_empty() -> None:
    for path in FILES:
        assert bool(names_in(path)) == path.name.startswith("test_"), path.name


def test_no_two_files_have_one_name() -> None:
    """pytest imports them by their names alone; what each folder's tests get stands in a conftest.py."""
    assert [name for name, times in Counter(path.name for path in FILES).items() if times > 1] in ([], ["conftest.py"])


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("test_")], ids=lambda path: path.stem)
def test_tests_have_names_of_their_own_that_are_words(path: Path) -> None:
    """A second function of the same name hides the first, and a code such as ``ab_07`` says nothing to a reader."""
    tests = names_in(path)
    assert tests
    assert [name for name, times in Counter(tests).items() if times > 1] == []
    assert [name for name in tests if re.match(r"test_([a-z]{1,2}_)*[a-z]{1,2}_?\d{2}_", name)] == []
    assert [name for name in tests if name.count("_") < 3] == []
