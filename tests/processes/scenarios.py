"""What a step may do with its models and losses, once each: as phases that one process runs, and several alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from fluxloop import AbstractTrainingPhase, Accelerator, Learner, TensorBatches
from fluxloop.losses import r1_penalty

ROWS, JOINED = 96, 16
"""Rows of the data, and of a batch of all processes together."""

Body = Callable[[Any, Any], None]


class Net(nn.Module):
    """A model of two parts, of which the first has an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, xs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(xs)))


class Written(AbstractTrainingPhase):
    """A phase whose body is a function of the learner and the step."""

    def __init__(self, write: Body) -> None:
        self.write = write

    def body(self, learner: Any, handle: Any, state: Any) -> None:
        self.write(learner, state)


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net().double()


def half_frozen() -> nn.Module:
    model = net()
    model.encoder.requires_grad_(False)
    return model


def gan() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    models = {"G": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), "D": nn.Linear(3, 8)}
    models["D"] = nn.Sequential(models["D"], nn.Tanh(), nn.Linear(8, 1))
    return {name: model.double() for name, model in models.items()}


# Bodies: one optimizer


def engine(learner: Any, state: Any) -> None:
    """Gradients by ``loss.backward()``, which nobody else hears of."""
    learner.optimizer.zero_grad()
    mse_loss(learner.model(state.xs), state.ys).backward()
    learner.update()


def backward(learner: Any, state: Any) -> None:
    state.loss = mse_loss(learner.model(state.xs), state.ys)
    learner.backward(state.loss)
    learner.update()


