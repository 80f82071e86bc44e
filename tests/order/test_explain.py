from __future__ import annotations

from typing import Any

import pytest
import torch

from fluxloop import (
    Callback,
    CallbackError,
    CustomCallback,
    Event,
    Learner,
    Metrics,
    Recorder,
    RunFirst,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    resolve_conflict,
)
from fluxloop.order.runner import Callbacks
from fluxloop.testing import EventRecorder, toy_learner
from read_pages import read_page


class Fired(Event):
    """A user's event."""


class Firing(TrainingPhase):
    """The usual phase with an event of its own."""

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        super().body(learner, handle, state)
        handle(Fired())


def test_explain_gives_the_handlers_of_each_event_of_each_phase_in_order_with_reasons() -> None:
    learner = toy_learner(Metrics(), Recorder(), CustomCallback(print, StepEnd, TrainingPhase, name="hook"))
    assert str(learner.callbacks.explain()).splitlines() == [
        "FittingPhase",
        "TrainingPhase",
        "  EpochBegin: Recorder → Metrics",
        "  UpdateEnd: Recorder",
        "  StepEnd: Recorder → Metrics → hook",
        "  EpochEnd: Recorder → Metrics",
        "  steps are fusable as far as callbacks go; the body is tried when it is compiled",
        "ValidationPhase",
        "  EpochBegin: Recorder → Metrics",
        "  StepEnd: Recorder → Metrics",
        "  EpochEnd: Recorder → Metrics",
        "  steps are fusable as far as callbacks go; the body is tried when it is compiled",
        "because",
        "  Metrics before hook: Metrics writes 'cbstate.metrics', hook reads '*'",
        "  Recorder before Metrics: Metrics declares run_after = Recorder",
        "  Recorder before Metrics: Recorder writes 'cbstate.history', Metrics reads 'cbstate.history'",
        "  Recorder before hook: Recorder writes 'cbstate.history', hook reads '*'",
        "Callbacks that nothing orders run in the order of their names, not of the list.",
    ]


def test_explain_tells_of_the_phases_that_have_run_and_of_users_events() -> None:
    learner = toy_learner(CustomCallback(print, Fired, name="hears"), num_batches=1)
    learner.set_callbacks([EventRecorder()])
    learner.fit(1, phases=[Firing()])
    told = str(learner.callbacks.explain())
    assert "Firing\n" in told
    assert "  Fired: EventRecorder" in told
    assert "ValidationPhase" not in told
    assert "  FitBegin: EventRecorder" in told


def test_explain_leaves_out_what_a_phase_never_fires() -> None:
    told = str(toy_learner(EventRecorder()).callbacks.explain())
    fitting, rest = told.split("TrainingPhase\n")
    training, validation = rest.split("ValidationPhase\n")
    assert "StepEnd" not in fitting
    assert "UpdateBegin" in training
    assert "FitBegin" not in training
    assert "UpdateBegin" not in validation
    assert "BackwardBegin" not in validation


def test_explain_of_a_path_tells_who_touches_it_when_and_how() -> None:
    learner = toy_learner(Recorder(), Metrics(), StopOnNaNLoss())
    told = str(learner.callbacks.explain("step.loss"))
    assert "'step.loss' is touched by:" in told
    assert "Metrics reads 'step' at EpochBegin (Phase), EpochEnd (Phase), StepEnd (Phase)" in told
    assert "StopOnNaNLoss reads 'step.loss' at BackwardBegin (Phase)" in told
    assert "Recorder" not in told
    assert "Recorder writes 'cbstate.history'" in str(learner.callbacks.explain("cbstate.history"))
    assert "Recorder writes 'cbstate.history'" in str(learner.callbacks.explain("cbstate"))


def test_explain_of_a_model_names_its_optimizer_and_of_no_other() -> None:
    models = {"G": torch.nn.Linear(1, 1), "D": torch.nn.Linear(1, 1)}
    learner = Learner(models, callbacks=[CustomCallback(print, StepEnd, reads=("model.G",), name="samples")])
    told = str(learner.callbacks.explain("model.G"))
    assert "samples reads 'model.G' at StepEnd (Phase)" in told
    assert "optimizer 'G' writes its parameters between UpdateBegin and UpdateEnd" in told
    assert "'D'" not in told


def test_explain_of_one_model_does_not_name_the_optimizer_of_another_with_such_a_name_inside() -> None:
    models = {"G": torch.nn.Linear(1, 1), "BIG": torch.nn.Linear(1, 1)}
    told = str(Learner(models, default_callbacks=False).callbacks.explain("model.G"))
    assert "optimizer 'G'" in told
    assert "optimizer 'BIG'" not in told


def test_explain_of_a_path_that_nobody_touches_says_so() -> None:
    assert "nobody" in str(toy_learner(Recorder()).callbacks.explain("step.loss"))


