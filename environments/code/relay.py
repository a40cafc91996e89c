"""Tests in one sandbox, the code that they test in another, and calls that are relayed between them.

Invariant: the judge's sandbox runs nothing but the tests, and no part of the tests reaches the other one.
What crosses is one line a call and one line a result (:mod:`agentgym.environments.code.relayed`), which the
host passes on unread. So the code that is judged cannot see the tests, change how they run, end them early,
or answer in their place. That the code stops answering, in whatever way, is a failed test; that the tests do
not start is :class:`~agentgym.errors.JudgeFailed`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentgym.environments.code import relayed
from agentgym.errors import JudgeFailed
from agentgym.sandboxes import Process, Sandbox, SandboxEnded

PYTHON = "/usr/bin/python3"
INSIDE = "relayed.py"
START_SECONDS = 60.0
"""Deadline of the judge's start, which has nothing to do with the code that is judged."""

_SOURCE = Path(relayed.__file__).read_bytes()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the tests.

    Attributes:
        passed: Whether all passed.
        why: Where not: ``test``, ``time``, ``silence`` (the code ended or broke the protocol), or ``size``.
        calls: Number of calls that were relayed.
    """

    passed: bool
    why: str = ""
    calls: int = 0


async def relay(
    judge: Sandbox, candidate: Sandbox, *, tests: str, programs: Sequence[str], function: str, seconds: float
) -> Verdict:
    """Run tests against code.

    Args:
        judge: A sandbox for the tests, fresh.
        candidate: A sandbox for the code, fresh.
        tests: Program that defines ``check(candidate)``, which raises where a test fails.
        programs: The code, as programs that are run one after the other in one namespace.
        function: The function in it that the tests call.
        seconds: Deadline of all tests together.

    Raises:
        JudgeFailed: The tests do not start.
        SandboxFailed: The machinery around a sandbox broke.
    """
    try:
        asking, answering = await asyncio.gather(
            _opened(judge, "judge", {"program": tests}),
            _opened(candidate, "candidate", {"programs": list(programs), "function": function}),
        )
    except SandboxEnded as error:
        raise JudgeFailed(f"a sandbox for the tests ended before they started: {error.why}") from error
    try:
        try:
            if await asking.line(START_SECONDS) != b"ready":
                raise JudgeFailed("the tests do not start", hint="obtain the data anew")
        except (TimeoutError, SandboxEnded, Silent) as error:
            raise JudgeFailed(f"the tests do not start: {error}") from error
        return await _relayed(asking, answering, seconds)
    finally:
        for speaker in (asking, answering):
            await speaker.process.close()


async def _relayed(asking: Speaker, answering: Speaker, seconds: float) -> Verdict:
    loop = asyncio.get_running_loop()
    end, calls = loop.time() + seconds, 0
    try:
        while True:
            asked = await asking.line(end - loop.time())
            if not asked.startswith(b"?"):
                return Verdict(True, "", calls) if asked == b"passed" else Verdict(False, "test", calls)
            calls += 1
            await answering.process.write(asked[1:] + b"\n")
            reply = await answering.line(end - loop.time())
            await asking.process.write(reply + b"\n")
    except TimeoutError:
        return Verdict(False, "time", calls)
    except (SandboxEnded, Silent):
        return Verdict(False, "silence", calls)
    except TooLong:
        return Verdict(False, "size", calls)


class Silent(Exception):
    """A process ended instead of writing a line."""


class TooLong(Exception):
    """A process wrote a line that is longer than any value."""


@dataclass(slots=True)
class Speaker:
    """A process that is spoken to in lines.

    Attributes:
        process: The process.
        held: What it wrote beyond the last line that was taken.
    """

    process: Process
    held: bytes = b""

    async def line(self, seconds: float) -> bytes:
        """Its next line, without the line's end.

        Raises:
            TimeoutError: None came within ``seconds``.
            Silent: It ended.
            TooLong: The line is longer than any value.
            SandboxEnded: Its sandbox ended.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while b"\n" not in self.held:
            if len(self.held) > relayed.LONGEST:
                raise TooLong
            if (left := end - loop.time()) <= 0:
                raise TimeoutError
            piece = await self.process.read(left)
            if piece is None:
                raise Silent("its process ended")
            if piece[0] == "stdout":
                self.held += piece[1]
        first, _, self.held = self.held.partition(b"\n")
        return first


async def _opened(sandbox: Sandbox, role: str, told: dict[str, Any]) -> Speaker:
    await sandbox.write(INSIDE, _SOURCE)
    process = await sandbox.open([PYTHON, "-I", INSIDE, role])
    await process.write(json.dumps(told).encode() + b"\n")
    return Speaker(process)
