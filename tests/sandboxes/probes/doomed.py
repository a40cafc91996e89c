"""A process that uses sandboxes in every way until it is killed.

``python doomed.py BACKEND USER FOLDER SEED`` prints a line with its number once it runs, and
one once its first sandbox does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any

import battery

from agentgym.sandboxes import SandboxSpec, make_backend

SPEC = SandboxSpec(memory=64 << 20, disk=8 << 20)


async def live(kind: str, options: dict[str, Any], folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    backend = make_backend(kind, **options)

    async def one() -> None:
        async with contextlib.AsyncExitStack() as opened:
            sandbox = await opened.enter_async_context(await backend.start(SPEC, owner="doomed"))
            print("ready", flush=True)
            snapshot = None
            while draw.random() < 0.95:
                match draw.randrange(7):
                    case 0:
                        await sandbox.exec("sleep 30 & setsid sleep 30 & echo", seconds=5)
                    case 1:
                        asyncio.get_running_loop().create_task(_quiet(sandbox.exec("sleep 30")))
                    case 2:
                        opened.push_async_exit(await sandbox.fork())
                    case 3:
                        snapshot = await sandbox.snapshot()
                    case 4 if snapshot is not None:
                        await sandbox.restore(snapshot)
                    case 5:
                        await sandbox.write("file", b"x" * 1_000_000)
                        await sandbox.download("/work", folder / f"copy-{draw.random()}")
                    case _:
                        await backend.run(["/bin/true"], SPEC)

    print(os.getpid(), flush=True)
    while True:
        await asyncio.gather(*(one() for _ in range(2)))


async def _quiet(doing: Any) -> None:
    with contextlib.suppress(Exception):
        await doing


if __name__ == "__main__":
    given = battery.prepare(sys.argv[1])
    place = Path(sys.argv[3])
    if int(sys.argv[2]):
        battery.become(int(sys.argv[2]), place)
    asyncio.run(live(sys.argv[1], given, place, int(sys.argv[4])))
