"""Parts of a model that compute their activations again: the same numbers to the bit, and less kept meanwhile."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fluxloop import (
    Accelerator,
    ActivationStats,
    Learner,
    LossError,
    ModelError,
    Phase,
    Recorder,
    TensorBatches,
    TrainingPhase,
    Unfreeze,
    recompute_activations,
    runstep,
)
from fluxloop.compute.recompute import is_recomputing, recomputed_parts
from fluxloop.testing import assert_resumes_exactly
from tests.small_models import Pair

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


class Block(nn.Module):
    """A block with all that a second forward could do wrong: statistics of two kinds, dropout, other generators."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.average = nn.BatchNorm1d(width, momentum=None)
        self.drop = nn.Dropout(0.4)
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))
        self.calls = 0
        self.scale = 0.0

    def forward(self, xs: Tensor, shift: float = 0.0) -> Tensor:
        self.calls += 1
        self.scale = 0.5 * self.scale + 0.1 * random.random() + 0.1 * float(numpy.random.rand())
        hidden = self.drop(torch.tanh(self.norm(self.first(xs))) + shift)
        return xs + self.scale * self.last(self.average(hidden).relu()) * (1 + self.calls % 2)


class Net(nn.Module):
    """A stack of blocks between two layers."""

    def __init__(self, width: int = 8, block: Callable[[int], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.stem(xs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def batches(rows: int = 24) -> TensorBatches:
    torch.manual_seed(1)
    return TensorBatches(torch.randn(rows, 4), torch.randn(rows, 1), batch_size=6)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Raise where two models differ in a bit of a parameter, a buffer, or a number in an attribute."""
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other), name
    for one, other in zip(a.modules(), b.modules(), strict=True):
        plain = [{n: v for n, v in vars(m).items() if isinstance(v, (int, float))} for m in (one, other)]
        assert plain[0] == plain[1]


def trained(model: Any, phase: Phase | None = None, epochs: int = 2, **options: Any) -> Learner:
    options = {"data": (batches(),), "optimizer": SGD, "seed": 3, "accelerator": Accelerator("cpu"), **options}
    learner = Learner(model, mse_loss, default_callbacks=False, **options)
    learner.fit(epochs, phases=[phase or TrainingPhase()])
    return learner


@pytest.mark.parametrize("pattern", ["blocks.*", "blocks.1", "blocks.*.first"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_training_is_the_same_to_the_bit(pattern: str, optimizer: Any) -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), pattern)
    trained(plain, optimizer=optimizer)
    trained(again, optimizer=optimizer)
    assert plain.blocks[0].calls == 8
    assert int(plain.blocks[0].norm.num_batches_tracked) == 8
    assert_same(plain, again)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 3}, {"precision": "bf16", "accumulate": 2}]
)
def test_in_other_precisions_and_windows_it_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    for net in (plain, again):
        trained(net, accelerator=Accelerator("cpu", **options))
    assert_same(plain, again)


def test_patterns_inside_one_another_compute_again_inside_what_is_computed_again() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 1))
    again = recompute_activations(copy.deepcopy(plain), "1", "1.*")
    assert len(recomputed_parts(again)) == 3
    trained(plain)
    trained(again)
    assert_same(plain, again)


def test_of_what_one_pattern_matches_the_outermost_parts_are_taken() -> None:
    net = recompute_activations(Net(), "blocks.*")
    assert recomputed_parts(net) == list(net.blocks)


class Kept(nn.Module):
    """Remembers, without holding it, what it computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, xs: Tensor) -> Tensor:
        hidden = self.layer(xs).exp()  # exp keeps what it returns
        self.inner = ref(hidden)
        return hidden.sin()


@pytest.mark.parametrize("patterns", [(), ("blocks.*",)])
def test_what_a_part_computes_inside_is_not_kept_for_the_backward_pass(patterns: tuple[str, ...]) -> None:
    net = Net(block=Kept)
    if patterns:
        recompute_activations(net, *patterns)
    loss = net(torch.randn(6, 4)).mean()
    alive = [block.inner() is not None for block in net.blocks]
    assert alive == [not patterns] * 3
    loss.backward()


def test_without_gradients_nothing_is_computed_again_and_nothing_is_copied() -> None:
    net = recompute_activations(Net(), "blocks.*").eval()
    with torch.no_grad():
        net(torch.randn(6, 4))
    assert net.blocks[0].calls == 1


class Penalised(TrainingPhase):
    """A loss with a gradient penalty, so with second derivatives."""

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0].requires_grad_(), ys=batch[1]) as (_, state):
            preds = learner.model(state.xs)
            (slope,) = torch.autograd.grad(preds.sum(), state.xs, create_graph=True)
            state.loss = mse_loss(preds, state.ys) + slope.square().sum(1).mean()
            learner.backward(state.loss)
            learner.update()
        return state


