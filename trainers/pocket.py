"""A pocket model: a Llama of a few million weights that has only ever seen one game, made by one command.

Invariant: everything of it follows from the config and its seed: the games that are played, the tokenizer
trained on their transcripts, the random weights that cloning starts from. These parts are built once, under a
lock, into the cache; cloning (:mod:`agentgym.trainers.cloning`) does the rest, and what the run exports is an
ordinary Hugging Face folder.

The play that is cloned mixes an expert's with a random player's: the policy knows the format and the words,
and plays as badly as ``random_share`` says. That leaves reinforcement learning something to do, at a size at
which many seeds of a comparison fit one core.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import torch
from filelock import FileLock
from pydantic import Field, model_validator

from agentgym.actions import make_parser
from agentgym.errors import ConfigError, UsageError
from agentgym.messages import text_of
from agentgym.paths import cache_dir
from agentgym.policies import models
from agentgym.policies.base import TurnView
from agentgym.policies.simple import ScriptedPolicy, draw
from agentgym.registry import base, make
from agentgym.rollout.engine import RolloutEngine
from agentgym.seeding import derive
from agentgym.trainers import cloning
from agentgym.trainers.collect import TaskOrder, collect, plan
from agentgym.trainers.config import ModelSection, OptimiserSection
from agentgym.trainers.run import Algorithm, Progress, Run
from agentgym.trajectory import Trajectory

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# One token each, but text like any other: parsers have to see them.
MARKS = ("<tool_call>", "</tool_call>", "<answer>", "</answer>")
WORDS = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]+?(?= ?[\p{L}\p{N}]|$)"
WORDS_APART = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
# ChatML; the tools' names and parameters suffice to one who has learned to call them.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools' }}{% for tool in tools %}"
    "{{ '\\n' + tool['function']['name'] }}"
    "{% for key in tool['function'].get('parameters', {}).get('properties', {}) %}{{ ' ' + key }}{% endfor %}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class PocketConfig(cloning.CloningConfig):
    """A pocket model's numbers; those of :class:`agentgym.trainers.cloning.CloningConfig` beside."""

    algorithm: Literal["pocket"] = "pocket"  # type: ignore[assignment]
    model: ModelSection = Field(ModelSection(name=""), description="its name is filled in")
    hidden: int = Field(160, ge=8, description="width of the model")
    layers: int = Field(2, ge=1)
    attention_heads: int = Field(4, ge=1)
    vocabulary: int = Field(2048, ge=300, description="tokens at most; all 256 bytes are among them")
    tied: bool = Field(False, description="one matrix for reading and for writing tokens")
    initial_std: float = Field(0.02, gt=0, description="of random weights; hidden ** -0.5 copies sooner")
    context: int = Field(1024, ge=16, description="tokens of the longest prompt and completion")
    spaces_apart: bool = Field(
        False, description="a word is the same token after a space and after a quote: longer, easier to copy"
    )
    random_share: float = Field(0.3, ge=0, le=1, description="chance that a turn is the random player's")
    tokenizer_episodes: int = Field(64, ge=1, description="episodes that the tokenizer is trained on")
    demonstrations: int = Field(400, ge=1, description="episodes of mixed play, one a task")
    batch_rows: int = Field(32, ge=1)
    steps: int = Field(400, ge=0)
    optimiser: OptimiserSection = OptimiserSection(lr=1e-3)

    @model_validator(mode="after")
    def _width(self) -> Self:
        if self.hidden % (2 * self.attention_heads):
            raise ConfigError(
                f"hidden {self.hidden} gives {self.attention_heads} attention heads no even width each",
                hint=f"hidden is a multiple of twice attention_heads: of {2 * self.attention_heads} here",
            )
        return self


@dataclass(frozen=True)
class MixedPlay:
    """A script of a turn: the expert's action, or with the chance ``random_share`` another one.

    Another one is an admissible action where the environment lists them, else one of any task's plan. The
    plan goes on where it stopped: its next action is the first that the actions taken so far do not hold in
    order. Where that one is not admissible, because play has left the plan's way, the random player goes on.

    Attributes:
        plans: The expert's actions of each task.
        others: What the random player draws from where nothing is listed.
        random_share: 0 to 1.
        seed: A turn's draw follows from it, the task and the number of the turn.
    """

    plans: Mapping[str, Sequence[str]]
    others: Sequence[str]
    random_share: float
    seed: int

    def __call__(self, turn: TurnView) -> str:
        """The action of this turn."""
        listed = turn.admissible_actions
        random = Random(derive(self.seed, "play", turn.episode, turn.turn))
        expected = self._expected(turn)
        if random.random() < self.random_share or (listed and expected not in listed and self.random_share):
            return draw(random, listed or self.others)
        return expected

    def _expected(self, turn: TurnView) -> str:
        chosen, position = self.plans[turn.task_id], 0
        for action in turn.history:
            if position < len(chosen) and action == chosen[position]:
                position += 1
        return chosen[min(position, len(chosen) - 1)]


