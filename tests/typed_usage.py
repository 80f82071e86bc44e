"""What a type checker knows about a learner; mypy checks this file with the package."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from typing_extensions import assert_type

import fluxloop
from fluxloop import AbstractTrainingPhase, Learner, runstep


class Generator(nn.Linear):
    def sample(self, count: int) -> list[int]:
        return [count]


class GAN(NamedTuple):
    generator: Generator
    critic: nn.Linear


class GANStep(AbstractTrainingPhase):
    def step(self, learner: Learner[GAN], batch: Any) -> None:
        with runstep(learner, self, real=batch):
            assert_type(learner.model.generator.sample(3), list[int])


def a_named_tuple_of_modules_keeps_its_type(gan: GAN) -> None:
    learner = Learner(gan)
    assert_type(learner, Learner[GAN])
    assert_type(learner.model.critic, nn.Linear)


def a_single_model_keeps_its_type(model: Generator) -> None:
    assert_type(Learner(model).model, Generator)


def a_mapping_says_nothing_about_its_models(models: dict[str, nn.Module]) -> None:
    assert_type(Learner(models).model, Any)


def a_learner_without_a_model_type_is_one_of_any(learner: Learner) -> None:
    assert_type(learner.model, Any)


def every_public_name_has_its_type_although_it_is_loaded_when_asked_for() -> None:
    assert_type(fluxloop.EMA("G", 0.9), fluxloop.callbacks.ema.EMA)
    assert_type(fluxloop.phases.BYOLPhase, type[fluxloop.BYOLPhase])
    assert_type(fluxloop.errors.DataError(), fluxloop.DataError)


def a_misspelt_name_is_an_error() -> None:
    fluxloop.Lerner  # type: ignore[attr-defined]  # noqa: B018  # mypy would report an ignore that it does not need
    fluxloop.callbacks.EMAs  # type: ignore[attr-defined]  # noqa: B018  # as above
