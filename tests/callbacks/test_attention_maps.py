from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxloop import AttentionMaps, Learner, ModelError, Recorder, SimCLRPhase, TwoViews
from fluxloop.callbacks.attention_maps import AttentionSeen
from fluxloop.callbacks.drawing import as_rgb, enlarged, heat_over

WIDTH, HEADS = 8, 2


def split(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries, keys and values (N, heads, L, D) of a layer whose `qkv` makes all three."""
    q, k, v = module.qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What blocks of timm do without fused attention."""
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return weights @ v


def by_softmax_of_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / q.shape[-1] ** 0.5, -1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": functional.scaled_dot_product_attention,
    "softmax": by_softmax,
    "softmax of bmm": by_softmax_of_bmm,
}


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.way = way

    def forward(self, tokens: Tensor) -> Tensor:
        found = WAYS[self.way](*split(self, self.norm(tokens)))
        return tokens + self.out(found.transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Two blocks over patches of 2 x 2 pixels, behind `extra` tokens of its own."""

    def __init__(self, way: str = "fused", extra: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.extra = nn.Parameter(torch.randn(extra, WIDTH))
        self.blocks = nn.ModuleList(Block(way) for _ in range(2))

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.extra.expand(len(images), -1, -1), patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1)


def weights_by_hand(vit: Any, images: Tensor, layer: int) -> Tensor:
    """Compute the attention of a layer, one row, head and query at a time."""
    with torch.no_grad():
        tokens = vit.tokens(images)
        for block in vit.blocks[:layer]:
            tokens = block(tokens)
        block = vit.blocks[layer]
        q, k, _ = split(block, block.norm(tokens))
        found = torch.zeros(*q.shape[:3], q.shape[2])
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                for place in range(q.shape[2]):
                    scores = torch.tensor([float(q[row, head, place] @ key) for key in k[row, head]])
                    powers = (scores / (WIDTH // HEADS) ** 0.5).exp()
                    found[row, head, place] = powers / powers.sum()
    return found


def images(rows: int = 12, seed: int = 0, height: int = 6, width: int = 6) -> Tensor:
    return torch.rand(rows, 1, height, width, generator=torch.Generator().manual_seed(seed))


def learner_of(encoder: nn.Module, *callbacks: Any, data: Any = None) -> Learner:
    models = {"encoder": encoder, "projector": nn.Linear(WIDTH, 4)}
    data = (images(), images(seed=1)) if data is None else data
    return Learner(models, data=data, callbacks=[Recorder(), *callbacks], default_callbacks=False, seed=2)


def fit(learner: Learner) -> None:
    learner.fit(1, phases=[SimCLRPhase(TwoViews(lambda rows: rows + 0.1 * torch.randn_like(rows)))])


def cell(callback: Any, line: int, place: int, height: int = 96, width: int = 96) -> Tensor:
    assert callback.grid is not None
    top, left = 44 + line * (height + 6), 6 + place * (width + 6)
    found: Tensor = callback.grid[:, top : top + height, left : left + width]
    return found


# What is seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_weights_are_those_of_a_softmax_by_hand(way: str, layer: int) -> None:
    torch.manual_seed(3)
    vit = ViT(way)
    with torch.no_grad():
        plain = vit(images(3))
        with AttentionSeen(rows=3) as seen:
            out = vit(images(3))
    assert torch.equal(plain, out)
    assert len(seen.weights) == 2
    torch.testing.assert_close(seen.weights[layer], weights_by_hand(vit, images(3), layer))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_torchs_own_attention_gives_its_weights_and_what_it_gave_before(
    batch_first: bool, needed: bool, mean: bool
) -> None:
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
    tokens = torch.randn(3, 5, WIDTH) if batch_first else torch.randn(5, 3, WIDTH)
    options = {"need_weights": needed, "average_attn_weights": mean}
    with torch.no_grad():
        plain, given = layer(tokens, tokens, tokens, **options)
        _, expected = layer(tokens, tokens, tokens, average_attn_weights=False)
        with AttentionSeen(rows=3) as seen:
            out, weights = layer(tokens, tokens, tokens, **options)
    torch.testing.assert_close(out, plain)
    assert (weights is None) == (given is None)
    if given is not None:
        torch.testing.assert_close(weights, given)
    torch.testing.assert_close(seen.weights[0], expected)
    assert len(seen.weights) == 1


def test_layers_of_torchs_encoder_are_seen_in_eval_mode_where_they_would_be_one_kernel() -> None:
    torch.manual_seed(3)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True), 3).eval()
    tokens = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        plain = layers(tokens)
        with AttentionSeen(rows=2) as seen:
            out = layers(tokens)
        expected = layers.layers[0].self_attn(tokens, tokens, tokens, average_attn_weights=False)[1]
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    assert len(seen.weights) == 3
    torch.testing.assert_close(seen.weights[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.tensor([[True, False, True, True]] * 4)},
        {"attn_mask": torch.arange(16.0).reshape(4, 4)},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_masks_scales_and_groups_of_fused_attention_are_heeded(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 4, 4, 3), torch.randn(2, 2 if "enable_gqa" in options else 4, 4, 3)
    values = torch.eye(4).expand(2, k.shape[1], 4, 4)  # so that what comes out are the weights
    expected = functional.scaled_dot_product_attention(q, k, values, **options)
    with AttentionSeen(rows=2) as seen:
        functional.scaled_dot_product_attention(q, k, values, **options)
    torch.testing.assert_close(seen.weights[0], expected)


def test_other_softmaxes_and_attention_within_windows_are_no_layers() -> None:
    with AttentionSeen(rows=2) as seen:
        torch.randn(2, 5).softmax(-1)  # classes
        torch.randn(2, 3, 4, 5).softmax(-1)  # attention to something else
        torch.randn(8, 3, 4, 4).softmax(-1)  # four windows of each row
    assert seen.weights == []


# What is drawn


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_the_picture_shows_how_much_the_class_token_attends_to_each_patch(extra: int) -> None:
    torch.manual_seed(3)
    vit, held_out = ViT(extra=extra), images(seed=1)
    callback = AttentionMaps("encoder", count=2, folder=None)
    fit(learner_of(vit, callback))
    weights = weights_by_hand(vit, held_out[:2], 1)
    maps = weights[:, :, 0, extra:] if extra else weights.mean(2)
    maps = maps.reshape(2, HEADS, 3, 3)
    shown = enlarged(as_rgb(held_out[:2], ""), 96)
    for place, expected in enumerate([shown, *(heat_over(shown, each) for each in (maps.mean(1), *maps.unbind(1)))]):
        for line in range(2):
            found = cell(callback, line, place).float() / 255
            torch.testing.assert_close(found, expected[line].expand(3, -1, -1), atol=0.02, rtol=0)


def test_heat_is_hottest_where_attention_is_most() -> None:
    weights = torch.zeros(1, 4, 4)
    weights[0, 1, 2] = 1.0
    drawn = heat_over(torch.zeros(1, 3, 64, 64), weights)[0]
    assert divmod(int(drawn.sum(0).argmax()), 64) == (23, 39) or drawn.sum(0)[24, 40] == drawn.sum(0).max()
    assert drawn.sum(0)[0, 0] == drawn.sum(0).min()


def test_a_layer_heads_and_the_shape_of_images_that_are_not_square() -> None:
    torch.manual_seed(3)
    vit, held_out = ViT(), images(seed=1, height=4, width=12)
    callback = AttentionMaps("encoder", count=1, layer=0, heads=1, folder=None)
    fit(learner_of(vit, callback, data=(held_out, held_out)))
    maps = weights_by_hand(vit, held_out[:1], 0)[:, :, 0, 1:].reshape(1, HEADS, 2, 6)
    shown = enlarged(as_rgb(held_out[:1], ""), 96)
    expected = heat_over(shown, maps[:, 0])[0]
    found = cell(callback, 0, 2, width=288).float() / 255
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert callback.grid is not None
    assert callback.grid.shape[2] == 6 + 3 * 294  # an image, the mean, one head


def test_a_function_may_give_the_weights_and_show_the_rows() -> None:
    def attention(module: nn.Module, xs: Tensor) -> Tensor:
        weights = torch.zeros(len(xs), 1, 9, 9)
        weights[:, :, :, 4] = 1.0  # all attend to the patch in the middle
        return weights

    callback = AttentionMaps(
        "encoder", count=2, attention=attention, patches=(3, 3), show=lambda xs: xs.unflatten(1, (1, 6, 6)), folder=None
    )
    rows = torch.rand(8, 36)
    fit(learner_of(nn.Linear(36, WIDTH), callback, data=(rows, rows)))
    heat = cell(callback, 0, 2).float().sum(0)
    assert heat[40:56, 40:56].mean() > 2 * heat[:16, :16].mean()


def test_what_has_no_attention_or_not_such_is_told_before_the_first_step() -> None:
    cases = {
        r"saw no attention in Sequential; expected .*attention=lambda": (
            nn.Sequential(nn.Flatten(), nn.Linear(36, WIDTH)),
            {},
        ),
        r"layer=2\) was given, and there are 2 layers of attention in ViT; expected one of -2 … 1": (
            ViT(),
            {"layer": 2},
        ),
        r"patches=\(4, 4\)\) was given, and there are 10 tokens": (ViT(), {"patches": (4, 4)}),
        r"attention=\.\.\.\) got a Tensor of shape \(8, 10, 10\); expected weights of shape \(8, heads, L, L\)": (
            ViT(),
            {"attention": lambda module, xs: torch.zeros(len(xs), 10, 10)},
        ),
    }
    for words, (model, options) in cases.items():
        learner = learner_of(model, AttentionMaps("encoder", folder=None, **options))
        with pytest.raises(ModelError, match=words):
            fit(learner)
        assert learner.updates.count == 0


def test_lazy_parts_are_looked_at_once_they_have_seen_a_batch() -> None:
    torch.manual_seed(3)
    vit = ViT()
    vit.patches = nn.LazyConv2d(WIDTH, 2, 2)
    callback = AttentionMaps("encoder", folder=None)
    fit(learner_of(vit, callback))
    assert callback.grid is not None


def test_bad_arguments_are_refused() -> None:
    for bad in ({"heads": 0}, {"layer": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AttentionMaps(**bad)
    with pytest.raises(TypeError, match="attention"):
        AttentionMaps(attention=3)  # type: ignore[arg-type]
