from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fluxloop import Learner, TensorBatches, TrainingPhase
from fluxloop.run.summary import Summary, summary
from fluxloop.testing import assert_same_bits, bits, toy_learner
from read_pages import read_page


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)), nn.Linear(8, 3))


def learner_of(model: Any = None, **options: Any) -> Learner:
    return Learner(
        net() if model is None else model,
        cross_entropy,
        default_callbacks=False,
        seed=4,
        **{"data": (TensorBatches(*rows(), batch_size=8, shuffle=True),), **options},
    )


def test_each_module_has_a_row_with_its_shape_and_numbers() -> None:
    found = summary(learner_of())
    assert [(row.path, row.kind, row.outputs, row.parameters, row.trainable, row.depth) for row in found.rows] == [
        ("model", "Sequential", "(8, 3)", 75, 75, 0),
        ("0", "Linear", "(8, 8)", 32, 32, 1),
        ("1", "Sequential", "(8, 8)", 16, 16, 1),
        ("1.0", "BatchNorm1d", "(8, 8)", 16, 16, 2),
        ("1.1", "Dropout", "(8, 8)", 0, 0, 2),
        ("2", "Linear", "(8, 3)", 27, 27, 1),
    ]
    assert (found.parameters, found.trainable) == (75, 75)
    assert found.megabytes == pytest.approx((75 * 4 + 16 * 4 + 8) / 1e6)
    assert found.note == ""


def test_it_prints_as_a_table() -> None:
    learner = learner_of(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    learner.model[0].requires_grad_(False)
    assert str(summary(learner, depth=1)).splitlines() == [
        "module  class       output  parameters  trainable",
        "model   Sequential  (8, 3)          75         43",
        "  0     Linear      (8, 8)          32          0",
        "  1     Sequential  (8, 8)          16         16",
        "  2     Linear      (8, 3)          27         27",
        "75 parameters: 43 trainable, 32 frozen; 0.000372 MB",
        "optimizer: SGD of 75 parameters in 6 tensors (0.weight, 0.bias, …, 2.bias)",
        "  lr=0.1, momentum=0.9, dampening=0, weight_decay=0",
    ]
    assert repr(summary(learner)) == str(summary(learner))


def test_a_depth_leaves_out_what_is_below_and_changes_no_sum() -> None:
    whole, flat = summary(learner_of()), summary(learner_of(), depth=0)
    assert [row.path for row in flat.rows] == ["model"]
    assert (flat.parameters, flat.megabytes) == (whole.parameters, whole.megabytes)


def test_shared_parameters_are_counted_once() -> None:
    model = net()
    model.append(nn.Linear(3, 3, bias=False))
    model.append(nn.Linear(3, 3, bias=False))
    model[4].weight = model[3].weight
    model.append(model[3])
    found = summary(learner_of(model))
    assert found.parameters == 75 + 9
    assert found.rows[0].parameters == 75 + 9
    assert [row.path for row in found.rows if row.depth == 1] == ["0", "1", "2", "3", "4"]


def test_each_optimizer_tells_its_settings_and_what_it_owns() -> None:
    def split(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest, "lr": 0.2}])

    models = {"G": nn.Linear(2, 3), "D": nn.Linear(3, 1)}
    found = summary(learner_of(models, optimizer={"G": split, "D": partial(torch.optim.AdamW, lr=1e-3)}))
    g, d = found.optimizers
    assert (g.name, g.kind, g.parameters, g.owns) == ("G", "SGD", 9, ("G.weight", "G.bias"))
    assert [setting.split(",")[0] for setting in g.settings] == ["lr=0.0", "lr=0.2"]
    assert (d.kind, d.owns) == ("AdamW", ("D.weight", "D.bias"))
    assert "betas=(0.9, 0.999)" in d.settings[0]
    assert "optimizer 'D': AdamW of 4 parameters in 2 tensors (D.weight, D.bias)" in str(found)


def test_several_models_have_rows_and_no_shapes() -> None:
    found = summary(learner_of({"G": nn.Sequential(nn.Linear(2, 3)), "D": nn.Linear(3, 1)}))
    assert [row.path for row in found.rows] == ["G", "G.0", "D"]
    assert {row.outputs for row in found.rows} == {"?"}
    assert "output shapes are unknown: there are several models, ['G', 'D']" in str(found)


def test_lazy_modules_are_told_and_stay_lazy() -> None:
    learner = learner_of(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(3)))
    found = summary(learner)
    assert [(row.parameters, row.outputs) for row in found.rows] == [(None, "?"), (16, "?"), (None, "?")]
    assert found.parameters == 16
    assert "lazy" in str(found).splitlines()[1]
    assert "some modules are lazy and have seen no batch" in found.note
    assert isinstance(learner.model[1], nn.LazyLinear)
    learner.fit(1, phases=[TrainingPhase()])
    assert summary(learner).rows[2].parameters == 15


