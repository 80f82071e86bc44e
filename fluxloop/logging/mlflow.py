"""Log to MLflow."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from fluxloop.guard.assign import fields_of_the_class
from fluxloop.logging.backend import Backend, key, log_to
from fluxloop.logging.loggables import Audio, Figure, File, HyperParameters, Image, Loggable, Scalar, Text, save
from fluxloop.logging.text_files import file_name

NUMBERS_PER_REQUEST = 100
"""How many numbers wait before they are sent; MLflow takes 1000 at once."""


def _library() -> Any:
    try:
        import mlflow
        import mlflow.entities
        import mlflow.tracking
    except ImportError as error:
        raise ImportError("MLflow needs mlflow: pip install 'torch-fluxloop[mlflow]'") from error
    return mlflow


@contextmanager
def _folder_allowed(uri: str | None) -> Iterator[None]:
    """Let MLflow open a folder that the user asked for: since 3.17 it wants a variable set for that."""
    variable = "MLFLOW_ALLOW_FILE_STORE"
    is_folder = uri is not None and ("://" not in uri or uri.startswith("file:"))
    if not is_folder or variable in os.environ:
        yield
        return
    os.environ[variable] = "true"
    try:
        yield
    finally:
        del os.environ[variable]


@fields_of_the_class
@define(eq=False, slots=False)
class MLflow(Backend):
    """Log to a run of MLflow, through a client of its own: ``mlflow.active_run()`` is left alone.

    Numbers are metrics, hyperparameters are parameters, and images, figures, texts, sounds and files
    are artifacts, ``GROUP/NAME-000010.png``. A character that MLflow's names cannot have becomes "_".
    Resumed, the same run goes on, and a value of a step that is there already is not sent again.

    Args:
        experiment: Name of the experiment; made where there is none.
        run_name: Name of the run; left out, MLflow makes one up.
        tracking_uri: A folder, a database or a server; left out, MLflow's own default. That has
            become a database: mlflow-skinny has none built in, so name a folder or a server there.

    Raises:
        ImportError: mlflow is not installed.

    Attributes:
        run_id: The run's id, once it has begun.

    Example:
        >>> backend = MLflow("digits", run_name="first", tracking_uri="mlruns")  # nothing is written before the fit
        >>> logger = LogMetrics(backend)
        >>> backend.run_id is None
        True
    """

    experiment: str = "Default"
    run_name: str | None = field(default=None, kw_only=True)
    tracking_uri: str | None = field(default=None, kw_only=True)
    run_id: str | None = field(default=None, init=False, repr=False)
    _client: Any = field(default=None, init=False, repr=False)
    _waiting: list[Any] = field(factory=list, init=False, repr=False)
    _there: dict[str, int] = field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _library()

    def _connect(self) -> Any:
        if self._client is None:
            try:
                with _folder_allowed(self.tracking_uri):
                    self._client = _library().tracking.MlflowClient(tracking_uri=self.tracking_uri)
            except Exception as error:
                if self.tracking_uri is not None:
                    raise
                raise RuntimeError(
                    "MLflow's default place could not be opened; name a folder or a server: "
                    f"MLflow({self.experiment!r}, tracking_uri='mlruns')"
                ) from error
        return self._client

    def _open(self) -> None:
        client = self._connect()
        self._waiting = []
        if self.run_id is not None:
            client.update_run(self.run_id, "RUNNING")
            return
        known = client.get_experiment_by_name(self.experiment)
        experiment = client.create_experiment(self.experiment) if known is None else known.experiment_id
        self.run_id = client.create_run(experiment, run_name=self.run_name).info.run_id

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._client.log_batch(self.run_id, metrics=waiting)

    def _close(self) -> None:
        self._client.set_terminated(self.run_id)

    def _position(self) -> str | None:
        return self.run_id

    def _rewind(self, position: Any) -> None:
        self.run_id, self._there = position, {}
        if position is not None:
            client = self._connect()
            for name in client.get_run(position).data.metrics:
                self._there[name] = max(metric.step for metric in client.get_metric_history(position, name))

    def send(self, name: str, value: float, step: int) -> None:
        """Send a number, unless the run has one at that step or a later one from before it was resumed."""
        if step > self._there.get(name, -1):
            entities = _library().entities
            self._waiting.append(entities.Metric(name, value, int(time.time() * 1000), step))
            if len(self._waiting) >= NUMBERS_PER_REQUEST:
                self._flush()

    @property
    def client(self) -> Any:
        """The ``MlflowClient``, once the run has begun."""
        return self._client

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        copied: Any = super().__deepcopy__(memo)
        copied._client, copied._waiting = None, []
        return copied  # type: ignore[no-any-return]


def _name(name: str, group: tuple[str, ...]) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key(name, group))


@log_to.register(MLflow, Scalar)
def _scalar(backend: MLflow, scalar: Scalar, name: str, step: int, group: tuple[str, ...]) -> None:
    backend.send(_name(name, group), scalar.value, step)


@log_to.register(MLflow, HyperParameters)
def _chosen(backend: MLflow, chosen: HyperParameters, name: str, step: int, group: tuple[str, ...]) -> None:
    param = _library().entities.Param
    params = [param(_name(each, ()), str(value)) for each, value in chosen.values.items()]
    for start in range(0, len(params), 100):  # MLflow takes so many at once
        backend.client.log_batch(backend.run_id, params=params[start : start + 100])


def _artifact(backend: MLflow, thing: Loggable, name: str, step: int, group: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{file_name(name)}-{step:06d}"
        if isinstance(thing, Text):
            path = path.with_name(f"{path.name}.md")
            path.write_text(thing.text, encoding="utf-8")
        else:
            path = save(thing, path)
        backend.client.log_artifact(backend.run_id, str(path), "/".join(map(file_name, group)) or None)


for _kind in (Image, Figure, Text, Audio, File):
    log_to.register(MLflow, _kind)(_artifact)
