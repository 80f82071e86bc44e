"""Two aspects that know nothing of each other: adversarial updates, and where gradients are averaged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import softplus

from fluxloop import (
    Accelerator,
    AutoencoderPhase,
    GANPhase,
    Learner,
    Phase,
    Recorder,
    TensorBatches,
    TrainingPhase,
    UnsafeCallback,
    UpdateBegin,
    on,
    runstep,
)

WORLD, SEED, STEPS, BATCH, SIZE, NOISE = 2, 3, 6, 8, 5, 4
ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999))

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""Names of the interface over which processes of one machine talk."""

Noise = Callable[[int, torch.device], Tensor]


class Averaging(Accelerator):
    """The one aspect: average the gradients of the parameters whose loss it is over processes."""

    def __init__(self) -> None:
        super().__init__("cpu", strategy="none")  # else gradients are averaged already
        self.averaged: list[tuple[nn.Parameter, ...]] = []

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        super().backward(loss, parameters, **options)
        with_gradient = tuple(parameter for parameter in parameters if parameter.grad is not None)
        for parameter in with_gradient:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        self.averaged.append(with_gradient)


class UsersGAN(TrainingPhase):
    """The other aspect, in a user's own step; it knows of no process."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def step(self, learner: Learner, batch: Any) -> Any:
        gen, dis = learner.model
        with runstep(learner, self, real=batch) as (_, state):
            state.fake = gen(self.noise(len(state.real), state.real.device))
            with learner.optimizing("critic") as block:
                block.loss = softplus(-dis(state.real)).mean() + softplus(dis(state.fake.detach())).mean()
            with learner.optimizing("generator") as block:
                block.loss = softplus(-dis(state.fake)).mean()


class Clip(UnsafeCallback):
    """A third aspect: gradients are complete when an update begins."""

    @on(UpdateBegin)
    def clip(self, event: UpdateBegin, phase: Phase, learner: Learner) -> None:
        nn.utils.clip_grad_norm_(learner.models[event.name].parameters(), 0.05)


def net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def gan() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"generator": net(NOISE, SIZE), "critic": net(SIZE, 1)}


def autoencoder() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"encoder": net(SIZE, 2), "decoder": net(2, SIZE)}


def share_of(noise: Tensor, rank: int, world: int) -> Tensor:
    """Give a process its rows of a batch: all of them where it is alone."""
    return noise.chunk(world)[rank]


def rows(rank: int, world: int) -> TensorBatches:
    """Give a process its rows of each batch."""
    everything = torch.randn(STEPS * BATCH, SIZE, generator=torch.Generator().manual_seed(0)).double()
    own = torch.cat([share_of(batch, rank, world) for batch in everything.split(BATCH)])
    return TensorBatches(own, batch_size=BATCH // world)


def noise_of(rank: int, world: int) -> Noise:
    """Draw the noise of the whole batch, and give a process its rows: all draw from the same stream."""
    return lambda count, device: share_of(torch.randn(world * count, NOISE).double(), rank, world)


def library(noise: Noise) -> Phase:
    return GANPhase(noise=noise, r1=0.5)


def critic_twice(noise: Noise) -> Phase:
    return GANPhase("hinge", noise=noise, critic_steps=2)


def reconstruct(noise: Noise) -> Phase:
    return AutoencoderPhase()


CASES: dict[str, tuple[Callable[[], Any], Callable[[Noise], Phase], list[Any]]] = {
    "GANPhase": (gan, library, []),
    "GANPhase with two critic steps": (gan, critic_twice, []),
    "a user's GAN": (gan, UsersGAN, []),
    "a user's GAN with clipped gradients": (gan, UsersGAN, [Clip]),
    "one loss, two optimizers": (autoencoder, reconstruct, []),
}


def train(case: str, accelerator: Accelerator, rank: int, world: int) -> Learner:
    """Train as process `rank` of `world`: the same phase, unchanged, on a share of each batch."""
    models, make_phase, callbacks = CASES[case]
    learner = Learner(
        models(),
        data=(rows(rank, world),),
        optimizer=ADAM,
        callbacks=[Recorder(), *(callback() for callback in callbacks)],
        default_callbacks=False,
        accelerator=accelerator,
        seed=SEED,
    )
    learner.fit(1, phases=[make_phase(noise_of(rank, world))])
    return learner


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach() for parameter, name in learner.updates.names.items()}


def worker(rank: int, folder: str) -> None:
    """Train every case as one of several processes; write down what came of it."""
    torch.set_num_threads(1)
    if sys.platform in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        found: dict[str, Any] = {}
        for case in CASES:
            accelerator = Averaging()
            learner = train(case, accelerator, rank, WORLD)
            names = learner.updates.names
            averaged = [[names[parameter] for parameter in parameters] for parameters in accelerator.averaged]
            apart = train(case, Accelerator("cpu", strategy="none"), rank, WORLD)
            found[case] = {"weights": weights(learner), "averaged": averaged, "apart": weights(apart)}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    """Train every case in this process, on whole batches."""
    torch.set_num_threads(1)
    return {case: weights(train(case, Accelerator("cpu"), 0, 1)) for case in CASES}


@pytest.fixture(scope="module")
def processes(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train every case in two processes, once for all tests; what `whole` has imported is not imported again."""
    folder = tmp_path_factory.mktemp("processes")
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()  # then autograd cannot be forked
    start = "fork" if sys.platform == "linux" and not accelerated else "spawn"
    mp.start_processes(worker, (str(folder),), nprocs=WORLD, start_method=start)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow(quick=1)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_of_each_batch_train_as_one_with_all_of_it(
    case: str, whole: dict[str, dict[str, Tensor]], processes: list[dict[str, Any]]
) -> None:
    initial = CASES[case][0]()
    for name, expected in whole[case].items():
        found = processes[0][case]["weights"][name]
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11), name
        model, _, rest = name.partition(".")
        change = (expected - initial[model].get_parameter(rest)).abs().max()
        assert change > 1e-3 or name == "critic.2.bias", name  # that one has nearly no gradient in a hinge loss


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end_with_the_same_bits(case: str, processes: list[dict[str, Any]]) -> None:
    first, second = (process[case]["weights"] for process in processes)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_without_the_averaging_the_processes_go_apart(case: str, processes: list[dict[str, Any]]) -> None:
    first, second = (process[case]["apart"] for process in processes)
    assert [name for name in first if "weight" in name and torch.allclose(first[name], second[name], rtol=1e-3)] == []


