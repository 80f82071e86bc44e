"""Loggables, the backends that they are logged to, and `log_to` between them."""

from fluxloop.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
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
