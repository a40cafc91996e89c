"""The rollout engine: one asyncio loop, an episode is a coroutine.

Invariants: no episode waits for another's turn; every operation has a deadline; a failure of
infrastructure ends its own episode ``infra_failed`` and no other; a turn is in the journal before the next
one starts. With ``deterministic=True`` all live episodes are sampled in one call, ordered by id, so the
result depends on the episodes and seeds alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from agentgym.conversation import Conversation, Layout
from agentgym.errors import (
    AgentGymError,
    ContextExceeded,
    DeadlineExceeded,
    InfrastructureError,
    PolicyFailed,
    StorageFailed,
)
from agentgym.journal import Journal
from agentgym.messages import Role
from agentgym.outcome import TRUNCATION_REASONS, Outcome
from agentgym.policies.base import Completion, Policy, Request, Sampling, TurnView
from agentgym.rollout.host import Reply
from agentgym.rollout.pool import EnvPool, Handle
from agentgym.seeding import EpisodeSeeds
from agentgym.trajectory import Trajectory, Turn
from agentgym.wrappers.stack import EnvConfig


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode to run.

    Attributes:
        id: Unique in the run; in deterministic mode episodes are ordered by it.
        task_id: The task.
        split: The task's split, for the record.
        group: Index of the group; members of a group share the environment seed.
        member: Index in the group.
        attempt: Number of earlier attempts.
    """

    id: str
    task_id: str
    split: str = ""
    group: int = 0
    member: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How episodes are run. Times are in seconds.

    Attributes:
        concurrency: Episodes alive at once.
        deterministic: Sample all live episodes in one call, ordered by id.
        layout: ``chat``: one growing conversation; ``turn``: every turn is a prompt of its own.
        system: System message; how to answer is added, see :meth:`EnvConfig.system_message`.
        sampling: Sampling parameters.
        seed: Root of the seed tree.
        reset_seconds: Deadline of a reset.
        step_seconds: Deadline of a step.
        generate_seconds: Deadline of a completion, waiting for a batch included.
        episode_seconds: Limit of a whole episode: it ends ``truncated(time)``.
        max_sampled_tokens: Limit of an episode's sampled tokens: it ends ``truncated(tokens)``.
    """

    concurrency: int = 16
    deterministic: bool = False
    layout: Layout = "chat"
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    reset_seconds: float = 120.0
    step_seconds: float = 60.0
    generate_seconds: float = 600.0
    episode_seconds: float | None = None
    max_sampled_tokens: int | None = None


class RolloutEngine:
    """Runs episodes of one environment with one policy.

    Args:
        env: What to act in.
        policy: Who acts.
        config: How.
        journal: Where every turn is recorded before the next starts; optional.
        on_turn: Called after every finished turn, for progress.
    """

    def __init__(
        self,
        env: EnvConfig,
        policy: Policy,
        config: RolloutConfig | None = None,
        journal: Journal | None = None,
        *,
        on_turn: Callable[[Trajectory], None] | None = None,
    ) -> None:
        self.env, self.policy, self.config = env, policy, config or RolloutConfig()
        self.pool = EnvPool(env, self.config.concurrency)
        self._journal, self._on_turn = journal, on_turn
        self.system = env.system_message(self.config.system)
        self._barrier: _Barrier | None = None

    async def collect(
        self, episodes: Sequence[Episode], *, restored: Mapping[str, Trajectory] | None = None
    ) -> list[Trajectory]:
        """Run ``episodes`` to their ends; return their trajectories in the same order.

        Args:
            episodes: What to run.
            restored: Trajectories of an interrupted run, by episode id: ended ones are returned as they
                are, the turns of unended ones are replayed and the episode goes on from there.

        Raises:
            StorageFailed: The journal could not be written.
            AgentGymError: A mistake that no retry would mend (an unknown task, a missing extra).
        """
        done = {t.id: t async for t in self.stream(episodes, restored=restored)}
        return [done[episode.id] for episode in episodes]

    async def stream(
        self, episodes: Sequence[Episode], *, restored: Mapping[str, Trajectory] | None = None
    ) -> AsyncIterator[Trajectory]:
        """As :meth:`collect`, but yields each trajectory as it ends.

        Closing the iterator cancels the episodes in flight: they end ``cancelled``.
        """
        restored = restored or {}
        waiting: list[Episode] = []
        for episode in episodes:
            earlier = restored.get(episode.id)
            if earlier is not None and earlier.outcome is not None:
                yield earlier
            else:
                waiting.append(episode)
        if self.config.deterministic:
            self._barrier = _Barrier(self.policy, self.config, len(waiting))
        running: dict[asyncio.Task[Trajectory], Trajectory] = {}
        ended: asyncio.Queue[asyncio.Task[Trajectory]] = asyncio.Queue()
        queue = iter(waiting)
        try:
            while True:
                while len(running) < self.config.concurrency and (episode := next(queue, None)) is not None:
                    trajectory = self._blank(episode)
                    task = asyncio.create_task(self._run(episode, trajectory, restored.get(episode.id)))
                    task.add_done_callback(ended.put_nowait)
                    running[task] = trajectory
                if not running:
                    return
                task = await ended.get()
                del running[task]
                yield task.result()
        except GeneratorExit:
            await self._stop(running)
            for trajectory in running.values():
                trajectory.outcome = Outcome.cancelled("the caller stopped the collection")
                self._record(Journal.end, trajectory)
            raise
        finally:
            # An error or Ctrl-C: what is unfinished stays unfinished in the journal, and can be resumed.
            await self._stop(running)

    async def aclose(self) -> None:
        """Close the pool's environments. The policy and the journal belong to the caller."""
        await self.pool.aclose()

    def _blank(self, episode: Episode) -> Trajectory:
        seeds = self._seeds(episode)
        return Trajectory(
            id=episode.id,
            env_id=self.env.id,
            task_id=episode.task_id,
            split=episode.split,
            group=episode.group,
            member=episode.member,
            env_seed=seeds.environment,
            attempt=episode.attempt,
        )

    def _seeds(self, episode: Episode) -> EpisodeSeeds:
        return EpisodeSeeds(self.config.seed, episode.task_id, episode.group, episode.member)

    async def _run(self, episode: Episode, trajectory: Trajectory, earlier: Trajectory | None) -> Trajectory:
        """One episode, from lease to outcome."""
        live = _Live(self, episode, trajectory)
        try:
            async with asyncio.timeout(self.config.episode_seconds):
                async with self.pool.lease() as handle:
                    await live.play(handle, earlier)
        except TimeoutError:
            trajectory.outcome = Outcome.truncated("time", f"{self.config.episode_seconds:g} s are over")
        except StorageFailed:
            raise
        except InfrastructureError as error:
            # Before the first action the policy cannot be the cause; afterwards it may be.
            boundary = error.boundary
            outcome = Outcome.from_error(error, boundary)
            doubtful = boundary == "environment" and live.acted
            trajectory.outcome = Outcome.infra_failed(boundary, outcome.detail, doubtful=doubtful)
        finally:
            if self._barrier is not None:
                await self._barrier.leave()
        if not live.begun:
            self._record(Journal.begin, trajectory)
        self._record(Journal.end, trajectory)
        return trajectory

    def _record(self, what: Callable[[Journal, Trajectory], None], trajectory: Trajectory) -> None:
        if self._journal is not None:
            what(self._journal, trajectory)

    async def _stop(self, running: Mapping[asyncio.Task[Trajectory], Trajectory]) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Live:
    """The state of one running episode."""

    def __init__(self, engine: RolloutEngine, episode: Episode, trajectory: Trajectory) -> None:
        self.begun = False
        self.acted = False
        self._engine, self._episode, self._trajectory = engine, episode, trajectory
        self._config, self._policy = engine.config, engine.policy
        self._seeds = engine._seeds(episode)
        self._conversation: Conversation | None = None
        self._actions: list[str] = []
        self._role: Role = "tool" if engine.env.parser in ("hermes", "llama") else "user"

    async def play(self, handle: Handle, earlier: Trajectory | None) -> None:
        reply = await self._start(handle)
        if earlier is not None:
            self._trajectory.attempt = earlier.attempt + 1
            if earlier.turns:
                reply = await self._restore(handle, reply, earlier) or await self._start(handle)
        if not self.begun:
            self._engine._record(Journal.begin, self._trajectory)
            self.begun = True
        while self._trajectory.outcome is None:
            reply = await self._turn(handle, reply)
        self._trajectory.final_observation = reply.content

    async def _start(self, handle: Handle) -> Reply:
        trajectory = self._trajectory
        self._clear()
        reply = await handle.reset(trajectory.env_seed, self._episode.task_id, self._config.reset_seconds)
        trajectory.instruction = str(reply.info.get("instruction", ""))
        if self._policy.renderer is not None:
            self._conversation = Conversation(
                self._policy.renderer,
                system=self._engine.system,
                instruction=trajectory.instruction,
                layout=self._config.layout,
            )
            trajectory.segments = self._conversation.segments
        return reply

    def _clear(self) -> None:
        self._trajectory.turns, self._trajectory.segments, self._actions = [], [], []

    async def _restore(self, handle: Handle, reply: Reply, earlier: Trajectory) -> Reply | None:
        """Go on behind the recorded turns; ``None`` where they cannot be reproduced."""
        try:
            restored = await self._replay(handle, reply, earlier)
        except BaseException:
            self._clear()
            raise
        if restored is not None:
            self._trajectory.attempt = earlier.attempt
            self.begun = True
            self._end_if_over(restored)
        return restored

    async def _replay(self, handle: Handle, reply: Reply, earlier: Trajectory) -> Reply | None:
        """Take the recorded turns again; ``None`` where the environment or the template answers otherwise."""
        for turn in earlier.turns:
            if reply.content != turn.observation:
                return None
            if self._conversation is not None:
                self._conversation.read(reply.content, role=self._role)
                start, end = turn.span
                segment = earlier.segments[turn.segment]
                self._conversation.complete(
                    Completion(
                        turn.completion,
                        tuple(segment.token_ids[start:end]),
                        tuple(segment.logp_rollout[start:end]),
                    )
                )
            self.acted = True
            reply = await handle.step(turn.completion, self._config.step_seconds)
            if reply.reward != turn.reward:
                return None
            self._trajectory.turns.append(turn)
            self._actions.append(turn.action)
        if self._conversation is not None and self._conversation.segments != earlier.segments:
            return None
        return reply

    async def _turn(self, handle: Handle, reply: Reply) -> Reply:
        trajectory, config = self._trajectory, self._config
        index = len(trajectory.turns)
        prompt: tuple[int, ...] = ()
        if self._conversation is not None:
            prompt = self._conversation.read(reply.content, role=self._role)
        admissible = reply.info.get("admissible_actions")
        listed = None if admissible is None else tuple(admissible)
        request = Request(
            id=trajectory.id,
            prompt_ids=prompt,
            sampling=config.sampling,
            seed=self._seeds.sampler(index),
            turn=TurnView(
                trajectory.env_id, trajectory.task_id, trajectory.id, index, reply.content, listed,
                tuple(self._actions),
            ),
        )  # fmt: skip
        started = time.perf_counter()
        try:
            self._require_room(prompt)
            completion = await self._generate(request)
        except ContextExceeded as error:
            trajectory.outcome = Outcome.truncated("context", error.message)
            return reply
        generated = time.perf_counter()
        self.acted = True
        after = await handle.step(completion.text, config.step_seconds)
        stepped = time.perf_counter()
        segment, span = 0, (0, 0)
        if self._conversation is not None:
            segment, span = self._conversation.complete(completion)
        action = str(after.info.get("action", completion.text))
        trajectory.turns.append(
            Turn(
                index=index,
                segment=segment,
                span=span,
                observation=reply.content,
                completion=completion.text,
                action=action,
                reward=after.reward,
                valid_action=bool(after.info.get("valid_action", True)),
                finish_reason=completion.finish_reason,
                policy_version=completion.version,
                seed=request.seed,
                score=float(after.info.get("score", 0.0)),
                success=bool(after.info.get("success", False)),
                admissible_actions=listed,
                seconds={"generate": generated - started, "step": stepped - generated},
            )
        )
        self._actions.append(action)
        self._engine._record(Journal.turn, trajectory)
        if self._engine._on_turn is not None:
            self._engine._on_turn(trajectory)
        self._end_if_over(after)
        return after

    def _end_if_over(self, reply: Reply) -> None:
        limit = self._config.max_sampled_tokens
        if reply.terminated:
            self._trajectory.outcome = Outcome.completed()
        elif reply.truncated:
            reason = reply.info.get("truncated_by", "environment")
            self._trajectory.outcome = Outcome.truncated(
                reason if reason in TRUNCATION_REASONS else "environment"
            )
        elif limit is not None and self._trajectory.sampled_tokens >= limit:
            self._trajectory.outcome = Outcome.truncated("tokens")

    def _require_room(self, prompt: tuple[int, ...]) -> None:
        limit = self._policy.context_limit
        if limit is not None and len(prompt) + self._config.sampling.max_tokens > limit:
            raise ContextExceeded(len(prompt), limit)

    async def _generate(self, request: Request) -> Completion:
        if self._engine._barrier is not None:
            return await self._engine._barrier.generate(request)
        [completion] = await _generate(self._policy, [request], self._config.generate_seconds)
        return completion


