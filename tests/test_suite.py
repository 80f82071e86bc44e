"""The tests themselves: each file is collected, and each name is a sentence."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def functions(path: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]


def test_every_file_with_tests_is_collected_and_no_collected_file_is_empty() -> None:
    for path in FILES:
        has_tests = any(name.startswith("test_") for name in functions(path))
        assert has_tests == path.name.startswith("test_"), path.name


def test_no_two_files_have_one_name() -> None:
    """pytest imports them by their names alone; what each folder's tests get stands in a conftest.py."""
    assert [name for name, times in Counter(path.name for path in FILES).items() if times > 1] in ([], ["conftest.py"])


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("test_")], ids=lambda path: path.stem)
def test_tests_have_names_of_their_own_that_are_words(path: Path) -> None:
    """A second function of the same name hides the first, and a code such as ``ab_07`` says nothing to a reader."""
    tests = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    tests = [name for name in tests if name.startswith("test_")]
    assert [name for name, times in Counter(tests).items() if times > 1] == []
    assert [name for name in tests if re.match(r"test_([a-z]{1,2}_)*[a-z]{1,2}_?\d{2}_", name)] == []
    assert [name for name in tests if name.count("_") < 3] == []
