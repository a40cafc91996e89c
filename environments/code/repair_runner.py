"""Run a repository's tests inside a sandbox, and report each by a channel that printing does not reach.

Invariants: a test is reported when it has ended, so that one which never ends, or ends the process, is
missing; what is printed is never read as a result; nothing that lies in the repository decides how the tests
are run (no configuration file, no ``sitecustomize``, no plug-in, no ``.pth``), unless ``site`` says so.

This file is run by the sandbox's own Python (3.6 or later) as ``python3 -I -S -B``; it imports nothing of
AgentGym. A parent, which runs nothing of the repository, starts the tests in a child and takes their outcomes
from a pipe. At the end it writes one line on its standard output: the nonce that it was given, and JSON.

Standard input is JSON: ``nonce``, ``root`` (the repository), ``path`` (folders of modules, in order),
``tests`` (files and folders under the root), ``runner`` (a name of :data:`RUNNERS`), ``site`` (whether
installed packages are seen, and configuration files and plug-ins heeded), ``seconds``.
"""

import contextlib
import ctypes
import importlib
import inspect
import json
import os
import runpy
import selectors
import subprocess
import sys
import time
import unittest
import warnings
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Tell = Callable[[str, str, str], None]
    """Report a kind (``test``, ``described``, ``uncollected``, ``end``), a name, and an outcome or a text."""

LIMIT = 16 << 20
"""Bytes of reports that are kept."""

PLAIN = "[pytest]\n"
"""The configuration that the tests run under: none."""


def teller(descriptor: int, token: str) -> "Tell":
    """What writes reports to a descriptor; no code under test can replace a part of it by name."""
    write, quote = os.write, encode_basestring_ascii
    head = f"[{quote(token)}, "

    def tell(kind: str, name: str, outcome: str) -> None:
        line = f"{head}{quote(kind)}, {quote(name)}, {quote(outcome)}]\n".encode()
        while line:
            line = line[write(descriptor, line) :]

    return tell


def reporter(tell: "Tell") -> object:
    """A plug-in of pytest that reports each test.

    Nothing of it is a module's or a class's attribute that the code under test could replace, and it calls
    nothing that is one.
    """
    outcomes: dict[str, str] = {}
    get = outcomes.get

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
            tell("test", nodeid, get(nodeid, "missing"))

        @staticmethod
        def pytest_collectreport(report: Any) -> None:
            if report.failed:
                tell("uncollected", report.nodeid, str(report.longrepr)[-2000:])

    return Plugin()


def by_pytest(task: "dict[str, Any]", tell: "Tell") -> int:
    """Run files of tests; names are pytest's."""
    if not task["site"]:
        sys.path += task["path"]
    import pytest

    options = ["-q", "--tb=line", "--continue-on-collection-errors"]
    if task["site"]:
        # pytest is imported: what an installation says of where the repository lies must not come first.
        sys.path[:0] = task["path"]
        options += ["--maxfail=0", "-o", f"cache_dir={task['configuration']}.cache"]
    else:
        options += ["-p", "no:cacheprovider", "-c", task["configuration"], "--rootdir", task["root"]]
    return int(pytest.main([*options, *task["tests"]], plugins=[reporter(tell)]))


def by_django(task: "dict[str, Any]", tell: "Tell") -> int:
    """Run modules of Django's own tests by its own script; names are ``tests/app/file.py::Class::method``."""
    outcomes: dict[str, str] = {}
    known: dict[str, int] = {}

    def name_of(test: Any) -> str:
        kind = type(test)
        file, names = kind.__module__.replace(".", "/"), kind.__qualname__.replace(".", "::")
        return f"tests/{file}.py::{names}::{test._testMethodName}"

    def note(test: Any, outcome: str) -> None:
        if hasattr(test, "_testMethodName") and (outcome == "failed" or name_of(test) not in outcomes):
            outcomes[name_of(test)] = outcome

    def heard(method: str, outcome: str) -> None:
        old = getattr(unittest.TestResult, method)

        def add(self: Any, test: Any, *rest: Any) -> Any:
            # The third argument of a subtest is what went wrong in it.
            if method != "addSubTest" or rest[1] is not None:
                note(test, outcome)
            return old(self, test, *rest)

        setattr(unittest.TestResult, method, add)

    for method, outcome in (
        ("addSuccess", "passed"),
        ("addFailure", "failed"),
        ("addError", "failed"),
        ("addSubTest", "failed"),
        ("addSkip", "skipped"),
        ("addExpectedFailure", "xfailed"),
        ("addUnexpectedSuccess", "xpassed"),
    ):
        heard(method, outcome)
    stop = unittest.TestResult.stopTest

    def stopped(self: Any, test: Any) -> Any:
        if hasattr(test, "_testMethodName"):
            name = name_of(test)
            # A class that several modules import is run in each of them; the first time counts.
            known[name] = known.get(name, 0) + 1
            again = f"#{known[name]}" if known[name] > 1 else ""
            tell("test", name + again, outcomes.pop(name, "missing"))
            text = test.shortDescription()
            if text:
                tell("described", name + again, text[:2000])
        return stop(self, test)

    setattr(unittest.TestResult, "stopTest", stopped)  # noqa: B010
    script = os.path.join(task["root"], "tests", "runtests.py")
    labels = []
    for file in task["tests"]:
        module = file[: -len(".py")]
        if os.path.exists(file) or os.path.isdir(module):
            labels.append(module.replace("/", ".")[len("tests.") :])
    os.chdir(os.path.dirname(script))
    sys.path[:0] = [os.path.dirname(script), *task["path"]]
    with open(script, encoding="utf-8") as stream:
        alone = ["--parallel", "1"] if "--parallel" in stream.read() else []
    sys.argv = [script, "--verbosity", "0", "--settings=test_sqlite", *alone, *labels]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        return int(error.code) if isinstance(error.code, int) else 3 if error.code else 0
    return 0


