"""The process that outlives its owner and cleans up what is left of its sandboxes.

Invariant: it is a session of its own, holds nothing of its owner's but a pipe, and its only trigger is the
end of that pipe or of the owner itself, which no way of dying can prevent and no child that was forked can
put off. What it does then is what ``agentgym sandbox gc`` does.
"""

from __future__ import annotations

import os
import subprocess
import sys

from agentgym.errors import SandboxFailed
from agentgym.sandboxes import cgroups, records

_CODE = """
import os, select, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
owner, python, started, path = int(sys.argv[1]), *sys.argv[2:]
ends = select.poll()
ends.register(0, select.POLLIN)
try:
    ends.register(os.pidfd_open(owner), select.POLLIN)
except (AttributeError, OSError):
    pass
while os.getppid() == owner and not ends.poll(60_000):
    pass
code = (
    "import site, sys\\n"
    "for place in sys.argv[3].split(chr(31)): site.addsitedir(place)\\n"
    "from agentgym.sandboxes import reaper\\n"
    "reaper.main()"
)
os.execv(python, [python, "-I", "-c", code, str(owner), started, path])
"""


def start() -> int:
    """Start one for this process.

    Returns:
        The end of the pipe that this process holds; it is never closed.

    Raises:
        SandboxFailed: It cannot be started.
    """
    read, write = os.pipe()
    try:
        pid, python = os.getpid(), interpreter()
        arguments = [str(pid), python, str(records.start_of(pid)), "\x1f".join(filter(None, sys.path))]
        started = subprocess.Popen(
            [python, "-I", "-S", "-c", _CODE, *arguments],
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
    # It shall outlive this process: nobody waits for it, and no warning shall say so.
    started.returncode = 0
    return write


def interpreter() -> str:
    """A Python that this process's user can run: this one, or else the system's."""
    return sys.executable if os.access(sys.executable, os.X_OK) else "/usr/bin/python3"


def main() -> None:
    """Clean up after the process that the command line names."""
    pid, started = int(sys.argv[1]), int(sys.argv[2])
    cache = os.environ.get("AGENTGYM_CACHE")
    if cache and not os.path.isdir(cache):  # somebody removed it: it is not made again
        cgroups.sweep()
        return
    records.collect(lambda record: (record.pid, record.started) == (pid, started) or record.orphaned)
