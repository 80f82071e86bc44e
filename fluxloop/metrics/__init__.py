"""Metrics: the base of them, and the common ones. For the rest there is torchmetrics."""

from fluxloop.metrics.base import Averaged, Loss, Metric, SmoothLoss
from fluxloop.metrics.classification import accuracy, binary_accuracy, top_k
from fluxloop.metrics.neighbors import knn_predict
from fluxloop.metrics.regression import mae, mse, rmse
from fluxloop.metrics.representation import lidar, rankme
from fluxloop.metrics.samples import frechet_distance, kernel_distance, precision_recall

__all__ = [
    "Averaged",
    "Loss",
    "Metric",
    "SmoothLoss",
    "accuracy",
    "binary_accuracy",
    "frechet_distance",
    "kernel_distance",
    "knn_predict",
    "lidar",
    "mae",
    "mse",
    "precision_recall",
    "rankme",
    "rmse",
    "top_k",
]