def named(models: dict[str, nn.Module], name: str) -> list[str]:
    return [f"{name}.{key}" for key, _ in models[name].named_parameters()]


@pytest.mark.parametrize("case", [case for case in CASES if "GAN" in case])
def test_a_generator_step_averages_nothing_of_the_critic_and_a_critic_step_nothing_of_the_generator(
    case: str, processes: list[dict[str, Any]]
) -> None:
    critic, generator = named(gan(), "critic"), named(gan(), "generator")
    turns = [critic, critic, generator] * (STEPS // 2) if "two critic steps" in case else [critic, generator] * STEPS
    for process in processes:
        assert process[case]["averaged"] == turns


def test_one_loss_of_two_optimizers_averages_the_gradients_of_both_at_once(processes: list[dict[str, Any]]) -> None:
    both = [*named(autoencoder(), "encoder"), *named(autoencoder(), "decoder")]
    for process in processes:
        assert process["one loss, two optimizers"]["averaged"] == [both] * STEPS


# What the door is told in one process


class Told(Accelerator):
    """Notes whose loss it is told to differentiate, and what has a gradient then."""

    def __init__(self) -> None:
        super().__init__("cpu", strategy="none")  # else gradients are averaged already
        self.told: list[tuple[nn.Parameter, ...]] = []

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        self.told.append(tuple(parameters))
        super().backward(loss, parameters, **options)


def one_learner(models: Any, accelerator: Accelerator, optimizer: Any = ADAM) -> Learner:
    return Learner(
        models,
        nn.functional.mse_loss,
        optimizer=optimizer,
        accelerator=accelerator,
        default_callbacks=False,
        seed=SEED,
    )


def test_a_single_model_has_all_its_parameters_named_to_the_accelerator() -> None:
    told = Told()
    learner = one_learner(net(SIZE, 1), told)
    learner.epoch(TrainingPhase(), [(torch.zeros(2, SIZE).double(), torch.zeros(2, 1).double())])
    assert told.told == [tuple(learner.model.parameters())]


def test_the_only_optimizer_of_several_models_names_its_own_parameters_in_its_block() -> None:
    told = Told()
    models = gan()
    models["generator"].requires_grad_(False)
    learner = one_learner(models, told)

    class CriticAlone(TrainingPhase):
        def step(self, learner: Learner, batch: Any) -> Any:
            with runstep(learner, self, real=batch) as (_, state), learner.optimizing("critic") as block:
                block.loss = learner.model.critic(state.real).mean()

    learner.epoch(CriticAlone(), [torch.ones(2, SIZE).double()])
    assert told.told == [tuple(learner.model.critic.parameters())]


def test_what_a_block_leaves_frozen_is_not_named_to_the_accelerator() -> None:
    told = Told()
    learner = one_learner(gan(), told)
    learner.model.critic[0].requires_grad_(False)
    noise = noise_of(0, 1)
    learner.epoch(GANPhase(noise=noise), [torch.ones(2, SIZE).double()])
    critic, generator = told.told
    assert critic == tuple(learner.model.critic[2].parameters())
    assert generator == tuple(learner.model.generator.parameters())
