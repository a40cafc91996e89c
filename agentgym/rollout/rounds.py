"""Calls of the policy: one request at a time, or in rounds of all live episodes.

Invariants: a call has a deadline and one completion a request; what breaks in it is the policy's failure,
and a caller's mistake stays one. A round holds one request of every live episode, ordered by id, so it
depends on the episodes alone and not on who was faster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from agentgym.errors import AgentGymError, DeadlineExceeded, PolicyFailed
from agentgym.policies.base import Completion, Policy, Request


class Rounds:
    """Gathers one request of every live episode, and samples them in one call.

    A call that fails fails all episodes of its round. A policy that could not answer one request only says
    so in that completion: its ``finish_reason`` is ``abort``.

    Args:
        policy: Who answers.
        seconds: Deadline of a call.
        width: Episodes alive at once.
        episodes: Episodes in all; each calls :meth:`leave` when it has ended.
    """

    def __init__(self, policy: Policy, seconds: float, width: int, episodes: int) -> None:
        self._policy, self._seconds, self._width, self._left = policy, seconds, width, episodes
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> Completion:
        """The completion of ``request``, when all live episodes have asked.

        Raises:
            PolicyFailed: The round's call failed.
            DeadlineExceeded: It took too long.
        """
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._fire_when_full()
        return await future

    def leave(self) -> None:
        """One episode has ended."""
        self._left -= 1
        self._waiting = [(r, f) for r, f in self._waiting if not f.done()]
        self._fire_when_full()

    async def aclose(self) -> None:
        """Cancel the call in flight."""
        self._waiting.clear()
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def _fire_when_full(self) -> None:
        # Slots that ended episodes left are filled before the call: a round is the same in every run.
        if self._waiting and len(self._waiting) >= min(self._left, self._width):
            batch, self._waiting = sorted(self._waiting, key=lambda pair: pair[0].id), []
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, batch: Sequence[tuple[Request, asyncio.Future[Completion]]]) -> None:
        try:
            completions = await generate(self._policy, [request for request, _ in batch], self._seconds)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), completion in zip(batch, completions, strict=True):
            if not future.done():
                future.set_result(completion)


async def generate(policy: Policy, requests: Sequence[Request], seconds: float) -> list[Completion]:
    """One completion a request, within ``seconds``.

    Raises:
        DeadlineExceeded: The policy took longer.
        PolicyFailed: It raised something that is no :class:`AgentGymError`, or lost a request.
        AgentGymError: What the policy raised on purpose: a full context, a mistake that no retry would mend.
    """
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            completions = await policy.generate(requests)
    except AgentGymError:
        raise
    except Exception as error:
        if deadline.expired():
            raise DeadlineExceeded("generate", seconds, boundary="policy") from error
        raise PolicyFailed(f"generate raised {type(error).__name__}: {error}") from error
    if len(completions) != len(requests):
        raise PolicyFailed(f"generate answered {len(requests)} requests with {len(completions)} completions")
    return completions
