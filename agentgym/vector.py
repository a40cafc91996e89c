"""Vector environments over text. Invariant: strings never go through Gymnasium's shared memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from agentgym.errors import UsageError
from agentgym.registry import make


def make_vec(
    id: str,
    num_envs: int = 1,
    *,
    mode: Literal["sync", "async"] = "sync",
    autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    **kwargs: Any,
) -> VectorEnv[Any, Any, Any]:
    """``num_envs`` copies of an environment as one Gymnasium vector environment.

    Args:
        id: As :func:`agentgym.make`.
        num_envs: How many.
        mode: ``sync`` steps them in turn; ``async`` runs one process each, over pipes.
        autoreset_mode: Gymnasium's autoreset semantics.
        **kwargs: Arguments of the environment.

    Returns:
        A vector environment; observations and actions are tuples of strings.

    Raises:
        UsageError: ``num_envs`` is not positive.
    """
    if num_envs < 1:
        raise UsageError(f"a vector environment has at least one copy, not {num_envs}", hint="num_envs=1")
    constructors = [partial(_construct, id, kwargs) for _ in range(num_envs)]
    if mode == "async":
        return AsyncVectorEnv(constructors, shared_memory=False, autoreset_mode=autoreset_mode)
    return SyncVectorEnv(constructors, autoreset_mode=autoreset_mode)


def _construct(id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    import agentgym as agentgym  # a spawned worker has to register the built-in ids

    return make(id, **kwargs)