def mixed_play(config: PocketConfig, count: int) -> tuple[ScriptedPolicy, TaskOrder]:
    """Who plays the first ``count`` tasks of the training order, and that order.

    Raises:
        UsageError: The environment knows no solution of one of them.
    """
    section = config.env
    env = make(section.id, **section.kwargs)
    try:
        family = base(env)
        tasks = family.tasks(family.require_split(section.split or family.splits[0]))
        order = TaskOrder(tasks, config.seed, section.tasks)
        plans: dict[str, Sequence[str]] = {}
        for position in range(count):
            name = order[position]
            if name not in plans:
                if not (solved := family.expert(family.find_task(name))):
                    raise UsageError(
                        f"no solution of the task {name!r} of {section.id} is known",
                        hint="a pocket model is cloned from an expert: choose an environment that has one",
                    )
                plans[name] = tuple(solved)
    finally:
        env.close()
    others = sorted({action for actions in plans.values() for action in actions})
    play = MixedPlay(plans, others, config.random_share, config.seed)
    return ScriptedPolicy(play, make_parser(section.parser, **section.parser_options)), order


def prepare(config: PocketConfig, progress: Progress) -> PocketConfig:
    """The config with the untrained model's folder as ``model.name``; it is built if the cache lacks it."""
    target = cache_dir("pocket") / _key(config)
    with FileLock(target.parent / f".{target.name}.lock"):
        if not models.is_model(target):
            progress.phase(f"a tokenizer from {config.tokenizer_episodes} episodes")
            with models.built_beside(target) as building:
                build(config, transcripts(config), building)
                shutil.rmtree(target, ignore_errors=True)  # what a cleaning of the cache left
    return config.model_copy(update={"model": config.model.model_copy(update={"name": str(target)})})


def transcripts(config: PocketConfig) -> list[str]:
    """The texts of ``tokenizer_episodes`` episodes of mixed play."""

    async def play() -> list[Trajectory]:
        policy, order = mixed_play(config, config.tokenizer_episodes)
        engine = RolloutEngine(config.env.stack(), policy, config.rollout.engine(config.seed))
        try:
            episodes = plan(order, 0, 0, config.tokenizer_episodes, 1)
            return await collect(engine, episodes, {}, max_failure_rate=config.max_failure_rate)
        finally:
            await engine.aclose()

    system = config.env.stack().system_message(config.rollout.system)
    return [text for t in asyncio.run(play()) if t.valid for text in _texts(t, system)]


def build(config: PocketConfig, texts: Iterable[str], folder: Path) -> None:
    """Write a tokenizer trained on ``texts`` and a model with random weights into ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(config, texts)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=4 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.attention_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied,
        initializer_range=config.initial_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]), models.quiet_transformers():
        torch.manual_seed(derive(config.seed, "pocket"))
        LlamaForCausalLM(shape).save_pretrained(folder)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(folder)


async def train(config: PocketConfig, run: Run) -> None:
    """Clone mixed play; of an expert's alone the episodes that it won.

    Raises:
        UsageError: There is nothing to clone.
    """
    if run.extra.get("stopped"):
        return
    policy, _ = mixed_play(config, config.demonstrations)
    played = await cloning.play(config, run, policy)
    chosen = [t for t in played if t.valid and (t.success or config.random_share)]
    if not chosen:
        raise UsageError(
            f"none of {len(played)} episodes can be cloned: the expert won none of them",
            hint="raise env.max_turns, or look at them with `agentgym eval … --policy expert`",
        )
    await cloning.fit(config, run, cloning.examples(config, run, chosen))


def _tokenizer(config: PocketConfig, texts: Iterable[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(kinds.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_APART if config.spaces_apart else WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary - len(MARKS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=config.context,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _texts(trajectory: Trajectory, system: str) -> Iterable[str]:
    roles = ("\nsystem\n", "\nuser\n", "\nassistant\n", "\ntool\n", "\ntools\n")
    tools = " ".join(json.dumps(tool) for tool in trajectory.tools)
    yield from (*roles, system, trajectory.instruction, tools)
    for turn in trajectory.turns:
        yield f"{text_of(turn.observation)}\n"
        yield turn.completion


def _key(config: PocketConfig) -> str:
    """Names everything that the untrained model follows from."""
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "torch")}
    fields = config.model_dump(mode="json", include={
        "env", "seed", "hidden", "layers", "attention_heads", "vocabulary", "tied", "initial_std", "context",
        "spaces_apart", "random_share", "tokenizer_episodes",
    })  # fmt: skip
    # A corpus that is written anew under its old name is another one.
    given = config.env.kwargs
    inner = {f"{n}.{k}": v for n, t in given.items() if isinstance(t, Mapping) for k, v in t.items()}
    files = {
        name: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for name, value in {**given, **inner}.items()
        if isinstance(value, str) and os.path.isfile(value)
    }
    text = json.dumps([1, versions, fields, files, config.rollout.system, TEMPLATE], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


POCKET = Algorithm(PocketConfig, train, prepare)
