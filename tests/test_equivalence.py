from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    BackwardBegin,
    BackwardEnd,
    Learner,
    LossBegin,
    PerOptimizerPhase,
    Recorder,
    TensorBatches,
    TrainingPhase,
    runstep,
    stream_seed,
)
from fluxloop.testing import EventRecorder, assert_same_bits

SEED = 3
EPOCHS = 3
ROWS, BATCH = 22, 4
STEPS = 6

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=False),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=False),
    "adamw fused": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


MODELS = {"plain": plain, "batch norm": with_batch_norm, "dropout": with_dropout}


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 5, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def tensor_batches() -> Iterable[Any]:
    return TensorBatches(*rows(), batch_size=BATCH, shuffle=True)


def data_loader() -> Iterable[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=BATCH, shuffle=True)


def data_loader_with_workers() -> Iterable[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=BATCH, shuffle=True, num_workers=2)


def in_order() -> Iterable[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=BATCH)


def made(make: Callable[[], Any]) -> Any:
    """Make a model with the same initial weights every time."""
    torch.manual_seed(1)
    return make()


def start_epoch(epoch: int) -> None:
    torch.manual_seed(stream_seed(SEED, "training/data", epoch))


def start_step(step: int) -> None:
    torch.manual_seed(stream_seed(SEED, "training/step", step))


def train_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Any]) -> None:
    step = 0
    model.train()
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for xs, ys in data:
            start_step(step)
            optimizer.zero_grad()
            cross_entropy(model(xs), ys).backward()
            optimizer.step()
            step += 1
    assert step == EPOCHS * STEPS


def learner_of(model: Any, data: Any, optimizer: Any, **options: Any) -> Learner:
    return Learner(
        model, cross_entropy, data=(data,), optimizer=optimizer, seed=SEED, default_callbacks=False, **options
    )


def assert_equal(trained: nn.Module, expected: nn.Module) -> None:
    found, wanted = trained.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


def assert_changed(trained: nn.Module, initial: nn.Module) -> None:
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), initial.parameters(), strict=True))


