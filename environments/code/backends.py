"""Sandbox backends that environments share.

Invariants: on one event loop, environments that ask for the same backend have the same one, and start no more
sandboxes of it at a time than the machine takes; the last of them to give it up closes it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from agentgym.sandboxes import Backend, Sandbox, SandboxSpec, make_backend
from agentgym.sandboxes.pool import Admission


@dataclass(slots=True)
class Lease:
    """One environment's share of a backend.

    Attributes:
        backend: The backend, until :meth:`release`.
        loop: The event loop that it and its sandboxes belong to.
    """

    backend: Backend
    loop: asyncio.AbstractEventLoop
    _key: str
    _admission: Admission
    _released: bool = field(default=False, repr=False)

    async def start(self, spec: SandboxSpec, owner: str) -> Sandbox:
        """Start a sandbox when it is its turn; raises as :meth:`~agentgym.sandboxes.Backend.start`."""
        async with self._admission.start():
            return await self.backend.start(spec, owner=owner)

    async def release(self) -> None:
        """Give it up; a second call does nothing."""
        if self._released:
            return
        self._released = True
        with _lock:
            shares = _shared[self.loop]
            shares[self._key].users -= 1
            last = shares[self._key].users == 0
            if last:
                del shares[self._key]
        if last:
            await self.backend.aclose()

    def abandon(self) -> None:
        """Give it up, and whatever else the loop held: the loop is gone."""
        self._released = True
        _abandon(self.loop)


@dataclass(slots=True)
class _Share:
    backend: Backend
    admission: Admission = field(default_factory=Admission)
    users: int = 0


_lock = threading.Lock()
_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Share]] = WeakKeyDictionary()


def lease(name: str, options: Mapping[str, Any]) -> Lease:
    """A share of the running loop's backend ``name`` with ``options``.

    Raises:
        UnknownName: There is no such backend.
        MissingDependency: What it needs is not installed.
        UsageError: It refuses to start so.
    """
    for other in list(_shared):
        if other.is_closed():
            _abandon(other)
    loop = asyncio.get_running_loop()
    key = f"{name} {sorted(options.items())!r}"
    with _lock:
        shares = _shared.setdefault(loop, {})
        if key not in shares:
            shares[key] = _Share(make_backend(name, **options))
        shares[key].users += 1
        return Lease(shares[key].backend, loop, key, shares[key].admission)


def _abandon(loop: asyncio.AbstractEventLoop) -> None:
    """End what a loop that is gone held."""
    with _lock:
        shares = _shared.pop(loop, {})
    for share in shares.values():
        share.backend.abandon()
