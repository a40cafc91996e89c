"""Sandboxes that are ready before they are asked for, and no more starts at a time than the machine takes.

Invariants: a sandbox is given out once and closed afterwards, so nobody meets what another's code left;
whoever waits is served in order; a lease that runs out closes its sandbox, whoever holds it; a start that
fails is told to the one who asked, and is never counted as a sandbox; and ``aclose`` ends all of them.

How many start at a time follows what starting costs (additive increase, multiplicative decrease): a start
that takes much longer than the quickest one so far, or fails, halves the number; every other adds a little.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentgym.arguments import between
from agentgym.errors import DeadlineExceeded, SandboxFailed, UsageError
from agentgym.sandboxes import records
from agentgym.sandboxes.base import Backend, Sandbox, SandboxSpec

LEASE = 3600.0
WAIT = 300.0
SLOW = 4.0
"""A start this many times as long as the quickest one means that the machine is loaded."""

NOTICEABLE = 0.25
"""Seconds: a shorter start is never called slow."""

LITTLE_MEMORY = 1 << 30
"""Bytes of memory below which nothing more is started while something runs."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Admission:
    """How many may start at a time.

    Attributes:
        most: Never more; default: eight for each processor.
        allowed: How many now; a fraction counts towards the next.
        quickest: Seconds of the quickest start so far.
    """

    most: int = field(default_factory=lambda: 8 * _cores())
    allowed: float = 2.0
    quickest: float = float("inf")
    _starting: int = 0
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    @asynccontextmanager
    async def start(self) -> AsyncIterator[None]:
        """A place to start something in, waited for in order; how long it took is noted."""
        if self._starting < self.places:
            self._starting += 1
        else:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting  # whoever ends it has counted this one
            except asyncio.CancelledError:
                if not waiting.cancelled():
                    self._end()
                raise
        try:
            with self.noted():
                yield
        finally:
            self._end()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note how long a start takes, or that it fails; one that is cancelled tells nothing."""
        begun = time.monotonic()
        try:
            yield
        except Exception:
            self.failed()
            raise
        self.took(time.monotonic() - begun)

    def _end(self) -> None:
        """Give a place back, and let in whoever waits for one."""
        self._starting -= 1
        while self._waiting and self._starting < self.places:
            if not (waiting := self._waiting.popleft()).done():
                self._starting += 1
                waiting.set_result(None)

    @property
    def places(self) -> int:
        """How many may start now."""
        return max(1, int(self.allowed))

    def took(self, seconds: float) -> None:
        """A start came to its end."""
        self.quickest = min(self.quickest, seconds)
        if seconds > max(NOTICEABLE, SLOW * self.quickest):
            self.failed()
        else:
            self.allowed = min(float(self.most), self.allowed + 1 / self.allowed)

    def failed(self) -> None:
        """A start failed, or took too long."""
        self.allowed = max(1.0, self.allowed / 2)


class SandboxPool:
    """Sandboxes of one backend and one spec.

    Args:
        backend: Starts them; the pool does not close it.
        spec: What they are made of.
        warm: How many are kept ready.
        most: How many there are at a time, given out and ready ones together.
        lease: Seconds after which one that was given out is closed.
        owner: A label for ``agentgym sandbox ps``.
        memory: Tells how many bytes of memory the machine has left.
    """

    def __init__(
        self,
        backend: Backend,
        spec: SandboxSpec | None = None,
        *,
        warm: int = 2,
        most: int = 64,
        lease: float = LEASE,
        owner: str = "",
        memory: Callable[[], int] | None = None,
    ) -> None:
        self._backend, self._spec, self._owner = backend, spec or SandboxSpec(), owner
        self._most = between("most", most, 1, 10_000)
        self._warm = between("warm", warm, 0, self._most)
        if not lease > 0:
            raise UsageError(f"lease is {lease}", hint="give seconds above 0")
        self._lease, self._memory = lease, memory or free_memory
        self.admission = Admission()
        self._ready: deque[Sandbox] = deque()
        self._given: dict[str, tuple[Sandbox, asyncio.TimerHandle]] = {}
        self._waiting: deque[asyncio.Future[Sandbox]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._closed = False
        self._reconciled = False

    @property
    def size(self) -> int:
        """Sandboxes that there are: given out, ready, and starting."""
        return len(self._ready) + len(self._given) + self._starting

    async def acquire(self, *, seconds: float = WAIT) -> Sandbox:
        """A sandbox that nobody has used; give it back by :meth:`release`.

        Args:
            seconds: How long to wait for one.

        Raises:
            DeadlineExceeded: None could be had in time.
            SandboxFailed: It could not be started.
            UsageError: The pool is closed.
        """
        if self._closed:
            raise UsageError("this pool of sandboxes is closed", hint="make a new one")
        if not self._reconciled:
            self._reconciled = True
            self._keep(self._reconcile())
        waiting: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._move()
        try:
            async with asyncio.timeout(seconds):
                sandbox = await waiting
        except TimeoutError:
            if waiting.done() and not waiting.cancelled():
                # A loop that was held up finds the answer and the deadline at once: the answer was first.
                return waiting.result()
            raise DeadlineExceeded("a sandbox of the pool", seconds, boundary="sandbox") from None
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._keep(self.release(waiting.result()))
            raise
        return sandbox

    async def release(self, sandbox: Sandbox) -> None:
        """Close a sandbox that was given out; one that is known no more is no matter."""
        held = self._given.pop(sandbox.id, None)
        if held is not None:
            held[1].cancel()
        await sandbox.close()
        self._move()

    def renew(self, sandbox: Sandbox) -> None:
        """Begin a sandbox's lease anew.

        Raises:
            UsageError: It is not given out: its lease ran out, or it was released.
        """
        if sandbox.id not in self._given:
            raise UsageError(f"the sandbox {sandbox.id} is not given out by this pool")
        self._given[sandbox.id][1].cancel()
        self._hand_out(sandbox)

    @asynccontextmanager
    async def sandbox(self, *, seconds: float = WAIT) -> AsyncIterator[Sandbox]:
        """One for the length of a block; raises as :meth:`acquire`."""
        held = await self.acquire(seconds=seconds)
        try:
            yield held
        finally:
            await self.release(held)

    async def aclose(self) -> None:
        """Close every sandbox, given out or not; whoever waits is refused."""
        self._closed = True
        while self._waiting:
            if not (waiting := self._waiting.popleft()).done():
                waiting.set_exception(UsageError("this pool of sandboxes is closed"))
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        held = [sandbox for sandbox, _ in self._given.values()]
        for _, timer in self._given.values():
            timer.cancel()
        self._given.clear()
        ready, self._ready = list(self._ready), deque()
        for done in await asyncio.gather(*(s.close() for s in (*held, *ready)), return_exceptions=True):
            if isinstance(done, BaseException):
                _log.warning("a sandbox could not be closed: %s", done)

    async def __aenter__(self) -> SandboxPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # Its parts ------------------------------------------------------------------------------

    def _move(self) -> None:
        """Give out what is ready, and start what is missing."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        while self._ready and self._waiting:
            sandbox, waiting = self._ready.popleft(), self._waiting.popleft()
            if waiting.done():
                self._ready.appendleft(sandbox)
                continue
            if sandbox.ended:
                self._keep(sandbox.close())
                self._waiting.appendleft(waiting)
                continue
            self._hand_out(sandbox)
            waiting.set_result(sandbox)
        wanted = len(self._waiting) + self._warm - len(self._ready) - self._starting
        while wanted > 0 and not self._closed and self.size < self._most and self._admitted():
            wanted -= 1
            self._starting += 1
            self._keep(self._start())

    async def _reconcile(self) -> None:
        """Remove what owners that died without a reaper left."""
        await asyncio.to_thread(records.collect)

    def _admitted(self) -> bool:
        if self._starting >= self.admission.places:
            return False
        return not self.size or self._memory() >= LITTLE_MEMORY

    async def _start(self) -> None:
        try:
            with self.admission.noted():
                sandbox = await self._backend.start(self._spec, owner=self._owner)
        except Exception as error:
            self._starting -= 1
            waiting = next((one for one in self._waiting if not one.done()), None)
            if waiting is not None:
                self._waiting.remove(waiting)
                waiting.set_exception(error)
                self._move()
            else:
                # A warm one that nobody waits for: it is tried again when somebody does.
                _log.warning("a sandbox could not be started: %s", error)
            return
        self._starting -= 1
        if self._closed:
            await sandbox.close()
            return
        self._ready.append(sandbox)
        self._move()

    def _hand_out(self, sandbox: Sandbox) -> None:
        timer = asyncio.get_running_loop().call_later(self._lease, self._expire, sandbox)
        self._given[sandbox.id] = sandbox, timer

    def _expire(self, sandbox: Sandbox) -> None:
        _log.warning("the lease of the sandbox %s ran out after %g s", sandbox.id, self._lease)
        self._keep(self.release(sandbox))

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            if isinstance(error := task.exception(), SandboxFailed):
                _log.warning("%s", error.message)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that the machine has left; very many where it does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62
