"""What is released holds what it should: the source archive the repository's files, the wheel the package alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import hatchling.build
import pytest

import fluxloop

ROOT = Path(__file__).parents[1]
NAME = f"torch_fluxloop-{fluxloop.__version__}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("archive")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        return folder / hatchling.build.build_sdist(str(folder))


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    """The wheel, built from the source archive alone, as pip does it."""
    with tarfile.open(archive) as file, pytest.MonkeyPatch.context() as patched:
        file.extractall(archive.parent, filter="data")
        patched.chdir(archive.parent / NAME)
        return archive.parent / hatchling.build.build_wheel(str(archive.parent))


def files_below(folder: Path) -> set[str]:
    """Return the files of a folder of the repository, without what Python and tools leave there."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in found}


def test_the_wheel_holds_the_package_its_types_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    package = files_below(ROOT / "fluxloop")
    assert {"fluxloop/py.typed", "fluxloop/__init__.pyi", "fluxloop/callbacks/__init__.pyi"} <= package
    told = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == package | told


def test_the_metadata_name_the_version_the_licence_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        told = Parser().parsestr(file.read(f"{NAME}.dist-info/METADATA").decode())
    assert (told["Name"], told["Version"]) == ("torch-fluxloop", fluxloop.__version__)
    assert (told["License-Expression"], told["License-File"]) == ("MIT", "LICENSE")
    needed = {re.split(r"[>=<]", each)[0] for each in told.get_all("Requires-Dist", []) if "extra ==" not in each}
    assert needed == {"torch", "multipledispatch", "attrs", "tqdm"}
    assert told.get_payload().startswith("# fluxloop")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says what belongs to the repository")
def test_the_source_archive_holds_the_files_of_the_repository(archive: Path) -> None:
    tracked, others = (
        set(
            subprocess.run(
                ["git", "ls-files", *which], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for which in (["--cached"], ["--others", "--exclude-standard"])
    )
    with tarfile.open(archive) as file:
        names = {member.name.removeprefix(f"{NAME}/") for member in file.getmembers() if member.isfile()}
    expected = {name for name in tracked if (ROOT / name).exists() and not name.startswith(".github/")}
    assert names - others == expected | {"PKG-INFO"}  # somebody's own files may lie about


def test_the_wheel_alone_runs_the_first_example_of_the_readme(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    match = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert match
    (tmp_path / "first.py").write_text(f"{match[1]}\nimport fluxloop\nprint(fluxloop.__file__)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-W", "error", "first.py"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    *_, numbers, path = told.stdout.splitlines()
    assert path == str(tmp_path / "installed" / "fluxloop" / "__init__.py")
    assert numbers.endswith("{'D': 16, 'G': 16}")
