"""Score a repair in the way of SWE-bench, in a sandbox that the policy never entered.

Invariants: what is judged is a patch and nothing else of what the policy left; the patch is applied to the
repository as it was, what it does to tests and to their configuration is undone, and the hidden tests are
laid over. They are run in two versions, each in a sandbox of its own, which :mod:`repair_spoil` makes of
them before anything of the patch has run: by a coin each, some of the tests are made to fail in one, and the
others in the other. Then those that a repair makes pass are run :data:`MORE` times by themselves, spoiled by
a coin each time. :mod:`repair_runner` has to report every listed test as passed where it was left alone, and
as failed where it was not; so no run is the real one, and a report that says "passed" of everything is worth
nothing. A run that is not told to its end is not either. Only a failure of the machinery around the sandbox
is raised.

What is left: the code under test shares a process with what runs the tests. A patch that finds the reporter
in memory, and that tells the tests that were made to fail from the others, can forge every report.
"""

from __future__ import annotations

import json
import random
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from agentgym.environments.code.repair_instances import TESTBED, Instance
from agentgym.environments.code.repair_measure import (
    LIBS,
    PYTHON,
    REPORT,
    SECONDS,
    WORK,
    Run,
    run_tests,
    search_path,
)
from agentgym.errors import EnvironmentFailed
from agentgym.sandboxes.base import MIB, ExecResult, Sandbox, SandboxEnded, SandboxSpec

MAX_PATCH = MIB
"""Most bytes of a patch; one that is larger is not taken."""

MORE = 3
"""Further runs of the tests that a repair makes pass: so often more has to guess who cannot tell."""

GIT_SECONDS = 60.0
"""Deadline of one command of git, in a repository that may be the policy's."""

SPOILER = Path(__file__).with_name("repair_spoil.py")
_SPOILER_INSIDE = "/tmp/agentgym-spoil.py"
_PATCH = "/tmp/agentgym.patch"

_GIT = {
    # Files of the repository may belong to another user than the one who runs git inside.
    "GIT_CONFIG_COUNT": "4",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "GIT_CONFIG_KEY_1": "user.name",
    "GIT_CONFIG_VALUE_1": "nobody",
    "GIT_CONFIG_KEY_2": "user.email",
    "GIT_CONFIG_VALUE_2": "nobody@localhost",
    "GIT_CONFIG_KEY_3": "init.defaultBranch",
    "GIT_CONFIG_VALUE_3": "main",
    "GIT_PAGER": "cat",
    "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
}

