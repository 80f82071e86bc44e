"""Weights in folders of ``torch.distributed.checkpoint``, for exchange with what else writes and reads these."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from fluxloop.errors import CheckpointError

if TYPE_CHECKING:
    from fluxloop.interfaces import RunLearner

State = dict[str, Any]

METADATA = ".metadata"
"""The file by which such a folder is known."""


def write_distributed(learner: RunLearner, folder: Path) -> None:
    """Write the weights of the models, each process its part; all of them have to call this together.

    Args:
        learner: The learner.
        folder: A new or empty one.

    Raises:
        CheckpointError: There is something in the folder, or it cannot be written to.
    """
    from torch.distributed.checkpoint.state_dict_saver import save  # takes a while

    group = learner.accelerator.group
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if there if group is None else group.broadcast(there):
        raise CheckpointError(
            f"learner.save({str(folder)!r}, format='distributed') was given what is there already; expected a new or "
            "empty folder"
        )
    prefixes = {name: "" if name is None else f"{name}." for name in learner.models}
    state = {f"{prefixes[name]}{key}": t for name, m in learner.models.items() for key, t in m.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process, as is meant
            save(state, checkpoint_id=folder, no_dist=group is None)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be written to: {error}") from error


def is_distributed(path: Path) -> bool:
    """Return whether a path is such a folder."""
    return (path / METADATA).is_file()


def read_distributed(folder: Path, learner: RunLearner) -> State:
    """Read weights as whole tensors, as a file of a module's own state has them, or one of fluxloop's.

    Args:
        folder: The folder.
        learner: Whose models they may be those of: where it has several, their names are looked for.

    Raises:
        CheckpointError: It cannot be read, or holds other things than tensors.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # takes a while

    try:
        with TemporaryDirectory(prefix="fluxloop-") as temporary:
            path = Path(temporary) / "whole.pt"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp_to_torch_save(folder, path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the folder {folder} cannot be read: {error}") from error
    flat = dict(_flat(state, ""))
    names = [name for name in learner.models if name is not None]
    if not names or not all(any(key.startswith(f"{name}.") for name in names) for key in flat):
        return flat
    models = {
        name: {key.removeprefix(f"{name}."): tensor for key, tensor in flat.items() if key.startswith(f"{name}.")}
        for name in names
    }
    return {"fluxloop": 1, "models": {name: {"state": own, "metadata": {}} for name, own in models.items() if own}}


def _flat(state: Any, prefix: str) -> list[tuple[str, Any]]:
    """List what is in nested dicts, with the keys joined by dots."""
    if not isinstance(state, dict):
        return [(prefix.removesuffix("."), state)]
    return [pair for key, value in state.items() for pair in _flat(value, f"{prefix}{key}.")]
