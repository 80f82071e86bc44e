from __future__ import annotations

import math
import sys
from typing import Any

import pandas
import pytest
import torch
from matplotlib.figure import Figure

from fluxloop import (
    EMA,
    AveragedValidationPhase,
    CancelFittingException,
    Counts,
    CustomCallback,
    EpochEnd,
    History,
    Metric,
    MetricError,
    Metrics,
    PhaseError,
    Recorder,
    StepEnd,
    TrainingPhase,
    ValidationPhase,
    mae,
)
from fluxloop.history import mean_and_std
from fluxloop.state import SharedState
from fluxloop.testing import toy_learner
from read_pages import read_page


def recorded(epochs: int = 3, *metrics: Any) -> Any:
    learner = toy_learner(Recorder(), Metrics(*metrics))
    learner.fit(epochs)
    return learner.history


def test_counts_are_kept_per_phase_and_found_by_class_or_instance() -> None:
    history = recorded(3)
    assert history[TrainingPhase] == Counts(epochs=3, steps=48, steps_epoch=16, updates={None: 48})
    assert history[ValidationPhase] == Counts(epochs=3, steps=48, steps_epoch=16, updates={})
    assert history[TrainingPhase()] is history[TrainingPhase]


def test_a_phase_that_has_not_run_has_counts_of_zero() -> None:
    assert toy_learner(Recorder()).history[TrainingPhase] == Counts()
    assert toy_learner().history[ValidationPhase] == Counts()


def test_fit_returns_the_history_and_it_is_in_cbstate_too() -> None:
    learner = toy_learner(Recorder(), Metrics())
    assert learner.fit(1) is learner.history
    assert learner.cbstate.history[TrainingPhase] is learner.history[TrainingPhase]
    assert [value for _, value in learner.cbstate.metrics[TrainingPhase].epochs["loss"]] == learner.history[
        "training/loss"
    ]


def test_metrics_are_found_by_data_key_and_name() -> None:
    history = recorded(3, mae)
    for monitor in ("training/loss", "validation/loss", "training/mae", "validation/mae"):
        values = history[monitor]
        assert len(values) == 3
        assert all(isinstance(value, float) for value in values)
    assert history["validation/loss"] == history.metrics[ValidationPhase]["loss"]
    assert history["validation/loss"] != history["training/loss"]
    assert list(history.metrics) == [TrainingPhase, ValidationPhase]


def test_an_unknown_monitor_says_what_there_is_and_what_was_probably_meant() -> None:
    history = recorded(1)
    with pytest.raises(
        MetricError,
        match=r"no metric 'validaton/loss' was recorded; there are \['training/loss', 'validation/loss'\]"
        r"; did you mean 'validation/loss'\?",
    ):
        history["validaton/loss"]
    with pytest.raises(MetricError, match=r"no metric 'training/loss' was recorded; there are \[\]"):
        toy_learner().history["training/loss"]


def test_a_key_that_is_no_phase_is_refused() -> None:
    with pytest.raises(PhaseError, match=r"3 was used as a key; expected a phase or its class, e\.g\."):
        recorded(1)[3]


def test_rows_hold_every_value_with_phase_metric_and_epoch() -> None:
    history = recorded(2)
    rows = history.rows()
    assert [(row["phase"], row["metric"], row["epoch"]) for row in rows] == [
        ("TrainingPhase", "loss", 1),
        ("TrainingPhase", "loss", 2),
        ("ValidationPhase", "loss", 1),
        ("ValidationPhase", "loss", 2),
    ]
    assert [row["value"] for row in rows] == history["training/loss"] + history["validation/loss"]
    assert toy_learner().history.rows() == []


def test_fits_add_up() -> None:
    learner = toy_learner(Recorder(), Metrics())
    learner.fit(2)
    learner.fit(1)
    assert learner.history.cycles == 3
    assert learner.history[TrainingPhase].epochs == 3
    assert [row["epoch"] for row in learner.history.rows()[:3]] == [1, 2, 3]


def test_the_reason_of_a_stop_is_kept_until_the_next_fit() -> None:
    def stop(learner: Any) -> None:
        if len(stops) < 1:
            stops.append(1)
            raise CancelFittingException("low loss reached")

    stops: list[int] = []
    learner = toy_learner(CustomCallback(stop, EpochEnd))
    assert learner.history.stop_reason is None
    assert learner.fit(3).stop_reason == "low loss reached"
    assert "stopped: low loss reached" in repr(learner.history)
    assert learner.fit(1).stop_reason is None


