from __future__ import annotations

from typing import Any

import pytest

from processes.launching import run

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
