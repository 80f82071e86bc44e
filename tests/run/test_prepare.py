"""Loops of a user's own: with `prepare` they train what the same loop trains in plain PyTorch, or on larger batches."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import (
    Accelerator,
    Learner,
    LossError,
    OptimizerError,
    TensorBatches,
    TrainingPhase,
    recompute_activations,
)
from fluxloop.compute.raw import rows_of

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def data(rows: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 3).double(), torch.randn(rows, 1).double()


def loader(rows: int = 24, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(rows)), batch_size=batch_size)


def by_hand(model: nn.Module, optimizer: Any, batches: Any, epochs: int = 2, clip: float | None = None) -> None:
    for _ in range(epochs):
        for xs, ys in batches:
            optimizer.zero_grad()
            mse_loss(model(xs), ys).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Any, epochs: int = 2, clip: float | None = None
) -> None:
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for _ in range(epochs):
        for xs, ys in batches:
            optimizer.zero_grad()
            accelerator.backward(mse_loss(model(xs), ys))
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# One process, fp32: the loop as it is


def test_the_loop_of_luz_vignette_trains_what_the_plain_loop_trains_to_the_bit() -> None:
    accelerator = Accelerator("cpu")
    plain = net()
    by_hand(plain, SGD(plain.parameters()), loader())
    model, optimizer = net(), None
    optimizer = SGD(model.parameters())
    model, optimizer, train, valid = accelerator.prepare(model, optimizer, loader(), loader())
    for _ in range(2):
        model.train()
        for xs, ys in train:
            optimizer.zero_grad()
            accelerator.backward(mse_loss(model(xs), ys))
            optimizer.step()
        model.eval()
        with torch.no_grad():
            losses = [accelerator.gather(mse_loss(model(xs), ys).reshape(1)) for xs, ys in valid]
    assert_same(model, plain)
    assert torch.cat(losses).shape == (6,)


def test_objects_are_returned_in_their_order_and_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator("cpu")
    model, batches = net(), loader()
    optimizer = SGD(model.parameters())
    assert accelerator.prepare(model) is model
    nested = accelerator.prepare(None, [model, None], {"G": optimizer}, (batches, TensorBatches(*data(), batch_size=5)))
    assert nested[0] is None
    assert nested[1][0] is model
    assert nested[2]["G"] is optimizer
    assert "step" not in vars(optimizer)
    first, second = nested[3]
    assert (len(first), len(second)) == (6, 5)
    assert first.batch_size == 4
    assert first.dataset is batches.dataset
    accelerator.print("once")
    assert capsys.readouterr().out == "once\n"
    assert accelerator.is_main


def test_a_list_of_batches_is_a_source_of_them() -> None:
    batches = Accelerator("cpu").prepare([data(4), data(2)])
    assert [len(xs) for xs, _ in batches] == [4, 2]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}])
def test_batches_of_any_form_are_on_the_device(options: dict[str, Any]) -> None:
    given = [{"xs": torch.zeros(2), "names": ["a", "b"]}]
    (batch,) = Accelerator("cpu", **options).prepare(given)
    assert batch["names"] == ["a", "b"]
    assert batch["xs"].device == torch.device("cpu")


# Windows


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("clear", [True, False])
def test_batches_that_make_one_update_are_one_large_batch_also_where_they_are_ragged(
    optimizer: Any, clip: float | None, clear: bool
) -> None:
    # 22 rows in batches of 4: five full ones and one of two rows; in windows of 3 that is 12 and 10 rows
    plain, model = net(), net()
    xs, ys = data(22)
    by_hand(plain, optimizer(plain.parameters()), [(xs[:12], ys[:12]), (xs[12:], ys[12:])], clip=clip)
    steps = optimizer(model.parameters())
    if not clear:
        steps.zero_grad = lambda: None  # a loop that never clears: what was used is taken for one more gradient
        accelerator = Accelerator("cpu", accumulate=3)
        model, steps, batches = accelerator.prepare(model, steps, loader(22))
        for _ in range(2):
            for xs, ys in batches:
                accelerator.backward(mse_loss(model(xs), ys))
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                steps.step()
                if steps.state and not any(slot.count for slot in accelerator._loop.slots):  # type: ignore[union-attr]  # prepared
                    torch.optim.Optimizer.zero_grad(steps)
    else:
        prepared(Accelerator("cpu", accumulate=3), model, steps, loader(22), clip=clip)
    assert_same(model, plain, 1e-12)


def test_a_last_window_that_is_left_open_is_closed_when_its_loader_ends() -> None:
    plain, model = net(), net()
    xs, ys = data(16)
    by_hand(plain, SGD(plain.parameters()), [(xs[:12], ys[:12]), (xs[12:], ys[12:])])
    prepared(Accelerator("cpu", accumulate=3), model, SGD(model.parameters()), loader(16))
    assert_same(model, plain, 1e-12)


def test_a_validation_in_the_middle_of_a_window_does_not_close_it() -> None:
    plain, model = net(), net()
    xs, ys = data(16)
    by_hand(plain, SGD(plain.parameters()), [(xs[:8], ys[:8]), (xs[8:], ys[8:])], epochs=1)
    accelerator = Accelerator("cpu", accumulate=2)
    optimizer = SGD(model.parameters())
    model, optimizer, train, valid = accelerator.prepare(model, optimizer, loader(16), loader(3, batch_size=3))
    for xs, ys in train:
        optimizer.zero_grad()
        accelerator.backward(mse_loss(model(xs), ys))
        optimizer.step()
        for _ in valid:
            pass
    assert_same(model, plain, 1e-12)


def test_two_backwards_of_one_batch_count_once() -> None:
    plain, model = net(), net()
    xs, ys = data(16)
    optimizer = SGD(plain.parameters())
    for part in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()
        out = plain(xs[part])
        (mse_loss(out, ys[part]) + out.square().mean()).backward()
        optimizer.step()
    accelerator, optimizer = Accelerator("cpu", accumulate=2), SGD(model.parameters())
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(16))
    for xs, ys in batches:
        optimizer.zero_grad()
        out = model(xs)
        accelerator.backward(mse_loss(out, ys), retain_graph=True)
        accelerator.backward(out.square().mean())
        optimizer.step()
    assert_same(model, plain, 1e-12)


def gan() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(3, 3).double(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def test_a_gan_in_a_loop_of_ones_own_gets_each_networks_gradients_from_its_own_loss() -> None:
    xs, _ = data(16)
    gen, dis = gan()
    of_gen, of_dis = SGD(gen.parameters()), SGD(dis.parameters())
    for part in (xs[:8], xs[8:]):
        fake = gen(part)
        of_dis.zero_grad()
        (softplus(-dis(part)).mean() + softplus(dis(fake.detach())).mean()).backward()
        of_dis.step()
        of_gen.zero_grad()
        softplus(-dis(fake)).mean().backward()
        of_gen.step()
    # The same with two batches in an update: all gradients of a window are of the weights before it
    other_gen, other_dis = gan()
    accelerator = Accelerator("cpu", accumulate={"G": 1, "D": 1}, precision="fp32")
    nets, steps, batches = accelerator.prepare(
        [other_gen, other_dis],
        {"G": SGD(other_gen.parameters()), "D": SGD(other_dis.parameters())},
        DataLoader(xs, batch_size=8),
    )
    for part in batches:
        fake = nets[0](part)
        steps["D"].zero_grad()
        accelerator.backward(softplus(-nets[1](part)).mean() + softplus(nets[1](fake.detach())).mean())
        steps["D"].step()
        steps["G"].zero_grad()
        accelerator.backward(softplus(-nets[1](fake)).mean())
        steps["G"].step()
    assert_same(other_gen, gen)
    assert_same(other_dis, dis)


def test_gradients_of_another_loss_that_were_cleared_are_in_no_window() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    xs, ys = data(8)
    expected = []
    for part in (slice(0, 4), slice(4, 8)):
        expected.append(torch.autograd.grad(mse_loss(second(first(xs[part])), ys[part]), [*first.parameters()]))
    accelerator = Accelerator("cpu", accumulate=2)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.0)
    first, second, optimizer, batches = accelerator.prepare(first, second, optimizer, loader(8))
    for part, ys in batches:
        accelerator.backward(first(part).square().sum())  # of something else
        optimizer.zero_grad()
        accelerator.backward(mse_loss(second(first(part)), ys))
        optimizer.step()
    for parameter, (one, other) in zip(first.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad, (one + other) / 2)


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_of_torchs_wraps_the_step_before_or_after(before: bool) -> None:
    accelerator, model = Accelerator("cpu", accumulate=2), net()
    optimizer = SGD(model.parameters())
    if not before:
        accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if before:
        accelerator.prepare(model, optimizer)
    for xs, ys in accelerator.prepare(loader(16)):
        optimizer.zero_grad()
        accelerator.backward(mse_loss(model(xs), ys))
        optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# Precision


def test_prepared_models_compute_in_bf16_and_return_float32_to_the_bit_of_autocast() -> None:
    plain, model = net().float(), net().float()
    xs, ys = (each.float() for each in data())
    batches = [(xs[i : i + 4], ys[i : i + 4]) for i in range(0, 24, 4)]
    optimizer = SGD(plain.parameters())
    for a, b in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = plain(a)
        assert out.dtype == torch.bfloat16
        mse_loss(out.float(), b).backward()
        optimizer.step()
    prepared(Accelerator("cpu", precision="bf16"), model, SGD(model.parameters()), batches, epochs=1)
    assert_same(model, plain)
    assert model(xs).dtype == torch.float32


def test_an_update_inside_autocast_is_seen_by_the_next_forward() -> None:
    accelerator = Accelerator("cpu", precision="bf16")
    layer = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer, optimizer = accelerator.prepare(layer, optimizer)
    with accelerator.autocast():
        xs = torch.ones(3, 4)
        first = nn.functional.linear(xs, layer.weight).float().mean()
        accelerator.backward(first)
        optimizer.step()
        second = nn.functional.linear(xs, layer.weight).float().mean()
    assert second.item() == pytest.approx(first.item() - 4, abs=0.05)


def test_sparse_gradients_are_unscaled_and_used_with_fp16_as_with_fp32() -> None:
    def trained(precision: Any) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            table = nn.Embedding(6, 2, sparse=True)
        accelerator = Accelerator("cpu", precision=precision)
        model, optimizer = accelerator.prepare(table, torch.optim.SparseAdam(table.parameters(), lr=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(model(torch.tensor([1, 3, 3])).square().sum())
            optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(trained("fp16"), trained("fp32"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"accumulate": {"A": 2}}, {"optimizer_in_backward": True}], ids=str
)
def test_clipping_in_the_step_of_a_learner_whose_gradients_are_not_complete_there_is_refused(options: Any) -> None:
    class Clips(TrainingPhase):
        def body(self, learner: Any, handle: Any, state: Any) -> None:
            learner.backward(mse_loss(learner.model.A(state.xs), state.ys))
            learner.accelerator.clip_grad_norm_(learner.model.A.parameters(), 1.0)
            learner.update()

    learner = Learner({"A": net()}, data=(data(),), accelerator=Accelerator("cpu", **options), default_callbacks=False)
    with pytest.raises(OptimizerError, match=r"not complete there; expected GradientClip\(max_norm\)"):
        learner.fit(1, phases=[Clips()])


def test_with_fp16_scales_the_loss_unscales_before_clipping_and_leaves_out_what_is_not_finite() -> None:
    accelerator, model = Accelerator("cpu", precision="fp16"), nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    xs, before = torch.ones(4, 3), model.weight.detach().clone()
    accelerator.backward(0.5 * model(xs).mean())
    assert float(model.weight.grad.abs().max()) > 1000  # scaled
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
    assert float(norm) == pytest.approx(0.5 * 3**0.5, rel=1e-3)  # type: ignore[arg-type]  # complete
    optimizer.step()
    assert float((before - model.weight.detach()).norm()) == pytest.approx(0.5, rel=1e-3)
    optimizer.zero_grad()
    scale, before = accelerator._loop.scale.value, model.weight.detach().clone()  # type: ignore[union-attr]  # prepared
    accelerator.backward(model(xs).mean() * float("inf"))
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert accelerator._loop.scale.value == scale / 2  # type: ignore[union-attr]  # as above


def test_activations_that_are_computed_again_are_computed_in_the_precision() -> None:
    plain, again = net().float(), recompute_activations(net().float(), "0")
    batches = [tuple(each.float() for each in data(8))]
    for model in (plain, again):
        prepared(Accelerator("cpu", precision="bf16"), model, SGD(model.parameters()), batches)
    assert_same(plain, again)


def test_a_prepared_model_can_be_copied_saved_and_given_to_a_learner() -> None:
    accelerator = Accelerator("cpu", precision="bf16")
    model = accelerator.prepare(net().float())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other(torch.zeros(2, 3)).dtype == torch.float32
        assert other.forward.module is other
    xs, ys = (each.float() for each in data())
    Learner(model, mse_loss, data=((xs, ys),), accelerator=accelerator, default_callbacks=False).fit(1)


# What is refused


def test_gradients_without_the_accelerator_are_refused_where_they_would_be_others() -> None:
    accelerator, model = Accelerator("cpu", accumulate=2), net()
    xs, ys = data(4)
    with pytest.raises(OptimizerError, match="no optimizer was prepared; expected first"):
        accelerator.backward(mse_loss(model(xs), ys))
    model, optimizer = accelerator.prepare(model, SGD(model.parameters()))
    mse_loss(model(xs), ys).backward()
    with pytest.raises(OptimizerError, match=r"accelerator.backward\(loss\) in place of loss.backward\(\)"):
        optimizer.step()
    with pytest.raises(OptimizerError, match="with a closure"):
        optimizer.step(lambda: None)
    with pytest.raises(LossError, match="scalar"):
        accelerator.backward(model(xs))


def test_a_backward_after_clipping_and_before_the_step_is_refused() -> None:
    accelerator, model = Accelerator("cpu", precision="fp16"), net().float()
    model, _ = accelerator.prepare(model, SGD(model.parameters()))
    xs, ys = (each.float() for each in data(4))
    accelerator.backward(mse_loss(model(xs), ys))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(OptimizerError, match=r"after accelerator\.clip_grad_norm_ and before the step of the SGD"):
        accelerator.backward(mse_loss(model(xs), ys))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "3; expected models, optimizers and loaders"),
        (torch.zeros(3), r"Tensor of shape \(3,\).*as_dataloader"),
        (TensorDataset(torch.zeros(3)), "TensorDataset.*as_dataloader"),
        (nn.Linear, "the class Linear"),
    ],
)
def test_what_cannot_be_prepared_is_refused(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Accelerator("cpu").prepare(given)


def test_names_of_accumulate_are_those_of_a_mapping() -> None:
    optimizer = SGD(net().parameters())
    with pytest.raises(OptimizerError, match=r"an? SGD without a name.*prepare\(\{'G': optimizer\}\)"):
        Accelerator("cpu", accumulate={"G": 2}).prepare(optimizer)
    with pytest.raises(ValueError, match="compile='model'"):
        Accelerator("cpu", compile="step").prepare(optimizer)


def test_an_optimizer_of_a_model_elsewhere_is_refused() -> None:
    model = nn.Linear(2, 1, device="meta")
    with pytest.raises(OptimizerError, match="parameters on meta, and the accelerator is for cpu; give it the model"):
        Accelerator("cpu").prepare(SGD(model.parameters()))


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (torch.zeros(3), 3),
        ((torch.zeros(3), torch.zeros(3, 2)), 3),
        ([torch.zeros(3), torch.zeros(3)], 3),
        ({"xs": torch.zeros(5)}, 5),
        (["a", "b"], 2),
    ],
)
def test_rows_are_those_of_what_belongs_together(batch: Any, rows: int) -> None:
    assert rows_of(batch) == rows
