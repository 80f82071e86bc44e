"""The table of phases in the docs, held against the classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.nn import functional

from fluxloop import AbstractTrainingPhase, losses, phases
from fluxloop.phases.objective import ObjectivePhase

PAGE = Path(__file__).parents[2] / "docs" / "research-phases.md"
BASES = {"JointEmbeddingPhase", "NoisedPhase", "ObjectivePhase", "PerOptimizerPhase", "TeacherPhase", "TrainingPhase"}
ROWS = {
    cells[0].strip(" `"): cells[1:]
    for line in PAGE.read_text().splitlines()
    if len(cells := line.split("|")[1:-1]) == 4
}
METHODS = [
    name for name in phases.__all__ if name not in BASES and issubclass(getattr(phases, name), AbstractTrainingPhase)
]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_table_has_every_method_once() -> None:
    listed = [name for name in ROWS if name.endswith("Phase")]
    assert sorted(set(METHODS) - set(listed)) == [], "add them to the table of docs/research-phases.md"
    assert listed == sorted(METHODS, key=listed.index)


@pytest.mark.parametrize("name", METHODS)
def test_the_models_and_the_losses_of_a_method_are_those_that_it_uses(name: str) -> None:
    cls = getattr(phases, name)
    models, _, loss = ROWS[name]
    if issubclass(cls, ObjectivePhase):
        assert set(cls.parts) <= names(models)
    assert names(models) or models.strip() == "one", f"the row of {name} names no model, and does not say: one"
    for each in names(loss):
        assert hasattr(losses, each) or hasattr(functional, each)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_its_paper_its_models_its_batches_and_its_entries(name: str) -> None:
    text = " ".join((getattr(phases, name).__doc__ or "").split())
    assert name == "ModelLossPhase" or re.search(r"\(?[A-Z]\w+[^()]*,? (19|20)\d\d\)", text)
    assert "Model" in text
    assert "atches" in text
    assert "ntries" in text or "what the step stores" in text
