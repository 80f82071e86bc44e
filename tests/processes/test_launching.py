from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from processes.launching import run, run_cases

ADDS = """
    import os, sys
    import torch
    import torch.distributed as dist
    from processes.launching import report

    dist.init_process_group("gloo")
    number = torch.tensor(float(os.environ["RANK"]) + 1)
    dist.all_reduce(number)
    report(total=number, told=sys.argv[1:], given=os.environ["GIVEN"])
    print("here is", dist.get_rank())
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
def test_what_each_process_reports_and_writes_is_seen(launcher: Any) -> None:
    told = run(ADDS, 2, launcher=launcher, arguments=["a"], GIVEN="b")
    assert [float(each["total"]) for each in told.reports] == [3, 3]
    assert [(each["told"], each["given"]) for each in told.reports] == [(["a"], "b")] * 2
    assert [f"here is {rank}" in output for rank, output in enumerate(told.outputs[:2])] == [True, True]


@pytest.mark.slow
def test_a_process_that_fails_or_does_not_end_fails_the_test_with_what_it_wrote() -> None:
    fails = "import os, sys; sys.exit('wrong') if os.environ['RANK'] == '1' else None"
    assert run(fails, check=False).codes == [0, 1]
    with pytest.raises(AssertionError, match="wrong"):
        run(fails)
    with pytest.raises(AssertionError, match=r"(?s)not ended after 1 s: \[0\].*waits"):
        run(
            "import os, time; print('waits', flush=True); time.sleep(9) if os.environ['RANK'] == '0' else None",
            timeout=1,
        )


ENDS = """
    import atexit, os, signal, sys
    from processes.launching import report

    atexit.register(lambda: sys.stdout.write("at exit"))
    if os.environ["RANK"] == "0":
        report(
            told=sys.argv, name=__name__, path=sys.path[0], folder=os.getcwd(), read=sys.stdin.read(),
            session=os.getsid(0) == os.getpid() == os.getpgrp(), given=os.environ.get("ADDED"), hashed=hash("a text"),
            handlers=[signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)],
        )
    else:
        report(hashed=hash("a text"))
        how = sys.argv[1]
        if how == "a number":
            sys.exit(3)
        elif how == "a text":
            sys.exit("ended in words")
        elif how == "an error":
            raise ValueError("a broken row")
        elif how == "an interrupt":
            raise KeyboardInterrupt
        elif how == "a signal":
            os.kill(os.getpid(), signal.SIGKILL)
"""
CODES = {"nothing": 0, "a number": 3, "a text": 1, "an error": 1, "an interrupt": -signal.SIGINT, "a signal": -9}


@pytest.mark.slow
@pytest.mark.parametrize("whole_end", [False, True])
def test_a_forked_process_is_as_one_that_was_started_and_ends_as_it_would(
    whole_end: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDED", "by the test")
    monkeypatch.chdir(tmp_path)
    for (how, code), told in zip(
        CODES.items(), run_cases(ENDS, [[how] for how in CODES], whole_end=whole_end), strict=True
    ):
        assert told.codes == [0, code], told.outputs
        assert all(0 < end < 60 for end in told.ends)
        seen, other = told.reports
        script, *arguments = seen["told"]
        assert (arguments, seen["name"], seen["path"]) == ([how], "__main__", str(Path(script).parent))
        assert (seen["folder"], seen["read"], seen["session"], seen["given"]) == (
            str(tmp_path),
            "",
            True,
            "by the test",
        )
        assert seen["handlers"] == [signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL]
        assert "PYTHONHASHSEED" in os.environ or seen["hashed"] != other["hashed"]
        assert told.outputs[0] == "at exit"
        assert ("at exit" in told.outputs[1]) == (how != "a signal")
        assert ("ended in words" in told.outputs[1]) == (how == "a text")
        assert ("ValueError: a broken row" in told.outputs[1]) == (how == "an error")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes that are left are found in /proc")
def test_processes_that_are_left_are_found_and_killed_whatever_started_them() -> None:
    leaves = """
        import os, subprocess, sys, time
        from processes.launching import report

        reads, writes = os.pipe()
        forked = os.fork()
        if not forked:
            if not os.fork():
                os.write(writes, b"here")
                time.sleep(60)
            time.sleep(60)
        os.read(reads, 4)  # all three are there
        report(left=[forked, subprocess.Popen(["sleep", "60"], start_new_session=True).pid])
        os._exit(0)
    """
    told = run(leaves, 1, check=False)
    assert len(told.left) == 3
    assert {*told.reports[0]["left"]} < {*told.left}
    with pytest.raises(AssertionError, match=str(told.left[0])):
        told.check()
