"""What a type checker knows about a learner; mypy checks this file with the package."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from typing_extensions import assert_type

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
