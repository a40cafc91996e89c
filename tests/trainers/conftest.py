"""What the tests of training share: learners over the tiny model, token rows, small runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn


def pytest_pycollect_makemodule() -> None:
    """All that lies here needs torch: without it the folder is skipped, and said to be."""
    pytest.importorskip("torch")


ECHO = ["env=agentgym.testing:EchoEnv", "env.kwargs.words=2"]
SMALL = ["rollout.max_tokens=4", "rollout.deterministic=true", "trackers=[]", "model.autocast=none"]


@pytest.fixture
def make_learner(tiny_model: Path) -> Callable[..., Any]:
    """A learner over a fresh tiny model: ``make_learner(dtype=…, micro_batch_tokens=…, lora=…, …)``."""
    import torch

    from agentgym.policies import models
    from agentgym.trainers.config import ModelSection, OptimiserSection
    from agentgym.trainers.learner import Learner

    def make(
        dtype: Any = None,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        planned_updates: int = 0,
        **optimiser: Any,
    ) -> Learner:
        torch.manual_seed(0)
        model, _ = models.load(tiny_model, dtype=torch.float32, device="cpu")
        section = ModelSection.model_validate(
            {
                "name": str(tiny_model),
                "autocast": "none",
                "lora": lora,
                "gradient_checkpointing": gradient_checkpointing,
            }
        )
        return Learner(
            model.to(dtype or torch.float32),
            section,
            OptimiserSection.model_validate({"lr": 1e-3, "max_grad_norm": 1e9, **optimiser}),
            planned_updates=planned_updates,
        )

    return make


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    """``make_trajectory(id, group, reward, lengths)``: a segment a turn, ``(prompt, completion)`` tokens."""

    def make(
        id: str,
        group: int = 0,
        reward: float = 0.0,
        lengths: Sequence[tuple[int, int]] = ((3, 2),),
        outcome: Outcome | None = None,
        seed: int = 0,
    ) -> Trajectory:
        import numpy as np

        random = np.random.default_rng([seed, group, sum(id.encode())])
        segments, turns = [], []
        for index, (prompt, sampled) in enumerate(lengths):
            segment = Segment()
            segment.append_context(random.integers(3, 300, prompt).tolist())
            span = segment.append_sampled(
                random.integers(3, 300, sampled).tolist(), (-random.random(sampled)).tolist()
            )
            segments.append(segment)
            last = index == len(lengths) - 1
            turns.append(
                Turn(index, index, span, (TextPart("o"),), "c", "a", reward if last else 0.0, success=last)
            )
        return Trajectory(
            id,
            "e",
            "t",
            group=group,
            segments=segments,
            turns=turns,
            outcome=outcome or Outcome.completed(),
        )

    return make


@pytest.fixture
def settings(tiny_model: Path) -> Callable[..., Any]:
    """``settings("grpo", "groups=2", …)``: the algorithm and config of a small run on EchoEnv."""
    from agentgym.trainers import launch

    def make(name: str, *overrides: str) -> Any:
        return launch.resolve(name, overrides=[*ECHO, *SMALL, f"model={tiny_model}", *overrides])

    return make


@pytest.fixture
def train(settings: Callable[..., Any]) -> Callable[..., Path]:
    """``train(folder, "grpo", "groups=2", …, progress=…)``: a whole small run; its exported model."""
    from agentgym.trainers import launch

    def run(folder: Path, name: str, *overrides: str, progress: Any = None, resume: bool = False) -> Path:
        algorithm, config = settings(name, *overrides)
        return launch.launch(algorithm, config, folder, progress=progress, resume=resume)

    return run


@pytest.fixture
def with_run(settings: Callable[..., Any]) -> Callable[..., Any]:
    """``with_run(folder, "grpo", use, …)``: what ``use(config, run)`` returns, awaited in an open run."""
    from agentgym.trainers.run import Run

    def call(folder: Path, name: str, use: Callable[[Any, Any], Any], *overrides: str) -> Any:
        _, config = settings(name, *overrides)
        with Run(config, folder) as run:

            async def body() -> Any:
                result = use(config, run)
                return await result if asyncio.iscoroutine(result) else result

            return asyncio.run(body())

    return call