def test_explain_of_an_unknown_root_suggests_a_known_one() -> None:
    with pytest.raises(CallbackError, match="did you mean 'step'"):
        toy_learner().callbacks.explain("stp.loss")


def test_explain_prints_as_text_and_is_searched_as_text() -> None:
    learner = toy_learner(Recorder())
    explanation = learner.callbacks.explain()
    assert repr(explanation) == str(explanation)
    assert "StepEnd: Recorder" in explanation
    assert "StepEnd: Metrics" not in explanation


# Drawing


def drawn() -> Callbacks:
    one, two = (type(name, (Callback,), {"writes": ("step.loss",)}) for name in ("One", "Two"))
    resolve_conflict.register(one, two)(lambda a, b: RunFirst(b))
    return toy_learner(one(), two(), Recorder(), Metrics(), CustomCallback(print, StepEnd, name="hook")).callbacks


def test_to_mermaid_has_each_node_and_the_reasons_of_each_edge() -> None:
    callbacks = drawn()
    text = callbacks.to_mermaid()
    number = {id: f"n{index}" for index, id in enumerate(callbacks.order)}
    assert text.startswith("flowchart TD")
    for id in ("One", "Two", "Recorder", "Metrics", "hook"):
        assert f'{number[id]}["{id}"]' in text
    for edge in callbacks.graph.edges:
        arrow = next(
            line
            for line in text.splitlines()
            if f"{number[edge.before]} -->" in line and line.endswith(number[edge.after])
        )
        assert edge.reason in arrow
    assert "resolve_conflict says RunFirst(Two)" in text


def test_to_dot_has_each_node_and_the_reasons_of_each_edge() -> None:
    callbacks = drawn()
    text = callbacks.to_dot()
    assert text.startswith("digraph")
    assert text.endswith("}")
    for id in callbacks.order:
        assert f'"{id}";' in text
    for edge in callbacks.graph.edges:
        arrow = next(line for line in text.splitlines() if f'"{edge.before}" -> "{edge.after}"' in line)
        assert edge.reason in arrow


def test_there_is_one_arrow_for_each_pair() -> None:
    callbacks = drawn()
    pairs = {(edge.before, edge.after) for edge in callbacks.graph.edges}
    assert len(callbacks.graph.edges) > len(pairs)
    assert callbacks.to_mermaid().count("-->") == callbacks.to_dot().count("->") == len(pairs)


def test_names_with_quotes_do_not_break_the_drawings() -> None:
    callbacks = toy_learner(Recorder(), CustomCallback(print, StepEnd, name='say "hi"')).callbacks
    node = next(line for line in callbacks.to_mermaid().splitlines() if "say" in line and "-->" not in line)
    assert node.count('"') == 2
    statements = [line for line in callbacks.to_dot().splitlines() if "say" in line]
    assert all(line.replace('\\"', "").count('"') % 2 == 0 for line in statements)
    assert '"say "hi""' not in callbacks.to_dot()


def test_a_notebook_shows_the_text_and_the_diagram() -> None:
    callbacks = drawn()
    for shown in (callbacks, callbacks.explain(), callbacks.explain("step.loss")):
        bundle = shown._repr_mimebundle_()
        assert set(bundle) == {"text/plain", "text/markdown", "text/html"}
        assert bundle["text/html"] == shown._repr_html_() if shown is not callbacks else True
        assert callbacks.to_mermaid() in bundle["text/markdown"]
        assert "```mermaid" in bundle["text/markdown"]
        assert bundle["text/plain"] in bundle["text/markdown"]
    assert callbacks._repr_mimebundle_()["text/plain"] == str(callbacks.explain())
    assert callbacks._repr_mimebundle_(include=None, exclude=None)


def test_a_notebook_shows_each_callback_each_reason_and_who_touches_a_path() -> None:
    callbacks = drawn()
    found = read_page(callbacks.explain()._repr_html_())
    assert [word for word in found.words if word in callbacks.order] == callbacks.order
    for edge in callbacks.graph.edges:
        assert any(w.startswith(f"{edge.before} → {edge.after}: ") and edge.reason in w for w in found.words)
    assert str(callbacks.explain()) in found.words
    words = [word.strip() for word in read_page(callbacks.explain("step.loss")._repr_html_()).words]
    assert [words[words.index(id) + 1] for id in ("One", "Two", "hook")] == ["writes", "writes", "reads"]
    assert words[words.index("Recorder") + 1] not in ("reads", "writes")


def test_explaining_without_callbacks_draws_an_empty_graph() -> None:
    callbacks = toy_learner().callbacks
    assert callbacks.order == []
    assert callbacks.to_mermaid() == "flowchart TD"
    assert "because" not in callbacks.explain()
    assert read_page(callbacks.explain()._repr_html_()).count("svg") == 0