def test_cancelled_cycles_are_not_counted() -> None:
    def stop(learner: Any) -> None:
        raise CancelFittingException("enough")

    learner = toy_learner(CustomCallback(stop, StepEnd, ValidationPhase))
    assert learner.fit(3).cycles == 0


def test_repr_tells_counts_newest_values_and_seed() -> None:
    text = repr(recorded(2))
    assert "TrainingPhase: 2 epochs, 32 steps" in text
    assert "ValidationPhase: 2 epochs, 32 steps" in text
    assert "training/loss: " in text
    assert "seed 0" in text


# Tables and figures


class FakePandas:
    @staticmethod
    def DataFrame(rows: list[dict[str, Any]], columns: list[str]) -> tuple[Any, Any]:  # noqa: N802 - pandas' name
        return rows, columns


def test_to_frame_gives_pandas_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    history = recorded(2)
    monkeypatch.setitem(sys.modules, "pandas", FakePandas)  # once torch._dynamo, which looks for it, is imported
    rows, columns = history.to_frame()
    assert rows == history.rows()
    assert columns == ["phase", "metric", "epoch", "value"]


def test_a_real_data_frame_has_a_row_per_value_and_turns_into_a_table_of_epochs() -> None:
    history = recorded(3, mae)
    frame = history.to_frame()
    assert list(frame.columns) == ["phase", "metric", "epoch", "value"]
    assert len(frame) == len(history.rows()) == 12
    assert frame["epoch"].dtype == "int64"
    assert frame["value"].dtype == "float64"
    table = frame.pivot_table(index="epoch", columns=["phase", "metric"], values="value")
    assert list(table["ValidationPhase", "mae"]) == history["validation/mae"]
    assert isinstance(toy_learner().history.to_frame(), pandas.DataFrame)
    assert list(toy_learner().history.to_frame().columns) == ["phase", "metric", "epoch", "value"]


def test_values_of_an_averaged_copy_stand_beside_the_others() -> None:
    learner = toy_learner(Recorder(), Metrics(), EMA("model", 0.5))
    history = learner.fit(2, phases=[TrainingPhase(), ValidationPhase(), AveragedValidationPhase()])
    assert {row["metric"] for row in history.rows()} == {"loss", "loss@ema"}
    (panel,) = history.plot().axes
    assert panel.get_title() == "loss"
    assert [line.get_label() for line in panel.get_lines()] == [
        "TrainingPhase loss",
        "ValidationPhase loss",
        "AveragedValidationPhase loss@ema",
    ]
    assert "validation/loss@ema: " in repr(history)


def test_a_copy_of_the_rows_can_be_changed_without_changing_the_history() -> None:
    history = recorded(1)
    rows = history.rows()
    rows[0]["value"] = -1.0
    rows.clear()
    history["training/loss"].append(3.0)
    assert len(history["training/loss"]) == 1
    assert history.rows()[0]["value"] > 0


def test_a_metric_that_is_not_a_number_is_drawn_as_a_gap() -> None:
    values = iter([1.0, float("nan"), 3.0] * 2)
    history = recorded(3, Metric(_Next(values), name="odd", phase=TrainingPhase))
    (line,) = next(axes for axes in history.plot().axes if axes.get_title() == "odd").get_lines()
    assert len(line.get_ydata()) == 3
    assert line.get_ydata()[1] != line.get_ydata()[1]


