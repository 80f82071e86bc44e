from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from fluxloop import (
    EMA,
    Callback,
    CustomCallback,
    EarlyStopping,
    GarbageCollect,
    GradientClip,
    KeepBestModel,
    LearningRate,
    Metrics,
    MetricsPrinter,
    MixUp,
    NoConflict,
    Profile,
    ProgressBar,
    Recorder,
    RunFirst,
    Scheduler,
    StepEnd,
    StopOnNaNLoss,
    TrainingPhase,
    cosine,
    on,
    resolve_conflict,
)
from fluxloop.callback import resolution
from fluxloop.order.access import overlap
from fluxloop.order.diagram import Diagram
from fluxloop.testing import toy_learner


def drawn(*callbacks: Callback) -> Diagram:
    found: Diagram = toy_learner(*callbacks).callbacks.plot()
    return found


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_text_lists_the_callbacks_in_order_with_what_is_read_and_written() -> None:
    assert str(
        drawn(CustomCallback(print, StepEnd, TrainingPhase, name="hook"), Metrics(), Recorder())
    ).splitlines() == [
        "1. Recorder",
        "2. Metrics",
        "     after Recorder: Metrics declares run_after = Recorder",
        "     after Recorder: Recorder writes 'cbstate.history', Metrics reads 'cbstate.history'",
        "3. hook",
        "     after Metrics: Metrics writes 'cbstate.metrics', hook reads '*'",
        "     after Recorder: Recorder writes 'cbstate.history', hook reads '*'",
    ]


def test_the_picture_is_valid_and_has_each_callback_and_each_reason() -> None:
    learner = toy_learner(Metrics(), Recorder(), ProgressBar(), GradientClip(1.0), EMA("model", 0.9), StopOnNaNLoss())
    found = texts(learner.callbacks.plot().svg)
    assert found[: len(learner.callbacks.order)] == learner.callbacks.order
    reasons = [f"after {edge.before}: {edge.reason}" for edge in learner.callbacks.graph.edges]
    assert sorted(found[len(learner.callbacks.order) :]) == sorted(reasons)


def quoted(reason: str, verb: str) -> tuple[str, ...]:
    found = re.search(rf"{verb} '([^']+)'", reason)
    assert found, reason
    return () if found[1] == "*" else tuple(found[1].split("."))


