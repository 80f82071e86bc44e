from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, net, unchanged
from torch import nn

from fluxloop import (
    Learner,
    Recorder,
)
from fluxloop.errors import CheckpointError
from fluxloop.testing import bits
from toys import Versioned

# Weights alone


def test_a_warm_start_takes_weights_and_nothing_else(tmp_path: Path) -> None:
    first = net(Recorder())
    first.fit(3)
    first.save(tmp_path / "state.pt")
    second = net(Recorder(), seed=99, optimizer=partial(torch.optim.SGD, lr=0.5))
    assert second.load_weights(tmp_path / "state.pt") == []
    assert all(torch.equal(t, first.model.state_dict()[n]) for n, t in second.model.state_dict().items())
    assert second.history.cycles == 0
    assert second.optimizer.state_dict()["state"] == {}
    assert second.streams.positions() == net(Recorder()).streams.positions()


def test_a_warm_start_from_a_modules_own_state(tmp_path: Path) -> None:
    source = Net()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    learner = net()
    assert learner.load_weights(tmp_path / "weights.pt") == []
    assert torch.equal(learner.model.head.weight, source.head.weight)


def test_a_strict_warm_start_tells_all_that_differs_and_changes_nothing(tmp_path: Path) -> None:
    torch.save({**Net(4).state_dict(), "extra": torch.zeros(1)}, tmp_path / "weights.pt")
    learner = net()
    before = bits(learner)
    with pytest.raises(CheckpointError, match="the weights do not fit") as caught:
        learner.load_weights(tmp_path / "weights.pt")
    assert "'extra' of the checkpoint is not there" in str(caught.value)
    assert "'encoder.0.weight' has shape (3, 1), in the checkpoint (4, 1)" in str(caught.value)
    assert "load_weights(..., strict=False) takes those that do" in str(caught.value)
    assert unchanged(learner, before)


def test_a_warm_start_that_is_not_strict_takes_what_fits_and_names_the_rest(tmp_path: Path) -> None:
    state = Net().state_dict()
    del state["head.bias"]
    state["encoder.0.weight"] = torch.zeros(4, 1)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pt")
    learner = net()
    bias, weight = learner.model.head.bias.clone(), learner.model.encoder[0].weight.clone()
    assert learner.load_weights(tmp_path / "weights.pt", strict=False) == ["encoder.0.weight", "extra", "head.bias"]
    assert torch.equal(learner.model.head.weight, state["head.weight"])
    assert torch.equal(learner.model.head.bias, bias)
    assert torch.equal(learner.model.encoder[0].weight, weight)


def test_a_part_of_a_model_takes_its_weights(tmp_path: Path) -> None:
    source = net()
    source.fit(2)
    source.save(tmp_path / "state.pt")
    learner = net(seed=99)
    head = learner.model.head.weight.clone()
    assert learner.load_weights(tmp_path / "state.pt", "encoder") == []
    assert all(
        torch.equal(t, source.model.encoder.state_dict()[n]) for n, t in learner.model.encoder.state_dict().items()
    )
    assert torch.equal(learner.model.head.weight, head)
    again = net(seed=98)
    again.load_weights(tmp_path / "state.pt", "encoder.0")
    assert torch.equal(again.model.encoder[0].weight, source.model.encoder[0].weight)
    torch.save(source.model.encoder.state_dict(), tmp_path / "encoder.pt")
    third = net(seed=97)
    third.load_weights(tmp_path / "encoder.pt", "encoder")
    assert torch.equal(third.model.encoder[0].weight, source.model.encoder[0].weight)


