from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from by_hand import steps
from fluxloop import (
    EMA,
    CallbackConflictError,
    CancelFittingException,
    CustomCallback,
    DataError,
    EpochBegin,
    EpochEnd,
    KNNProbe,
    Learner,
    Metrics,
    ModelError,
    Recorder,
    StepBegin,
    TensorBatches,
    TrainingPhase,
    ValidationPhase,
    runstep,
)
from fluxloop.callbacks.swa import StochasticWeightAveraging, norms, update_norms
from fluxloop.testing import assert_observer, assert_resumes_exactly, assert_same_bits, bits

SEED = 4


class SWAValidation(ValidationPhase):
    model_view = "swa"


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=generator), torch.arange(40) % 3


def batches(shuffle: bool = False) -> TensorBatches:
    return TensorBatches(*rows(), batch_size=8, shuffle=shuffle)


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def learner_of(*callbacks: Any, model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        callbacks=callbacks,
        seed=SEED,
        **{
            "data": (batches(), batches()),
            "optimizer": partial(torch.optim.Adam, lr=0.05, fused=False),
            "default_callbacks": False,
            **options,
        },
    )


def by_hand(epochs: int, when: Callable[[int, int], bool], dropout: float = 0.0) -> tuple[nn.Module, AveragedModel]:
    """Train in plain PyTorch; average with torch's own where `when` (epoch from 1, step from 1) says."""
    model = net(dropout)
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for epoch, number, _ in steps(model, cross_entropy, optimizer, batches(), epochs=epochs, seed=SEED):
        last = (number + 1) % 5 == 0
        if when(epoch + 1 if last else 0, number + 1):
            averaged.update_parameters(model)
    return model, averaged


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES: dict[str, tuple[dict[str, Any], Callable[[int, int], bool]]] = {
    "every epoch": ({}, lambda epoch, step: epoch > 0),
    "from the third": ({"start": 2}, lambda epoch, step: epoch > 2),
    "every second": ({"start": 1, "every": 2}, lambda epoch, step: epoch in (3, 5)),
    "every third step": (
        {"start": 4, "every": 3, "unit": "step"},
        lambda epoch, step: step > 4 and (step - 4) % 3 == 0,
    ),
}


@pytest.mark.slow(quick=2)
@pytest.mark.parametrize("case", CASES)
def test_the_average_equals_torchs_averaged_model_to_the_bit_with_its_batch_norm_statistics(case: str) -> None:
    options, when = CASES[case]
    swa = StochasticWeightAveraging(**options)
    learner = learner_of(swa)
    learner.fit(6, phases=[TrainingPhase()])
    model, averaged = by_hand(6, when)
    assert swa.num_averaged == averaged.n_averaged.item() > 1
    assert same(learner.model, model)
    update_bn(batches(), averaged)
    assert same(learner.weights["model@swa"], averaged.module)
    assert not same(learner.weights["model@swa"], model)


def test_the_average_is_the_mean_of_the_weights_at_the_ends_of_the_epochs() -> None:
    ends: list[Tensor] = []
    look = CustomCallback(
        lambda learner: ends.append(learner.model[0].weight.detach().double().clone()),
        EpochEnd,
        TrainingPhase,
        reads=("model",),
    )
    learner = learner_of(StochasticWeightAveraging(start=1), look)
    learner.fit(5)
    torch.testing.assert_close(learner.weights["model@swa"][0].weight.double(), torch.stack(ends[1:]).mean(0))


def test_phases_run_the_average_with_fresh_statistics_every_epoch_and_name_their_metrics() -> None:
    learner = learner_of(StochasticWeightAveraging(start=1), Recorder(), Metrics())
    learner.fit(4, phases=[TrainingPhase(), ValidationPhase(), SWAValidation()])
    expected = []
    for epochs in range(1, 5):
        model, averaged = by_hand(epochs, lambda epoch, step: epoch > 1)
        if epochs > 1:
            update_bn(batches(), averaged)
        module = (averaged.module if epochs > 1 else model).eval()
        with torch.no_grad():
            expected.append(torch.stack([cross_entropy(module(xs), ys) for xs, ys in batches()]).mean().item())
    assert learner.history["validation/loss@swa"] == pytest.approx(expected, rel=1e-6)
    assert learner.evaluate(phase=SWAValidation())["loss@swa"] == pytest.approx(expected[-1], rel=1e-6)
    assert learner.history["validation/loss"][0] == learner.history["validation/loss@swa"][0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_is_the_same_to_the_bit(shuffle: bool) -> None:
    def make() -> Learner:
        return learner_of(model=net(0.4), data=(batches(shuffle), batches()))

    assert_observer(StochasticWeightAveraging(), make)
    plain, watched = make(), make()
    watched.add_callback(StochasticWeightAveraging(unit="step"))
    plain.fit(3, phases=[TrainingPhase()])
    watched.fit(3, phases=[TrainingPhase(), SWAValidation()])
    assert_same_bits(plain, watched)


@pytest.mark.parametrize("generator", [None, 3])
def test_a_shuffling_loader_gives_the_same_order_as_without(generator: int | None) -> None:
    def make() -> Learner:
        own = None if generator is None else torch.Generator().manual_seed(generator)
        loader = DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True, generator=own)
        return learner_of(data=(loader, batches()))

    plain, watched = make(), make()
    watched.add_callback(StochasticWeightAveraging())
    plain.fit(3, phases=[TrainingPhase()])
    watched.fit(3, phases=[TrainingPhase(), SWAValidation()])
    assert_same_bits(plain, watched)


