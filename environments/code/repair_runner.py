"""Run a repository's tests inside a sandbox, and report each by a channel that printing does not reach.

Invariants: a test is reported when it has ended, so that one which never ends, or ends the process, is
missing; what is printed is never read as a result; nothing that lies in the repository decides how the tests
are run (no configuration file, no ``sitecustomize``, no plug-in, no ``.pth``).

This file is run by the sandbox's own Python (3.8 or later) as ``python3 -I -S -B``; it imports nothing of
AgentGym. A parent, which runs nothing of the repository, starts the tests in a child and takes their outcomes
from a pipe. At the end it writes one line on its standard output: the nonce that it was given, and JSON.

Standard input is JSON: ``nonce``, ``root`` (the repository), ``path`` (folders of modules, in order),
``tests`` (files and folders under the root), ``site`` (whether installed packages are seen), ``seconds``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import subprocess
import sys
import time
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 16 << 20
"""Bytes of reports that are kept."""

PLAIN = "[pytest]\n"
"""The configuration that the tests run under: none."""


def reporter(descriptor: int, token: str) -> tuple[object, Callable[[int], None]]:
    """A plug-in of pytest that writes each test's outcome to a descriptor, and what writes the end.

    Nothing of it is a module's or a class's attribute that the code under test could replace, and it calls
    nothing that is one.
    """
    write, quote = os.write, encode_basestring_ascii
    outcomes: dict[str, str] = {}
    get = outcomes.get
    head = f"[{quote(token)}, "

    def tell(kind: str, name: str, outcome: str) -> None:
        line = f"{head}{quote(kind)}, {quote(name)}, {outcome}]\n".encode()
        while line:
            line = line[write(descriptor, line) :]

    class Plugin:
        __slots__ = ()

        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            # The worst of a test's three phases.
            outcome = report.outcome
            if hasattr(report, "wasxfail"):
                outcome = "xfailed" if report.outcome == "skipped" else "xpassed"
            if get(report.nodeid, "passed") == "passed" or outcome == "failed":
                outcomes[report.nodeid] = outcome

        @staticmethod
        def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
            tell("test", nodeid, quote(get(nodeid, "missing")))

        @staticmethod
        def pytest_collectreport(report: Any) -> None:
            if report.failed:
                tell("uncollected", report.nodeid, quote(str(report.longrepr)[-2000:]))

    return Plugin(), lambda code: tell("end", "", str(code))


def child(task: dict[str, Any]) -> int:
    """Run the tests in this process; the results go to the descriptor of the task."""
    os.chdir(task["root"])
    del sys.path[0]  # this file's folder
    # For what the tests start; this process was started without.
    os.environ["PYTHONPATH"] = os.pathsep.join(task["path"])
    if not task["site"]:
        sys.path += task["path"]
    import pytest

    if task["site"]:
        # pytest is imported: what an installation says of where the repository lies must not come first.
        sys.path[:0] = task["path"]

    plugin, end = reporter(task.pop("descriptor"), task.pop("token"))
    options = ["-p", "no:cacheprovider", "-c", task["configuration"], "--rootdir", task["root"], "-q"]
    options += ["--tb=line", "--continue-on-collection-errors", *task["tests"]]
    # The status is told with the rest: that of the process says nothing, as anything inside can set it.
    code = int(pytest.main(options, plugins=[plugin]))
    end(code)
    return 0


def parent(task: dict[str, Any]) -> None:
    """Start the child, and gather what it reports."""
    # Nobody of the same user shall open this process's descriptors, or read the nonce out of its memory.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    nonce, seconds = task.pop("nonce"), float(task.pop("seconds"))
    taken, given = os.pipe()
    folder = os.environ.get("TMPDIR") or "/tmp"
    task["configuration"] = os.path.join(folder, "agentgym-" + os.urandom(8).hex() + ".ini")
    with open(task["configuration"], "w", encoding="ascii") as stream:
        stream.write(PLAIN)
    task["descriptor"], task["token"] = given, os.urandom(16).hex()
    environment = dict(os.environ)
    environment["PYTHONDONTWRITEBYTECODE"] = environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    environment["PYTHONHASHSEED"] = "0"
    for name in ("PYTHONPATH", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    process = subprocess.Popen(
        # Not isolated: that would forget the seed of hashes.
        [sys.executable, "-s", *([] if task["site"] else ["-S"]), "-B", os.path.abspath(__file__), "child"],
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        pass_fds=(given,),
        env=environment,
        start_new_session=True,
    )
    os.close(given)
    assert process.stdin is not None
    process.stdin.write(json.dumps(task).encode())
    process.stdin.close()
    late, told = gather(process, taken, seconds)
    lines = [line for line in told.split(b"\n")[:-1] if line]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tables: dict[str, dict[str, str]] = {"test": {}, "uncollected": {}}
    end, garbled = None, 0
    for line in lines:
        try:
            token, kind, name, outcome = json.loads(line)
            if token != task["token"]:
                raise ValueError
            if kind == "end":
                end = outcome
            else:
                # What is told twice is told by somebody else as well.
                table = tables[kind]
                table[str(name)] = "twice" if str(name) in table else str(outcome)
        except (ValueError, TypeError, KeyError):
            garbled += 1
    made = {
        "tests": tables["test"],
        "uncollected": tables["uncollected"],
        "end": end,
        "late": late,
        "garbled": garbled,
        "python": python,
    }
    sys.stdout.write("\n" + nonce + json.dumps(made) + "\n")
    sys.stdout.flush()


def gather(process: subprocess.Popen[bytes], taken: int, seconds: float) -> tuple[bool, bytes]:
    """Whether the deadline passed, and the bytes that were reported until the child's end."""
    deadline = time.monotonic() + seconds
    told, late = b"", False
    os.set_blocking(taken, False)
    with selectors.DefaultSelector() as selector:
        selector.register(taken, selectors.EVENT_READ)
        while True:
            # The child's own end counts, not the pipe's: what it left behind may hold that open for ever.
            ended = process.poll() is not None
            selector.select(0 if ended else 0.05)
            try:
                piece: bytes | None = os.read(taken, 1 << 16)
            except BlockingIOError:
                piece = None
            if piece:
                told += piece
            if len(told) > LIMIT or time.monotonic() > deadline:
                late = True
                break
            if not piece and ended:
                break
            if piece == b"":
                time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, 9)
    process.wait()
    return late, told


if __name__ == "__main__":
    # Not kept in a name of this module, which the code under test can read.
    if sys.argv[1:] == ["child"]:
        sys.exit(child(json.loads(sys.stdin.buffer.read())))
    parent(json.loads(sys.stdin.buffer.read()))
