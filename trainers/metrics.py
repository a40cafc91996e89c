"""Metrics: JSON lines always, and whatever tracker is asked for beside them.

Invariant: a tracker that fails never stops a run; the JSON lines are the record.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agentgym.errors import MissingDependency, UnknownName
from agentgym.records import storage_failed

FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Flush and end."""


class JsonLines:
    """One line a step. After a resume a step can stand twice: the last line counts, see :func:`load`."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # a dying process left half a line: it must not swallow the next one
            self._file.write("\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; numbers that JSON cannot carry become null.

        Raises:
            StorageFailed: The disk is full or broken.
        """
        plain = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise storage_failed(Path(self._file.name), error) from error

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # what a full disk did not take is still in its buffer
            self._file.close()


class TensorBoard:
    """TensorBoard event files in ``tensorboard/``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise MissingDependency("tensorboard", "train") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WandB:
    """Weights & Biases; set ``WANDB_MODE=offline`` for a machine without a network."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise MissingDependency("wandb") from error
        kept = folder / "wandb-id"  # a resumed run goes on in its own record
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project="agentgym",
            name=folder.name,
            id=kept.read_text(),
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """MLflow; ``MLFLOW_TRACKING_URI`` says where, by default ``mlflow.db`` in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ModuleNotFoundError as error:
            raise MissingDependency("mlflow") from error
        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        mlflow.set_experiment("agentgym")
        kept = folder / "mlflow-id"  # a resumed run goes on in its own record
        if kept.exists():
            mlflow.start_run(run_id=kept.read_text())
            return
        kept.write_text(mlflow.start_run(run_name=folder.name).info.run_id)
        mlflow.log_params({k: str(v)[:250] for k, v in _flat(config).items()})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars."""
        self._mlflow.log_metrics({k: v for k, v in metrics.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def require(names: Sequence[str]) -> None:
    """Raise :class:`UnknownName` for a tracker that there is not."""
    for name in names:
        if name not in TRACKERS:
            raise UnknownName("tracker", name, TRACKERS)


class Metrics:
    """All trackers of a run.

    Raises:
        UnknownName: No such tracker.
        MissingDependency: Its package is not installed.
    """

    def __init__(self, folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
        require(names)
        self._trackers: list[Tracker] = [JsonLines(folder)]
        try:
            for name in names:
                self._trackers.append(TRACKERS[name](folder, config))
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send to every tracker; one that fails is dropped with a warning."""
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                if isinstance(tracker, JsonLines):
                    raise
                self._trackers.remove(tracker)
                warnings.warn(f"{type(tracker).__name__} stopped: {error}", stacklevel=2)

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close()


def load(folder: Path) -> dict[int, dict[str, float | None]]:
    """The metrics of a run by step; of a step that stands twice the last."""
    found: dict[int, dict[str, float | None]] = {}
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            metrics = json.loads(line)
            found[metrics.pop("step")] = metrics
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat
