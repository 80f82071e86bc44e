"""Models in channels-last memory format, as PyTorch's users write it: every part of fluxloop keeps the format."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fluxloop.compile.graphs
from fluxloop import EMA, Accelerator, Checkpointer, Learner, Recorder, TensorBatches
from tests import by_hand

ADAM = partial(torch.optim.Adam, lr=0.01)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return model.to(memory_format=torch.channels_last)


def batches() -> TensorBatches:
    torch.manual_seed(1)
    return TensorBatches(torch.randn(16, 3, 8, 8), torch.arange(16) % 4, batch_size=4)


def learner_of(optimizer: Any, compile: Literal[False, "model", "step"] = False, **options: Any) -> Learner:
    accelerator = Accelerator("cpu", compile=compile)
    options = {"default_callbacks": False, "seed": 3, "accelerator": accelerator, **options}
    return Learner(net(), cross_entropy, data=(batches(),), optimizer=optimizer, **options)


def assert_channels_last(learner: Learner) -> None:
    """Raise where a weight of a convolution, or what its optimizer keeps of it, lies in another order in memory."""
    weight = learner.model[3].weight
    kept = [value for value in learner.optimizer.state[weight].values() if value.ndim]
    assert kept
    for tensor in (weight, *kept):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("compile", [False, pytest.param("step", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, partial(ADAM, fused=False)])
def test_weights_and_averages_keep_the_format_and_adam_stays_fused(
    optimizer: Any, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer is not ADAM and "FLUXLOOP_COMPILER" not in os.environ:  # run as it was traced: the compiler takes 10 s
        monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
    learner = learner_of(optimizer, compile)
    fused = learner.optimizer.param_groups[0].get("fused")
    learner.fit(2)
    assert_channels_last(learner)
    assert learner.optimizer.param_groups[0].get("fused") is fused
    assert fused is (True if optimizer is ADAM else False if optimizer.keywords.get("fused") is False else None)


def test_activations_have_the_format_that_the_weights_have() -> None:
    learner, seen = learner_of(SGD), []
    learner.model[3].register_forward_hook(
        lambda module, given, made: seen.append(made.is_contiguous(memory_format=torch.channels_last))
    )
    learner.fit(1)
    assert seen == [True] * 4


def test_the_weights_are_those_of_a_loop_by_hand_to_the_bit() -> None:
    plain, learner = net(), learner_of(SGD)
    by_hand.train(plain, cross_entropy, SGD(plain.parameters()), batches(), epochs=2)
    learner.fit(2)
    for one, other in zip(plain.parameters(), learner.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_copies_averages_and_resumed_runs_keep_the_format_and_the_bits(tmp_path: Path) -> None:
    def make(*callbacks: Any) -> Learner:
        return learner_of(ADAM, callbacks=[Recorder(), EMA("model", 0.9), *callbacks])

    unbroken = make()
    unbroken.fit(3)
    make(Checkpointer(tmp_path)).fit(2)
    resumed = make(Checkpointer(tmp_path))
    resumed.fit(3, resume=tmp_path)
    for learner in (unbroken, copy.deepcopy(unbroken), resumed):
        assert_channels_last(learner)
        assert learner.weights["model@ema"][3].weight.is_contiguous(memory_format=torch.channels_last)
        for one, other in zip(unbroken.model.parameters(), learner.model.parameters(), strict=True):
            assert torch.equal(one, other)
