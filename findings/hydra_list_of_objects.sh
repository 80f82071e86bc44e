#!/usr/bin/env bash
# hydra 1.3.8 with omegaconf 2.3.1: instantiate gives an object of a dataclass, and in a list or dict a DictConfig in its place.
#
# hydra.utils.instantiate makes objects of what has a _target_. Of a class with attrs or dataclass the object itself is
# returned where it stands alone or is an argument of another target. In a list or dict the same configuration gives a
# DictConfig with the object's fields: the object was made, and copied into a configuration, as omegaconf takes every
# instance of such a class for a structured one. Methods are gone, without an error until one is called. Of any other class
# the object stays. _convert_="all" gives the objects.
#
# Seen with hydra-core 1.3.8, omegaconf 2.3.1, Python 3.11, x86_64:
#     alone: Record; in a list: DictConfig; in a dict: DictConfig; in a list with _convert_='all': Record
#     of a plain class, in a list: Plain
# Source: instantiate_node in hydra/_internal/instantiate/_instantiate2.py, is_structured_config in omegaconf/_utils.py.
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'hydra-core==1.3.8' 'omegaconf==2.3.1'
cat > "$folder/instantiate.py" <<'PYTHON'
import sys
from dataclasses import dataclass
from importlib.metadata import version

from hydra.utils import instantiate


@dataclass
class Record:
    rate: float = 1.0

    def scaled(self, value):
        return self.rate * value


class Plain:
    def __init__(self, rate=1.0):
        self.rate = rate


sys.modules["parts"] = sys.modules["__main__"]
record, plain = {"_target_": "parts.Record", "rate": 0.5}, {"_target_": "parts.Plain", "rate": 0.5}
alone, listed, by_name = instantiate(record), instantiate([record])[0], instantiate({"part": record})["part"]
converted, other = instantiate([record], _convert_="all")[0], instantiate([plain])[0]
found = [type(each).__name__ for each in (alone, listed, by_name, converted, other)]
print(f"hydra-core {version('hydra-core')}, omegaconf {version('omegaconf')}")
print(
    f"alone: {found[0]}; in a list: {found[1]}; in a dict: {found[2]}; in a list with _convert_='all': {found[3]}\n"
    f"of a plain class, in a list: {found[4]}"
)
assert found == ["Record", "DictConfig", "DictConfig", "Record", "Plain"], "hydra does something else now"
assert not callable(getattr(listed, "scaled", None))
PYTHON
"$folder/venv/bin/python" "$folder/instantiate.py"
