from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxloop.checkpoint import folder as folder_module
from fluxloop.checkpoint.folder import LATEST, MARKER, Folder, find_state, name_of, read, write
from fluxloop.errors import CheckpointError
from fluxloop.testing import bits, toy_learner

STATE = {"fluxloop": 1, "value": torch.arange(3.0)}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def cut(path: Path) -> None:
    """Leave what a process that was killed in the middle of writing, on a careless system, would leave."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fails(error: OSError | RuntimeError) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied")
BREAKS = [
    pytest.param("torch.save", RuntimeError("[enforce fail at inline_container.cc] . unexpected pos"), id="torch.save"),
    pytest.param("os.fsync", FULL, id="fsync"),
    pytest.param("os.replace", FULL, id="replace, full"),
    pytest.param("os.replace", FORBIDDEN, id="replace, forbidden"),
]


# Names


def test_a_name_tells_epochs_phase_and_steps() -> None:
    assert name_of((3, 120, 1)) == "epoch-0003-step-00000120-phase-1.pt"


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 99_999_999), st.integers(0, 9)), min_size=2, unique=True)
)
def test_names_sort_as_texts_as_they_do_by_progress(progresses: list[tuple[int, int, int]]) -> None:
    assert sorted(map(name_of, progresses)) == [name_of(progress) for progress in sorted(progresses)]


def test_the_newest_is_found_by_number_and_not_by_text(tmp_path: Path) -> None:
    for epochs, text in ((2, "2"), (10, "10"), (9, "09")):
        write(tmp_path / f"epoch-{text}-step-{epochs}-phase-0.pt", {**STATE, "epochs": epochs})
    found = find_state(tmp_path)
    assert found is not None
    assert found["epochs"] == 10
    for epochs in (9_999, 10_000):
        Folder(tmp_path).add((epochs, epochs, 0), {**STATE, "epochs": epochs})
    assert [progress[0] for progress, _ in Folder(tmp_path).files()] == [2, 9, 10, 9_999, 10_000]
    found = find_state(tmp_path)
    assert found is not None
    assert found["epochs"] == 10_000


def test_only_names_of_checkpoints_count(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add((1, 4, 0), STATE)
    for other in ("epoch-0002.pt", "epoch-0003-step-00000009-phase-0.pt.bak", "notes.txt", "model.pt"):
        (tmp_path / other).write_text("mine")
    assert [path.name for _, path in folder.files()] == ["epoch-0001-step-00000004-phase-0.pt"]
    folder.remove({"notes.txt", "model.pt", "epoch-0002.pt", "epoch-0001-step-00000004-phase-0.pt"})
    assert {"notes.txt", "model.pt", "epoch-0002.pt"} < set(names(tmp_path))
    assert folder.files() == []


# Writing


def test_what_is_written_is_read_and_the_pointer_names_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first, second = folder.add((1, 4, 0), STATE), folder.add((2, 8, 0), STATE)
    assert torch.equal(read(first)["value"], STATE["value"])
    assert (tmp_path / LATEST).read_text() == f"{second.name}\n"
    assert names(tmp_path) == [first.name, second.name, LATEST]


def test_a_complete_checkpoint_is_not_overwritten_and_an_incomplete_one_is(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    path = folder.add((1, 4, 0), STATE)
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"step-00000004-phase-0.pt is there already, and is not overwritten; give the"
    ):
        folder.add((1, 4, 0), {**STATE, "value": torch.zeros(1)})
    assert path.read_bytes() == before
    cut(path)
    folder.add((1, 4, 0), STATE)
    assert folder.is_complete(path)


@pytest.mark.parametrize(("where", "error"), BREAKS)
def test_a_failing_write_leaves_what_was_there_and_nothing_else(
    where: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    write(path, STATE)
    before = path.read_bytes()
    monkeypatch.setattr(f"fluxloop.checkpoint.folder.{where}", fails(error))
    with pytest.raises(CheckpointError, match=r"the checkpoint .*state.pt cannot be written: ") as caught:
        write(path, {"fluxloop": 1})
    assert caught.value.__cause__ is error
    assert path.read_bytes() == before
    assert names(tmp_path) == ["state.pt"]


def test_a_folder_without_permission_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxloop.checkpoint.folder.open", fails(FORBIDDEN), raising=False)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Permission denied"):
        write(tmp_path / "state.pt", STATE)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Folder(tmp_path / "run").claim()


def test_ctrl_c_while_a_file_is_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fluxloop.checkpoint.folder.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "state.pt", STATE)
    assert names(tmp_path) == []


def test_a_missing_parent_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No such file"):
        write(tmp_path / "missing" / "state.pt", STATE)


def test_contents_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("fluxloop.checkpoint.folder.os.fsync", lambda handle: (done.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr("fluxloop.checkpoint.folder.os.replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    write(tmp_path / "state.pt", STATE)
    assert done == ["fsync", "rename", "fsync"]


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise FULL

    monkeypatch.setattr("fluxloop.checkpoint.folder.open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(
        CheckpointError,
        match=r"state.pt cannot be written: the disk is full .*. It needs about 40,000 bytes, and [\d,]+ bytes are "
        r"free there. Make room .* what was there before is untouched",
    ):
        write(tmp_path / "state.pt", {"fluxloop": 1, "value": torch.zeros(10_000)})
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process whose files may not grow")
def test_a_file_that_may_not_grow_is_told_by_a_real_system(tmp_path: Path) -> None:
    script = f"""
