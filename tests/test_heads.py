from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fluxloop.heads import DINOHead, mlp_head


def test_a_perceptron_has_norms_between_its_layers_and_no_bias_before_them() -> None:
    head = mlp_head(6, 8, 7, 5)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    assert [layer.bias is None for layer in head if isinstance(layer, nn.Linear)] == [True, True, False]
    assert head(torch.randn(4, 6)).shape == (4, 5)
    assert [type(layer) for layer in mlp_head(6, 8, 5, norm=False)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_the_last_norm_has_no_weights_of_its_own() -> None:
    head = mlp_head(6, 5, last_norm=True)
    out = head(3 * torch.randn(64, 6) + 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(5), atol=1e-2, rtol=0)
    assert not list(head[1].parameters())


def test_scores_of_dinos_head_are_cosines_with_its_prototypes_of_images_and_of_patches() -> None:
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden=8, bottleneck=4)
    features = torch.randn(2, 3, 6)
    scores = head(features)
    narrow = head.perceptron(features)
    expected = torch.cosine_similarity(narrow[:, :, None], head.last.weight, dim=-1)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(head(features[:, 0]), scores[:, 0])
    with torch.no_grad():
        head.last.weight *= 5  # the length of a prototype is nothing that it can learn
    torch.testing.assert_close(head(features), scores)
    assert [type(layer) for layer in head.perceptron] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert [type(layer) for layer in DINOHead(6, 9, layers=1).perceptron] == [nn.Linear]


def test_the_last_layer_of_dinos_head_is_frozen_by_its_name() -> None:
    head = DINOHead(6, 9, hidden=8, bottleneck=4)
    head.last.requires_grad_(False)
    head(torch.randn(3, 6)).sum().backward()
    assert head.last.weight.grad is None
    assert head.perceptron[0].weight.grad is not None


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0), (4, 2.5)])
def test_sizes_that_make_no_perceptron_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match="was given; expected"):
        mlp_head(*sizes)


@pytest.mark.parametrize("name", ["features", "prototypes", "hidden", "bottleneck", "layers"])
def test_numbers_that_make_no_head_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"DINOHead\({name}=0\) was given; expected a whole number, 1 or more"):
        DINOHead(**{"features": 6, "prototypes": 9, name: 0})
