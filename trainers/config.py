"""The sections that every algorithm's config is made of.

Invariant: a section holds what one station of the data's way needs and nothing else; an algorithm's own
numbers live in its own file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from agentgym.config import Config
from agentgym.conversation import Layout
from agentgym.env import Worker
from agentgym.policies.base import Sampling
from agentgym.rollout.engine import RolloutConfig
from agentgym.trainers.refusals import refuse_idle
from agentgym.wrappers.stack import EnvConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class EnvSection(Config):
    """The environment; ``env=ID`` sets the id alone. See :class:`agentgym.wrappers.stack.EnvConfig`."""

    shorthand: ClassVar[str | None] = "id"

    id: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    split: str | None = None
    tasks: int | None = Field(None, ge=1, description="use the first N tasks of the split; all by default")
    parser: str = "plain"
    parser_options: dict[str, Any] = Field(default_factory=dict)
    history: int = Field(0, ge=0)
    history_observations: bool = True
    list_actions: bool = False
    max_turns: int | None = Field(None, ge=1)
    max_observation_chars: int | None = Field(None, ge=1)
    invalid_penalty: float = 0.0
    worker: Worker | None = None

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if not self.history:
            because = "env.history is 0: no earlier turn is shown"
            refuse_idle(self, "history_observations", section="env", because=because, hint="set env.history")
        return self

    def stack(self) -> EnvConfig:
        """The environment with its wrappers."""
        return EnvConfig(**self.model_dump(exclude={"split", "tasks"}))


class LoraSection(Config):
    """Low-rank adapters (peft)."""

    rank: int = Field(16, ge=1)
    alpha: float = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class ModelSection(Config):
    """The model; ``model=NAME`` sets the name alone.

    The trainer holds fp32 master weights; the rollout policy holds a copy in ``rollout_dtype``.
    """

    shorthand: ClassVar[str | None] = "name"

    name: str
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    rollout_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraSection | None = None


class RolloutSection(Config):
    """How episodes are run. See :class:`agentgym.rollout.engine.RolloutConfig`."""

    concurrency: int = Field(32, ge=1)
    deterministic: bool = False
    layout: Layout = "chat"
    system: str = ""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(64, ge=1)
    stop: tuple[str, ...] = ()
    reset_seconds: float = 120.0
    step_seconds: float = 60.0
    generate_seconds: float = 600.0
    episode_seconds: float | None = None
    max_sampled_tokens: int | None = None

    def engine(self, seed: int, *, temperature: float | None = None) -> RolloutConfig:
        """The engine's config; ``temperature`` replaces the section's."""
        sampling = Sampling(
            temperature=self.temperature if temperature is None else temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )
        own = self.model_dump(exclude={"temperature", "top_p", "top_k", "max_tokens", "stop"})
        return RolloutConfig(**own, sampling=sampling, seed=seed)


class OptimiserSection(Config):
    """AdamW and what surrounds it."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_updates: int = Field(0, ge=0, description="updates over which the rate rises to lr")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up: stay, or fall to 0 with the last update of the run"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(4096, ge=1, description="padded tokens in one forward pass")


class EvaluationSection(Config):
    """Evaluation during training, greedy unless ``temperature`` says otherwise."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: none")
    split: str = "valid"
    episodes: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int | None = Field(None, ge=0, description="of the sample of tasks; the run's by default")


class TrainConfig(Config):
    """What every training run has."""

    algorithm: str
    env: EnvSection
    model: ModelSection
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=0)
    rollout: RolloutSection = RolloutSection()
    optimiser: OptimiserSection = OptimiserSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint_every: int = Field(10, ge=0, description="steps between checkpoints; 0: only the last")
    checkpoint_keep: int = Field(1, ge=1)
    trackers: tuple[str, ...] = ("tensorboard",)
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="stop when more of a collection failed by infrastructure"
    )

    @property
    def planned_updates(self) -> int:
        """Optimiser steps of the whole run, for the learning rate's schedule."""
        return self.steps

    @property
    def learner_heads(self) -> Literal["policy", "value", "both"]:
        """What the learner is: see :class:`agentgym.trainers.learner.Learner`."""
        return "policy"