def test_one_of_several_models_takes_its_weights(tmp_path: Path) -> None:
    def pair(seed: int) -> Learner[Any]:
        torch.manual_seed(seed)
        return Learner({"G": Net(), "D": Net()}, default_callbacks=False)

    first, second = pair(1), pair(2)
    first.save(tmp_path / "state.pt")
    other = second.models["D"].state_dict()["head.weight"].clone()
    second.load_weights(tmp_path / "state.pt", "G")
    assert torch.equal(second.models["G"].head.weight, first.models["G"].head.weight)  # type: ignore[arg-type]
    assert torch.equal(second.models["D"].state_dict()["head.weight"], other)
    second.load_weights(tmp_path / "state.pt", "D.encoder")
    assert torch.equal(second.models["D"].encoder[0].weight, first.models["D"].encoder[0].weight)  # type: ignore[index]
    assert torch.equal(second.models["D"].state_dict()["head.weight"], other)
    single = net()
    with pytest.raises(
        CheckpointError, match=r"weights of \[''\] were asked for, .* \['D', 'G'\]; name one of the models"
    ):
        single.load_weights(tmp_path / "state.pt")
    pair(3).load_weights(tmp_path / "state.pt")


def test_names_of_nobody_are_refused(tmp_path: Path) -> None:
    net().save(tmp_path / "state.pt")
    with pytest.raises(Exception, match="nobody"):
        net().load_weights(tmp_path / "state.pt", "nobody")


@pytest.mark.parametrize("name", ["model", "0"])
def test_versions_of_modules_are_kept(name: str, tmp_path: Path) -> None:
    def learner(seed: int) -> Learner[Any]:
        torch.manual_seed(seed)
        return net(model=nn.Sequential(Versioned(1, 1)), seed=seed)

    first = learner(1)
    first.save(tmp_path / "state.pt")
    torch.save(first.model.state_dict(), tmp_path / "plain.pt")
    for file in ("state.pt", "plain.pt") if name == "model" else ("state.pt",):
        second = learner(2)
        second.load_weights(tmp_path / file, name)
        assert torch.equal(second.model[0].weight, first.model[0].weight)
    third = learner(3)
    third.load(tmp_path / "state.pt")
    assert torch.equal(third.model[0].weight, first.model[0].weight)


# Weights of which none fits


def file_of(module: nn.Module, folder: Path, rename: Callable[[str], str] = str) -> Path:
    torch.save({rename(name): tensor for name, tensor in module.state_dict().items()}, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_which_none_fits_are_refused_with_the_names_of_both(tmp_path: Path, strict: bool) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3)), default_callbacks=False)
    before = learner.model[0].weight.detach().clone()
    path = file_of(nn.Conv2d(1, 1, 1), tmp_path, lambda name: f"stem.{name}")
    with pytest.raises(CheckpointError, match=r"(?s)0\.weight.*stem\.weight"):
        learner.load_weights(path, strict=strict)
    assert torch.equal(learner.model[0].weight, before)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_names_that_differ_by_a_prefix_alone_are_told_with_what_to_type(tmp_path: Path, prefix: str) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3)), default_callbacks=False)
    path = file_of(nn.Sequential(nn.Linear(2, 3)), tmp_path, lambda name: f"{prefix}{name}")
    with pytest.raises(CheckpointError, match=rf"begin with '{prefix}'.*\n.*n.removeprefix\('{prefix}'\)"):
        learner.load_weights(path, strict=False)
    torch.save({n.removeprefix(prefix): t for n, t in torch.load(path).items()}, path)  # as it says
    assert learner.load_weights(path) == []


def test_weights_of_a_part_are_told_to_be_given_to_the_part(tmp_path: Path) -> None:
    part = nn.Linear(2, 3)
    learner = Learner(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)), default_callbacks=False)
    path = file_of(part, tmp_path)
    with pytest.raises(CheckpointError, match=r"those of a part: learner.load_weights\(path, '1'\)"):
        learner.load_weights(path, strict=False)
    assert learner.load_weights(path, "1") == []
    assert torch.equal(learner.model[1].weight, part.weight)


def test_weights_of_which_some_fit_are_taken_and_the_rest_is_told(tmp_path: Path) -> None:
    learner = Learner(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), default_callbacks=False)
    path = file_of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 9)), tmp_path)
    assert learner.load_weights(path, strict=False) == ["1.bias", "1.weight"]
