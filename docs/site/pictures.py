"""Draw the pictures of docs/index.md, loop.md, reliability.md and watching.md with the code that these pages show.

python docs/site/pictures.py
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PICTURES = {
    "index.md": {"history.png": "first_history.png", "step.svg": "first_step.svg"},
    "loop.md": {"step.svg": "timeline_gan.svg", "order.svg": "order_gan.svg"},
    "reliability.md": {"runs.png": "compare_runs.png"},
    "watching.md": {
        "pictures/embedding_encoder-0012.png": "watching_embedding.png",
        "pictures/neighbors_encoder-0012.png": "watching_neighbors.png",
        "pictures/attention_encoder-0012.png": "watching_attention.png",
        "pictures/reconstructions_model-0012.png": "watching_reconstructions.png",
    },
}
"""For each page, the file in docs/images/ for each file that its code writes."""

ALSO = {"loop.md": 'gan.timeline(GAN()).save("step.svg")'}
"""What a page says in words rather than in a block."""


def draw(page: str, into: Path) -> None:
    """Run a page's blocks in an empty folder, and copy what they draw."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in [*blocks, ALSO.get(page, "")]:
                exec(compile(block, page, "exec"), namespace)
            for made, name in PICTURES[page].items():
                shutil.copy(made, into / name)
        finally:
            os.chdir(here)


if __name__ == "__main__":
    for page in PICTURES:
        draw(page, DOCS / "images")
