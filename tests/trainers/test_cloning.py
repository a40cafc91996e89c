"""Behaviour cloning: likelihood rises, the expert's behaviour is reached, an early stop stays a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agentgym import journal
from agentgym.policies import models
from agentgym.trainers import cloning, launch
from agentgym.trainers.checkpoint import latest
from agentgym.trainers.metrics import load as load_metrics

FAST = ["demonstrations=16", "batch_rows=8", "optimiser.lr=3e-3", "evaluation.episodes=16"]


def test_the_expert_s_behaviour_is_reached(train: Callable[..., Path], tmp_path: Path) -> None:
    model = train(tmp_path / "r", "cloning", *FAST, "steps=30", "evaluation.every=30")
    metrics = load_metrics(tmp_path / "r")
    assert metrics[29]["nll"] < 0.5 * metrics[0]["nll"]
    assert metrics[29]["eval/success"] == 1.0
    loaded, _ = models.load(model, dtype=torch.float32)
    assert loaded.dtype == torch.float32


def test_an_early_stop_stays_a_stop(train: Callable[..., Path], tmp_path: Path) -> None:
    stop = [*FAST, "steps=60", "evaluation.every=5", "stop_at_success=0.3"]
    model = train(tmp_path / "r", "cloning", *stop)
    steps = sorted(load_metrics(tmp_path / "r"))
    assert steps[-1] < 59
    saved = latest(tmp_path / "r" / "checkpoints")
    assert saved is not None and saved.step == steps[-1] + 1 and saved.extra == {"stopped": True}
    weights = (model / "model.safetensors").read_bytes()
    launch.launch(*launch.reopen(tmp_path / "r"), tmp_path / "r", resume=True)
    assert sorted(load_metrics(tmp_path / "r")) == steps
    assert (model / "model.safetensors").read_bytes() == weights


def test_expert_and_evaluation_are_in_the_journal(train: Callable[..., Path], tmp_path: Path) -> None:
    train(tmp_path / "r", "cloning", *FAST, "steps=1", "evaluation.every=1")
    found = journal.load(tmp_path / "r")
    assert [t.split for t in found.values()] == ["train"] * 16 + ["valid"] * 16
    assert all(t.success for t in list(found.values())[:16])


def test_the_expert_answers_in_the_format_and_the_prompt_says_it(
    with_run: Callable[..., Any], tmp_path: Path
) -> None:
    def use(config: Any, run: Any) -> Any:
        async def body() -> Any:
            made = await cloning.demonstrations(config, run)
            stack = config.env.stack()
            return made, run.policy.renderer, stack.instructions()

        return body()

    made, renderer, instructions = with_run(
        tmp_path / "r", "cloning", use, "env.parser=tags", "demonstrations=2", "rollout.system=Play."
    )
    for row in made:
        ((_, start, end),) = row.turns
        prompt = renderer.decode(row.segment.token_ids[:start])
        assert prompt.startswith("<|im_start|>system\nPlay.") and instructions in prompt
        assert "<action>" in renderer.decode(row.segment.token_ids[start:end])
