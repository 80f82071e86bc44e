"""Changes of what a critic sees, with a probability that follows its scores."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import fluxloop.compile.graphs
from fluxloop import (
    Accelerator,
    DataError,
    GANPhase,
    GANValidationPhase,
    Learner,
    Metric,
    Metrics,
    PhaseError,
    Recorder,
    TensorBatches,
    stream_seed,
)
from fluxloop.augment import AdaptiveAugment, random_affine, random_flip, random_resized_crop
from fluxloop.losses import r1_penalty
from fluxloop.testing import assert_resumes_exactly

SEED, BATCH, STEPS, NOISE = 3, 4, 9, 3
ADAM = partial(torch.optim.Adam, lr=0.02, fused=False)
SHIFT = partial(random_affine, translate=0.2)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(NOISE, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Softplus(), nn.Linear(6, 1))
    return {"generator": generator, "critic": critic}


def rows() -> TensorBatches:
    return TensorBatches(
        torch.rand(STEPS * BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(0)), batch_size=BATCH
    )


def learner_of(*callbacks: Any, **options: Any) -> Learner:
    given = {"data": (rows(), rows()), "optimizer": ADAM, "default_callbacks": False, "seed": SEED, **options}
    return Learner(models(), callbacks=callbacks, **given)


def adaptive(**options: Any) -> AdaptiveAugment:
    return AdaptiveAugment(
        random_flip, SHIFT, **{"target": 0.1, "every": 2, "images": 40, "probability": 0.5, **options}
    )


def changed(xs: Tensor, probability: Tensor) -> Tensor:
    """Change each row with a probability, as the paper says: each way by a draw of its own."""
    for change in (random_flip, SHIFT):
        drawn = torch.rand(1, len(xs))[0]
        new = change(xs)
        xs = torch.stack([new[i] if drawn[i] < probability else xs[i] for i in range(len(xs))])
    return xs


def by_hand(r1: float, critic_steps: int) -> tuple[dict[str, nn.Module], list[float]]:
    both, probability, probabilities = models(), torch.tensor(0.5), []
    gen, dis = both.values()
    step_gen, step_dis = ADAM(gen.parameters()), ADAM(dis.parameters())
    signs: list[float] = []
    for number, real in enumerate(rows()):
        torch.manual_seed(stream_seed(SEED, "training/step", number))
        probabilities.append(probability.item())
        see = partial(changed, probability=probability)
        fake = gen(torch.randn(BATCH, NOISE))
        step_dis.zero_grad()
        score = dis(see(real))
        loss = softplus(-score).mean() + softplus(dis(see(fake.detach()))).mean()
        if r1:
            loss = loss + r1 * r1_penalty(lambda xs: dis(see(xs)), real)  # noqa: B023 - called at once
        loss.backward()
        step_dis.step()
        signs += score.detach().sign().flatten().tolist()
        if number % 2:
            towards = 1 if sum(signs) / len(signs) > 0.1 else -1
            probability = (probability + towards * len(signs) / 40).clamp(0, 1)
            signs = []
        if number % critic_steps == critic_steps - 1:
            step_gen.zero_grad()
            softplus(-dis(see(fake))).mean().backward()
            step_gen.step()
    return both, probabilities


@pytest.mark.parametrize(("r1", "critic_steps"), [(0.0, 1), (0.5, 2)])
def test_a_gan_with_adaptive_changes_equals_a_hand_written_loop(r1: float, critic_steps: int) -> None:
    augment = adaptive()
    learner = learner_of(Recorder(), Metrics(Metric(torch.clone, inputs=("augment_probability",), name="p")))
    phase = GANPhase(noise=NOISE, r1=r1, critic_steps=critic_steps, augment=augment)
    learner.fit(1, phases=[phase])
    expected, probabilities = by_hand(r1, critic_steps)
    assert learner.history["training/p"][-1] == pytest.approx(sum(probabilities) / STEPS)
    assert len({*probabilities}) > 2
    for name, model in expected.items():
        for found, wanted in zip(learner.models[name].parameters(), model.parameters(), strict=True):
            assert torch.equal(found, wanted), name


def test_the_probability_stays_between_0_and_1_and_goes_where_the_signs_say() -> None:
    augment = AdaptiveAugment(random_flip, every=1, images=100, target=0.6)
    for total, expected in [(40.0, 0.4), (40.0, 0.8), (40.0, 1.0), (20.0, 0.6), (-40.0, 0.2), (0.0, 0.0)]:
        augment.observe(torch.tensor([total, 40.0]))
        assert float(augment.probability) == pytest.approx(expected)
    lazy = AdaptiveAugment(random_flip, every=2, images=100)
    lazy.observe(torch.tensor([30.0, 30.0]), updated=False)
    lazy.observe(torch.tensor([30.0, 30.0]))
    assert lazy.probability == 0.0
    lazy.observe(torch.tensor([-10.0, 10.0]))
    assert float(lazy.probability) == pytest.approx(0.7)  # of 70 rows, whose mean sign is 0.71


def test_with_probability_0_rows_are_seen_as_they_are_and_with_1_all_are_changed() -> None:
    xs = torch.rand(64, 1, 4, 4)
    augment = AdaptiveAugment(lambda rows: -rows)
    assert torch.equal(augment(xs), xs)
    assert torch.equal(augment(xs, 1.0), -xs)
    some = (augment(xs, 0.25) < 0).flatten(1).any(1)
    assert 4 < some.sum() < 30


def test_a_function_changes_what_is_seen_in_training_and_nothing_in_validation() -> None:
    seen: list[tuple[int, bool]] = []

    def negative(xs: Tensor) -> Tensor:
        seen.append((len(xs), xs.requires_grad))
        return -xs

    phase = GANPhase(noise=NOISE, augment=negative)
    learner = learner_of()
    learner.epoch(phase, [next(iter(rows()))])
    assert seen == [(BATCH, False), (BATCH, False), (BATCH, True)]  # real, fake, and fake again for the generator
    critic = models()["critic"]
    torch.testing.assert_close(learner.step.real_scores, critic(-next(iter(rows()))))
    learner.evaluate(phase=GANValidationPhase(phase))
    assert len(seen) == 3


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["plain", "accumulated"])
def test_a_killed_run_goes_on_with_its_probability_to_the_bit(options: Any) -> None:
    assert_resumes_exactly(
        lambda: learner_of(Recorder(), Metrics(), accelerator=Accelerator("cpu", **options)),
        phases=lambda: [GANPhase(noise=NOISE, r1=0.1, augment=adaptive(every=3))],
        at=[2, 4, 7, 11],
    )


def test_a_phase_that_has_trained_takes_up_the_state_of_another_and_copies_are_apart() -> None:
    first = GANPhase(noise=NOISE, augment=adaptive())
    fresh = copy.deepcopy(first.state_dict())
    learner = learner_of()
    learner.epoch(first)
    second = copy.deepcopy(first)
    state = first.state_dict()
    learner.epoch(first)
    assert first.state_dict()["augment"]["updates"] == 2 * STEPS
    assert state["augment"]["updates"] == second.state_dict()["augment"]["updates"] == STEPS
    assert torch.equal(state["augment"]["probability"], second.augment.probability)  # type: ignore[union-attr]
    second.load_state_dict(fresh)
    assert second.augment.probability == 0.5  # type: ignore[union-attr]
    second.load_state_dict({"critic_updates": 0})  # of a run without
    assert second.augment.state_dict() == {"probability": 0.5, "updates": 0}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"target": 2}, "target=2"), ({"every": 0}, "every=0"), ({"images": 0}, "images=0"), ({"probability": -1}, "=-1")],
)
def test_numbers_out_of_range_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adaptive(**options)


def test_no_changes_and_what_is_no_function_are_refused_with_what_to_type() -> None:
    with pytest.raises(ValueError, match=r"given no changes; expected .* AdaptiveAugment\(random_flip, partial"):
        AdaptiveAugment()
    with pytest.raises(TypeError, match="expected functions of a batch of rows"):
        AdaptiveAugment(0.5)  # type: ignore[arg-type]
    with pytest.raises(PhaseError, match=r"GANPhase\(augment=0.5\) was given; expected what changes rows"):
        GANPhase(augment=0.5)  # type: ignore[arg-type]


def test_changes_that_do_not_keep_the_shape_are_named() -> None:
    augment = AdaptiveAugment(partial(random_resized_crop, size=2), probability=0.5)
    with pytest.raises(DataError, match=r"made a Tensor of shape \(4, 1, 2, 2\) of a Tensor of shape \(4, 1, 4, 4\)"):
        learner_of().fit(1, phases=[GANPhase(noise=NOISE, augment=augment)])


def test_changes_put_in_the_place_of_others_are_those_that_are_used() -> None:
    phase, calls = GANPhase(noise=NOISE), []

    def count(xs: Tensor) -> Tensor:
        calls.append(len(xs))
        return xs

    learner = learner_of()
    phase.augment = adaptive()
    learner.fit(1, phases=[phase])
    assert phase.augment.state_dict()["updates"] == STEPS
    phase.augment = AdaptiveAugment(count)
    learner.fit(1, phases=[phase])
    assert len(calls) == 3 * STEPS  # real and fake rows for the critic, and fake ones for the generator
    phase.augment = None
    learner.fit(1, phases=[phase])
    assert len(calls) == 3 * STEPS


@pytest.mark.parametrize("compiled", [{}, {"compile": "step"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_penalties_pass_through_turned_rows_in_half_precision(
    precision: Any, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp16" and compiled:
        pytest.skip("compiled steps are of bf16 or fp32")
    if "FLUXLOOP_COMPILER" not in os.environ:  # the compiler takes 40 s, and the graph is what is tested
        monkeypatch.setattr(fluxloop.compile.graphs, "lower", lambda graph, inputs, device: torch.no_grad()(graph))
    learner = learner_of(accelerator=Accelerator("cpu", precision=precision, **compiled))
    before = copy.deepcopy(learner.model.critic.state_dict())
    learner.fit(1, phases=[GANPhase(noise=NOISE, r1=0.1, gradient_penalty=1.0, augment=SHIFT)])
    assert all(value.isfinite().all() for value in learner.model.critic.state_dict().values())
    assert not torch.equal(learner.model.critic[1].weight, before["1.weight"])


def test_a_transform_that_draws_once_for_a_batch_is_told() -> None:
    class Flip(nn.Module):
        pass

    Flip.__module__ = "torchvision.transforms.v2._geometry"
    for make in (AdaptiveAugment, lambda change: GANPhase(augment=change)):
        with pytest.warns(UserWarning, match="draws once for a whole batch.*expected one that draws for each row"):
            make(Flip())
