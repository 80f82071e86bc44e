from __future__ import annotations

import os
from pathlib import Path

import mlflow
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from mlflow.tracking import MlflowClient

from fluxloop.logging import Audio, Figure, File, Histogram, HyperParameters, Image, MLflow, Scalar, Text, log_to


@pytest.fixture(autouse=True)
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "runs").as_uri()


def series(uri: str, run: str | None, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(tracking_uri=uri).get_metric_history(str(run), name)]


def artifacts(uri: str, run: str | None, folder: str | None = None) -> list[str]:
    return [entry.path for entry in MlflowClient(tracking_uri=uri).list_artifacts(str(run), folder)]


def test_what_is_logged_is_read_back_through_its_client(uri: str, tmp_path: Path) -> None:
    backend = MLflow("digits", run_name="first", tracking_uri=uri)
    for step in (1, 2):
        log_to(backend, Scalar(step / 4), "loss@ema", step, ("epoch", "validation"))
    log_to(backend, HyperParameters({"lr": 0.1, "model": {"width": 8}}), "chosen", 0)
    log_to(backend, Image(torch.ones(1, 2, 2)), "grid", 3, "images")
    log_to(backend, Figure(Drawing((1, 1))), "figure", 3, "images")
    log_to(backend, Audio(torch.zeros(9)), "sound", 3)
    log_to(backend, Text("words"), "note", 3)
    (tmp_path / "a.txt").write_text("words")
    log_to(backend, File(tmp_path / "a.txt"), "file", 3)
    backend.close()
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(str(backend.run_id))
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert client.get_experiment(run.info.experiment_id).name == "digits"
    assert series(uri, backend.run_id, "epoch/validation/loss_ema") == [(1, 0.25), (2, 0.5)]
    assert run.data.params == {"lr": "0.1", "model.width": "8"}
    assert sorted(artifacts(uri, backend.run_id)) == ["file-000003.txt", "images", "note-000003.md", "sound-000003.wav"]
    assert artifacts(uri, backend.run_id, "images") == ["images/figure-000003.png", "images/grid-000003.png"]
    assert mlflow.active_run() is None


def test_a_run_of_the_users_own_stays_the_active_one(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run() as own:
            backend = MLflow(tracking_uri=uri)
            log_to(backend, Scalar(1), "loss", 1)
            backend.close()
            assert mlflow.active_run().info.run_id == own.info.run_id != backend.run_id
    finally:
        mlflow.set_tracking_uri(None)


def test_it_goes_on_in_the_same_run_after_closing(uri: str) -> None:
    backend = MLflow(tracking_uri=uri)
    for step in (1, 2):
        log_to(backend, Scalar(step), "loss", step)
        assert MlflowClient(tracking_uri=uri).get_run(str(backend.run_id)).info.status == "RUNNING"
        backend.close()
    assert series(uri, backend.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_resumed_the_same_run_goes_on_and_no_step_is_there_twice(uri: str) -> None:
    first = MLflow(tracking_uri=uri)
    log_to(first, Scalar(1), "loss", 1, "step")
    state = first.state_dict()
    log_to(first, Scalar(2), "loss", 2, "step")
    first.flush()  # and it is killed: the other number of that step never came
    second = MLflow(tracking_uri=uri)
    second.load_state_dict(state)
    second.begin(resumed=True)
    for step in (2, 3):
        log_to(second, Scalar(step), "loss", step, "step")
        log_to(second, Scalar(step), "accuracy", step, "step")
    second.close()
    assert second.run_id == first.run_id
    assert series(uri, first.run_id, "step/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert series(uri, first.run_id, "step/accuracy") == [(2, 2.0), (3, 3.0)]


def test_a_state_from_before_the_first_value_begins_a_run(uri: str) -> None:
    backend = MLflow(tracking_uri=uri)
    backend.load_state_dict(MLflow(tracking_uri=uri).state_dict())
    log_to(backend, Scalar(1), "loss", 1)
    backend.close()
    assert series(uri, backend.run_id, "loss") == [(1, 1.0)]


def test_more_numbers_than_it_takes_at_once_arrive(uri: str) -> None:
    backend = MLflow(tracking_uri=uri)
    for step in range(250):
        log_to(backend, Scalar(step), "loss", step)
    log_to(backend, HyperParameters({f"p{index}": index for index in range(150)}), "chosen", 0)
    backend.close()
    assert len(series(uri, backend.run_id, "loss")) == 250
    assert len(MlflowClient(tracking_uri=uri).get_run(str(backend.run_id)).data.params) == 150


def test_a_histogram_is_what_it_cannot_hold(uri: str) -> None:
    with pytest.warns(UserWarning, match="cannot hold Histogram, which is left out; it holds Scalar"):
        log_to(MLflow(tracking_uri=uri), Histogram([1.0]), "weights", 1)


def test_a_place_that_it_cannot_write_to_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    backend = MLflow(tracking_uri=(tmp_path / "file" / "runs").as_uri())
    with pytest.warns(UserWarning, match=r"MLflow\(.*\) failed to be opened, and is left alone"):
        log_to(backend, Scalar(1), "loss", 1)
    log_to(backend, Scalar(2), "loss", 2)


def test_a_folder_that_is_named_needs_no_variable_of_mlflows(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    backend = MLflow("digits", tracking_uri=uri)
    log_to(backend, Scalar(0.5), "loss", 1)
    backend.close()
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert series(uri, backend.run_id, "loss") == [(1, 0.5)]


def test_a_default_place_that_cannot_be_opened_is_told_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at/all")
    with pytest.warns(UserWarning, match=r"name a folder or a server: MLflow\('digits', tracking_uri='mlruns'\)"):
        log_to(MLflow("digits"), Scalar(0.5), "loss", 1)