@pytest.mark.slow(quick=3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_equal_those_of_a_hand_written_loop(optimizer: str, model: str) -> None:
    by_hand = made(MODELS[model])
    train_by_hand(by_hand, OPTIMIZERS[optimizer](by_hand.parameters()), tensor_batches())
    learner = learner_of(made(MODELS[model]), tensor_batches(), OPTIMIZERS[optimizer])
    learner.fit(EPOCHS)
    assert_equal(learner.model, by_hand)
    assert_changed(learner.model, made(MODELS[model]))


@pytest.mark.slow
@pytest.mark.parametrize("data", [tensor_batches, data_loader, data_loader_with_workers, in_order])
def test_weights_equal_those_of_a_hand_written_loop_over_any_loader(data: Callable[[], Iterable[Any]]) -> None:
    by_hand = made(with_dropout)
    train_by_hand(by_hand, OPTIMIZERS["adam"](by_hand.parameters()), data())
    learner = learner_of(made(with_dropout), data(), OPTIMIZERS["adam"])
    learner.fit(EPOCHS)
    assert_equal(learner.model, by_hand)


@pytest.mark.slow
def test_the_order_of_shuffled_data_does_not_depend_on_the_number_of_workers() -> None:
    learners = [learner_of(made(plain), data(), OPTIMIZERS["sgd"]) for data in (data_loader, data_loader_with_workers)]
    for learner in learners:
        learner.fit(EPOCHS)
    assert_same_bits(*learners)


def test_every_epoch_has_an_order_of_its_own() -> None:
    seen: list[list[float]] = []

    class Watch(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            seen[-1].extend(batch[0][:, 0].tolist())
            return super().step(learner, batch)

        def epoch(self, learner: Learner, data: Any) -> None:
            seen.append([])
            super().epoch(learner, data)

    learner_of(made(plain), tensor_batches(), OPTIMIZERS["sgd"]).fit(EPOCHS, phases=[Watch()])
    assert [sorted(epoch) for epoch in seen] == [sorted(rows()[0][:, 0].tolist())] * EPOCHS
    assert len({tuple(epoch) for epoch in seen}) == EPOCHS


def test_the_default_callbacks_and_a_validation_pass_leave_the_weights_of_the_hand_written_loop() -> None:
    by_hand = made(with_dropout)
    train_by_hand(by_hand, OPTIMIZERS["adam"](by_hand.parameters()), tensor_batches())
    learner = Learner(
        made(with_dropout),
        cross_entropy,
        data=(tensor_batches(), rows()),
        optimizer=OPTIMIZERS["adam"],
        seed=SEED,
    )
    learner.fit(EPOCHS)
    assert_equal(learner.model, by_hand)
    assert learner.history[TrainingPhase].updates == {None: EPOCHS * STEPS}


def test_three_fits_of_one_epoch_equal_one_fit_of_three() -> None:
    long, short = (learner_of(made(with_dropout), tensor_batches(), OPTIMIZERS["adam"]) for _ in range(2))
    long.fit(3)
    for _ in range(3):
        short.fit(1)
    assert_same_bits(long, short)


def test_one_loss_with_two_optimizers_over_one_model_equals_the_hand_written_loop() -> None:
    by_hand = made(with_batch_norm)
    optimizers = [OPTIMIZERS["adam"](by_hand[0:2].parameters()), OPTIMIZERS["momentum"](by_hand[3].parameters())]
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for xs, ys in tensor_batches():
            by_hand.zero_grad()
            cross_entropy(by_hand(xs), ys).backward()
            for optimizer in optimizers:
                optimizer.step()

    model = made(with_batch_norm)
    given = {
        "body": OPTIMIZERS["adam"](model[0:2].parameters()),
        "head": OPTIMIZERS["momentum"](model[3].parameters()),
    }
    learner = learner_of(model, tensor_batches(), given, callbacks=[Recorder()])
    learner.fit(EPOCHS)
    assert_equal(learner.model, by_hand)
    assert learner.history[TrainingPhase].updates == {"body": EPOCHS * STEPS, "head": EPOCHS * STEPS}


# A phase that fires the events itself


class SpelledOut(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (handle, state):
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            state.loss = learner.loss_fn(state.preds, state.ys)
            handle(BackwardBegin())
            learner.backward(state.loss)
            handle(BackwardEnd())
            learner.update()


def test_a_spelled_out_phase_has_the_trace_and_the_bits_of_the_built_in_one() -> None:
    learners = []
    traces = []
    for phase in (TrainingPhase(), SpelledOut()):
        recorder = EventRecorder()
        learner = learner_of(made(with_dropout), tensor_batches(), OPTIMIZERS["adam"], callbacks=[recorder])
        learner.fit(EPOCHS, phases=[phase])
        learners.append(learner)
        traces.append(recorder.events)
    assert_same_bits(*learners)
    assert traces[0] == traces[1]
    assert traces[0].count("UpdateEnd") == EPOCHS * STEPS


# A phase with one update block equals the explicit calls


class InABlock(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (handle, state), learner.optimizing() as block:
            state.preds = learner.model(state.xs)
            handle(LossBegin())
            block.loss = learner.loss_fn(state.preds, state.ys)


def test_an_update_block_has_the_trace_and_the_bits_of_the_explicit_calls() -> None:
    learners = []
    traces = []
    for phase in (SpelledOut(), InABlock()):
        recorder = EventRecorder()
        learner = learner_of(made(with_batch_norm), tensor_batches(), OPTIMIZERS["momentum"], callbacks=[recorder])
        learner.fit(EPOCHS, phases=[phase])
        learners.append(learner)
        traces.append(recorder.events)
    assert_same_bits(*learners)
    assert traces[0] == traces[1]


# Hand-called backward and step inside a phase: what PyTorch does


class ByHand(TrainingPhase):
    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            learner.optimizer.zero_grad()
            cross_entropy(learner.model(state.xs), state.ys).backward()
            learner.optimizer.step()


def test_backward_and_step_called_by_hand_in_a_phase_equal_the_hand_written_loop() -> None:
    by_hand = made(with_dropout)
    train_by_hand(by_hand, OPTIMIZERS["adam"](by_hand.parameters()), tensor_batches())
    learner = learner_of(made(with_dropout), tensor_batches(), OPTIMIZERS["adam"])
    learner.fit(EPOCHS, phases=[ByHand()])
    assert_equal(learner.model, by_hand)


class Accumulating(TrainingPhase):
    """Adds the gradients of two batches up by hand, as one does in PyTorch."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, learner: Learner, batch: Any) -> Any:
        xs, ys = batch
        with runstep(learner, self, xs=xs, ys=ys) as (_, state):
            cross_entropy(learner.model(state.xs), state.ys).backward()
            self.count += 1
            if self.count % 2 == 0:
                learner.optimizer.step()
                learner.optimizer.zero_grad()


def test_gradients_added_up_by_hand_over_two_steps_equal_the_hand_written_loop() -> None:
    by_hand = made(with_dropout)
    optimizer = OPTIMIZERS["adam"](by_hand.parameters())
    step = 0
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for xs, ys in tensor_batches():
            start_step(step)
            step += 1
            cross_entropy(by_hand(xs), ys).backward()
            if step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    learner = learner_of(made(with_dropout), tensor_batches(), OPTIMIZERS["adam"])
    learner.fit(EPOCHS, phases=[Accumulating()])
    assert_equal(learner.model, by_hand)


# A GAN with update blocks


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))


def gan() -> dict[str, nn.Module]:
    return {"G": generator(), "D": critic()}


ADAM = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999), fused=False)


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-critic(real)).mean() + softplus(critic(fake)).mean()


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    return softplus(-critic(fake)).mean()


class GAN(TrainingPhase):
    """The critic steps `num_critic` times on new fakes, then the generator once."""

    def __init__(self, num_critic: int = 1) -> None:
        self.num_critic = num_critic

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            for _ in range(self.num_critic):
                state.fake = gen(torch.randn(len(state.real), 4))
                with learner.optimizing("D") as block:
                    block.loss = critic_loss(dis, state.real, state.fake.detach())
            with learner.optimizing("G") as block:
                block.loss = generator_loss(dis, state.fake)


def train_gan_by_hand(models: dict[str, nn.Module], num_critic: int) -> None:
    gen, dis = models["G"], models["D"]
    step_g, step_d = ADAM(gen.parameters()), ADAM(dis.parameters())
    step = 0
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for real in images():
            start_step(step)
            step += 1
            for _ in range(num_critic):
                fake = gen(torch.randn(len(real), 4))
                step_d.zero_grad()
                critic_loss(dis, real, fake.detach()).backward()
                step_d.step()
            step_g.zero_grad()
            generator_loss(dis, fake).backward()
            step_g.step()


def images() -> TensorBatches:
    return TensorBatches(rows()[0], batch_size=BATCH, shuffle=True)


def gan_learner(*callbacks: Any) -> Learner:
    return Learner(
        made(gan), data=(images(),), optimizer=ADAM, seed=SEED, default_callbacks=False, callbacks=[*callbacks]
    )


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("num_critic", [1, 5])
def test_a_gan_with_update_blocks_equals_the_hand_written_loop(num_critic: int) -> None:
    by_hand = made(gan)
    train_gan_by_hand(by_hand, num_critic)
    learner = gan_learner(Recorder())
    learner.fit(EPOCHS, phases=[GAN(num_critic)])
    for name, model in by_hand.items():
        assert_equal(learner.models[name], model)
        assert_changed(learner.models[name], made(gan)[name])


@pytest.mark.parametrize("num_critic", [1, 5])
def test_updates_are_counted_per_optimizer(num_critic: int) -> None:
    learner = gan_learner(Recorder())
    learner.fit(EPOCHS, phases=[GAN(num_critic)])
    assert learner.history[GAN].updates == {"D": EPOCHS * STEPS * num_critic, "G": EPOCHS * STEPS}
    assert learner.history[GAN].steps == EPOCHS * STEPS


class EveryFifth(TrainingPhase):
    """The critic steps on every batch, the generator on every fifth."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = gen(torch.randn(len(state.real), 4))
            with learner.optimizing("D") as block:
                block.loss = critic_loss(dis, state.real, state.fake.detach())
            self.count += 1
            if self.count % 5 == 0:
                with learner.optimizing("G") as block:
                    block.loss = generator_loss(dis, state.fake)


def test_five_critic_steps_on_five_batches_per_generator_step_equal_the_hand_written_loop() -> None:
    by_hand = made(gan)
    gen, dis = by_hand["G"], by_hand["D"]
    step_g, step_d = ADAM(gen.parameters()), ADAM(dis.parameters())
    step = 0
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for real in images():
            start_step(step)
            step += 1
            fake = gen(torch.randn(len(real), 4))
            step_d.zero_grad()
            critic_loss(dis, real, fake.detach()).backward()
            step_d.step()
            if step % 5 == 0:
                step_g.zero_grad()
                generator_loss(dis, fake).backward()
                step_g.step()
    learner = gan_learner(Recorder())
    learner.fit(EPOCHS, phases=[EveryFifth()])
    for name, model in by_hand.items():
        assert_equal(learner.models[name], model)
    assert learner.history[EveryFifth].updates == {"D": 18, "G": 3}


def test_a_gan_that_forgets_the_detach_still_trains_each_model_on_its_own_loss() -> None:
    class Forgetful(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                state.fake = gen(torch.randn(len(state.real), 4))
                with learner.optimizing("D") as block:
                    block.loss = critic_loss(dis, state.real, state.fake)
                state.fake = gen(torch.randn(len(state.real), 4))
                with learner.optimizing("G") as block:
                    block.loss = generator_loss(dis, state.fake)

    class Careful(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            gen, dis = learner.model
            with runstep(learner, self, real=batch) as (_, state):
                state.fake = gen(torch.randn(len(state.real), 4))
                with learner.optimizing("D") as block:
                    block.loss = critic_loss(dis, state.real, state.fake.detach())
                state.fake = gen(torch.randn(len(state.real), 4))
                with learner.optimizing("G") as block:
                    block.loss = generator_loss(dis, state.fake)

    forgetful, careful = gan_learner(), gan_learner()
    forgetful.fit(EPOCHS, phases=[Forgetful()])
    careful.fit(EPOCHS, phases=[Careful()])
    assert_same_bits(forgetful, careful)


# Two optimizers over one model, each with a loss of its own


class TwoRates(PerOptimizerPhase):
    def loss(self, learner: Learner, state: Any, name: str | None) -> Tensor:
        loss = cross_entropy(state.preds, state.ys)
        return loss + learner.model[0].weight.abs().sum() if name == "0" else loss


def test_two_optimizers_over_one_model_equal_the_hand_written_loop_without_a_leak() -> None:
    by_hand = made(plain)
    optimizers = {
        "0": torch.optim.SGD(by_hand[0].parameters(), 0.1),
        "2": torch.optim.SGD(by_hand[2].parameters(), 0.01),
    }
    for epoch in range(EPOCHS):
        start_epoch(epoch)
        for xs, ys in tensor_batches():
            for name, optimizer in optimizers.items():
                by_hand.zero_grad()
                loss = cross_entropy(by_hand(xs), ys)
                if name == "0":
                    loss = loss + by_hand[0].weight.abs().sum()
                loss.backward()
                optimizer.step()

    given = {"0": partial(torch.optim.SGD, lr=0.1), "2": partial(torch.optim.SGD, lr=0.01)}
    learner = learner_of(made(plain), tensor_batches(), given, callbacks=[Recorder()])
    learner.fit(EPOCHS, phases=[TwoRates()])
    assert_equal(learner.model, by_hand)
    assert_changed(learner.model, made(plain))
    assert learner.history[TwoRates].updates == {"0": EPOCHS * STEPS, "2": EPOCHS * STEPS}
