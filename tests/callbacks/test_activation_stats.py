from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from fluxloop import (
    CancelStepException,
    CustomCallback,
    EpochEnd,
    KNNProbe,
    Learner,
    LossBegin,
    ModelError,
    Recorder,
    TensorBatches,
    TrainingPhase,
    runstep,
    stream_seed,
)
from fluxloop.callbacks.activation_stats import ActivationStats, statistics
from fluxloop.testing import assert_observer, assert_resumes_exactly

SEED = 4


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=generator), torch.arange(40) % 3


def batches() -> TensorBatches:
    return TensorBatches(*rows(), batch_size=8)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def learner_of(*callbacks: Any, model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        callbacks=[Recorder(), *callbacks],
        default_callbacks=False,
        seed=SEED,
        **{"data": (batches(), batches()), "optimizer": torch.optim.SGD, **options},
    )


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_mean_deviation_and_zeros_equal_those_of_a_loop_by_hand() -> None:
    learner = learner_of(ActivationStats(every=3))
    learner.fit(2)
    model, expected = net(), {str(at): [] for at in range(4)}  # type: ignore[var-annotated]
    optimizer = torch.optim.SGD(model.parameters())
    for step, (xs, ys) in enumerate([*batches(), *batches()]):
        torch.manual_seed(stream_seed(SEED, "training/step", step))
        made = xs
        for at, part in enumerate(model):
            made = part(made)
            if step % 3 == 0:
                zeros = (made == 0).float().mean().item()
                expected[str(at)].append((step + 1, made.mean().item(), made.std(correction=0).item(), zeros))
        optimizer.zero_grad()
        cross_entropy(made, ys).backward()
        optimizer.step()
    found = learner.cbstate.activations
    assert found.keys() == expected.keys()
    for name, series in expected.items():
        assert [entry[0] for entry in found[name]] == [1, 4, 7, 10]
        for entry, other in zip(found[name], series, strict=True):
            assert entry == pytest.approx(other, rel=1e-5)
    assert 0 < found["1"][0][3] < 1


def test_a_dead_layer_shows_as_zeros() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    learner = learner_of(ActivationStats("1"), model=model)
    learner.fit(1)
    assert learner.cbstate.activations == {"1": [(1, 0.0, 0.0, 1.0)]}


def test_what_is_near_to_zero_counts_where_it_is_asked_for() -> None:
    values = torch.tensor([0.0, 0.04, -0.04, 1.0])
    assert statistics(values)[2] == 0.25
    assert statistics(values, near=0.05)[2] == 0.75


