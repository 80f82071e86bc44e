"""Figures of matplotlib that a notebook shows."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(who: str, **options: Any) -> Figure:
    """Return an empty figure that is a picture as the last line of a notebook's cell.

    matplotlib sees to that where its ``pyplot`` has been imported; here nobody needs to.

    Args:
        who: Who draws, for the message.
        options: Of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install 'torch-fluxloop[plot]'") from error
    figure = Figure(**options, layout="constrained")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]  # notebooks look for it
    return figure


def _png(figure: Figure) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