class _Next:
    """Gives a value for each epoch."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __deepcopy__(self, memo: Any) -> _Next:
        return self

    def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None: ...

    def compute(self) -> float:
        return float(next(self.values))

    def reset(self) -> None: ...


def test_without_pandas_to_frame_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"history\.to_frame\(\) needs pandas: pip install pandas"):
        recorded(1).to_frame()


def test_plot_draws_a_panel_per_metric_and_a_line_per_phase() -> None:
    history = recorded(3, mae, Metric(lambda preds, ys: preds.mean(), name="level", phase=TrainingPhase))
    figure = history.plot()
    assert isinstance(figure, Figure)
    lines = {
        axes.get_title(): {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        for axes in figure.axes
    }
    assert lines == {
        "loss": {"TrainingPhase": history["training/loss"], "ValidationPhase": history["validation/loss"]},
        "mae": {"TrainingPhase": history["training/mae"], "ValidationPhase": history["validation/mae"]},
        "level": {"TrainingPhase": history["training/level"]},
    }
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [1, 2, 3]


def test_plot_can_be_saved(tmp_path: Any) -> None:
    path = tmp_path / "history.png"
    recorded(2).plot().savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_leaves_out_values_that_are_no_numbers() -> None:
    class Confusion:
        def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None: ...

        def compute(self) -> torch.Tensor:
            return torch.zeros(2, 2)

        def reset(self) -> None: ...

    with pytest.warns(UserWarning, match="the metrics 'confusion' .* are kept in the history"):
        history = recorded(1, Metric(Confusion(), name="confusion"))
    assert history["training/confusion"][0].shape == (2, 2)
    assert [axes.get_title() for axes in history.plot().axes] == ["loss"]


def test_without_matplotlib_plot_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'torch-fluxloop\[plot\]'"):
        recorded(1).plot()


def test_plot_without_anything_recorded_says_what_is_missing() -> None:
    learner = toy_learner(Recorder())
    learner.fit(1)
    with pytest.raises(MetricError, match="no metric was recorded; fit with the Metrics callback"):
        learner.history.plot()


def test_one_name_in_two_phases_is_one_panel() -> None:
    figure = recorded(1, Metric(mae, name="hits")).plot()
    assert [axes.get_title() for axes in figure.axes] == ["loss", "hits"]


class Shifted(ValidationPhase):
    def step(self, learner: Any, batch: Any) -> Any:
        return super().step(learner, (batch[0], batch[1] + 5))


class Pretext(TrainingPhase):
    pass


def test_two_phases_on_one_data_have_series_of_their_own_and_the_plain_name_lists_them() -> None:
    learner = toy_learner(Recorder(), Metrics())
    history = learner.fit(3, phases=[TrainingPhase(), ValidationPhase(), Shifted()])
    assert history["Shifted/loss"] == history.metrics[Shifted]["loss"]
    assert history["ValidationPhase/loss"] == history.metrics[ValidationPhase]["loss"]
    assert history["Shifted/loss"] != history["ValidationPhase/loss"]
    assert history["TrainingPhase/loss"] == history["training/loss"]
    with pytest.raises(MetricError, match=r"by 2 phases on the validation data; expected the name of one of them: "):
        history["validation/loss"]
    with pytest.raises(MetricError, match=r"'ValidationPhase/loss' or 'Shifted/loss'"):
        history["validation/loss"]


def test_a_metric_that_one_of_two_phases_records_is_found_by_the_data() -> None:
    only = Metric(mae, name="only", phase=Shifted)
    history = toy_learner(Recorder(), Metrics(only)).fit(2, phases=[TrainingPhase(), ValidationPhase(), Shifted()])
    assert history["validation/only"] == history["Shifted/only"]
    assert "validation/only" in repr(history)
    assert "Shifted/loss" in repr(history)


def test_two_training_phases_are_told_apart() -> None:
    history = toy_learner(Recorder(), Metrics()).fit(2, phases=[Pretext(), TrainingPhase()])
    assert len(history["Pretext/loss"]) == len(history["TrainingPhase/loss"]) == 2
    with pytest.raises(MetricError, match="'Pretext/loss' or 'TrainingPhase/loss'"):
        history["training/loss"]


def test_two_phases_of_one_class_are_told_apart_by_name() -> None:
    far, near = Shifted(name="far"), Shifted(name="near")
    history = toy_learner(Recorder(), Metrics()).fit(2, phases=[TrainingPhase(), far, near])
    assert [row["phase"] for row in history.rows()] == ["TrainingPhase"] * 2 + ["far"] * 2 + ["near"] * 2
    assert history["far/loss"] == history["near/loss"] == history.metrics[far]["loss"]
    assert history[far].epochs == history["near"].epochs == 2
    assert [str(phase.__name__) for phase in history.metrics] == ["TrainingPhase", "far", "near"]
    with pytest.raises(PhaseError, match=r"phases of it called \['far', 'near'\]; expected one of those phases"):
        history[Shifted]


def test_a_class_whose_only_phase_has_a_name_finds_it() -> None:
    history = toy_learner(Recorder(), Metrics()).fit(2, phases=[TrainingPhase(), Shifted(name="far")])
    assert history[Shifted] is history["far"]
    assert history["validation/loss"] == history["far/loss"]


def test_the_epochs_of_a_plot_are_whole_numbers() -> None:
    axes = recorded(2).plot().axes[0]
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_a_notebook_shows_a_row_for_each_metric_with_its_last_lowest_and_highest_value() -> None:
    history = recorded(2)
    first, last = history["training/loss"]
    found = read_page(history._repr_html_())
    assert "TrainingPhase: 2 epochs, 32 steps; ValidationPhase: 2 epochs, 32 steps; seed 0" in found.words
    assert [row[:2] for row in found.rows[1:]] == [["TrainingPhase", "loss"], ["ValidationPhase", "loss"]]
    assert found.rows[1][2:] == ["", f"{last:.4g}", f"{last:.4g} in 2", f"{first:.4g} in 1"]
    assert found.count("polyline") == 2


def test_a_notebook_shows_where_values_are_missing_or_not_finite() -> None:
    values = iter([4.0, float("nan"), 2.0, 3.0])
    odd = Metric(lambda preds, ys: torch.tensor(next(values)), name="odd", phase=ValidationPhase)
    learner = toy_learner(Recorder(), Metrics(odd), num_batches=1)
    learner.fit(6, phases=[TrainingPhase(), ValidationPhase(every=2)])
    learner.fit(1)
    row = next(row for row in read_page(learner.history._repr_html_()).rows if row[1] == "odd")
    assert row == ["ValidationPhase", "odd", "", "3", "2 in 6", "4 in 2"]


def test_a_notebook_shows_a_metric_that_was_never_finite_and_why_a_fit_stopped() -> None:
    learner = toy_learner(Recorder(), Metrics(Metric(lambda preds, ys: torch.tensor(torch.nan), name="gone")))

    def stop(*_: object) -> None:
        raise CancelFittingException("a < b")

    learner.add_callback(CustomCallback(stop, EpochEnd, ValidationPhase))
    found = read_page(learner.fit(3)._repr_html_())
    assert ["TrainingPhase", "gone", "", "nan", "-", "-"] in found.rows
    assert found.words[0].endswith("; stopped: a < b; seed 0")


def test_a_notebook_shows_the_numbers_of_a_vector_each_by_itself() -> None:
    class Vector:
        update = reset = lambda self, *given: None

        def compute(self) -> torch.Tensor:
            return torch.tensor([0.25, 0.75])

    history = recorded(2, Metric(Vector(), name="classes", phase=TrainingPhase))
    found = {row[1]: row[3] for row in read_page(history._repr_html_()).rows}
    assert (found["classes/0"], found["classes/1"]) == ("0.25", "0.75")


def test_a_notebook_shows_a_history_without_a_fit_or_without_metrics() -> None:
    assert read_page(toy_learner().history._repr_html_()).words == ["seed 0"]
    learner = toy_learner(Recorder())
    found = read_page(learner.fit(1)._repr_html_())
    assert (found.rows, found.words) == (
        [],
        ["TrainingPhase: 1 epoch, 16 steps; ValidationPhase: 1 epoch, 16 steps; seed 0"],
    )


def titles_and_labels(figure: Figure) -> dict[str, list[str]]:
    return {axes.get_title(): [str(line.get_label()) for line in axes.get_lines()] for axes in figure.axes}


def test_losses_share_a_panel_and_so_do_the_parts_of_a_metric() -> None:
    class Extremes:
        def update(self, preds: torch.Tensor, ys: torch.Tensor) -> None: ...

        def compute(self) -> torch.Tensor:
            return torch.tensor([0.0, 1.0])

        def reset(self) -> None: ...

    shapes = Metric(Extremes(), name="range", phase=TrainingPhase)
    other = Metric(lambda preds, ys: preds.mean(), name="loss_d", phase=TrainingPhase)
    assert titles_and_labels(recorded(1, shapes, other, mae).plot()) == {
        "loss": ["TrainingPhase loss", "TrainingPhase loss_d", "ValidationPhase loss"],
        "range": ["TrainingPhase range/0", "TrainingPhase range/1"],
        "mae": ["TrainingPhase", "ValidationPhase"],
    }


def test_panels_stand_three_beside_each_other_and_none_is_empty() -> None:
    metrics = [Metric(mae, name=f"m{index}") for index in range(4)]
    figure = recorded(1, *metrics).plot()
    assert len(figure.axes) == 5
    assert figure.get_size_inches().tolist() == [15, 7]


# Runs beside each other


def seeded(count: int) -> list[History]:
    return [toy_learner(Recorder(), Metrics(), seed=seed).fit(2) for seed in range(count)]


def test_compare_gives_the_mean_and_the_sample_standard_deviation_of_each_epoch() -> None:
    several, alone = seeded(3), seeded(1)[0]
    rows = History.compare({"three": several, "one": alone}).rows()
    values = torch.tensor([history["validation/loss"][1] for history in several], dtype=torch.float64)
    by_key = {(row["run"], row["phase"], row["metric"], row["epoch"]): row for row in rows}
    found = by_key["three", "ValidationPhase", "loss", 2]
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["std"] == pytest.approx(values.std().item())
    assert found["runs"] == 3
    assert by_key["one", "ValidationPhase", "loss", 2]["mean"] == alone["validation/loss"][1]
    assert math.isnan(by_key["one", "ValidationPhase", "loss", 2]["std"])


def test_compare_draws_a_line_for_each_group_and_a_band_where_there_are_several_runs() -> None:
    figure = History.compare({"three": seeded(3), "one": seeded(1)}).plot()
    assert titles_and_labels(figure) == {
        "TrainingPhase loss": ["three", "one"],
        "ValidationPhase loss": ["three", "one"],
    }
    assert [len(axes.collections) for axes in figure.axes] == [1, 1]
    figure = History.compare({"one": seeded(1)}).plot()
    assert [len(axes.collections) for axes in figure.axes] == [0, 0]


def test_compare_prints_the_last_epoch_that_most_runs_have() -> None:
    longer = toy_learner(Recorder(), Metrics(), seed=0).fit(3)
    text = str(History.compare({"toy": [*seeded(2), longer], "one": longer_alone()})).splitlines()
    assert [line.split("  ")[0] for line in text] == ["TrainingPhase/loss"] * 2 + ["ValidationPhase/loss"] * 2
    assert " ± " in text[0]
    assert text[0].endswith("3 runs, epoch 2")
    assert " ± " not in text[1]
    assert text[1].endswith("1 run, epoch 3")


def longer_alone() -> History:
    return toy_learner(Recorder(), Metrics(), seed=7).fit(3)


def test_where_fewer_runs_of_a_group_have_a_value_its_line_is_dotted() -> None:
    axes = History.compare({"toy": [*seeded(2), longer_alone()]}).plot().axes[0]
    whole, dotted = axes.get_lines()
    values = [float(value) for value in whole.get_ydata()]  # type: ignore[arg-type, union-attr]
    assert [math.isnan(value) for value in values] == [False, False, True]
    assert dotted.get_linestyle() == ":"
    assert len(dotted.get_ydata()) == 3  # type: ignore[arg-type]
    assert axes.get_legend_handles_labels()[1] == ["toy"]


def test_what_only_some_runs_have_recorded_is_compared_among_those() -> None:
    with_mae = toy_learner(Recorder(), Metrics(mae), seed=0).fit(1)
    training_alone = toy_learner(Recorder(), Metrics(), seed=1).fit(1, phases=[TrainingPhase()])
    rows = History.compare({"toy": [with_mae, training_alone], "never": toy_learner().history}).rows()
    assert {(row["phase"], row["metric"]): row["runs"] for row in rows} == {
        ("TrainingPhase", "loss"): 2,
        ("TrainingPhase", "mae"): 1,
        ("ValidationPhase", "loss"): 1,
        ("ValidationPhase", "mae"): 1,
    }
    assert {row["run"] for row in rows} == {"toy"}


def test_runs_of_which_nothing_was_recorded_are_compared_to_nothing() -> None:
    comparison = History.compare({"never": toy_learner().history})
    assert comparison.rows() == []
    assert repr(comparison) == "nothing was recorded"
    with pytest.raises(MetricError, match="no metric was recorded"):
        comparison.plot()


def test_numbers_that_are_not_finite_or_huge_stand_in_a_comparison() -> None:
    assert all(math.isnan(number) for number in mean_and_std([1.0, math.nan]))
    assert mean_and_std([1e200, -1e200]) == (0.0, math.inf)


def test_pictures_say_what_to_install_where_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    history = seeded(1)[0]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw, name in ((history.plot, "history"), (History.compare({"one": history}).plot, r"History.compare\(...\)")):
        with pytest.raises(
            ImportError, match=rf"{name}.plot\(\) needs matplotlib: pip install 'torch-fluxloop\[plot\]'"
        ):
            draw()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1], TypeError, r"History.compare was given .*; expected histories by name, such as History.compare\(\{"),
        ({"a": [1]}, TypeError, r"History.compare was given .* under 'a'; expected histories by name"),
        ({"a": 1}, TypeError, r"History.compare was given .* under 'a'; expected histories by name"),
        ({"a": []}, MetricError, r"History.compare was given no run under 'a'; expected"),
        ({}, MetricError, r"History.compare was given no run; expected"),
        ({1: [History(SharedState(), 0)], "1": 2}, MetricError, r"two groups that are called '1'; expected"),
    ],
)
def test_compare_says_what_it_expects(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        History.compare(given)


def test_one_history_is_not_compared_with_itself() -> None:
    learner = toy_learner(Recorder(), Metrics())
    with pytest.raises(MetricError, match=r"one history twice, under 'a' and 'b'.* expected a learner for each run"):
        History.compare({"a": learner.fit(1), "b": learner.fit(1)})
