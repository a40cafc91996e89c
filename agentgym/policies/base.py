"""The policy contract: token ids in, token ids and log-probs out.

Invariant: what a policy sampled is kept as it was sampled; its text is only ever a reading of its tokens.
A policy that speaks text (random, expert, human) has no ``renderer`` and returns completions without
tokens; everything downstream treats the two alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agentgym.messages import Content

if TYPE_CHECKING:
    from agentgym.conversation import Renderer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: 0 is greedy. Log-probs are those of the distribution sampled from, after the temperature
            and before ``top_p``/``top_k`` (greedy: of the untempered distribution).
        top_p: Nucleus mass; 1 keeps all.
        top_k: Number of tokens kept; 0 keeps all.
        max_tokens: Longest completion, in tokens.
        stop: Strings that end a completion; the stop string stays in it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnView:
    """What a text-speaking policy may look at, beside the prompt.

    Attributes:
        env_id: The environment's id.
        task_id: The task's id.
        episode: The episode's id in the run.
        turn: Index of the turn, from 0.
        observation: The current observation's parts.
        admissible_actions: Where the environment lists them.
        history: The actions taken so far.
    """

    env_id: str
    task_id: str
    episode: str
    turn: int
    observation: Content
    admissible_actions: tuple[str, ...] | None = None
    history: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate.

    Attributes:
        id: Unique among the requests in flight; in deterministic mode requests come sorted by it.
        prompt_ids: The prompt; empty for a policy without a renderer.
        sampling: Sampling parameters.
        seed: Seed of this completion's own sampler.
        turn: For text-speaking policies.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    turn: TurnView


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: The completion as text, end-of-turn token left out.
        token_ids: As sampled, end-of-turn token included; empty for a text-speaking policy.
        logprobs: One per token: log-probability under the engine's sampling distribution.
        finish_reason: ``stop`` (end token or stop string), ``length``, or ``abort``: the backend gave this
            one request up, and its episode ends ``infra_failed(policy)``.
        version: Version of the weights that sampled it.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason = "stop"
    version: int = 0


class Policy(ABC):
    """A policy. One instance serves many episodes at once; it must not keep state of an episode.

    Attributes:
        name: For reports.
        renderer: How messages become prompt ids; ``None`` for a policy that speaks text.
        version: Of the weights; grows with every :meth:`update_weights`.
        context_limit: Tokens that prompt and completion may have together, where there is a limit.
    """

    name: str = "policy"
    renderer: Renderer | None = None
    version: int = 0
    context_limit: int | None = None

    @abstractmethod
    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. Concurrent calls are allowed and may be batched together.

        In deterministic mode the engine makes one call with all live requests sorted by id; the result
        then depends on the requests alone.

        Raises:
            ContextExceeded: A prompt does not fit.
            PolicyFailed: The backend broke.
        """

    async def update_weights(self, weights: Iterable[tuple[str, Any]]) -> int:
        """Take new weights (name, tensor); return the new :attr:`version`.

        Raises:
            UsageError: The policy has no weights.
        """
        from agentgym.errors import UsageError

        raise UsageError(f"policy {self.name!r} has no weights to update")

    async def aclose(self) -> None:  # noqa: B027
        """Release what the policy holds; a second call does nothing."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy's factory may need.

    Attributes:
        env_id: The environment it will act in, if one is fixed.
        env_kwargs: The arguments that environment is made with.
        options: The policy's own options.
    """

    env_id: str | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
