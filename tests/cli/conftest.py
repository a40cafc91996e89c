"""The command line as a person has it: in this process, in a pipe, at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-c", "from agentgym.cli import main; main()"]


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go into a folder of the test's own; no traceback, no colour, a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTGYM_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def agentgym(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``agentgym ARGUMENTS`` in this process."""

    def run(*arguments: object) -> Result:
        from agentgym.cli import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def piped() -> Callable[..., Result]:
    """Run ``agentgym ARGUMENTS`` in a process of its own."""

    def run(*arguments: object, input: str = "", env: dict[str, str] | None = None) -> Result:
        command = [*COMMAND, *(str(argument) for argument in arguments)]
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **(env or {})},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


class Terminal:
    """A command at a pseudo-terminal of 30 rows and 100 columns."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", PYTHONWARNINGS="ignore")
            os.environ.pop("COLUMNS")
            os.execv(COMMAND[0], [*COMMAND, *(str(argument) for argument in arguments)])
        self.resize(30, 100)
        self._seen = ""
        self.code: int | None = None

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was written since the last call, up to and including ``text``, escape sequences taken out."""
        end = time.monotonic() + seconds
        while text not in (plain := re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", self._seen)):
            assert time.monotonic() < end and self._read(), f"{text!r} was not written, but: {plain!r}"
        self._seen = ""
        return plain

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._fd, keys.encode())

    def leave(self, keys: str) -> None:
        """Press keys until the command has ended, as a person would.

        An interrupt between a prompt and the wait for a key is only noticed with the next key: Python's
        readline has no atomic way to wait for both.
        """
        while self.alive():
            with contextlib.suppress(OSError):  # it has just closed the terminal
                self.type(keys)
            end = time.monotonic() + 3
            while self.alive() and time.monotonic() < end:
                time.sleep(0.05)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window's size."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def alive(self) -> bool:
        """Whether it runs."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return self.code is None and os.waitid(os.P_PID, self.pid, look) is None

    def wait(self) -> int:
        """The exit code, once the command has ended; what it wrote till then stays to be waited for."""
        while self._read():
            pass
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def close(self) -> None:
        """End the command."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    @property
    def left(self) -> str:
        """What was written and not yet waited for, escape sequences included."""
        return self._seen

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 60)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self._seen += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start ``agentgym ARGUMENTS`` at a pseudo-terminal."""
    started: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()