@pytest.mark.parametrize("patterns", [("blocks.*",), ("blocks.0", "blocks.1.*")])
def test_a_gradient_penalty_is_the_same_to_the_bit(patterns: tuple[str, ...]) -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), *patterns)
    trained(plain, Penalised())
    trained(again, Penalised())
    assert_same(plain, again)


def critic() -> nn.Module:
    # Square and without an activation in between: what is kept in place of something else would have its shape
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)), nn.Linear(4, 1))


def test_a_gan_whose_networks_are_frozen_in_turn_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    plain = {"G": nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4)), "D": critic()}
    again = {name: recompute_activations(copy.deepcopy(net), "0") for name, net in plain.items()}
    xs = torch.randn(4, 4)  # as many rows as columns
    for nets in (plain, again):
        trained(nets, Pair(), data=([xs, xs + 1],))
    for name, net in plain.items():
        assert_same(net, again[name])


class TwoOverOne(TrainingPhase):
    """Two blocks over one graph, through which the second one's gradients come after the first one's update."""

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            hidden = learner.model.body(state.xs)
            preds = learner.model.head(hidden)
            with learner.optimizing("head", retain_graph=True) as block:
                block.loss = mse_loss(preds, state.ys)
            with learner.optimizing("body") as block:
                block.loss = hidden.square().mean() if self.own else preds.square().mean()
        return state

    def __init__(self, own: bool) -> None:
        self.own = own


def two() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8)))
    return {"body": body, "head": nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)))}


class BothAtOnce(TrainingPhase):
    """Two backwards over one graph, with one update after both."""

    def step(self, learner: Any, batch: Any) -> Any:
        with runstep(learner, self, xs=batch[0], ys=batch[1]) as (_, state):
            preds = learner.model(state.xs)
            learner.backward(mse_loss(preds, state.ys), retain_graph=True)
            learner.backward(preds.square().mean())
            learner.update()
        return state


def test_two_backwards_over_one_graph_are_the_same_to_the_bit() -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    trained(plain, BothAtOnce())
    trained(again, BothAtOnce())
    assert_same(plain, again)


def test_two_blocks_over_one_graph_are_the_same_to_the_bit() -> None:
    plain, again = two(), two()
    for net in again.values():
        recompute_activations(net, "*")
    trained(plain, TwoOverOne(own=True))
    trained(again, TwoOverOne(own=True))
    for name, net in plain.items():
        assert_same(net, again[name])


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_weights_that_changed_between_a_forward_and_its_backward_are_an_error_and_not_other_gradients(
    optimizer: Any,
) -> None:
    nets = two()
    recompute_activations(nets["head"], "0")
    with pytest.raises(LossError, match=r"'weight' of Linear.* changed between a forward and its backward"):
        trained(nets, TwoOverOne(own=False), optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_is_the_same_inside_what_is_computed_again(dtype: torch.dtype) -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    xs = torch.randn(6, 4)
    for net in (plain, again):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        with torch.autocast("cpu", dtype):
            loss = net(xs).float().square().mean()
            net(xs)  # its casts of the weights are kept for the next forward
        loss.backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert_same(plain, again)


def test_parts_that_are_frozen_and_unfrozen_later_are_the_same_to_the_bit() -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    for net in (plain, again):
        trained(net, epochs=3, callbacks=[Unfreeze({"stem": 2, "blocks.0": 1, "blocks.1.first": 1})])
    assert_same(plain, again)


def test_a_forward_in_another_mode_before_the_backward_changes_nothing() -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    xs = torch.randn(6, 4)
    for net in (plain, again):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        loss = net(xs).square().mean()
        net.eval()(xs)
        loss.backward()
    assert not again.blocks[0].training
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_functional_call_has_the_gradients_of_the_weights_that_it_was_given() -> None:
    net = Net(block=lambda width: nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))
    fast = {name: (p.detach() + 0.1).requires_grad_() for name, p in net.named_parameters()}
    xs = torch.randn(6, 4)
    expected = torch.autograd.grad(torch.func.functional_call(net, fast, xs).mean(), [*fast.values()])
    recompute_activations(net, "blocks.*")
    found = torch.autograd.grad(torch.func.functional_call(net, fast, xs).mean(), [*fast.values()])
    assert all(map(torch.equal, found, expected))
    assert all(parameter is fast[name] or parameter.grad is None for name, parameter in net.named_parameters())


