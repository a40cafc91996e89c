"""What two releases of a package differ in, and which tests tell them apart.

Invariants: a release is a folder of files, of which nothing is run outside a sandbox; the change between two
releases is a patch of the package's own files alone, its tests are a second one; a test is listed only if
every run agrees about it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agentgym.sandboxes.base import MIB, Sandbox

RUNNER = Path(__file__).with_name("repair_runner.py")
LIBS = "/tmp/libs"
"""Where the libraries that tests need are seen inside."""

RUNNER_INSIDE = "/tmp/agentgym-runner.py"
WORK = "/work"
PYTHON = "/usr/bin/python3"
SECONDS = 120.0
"""Deadline of one run of a repository's tests."""

REPORT = 32 * MIB
"""Bytes of a run's report that are read."""

_NOT_OURS = re.compile(r"(^|/)(docs?|examples?|benchmarks?|\.[^/]+|[^/]+\.egg-info|__pycache__)(/|$)")
_TESTS = re.compile(r"(^|/)(tests?|test_[^/]*\.py|[^/]*_test\.py|tests?\.py|conftest\.py)(/|$)")
_VERSION = re.compile(r"(^|/)(_?_?version_?_?|__about__|_meta)\.py$")
_TOOLING = ("setup.py", "noxfile.py", "tasks.py", "conftest.py", "fabfile.py", "dodo.py", "versioneer.py")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a release.

    Attributes:
        modules: Folders to import from, relative to the root; ``.`` is the root.
        sources: The package's own files and folders.
        tests: Folders and files of the tests.
    """

    modules: tuple[str, ...]
    sources: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of tests told.

    Attributes:
        tests: Outcome by test: ``passed``, ``failed``, ``skipped``, ``xfailed``, ``xpassed``, ``twice``.
        described: What tests of Django say of themselves, by test.
        uncollected: Why files could not be collected.
        finished: Whether pytest came to its end and reported nothing that cannot be.
        output: The end of what was printed, for people.
        python: Version of the interpreter, such as ``3.11``.
    """

    tests: Mapping[str, str]
    described: Mapping[str, str]
    uncollected: Mapping[str, str]
    finished: bool
    output: str
    python: str

    @property
    def passed(self) -> frozenset[str]:
        """The tests that passed."""
        return frozenset(name for name, outcome in self.tests.items() if outcome == "passed")


@dataclass(frozen=True, slots=True)
class Lists:
    """What runs of the tests of two releases agree about.

    Attributes:
        fail_to_pass: Tests that tell the releases apart.
        pass_to_pass: Tests that hold in both.
        unstable: Tests that did not end alike each time.
    """

    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    unstable: tuple[str, ...]


def is_test(path: str) -> bool:
    """Whether a path of a repository belongs to its tests, by its name."""
    return _TESTS.search(path) is not None


def layout(root: Path) -> Layout:
    """Find modules, sources and tests of an unpacked source archive."""
    roots = [name for name in ("src", "lib") if (root / name).is_dir() and _packages(root / name)]
    modules = tuple(roots) or (".",)
    sources = [_joined(folder, name) for folder in modules for name in _packages(root / folder)]
    tests = [name for name in ("tests", "test") if (root / name).is_dir()]
    tests += [path.name for path in sorted(root.glob("test*.py")) if path.name not in sources]
    for source in sources:
        for path in sorted((root / source).rglob("*")) if (root / source).is_dir() else ():
            if path.is_dir() and path.name in ("tests", "test"):
                tests.append(path.relative_to(root).as_posix())
    for source in sources:
        inside = (root / source).rglob("test_*.py") if (root / source).is_dir() else iter(())
        for path in sorted(inside):
            name = path.relative_to(root).as_posix()
            if not any(name.startswith(f"{folder}/") for folder in tests):
                tests.append(name)
    return Layout(modules, tuple(sources), tuple(tests))


