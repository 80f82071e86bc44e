"""The reference of the site lists every public name once, on a page that the site shows."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import fluxloop

SITE = Path(__file__).parents[1] / "docs" / "site"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", SITE / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_stands_on_one_page() -> None:
    pages = dict(load().reference())
    listed = Counter(
        line.removeprefix("::: ").rpartition(".")[2]
        for text in pages.values()
        for line in text.splitlines()
        if line.startswith("::: ")
    )
    not_listed = {name for name in fluxloop.__all__ if name not in listed}
    assert not_listed == {"augment", "errors", "events", "heads", "losses", "schedules", "testing", "NumberSinceBest"}
    assert fluxloop.NumberSinceBest is fluxloop.NoImprovement
    assert {*fluxloop.losses.__all__} - {"ADVERSARIAL_LOSSES"} <= listed.keys()
    assert {"assert_observer", "toy_learner", "random_affine"} <= listed.keys()
    assert max(listed.values()) == 1


def test_every_page_of_the_reference_and_of_the_docs_is_in_the_navigation() -> None:
    navigation = (SITE / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nplugins:")[0]
    pages = [*dict(load().reference()), *(path.name for path in SITE.parent.glob("*.md"))]
    assert [page for page in pages if navigation.count(f" {page}\n") != 1] == []