def test_large_buffers_are_copied_where_the_forward_changes_them_alone() -> None:
    class Masked(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(300, 300))
            self.layer = nn.Linear(width, width)

        def forward(self, xs: Tensor) -> Tensor:
            return self.layer(xs).exp() + self.mask[0, 0]

    net = recompute_activations(Net(block=Masked), "blocks.*")
    net(torch.randn(6, 4)).mean().backward()
    loss = net(torch.randn(6, 4)).mean()
    net.blocks[1].mask += 1
    with pytest.raises(LossError, match="'mask' of Masked"):
        loss.backward()


def test_an_input_that_was_changed_in_place_is_an_error_of_torchs() -> None:
    net = recompute_activations(nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))), "0")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        net(torch.randn(6, 4, requires_grad=True) * 1.0).mean().backward()


def test_the_model_stays_what_it_is() -> None:
    plain = Net()
    again = recompute_activations(copy.deepcopy(plain), "blocks.*")
    assert type(again.blocks[0]) is Block
    assert list(again.state_dict()) == list(plain.state_dict())
    assert str(again) == str(plain)
    assert [*dict(again.named_modules())] == [*dict(plain.named_modules())]
    assert again.blocks[0](torch.zeros(6, 8), shift=1.0).shape == (6, 8)
    assert recompute_activations(again, "blocks.*") is again
    assert len(recomputed_parts(again)) == 3


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_again_with_weights_of_its_own(way: str) -> None:
    net = recompute_activations(Net(block=Kept), "blocks.*")
    if way == "deepcopy":
        copied = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert recomputed_parts(copied) == list(copied.blocks)
    copied(torch.randn(6, 4)).mean().backward()
    assert net.blocks[0].layer.weight.grad is None
    assert copied.blocks[0].layer.weight.grad is not None


def test_a_copy_of_a_learner_trains_as_the_learner_does() -> None:
    learner = trained(recompute_activations(Net(), "blocks.*"))
    copied = copy.deepcopy(learner)
    for each in (learner, copied):
        each.fit(1)
    assert copied.model is not learner.model
    assert_same(learner.model, copied.model)


def make_learner() -> Learner:
    torch.manual_seed(0)
    net = recompute_activations(Net(), "blocks.*")
    return Learner(net, mse_loss, data=(batches(),), optimizer=ADAM, seed=3, accelerator=Accelerator("cpu"))


@pytest.mark.slow
def test_a_run_resumes_exactly() -> None:
    assert_resumes_exactly(make_learner, epochs=2, at=[3, 6])


def test_a_checkpoint_of_a_model_that_keeps_everything_is_read_by_one_that_computes_again() -> None:
    plain = trained(Net(), epochs=1)
    again = trained(recompute_activations(Net(), "blocks.*"), epochs=1)
    again.load_state_dict(plain.state_dict())
    for learner in (plain, again):
        learner.fit(1)
    assert_same(plain.model, again.model)


