"""Run the benchmarks, and write what they print to results.md.

    python benchmarks/run.py                        # all: about forty minutes on two cores
    python benchmarks/run.py step_overhead data     # these; the other results stay
    python benchmarks/run.py --quick                # all in some minutes, to see that they run; writes nothing
    python benchmarks/run.py --out other.md

Each script runs in a process of its own, and prints Markdown tables, or columns. One that says that it can
measure nothing here (no GPU, no other framework) leaves the results that there were.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from timing import SKIPPED, machine

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.md"
SCRIPTS = (
    "step_overhead",
    "compile",
    "convolutions",
    "research",
    "compiled_code",
    "event_overhead",
    "data",
    "memory",
    "in_backward",
    "scaling",
    "import_time",
    "peers",
    "processes",
    "gpu",
)

HEAD = """# Last results

Written by `python benchmarks/run.py`; [README.md](README.md) says what each script measures. Ratios are fluxloop's time
by that of the other side: below 1, fluxloop is faster. Shared machines drift: trust ratios, not microseconds.
"""


def run(script: str, quick: bool) -> str | None:
    """Run a script, showing what it prints; give it as Markdown, or None where it could measure nothing.

    Raises:
        SystemExit: It failed.
    """
    path = FOLDER / f"{script}.py"
    command = [sys.executable, str(path), *(["--quick"] if quick and "--quick" in path.read_text() else [])]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{path.name} failed with exit status {process.returncode}")
    output = "".join(lines).strip()
    if output.startswith(SKIPPED):
        return None
    return f"```text\n{output}\n```" if "\n" in output and "\n|" not in f"\n{output}" else output


def sections(text: str) -> dict[str, str]:
    """Take results apart: the text of each script by its name."""
    found = {}
    for part in text.split("\n## ")[1:]:
        name, _, body = part.partition("\n")
        found[name.removesuffix(".py")] = body.strip()
    return found


def joined(results: Mapping[str, str]) -> str:
    """Put results together again, in the order of `SCRIPTS`."""
    known = [name for name in SCRIPTS if name in results]
    return "\n".join([HEAD, *(f"## {name}.py\n\n{results[name]}\n" for name in known)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"of {', '.join(SCRIPTS)}; left out: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"where the results go; left out: {RESULTS.name}")
    given = parser.parse_args(argv)
    chosen = [name.removesuffix(".py") for name in given.scripts] or list(SCRIPTS)
    unknown = sorted(set(chosen) - set(SCRIPTS))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; expected some of {', '.join(SCRIPTS)}")
    out = given.out or (None if given.quick else RESULTS)
    results = sections(out.read_text()) if out is not None and out.exists() else {}
    for script in chosen:
        if not (FOLDER / f"{script}.py").exists():
            print(f"{script}.py is not there\n")
            continue
        print(f"## {script}.py\n", flush=True)
        began = time.perf_counter()
        output = run(script, given.quick)
        seconds = time.perf_counter() - began
        print(f"\n({seconds:.0f} s)\n", flush=True)
        if output is not None and out is not None:
            note = f"{machine()}; {date.today()}, {seconds:.0f} s{', --quick' if given.quick else ''}."
            results[script] = f"{note}\n\n{output}"
            out.write_text(joined(results))


if __name__ == "__main__":
    main()