_OWN = {
    **_GIT,
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


_IMAGE_PATH = (f"{WORK}/src", f"{WORK}/lib", WORK)
"""Where modules of an image's repository may lie; it was installed from another place."""

Start = Callable[[SandboxSpec], AbstractAsyncContextManager[Sandbox]]
"""Starts a sandbox, and closes it when it is left."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a repair was judged.

    Attributes:
        success: Every listed test passed, and the runs can be believed.
        why: What was wrong otherwise.
        fail_to_pass: Share of these tests that passed, 0 to 1.
        pass_to_pass: Likewise.
        dropped: Files whose change was undone before the tests.
        output: The end of what the tests printed, for people.
    """

    success: bool
    why: str = ""
    fail_to_pass: float = 0.0
    pass_to_pass: float = 0.0
    dropped: tuple[str, ...] = ()
    output: str = ""


@dataclass(frozen=True, slots=True)
class Spoiled:
    """Versions of the hidden tests, in each of which some fail.

    Attributes:
        texts: New content by file, of each version.
        tests: The tests that have to fail, in each version.
        loose: Tests of which it is not known; they may fail in any of the versions.
    """

    texts: tuple[Mapping[str, str], ...]
    tests: tuple[frozenset[str], ...]
    loose: frozenset[str]


def spec_of(instance: Instance) -> SandboxSpec:
    """The sandbox of an instance."""
    env = {**_GIT, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    if instance.image is not None:
        env["PYTHONPATH"] = ":".join(_IMAGE_PATH)
        return SandboxSpec(
            image=instance.image, memory=4096 * MIB, pids=512, disk=4096 * MIB, inodes=500_000, env=env
        )
    env["PYTHONPATH"] = ":".join(search_path(instance.modules, instance.libraries))
    return SandboxSpec(memory=1024 * MIB, env=env)


async def prepare(sandbox: Sandbox, instance: Instance) -> str:
    """Bring the repository and its libraries in, and make it a git repository of one commit.

    So there is no history in which the change could be read; of an image's repository its state is taken.
    Files are sent rather than mounted: the user that a sandbox runs as may not read where they lie.

    Returns:
        The commit.

    Raises:
        EnvironmentFailed: It cannot be made.
    """
    if instance.image is not None:
        # Copied first: an image cannot be written. And its history holds the future.
        at = f"git checkout -q -f {shlex.quote(instance.base_commit)} -- && " if instance.base_commit else ""
        await _must(sandbox, f"cp -a {TESTBED}/. {WORK}/ && {at}rm -rf .git")
    if instance.folder is not None:
        await sandbox.upload(instance.folder, WORK)
        for name in instance.libraries:
            await sandbox.upload(instance.folder.parent.parent / "libraries" / name, f"{LIBS}/{name}")
    await _must(
        sandbox,
        "git init -q && git add -A -f && git commit -q --no-verify --allow-empty -m 'The repository' && "
        "git update-ref refs/agentgym/base HEAD",
    )
    return (await _must(sandbox, "git rev-parse HEAD")).stdout.strip()


async def take_patch(sandbox: Sandbox, base: str) -> tuple[bytes, str]:
    """What the policy changed since the commit ``base``, and why there is none where it cannot be told.

    The repository is the policy's by now: it may have changed anything in it, and the patch is any bytes.
    """
    pieces: list[bytes] = []

    def keep(stream: str, piece: bytes) -> None:
        if stream == "stdout":
            pieces.append(piece)

    try:
        added = await sandbox.exec(["git", "add", "-A"], cwd=WORK, env=_OWN, seconds=GIT_SECONDS)
        if not added.ok:
            return b"", f"git cannot tell what was changed: {added.stderr.strip()[:300]}"
        command = ["git", "diff", "--cached", "--binary", "--no-color", "--no-ext-diff", "--no-textconv"]
        done = await sandbox.exec(
            [*command, "--no-renames", "--src-prefix=a/", "--dst-prefix=b/", base, "--"],
            cwd=WORK, env=_OWN, seconds=GIT_SECONDS, limit=MAX_PATCH, on_output=keep,
        )  # fmt: skip
    except SandboxEnded as error:
        return b"", f"the sandbox has ended: {error.why}"
    if not done.ok:
        return b"", f"git cannot tell what was changed: {(done.ended or done.stderr.strip())[:300]}"
    if done.cut_stdout:
        return b"", f"the change is larger than {MAX_PATCH >> 20} MiB"
    return b"".join(pieces), ""


async def score(start: Start, instance: Instance, patch: bytes, *, seconds: float = SECONDS) -> Verdict:
    """Apply a patch to the repository as it was and run the hidden tests, several times.

    Args:
        start: Starts a sandbox.
        instance: What is repaired.
        patch: Any bytes.
        seconds: Deadline of the tests, each time.

    Raises:
        SandboxFailed: The machinery around a sandbox broke.
        EnvironmentFailed: The instance itself cannot be used.
    """
    if not patch.strip():
        return Verdict(False, "nothing was changed")
    spoiled: Spoiled | None = None
    dropped: tuple[str, ...] = ()
    runs: list[Run] = []
    for version in range(2 + MORE):
        if version == 2 and spoiled is not None:
            # Further runs could only take a success back.
            why = _wrong(instance, runs, spoiled)
            if why:
                break
        async with start(spec_of(instance)) as sandbox:
            await prepare(sandbox, instance)
            dropped, why = await _apply(sandbox, instance, patch)
            if why:
                return Verdict(False, why, dropped=dropped)
            if why := await lay(sandbox, [instance.test_patch]):
                return Verdict(
                    False, f"the hidden tests cannot be laid over the change: {why}", dropped=dropped
                )
            spoiled = spoiled or await _spoil(sandbox, instance)
            try:
                run, why = await _run(sandbox, instance, spoiled.texts[version], seconds)
            except SandboxEnded as error:
                return Verdict(False, f"the code under test ended its sandbox: {error.why}", dropped=dropped)
        if version >= 2:
            # What else runs beside them may hang on them, and has been judged.
            meant = _meant(instance, instance.fail_to_pass, runs)
            run = replace(run, tests={name: run.tests.get(name, "missing") for name in meant})
        runs.append(run)
        if why:
            break
    assert spoiled is not None
    why = why or _wrong(instance, runs, spoiled)
    holds = _listed(instance, runs, _holds(runs, spoiled))
    return Verdict(
        not why,
        why,
        fail_to_pass=_share(instance.fail_to_pass, holds),
        pass_to_pass=_share(instance.pass_to_pass, holds),
        dropped=dropped,
        output=runs[-1].output,
    )


async def _apply(sandbox: Sandbox, instance: Instance, patch: bytes) -> tuple[tuple[str, ...], str]:
    """Apply a patch and undo what it may not do: the files that were undone, and why nothing was applied."""
    await sandbox.write(_PATCH, patch)
    applied = await _git(sandbox, "apply", "--index", "--whitespace=nowarn", _PATCH)
    if not applied.ok:
        return (), f"the patch cannot be applied: {applied.stderr.strip()[:300]}"
    told = await _git(sandbox, "diff", "--cached", "--raw", "-z", "--no-renames", "HEAD")
    if not told.ok or told.cut_stdout or "\ufffd" in told.stdout:
        return (), "the patch changes too many files, or files with names that are no text"
    fields = told.stdout.split("\0")
    added: list[str] = []
    other: list[str] = []
    for status, path in zip(fields[0::2], fields[1::2], strict=False):
        mode, kind = status.split()[1], status.split()[4]
        if instance.protected(path) or mode not in ("100644", "100755", "000000"):
            (added if kind == "A" else other).append(path)
    if added or other:
        names = "\0".join((*added, *other)).encode()
        listed = ("--pathspec-from-file=-", "--pathspec-file-nul")
        undone = await _git(sandbox, "reset", "-q", *listed, "HEAD", stdin=names)
        # First what was added: a folder may stand where a file was.
        if added and undone.ok:
            undone = await sandbox.exec(
                ["xargs", "-0", "rm", "-rf", "--"], cwd=WORK, stdin="\0".join(added).encode() + b"\0"
            )
        if other and undone.ok:
            undone = await _git(
                sandbox, "checkout", "-q", "-f", *listed, "HEAD", stdin="\0".join(other).encode()
            )
        if not undone.ok:
            return (), f"what the patch does to tests cannot be undone: {undone.stderr.strip()[:300]}"
    return tuple(sorted((*added, *other))), ""


async def lay(sandbox: Sandbox, patches: Sequence[str]) -> str:
    """Apply patches that are trusted, one after the other: why one cannot be applied, or nothing."""
    for patch in patches:
        await sandbox.write(_PATCH, patch.encode("utf-8", "surrogateescape"))
        laid = await _git(sandbox, "apply", "--whitespace=nowarn", _PATCH)
        if not laid.ok:
            return laid.stderr.strip()[:300] or laid.ended
    return ""


async def _spoil(sandbox: Sandbox, instance: Instance) -> Spoiled:
    """Two versions of the hidden tests, which lie in the sandbox; nothing of the patch has run in it."""
    task: dict[str, Any] = {
        "root": WORK,
        "tests": [
            name
            for name in (*instance.fail_to_pass, *instance.pass_to_pass)
            if instance.runner != "django" or _whole(instance, name)
        ],
        "places": list(instance.test_files),
        "most": list(instance.fail_to_pass),
        "more": MORE,
    }
    await sandbox.write(_SPOILER_INSIDE, SPOILER.read_bytes())
    if instance.image is not None:
        await _must(
            sandbox, f"{shlex.quote(instance.python)} -c 'import sys; assert sys.version_info >= (3, 6)'"
        )
    # Not the interpreter of the tests, which may be too old.
    python = PYTHON if instance.image is None else "python3"
    done = await sandbox.exec(
        [python, "-I", "-S", "-B", _SPOILER_INSIDE], stdin=json.dumps(task).encode(), seconds=60, limit=REPORT
    )
    await _must(sandbox, f"rm -f {_SPOILER_INSIDE}")
    if not done.ok or done.cut_stdout:
        raise EnvironmentFailed(
            f"the tests of {instance.id} cannot be read inside: {done.ended or done.stderr.strip()[-300:]}",
            hint=f"{python} has to be Python 3.8 or later",
        )
    made = json.loads(done.stdout)
    # A name that is cut is that of no test: what it means may fail in any version.
    cut = set(filter(_cut, task["tests"]))
    return Spoiled(
        tuple(made["texts"]),
        tuple(frozenset(tests) - cut for tests in made["spoiled"]),
        frozenset(made["loose"]) | cut,
    )


async def _run(
    sandbox: Sandbox, instance: Instance, texts: Mapping[str, str], seconds: float
) -> tuple[Run, str]:
    """Run one version of the tests; also why the run is not believed."""
    # What could be compared with what is run.
    await _must(sandbox, f"rm -f {_PATCH}")
    for file, text in texts.items():
        await sandbox.write(f"{WORK}/{file}", text.encode())
    files = list(instance.test_files)
    name, content, holds, fails = _canary(methods=instance.runner == "django")
    place = str(PurePosixPath(files[0]).parent / name)
    await sandbox.write(f"{WORK}/{place}", content)
    files.insert(random.SystemRandom().randrange(len(files) + 1), place)
    where: dict[str, Any] = {"path": _IMAGE_PATH, "python": instance.python, "site": True}
    if instance.image is None:
        where = {"path": search_path(instance.modules, instance.libraries)}
    run = await run_tests(sandbox, tests=files, seconds=seconds, runner=instance.runner, **where)
    return run, _doubts(run, place, holds, fails)


def _meant(instance: Instance, names: Sequence[str], runs: Sequence[Run]) -> frozenset[str]:
    """The tests that are listed by ``names``; one that is not whole may be that of several."""
    made = {name for name in names if _whole(instance, name)}
    for name in {*names} - made:
        for run in runs:
            for test, outcome in run.tests.items():
                alike = (
                    test.startswith(name)
                    if instance.runner == "pytest"
                    else name in (test.rpartition("::")[2], run.described.get(test))
                )
                if alike and outcome != "skipped":
                    made.add(test)
    return frozenset(made)


def _whole(instance: Instance, name: str) -> bool:
    """Whether a name is that of one test; records have ones without a file, and ones cut at a space."""
    return not _cut(name) if instance.runner == "pytest" else ".py::" in name


def _cut(name: str) -> bool:
    """Whether a name of pytest's ends in the middle of its parameters."""
    return "[" in name and not name.endswith("]")


def _listed(instance: Instance, runs: Sequence[Run], holds: frozenset[str]) -> frozenset[str]:
    """The listed tests that hold."""
    made = set(holds)
    for name in (*instance.fail_to_pass, *instance.pass_to_pass):
        if not _whole(instance, name) and (meant := _meant(instance, [name], runs)) and meant <= holds:
            made.add(name)
    return frozenset(made)


def _holds(runs: Sequence[Run], spoiled: Spoiled) -> frozenset[str]:
    """The tests that passed wherever they were run and left alone."""
    cut = tuple(filter(_cut, spoiled.loose))
    loose = spoiled.loose.union(
        *(run.described for run in runs),
        *((name for name in run.tests if name.startswith(cut)) for run in runs),
    )
    ever = frozenset[str]().union(*(run.passed for run in runs))
    holds, lost = set[str](), set[str]()
    for version, (run, tests) in enumerate(zip(runs, spoiled.tests, strict=False)):
        holds |= run.passed - tests
        ran = ever if version < 2 else ever & run.tests.keys()
        lost |= ran - run.passed - tests - loose
    return frozenset(holds - lost)


def _wrong(instance: Instance, runs: Sequence[Run], spoiled: Spoiled) -> str:
    """Why these runs earn nothing."""
    return _missing(instance, _listed(instance, runs, _holds(runs, spoiled))) or _forged(runs, spoiled)


def _forged(runs: Sequence[Run], spoiled: Spoiled) -> str:
    """Why the reports are not believed: a test that was made to fail is not reported so."""
    for version, (run, tests) in enumerate(zip(runs, spoiled.tests, strict=False)):
        ran = tests if version < 2 else tests & run.tests.keys()
        if any(run.tests.get(name) != "failed" for name in ran):
            return "a test that always fails did not fail"
    return ""


def _doubts(run: Run, place: str, holds: Sequence[str], fails: Sequence[str]) -> str:
    """Why a run is not believed."""
    if not run.finished:
        return "the tests were not run to their end"
    if any(run.tests.get(f"{place}::{name}") != "passed" for name in holds):
        return "a test that always passes did not pass"
    if any(run.tests.get(f"{place}::{name}") != "failed" for name in fails):
        return "a test that always fails did not fail"
    return ""


def _missing(instance: Instance, passed: frozenset[str]) -> str:
    for what, listed in (("still", instance.fail_to_pass), ("now", instance.pass_to_pass)):
        if failing := [name for name in listed if name not in passed]:
            return f"{len(failing)} of {len(listed)} tests {what} fail"
    return ""


def _canary(*, methods: bool) -> tuple[str, str, list[str], list[str]]:
    """A file of tests with names that nobody knows: its name, its text, what passes, what fails."""
    names = [f"test_{secrets.token_hex(4)}" for _ in range(4)]
    number = secrets.randbelow(10_000)
    bodies = [
        f"assert sorted([{number}, 3]) == sorted([3, {number}])",
        f"assert {number} + 1 == {number}",
        f"assert str({number}) == '{number}'",
        f"assert int('{number}') != {number}",
    ]
    kind = f"Test{secrets.token_hex(4)}" if methods else ""
    text = f"import unittest\n\n\nclass {kind}(unittest.TestCase):\n" if kind else ""
    given, indent = ("self", "    ") if kind else ("", "")
    text += "".join(
        f"{indent}def {name}({given}):\n{indent}    {body}\n\n\n"
        for name, body in zip(names, bodies, strict=True)
    )
    whole = [f"{kind}::{name}" if kind else name for name in names]
    return f"test_{secrets.token_hex(4)}.py", text, whole[0::2], whole[1::2]


def _share(listed: Sequence[str], passed: frozenset[str]) -> float:
    return sum(name in passed for name in listed) / len(listed) if listed else 1.0


async def _git(sandbox: Sandbox, *arguments: str, stdin: bytes = b"") -> ExecResult:
    return await sandbox.exec(
        ["git", *arguments], cwd=WORK, env=_OWN, stdin=stdin, seconds=GIT_SECONDS, limit=4 * MIB
    )


async def _must(sandbox: Sandbox, command: str) -> ExecResult:
    done = await sandbox.exec(command, cwd=WORK, env=_OWN, seconds=300)
    if not done.ok:
        raise EnvironmentFailed(
            f"the repository cannot be set up: {command[:60]!r} gave {done.return_code}: "
            f"{done.stderr.strip()[:300]}",
            hint="git is needed in the sandbox, as /usr/bin/git for bubblewrap; in images Python 3.6, too",
        )
    return done
