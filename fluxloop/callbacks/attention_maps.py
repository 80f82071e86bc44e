"""Draw where a vision transformer looks, epoch after epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, field
from attrs.validators import optional
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fluxloop.callbacks.drawing import as_rgb, enlarged, heat_over, table
from fluxloop.callbacks.pictures import PicturesOfImages
from fluxloop.compute.models import to_device_of
from fluxloop.compute.modes import watching
from fluxloop.errors import ModelError, describe
from fluxloop.guard.given import called, number
from fluxloop.nested import map_tensors
from fluxloop.phase import AbstractTrainingPhase

SOFTMAX = {torch.softmax, Tensor.softmax, functional.softmax}


class AttentionSeen(TorchFunctionMode):
    """Notes the weights of attention that is computed inside: of each call, in their order, shape (N, heads, L, S).

    It sees torch's own ways: ``scaled_dot_product_attention``, `torch.nn.MultiheadAttention` (in `TransformerEncoder`
    too), and a softmax of square matrices; so blocks of timm and of transformers as well.

    Args:
        rows: N, how many rows are given to the network.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> with torch.no_grad(), AttentionSeen(rows=3) as seen:
        ...     out = layer(torch.randn(3, 5, 8))
        >>> [weights.shape for weights in seen.weights]
        [torch.Size([3, 2, 5, 5])]
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        if func is functional.scaled_dot_product_attention:
            self._note(_attention(*args, **kwargs))
        out = func(*args, **kwargs)
        if func in SOFTMAX and isinstance(out, Tensor) and out.ndim >= 3 and out.shape[-1] == out.shape[-2]:
            self._note(out)
        return out

    def _multi_head(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Have the weights of each head computed, and return what was asked for."""
        needed = kwargs.get("need_weights", True)
        out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        self._note(weights)
        if not needed:
            return out, None
        return out, weights.mean(-3) if kwargs.get("average_attn_weights", True) else weights

    def _note(self, weights: Tensor) -> None:
        """Note weights (N, heads, L, S), or (N * heads, L, S); others, such as those of windows, are not."""
        by_row = weights.ndim == 4 and len(weights) == self.rows
        if by_row or (weights.ndim == 3 and len(weights) % self.rows == 0):
            self.weights.append(weights.detach().float().reshape(self.rows, -1, *weights.shape[-2:]))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights of ``scaled_dot_product_attention``, with its arguments."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.float() @ key.float().transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True))


@contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Run a module as it is written, also where torch compiles its calls: a graph shows none of its functions."""
    compiled = [(part, call) for part in module.modules() if (call := getattr(part, "_compiled_call_impl", None))]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call


@define
class AttentionMaps(PicturesOfImages):
    """Draw where a vision transformer looks in some held-out images, after each epoch.

    A line shows an image, the mean over the heads of one layer, and each head: how much the class token attends to each
    patch, from dark to bright, each map from its least to its most. Where there is no class token, it is how much each
    patch gets from all others, in the mean. The weights are seen as they are computed, in eval mode, without a line in
    the network: by ``scaled_dot_product_attention``, `torch.nn.MultiheadAttention` or a softmax of square matrices, so
    in blocks of torch, timm and transformers.

    The picture is saved as ``pictures/attention_encoder-0003.png``; other callbacks find it in
    ``cbstate.images["attention_encoder"]``, and `LogImages` logs it.

    Args:
        model: Name of the weights: ``"encoder"``, ``"student.encoder"``, ``"encoder@ema"``, or ``"model"`` for a
            single model.
        queries: Images ``xs``, or ``(xs, ys)``, anything `as_dataloader` takes; left out, the learner's validation
            data.
        count: How many lines: the first images of the first batch.
        show: ``xs -> images`` of shape (N, 1 or 3, H, W), where the rows are no such images, or are normalised; left
            out, the rows.
        layer: Which of the layers, in the order in which they compute; -1 is the last one.
        heads: How many heads are shown at most.
        patches: How many patches there are, down and across; left out, as many as the tokens can be, in the shape of
            the images. Tokens before them are no patches: a class token, and others.
        attention: ``(module, xs) -> weights`` of shape (N, heads, L, L), of networks that compute them otherwise.
        value_range: What is black and what is white; left out, (-1, 1) where an image has negative values, else (0, 1).
        folder: Where to save the pictures; None saves nothing.
        every: Draw after every so many training epochs.

    Raises:
        ModelError: There are no such weights, no attention was seen, or the rows are no images.
        DataError: There are no rows.
        ImportError: Pillow is not installed.
        ValueError: `count`, `heads` or `every` is less than 1.

    Attributes:
        grid: The last picture, whole numbers 0 … 255 of shape (3, height, width).

    Reads: model, data, seed, cbstate.history (of the models, only the one it looks into)
    Writes: cbstate.images
    Runs after: Recorder

    Example:
        >>> class ViT(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches = torch.nn.Conv2d(1, 8, 2, 2)
        ...         self.token = torch.nn.Parameter(torch.randn(8))
        ...         self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...     def forward(self, images):
        ...         patches = self.patches(images).flatten(2).transpose(1, 2)
        ...         return self.block(torch.cat([self.token.expand(len(images), 1, -1), patches], 1))[:, 0]
        >>> images = torch.rand(64, 1, 8, 8)
        >>> learner = Learner({"encoder": ViT()}, data=(images, images[:8]), default_callbacks=False)
        >>> learner.set_callbacks([Recorder(), AttentionMaps("encoder", count=4)])
        >>> history = learner.fit(1, phases=[SimCLRPhase(TwoViews(lambda rows: rows + torch.randn_like(rows)))])
        >>> learner.cbstate.images["attention_encoder"].dtype  # also in pictures/attention_encoder-0001.png
        torch.uint8
    """

    layer: int = field(default=-1, kw_only=True, validator=number(whole=True))
    heads: int = field(default=6, kw_only=True, validator=number(least=1, whole=True))
    patches: tuple[int, int] | None = field(default=None, kw_only=True)
    attention: Callable[[nn.Module, Any], Tensor] | None = field(
        default=None,
        kw_only=True,
        repr=False,
        validator=optional(called("a function (module, xs) -> weights (N, heads, L, L)")),
    )

    writes = ("cbstate.images",)
    kind = "attention"

    def try_out(self, phase: AbstractTrainingPhase, learner: Any) -> None:
        """Raise for a network whose attention is not seen, and for rows that are no images."""
        if not any(map(is_lazy, learner.weights[self.model].parameters())):
            self.draw(self.look(phase, learner), "")

    def look(self, phase: AbstractTrainingPhase, learner: Any) -> Any:
        """Return the images, and the weights of the attention to them.

        Raises:
            ModelError: None was seen.
        """
        batch, module = self.first_rows(learner), learner.weights[self.model]
        xs = map_tensors(lambda rows: rows[: self.count], batch[0] if isinstance(batch, (tuple, list)) else batch)
        images = as_rgb(self.shown(xs), self._call, self.value_range)
        given = to_device_of(module, xs)
        with watching(module):
            weights, named = (
                self._seen(module, given, len(images))
                if self.attention is None
                else (self.attention(module, given), "")
            )
        if not isinstance(weights, Tensor) or weights.ndim != 4 or len(weights) != len(images):
            raise ModelError(
                f"AttentionMaps({self.model!r}, attention=...) got {describe(weights)}; expected weights of shape "
                f"({len(images)}, heads, L, L)"
            )
        return images, weights.detach().float().cpu(), named

    def _seen(self, module: nn.Module, xs: Any, rows: int) -> tuple[Tensor, str]:
        """Return the weights of the layer, and which one it is of how many."""
        with as_written(module), AttentionSeen(rows) as seen:
            module(xs)
        count = len(seen.weights)
        if not count:
            raise ModelError(
                f"{self._call} saw no attention in {type(module).__name__}; expected a vision transformer of torch's "
                "functions, or AttentionMaps(attention=lambda module, xs: ...), which gives weights (N, heads, L, L)"
            )
        if not -count <= self.layer < count:
            raise ModelError(
                f"AttentionMaps({self.model!r}, layer={self.layer}) was given, and there are {count} layers of "
                f"attention in {type(module).__name__}; expected one of {-count} … {count - 1}"
            )
        return seen.weights[self.layer], f", layer {self.layer % count + 1} of {count}"

    def draw(self, seen: Any, title: str) -> Tensor:
        """Draw the maps over the images."""
        images, weights, named = seen
        images = enlarged(images, 96)
        maps = self.maps(weights, *images.shape[2:])
        shown = [maps.mean(1), *maps[:, : self.heads].unbind(1)]
        columns = [images, *(heat_over(images, each) for each in shown)]
        headings = ["image", "mean", *(f"head {head}" for head in range(1, len(shown)))]
        return table(list(zip(*columns, strict=True)), headings, f"{title}, attention{named}")

    def maps(self, weights: Tensor, height: int, width: int) -> Tensor:
        """Return the maps (N, heads, h, w) of weights (N, heads, L, L), over images of some height and width.

        Raises:
            ModelError: There are fewer tokens than patches.
        """
        tokens = weights.shape[-1]
        tall, wide = height // math.gcd(height, width), width // math.gcd(height, width)
        times = math.isqrt(tokens // (tall * wide))
        tall, wide = self.patches or (tall * times, wide * times)
        before = tokens - tall * wide
        if before < 0 or not tall * wide:
            raise ModelError(
                f"AttentionMaps({self.model!r}, patches={self.patches}) was given, and there are {tokens} tokens of "
                f"images of {height} x {width}; expected how many patches there are, down and across: patches=(14, 14)"
            )
        found = weights[:, :, 0] if before else weights.mean(2)
        return found[:, :, before:].reshape(*weights.shape[:2], tall, wide)