def test_nested_outputs_show_every_shape_and_modules_that_did_not_run_show_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True)
            self.unused = nn.Linear(1, 1)

        def forward(self, xs: Tensor) -> Tensor:
            return self.lstm(xs[:, None])[0][:, 0]  # type: ignore[no-any-return]  # a module's

    found = summary(learner_of(Net()))
    assert [row.outputs for row in found.rows] == ["(8, 5)", "(8, 1, 5), (1, 8, 5), (1, 8, 5)", "?"]


def test_a_batch_can_be_given() -> None:
    learner = learner_of(data=())
    assert "no training data that can be iterated again; give a batch: learner.summary(batch)" in summary(learner).note
    assert summary(learner, torch.zeros(5, 3)).rows[0].outputs == "(5, 3)"
    assert summary(learner, (torch.zeros(6, 3), torch.zeros(6))).rows[0].outputs == "(6, 3)"


@pytest.mark.parametrize("make", [lambda: iter([rows()]), lambda: Empty()], ids=["iterator", "empty"])
def test_data_that_gives_no_batch_is_not_used_up(make: Any) -> None:
    source = make()
    learner = learner_of(data=(source,))
    assert summary(learner).note != ""
    assert len(list(source)) == (0 if isinstance(source, Empty) else 1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.layer(pixels) * scale
        return result


def test_of_a_batch_that_is_a_dict_the_model_gets_its_arguments_by_name() -> None:
    xs, ys = rows()
    for data in ({"pixels": xs, "label": ys}, {"pixels": xs}):
        found = summary(learner_of(Named(), data=(data,)))
        assert [row.outputs for row in found.rows] == ["(32, 2)", "(32, 2)"]
        assert not found.note


def test_a_dict_of_other_names_is_told_with_what_to_type() -> None:
    xs, ys = rows()
    batch = {"image": xs, "label": ys}
    learner = learner_of(Named(), data=(batch,))
    found = summary(learner)
    assert {row.outputs for row in found.rows} == {"?"}
    assert "does not run on a dict of length 2 (TypeError:" in found.note
    assert found.note.endswith("give what your phase gives it: learner.summary(batch['image'])")
    assert summary(learner, batch["image"]).rows[0].outputs == "(40, 2)"


class Empty:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_a_model_that_does_not_run_on_the_batch_is_told_with_why_and_leaves_no_hook() -> None:
    learner = learner_of()
    found = summary(learner, torch.zeros(5, 4))
    assert {row.outputs for row in found.rows} == {"?"}
    assert "the model does not run on a Tensor of shape (5, 4) (RuntimeError: mat1 and mat2" in found.note
    assert not any(module._forward_hooks for module in learner.model.modules())
    assert all(module.training for module in learner.model.modules())


class Counting(nn.Module):
    """Counts its calls in eval mode too, in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, xs: Tensor) -> Tensor:
        self.calls: Tensor = self.calls + 1
        return xs + torch.rand(())


@pytest.mark.parametrize("loader", [False, True])
def test_nothing_is_moved_to_the_bit(loader: bool) -> None:
    def make() -> Learner:
        model = nn.Sequential(*net(), Counting())
        own = torch.Generator().manual_seed(7)
        data = DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True, generator=own) if loader else None
        return learner_of(model, **({"data": (data,)} if data is not None else {}))

    plain, looked = make(), make()
    before, generator = bits(looked), torch.get_rng_state()
    summary(looked)
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(looked).items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks for module in looked.model.modules())
    assert vars(looked.step) == {}
    plain.fit(1)
    looked.fit(1)
    summary(looked)
    plain.fit(1)
    looked.fit(1)
    assert_same_bits(plain, looked)


def test_a_notebook_shows_the_modules_as_a_table_and_the_lines_below_it() -> None:
    Linear = type("Linear<T>", (nn.Linear,), {})  # noqa: N806  # a class
    learner = Learner({"G": nn.Sequential(Linear(1, 1)), "D": nn.LazyLinear(2)}, default_callbacks=False)
    found = summary(learner)
    page = read_page(found._repr_html_())
    lines = str(found).splitlines()
    assert [" ".join(row) for row in page.rows] == [" ".join(line.split()) for line in lines[: len(page.rows)]]
    assert "\n".join(lines[len(page.rows) :]) in page.words
    assert page.rows[-1] == ["D", "LazyLinear", "?", "lazy", "lazy"]
    assert [row[:2] for row in page.rows[1:3]] == [["G", "Sequential"], ["G.0", "Linear<T>"]]


def test_a_toy_learner_has_one_too() -> None:
    assert isinstance(summary(toy_learner()), Summary)
    assert summary(toy_learner()).parameters == 1
