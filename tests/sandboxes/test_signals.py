"""What a command inside inherits: signals that end it, as anywhere."""

from __future__ import annotations

import asyncio

import pytest

from agentgym.sandboxes import make_backend

pytestmark = pytest.mark.bubblewrap


def test_a_command_can_be_ended_by_another_one_inside() -> None:
    async def ask() -> tuple[int, int]:
        async with make_backend("bubblewrap") as backend:
            async with await backend.start() as sandbox:
                served = await sandbox.exec("timeout 0.1 sleep 30; echo $?", seconds=20)
            once = await backend.run(["/bin/sh", "-c", "sleep 30 & kill $!; wait $!; echo $?"], seconds=20)
        return int(served.stdout), int(once.stdout)

    assert asyncio.run(ask()) == (124, 128 + 15)
