from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define, field, frozen

from fluxloop import Metrics, Recorder
from fluxloop.callbacks.log import LogMetrics
from fluxloop.errors import LogExistsError
from fluxloop.logging import (
    CSV,
    JSONL,
    Backend,
    Histogram,
    Image,
    Loggable,
    Memory,
    Scalar,
    TensorBoard,
    Text,
    log_to,
)
from fluxloop.testing import toy_learner
from processes.pretended import Alone


@define(eq=False, slots=False)
class Fragile(Backend):
    """Write down what is done, and fail where asked."""

    fails: str = ""
    done: list[str] = field(factory=list)

    def do(self, what: str) -> None:
        self.done.append(what)
        if what == self.fails:
            raise OSError(28, "No space left on device")

    def _open(self) -> None:
        self.do("open")

    def _flush(self) -> None:
        self.do("flush")

    def _close(self) -> None:
        self.do("close")

    def _found(self) -> str | None:
        self.do("find")
        return None

    def _position(self) -> int:
        self.do("position")
        return len(self.done)

    def __repr__(self) -> str:
        return f"Fragile({self.fails!r})"


@log_to.register(Fragile, Scalar)
def _write(backend: Fragile, scalar: Scalar, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.do("write")


def test_it_is_opened_at_the_first_write_and_again_after_closing() -> None:
    backend = Fragile()
    backend.flush()
    backend.close()
    assert backend.done == []
    log_to(backend, Scalar(1), "loss", 1)
    log_to(backend, Scalar(1), "loss", 2)
    assert backend.done == ["find", "open", "write", "write"]
    backend.close()
    backend.close()
    log_to(backend, Scalar(1), "loss", 3)
    assert backend.done[4:] == ["flush", "position", "close", "open", "write"]


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("fails", ["find", "open", "write", "flush", "position", "close"])
def test_a_backend_that_fails_warns_once_and_is_left_alone_and_the_training_goes_on(fails: str) -> None:
    backend, memory = Fragile(fails), Memory()
    learner, plain = toy_learner(Recorder(), Metrics(), LogMetrics(backend, memory)), toy_learner()
    with pytest.warns(UserWarning, match=r"Fragile\(.*\) failed to .*left alone.*OSError.*No space left") as caught:
        learner.fit(2)
    assert len(caught) == 1
    done = len(backend.done)
    learner.fit(1)
    plain.fit(3)
    assert len(backend.done) == done
    assert torch.equal(learner.model.value, plain.model.value)
    assert [step for step, _ in memory.series("epoch/training/loss")] == [1, 2, 3]
    assert "position" in backend.state_dict()


def test_what_cannot_be_flushed_while_closing_is_let_go_all_the_same() -> None:
    backend = Fragile("flush")
    log_to(backend, Scalar(1), "loss", 1)
    with pytest.warns(UserWarning, match="failed to be closed"):
        backend.close()
    assert backend.done[-1] == "close"


def test_an_interrupt_while_writing_is_no_failure() -> None:
    class Interrupted(Backend):
        def _flush(self) -> None:
            raise KeyboardInterrupt

    @log_to.register(Interrupted, Scalar)
    def _(backend: Interrupted, *what: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_to(Interrupted(), Scalar(1), "loss", 1)


def test_a_loggable_that_it_cannot_hold_is_left_out_with_one_word_for_each_kind() -> None:
    backend, memory = Fragile(), Memory()
    with pytest.warns(UserWarning, match=r"Fragile\(''\) cannot hold Image, which is left out; it holds Scalar"):
        log_to([backend, memory], Image(torch.zeros(2, 2)), "image", 1)
    log_to([backend, memory], Image(torch.zeros(2, 2)), "image", 2)
    log_to([backend, memory], Image(torch.zeros(2, 2)), "other", 2)
    with pytest.warns(UserWarning, match="cannot hold Text"):
        log_to(backend, Text("words"), "text", 1)
    log_to(backend, Scalar(1), "loss", 1)
    assert backend.done == ["find", "open", "write"]
    assert len(memory.records) == 3


def test_tuples_and_lists_of_backends_fan_out() -> None:
    first, second, third = Memory(), Memory(), Memory()
    log_to((first, [second, third]), Scalar(1), "loss", 1, "epoch")
    for memory in (first, second, third):
        assert memory.series("epoch/loss") == [(1, 1.0)]


def test_a_loggable_of_ones_own_is_one_class_and_one_function(tmp_path: Path) -> None:
    @frozen
    class Confusion(Loggable):
        table: list[list[int]]

    @log_to.register(Backend, Confusion)
    def _(backend: Backend, confusion: Confusion, name: str, step: int, group: tuple[str, ...]) -> None:
        log_to(backend, Text(str(confusion.table)), name, step, group)

    backend = JSONL(tmp_path / "log.jsonl")
    log_to(backend, Confusion([[3, 1]]), "confusion", 2, ("epoch",))
    backend.close()
    assert (tmp_path / "log.jsonl").read_text().endswith('"name": "confusion", "value": "[[3, 1]]"}\n')


def test_a_subclass_of_a_backend_or_a_loggable_is_logged_like_it() -> None:
    class Mine(Fragile):
        pass

    class Percent(Scalar):
        pass

    backend = Mine()
    log_to(backend, Percent(3), "share", 1)
    assert backend.done[-1] == "write"


def test_what_is_no_backend_and_no_loggable_is_refused() -> None:
    with pytest.raises(TypeError, match=r"was given as a backend; expected one such as CSV\('metrics\.csv'\)"):
        log_to("metrics.csv", Scalar(1), "loss", 1)
    with pytest.raises(TypeError, match=r"was given to log; expected a loggable such as Scalar\(0\.5\)"):
        log_to(Memory(), 0.5, "loss", 1)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="expected the class of a backend and that of a loggable"):
        log_to.register(Scalar, Memory)


PLACES: list[Any] = [CSV, JSONL, TensorBoard]


@pytest.mark.parametrize("cls", PLACES, ids=lambda cls: cls.__name__)
def test_a_new_run_does_not_write_into_an_earlier_ones_log(cls: Any, tmp_path: Path) -> None:
    log_to(earlier := cls(tmp_path / "log"), Scalar(1), "loss", 1)
    earlier.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    learner = toy_learner(Recorder(), Metrics(), LogMetrics(cls(tmp_path / "log")))
    with pytest.raises(
        LogExistsError, match=r"earlier run's log, .*log.*continue that run: learner\.fit\(\.\.\., resume"
    ):
        learner.fit(1)
    assert learner.history.rows() == []
    with pytest.raises(FileExistsError):
        log_to(cls(tmp_path / "log"), Scalar(1), "loss", 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("cls", PLACES, ids=lambda cls: cls.__name__)
def test_two_backends_do_not_write_one_log(cls: Any, tmp_path: Path) -> None:
    first, second = cls(tmp_path / "log"), cls(tmp_path / "log")
    learner = toy_learner(Recorder(), Metrics(), LogMetrics(first, name="a"), LogMetrics(second, name="b"))
    with pytest.raises(LogExistsError, match=r"two backends would write .*log; share one"):
        learner.fit(1)
    assert not (tmp_path / "log").exists()


def test_a_refused_log_can_be_written_once_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("of somebody\n")
    refused = CSV(tmp_path / "log.csv")
    with pytest.raises(LogExistsError):
        refused.begin()
    (tmp_path / "log.csv").unlink()
    log_to(backend := CSV(tmp_path / "log.csv"), Scalar(1), "loss", 1)
    backend.close()
    log_to(CSV(tmp_path / "other.csv"), Scalar(1), "loss", 1)
    assert (tmp_path / "log.csv").read_text().endswith("1,,loss,1.0\n")


def test_an_empty_file_is_nobodys_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").touch()
    log_to(backend := CSV(tmp_path / "log.csv"), Scalar(1), "loss", 1)
    backend.close()
    assert (tmp_path / "log.csv").read_text() == "step,group,name,value\n1,,loss,1.0\n"


def test_a_deep_copy_writes_nothing_and_leaves_the_original_open(tmp_path: Path) -> None:
    backend = TensorBoard(tmp_path / "log")
    log_to(backend, Scalar(1), "loss", 1)
    copied = copy.deepcopy(backend)
    log_to(copied, Scalar(2), "loss", 2)
    copied.close()
    log_to(backend, Scalar(3), "loss", 3)
    backend.close()
    assert len(list((tmp_path / "log").iterdir())) == 1


def test_memory_keeps_what_was_logged_in_order() -> None:
    memory = Memory()
    log_to(memory, Scalar(1), "loss", 1, ("epoch", "training"))
    log_to(memory, Histogram([1.0]), "weights", 1)
    log_to(memory, Scalar(0.5), "loss", 2, ("epoch", "training"))
    assert memory.names == ["epoch/training/loss", "weights"]
    assert memory.series("epoch/training/loss") == [(1, 1.0), (2, 0.5)]
    copied = copy.deepcopy(memory)
    log_to(copied, Scalar(1), "loss", 3)
    assert len(memory.records) == 3
    assert len(copied.records) == 4


def test_memory_goes_back_to_a_state() -> None:
    memory = Memory()
    empty = memory.state_dict()
    log_to(memory, Scalar(1), "loss", 1)
    state = memory.state_dict()
    log_to(memory, Scalar(2), "loss", 2)
    memory.load_state_dict(state)
    log_to(memory, Scalar(3), "loss", 2)
    assert memory.series("loss") == [(1, 1.0), (2, 3.0)]
    memory.load_state_dict(empty)
    log_to(memory, Scalar(4), "loss", 1)
    assert memory.series("loss") == [(1, 4.0)]


def test_of_several_processes_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}
    for rank in (0, 1):
        monkeypatch.setattr("fluxloop.logging.backend.current", lambda rank=rank: Alone(rank, 2))
        log, memory = CSV(tmp_path / f"log-{rank}.csv"), Memory()
        for backend in (log, memory):
            log_to(backend, Scalar(0.5), "loss", 1)
            backend.flush()
            backend.close()
            backend.state_dict()
        written[rank] = log.path.exists(), memory.names
    assert written == {0: (True, ["loss"]), 1: (False, ["loss"])}
