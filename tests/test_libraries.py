"""The libraries of docs/libraries.md that are installed: each trains, and goes on to the bit where it is killed."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fluxloop import Checkpointer, Learner, ObjectivePhase
from fluxloop.testing import assert_observer, assert_resumes_exactly

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "compare" / "libraries.py"
PAGE = (ROOT / "docs" / "libraries.md").read_text()


def load() -> Any:
    spec = importlib.util.spec_from_file_location("libraries", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


libraries = load()
SMALL = ["hydra", "schedulefree", "tensordict", "webdataset", "torchmetrics", "torchdata", "muon"]
"""Those of the tested set; the others are run by the script, as they take long to install or to import."""


def test_the_code_of_the_page_is_the_code_that_runs() -> None:
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    source = SCRIPT.read_text()
    assert all(block in source for block in blocks)
    shown = [re.findall(r"^def (\w+)", block)[0] for block in blocks]
    assert sorted(shown) == sorted(each.__name__ for each in libraries.EACH)


@pytest.mark.filterwarnings("ignore")  # of the libraries, and of data that cannot be resumed in the middle of an epoch
@pytest.mark.parametrize("name", SMALL)
def test_a_library_trains_and_a_killed_run_goes_on_to_the_bit(name: str) -> None:
    if name != "muon":
        pytest.importorskip(name)
    library = getattr(libraries, name)
    learner, phases = libraries.made(library)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    learner.fit(1, phases=phases)
    assert any(not each.equal(now) for each, now in zip(before, learner.model.parameters(), strict=True))
    assert_resumes_exactly(
        lambda: libraries.made(library)[0], epochs=2, phases=lambda: libraries.made(library)[1], at=[1, 2]
    )
    assert libraries.can_be_kept_in_the_middle(library) is (name != "webdataset")


@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_module_that_writes_into_its_batch_does_so_in_a_compiled_step_too() -> None:
    tensordict = pytest.importorskip("tensordict")
    from tensordict.nn import TensorDictModule

    class Rows(ObjectivePhase):
        def entries(self, batch: Any) -> dict[str, Any]:
            return {"batch": batch}

        def loss(self, learner: Any, state: Any) -> Tensor:
            loss: Tensor = learner.model(state.batch)["out"].square().mean()
            return loss

    after: list[Any] = []
    for compiled in (False, "step"):
        torch.manual_seed(0)
        rows = tensordict.TensorDict({"xs": torch.randn(64, 4), "in": {"ys": torch.arange(64)}}, batch_size=[64])
        model = TensorDictModule(nn.Linear(4, 2), ["xs"], ["out"])
        loader = DataLoader(rows, batch_size=16, collate_fn=lambda batch: batch)
        learner = Learner(model, data=(loader,), **libraries.quiet(compile=compiled))
        learner.fit(2, phases=[Rows()])
        after.append((learner.step.batch, model))
    (eager, first), (compiled_batch, second) = after
    assert compiled_batch.batch_size == eager.batch_size == (16,)
    torch.testing.assert_close(compiled_batch["out"], eager["out"])
    torch.testing.assert_close(second.state_dict(), first.state_dict())


@pytest.mark.filterwarnings("ignore")  # of the library
def test_a_model_of_transformers_that_writes_after_each_epoch_trains_as_one_that_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    learner, phases = libraries.made(libraries.generation)
    (write,) = (each for each in learner.callbacks if type(each).__name__ == "Write")
    learner.fit(2, phases=phases)
    first, second = capsys.readouterr().out.splitlines()
    assert first != second
    assert learner.model.training
    assert not learner.model.config.use_cache

    def without() -> Learner[Any]:
        made: Learner[Any] = libraries.made(libraries.generation)[0]
        made.remove_callback(type(next(each for each in made.callbacks if type(each).__name__ == "Write")))
        return made

    assert_observer(write, without, phases=lambda: libraries.made(libraries.generation)[1])


@pytest.mark.filterwarnings("ignore")  # of the library
def test_an_adapter_that_is_saved_after_each_epoch_makes_the_model_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    learner, phases = libraries.made(libraries.peft)
    folder = tmp_path / "run"
    learner.add_callback(Checkpointer(folder))
    learner.fit(2, phases=phases)
    (adapter,) = (Path(cell.cell_contents) for each in learner.callbacks for cell in closure_of(each))
    kept = {each.name: each.stat().st_size for each in (adapter / "adapter").iterdir()}
    assert sum(kept.values()) < max(each.stat().st_size for each in folder.iterdir()) / 4
    base = copy.deepcopy(learner.model).unload()
    again = peft.PeftModel.from_pretrained(base, adapter / "adapter").eval()
    ids = torch.randint(2, 32, (2, 12))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, learner.model.eval()(ids).logits)


def closure_of(callback: Any) -> tuple[Any, ...]:
    return getattr(getattr(callback, "f", None), "__closure__", None) or ()
