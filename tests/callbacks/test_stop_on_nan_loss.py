from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from by_hand import train
from fluxloop import (
    AbstractTrainingPhase,
    BackwardBegin,
    BackwardEnd,
    Callback,
    CancelFittingException,
    CustomCallback,
    FitEnd,
    GradientClip,
    Learner,
    Metrics,
    PerOptimizerPhase,
    Phase,
    Recorder,
    StepBegin,
    StopOnNaNLoss,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    ValidationPhase,
    on,
    runstep,
    throttle,
)
from fluxloop.compute.finite import Finite
from fluxloop.compute.fused import skipping
from fluxloop.testing import Coefficient, EventRecorder, assert_observer, toy_learner

NAN, INF = float("nan"), float("inf")
GOOD = 3  # batches before the bad one
ADAM = partial(torch.optim.Adam, fused=False)

pytestmark = pytest.mark.filterwarnings("ignore:the fit stops")  # one test looks at the warning


def batches(bad: float) -> list[tuple[Tensor, Tensor]]:
    """Five batches of eight rows; the target of one row of the fourth is `bad`."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.rand(8, 4, generator=generator), torch.rand(8, 1, generator=generator)) for _ in range(5)]
    pairs[GOOD][1][2] = bad
    return pairs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def learner_of(*callbacks: Any, bad: float = NAN, optimizer: Any = ADAM, **options: Any) -> Learner:
    return Learner(
        network(),
        nn.functional.mse_loss,
        **{"data": (batches(bad),), "default_callbacks": False, **options},
        optimizer=optimizer,
        callbacks=[Recorder(), *callbacks],
        seed=0,
    )


def by_hand(steps: int, optimizer: Any = ADAM) -> tuple[nn.Module, Any]:
    model = network()
    made = optimizer(model.parameters())
    train(model, nn.functional.mse_loss, made, batches(0.0)[:steps])
    return model, made


@pytest.mark.slow(quick=8)
@pytest.mark.parametrize(("bad", "number"), [(NAN, "nan"), (INF, "inf"), (-INF, "inf")])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_fit_ends_with_the_weights_of_the_last_good_step(
    bad: float, number: str, wait: bool, optimizer: Any
) -> None:
    learner = learner_of(StopOnNaNLoss(wait=wait), bad=bad, optimizer=optimizer)
    history = learner.fit(5)
    assert history.stop_reason == f"the loss became {number} in TrainingPhase(), epoch 1, step {GOOD + 1} of the run"
    assert history[TrainingPhase].steps == GOOD
    assert history[TrainingPhase].updates == {None: GOOD}
    assert history[TrainingPhase].epochs == 0
    assert history.cycles == 0
    model, reference = by_hand(GOOD, optimizer)
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = learner.optimizer.state_dict()["state"], reference.state_dict()["state"]
    for index, entries in theirs.items():
        for name, tensor in entries.items():
            assert torch.equal(torch.as_tensor(ours[index][name]), torch.as_tensor(tensor)), name


def test_fit_returns_and_its_end_says_why() -> None:
    reasons: list[Any] = []
    recorder = EventRecorder()
    learner = learner_of(StopOnNaNLoss(), recorder)

    class Ends(EventRecorder):
        def record(self, event: Any, phase: Any, learner: Any) -> None:
            if isinstance(event, FitEnd):
                reasons.append((event.reason, event.error))

    learner.add_callback(Ends(name="ends"))
    assert learner.fit(5) is learner.history
    assert recorder.events.count("FitEnd") == 1
    assert recorder.events[-2:] == ["BackwardBegin", "FitEnd"]
    assert reasons == [("the loss became nan in TrainingPhase(), epoch 1, step 4 of the run", None)]


def test_it_is_a_default_callback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the loss became nan" in str(learner_of(default_callbacks=True).fit(2).stop_reason)


def test_without_it_the_weights_are_lost() -> None:
    learner = learner_of()
    assert learner.fit(1).stop_reason is None
    assert not torch.isfinite(learner.model[2].weight).any()


def test_outside_a_fit_the_signal_reaches_the_caller() -> None:
    learner = learner_of(StopOnNaNLoss())
    with pytest.raises(CancelFittingException, match="the loss became nan"):
        learner.epoch(TrainingPhase())
    assert torch.equal(learner.model[0].weight, by_hand(GOOD)[0][0].weight)


def test_large_losses_are_fine() -> None:
    learner = learner_of(StopOnNaNLoss(), bad=1e18)
    assert learner.fit(1).stop_reason is None
    assert learner.history[TrainingPhase].steps == 5


def test_a_nan_of_the_validation_does_not_stop() -> None:
    learner = learner_of(StopOnNaNLoss(), data=(batches(0.0), batches(NAN)))
    history = learner.fit(2)
    assert history.stop_reason is None
    assert history[TrainingPhase].epochs == history[ValidationPhase].epochs == 2
    learner.evaluate(batches(NAN))


def test_a_loss_replaced_before_the_backward_is_the_one_looked_at() -> None:
    def mend(learner: Any) -> None:
        learner.step.loss = (learner.step.preds - learner.step.ys.nan_to_num(0.0)).square().mean()

    mending = CustomCallback(mend, BackwardBegin, reads=("step.preds", "step.ys"), writes=("step.loss",))
    assert learner_of(StopOnNaNLoss(), mending).fit(1).stop_reason is None


# Update blocks


class InOrder(AbstractTrainingPhase):
    """One update per (name, loss factor), in order."""

    def __init__(self, *updates: tuple[str, float]) -> None:
        self.updates = updates

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch) as (_, state):
            for name, factor in self.updates:
                with learner.optimizing(name) as block:
                    block.loss = factor * getattr(learner.model, name)(state.xs).mean()


def pair() -> Learner:
    return Learner(
        {"G": Coefficient(1.0), "D": Coefficient(1.0)},
        data=([torch.ones(2, 1)] * 2,),
        optimizer=partial(torch.optim.SGD, lr=0.25),
        callbacks=[Recorder(), StopOnNaNLoss()],
        default_callbacks=False,
        seed=0,
    )


@pytest.mark.parametrize(
    ("updates", "reason", "values"),
    [
        ([("D", NAN), ("G", 1.0)], "the loss of 'D' became nan", (1.0, 1.0)),
        ([("D", 1.0), ("G", INF)], "the loss of 'G' became inf", (1.0, 0.75)),
        ([("D", 1.0), ("D", 1.0), ("D", NAN), ("G", 1.0)], "the loss of 'D' became nan", (1.0, 0.5)),
        ([("D", 1.0), ("G", 1.0), ("D", NAN)], "the loss of 'D' became nan", (0.75, 0.75)),
        ([("G", 1.0), ("D", 1.0), ("G", NAN), ("D", 1.0)], "the loss of 'G' became nan", (0.75, 0.75)),
    ],
)
def test_in_blocks_the_optimizer_is_named_and_its_parameters_unharmed(
    updates: Any, reason: str, values: tuple[float, float]
) -> None:
    learner = pair()
    where = "in InOrder(), epoch 1, step 1 of the run"
    assert learner.fit(2, phases=[InOrder(*updates)]).stop_reason == f"{reason} {where}"
    assert (learner.model.G.value.item(), learner.model.D.value.item()) == values
    assert all(p.requires_grad for p in (learner.model.G.value, learner.model.D.value))


def test_a_single_unnamed_block_is_looked_at_as_well() -> None:
    class Block(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                with learner.optimizing() as block:
                    block.loss = nn.functional.mse_loss(learner.model(state.xs), state.ys)

    learner = learner_of(StopOnNaNLoss())
    assert learner.fit(1, phases=[Block()]).stop_reason == "the loss became nan in Block(), epoch 1, step 4 of the run"
    assert torch.equal(learner.model[0].weight, by_hand(GOOD)[0][0].weight)


def test_a_phase_with_a_loss_per_optimizer_is_looked_at_as_well() -> None:
    class Rates(PerOptimizerPhase):
        def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
            return nn.functional.mse_loss(state.preds, state.ys) * (NAN if name == "2" else 1.0)

    learner = learner_of(StopOnNaNLoss(), bad=0.0, optimizer={"0": torch.optim.SGD, "2": torch.optim.SGD})
    head = learner.model[2].weight.detach().clone()
    assert (
        learner.fit(1, phases=[Rates()]).stop_reason
        == "the loss of '2' became nan in Rates(), epoch 1, step 1 of the run"
    )
    assert torch.equal(learner.model[2].weight, head)


# Phases that say nothing before their backward


class ByHand(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            state.loss = nn.functional.mse_loss(learner.model(state.xs), state.ys)
            learner.optimizer.zero_grad()
            state.loss.backward()
            learner.optimizer.step()


class Numbers(AbstractTrainingPhase):
    def __init__(self, entry: str) -> None:
        self.entry = entry

    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            loss = batch[1].mean().item()
            vars(state).update({"loss": loss} if self.entry == "loss" else {"losses": {"G": 1.0, "D": loss}})


def test_a_phase_without_backwardbegin_is_looked_at_when_its_step_ends() -> None:
    learner = learner_of(StopOnNaNLoss())
    assert (
        learner.fit(2, phases=[ByHand()]).stop_reason == "the loss became nan in ByHand(), epoch 1, step 4 of the run"
    )
    assert learner.history[ByHand].steps <= GOOD + 1
    assert learner.history[ByHand].epochs == 0


@pytest.mark.parametrize(("entry", "name"), [("loss", "the loss"), ("losses", "the loss of 'D'")])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_losses_that_are_numbers_are_looked_at_too(entry: str, name: str, bad: float) -> None:
    learner = learner_of(StopOnNaNLoss(), bad=bad)
    assert (
        learner.fit(1, phases=[Numbers(entry)]).stop_reason
        == f"{name} became {bad} in Numbers(entry={entry!r}), epoch 1, step 4 of the run"
    )


class Nothing(AbstractTrainingPhase):
    def step(self, learner: Learner, batch: Any) -> None:
        with runstep(learner, self, xs=batch[0]) as (handle, _):
            handle(BackwardBegin())
            handle(BackwardEnd())


def test_a_step_without_a_loss_is_fine() -> None:
    learner = learner_of(StopOnNaNLoss())
    assert learner.fit(1, phases=[Nothing()]).stop_reason is None
    assert learner.history[Nothing].steps == 5


def test_looking_changes_nothing() -> None:
    assert_observer(StopOnNaNLoss(), toy_learner)


class ThenExplicit(TrainingPhase):
    """The block of D, then an explicit loss of G, which is `loss`."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            with learner.optimizing("D") as block:
                block.loss = learner.model.D(state.xs).square().mean()
            state.loss = learner.model.G(state.xs).square().mean() * self.loss
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update("G")