def test_without_batch_norm_the_data_is_not_run_over() -> None:
    class Counted:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter(batches())

    data = Counted()
    learner = learner_of(StochasticWeightAveraging(), model=nn.Linear(3, 3), data=(data,))
    learner.fit(3)
    assert data.passes == 3
    learner = learner_of(StochasticWeightAveraging(), data=(data,))
    learner.fit(3)
    assert data.passes == 3 + 3 + 1 + 1  # one batch is tried before the first step


def test_before_the_first_average_it_is_the_live_weights() -> None:
    learner = learner_of(StochasticWeightAveraging(start=10))
    learner.fit(2, phases=[TrainingPhase()])
    assert same(learner.weights["model@swa"], learner.model)
    assert learner.weights["model@swa"] is not learner.model


def test_the_average_takes_no_gradient_is_in_eval_mode_and_the_live_model_is_not_replaced() -> None:
    learner = learner_of(StochasticWeightAveraging())
    live = learner.model
    learner.fit(2, phases=[TrainingPhase(), SWAValidation()])
    average = learner.weights["model@swa"]
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not any(module.training for module in average.modules())
    assert average[1].momentum == 0.1
    assert learner.model is live


def test_one_of_several_models_and_a_part_of_one_can_be_averaged() -> None:
    class Both(TrainingPhase):
        def check(self, learner: Learner) -> None: ...

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                for name in ("a", "b"):
                    with learner.optimizing(name) as block:
                        block.loss = cross_entropy(getattr(learner.model, name)(state.xs), state.ys)

    part = StochasticWeightAveraging("b.0", name="part")
    learner = learner_of(StochasticWeightAveraging("a"), part, model={"a": net(), "b": net()})
    learner.fit(2, phases=[Both()])
    assert list(learner.weights) == ["a", "b", "a@swa", "b.0@swa"]
    assert learner.weights["b.0@swa"].weight.shape == (8, 3)