def _packages(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if _NOT_OURS.search(name) or is_test(name) or name in _TOOLING:
            continue
        if path.is_dir():
            if (path / "__init__.py").is_file() or (name.isidentifier() and any(path.glob("*/__init__.py"))):
                found.append(name)
        elif path.suffix == ".py":
            found.append(name)
    return found


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def files(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` by its path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def source_change(old: Path, new: Path, where: Layout) -> dict[str, bytes | None]:
    """The package's own files that differ: the new content by path, ``None`` where a file is gone."""
    return {
        path: content
        for path, content in _changes(old, new)
        if any(path == source or path.startswith(f"{source}/") for source in where.sources)
        and not is_test(path)
        and not _VERSION.search(path)
        and not path.endswith((".pyc", ".so"))
    }


def test_change(old: Path, new: Path, where: Layout) -> dict[str, bytes | None]:
    """The tests' files that differ, likewise."""
    return {
        path: content
        for path, content in _changes(old, new)
        if (is_test(path) or any(path == t or path.startswith(f"{t}/") for t in where.tests))
        and not path.endswith(".pyc")
    }


def _changes(old: Path, new: Path) -> Iterator[tuple[str, bytes | None]]:
    before, after = files(old), files(new)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            yield path, after.get(path)


def distribution(root: Path, package: str, version: str) -> dict[str, bytes]:
    """The metadata that ``importlib.metadata`` finds for a package that was never installed."""
    described = root / "PKG-INFO"
    content = described.read_bytes() if described.is_file() else b""
    name = re.sub(r"[-_.]+", "_", package)
    if not re.search(rb"^Version: ", content, re.M):
        content = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode()
    return {f"{name}-{version}.dist-info/METADATA": content}


def search_path(modules: Sequence[str], libs: Sequence[str]) -> list[str]:
    """Folders of modules inside; libraries come first, so that no file of a repository stands for one."""
    return (
        [f"{LIBS}/{name}" for name in libs]
        + [str(PurePosixPath(WORK, folder)) for folder in modules if folder != "."]
        + [WORK]
    )


async def run_tests(
    sandbox: Sandbox,
    *,
    path: Sequence[str],
    tests: Sequence[str],
    seconds: float = SECONDS,
    python: str = PYTHON,
    site: bool = False,
    runner: str = "pytest",
) -> Run:
    """Run tests in a sandbox that holds the repository.

    Args:
        sandbox: Where.
        path: Folders of modules, inside.
        tests: Folders and files of tests, relative to the repository.
        seconds: Deadline.
        python: The interpreter.
        site: Whether its installed packages are seen, and the repository's configuration and the installed
            plug-ins of pytest heeded; then the repository's modules come first.
        runner: How the tests are run, one of those of ``repair_runner``.

    Raises:
        SandboxFailed: The sandbox's machinery broke.
    """
    nonce = secrets.token_hex(16)
    task = {
        "nonce": nonce,
        "root": WORK,
        "path": list(path),
        "tests": list(tests),
        "runner": runner,
        "site": site,
        "seconds": seconds,
    }
    await sandbox.write(RUNNER_INSIDE, RUNNER.read_bytes())
    done = await sandbox.exec(
        [python, "-I", "-S", "-B", RUNNER_INSIDE],
        stdin=json.dumps(task).encode(),
        seconds=seconds + 15,
        limit=REPORT,
    )
    told = next((line for line in done.stdout.splitlines() if line.startswith(nonce)), "")
    try:
        made = json.loads(told.removeprefix(nonce)) if told else {}
    except ValueError:
        made = {}
    return Run(
        made.get("tests", {}),
        made.get("described", {}),
        made.get("uncollected", {}),
        made.get("end") in (0, 1, 2) and not made["late"] and not made["garbled"],
        (done.stdout[-2000:] if not told else "") + done.stderr[-8000:],
        made.get("python", ""),
    )


def lists(before: Sequence[Run], after: Sequence[Run]) -> Lists:
    """The lists of at least one run before a change and one after it, each sorted by name."""
    holds = frozenset.intersection(*(run.passed for run in after))
    once = frozenset.union(*(run.passed for run in before))
    always = frozenset.intersection(*(run.passed for run in before))
    ever = frozenset.union(*(run.passed for run in after))
    unstable = (once - always) | (ever - holds)
    return Lists(tuple(sorted(holds - once)), tuple(sorted(holds & always)), tuple(sorted(unstable)))