import resource, sys
import torch
from pathlib import Path
from fluxloop.checkpoint import folder as folder_module
from fluxloop.errors import CheckpointError
from fluxloop.checkpoint.folder import write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path({str(tmp_path)!r}) / "state.pt"
write(path, {{"fluxloop": 1}})
try:
    write(path, {{"fluxloop": 1, "value": torch.zeros(100_000)}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "It needs about 400,000 bytes, and " in done.stdout
    assert "a file may not be so big (" in done.stdout
    assert names(tmp_path) == ["state.pt"]
    assert read(tmp_path / "state.pt") == {"fluxloop": 1}


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    folder.claim()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="its folder is not there, or no longer"):
        folder.add((1, 4, 0), STATE)
    assert folder.files() == []


# Reading


def test_reading_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return builtins.exec, ("raise SystemExit('executed')",)

    torch.save({"fluxloop": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt"):
        read(tmp_path / "evil.pt")


def test_a_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write(path, {"fluxloop": 1, "value": torch.zeros(10_000)})
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"is damaged: .* does not have its checksum"):
        read(path)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_cut_file_is_incomplete(left: int, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write(path, STATE)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"state.pt is incomplete or damaged"):
        read(path)
    assert not Folder(tmp_path).is_complete(path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was given as a checkpoint; expected a file that learner.save wrote"):
        read(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of fluxloop's.*learner.load_weights"):
        read(tmp_path / "weights.pt")
    assert read(tmp_path / "weights.pt", weights_only=True).keys() == {"weight"}
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of fluxloop's"):
        read(tmp_path / "list.pt", weights_only=True)


# Whose folder it is


def test_a_claimed_folder_says_what_it_is(tmp_path: Path) -> None:
    Folder(tmp_path / "deep" / "run").claim()
    marker = json.loads((tmp_path / "deep" / "run" / MARKER).read_text())
    assert marker["what"] == "checkpoints of a training with fluxloop"
    Folder(tmp_path / "deep" / "run").claim()


def test_a_foreign_folder_is_refused_and_not_written_to(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"is no folder of checkpoints: it has a.txt, b.txt, c.txt in it; expected a new or"
    ):
        Folder(tmp_path).claim()
    with pytest.raises(CheckpointError, match="is no folder of checkpoints"):
        find_state(tmp_path)
    assert names(tmp_path) == ["a.txt", "b.txt", "c.txt", "d.txt"]


def test_a_folder_that_another_process_marks_while_this_one_looks_is_a_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, looked = Folder(tmp_path), Folder.files

    def look(self: Folder) -> Any:
        (tmp_path / MARKER).touch()
        return looked(self)

    monkeypatch.setattr(Folder, "files", look)
    folder.check()
    assert names(tmp_path) == [MARKER]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file; expected a folder for checkpoints"):
        Folder(tmp_path / "file").claim()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "left", [(), (MARKER,), (".fluxloop.json.17.tmp",), (MARKER, ".epoch-0001-step-00000004-phase-0.pt.17.tmp")]
)
def test_a_run_killed_before_its_first_checkpoint_begins_again(left: tuple[str, ...], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).write_text("{}")
    assert find_state(tmp_path) is None
    Folder(tmp_path).claim()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.claim()
    folder.add((1, 4, 0), STATE)
    for name in (f".{name_of((2, 8, 0))}.17.tmp", f".{LATEST}.17.tmp", f".{MARKER}.17.tmp"):
        (tmp_path / name).write_text("half")
    folder.claim()
    assert names(tmp_path) == [name_of((1, 4, 0)), MARKER, LATEST]


def test_a_new_folder_has_no_state_and_is_not_made(tmp_path: Path) -> None:
    assert find_state(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


# What a run goes on from


def test_an_incomplete_newest_is_skipped_with_a_word(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for epochs in (1, 3, 2):
        folder.add((epochs, epochs, 0), {**STATE, "epochs": epochs})
    cut(tmp_path / name_of((3, 3, 0)))
    with pytest.warns(
        UserWarning, match="epoch-0003-step-00000003-phase-0.pt is incomplete.*the one before it is taken"
    ):
        found = find_state(tmp_path)
    assert found is not None
    assert found["epochs"] == 2


@pytest.mark.filterwarnings("ignore:.*the one before it is taken")
def test_where_none_is_complete_nothing_begins_from_scratch(tmp_path: Path) -> None:
    for epochs in (1, 2):
        cut(Folder(tmp_path).add((epochs, epochs, 0), STATE))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is complete"):
        find_state(tmp_path)


def test_the_pointer_is_for_people_and_a_wrong_one_misleads_nobody(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for epochs in (1, 2):
        folder.add((epochs, epochs, 0), {**STATE, "epochs": epochs})
    (tmp_path / LATEST).write_text("epoch-0001-step-00000001-phase-0.pt\n")
    found = find_state(tmp_path)
    assert found is not None
    assert found["epochs"] == 2


@pytest.mark.parametrize("given", [True, 1, [], {"folder": 1}])
def test_resume_wants_a_folder(given: Any) -> None:
    learner = toy_learner(num_batches=2)
    before = bits(learner)
    with pytest.raises(CheckpointError, match=r"was given; expected .*: resume='runs/first'"):
        learner.fit(1, resume=given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(learner).items())


def test_a_file_that_is_not_there_begins_no_new_run(tmp_path: Path) -> None:
    learner = toy_learner(num_batches=2)
    with pytest.raises(CheckpointError, match=r"epoch-0003-step-00000012-phase-0.pt"):
        learner.fit(1, resume=tmp_path / name_of((3, 12, 0)))
    assert learner.history.cycles == 0


# Locks


HOLDER = """
import sys
from fluxloop.checkpoint.folder import Folder
folder = Folder(sys.argv[1])
folder.claim()
release = folder.lock()
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the lock of a folder."""
    root = str(Path(folder_module.__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "locked"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_folder_that_a_living_process_writes_to_is_refused_with_that_process(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    half = tmp_path / f".{name_of((2, 8, 0))}.{holder.pid}.tmp"
    half.write_text("half")
    folder = Folder(tmp_path)
    folder.claim()
    with pytest.raises(CheckpointError, match=rf"is being written to by process {holder.pid} on .*; wait until"):
        folder.lock()
    assert half.exists()  # of a file that is being written
    holder.kill()
    holder.wait()
    folder.lock()()
    assert not half.exists()


def test_a_lock_is_held_by_one_fit_of_a_process_and_given_back(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.claim()
    release = folder.lock()
    folder.claim()  # looking at it takes nothing away
    with pytest.raises(CheckpointError, match=rf"by this process \({os.getpid()}\), in another fit"):
        folder.lock()
    release()
    folder.lock()()
