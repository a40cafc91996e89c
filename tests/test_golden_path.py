"""The way of the data, once: an environment, a model, a journal, and the tensors a trainer would read."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import agentgym  # noqa: E402
from agentgym import journal as journals  # noqa: E402
from agentgym.journal import Journal  # noqa: E402
from agentgym.policies import models  # noqa: E402
from agentgym.policies.base import Sampling  # noqa: E402
from agentgym.policies.transformers import TransformersPolicy  # noqa: E402
from agentgym.rollout.engine import Episode, RolloutConfig, RolloutEngine  # noqa: E402
from agentgym.trainers.batch import collate, rows  # noqa: E402
from agentgym.trajectory import Trajectory  # noqa: E402
from agentgym.wrappers.stack import EnvConfig  # noqa: E402

ECHO = "agentgym.testing:EchoEnv"


def test_from_an_environment_to_a_batch_and_the_same_from_its_journal(
    tiny_model: Path, tmp_path: Path
) -> None:
    env = agentgym.make(ECHO)
    tasks = env.unwrapped.tasks("train").sample(3, seed=0)  # type: ignore[attr-defined]
    env.close()
    episodes = [Episode(f"{t}-{m}", t, "train", g, m) for g, t in enumerate(tasks) for m in range(2)]

    async def collect(journal: Journal) -> list[Trajectory]:
        policy = TransformersPolicy(*models.load(tiny_model, dtype=torch.float32, device="cpu"))
        config = RolloutConfig(deterministic=True, sampling=Sampling(max_tokens=8), seed=1)
        engine = RolloutEngine(EnvConfig(ECHO, {"turns": 2}, list_actions=True), policy, config, journal)
        try:
            return await engine.collect(episodes)
        finally:
            await engine.aclose()
            await policy.aclose()

    with Journal.create(tmp_path / "run", {"env": ECHO}) as journal:
        played = asyncio.run(collect(journal))
    loaded = list(journals.load(tmp_path / "run").values())

    assert [t.id for t in played] == [e.id for e in episodes]
    assert all(t.valid and len(t.turns) == 2 and t.sampled_tokens > 0 for t in played)
    assert {t.id: t for t in loaded} == {t.id: t for t in played}
    by_id = {t.id: t for t in loaded}
    before, after = (collate(rows(found)) for found in (played, [by_id[t.id] for t in played]))
    for name in before.__slots__:
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert before.loss_mask.sum().item() == sum(t.sampled_tokens for t in played)
    assert bool((before.logp_rollout[before.loss_mask] < 0).all())
