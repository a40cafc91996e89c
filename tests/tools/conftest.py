"""Sandboxes for the tools that work in one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar

import pytest

from agentgym.sandboxes import Sandbox, SandboxSpec, make_backend

T = TypeVar("T")


class Play(Protocol):
    """Runs a coroutine with a sandbox of its own."""

    def __call__(self, body: Callable[[Sandbox], Awaitable[Any]], spec: SandboxSpec | None = None) -> Any: ...


@pytest.fixture(
    params=[
        "process",
        pytest.param("bubblewrap", marks=pytest.mark.bubblewrap),
        pytest.param("docker", marks=pytest.mark.docker),
    ]
)
def play(request: pytest.FixtureRequest) -> Iterator[Play]:
    def run(body: Callable[[Sandbox], Awaitable[Any]], spec: SandboxSpec | None = None) -> Any:
        async def main() -> Any:
            backend = make_backend(request.param, **({"unsafe": True} if request.param == "process" else {}))
            try:
                async with await backend.start(spec) as sandbox:
                    return await body(sandbox)
            finally:
                await backend.aclose()

        return asyncio.run(main())

    yield run


@pytest.fixture
def broken() -> Callable[[Callable[[Sandbox], Awaitable[Any]]], Any]:
    """Runs a coroutine with a sandbox whose worker was killed, which only plain processes allow."""

    def run(body: Callable[[Sandbox], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with await make_backend("process", unsafe=True).start() as sandbox:
                await sandbox.exec("kill -9 $PPID")
                return await body(sandbox)

        return asyncio.run(main())

    return run