def by_function(task: "dict[str, Any]", tell: "Tell") -> int:
    """Run SymPy's own tests, which are functions: those that raise nothing pass. Names are pytest's."""
    os.environ["SYMPY_USE_CACHE"] = "no"
    warnings.simplefilter("ignore", UserWarning)
    warnings.simplefilter("ignore", SyntaxWarning)
    sys.path[:0] = task["path"]
    ends = {"Skipped": "skipped", "XFail": "xfailed", "XPass": "xpassed"}
    status = 0
    for file in task["tests"]:
        try:
            module = importlib.import_module(file[: -len(".py")].replace("/", "."))
        except Exception as error:
            tell("uncollected", file, repr(error)[-2000:])
            status = 1
            continue
        for name, function in list(vars(module).items()):
            if not (name.startswith("test_") and inspect.isfunction(function)):
                continue
            if os.path.realpath(inspect.unwrap(function).__code__.co_filename) != os.path.realpath(file):
                continue  # it is another file's
            if getattr(function, "_slow", False):
                tell("test", f"{file}::{name}", "skipped")
                continue
            outcome = "passed"
            try:
                # An old way to write many tests as one.
                for part in function() if inspect.isgeneratorfunction(function) else (function,):
                    part[0](*part[1:]) if isinstance(part, tuple) else part()
            except Exception as error:
                outcome = ends.get(type(error).__name__, "failed")
                if outcome == "failed":
                    status = 1
                    print(f"{file}::{name}: {error!r}"[:500], file=sys.stderr)
            tell("test", f"{file}::{name}", outcome)
    return status


RUNNERS = {"pytest": by_pytest, "django": by_django, "sympy": by_function}


def child(task: "dict[str, Any]") -> int:
    """Run the tests in this process; the results go to the descriptor of the task."""
    os.chdir(task["root"])
    del sys.path[0]  # this file's folder
    # For what the tests start; this process was started without.
    os.environ["PYTHONPATH"] = os.pathsep.join(task["path"])
    tell = teller(task.pop("descriptor"), task.pop("token"))
    # The status is told with the rest: that of the process says nothing, as anything inside can set it.
    tell("end", "", str(RUNNERS[task["runner"]](task, tell)))
    return 0


def parent(task: "dict[str, Any]") -> None:
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
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["PYTHONHASHSEED"] = "0"
    if not task["site"]:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
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
    tables: dict[str, dict[str, str]] = {"test": {}, "described": {}, "uncollected": {}}
    end, garbled = None, 0
    for line in lines:
        try:
            token, kind, name, outcome = json.loads(line)
            if token != task["token"]:
                raise ValueError
            if kind == "end":
                end = int(outcome)
            else:
                # What is told twice is told by somebody else as well.
                table = tables[kind]
                table[str(name)] = "twice" if str(name) in table else str(outcome)
        except (ValueError, TypeError, KeyError):
            garbled += 1
    made = {
        "tests": tables["test"],
        "described": tables["described"],
        "uncollected": tables["uncollected"],
        "end": end,
        "late": late,
        "garbled": garbled,
        "python": python,
    }
    sys.stdout.write("\n" + nonce + json.dumps(made) + "\n")
    sys.stdout.flush()


def gather(process: "subprocess.Popen[bytes]", taken: int, seconds: float) -> "tuple[bool, bytes]":
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