class _Barrier:
    """Gathers one request of every live episode, and samples them in one call, ordered by id."""

    def __init__(self, policy: Policy, config: RolloutConfig, episodes: int) -> None:
        self._policy, self._config, self._left = policy, config, episodes
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._fire_when_full()
        return await future

    async def leave(self) -> None:
        """One episode has ended."""
        self._left -= 1
        self._waiting = [(r, f) for r, f in self._waiting if not f.done()]
        self._fire_when_full()

    def _fire_when_full(self) -> None:
        # Slots that ended episodes left are filled before the call: a round is the same in every run.
        if self._waiting and len(self._waiting) >= min(self._left, self._config.concurrency):
            batch, self._waiting = sorted(self._waiting, key=lambda pair: pair[0].id), []
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, batch: list[tuple[Request, asyncio.Future[Completion]]]) -> None:
        try:
            completions = await _generate(
                self._policy, [request for request, _ in batch], self._config.generate_seconds
            )
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), completion in zip(batch, completions, strict=True):
            if not future.done():
                future.set_result(completion)


async def _generate(policy: Policy, requests: Sequence[Request], seconds: float) -> list[Completion]:
    try:
        async with asyncio.timeout(seconds):
            completions = await policy.generate(requests)
    except TimeoutError as error:
        raise DeadlineExceeded("generate", seconds, boundary="policy") from error
    except AgentGymError:  # infrastructure, a full context, or a mistake that no retry would mend
        raise
    except Exception as error:
        raise PolicyFailed(f"generate raised {type(error).__name__}: {error}") from error
    if len(completions) != len(requests):
        raise PolicyFailed(f"generate answered {len(requests)} requests with {len(completions)} completions")
    return completions


@contextlib.asynccontextmanager
async def engine(
    env: EnvConfig,
    policy: Policy,
    config: RolloutConfig | None = None,
    journal: Journal | None = None,
    *,
    on_turn: Callable[[Trajectory], None] | None = None,
) -> AsyncIterator[RolloutEngine]:
    """A :class:`RolloutEngine` that closes its environments at the block's end."""
    made = RolloutEngine(env, policy, config, journal, on_turn=on_turn)
    try:
        yield made
    finally:
        await made.aclose()