@pytest.mark.parametrize("loss", [1.0, NAN])
def test_an_explicit_loss_after_a_block_is_looked_at_before_its_update(loss: float) -> None:
    learner = Learner(
        {"D": Coefficient(1.0), "G": Coefficient(2.0)},
        data=([(torch.ones(4, 1), torch.ones(4, 1))],),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[StopOnNaNLoss()],
        default_callbacks=False,
    )
    reason = learner.fit(1, phases=[ThenExplicit(loss)]).stop_reason
    assert learner.model.D.value.item() != 1.0
    if loss == 1.0:
        assert reason is None
        assert learner.model.G.value.item() != 2.0
    else:
        assert reason == "the loss became nan in ThenExplicit(loss=nan), epoch 1, step 1 of the run"
        assert learner.model.G.value.item() == 2.0


class LossesListed(TrainingPhase):
    """Keeps a list of its own under the name ``losses``."""

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            state.losses = [1.0, NAN]
            state.loss = learner.loss_fn(learner.model(state.xs), state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            learner.update()


def test_an_entry_called_losses_that_is_a_list_is_ignored() -> None:
    learner = toy_learner(Recorder(), Metrics(), StopOnNaNLoss())
    history = learner.fit(2, phases=[LossesListed()])
    assert history.stop_reason is None
    assert history.cycles == 2
    assert list(history.metrics[LossesListed]) == ["loss"]
    assert len(history.metrics[LossesListed]["loss"]) == 2


# Gradients


class Spoiled(torch.autograd.Function):
    """Passes a tensor on; one number of its gradient becomes `bad`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bad: float) -> Tensor:
        ctx.bad = bad
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        spoiled = gradients[0].clone()
        spoiled.view(-1)[0] = ctx.bad
        return spoiled, None


class Spoiling(TrainingPhase):
    """Trains with the gradients of `window` batches; from step `at` on, the first layer's are `bad`."""

    def __init__(self, at: int, bad: float, window: int = 1) -> None:
        self.at, self.bad, self.window = at, bad, window
        self.count = 0

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (handle, state):
            self.count += 1
            hidden = learner.model[0](state.xs)
            if self.count >= self.at:
                hidden = Spoiled.apply(hidden, self.bad)
            state.preds = learner.model[1:](hidden)
            state.loss = learner.loss_fn(state.preds, state.ys) / self.window
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            if self.count % self.window == 0:
                learner.update()


class SpoilingBlocks(Spoiling):
    """The same with two optimizers, in the blocks of a GAN: the second one's gradients become bad."""

    def step(self, learner: Learner, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0]) as (_, state):
            self.count += 1
            state.fake = learner.model.G(state.xs)
            with learner.optimizing("D") as block:
                block.loss = learner.model.D(state.fake.detach()).mean() - learner.model.D(state.xs).mean()
            with learner.optimizing("G") as block:
                fake = Spoiled.apply(state.fake, self.bad) if self.count >= self.at else state.fake
                block.loss = -learner.model.D(fake).mean()


