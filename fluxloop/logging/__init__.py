"""Loggables, the backends that they are logged to, and `log_to` between them."""

from typing import TYPE_CHECKING

from fluxloop.lazy import lazily

if TYPE_CHECKING:
    from fluxloop.logging.backend import Backend, log_to
    from fluxloop.logging.loggables import (
        Audio,
        Figure,
        File,
        Histogram,
        HyperParameters,
        Image,
        Loggable,
        Scalar,
        Text,
    )
    from fluxloop.logging.memory import Memory, Record
    from fluxloop.logging.mlflow import MLflow
    from fluxloop.logging.tensorboard import TensorBoard
    from fluxloop.logging.text_files import CSV, JSONL
    from fluxloop.logging.wandb import WandB

__all__ = [
    "CSV",
    "JSONL",
    "Audio",
    "Backend",
    "Figure",
    "File",
    "Histogram",
    "HyperParameters",
    "Image",
    "Loggable",
    "MLflow",
    "Memory",
    "Record",
    "Scalar",
    "TensorBoard",
    "Text",
    "WandB",
    "log_to",
]

if not TYPE_CHECKING:  # so that type checkers see misspelt names
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "backend": "Backend log_to",
            "loggables": "Audio Figure File Histogram HyperParameters Image Loggable Scalar Text",
            "memory": "Memory Record",
            "mlflow": "MLflow",
            "tensorboard": "TensorBoard",
            "text_files": "CSV JSONL",
            "wandb": "WandB",
        },
    )
