"""The process that outlives its owner and cleans up what is left of its sandboxes.

Invariant: it is a session of its own, holds nothing of its owner's but a pipe, and its only trigger is the
end of that pipe, which no way of dying can prevent. What it does then is what ``agentgym sandbox gc`` does.
"""

from __future__ import annotations

import os
import subprocess
import sys

from agentgym.errors import SandboxFailed
from agentgym.sandboxes import records

_CODE = (
    "import os,sys\n"
    "import signal\n"
    "for s in (signal.SIGINT,signal.SIGTERM,signal.SIGHUP):signal.signal(s,signal.SIG_IGN)\n"
    "while os.read(0,1):pass\n"
    "os.execv(sys.executable,[sys.executable,'-P','-m','agentgym.sandboxes.reaper',*sys.argv[1:]])\n"
)
_kept: list[subprocess.Popen[bytes]] = []
"""It shall outlive this process: nobody waits for it, and an object that is dropped would warn of that."""


def start() -> int:
    """Start one for this process.

    Returns:
        The end of the pipe that this process holds; it is never closed.

    Raises:
        SandboxFailed: It cannot be started.
    """
    read, write = os.pipe()
    try:
        pid = os.getpid()
        started = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, str(pid), str(records.start_of(pid))],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        os.close(write)
        raise SandboxFailed(f"cannot start the process that cleans up: {error}") from error
    finally:
        os.close(read)
    _kept.append(started)
    return write


def main(pid: int, started: int) -> None:
    """Clean up after a process."""
    records.collect(lambda record: (record.pid, record.started) == (pid, started) or record.orphaned)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
