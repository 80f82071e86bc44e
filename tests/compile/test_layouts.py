from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_training import SGD, both, learner, weights
from torch import Tensor, nn
from torch.nn import functional


def network(channels: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 4)),
    )


def images(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, channels, 8, 8, generator=generator), torch.randint(4, (20,), generator=generator)


def traced(channels: int) -> Any:
    """Return the decomposed graph of a loss and its gradients."""
    import torch._inductor.lowering  # the decompositions look it up
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    model = network(channels)
    names = [name for name, _ in model.named_parameters()]
    buffers = dict(model.named_buffers())
    xs, ys = images(channels)

    def step(xs: Tensor, ys: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        held = {**dict(zip(names, leaves, strict=True)), **{name: b.clone() for name, b in buffers.items()}}
        loss = functional.cross_entropy(torch.func.functional_call(model, held, xs), ys)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    inputs = [xs, ys, *(parameter.detach() for parameter in model.parameters())]
    how = {"decomposition_table": select_decomp_table(), "tracing_mode": "fake", "_allow_non_fake_inputs": True}
    return make_fx(step, **how)(*inputs)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_convolution_and_its_gradient_read_one_image_and_one_weight_that_are_laid_out_once(channels: int) -> None:
    from fluxloop.compile.layouts import BACKWARD, CONVOLUTION, FORCE, POOL, Layouts

    graph = traced(channels)
    Layouts()(graph.graph)
    nodes = list(graph.graph.nodes)
    forward = [node for node in nodes if node.target is CONVOLUTION]
    backward = [node for node in nodes if node.target is BACKWARD][::-1]
    assert len(forward) == len(backward) == 2
    for there, back in zip(forward, backward, strict=True):
        assert there.args[:2] == back.args[1:3]
        strides = [node.meta["val"].is_contiguous(memory_format=torch.channels_last) for node in there.args[:2]]
        assert strides == [True, True]
    offsets = [user for node in nodes if node.target is POOL for user in node.users if user.args[1] == 1]
    assert len(offsets) == 2
    assert all([user.target for user in node.users] == [FORCE] for node in offsets)


def test_images_of_one_channel_are_not_copied() -> None:
    from fluxloop.compile.layouts import CONVOLUTION, Layouts

    graph = traced(1)
    Layouts()(graph.graph)
    first = next(node for node in graph.graph.nodes if node.target is CONVOLUTION)
    assert first.args[0].target is torch.ops.aten.as_strided.default


def test_a_graph_without_convolutions_is_left_as_it_is() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from fluxloop.compile.layouts import Layouts

    graph = make_fx(lambda xs: torch.relu(xs).sum(), tracing_mode="fake")(torch.randn(2, 1, 4, 4))
    before = str(graph.graph)
    Layouts()(graph.graph)
    assert str(graph.graph) == before


def test_where_the_compiler_lays_out_no_images_neither_does_this() -> None:
    from torch._inductor import config

    from fluxloop.compile.layouts import Layouts

    graph = traced(3)
    before = str(graph.graph)
    with config.patch(layout_optimization=False):
        Layouts()(graph.graph)
    assert str(graph.graph) == before


def test_what_torch_keeps_of_a_graph_is_named_by_the_text_of_this_pass() -> None:
    from fluxloop.compile.layouts import Layouts

    assert Layouts().uuid() == Layouts().uuid()
    assert Layouts().uuid()


@pytest.mark.parametrize("channels", [1])
def test_a_convolutional_network_trains_as_it_does_eagerly(channels: int) -> None:
    both(model=lambda: network(channels), data=(images(channels),), epochs=2, optimizer=SGD)


def test_images_whose_channels_come_last_already_train_as_they_do_eagerly() -> None:
    xs, ys = images()
    data = [(part.to(memory_format=torch.channels_last), ys[:10]) for part in (xs[:10], xs[10:])]
    trained = []
    for compile in (False, "step"):
        made = learner(compile, network, data=(data,), optimizer=SGD, default_callbacks=False)
        made.fit(2)
        trained.append(weights(made))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
