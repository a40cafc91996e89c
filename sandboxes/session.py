"""Interpreters that go on inside a sandbox: a shell, and Python.

Invariants: every command has a deadline and one answer; an interpreter that ended, whoever ended it, is an
answer that says so, and the next command gets a fresh one; what is kept of an output is bounded, and what is
cut is counted. A command is told from the next by a mark of its own, which no earlier command could know.

Fork and restore know nothing of sessions: make new ones, and replay what made the state.
"""

from __future__ import annotations

import asyncio
import codecs
import secrets
import shlex
import signal
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib import resources

from agentgym.errors import UsageError
from agentgym.sandboxes.base import Process, Sandbox

LIMIT = 16_000
"""Characters kept of one command's output where nothing else is said."""

LONGEST = 200_000
"""Longest command, in characters."""

START_SECONDS = 20.0
PATIENCE = 1.0
"""Seconds that an interrupted command has to end before its interpreter is killed."""
INTERRUPTS = 3
DRAIN_SECONDS = 0.5

_MARK = 32
_STATUS = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gave.

    Attributes:
        output: What it and all that it started wrote, both streams in order; its middle is left out where it
            is too long, and a line in its place says how much.
        status: The exit status of a shell's command; of Python, 1 where the code raised. ``None`` where the
            interpreter ended.
        cut: Characters left out of ``output``.
        timed_out: The deadline passed, and the command was interrupted.
        lost: Why the interpreter and all its state are gone; empty while it goes on.
    """

    output: str
    status: int | None
    cut: int = 0
    timed_out: bool = False
    lost: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.status == 0 and not self.timed_out and not self.lost


class Session(ABC):
    """An interpreter in a sandbox, started by the first command. Commands run one after another.

    Args:
        sandbox: Where; its end is the session's end.
        limit: Characters kept of one command's output.

    Raises:
        UsageError: ``limit`` is too small to be of use.
    """

    what: str
    """What a person calls the interpreter."""

    def __init__(self, sandbox: Sandbox, *, limit: int = LIMIT) -> None:
        if limit < 100:
            raise UsageError(f"limit is {limit} characters", hint="give 100 or more")
        self.sandbox, self.limit = sandbox, limit
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    @abstractmethod
    def _command(self) -> list[str]:
        """What starts the interpreter."""

    @abstractmethod
    def _request(self, command: str, mark: str) -> bytes:
        """What makes it run ``command`` and write a new line, ``mark``, a space, a status and a new line."""

    async def run(self, command: str, *, seconds: float) -> Answer:
        """Run a command, with what earlier ones left.

        Args:
            command: What to run; it reads nothing from standard input.
            seconds: Its deadline; it is counted from the command's start.

        Raises:
            UsageError: There is nothing to run, or it is too long, or holds a NUL; or no deadline.
            SandboxEnded, SandboxFailed: As :meth:`Sandbox.exec`.
        """
        if not seconds > 0:
            raise UsageError(f"the deadline of a command is {seconds}", hint="give seconds above 0")
        if (problem := refusal(command)) is not None:
            raise UsageError(problem)
        async with self._turn:
            try:
                return await self._run(command, seconds)
            except BaseException:
                # Nobody knows what it is at now: cancelled in its midst, or without its sandbox.
                await self._drop()
                raise

    async def close(self) -> None:
        """End the interpreter; a later command starts a fresh one."""
        async with self._turn:
            await self._drop()

    async def _run(self, command: str, seconds: float) -> Answer:
        kept = Kept(self.limit)
        if self._process is not None and (gone := await self._gone(kept)):
            await self._drop()
            kept.note(f"[{gone} since the last command: its state is lost, and this is a new one]\n")
        if self._process is None and (problem := await self._start(kept)):
            await self._drop()
            return Answer(kept.text, None, kept.cut, lost=problem)
        process, mark = self._process, secrets.token_hex(_MARK // 2)
        assert process is not None
        await process.write(self._request(command, mark))
        status = await self._until(process, mark, seconds, kept)
        timed_out = status == "late"
        for _ in range(INTERRUPTS):
            if status != "late":
                break
            await process.signal(int(signal.SIGINT))
            status = await self._until(process, mark, PATIENCE, kept)
        lost = ""
        if isinstance(status, str):
            lost = f"{self.what} did not stop and was killed" if status == "late" else self._ended(process)
            kept.release()
            await self._drop()
        code = status if isinstance(status, int) else None
        return Answer(kept.text, code, kept.cut, timed_out, lost)

    async def _start(self, kept: Kept) -> str:
        """Start an interpreter; returns what is wrong with it."""
        mark = secrets.token_hex(_MARK // 2)
        self._process = await self.sandbox.open(self._command())
        await self._process.write(self._request("", mark))
        status = await self._until(self._process, mark, START_SECONDS, kept)
        if isinstance(status, int):
            return ""
        if status == "late":
            # Whether a sandbox still works is not the session's to judge: this raises where it does not.
            await self.sandbox.exec(["true"], seconds=START_SECONDS)
            return f"{self.what} did not start within {START_SECONDS:g} s"
        return f"{self.what} cannot be started ({self._ended(self._process)})"

    async def _gone(self, kept: Kept) -> str:
        """How the interpreter ended since the last command; takes what came from the background."""
        process, until = self._process, asyncio.get_running_loop().time() + DRAIN_SECONDS
        assert process is not None
        try:
            while (piece := await process.read(0)) is not None:
                kept.add(piece[1])
                if asyncio.get_running_loop().time() > until:
                    return ""
        except TimeoutError:
            return ""
        return self._ended(process)

    async def _until(self, process: Process, mark: str, seconds: float, kept: Kept) -> int | str:
        """Read up to ``mark``; returns the status, ``late``, or ``ended``."""
        loop = asyncio.get_running_loop()
        until, wanted = loop.time() + seconds, f"\n{mark} ".encode()
        try:
            # Asked for at every piece: output that never stops would hide the deadline.
            while (left := until - loop.time()) > 0:
                piece = await process.read(left)
                if piece is None:
                    return "ended"
                stream, data = piece
                if stream == "stderr":
                    kept.add(data)
                    continue
                status = kept.scan(data, wanted)
                if status is not None:
                    return status
        except TimeoutError:
            pass
        return "late"

    def _ended(self, process: Process) -> str:
        code = process.returned or 0
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return f"{self.what} was killed by {name}"
        return f"{self.what} ended with status {code}"

    async def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.close()


class ShellSession(Session):
    """A bash. Its directory, variables, functions and background processes go on from command to command.

    Standard input is empty. ``exit`` ends the shell, and so does whatever else ends a bash. A command that is
    over its deadline is interrupted as by Ctrl-C, and the shell goes on where that suffices.
    """

    what = "the shell"

    def _command(self) -> list[str]:
        return ["bash", "--norc", "--noprofile"]

    def _request(self, command: str, mark: str) -> bytes:
        # The shell's own way out is a descriptor that no command has. A trapped interrupt would end only what
        # runs in the foreground; `break`, out of the loop around the command, ends the rest of it.
        setup = "exec 254>&1; trap 'break 999 2>/dev/null' INT; " if not command else ""
        ran = f"for _ in 1; do eval {shlex.quote(command)} </dev/null >&254 2>&1 254>&-; done"
        told = f"builtin printf '\\n%s %d\\n' {mark} $? >&254"
        return f"{setup}{ran}; {told}\n".encode("utf-8", "replace")


class PythonSession(Session):
    """A Python interpreter of the sandbox's. Names and modules go on from cell to cell.

    The value of a cell's last expression is shown, as by a REPL; standard input is empty. A cell that is over
    its deadline gets a ``KeyboardInterrupt``, and the interpreter goes on where that suffices.
    """

    what = "the interpreter"

    def _command(self) -> list[str]:
        return ["python3", "-u", "-c", _source()]

    def _request(self, command: str, mark: str) -> bytes:
        text = command.encode("utf-8", "replace")
        return len(text).to_bytes(4, "big") + mark.encode() + text


class Kept:
    """The beginning and the end of a text that comes in pieces, and how much of its middle was left out.

    Args:
        limit: Characters kept.
    """

    def __init__(self, limit: int) -> None:
        self._first, self._most = limit // 2, limit - limit // 2
        self._head: list[str] = []
        self._tail: deque[str] = deque()
        self._ending = 0
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.cut = 0

    @property
    def text(self) -> str:
        """What is kept, with a line where something is left out."""
        gap = f"\n… [{self.cut} characters left out] …\n" if self.cut else ""
        return "".join(self._head) + gap + "".join(self._tail)

    def add(self, data: bytes) -> None:
        """The next bytes, in UTF-8."""
        self.note(self._decoder.decode(data))

    def note(self, text: str) -> None:
        """The next characters."""
        if self._first and text:
            self._head.append(text[: self._first])
            self._first, text = max(0, self._first - len(text)), text[self._first :]
        if text:
            self._tail.append(text)
            self._ending += len(text)
        while self._ending > self._most:
            over = self._ending - self._most
            piece = self._tail.popleft()
            if len(piece) > over:
                self._tail.appendleft(piece[over:])
            gone = min(over, len(piece))
            self._ending, self.cut = self._ending - gone, self.cut + gone

    def scan(self, data: bytes, mark: bytes) -> int | None:
        """The next bytes, which may hold ``mark``; then the status after it.

        What could be the beginning of a mark is held back.
        """
        self._held += data
        place = self._held.find(mark)
        if place < 0:
            if (loose := len(self._held) - len(mark) + 1) > 0:
                self.add(self._held[:loose])
                self._held = self._held[loose:]
            return None
        status, end, rest = self._held[place + len(mark) :].partition(b"\n")
        if not end and len(status) < _STATUS:
            return None
        self.add(self._held[:place])
        self._held = b""
        self.add(rest)
        return int(status) if status.isdigit() and len(status) < _STATUS else 255

    def release(self) -> None:
        """What was held back is no mark."""
        self.add(self._held)
        self._held = b""


def refusal(command: str) -> str | None:
    """Why a command cannot be run as it is; ``None`` where it can."""
    if not command.strip():
        return "there is nothing to run"
    if len(command) > LONGEST:
        return f"that has {len(command)} characters, and at most {LONGEST} are run"
    return "a NUL cannot be run" if "\0" in command else None


@cache
def _source() -> str:
    return resources.files("agentgym.sandboxes").joinpath("interpreter.py").read_text("utf-8")