def grad(learner: Any, state: Any) -> None:
    """Gradients by ``torch.autograd.grad``, put into ``grad`` by hand."""
    parameters = [*learner.model.parameters()]
    gradients = torch.autograd.grad(mse_loss(learner.model(state.xs), state.ys), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    learner.update()


def forward_twice(learner: Any, state: Any) -> None:
    first, second = learner.model(state.xs), learner.model(-state.xs)
    learner.backward(mse_loss(first, state.ys) + (first * second).mean())
    learner.update()


def sometimes_not_called(learner: Any, state: Any) -> None:
    """The head is left out in every other step."""
    found = learner.model(state.xs) if learner.history[Written].steps % 2 else learner.model.encoder(state.xs)
    learner.backward(found.square().mean())
    learner.update()


def through_a_part(learner: Any, state: Any) -> None:
    learner.backward(mse_loss(learner.model.encoder(state.xs)[:, :2], state.ys))
    learner.update()


def unfrozen_later(learner: Any, state: Any) -> None:
    learner.model.encoder.requires_grad_(learner.history[Written].steps >= 3)
    backward(learner, state)


def two_losses_of_one_graph(learner: Any, state: Any) -> None:
    hidden = learner.model.encoder(state.xs)
    with learner.optimizing() as block:
        learner.backward(hidden.square().mean(), retain_graph=True)
        block.loss = mse_loss(learner.model.head(torch.tanh(hidden)), state.ys)


def r1_alone(learner: Any, state: Any) -> None:
    with learner.optimizing() as block:
        block.loss = mse_loss(learner.model(state.xs), state.ys) + r1_penalty(learner.model, state.xs)


# Bodies: two optimizers


def critic_step(learner: Any, real: Tensor, fake: Tensor, penalty: float = 0.0) -> None:
    critic = learner.model[1]
    with learner.optimizing("D") as block:
        block.loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
        if penalty:
            block.loss = block.loss + penalty * r1_penalty(critic, real)


def generator_step(learner: Any, fake: Tensor) -> None:
    with learner.optimizing("G") as block:
        block.loss = softplus(-learner.model[1](fake)).mean()


def fake_once(learner: Any, state: Any) -> None:
    fake = learner.model[0](state.ys)
    critic_step(learner, state.xs, fake.detach())
    generator_step(learner, fake)


def undetached_fake(learner: Any, state: Any) -> None:
    """The critic's loss reaches the generator, whose gradients nobody has asked for."""
    critic_step(learner, state.xs, learner.model[0](state.ys))
    generator_step(learner, learner.model[0](state.ys))


def three_critic_steps(learner: Any, state: Any) -> None:
    for shift in range(3):
        critic_step(learner, state.xs, learner.model[0](state.ys + shift).detach())
    generator_step(learner, learner.model[0](state.ys))


def gan_with_r1(learner: Any, state: Any) -> None:
    fake = learner.model[0](state.ys)
    critic_step(learner, state.xs, fake.detach(), penalty=0.5)
    generator_step(learner, fake)


def two_over_one(learner: Any, state: Any) -> None:
    """A block for each part of a model, both computed by all of it."""
    with learner.optimizing("encoder") as block:
        block.loss = mse_loss(learner.model(state.xs), state.ys)
    with learner.optimizing("head") as block:
        block.loss = mse_loss(learner.model(-state.xs), state.ys)


def both_at_once(learner: Any, state: Any) -> None:
    learner.backward(mse_loss(learner.model(state.xs), state.ys))
    learner.update()


ADAM = partial(torch.optim.Adam, lr=0.01)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def of_parts(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {"encoder": ADAM(model.encoder.parameters()), "head": SGD(model.head.parameters())}


@define
class Scenario:
    """A training.

    Args:
        body: Of its steps.
        models: Makes the models.
        optimizer: Makes the optimizers.
        columns: How many columns ``ys`` has.
        accumulate: How many batches make an update.
    """

    body: Body
    models: Callable[[], Any] = net
    optimizer: Any = ADAM
    columns: int = 2
    accumulate: int = 1

    def train(self, batch_size: int = JOINED, **accelerator: Any) -> Learner:
        """Train two epochs with batches of so many rows."""
        generator = torch.Generator().manual_seed(0)
        xs = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
        ys = torch.randn(ROWS, self.columns, generator=generator, dtype=torch.float64)
        models = self.models()
        optimizer = self.optimizer(models) if self.optimizer is of_parts else self.optimizer
        learner = Learner(
            models,
            data=(TensorBatches(xs, ys, batch_size=batch_size, shuffle=True),),
            optimizer=optimizer,
            seed=4,
            default_callbacks=False,
            accelerator=Accelerator("cpu", accumulate=self.accumulate, **accelerator),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* got no gradient in a whole epoch")  # of a part that is not called
            learner.fit(2, phases=[Written(self.body)])
        return learner


SCENARIOS = {
    "loss.backward()": Scenario(engine),
    "learner.backward": Scenario(backward),
    "autograd.grad": Scenario(grad),
    "forward twice": Scenario(forward_twice),
    "not called in a step": Scenario(sometimes_not_called),
    "through a part": Scenario(through_a_part),
    "unfrozen later": Scenario(unfrozen_later, half_frozen),
    "retain_graph": Scenario(two_losses_of_one_graph),
    "R1": Scenario(r1_alone),
    "accumulate": Scenario(backward, accumulate=4),
    "GAN, fake once": Scenario(fake_once, gan, columns=3),
    "GAN, fake once, accumulate": Scenario(fake_once, gan, columns=3, accumulate=4),
    "undetached fake": Scenario(undetached_fake, gan, columns=3),
    "3 critic steps": Scenario(three_critic_steps, gan, columns=3),
    "GAN with R1": Scenario(gan_with_r1, gan, columns=3),
    "two optimizers, a block each": Scenario(two_over_one, optimizer=of_parts),
    "two optimizers, one loss": Scenario(both_at_once, optimizer=of_parts),
}


def weights(learner: Learner) -> list[Tensor]:
    """Return the weights of all models, and what the optimizers hold of them."""
    parameters = [p for model in learner.modules() for p in model.parameters()]
    return [parameter.detach().clone() for parameter in parameters]