def everybody() -> list[Callback]:
    return [
        *(Metrics(), Recorder(), ProgressBar(), GradientClip(1.0), EMA("model", 0.9), StopOnNaNLoss(), MixUp(0.4)),
        *(EarlyStopping(2), MetricsPrinter(), Scheduler({LearningRate: cosine(10, 0.1, 0.0)}), KeepBestModel()),
        *(GarbageCollect(5), Profile(), CustomCallback(print, StepEnd, TrainingPhase, name="hook")),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_each_arrow_is_a_constraint_that_follows_from_what_its_two_callbacks_declare(seed: int) -> None:
    listed = everybody()
    random.Random(seed).shuffle(listed)
    learner = toy_learner(*listed)
    diagram = learner.callbacks.plot()
    by_id = dict(zip(learner.callbacks.order, learner.callbacks, strict=True))
    nodes = {node.id: node for node in learner.callbacks.graph.nodes}
    position = {id: index for index, id in enumerate(by_id)}
    names = dict(re.findall(r'^    (n\d+)\["(.+)"\]$', diagram.mermaid, re.MULTILINE))
    assert list(names.values()) == learner.callbacks.order
    arrows = re.findall(r'^    (n\d+) -->\|"(.+)"\| (n\d+)$', diagram.mermaid, re.MULTILINE)
    assert len(arrows) > 20
    for tail, reasons, head in arrows:
        before, after = by_id[names[tail]], by_id[names[head]]
        assert position[names[tail]] < position[names[head]]
        for reason in reasons.split("<br/>"):
            if "run_after" in reason:
                cls = reason.rpartition(" = ")[2]
                assert cls in {each.__name__ for each in after.run_after}
                assert cls in {each.__name__ for each in type(before).__mro__}
            elif "resolve_conflict" in reason:
                assert reason == f"resolve_conflict says RunFirst({names[tail]})"
                assert RunFirst(before) in (resolve_conflict(before, after), resolve_conflict(after, before))
            else:
                written, read = quoted(reason, "writes"), quoted(reason, "reads")
                assert written in nodes[names[tail]].access.writes
                assert read in nodes[names[head]].access.reads
                assert overlap(written, read)
    # and each pair of a writer and a reader that is no writer of the same has an arrow, one way or the other
    pairs = {frozenset((names[tail], names[head])) for tail, _, head in arrows}
    for (id, node), (other, reader) in permutations(nodes.items(), 2):
        needed = [w for w in node.access.writes if any(overlap(w, r) for r in reader.access.reads)]
        if any(not any(overlap(w, v) for v in reader.access.writes) for w in needed):
            assert {id, other} in pairs or isinstance(resolution(node.callback, reader.callback), NoConflict)
    # the same for any order of the list
    assert diagram == toy_learner(*everybody()).callbacks.plot()


def test_an_arrow_leads_down_from_each_callback_to_those_that_wait_for_it() -> None:
    learner = toy_learner(Metrics(), Recorder(), ProgressBar(), GradientClip(1.0))
    svg = learner.callbacks.plot().svg
    heights = [float(y) for y in re.findall(r'<rect x="16" y="([\d.]+)"', svg)]
    place = {id: y + 11 for id, y in zip(learner.callbacks.order, heights, strict=True)}
    arrows = re.findall(r'd="M[\d.]+,([\d.]+) H.*?Q[\d.]+,([\d.]+) [\d.]+,[\d.]+ H', svg)
    led = {(float(begin) - 5, float(end) + 5) for begin, end in arrows}
    assert led == {(place[edge.before], place[edge.after]) for edge in learner.callbacks.graph.edges}


def test_arrows_that_pass_each_other_run_in_lanes_of_their_own() -> None:
    svg = drawn(Metrics(), Recorder(), ProgressBar(), GradientClip(1.0), StopOnNaNLoss()).svg
    runs = re.findall(r"Q([\d.]+),[\d.]+ [\d.]+,([\d.]+) V([\d.]+) Q", svg)
    lanes: dict[str, list[tuple[float, float]]] = {}
    for lane, begin, end in runs:
        for other in lanes.setdefault(lane, []):
            assert float(end) <= other[0] or other[1] <= float(begin)
        lanes[lane].append((float(begin), float(end)))
    assert len(lanes) > 1


NAMES = ["<b> & 'c'", 'say "hi"', "a; b #35; c", "`code`", "%%{init}%%", "back\\slash", "two\nlines", "[x] {y} (z)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_signs_of_a_language_is_shown_as_it_is(name: str) -> None:
    diagram = drawn(CustomCallback(print, StepEnd, name=name), Recorder())
    shown = name.replace("\n", " ")
    assert shown in [" ".join(text.split("\n")) for text in texts(diagram.svg)]
    _, _, node, arrow = diagram.mermaid.splitlines()
    label = re.fullmatch(r'    n1\["([^"`;&<>%\\]|#\d+;)+"\]', node)
    assert label, node
    decoded = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), node)
    assert decoded == f'    n1["{shown}"]'
    assert arrow.count('"') == 2
    (dot,) = [
        line for line in toy_learner(CustomCallback(print, StepEnd, name=name)).callbacks.to_dot().splitlines()[1:-1]
    ]
    assert re.fullmatch(r'    "([^"\\]|\\["\\])+";', dot), dot


def test_a_notebook_gets_a_picture_mermaid_and_text() -> None:
    diagram = drawn(Metrics(), Recorder())
    bundle = diagram._repr_mimebundle_()
    assert bundle["text/plain"] == str(diagram) == repr(diagram)
    assert bundle["text/vnd.mermaid"] == diagram.mermaid
    assert diagram.mermaid in bundle["text/markdown"]
    assert bundle["image/svg+xml"] == diagram.svg
    assert diagram.svg in bundle["text/html"] == diagram._repr_html_()
    assert 'n0 -->|"' in diagram.mermaid
    assert "Recorder writes 'cbstate.history', Metrics reads 'cbstate.history'" in diagram.mermaid


@pytest.mark.parametrize(("name", "begins"), [("g.svg", "<svg"), ("g.mmd", "flowchart"), ("g.txt", "1. Recorder")])
def test_it_is_saved_as_the_name_says(name: str, begins: str, tmp_path: Path) -> None:
    drawn(Metrics(), Recorder()).save(tmp_path / name)
    assert (tmp_path / name).read_text().startswith(begins)


def test_another_kind_of_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"g.png.* expected a name that ends with .svg, .mmd, .txt"):
        drawn(Recorder()).save(tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def test_a_learner_without_callbacks_has_a_picture_that_says_so() -> None:
    diagram = drawn()
    assert str(diagram) == "there are no callbacks"
    assert texts(diagram.svg) == ["there are no callbacks"]
    assert diagram.mermaid == "flowchart TD"


class Late(Callback):
    """Reads what everybody writes."""

    reads = ("*",)

    @on(StepEnd)
    def look(self, event: StepEnd, phase: Any, learner: Any) -> None: ...


def test_drawing_changes_nothing() -> None:
    learner = toy_learner(Metrics(), Recorder(), Late())
    before = learner.callbacks.digest
    assert learner.callbacks.plot().svg == learner.callbacks.plot().svg
    assert learner.callbacks.digest == before
