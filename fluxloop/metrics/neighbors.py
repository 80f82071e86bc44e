"""Classification by nearest neighbours: how good features are, without training anything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024
"""Queries compared with the bank at a time."""


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 20, temperature: float | None = 0.07
) -> Tensor:
    """Classify features by the labels of their nearest neighbours in a bank.

    The `k` neighbours of the highest cosine similarity vote, each with weight
    ``exp(similarity / temperature)`` (Wu et al., 2018, as MoCo and DINO evaluate).

    Args:
        bank: Features, shape (B, F).
        labels: Their classes, whole numbers from 0, shape (B,).
        queries: Features to classify, shape (N, F).
        k: Number of neighbours, at most B.
        temperature: None gives every neighbour the same weight.

    Returns:
        Classes, shape (N,).

    Raises:
        ValueError: The shapes do not fit, or the bank has fewer than `k` rows.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or labels.shape != bank.shape[:1]:
        raise ValueError(
            f"knn_predict was given a bank of {tuple(bank.shape)}, labels of {tuple(labels.shape)} and queries of "
            f"{tuple(queries.shape)}; expected (B, F), (B,) and (N, F)"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k!r} neighbours were asked for in a bank of {len(bank)} rows; expected 1 to {len(bank)}")
    bank, labels = normalize(bank, dim=1), labels.long()
    num_classes = int(labels.max()) + 1
    predicted = []
    for chunk in torch.split(normalize(queries, dim=1), CHUNK):
        similarity, place = (chunk @ bank.T).topk(k, dim=1)
        behind = (similarity - similarity[:, :1]).float()  # the nearest votes with weight 1: no overflow
        weights = torch.ones_like(behind) if temperature is None else (behind / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[place], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)