@pytest.mark.parametrize(
    "values", [torch.tensor([3, 5]), torch.tensor([3.0, 5.0]).half(), torch.tensor([3 + 0j, 5j])], ids=str
)
def test_whole_half_and_complex_numbers_have_statistics_too(values: Tensor) -> None:
    assert [number.item() for number in statistics(values)] == pytest.approx([4.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["encoder.0", "encoder.1", "head"]),
        ("encoder.*", ["encoder.0", "encoder.1"]),
        ("encoder", ["encoder"]),
        (("head", "encoder.1"), ["head", "encoder.1"]),
        ("model", ["model"]),
    ],
)
def test_a_wildcard_means_modules_without_parts_and_a_name_that_module(pattern: Any, names: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            self.head = nn.Linear(4, 3)

        def forward(self, xs: Tensor) -> Tensor:
            return self.head(self.encoder(xs))  # type: ignore[no-any-return]  # a module's

    learner = learner_of(ActivationStats(pattern), model=Net())
    learner.fit(1, phases=[TrainingPhase()])
    assert sorted(learner.cbstate.activations) == sorted(names)


class GAN(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        G, D = learner.model  # noqa: N806 - as the paper calls them
        with runstep(learner, self, real=batch[0]) as (_, state):
            state.fake = G(torch.randn(len(state.real), 2))
            with learner.optimizing("D") as d:
                d.loss = softplus(-D(state.real)).mean() + softplus(D(state.fake.detach())).mean()
            with learner.optimizing("G") as g:
                g.loss = softplus(-D(state.fake)).mean()


def test_in_a_users_gan_a_module_has_an_entry_for_each_time_it_ran() -> None:
    models = {"G": nn.Linear(2, 3), "D": nn.Linear(3, 1)}
    learner = learner_of(ActivationStats(every=2), model=models)
    learner.fit(1, phases=[GAN()])
    found = learner.cbstate.activations
    assert [step for step, *_ in found["G"]] == [1, 3, 5]
    assert [step for step, *_ in found["D"]] == [1, 1, 1, 3, 3, 3, 5, 5, 5]


def test_the_first_tensor_of_a_nested_output_counts_and_others_have_no_entry() -> None:
    class Nested(nn.Module):
        def forward(self, xs: Tensor) -> Any:
            return {"none": None, "pair": (xs * 0 + 2, xs)}

    class Silent(nn.Module):
        def forward(self, xs: Tensor) -> Any:
            return None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nested, self.silent, self.head = Nested(), Silent(), nn.Linear(3, 3)

        def forward(self, xs: Tensor) -> Any:
            self.silent(xs[:0])
            return self.head(self.nested(xs)["pair"][1])

    learner = learner_of(ActivationStats(), model=Net())
    learner.fit(1)
    assert learner.cbstate.activations["nested"] == [(1, 2.0, 0.0, 0.0)]
    assert "silent" not in learner.cbstate.activations


def test_training_is_the_same_to_the_bit() -> None:
    assert_observer(ActivationStats(every=1), learner_of)


def test_validation_and_what_probes_run_is_not_recorded() -> None:
    learner = learner_of(ActivationStats(every=1), KNNProbe("model", k=3))
    learner.fit(2)
    assert [step for step, *_ in learner.cbstate.activations["0"]] == list(range(1, 11))


def test_what_somebody_evaluates_inside_a_step_is_not_recorded() -> None:
    learner = learner_of(ActivationStats("0", every=1))
    learner.add_callback(CustomCallback(lambda _: learner.evaluate(), LossBegin, TrainingPhase, name="evaluates"))
    learner.fit(1, phases=[TrainingPhase()])
    assert [step for step, *_ in learner.cbstate.activations["0"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), CancelStepException(), KeyboardInterrupt()], ids=repr)
def test_hooks_are_gone_after_the_step_in_every_outcome(error: BaseException | None) -> None:
    seen: list[int] = []

    def look(learner: Any) -> None:
        seen.append(hooks(learner.model))
        if error is not None:
            raise error

    learner = learner_of(ActivationStats(), CustomCallback(look, LossBegin, TrainingPhase, reads=("model",)))
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="broken"):
            learner.fit(1)
    else:
        learner.fit(1)
    assert seen[0] == 4
    assert hooks(learner.model) == 0


def test_only_the_recorded_steps_have_hooks() -> None:
    seen: list[int] = []
    look = CustomCallback(lambda learner: seen.append(hooks(learner.model)), LossBegin, TrainingPhase, reads=("model",))
    learner_of(ActivationStats(every=4), look).fit(1)
    assert seen == [4, 0, 0, 0, 4]


def test_steps_go_on_in_a_further_fit_and_a_new_learner_begins_anew() -> None:
    stats = ActivationStats("0", every=5)
    learner = learner_of(stats)
    learner.fit(1)
    learner.fit(2)
    assert [step for step, *_ in learner.cbstate.activations["0"]] == [1, 6, 11]
    second = learner_of(stats)
    second.fit(1)
    assert [step for step, *_ in second.cbstate.activations["0"]] == [1]


def test_statistics_can_be_read_by_others_when_an_epoch_ends() -> None:
    seen: list[int] = []
    look = CustomCallback(
        lambda learner: seen.append(len(learner.cbstate.activations["3"])),
        EpochEnd,
        TrainingPhase,
        reads=("cbstate.activations",),
    )
    learner_of(ActivationStats(every=1), look).fit(2)
    assert seen == [5, 10]


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"ActivationStats\('conv\*'\) matches no module; there are \['model', '0'"):
        learner_of(ActivationStats("conv*"))


def test_every_must_be_1_or_more() -> None:
    with pytest.raises(ValueError, match=r"ActivationStats\(every=0\) was given; expected a whole number, 1 or more"):
        ActivationStats(every=0)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_statistics() -> None:
    assert_resumes_exactly(lambda: learner_of(ActivationStats(every=3)), epochs=2, at=[1, 4, 7, 12])


def test_after_cancelled_steps_and_in_phases_that_alternate_each_due_step_is_recorded() -> None:
    class Other(TrainingPhase):
        pass

    begun: list[int] = []

    def cancel(learner: Any) -> None:
        begun.append(1)
        if len(begun) in (2, 3, 9):
            raise CancelStepException

    learner = learner_of(ActivationStats("3", every=3), CustomCallback(cancel, LossBegin, TrainingPhase))
    learner.fit(3, phases=[TrainingPhase(), Other()])
    first, second = (learner.history[phase].steps for phase in (TrainingPhase, Other))
    found = [step for step, *_ in learner.cbstate.activations["3"]]
    assert set(found) == {*range(1, first + 1, 3), *range(1, second + 1, 3)}
