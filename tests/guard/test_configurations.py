"""Lists and dicts of a configuration, as hydra gives them to what it instantiates: omegaconf's own, or Python's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define
from torch import Tensor

from fluxloop import (
    Accelerator,
    Callback,
    Checkpointer,
    Learner,
    LinearProbe,
    ModelError,
    ObjectivePhase,
    Profile,
    SampleImages,
    TrainingPhase,
    ValidationPhase,
)
from fluxloop.guard.given import as_plain
from fluxloop.logging import Backend
from fluxloop.stopping import Criterion
from fluxloop.testing import toy_learner

hydra = pytest.importorskip("hydra.utils")
omegaconf = pytest.importorskip("omegaconf")

ROWS = {"_target_": "torch.ones", "_args_": [8, 4]}
LOADER = {"_target_": "fluxloop.TensorBatches", "_args_": [[ROWS, ROWS]], "batch_size": 4, "_convert_": "all"}
DATASET = {"_target_": "torch.utils.data.TensorDataset", "_args_": [ROWS, ROWS]}
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 4}
SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}

convert = pytest.mark.parametrize("how", ["none", "all"])
"""What hydra passes: ``DictConfig`` and ``ListConfig`` (unless it is told), or dicts and lists."""


def made(how: str, target: str, *args: Any, **options: Any) -> Any:
    given = {"_target_": f"fluxloop.{target}", "_args_": list(args), "_convert_": how, **options}
    return hydra.instantiate(omegaconf.OmegaConf.create(given))


def learner_of(how: str, data: Any, model: Any = LINEAR, optimizer: Any = SGD) -> Any:
    loss = {"_target_": "torch.nn.MSELoss"}
    cpu = {"_target_": "fluxloop.Accelerator", "device": "cpu"}
    options = {"loss_fn": loss, "accelerator": cpu, "default_callbacks": False, "seed": 0}
    return made(how, "Learner", model=model, data=data, optimizer=optimizer, **options)


def test_lists_and_dicts_of_a_configuration_are_pythons_at_every_depth() -> None:
    held = torch.nn.Identity()
    config = omegaconf.OmegaConf.create(
        {"sizes": [1, [2, 3]], "rate": 0.5, "name": None, "deep": {"module": held}}, flags={"allow_objects": True}
    )
    plain = as_plain(config)
    assert plain == {"sizes": [1, [2, 3]], "rate": 0.5, "name": None, "deep": {"module": held}}
    assert type(plain) is type(plain["deep"]) is dict
    assert type(plain["sizes"]) is type(plain["sizes"][1]) is list
    assert as_plain(given := [1, (2,)]) is given


TAKEN = [
    ("Profile", {"steps": [2, 3]}, "steps", (2, 3)),
    ("ActivationStats", {"pattern": ["0", "2"]}, "pattern", ["0", "2"]),
    ("phases.DiffusionPhase", {"log_sigma": [-1.0, 0.5]}, "log_sigma", (-1.0, 0.5)),
    ("phases.DiffusionPhase", {"sigma_range": [0.1, 8.0]}, "sigma_range", (0.1, 8.0)),
    ("phases.GANPhase", {"noise": [4, 2]}, "noise", [4, 2]),
    ("augment.RandomMasks", {"share": [0.1, 0.5]}, "share", (0.1, 0.5)),
    ("augment.BlockMasks", {"ratio": [0.5, 2.0]}, "ratio", (0.5, 2.0)),
    ("augment.MultiBlock", {"context": [0.5, 1.0]}, "context", (0.5, 1.0)),
    ("Unfreeze", {"when": {"encoder": 1}}, "when", {"encoder": 1}),
    ("LogHistograms", {"_args_": [[{"_target_": "fluxloop.logging.Memory"}]], "of": ["weights"]}, "of", ("weights",)),
]


@convert
@pytest.mark.parametrize(("target", "options", "name", "held"), TAKEN)
def test_what_takes_a_pair_or_several_takes_a_list_of_a_configuration(
    target: str, options: dict[str, Any], name: str, held: Any, how: str
) -> None:
    value = getattr(made(how, target, **options), name)
    assert value == held
    assert type(value) is type(held)


PARTS = [
    ("Patience", [5]),
    ("TwoViews", [{"_target_": "torch.nn.Identity"}]),
    ("augment.RandomMasks", [0.5]),
    ("augment.MultiBlock", []),
    ("Metric", [{"_target_": "torch.nn.MSELoss"}]),
    ("logging.CSV", ["metrics.csv"]),
    ("logging.Memory", []),
    ("LearningRate", ["G"]),
    ("Shard", []),
    ("linear", [5, 0.0, 1.0]),
    ("cosine", [5, 0.0, 1.0]),
    ("exponential", [5, 0.1, 1.0]),
    ("polynomial", [5, 0.0, 1.0]),
    ("schedules.step", [5, 1.0, 0.5]),
    ("triangle", [5, 0.0, 1.0]),
    ("sine", [5, 0.0, 1.0]),
    ("one_cycle", [5, 1.0]),
    ("constant", [0.5]),
    ("sequence", [0.5]),
    ("GradientClip", []),
]


@pytest.mark.parametrize(("target", "args"), PARTS)
def test_parts_stand_in_lists_and_dicts_of_a_configuration_as_they_are(target: str, args: list[Any]) -> None:
    part = {"_target_": f"fluxloop.{target}", "_args_": args}
    parts = hydra.instantiate(omegaconf.OmegaConf.create({"several": [part], "by_name": {"a": part}}))
    for found in (parts.several[0], parts.by_name.a):  # and no dicts of their fields
        assert type(found).__name__ == target.rpartition(".")[-1]
        assert type(found).__module__.startswith("fluxloop.")


@define
class Mild(Criterion):
    limit: float = 0.5


def test_criteria_and_backends_of_ones_own_stand_in_configurations_too() -> None:
    class Printer(Backend):
        pass

    for part in (Mild(0.25), Printer()):
        config = omegaconf.OmegaConf.create([], flags={"allow_objects": True})
        config.append(part)
        assert config[0] is part


def test_metrics_are_logged_to_backends_of_a_configuration(tmp_path: Path) -> None:
    backend = {"_target_": "fluxloop.logging.CSV", "_args_": [str(tmp_path / "metrics.csv")]}
    parts = [{"_target_": "fluxloop.Recorder"}, {"_target_": "fluxloop.Metrics"}]
    toy_learner(*hydra.instantiate([*parts, {"_target_": "fluxloop.LogMetrics", "_args_": [backend]}])).fit(1)
    assert "training,loss" in (tmp_path / "metrics.csv").read_text()


@convert
def test_schedules_and_transforms_take_lists_of_a_configuration(how: str) -> None:
    schedule = made(how, "sequence", [1.0, 5], 0.5)
    assert [schedule(t) for t in (0, 4, 5, 9)] == [1.0, 1.0, 0.5, 0.5]
    images = torch.rand(4, 3, 8, 8)
    for name, options, same in (
        ("gaussian_blur", {"sigma": [0.1, 2.0]}, {"sigma": (0.1, 2.0)}),
        ("random_resized_crop", {"scale": [0.3, 1.0]}, {"scale": (0.3, 1.0)}),
    ):
        torch.manual_seed(0)
        changed = made(how, f"augment.{name}", _partial_=True, **options)(images)
        torch.manual_seed(0)
        assert torch.equal(changed, made(how, f"augment.{name}", _partial_=True)(images, **same))


@convert
def test_an_option_of_a_callback_is_pythons_once_a_learner_has_it(how: str) -> None:
    sample = made(how, "SampleImages", value_range=[0.0, 1.0], shape=[1, 2, 2], inputs=ROWS)
    probe = made(how, "LinearProbe", entries=["xs", "ys"], num_classes=2, queries=[ROWS, ROWS])
    toy_learner(made(how, "Recorder"), sample, probe)
    assert type(sample) is SampleImages
    assert type(probe) is LinearProbe
    assert (list(sample.value_range), list(sample.shape), list(probe.entries)) == ([0.0, 1.0], [1, 2, 2], ["xs", "ys"])
    assert not any("omegaconf" in type(value).__module__ for value in (*vars_of(sample), *vars_of(probe)))
    profile = Profile()
    profile.steps = omegaconf.OmegaConf.create([2, 3])
    toy_learner(profile)  # which converts what was assigned before it had the callback
    assert type(profile.steps) is tuple
    assert profile.steps == (2, 3)


def vars_of(callback: Any) -> list[Any]:
    return [getattr(callback, name) for name in type(callback)._options]


@convert
@pytest.mark.parametrize("source", [LOADER, DATASET], ids=["batches", "dataset"])
def test_data_of_a_configuration_is_training_and_validation_data(source: dict[str, Any], how: str) -> None:
    for data in ([source, source], {"training": source, "validation": source}):
        learner = learner_of(how, data)
        assert set(learner.data) == {"training", "validation"}
        learner.fit(1, phases=[TrainingPhase(), ValidationPhase()])
    assert set(learner_of(how, [source]).data) == {"training"}


def test_a_list_of_batches_stays_one() -> None:
    batches = [(torch.ones(2, 4), torch.zeros(2, 4))] * 2
    learner = Learner(
        torch.nn.Linear(4, 4), torch.nn.MSELoss(), data=batches, default_callbacks=False, accelerator=Accelerator("cpu")
    )
    assert list(learner.data) == ["training"]
    assert len(learner.data.training) == 2


@convert
def test_loaders_of_a_configuration_are_combined(how: str) -> None:
    by_name = made(how, "CombinedLoader", {"a": LOADER, "b": LOADER})
    assert [set(batch) for batch in by_name] == [{"a", "b"}] * 2
    assert [type(batch) for batch in made(how, "CombinedLoader", [LOADER, LOADER])] == [list, list]


@convert
def test_several_models_and_optimizers_of_a_configuration_train(how: str) -> None:
    class Both(ObjectivePhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"xs": batch[0]}

        def loss(self, learner: Any, state: Any) -> Tensor:
            loss: Tensor = learner.model.D(learner.model.G(state.xs)).square().mean()
            return loss

    learner = learner_of(how, [LOADER], {"G": LINEAR, "D": LINEAR}, {"G": SGD, "D": SGD})
    before = learner.model.G.weight.clone()
    learner.fit(1, phases=[Both()])
    assert not torch.equal(learner.model.G.weight, before)
    with pytest.raises(Exception, match=r"expected a torch\.nn\.Module, or a tuple or dict of several") as raised:
        learner_of(how, [LOADER], [LINEAR, LINEAR])
    assert isinstance(raised.value.__cause__, ModelError)


@convert
def test_a_callback_of_ones_own_keeps_what_the_configuration_gave_it_and_resumes(tmp_path: Path, how: str) -> None:
    config = omegaconf.OmegaConf.create({"sizes": [1, 2], "by": {"a": 1}})
    given = config if how == "none" else omegaconf.OmegaConf.to_container(config)

    def learner() -> Any:
        made = toy_learner(Mine(given["sizes"], given["by"]), num_batches=2)
        made.add_callback(Checkpointer(tmp_path / how))
        return made

    learner().fit(1)
    again = learner()
    again.fit(2, resume=tmp_path / how)
    assert list(again.get_callback(Mine).sizes) == [1, 2]
    assert dict(again.get_callback(Mine).by) == {"a": 1}


@define
class Mine(Callback):
    sizes: Any
    by: Any
