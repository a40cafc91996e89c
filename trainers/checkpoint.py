"""Checkpoints: safetensors and JSON, never pickles.

Invariant: a checkpoint folder is whole or not there; a crash while saving leaves the earlier one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agentgym.errors import StorageFailed, UsageError
from agentgym.policies.models import quiet_transformers
from agentgym.trainers.learner import Learner

FORMAT = 2
POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved state: ``step`` steps are done.

    Attributes:
        folder: Where it lies.
        step: Number of finished steps.
        extra: What the algorithm keeps beside the learner: schedules, histories, buffers (JSON).
    """

    folder: Path
    step: int
    extra: Mapping[str, Any]

    def restore(self, learner: Learner, name: str = POLICY) -> None:
        """Put weights, optimiser and counters of the learner ``name`` back, exactly.

        Raises:
            UsageError: Its files are damaged, or another model's.
        """
        with _whole(self.folder):
            state = json.loads((self.folder / "state.json").read_text())
            if name not in state["counters"]:
                kept = ", ".join(state["counters"])
                raise UsageError(
                    f"the checkpoint {self.folder} has no learner {name!r}, only {kept}",
                    hint="resume with the settings that the run was started with",
                )
            counters = state["counters"][name]
            weights = load_file(self.folder / f"{name}-weights.safetensors")
            moments = load_file(self.folder / f"{name}-optimiser.safetensors")
        learner.load_state(weights, moments, counters)


def save(
    root: Path,
    step: int,
    learner: Learner,
    extra: Mapping[str, Any],
    *,
    others: Mapping[str, Learner] = MappingProxyType({}),
    keep: int = 1,
) -> Checkpoint:
    """Save under ``root/step-NNNNNN`` and delete all but the last ``keep``.

    Args:
        root: The run's folder of checkpoints.
        step: Steps that are done.
        learner: The policy's.
        extra: What the algorithm keeps; JSON.
        others: Further learners by name.
        keep: Checkpoints that stay.

    Raises:
        StorageFailed: The disk is full or the folder cannot be written; earlier checkpoints stand.
    """
    final = root / f"step-{step:06d}"
    partial = root / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counters = {}
        for name, each in {POLICY: learner, **others}.items():
            weights, moments, counters[name] = each.state()
            save_file(weights, partial / f"{name}-weights.safetensors")
            save_file(moments, partial / f"{name}-optimiser.safetensors")
        state = {"format": FORMAT, "step": step, "counters": counters, "extra": dict(extra)}
        (partial / "state.json").write_text(json.dumps(state))
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except Exception as error:  # safetensors wraps OSError in its own type
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageFailed(
            f"cannot save the checkpoint {final}: {error}", hint="free space on the disk, then resume the run"
        ) from error
    for old in _steps(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(final, step, dict(extra))


def export(learner: Learner, model: Any, tokenizer: Any, target: Path) -> Path:
    """Write the learner's weights, adapters merged, as a Hugging Face folder.

    Args:
        learner: Whose weights.
        model: A model of the same architecture, for its config.
        tokenizer: Saved beside it.
        target: Replaced if it exists.

    Raises:
        StorageFailed: The disk is full or the folder cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    weights = {name: tensor.contiguous() for name, tensor in learner.weights()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with quiet_transformers():
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageFailed(
            f"cannot save the model {target}: {error}", hint="free space on the disk, then resume the run"
        ) from error
    return target


def latest(root: Path) -> Checkpoint | None:
    """The last whole checkpoint under ``root``, if any.

    Raises:
        UsageError: It was written by a later version, or is damaged.
    """
    folders = _steps(root)
    if not folders:
        return None
    with _whole(folders[-1]):
        state = json.loads((folders[-1] / "state.json").read_text())
        later = state["format"] > FORMAT
    if state["format"] != FORMAT:
        raise UsageError(
            f"{folders[-1]} has checkpoint format {state['format']}, this version reads format {FORMAT}",
            hint="pip install --upgrade agentgym-llm"
            if later
            else "finish the run with the version it began on",
        )
    return Checkpoint(folders[-1], state["step"], state["extra"])


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(
            f"the checkpoint {folder} is damaged: {error}",
            hint="delete it, and the run resumes from the one before, or from its start",
        ) from error


def _steps(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if (p / "state.json").exists())
