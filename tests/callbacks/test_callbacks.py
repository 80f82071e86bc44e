from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from fluxloop import callbacks, phases


@pytest.mark.parametrize("package", [callbacks, phases], ids=["callbacks", "phases"])
def test_a_folder_says_what_each_of_its_modules_is_for(package: ModuleType) -> None:
    assert package.__file__ is not None
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    named = re.findall(r"``(\w+)``", package.__doc__ or "")
    told = [name for name in named if name not in ("fit", "predict")]
    assert sorted(modules - set(told)) == [], f"name them in the docstring of {package.__file__}"
    assert sorted(told) == sorted(modules)