class Weights(UnsafeCallback):
    """Keeps weights, buffers and optimizers' states as they are when a step begins."""

    reads = ("*",)
    draws = False

    @on(StepBegin, AbstractTrainingPhase)
    def keep(self, event: StepBegin, phase: AbstractTrainingPhase, learner: Learner) -> None:
        self.kept = state_of(learner)


def state_of(learner: Learner) -> dict[str, Tensor]:
    found = {f"{name}.{key}": value for name, m in learner.models.items() for key, value in m.state_dict().items()}
    for slot in learner.updates.slots:
        for number, parameter in enumerate(slot.parameters):
            state = slot.optimizer.state[parameter]
            found |= {f"{slot.name} {number} {k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])]


def gan(*callbacks: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(
        {"G": nn.Linear(4, 4), "D": nn.Linear(4, 1)},
        data=(batches(0.0) * 2,),
        optimizer=ADAM,
        callbacks=[Recorder(), *callbacks],
        default_callbacks=False,
        seed=0,
    )


SETTINGS: dict[str, Any] = {
    "one optimizer": lambda *c: (learner_of(*c, bad=0.0, data=(batches(0.0) * 2,)), Spoiling),
    "fused": lambda *c: (learner_of(*c, data=(batches(0.0) * 2,), optimizer=torch.optim.AdamW), Spoiling),
    "blocks": lambda *c: (gan(*c), SpoilingBlocks),
    "clipped": lambda *c: (learner_of(GradientClip(0.1), *c, data=(batches(0.0) * 2,)), Spoiling),
    "clipped by value": lambda *c: (learner_of(GradientClip(value=0.1), *c, data=(batches(0.0) * 2,)), Spoiling),
    "added up": lambda *c: (learner_of(*c, data=(batches(0.0) * 4,)), partial(Spoiling, window=2)),
}


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gradients_that_are_not_finite_change_nothing_at_any_step(setting: str, bad: float) -> None:
    for at in range(1, 11):
        weights = Weights()
        learner, phase = SETTINGS[setting](StopOnNaNLoss(), weights)
        step = at + at % 2 if setting == "added up" else at  # the update that would have used them
        history = learner.fit(1, phases=[phase(at, bad)])
        whose, parameters = ("optimizer 'G'", "G.weight, G.bias") if setting == "blocks" else ("the optimizer", "")
        reason = f"gradients of {whose} became nan or infinite ({parameters}"
        if setting == "clipped by value" and abs(bad) == INF:  # it is clipped, and its norm known from before
            reason = "the norm of the gradients of the optimizer, before they were clipped, became nan or infinite"
        assert str(history.stop_reason).startswith(reason), at
        assert str(history.stop_reason).endswith(f"epoch 1, step {step} of the run")
        found = changed(weights.kept, state_of(learner))
        if setting == "blocks":  # that of D was finite, and has been made
            found = [name for name in found if not name.startswith("D")]
        assert found == []
        updates = {"G": at - 1, "D": at} if setting == "blocks" else {None: (step - 1) // (1 + (setting == "added up"))}
        assert {k: v for k, v in history[phase if isinstance(phase, type) else Spoiling].updates.items() if v} == {
            k: v for k, v in updates.items() if v
        }


def test_a_stop_is_a_warning_that_names_the_first_parameters_and_can_be_made_an_error() -> None:
    learner = learner_of(StopOnNaNLoss(), bad=0.0)
    with pytest.warns(UserWarning, match=r"the fit stops: gradients of the optimizer .* \(0\.weight, 0\.bias\) in Spo"):
        learner.fit(1, phases=[Spoiling(2, NAN)])
    learner = learner_of(StopOnNaNLoss())
    with pytest.warns(
        UserWarning, match=r"the fit stops: the loss became nan in TrainingPhase\(\), epoch 1, step 4 of the run"
    ):
        learner.fit(1)
    learner = learner_of(StopOnNaNLoss())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the fit stops")
        with pytest.raises(UserWarning, match="the loss became nan"):
            learner.fit(1)
    assert torch.equal(learner.model[0].weight, by_hand(GOOD)[0][0].weight)


def test_large_gradients_with_an_infinite_sum_are_fine() -> None:
    class Large(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0]) as (_, state), learner.optimizing() as block:
                block.loss = (learner.model(state.xs) * 1.2e37).sum()

    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(0.01)
    learner = Learner(
        model,
        data=([(torch.full((8, 4), 1.9), 0)],),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        callbacks=[StopOnNaNLoss(), Weights()],
        default_callbacks=False,
    )
    assert learner.fit(1, phases=[Large()]).stop_reason is None
    assert model.weight.grad is not None
    assert not model.weight.grad.sum().isfinite()


@pytest.mark.parametrize("kind", ["sparse", "complex", "frozen", "float64"])
def test_gradients_of_every_kind_are_looked_at(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4, sparse=kind == "sparse")
            self.factor = nn.Parameter(torch.ones(4, dtype=torch.complex64 if kind == "complex" else torch.float64))
            self.factor.requires_grad_(kind != "frozen")

        def forward(self, xs: Tensor) -> Tensor:
            rows = self.table(xs)
            return (rows * (self.factor if self.factor.requires_grad else 1.0)).abs().float()

    class Mean(AbstractTrainingPhase):
        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch) as (_, state), learner.optimizing() as block:
                block.loss = Spoiled.apply(learner.model(state.xs), NAN).mean()

    torch.manual_seed(0)
    learner = Learner(
        Net(),
        data=([torch.arange(3)],),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[StopOnNaNLoss()],
        default_callbacks=False,
    )
    before = state_of(learner)
    reason = str(learner.fit(1, phases=[Mean()]).stop_reason)
    assert "table.weight" in reason
    assert ("factor" in reason) is (kind in ("complex", "float64", "sparse"))
    assert changed(before, state_of(learner)) == []


def test_gradients_are_looked_at_after_other_handlers_have_changed_them() -> None:
    class Mend(Callback):
        writes = ("step.grads",)

        @on(UpdateBegin)
        def mend(self, event: Any, phase: Any, learner: Any) -> None:
            for name, gradient in learner.step.grads.items():
                learner.step.grads[name] = gradient.nan_to_num()

    class Spoil(Callback):
        writes = ("step.grads",)
        run_after = (GradientClip,)

        @on(UpdateBegin)
        def spoil(self, event: Any, phase: Any, learner: Any) -> None:
            learner.step.grads["2.bias"].fill_(NAN)

    assert learner_of(StopOnNaNLoss(), Mend(), bad=0.0).fit(1, phases=[Spoiling(2, NAN)]).stop_reason is None
    learner = learner_of(StopOnNaNLoss(), Spoil(), GradientClip(1.0), bad=0.0)
    assert "(2.bias)" in str(learner.fit(1).stop_reason)


class NormAlone(StopOnNaNLoss):
    """Looks at gradients in its own way."""

    looks = 0

    @on(UpdateBegin)
    def look_at_gradients(self, event: Any, phase: Any, learner: Any) -> None:
        self.looks += 1


def test_right_after_clipping_a_finite_norm_says_that_all_gradients_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Finite, "require_gradients", lambda self, name, wait: calls.append("gradients"))
    clip = GradientClip(1.0)
    for callbacks, looked in (
        ([clip], []),
        ([], ["gradients"]),
        ([throttle(clip, UpdateBegin, freq=1)], ["gradients"]),
    ):
        calls.clear()
        learner_of(StopOnNaNLoss(), *callbacks, bad=0.0, data=(batches(0.0)[:1],)).fit(1)
        assert calls == looked
    own = NormAlone()
    learner_of(own, GradientClip(1.0), bad=0.0).fit(1)
    assert own.looks == 5


