"""A run as Parquet: one row a trajectory with its tokens, one row a turn.

Invariants: the export is derived from the journal alone and can be made again; only the latest attempt at an
episode is in it; a trajectory without a valid outcome has null for every reward, score and success, in both
files. A task's private fields never enter a journal, and so are not here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from agentgym.errors import MissingDependency, StorageFailed
from agentgym.journal import load
from agentgym.messages import Content, ImagePart, text_of
from agentgym.paths import atomic_write
from agentgym.trajectory import Segment, Trajectory, Turn

TRAJECTORIES, TURNS = "trajectories.parquet", "turns.parquet"


def to_parquet(run: Path | str, out: Path | str | None = None) -> tuple[Path, Path]:
    """Write ``trajectories.parquet`` and ``turns.parquet``; earlier ones are replaced.

    The two join on ``trajectory_id``. ``trajectories`` has the token tree: ``segments`` is a list of
    ``(token_ids, loss_mask, logp_rollout, parent, parent_length)``; a turn's completion lies in ``segment``
    at ``[start, end)``. Images are named by the SHA-256 of their bytes, as in the run's ``blobs/``.

    Args:
        run: The run's folder; it may still be written.
        out: Folder of the files; the run's own by default.

    Returns:
        The two paths.

    Raises:
        JournalError: There is no journal, or it is damaged.
        MissingDependency: pyarrow is not installed.
        StorageFailed: The files cannot be written.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency("pyarrow", "train") from error
    trajectories = load(run).values()
    turns = [(trajectory, turn) for trajectory in trajectories for turn in trajectory.turns]
    folder = Path(run if out is None else out)
    paths = folder / TRAJECTORIES, folder / TURNS
    tables = (
        _table(_trajectory_columns(pa), [(t,) for t in trajectories]),
        _table(_turn_columns(pa), turns),
    )
    for path, table in zip(paths, tables, strict=True):
        try:
            with atomic_write(path) as temporary:
                parquet.write_table(table, temporary, compression="zstd")
        except OSError as error:
            raise StorageFailed(
                f"cannot write {path}: {error.strerror or error}",
                hint="free the disk or name another folder",
            ) from error
    return paths


def _table(columns: dict[str, tuple[Any, Callable[..., Any]]], rows: Iterable[tuple[Any, ...]]) -> Any:
    import pyarrow as pa

    rows = list(rows)
    return pa.table(
        {name: pa.array([value(*row) for row in rows], kind) for name, (kind, value) in columns.items()}
    )


def _trajectory_columns(pa: Any) -> dict[str, tuple[Any, Callable[[Trajectory], Any]]]:
    """Type and value of each column of ``trajectories.parquet``."""
    segment = pa.struct(
        {
            "token_ids": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.bool_()),
            "logp_rollout": pa.list_(pa.float64()),
            "parent": pa.int32(),
            "parent_length": pa.int32(),
        }
    )
    return {
        "trajectory_id": (pa.string(), lambda t: _text(t.id)),
        "env_id": (pa.string(), lambda t: _text(t.env_id)),
        "task_id": (pa.string(), lambda t: _text(t.task_id)),
        "split": (pa.string(), lambda t: _text(t.split)),
        "group": (pa.int64(), lambda t: t.group),
        "member": (pa.int64(), lambda t: t.member),
        "attempt": (pa.int64(), lambda t: t.attempt),
        "env_seed": (pa.uint64(), lambda t: t.env_seed),
        "instruction": (pa.string(), lambda t: _text(t.instruction)),
        "outcome": (pa.string(), lambda t: t.outcome and t.outcome.kind),
        "outcome_reason": (pa.string(), lambda t: t.outcome and t.outcome.reason),
        "outcome_detail": (pa.string(), lambda t: t.outcome and _text(t.outcome.detail)),
        "doubtful": (pa.bool_(), lambda t: t.outcome and t.outcome.doubtful),
        "reward": (pa.float64(), lambda t: t.reward if t.valid else None),
        "success": (pa.bool_(), lambda t: t.success if t.valid else None),
        "scores": (
            pa.map_(pa.string(), pa.float64()),
            lambda t: [(_text(k), v) for k, v in t.scores.items()],
        ),
        "turns": (pa.int64(), lambda t: len(t.turns)),
        "sampled_tokens": (pa.int64(), lambda t: t.sampled_tokens),
        "final_observation": (pa.string(), lambda t: _text(text_of(t.final_observation))),
        "final_images": (pa.list_(pa.string()), lambda t: _images(t.final_observation)),
        "segments": (pa.list_(segment), lambda t: [_segment(s) for s in t.segments]),
    }


def _turn_columns(pa: Any) -> dict[str, tuple[Any, Callable[[Trajectory, Turn], Any]]]:
    """Type and value of each column of ``turns.parquet``."""
    return {
        "trajectory_id": (pa.string(), lambda t, turn: _text(t.id)),
        "index": (pa.int64(), lambda t, turn: turn.index),
        "segment": (pa.int64(), lambda t, turn: turn.segment),
        "start": (pa.int64(), lambda t, turn: turn.span[0]),
        "end": (pa.int64(), lambda t, turn: turn.span[1]),
        "observation": (pa.string(), lambda t, turn: _text(text_of(turn.observation))),
        "images": (pa.list_(pa.string()), lambda t, turn: _images(turn.observation)),
        "completion": (pa.string(), lambda t, turn: _text(turn.completion)),
        "action": (pa.string(), lambda t, turn: _text(turn.action)),
        "reward": (pa.float64(), lambda t, turn: turn.reward if t.valid else None),
        "score": (pa.float64(), lambda t, turn: turn.score if t.valid else None),
        "success": (pa.bool_(), lambda t, turn: turn.success if t.valid else None),
        "valid_action": (pa.bool_(), lambda t, turn: turn.valid_action),
        "finish_reason": (pa.string(), lambda t, turn: turn.finish_reason),
        "policy_version": (pa.int64(), lambda t, turn: turn.policy_version),
        "seed": (pa.uint64(), lambda t, turn: turn.seed),
        "admissible_actions": (pa.list_(pa.string()), lambda t, turn: _listed(turn.admissible_actions)),
        "seconds": (pa.map_(pa.string(), pa.float64()), lambda t, turn: list(turn.seconds.items())),
        # Extras hold reward parts: they go the way of the reward.
        "extras": (pa.string(), lambda t, turn: json.dumps(turn.extras) if t.valid else None),
    }


def _text(text: str) -> str:
    """Parquet holds Unicode proper: a lone surrogate is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _images(content: Content) -> list[str]:
    return [part.digest for part in content if isinstance(part, ImagePart)]


def _listed(actions: Sequence[str] | None) -> list[str] | None:
    return None if actions is None else [_text(action) for action in actions]


def _segment(segment: Segment) -> dict[str, Any]:
    parent, length = segment.parent or (None, None)
    return {
        "token_ids": segment.token_ids,
        "loss_mask": segment.loss_mask,
        "logp_rollout": segment.logp_rollout,
        "parent": parent,
        "parent_length": length,
    }