def test_activations_are_recorded_once() -> None:
    found = [
        trained(net, callbacks=[Recorder(), stats], epochs=1).cbstate.activations
        for net, stats in [
            (net, ActivationStats("blocks.*.first", every=1))
            for net in (Net(), recompute_activations(Net(), "blocks.*"))
        ]
    ]
    assert [len(rows) for rows in found[0].values()] == [len(rows) for rows in found[1].values()] == [4] * 3


def test_a_hook_can_ask_whether_a_forward_is_computed_again() -> None:
    net, seen = recompute_activations(Net(), "blocks.*"), []
    for block in net.blocks:
        block.first.register_forward_hook(lambda *_: seen.append(is_recomputing()))
    net(torch.randn(6, 4)).mean().backward()
    assert seen == [False] * 3 + [True] * 3
    assert not is_recomputing()


def test_an_error_in_the_second_forward_leaves_the_model_as_it_was() -> None:
    class Failing(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)
            self.calls = 0

        def forward(self, xs: Tensor) -> Tensor:
            if is_recomputing():
                self.calls += 1
                raise ValueError("now")
            return self.layer(xs).exp()

    net = recompute_activations(Net(block=Failing), "blocks.*")
    loss = net(torch.randn(6, 4)).mean()
    net.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="now"):
        loss.backward()
    assert not is_recomputing()
    assert not any(parameter.requires_grad for parameter in net.blocks.parameters())
    assert net.blocks[2].calls == 0


def test_lazy_parts_take_their_shapes_from_the_first_batch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh()), nn.Linear(4, 1))
    recompute_activations(net, "0")
    for _ in range(2):
        net(torch.randn(6, 3)).mean().backward()
    assert int(net[0][1].num_batches_tracked) == 2


def test_a_model_is_still_given_a_batch_by_the_names_of_its_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, xs: Tensor) -> Tensor:
            return self.layer(xs)

    net = recompute_activations(nn.Sequential(Named()), "0")
    learner = Learner(net[0], default_callbacks=False, accelerator=Accelerator("cpu"))
    assert learner.predict([{"xs": torch.zeros(3, 4)}]).shape == (3, 1)


@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        ((), TypeError, "no pattern; expected paths of modules"),
        ((3,), TypeError, "was given 3; expected paths"),
        (("block.*",), ModelError, "matches 'block.*'; there are stem, blocks, head, .*did you mean 'blocks"),
        (("blocks",), ModelError, "'blocks' is a ModuleList, .*'blocks.*'"),
        (("blocks.*", "nothing"), ModelError, "matches 'nothing'"),
    ],
)
def test_patterns_that_mean_nothing_are_refused_and_change_nothing(
    patterns: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    net = Net()
    with pytest.raises(error, match=words):
        recompute_activations(net, *patterns)
    assert recomputed_parts(net) == []


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"was given a list of length 1; expected a torch\.nn\.Module"):
        recompute_activations([nn.ReLU()], "0")  # type: ignore[type-var]  # refused


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler
def test_models_that_torch_compiles_compute_again_as_well_and_move_their_statistics_once() -> None:
    # torch 2.14 draws other numbers for a part that it compiles and computes again: the next test
    dropped = 0.2 if torch.__version__ < "2.14" else 0.0
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropped))
    plain = nn.Sequential(inner, nn.Linear(4, 1))
    again = recompute_activations(copy.deepcopy(plain), "0")
    for net in (plain, again):
        trained(net, epochs=1, accelerator=Accelerator("cpu", compile="model"))
    assert int(again[0][1].num_batches_tracked) == 4
    for (name, one), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch's compiler
def test_a_part_that_torch_compiles_draws_the_same_numbers_when_it_computes_again() -> None:
    torch._dynamo.reset()  # sizes unlike those of earlier tests would be taken as unknown, and torch 2.10 fails then
    torch.manual_seed(0)
    net = torch.compile(recompute_activations(nn.Sequential(nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), nn.ReLU()), "0"))
    for _ in range(3):
        x = torch.rand(8, 16, requires_grad=True)
        y = net(x)
        y.sum().backward()
        assert x.grad is not None
        assert 30 < int((y > 0).sum()) < 98  # of 128
        assert torch.equal(x.grad > 0, y > 0)