def test_batches_of_another_shape_are_run_as_one_says() -> None:
    data = [{"image": xs, "label": ys} for xs, ys in batches()]

    class Dicts(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            return super().step(learner, (batch["image"], batch["label"]))

    swa = StochasticWeightAveraging(forward=lambda module, batch: module(batch["image"]))
    learner = learner_of(swa, data=(data,))
    learner.fit(3, phases=[Dicts()])
    other = learner_of(StochasticWeightAveraging())
    other.fit(3)
    assert same(learner.weights["model@swa"], other.weights["model@swa"])


def test_statistics_are_computed_as_torch_does_with_other_momenta_too() -> None:
    model = net()
    model[1].momentum = None
    reference = copy.deepcopy(model)
    update_norms(model, batches())
    update_bn(batches(), reference)
    assert same(model, reference)
    assert model.training
    assert norms(nn.BatchNorm1d(3, track_running_stats=False)) == []


class HeldNorm(nn.BatchNorm1d):
    """Stays in eval mode, as a pretrained one does whose statistics are to be kept."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def pretrained() -> nn.Sequential:
    """A network with a batch norm of statistics of its own, and one that is trained."""
    torch.manual_seed(1)
    held = HeldNorm(3)
    held.load_state_dict({**held.state_dict(), "running_mean": torch.ones(3), "running_var": torch.full((3,), 4.0)})
    return nn.Sequential(held, nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_a_batch_norm_that_training_holds_in_eval_mode_keeps_its_statistics_in_the_average() -> None:
    learner = learner_of(StochasticWeightAveraging(), Recorder(), Metrics(), model=pretrained())
    learner.fit(3, phases=[TrainingPhase(), SWAValidation()])
    held, _, norm, _ = average = learner.weights["model@swa"]
    assert torch.equal(held.running_mean, torch.ones(3))
    assert torch.equal(held.running_var, torch.full((3,), 4.0))
    with torch.no_grad():
        fed = average[1](average[0](torch.cat([xs for xs, _ in batches()])))
    torch.testing.assert_close(norm.running_mean, fed.mean(0))
    with torch.no_grad():
        losses = [cross_entropy(average(xs), ys) for xs, ys in batches()]
    assert learner.history["validation/loss@swa"][-1] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.slow
def test_a_batch_norm_that_a_callback_puts_into_eval_mode_keeps_its_statistics_too() -> None:
    def hold(learner: Any) -> None:
        learner.model[1].eval()

    def make() -> Learner:
        holder = CustomCallback(hold, EpochBegin, TrainingPhase, reads=("model",), writes=("model",))
        model = net()
        model[1].running_mean.fill_(0.5)
        return learner_of(StochasticWeightAveraging(), holder, Recorder(), Metrics(), model=model)

    learner = make()
    learner.fit(2, phases=[TrainingPhase(), SWAValidation()])
    assert torch.equal(learner.weights["model@swa"][1].running_mean, torch.full((8,), 0.5))
    assert_resumes_exactly(make, epochs=2, phases=lambda: [TrainingPhase(), SWAValidation()], at=[3, 5, 6, 9])


def test_where_every_batch_norm_is_held_no_data_is_needed() -> None:
    model = nn.Sequential(HeldNorm(3), nn.Linear(3, 3))
    learner = learner_of(StochasticWeightAveraging(), model=model, data=())
    learner.fit(2, data=(iter(batches()),), phases=[TrainingPhase()], steps_per_epoch=2)
    assert torch.equal(learner.weights["model@swa"][0].running_mean, torch.zeros(3))


def test_before_the_first_average_a_probe_sees_the_live_weights() -> None:
    """Whoever reads it, also where no phase runs it."""
    probes = [KNNProbe(name, bank=rows(), queries=rows(), metric=name[-5:]) for name in ("model", "model@swa")]
    learner = learner_of(StochasticWeightAveraging(start=30), *probes, Recorder(), Metrics())
    learner.fit(3, phases=[TrainingPhase()])
    assert len(set(learner.history["validation/model"])) > 1
    assert learner.history["validation/l@swa"] == learner.history["validation/model"]
    assert learner.evaluate(phase=SWAValidation())["loss@swa"] == learner.evaluate()["loss"]


def test_after_other_weights_were_loaded_it_begins_anew(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    learner = learner_of(swa := StochasticWeightAveraging())
    learner.fit(2, phases=[TrainingPhase()])
    learner.load_weights(tmp_path / "weights.pt")
    assert swa.num_averaged == 0
    assert same(learner.weights["model@swa"], net())
    learner.epoch(TrainingPhase())
    assert swa.num_averaged == 1
    averages = zip(learner.weights["model@swa"].parameters(), learner.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in averages)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_that_cannot_be_copied_say_what_to_use_instead() -> None:
    with pytest.raises(ModelError, match=r"cannot copy these weights.*torch\.nn\.utils\.parametrizations"):
        learner_of(StochasticWeightAveraging(), model=nn.utils.weight_norm(nn.Linear(3, 3)))


def test_a_failing_forward_puts_modes_and_momenta_back() -> None:
    model = net().eval()

    def fail(module: nn.Module, batch: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        update_norms(model, batches(), fail)
    assert not any(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    assert torch.is_grad_enabled()


def test_a_fit_that_is_cancelled_ends_with_fresh_statistics_and_one_that_failed_runs_over_no_data() -> None:
    def stop(error: BaseException) -> CustomCallback:
        def leave(learner: Any) -> None:
            if learner.cbstate.history[TrainingPhase].steps == 12:
                raise error

        return CustomCallback(leave, StepBegin, TrainingPhase, reads=("cbstate.history",))

    learner = learner_of(StochasticWeightAveraging(), stop(CancelFittingException("enough")), Recorder())
    learner.fit(9)
    _, averaged = by_hand(2, lambda epoch, step: epoch > 0)
    update_bn(batches(), averaged)
    assert same(learner.weights["model@swa"], averaged.module)
    failed = learner_of(StochasticWeightAveraging(), stop(RuntimeError("broken")), Recorder())
    with pytest.raises(RuntimeError, match="broken"):
        failed.fit(9)
    assert not same(failed.weights["model@swa"], averaged.module)


def test_its_state_goes_on_in_another_learner() -> None:
    whole = learner_of(StochasticWeightAveraging(start=1))
    whole.fit(4, phases=[TrainingPhase()])
    first = StochasticWeightAveraging(start=1)
    learner = learner_of(first)
    learner.fit(2, phases=[TrainingPhase()])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = StochasticWeightAveraging(start=1)
    learner.replace_callback(second)
    second.load_state_dict(torch.load(file, weights_only=True))
    learner.fit(2, phases=[TrainingPhase()])
    assert second.num_averaged == 3
    assert same(learner.weights["model@swa"], whole.weights["model@swa"])


def test_a_state_can_be_given_before_there_is_a_learner() -> None:
    first = StochasticWeightAveraging()
    learner = learner_of(first)
    learner.fit(2, phases=[TrainingPhase()])
    second = StochasticWeightAveraging()
    second.load_state_dict(first.state_dict())
    other = learner_of(second)
    assert second.num_averaged == 2
    assert same(other.weights["model@swa"], learner.weights["model@swa"])


def test_it_lives_beside_an_ema_and_others_of_other_names() -> None:
    callbacks = (
        StochasticWeightAveraging(),
        StochasticWeightAveraging(start=1, view="late", name="late"),
        EMA("model"),
    )
    learner = learner_of(*callbacks)
    learner.fit(2, phases=[TrainingPhase()])
    assert sorted(learner.weights) == ["model", "model@ema", "model@late", "model@swa"]
    before = bits(learner)
    with pytest.raises(CallbackConflictError, match="model@swa"):
        learner.add_callback(StochasticWeightAveraging(name="again"))
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(learner).items())


@pytest.mark.parametrize("data", [None, "iterator"])
def test_batch_norm_without_data_to_run_over_is_an_error_before_the_first_step(data: str | None) -> None:
    class OwnData(TrainingPhase):
        data_key = "own"

    learner = learner_of(StochasticWeightAveraging(), Recorder(), data={"own": batches()})
    if data is None:
        with pytest.raises(DataError, match="batch norm's statistics, and there is none; give the"):
            learner.fit(1, phases=[OwnData()])
    else:
        with pytest.raises(DataError, match="can be iterated once only"):
            learner.fit(1, data=(iter(batches()),), phases=[TrainingPhase()])
    assert learner.history[TrainingPhase].steps == learner.history[OwnData].steps == 0


def test_a_forward_that_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"forward=3 was given; expected a function \(module, batch\)"):
        StochasticWeightAveraging(forward=3)  # type: ignore[arg-type]  # on purpose


def test_lazy_weights_and_unknown_ones_are_refused() -> None:
    with pytest.raises(ModelError, match="have seen no batch"):
        learner_of(StochasticWeightAveraging(), model=nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ModelError, match="there are no weights"):
        learner_of(StochasticWeightAveraging("encoder"))


@pytest.mark.parametrize(
    "options",
    [{"start": -1}, {"start": 1.5}, {"start": "2"}, {"every": 0}, {"every": None}, {"unit": "second"}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected start of 0 or more, every of 1 or more, and unit"):
        StochasticWeightAveraging(**options)


@pytest.mark.parametrize("options", [{"model": "G@ema"}, {"model": -1}, {"view": "a b"}, {"view": None}], ids=str)
def test_names_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected live weights, and the name of a weights view"):
        StochasticWeightAveraging(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"start": 1}, {"every": 2}, {"unit": "step", "every": 3}], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_average(options: dict[str, Any]) -> None:
    def make() -> Learner:
        swa = StochasticWeightAveraging(**options)
        return learner_of(swa, Recorder(), Metrics(), model=net(0.4), data=(batches(shuffle=True), batches()))

    assert_resumes_exactly(make, epochs=3, phases=lambda: [TrainingPhase(), SWAValidation()], at=[1, 7, 12, 18, 29])


def test_a_fit_that_ctrl_c_ended_runs_over_no_data_any_more() -> None:
    read: list[int] = []

    class Counted:
        def __iter__(self) -> Iterator[Any]:
            read.append(1)
            return iter(batches())

    def interrupt(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 7:
            raise KeyboardInterrupt

    stop = CustomCallback(interrupt, StepBegin, TrainingPhase, reads=("cbstate.history",))
    learner = learner_of(StochasticWeightAveraging(), stop, Recorder(), data=(Counted(),))
    assert "Ctrl+C" in (learner.fit(5).stop_reason or "")
    assert len(read) == 3  # one batch was tried before the first step
    learner.remove_callback(CustomCallback)
    learner.fit(1)
    assert len(read) == 5