def test_a_phase_below_phase_is_looked_at_as_well() -> None:
    class Below(Phase):
        data_key = "training"
        gradients = train_mode = True

        def step(self, learner: Learner, batch: Any) -> None:
            with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
                learner.backward(nn.functional.mse_loss(learner.model(state.xs), state.ys))
                learner.update()

    assert "epoch 1, step 4 of the run" in str(learner_of(StopOnNaNLoss()).fit(1, phases=[Below()]).stop_reason)


# Buffers


class Counting(nn.Module):
    """Keeps a mean of what it saw, and replaces the tensor of the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("mask", torch.full((4,), -INF))

    def forward(self, xs: Tensor) -> Tensor:
        self.mean.lerp_(xs.mean(0), 0.1)
        self.last = xs[0].clone()
        return xs


def with_buffers() -> nn.Module:
    torch.manual_seed(0)
    norms = nn.Sequential(nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True))
    return nn.Sequential(Counting(), nn.Linear(4, 8), norms, nn.Flatten(), nn.Linear(8, 1))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_buffers_stay_those_of_the_last_good_step(at: int) -> None:
    data = batches(0.0)
    data[at][0][2] = NAN
    learner = Learner(
        with_buffers(),
        nn.functional.mse_loss,
        data=(data,),
        optimizer=ADAM,
        callbacks=[StopOnNaNLoss()],
        default_callbacks=False,
        seed=0,
    )
    assert str(learner.fit(1).stop_reason).startswith("the loss became nan")
    expected = with_buffers()
    optimizer = ADAM(expected.parameters())
    for xs, ys in data[:at]:
        optimizer.zero_grad()
        nn.functional.mse_loss(expected(xs), ys).backward()
        optimizer.step()
    for (name, ours), theirs in zip(learner.model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_buffers_that_were_kept_in_an_earlier_step_are_not_put_back() -> None:
    data = batches(NAN)
    learner = Learner(
        with_buffers(),
        nn.functional.mse_loss,
        data=(data,),
        callbacks=[throttle(StopOnNaNLoss(), StepBegin, freq=10)],  # hears of the first step's beginning alone
        default_callbacks=False,
        seed=0,
    )
    learner.fit(1)
    assert learner.model[0].mean.equal(mean_of([xs for xs, _ in data[: GOOD + 1]]))


def mean_of(inputs: list[Tensor]) -> Tensor:
    mean = torch.zeros(4)
    for xs in inputs:
        mean.lerp_(xs.mean(0), 0.1)
    return mean


def test_buffers_of_a_module_that_a_phase_holds_stay_as_well() -> None:
    class Teacher(TrainingPhase):
        def __init__(self) -> None:
            self.teacher = nn.BatchNorm1d(4)

        def body(self, learner: Learner, handle: Any, state: Any) -> None:
            state.xs = self.teacher(state.xs)
            super().body(learner, handle, state)

    learner, phase = learner_of(StopOnNaNLoss()), Teacher()
    learner.data.training[GOOD][0][0] = NAN
    learner.fit(1, phases=[phase])
    assert phase.teacher.running_mean is not None
    assert phase.teacher.running_mean.isfinite().all()
    assert phase.teacher.num_batches_tracked == GOOD


# A device that is not waited for


@pytest.mark.parametrize("fused", [False, True])
def test_on_a_device_the_fit_ends_when_the_number_has_come(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(StopOnNaNLoss(), bad=0.0, optimizer=partial(torch.optim.Adam, fused=fused))
    asked: list[Any] = []
    monkeypatch.setattr(learner._host_queue, "request", lambda tensor, then: asked.append((tensor, then)))
    seen: list[dict[str, Tensor]] = []

    finite = learner.finite
    slot = learner.updates.slots[0]
    for number in range(3):
        for parameter in slot.parameters:
            parameter.grad = torch.full_like(parameter, NAN if number == 1 else 1.0)
        finite._require_later(slot, list(slot.parameters), [])
        with skipping(slot.optimizer, finite.bad):  # as an update does
            learner.accelerator.update(slot.optimizer)
        seen.append(state_of(learner))
    assert bool(changed(seen[0], seen[2])) is not fused
    assert finite.bad is not None
    (_, fine), (found, bad), _ = asked
    fine(0.0)
    with pytest.warns(UserWarning, match="The weights stay" if fused else "had gone on by then"):
        with pytest.raises(CancelFittingException, match=r"\(0\.weight, 0\.bias, 2\.weight and 1 more\) in no phase"):
            bad(found.item())
    assert finite.bad is None
