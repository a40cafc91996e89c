"""Instances of repository repair, in the form of SWE-bench and SWE-Gym.

Invariant: an instance is a repository before a change, what goes wrong in it, and two lists of tests: those
that fail before the change and pass after it, and those that pass in both. The change (``patch``) and the
tests (``test_patch``, the lists) are private.

A record is a JSON object with the fields of those data sets: ``instance_id``, ``repo``, ``base_commit``,
``patch``, ``test_patch``, ``problem_statement``, ``FAIL_TO_PASS``, ``PASS_TO_PASS`` (lists, or JSON of
lists), ``version``. Two kinds of repository are known: a folder (``agentgym`` in the record says what else
its tests need), made by ``agentgym data build repair``; and the folder of a container image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentgym.environments.code.repair_measure import PYTHON, is_test
from agentgym.errors import DataUnavailable, UsageError

SWE_BENCH = "swebench/sweb.eval.x86_64.{id_1776}:latest"
"""Name of SWE-bench's images; ``{id}`` is the instance, ``{id_1776}`` and ``{id_s}`` the same with ``__``
written as ``_1776_`` and ``_s_``, in lower case."""

SWE_GYM = "xingyaoww/sweb.eval.x86_64.{id_s}:latest"
"""Name of SWE-Gym's images."""

TESTBED = "/testbed"
"""Where those images hold the repository."""

TESTBED_PYTHON = "/opt/miniconda3/envs/testbed/bin/python"
"""The Python of those images."""

_RUNNERS = {"django/django": "django", "sympy/sympy": "sympy"}
_METHOD = re.compile(r"(\w+) \(([\w.]+)\.(\w+)\)")
"""A method as unittest prints it; from Python 3.11 on its own name stands in the brackets, too."""

_CONFIGURATION = frozenset(
    {
        "conftest.py",
        "pytest.ini",
        ".pytest.ini",
        "pytest.toml",
        ".pytest.toml",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        "sitecustomize.py",
        "usercustomize.py",
        ".gitattributes",
        ".gitmodules",
    }
)
_DERIVED = re.compile(r"(^|/)(__pycache__|\.pytest_cache|\.hypothesis|[^/]+\.(egg|dist)-info|\.git)(/|$)")


@dataclass(frozen=True)
class Instance:
    """One repository to repair.

    Attributes:
        id: Names it.
        repo: The repository or package.
        version: Its version before the change.
        statement: What goes wrong, for the policy.
        patch: The change that is known to be right, as git writes it.
        test_patch: The change of the tests, likewise.
        fail_to_pass: Tests that a repair makes pass, named as pytest does. Of ``django`` and ``sympy`` a
            name without a file is that of a function, or the first line of what it says of itself.
        pass_to_pass: Tests that it leaves passing.
        base_commit: The commit of the repository that a container image holds; empty for a folder.
        folder: The repository's files.
        image: The container image that holds the repository.
        dockerfile: What the image is made of, where a record brings that.
        python: The interpreter that runs the tests, inside.
        modules: Folders to import from, relative to the repository.
        libraries: Folders of the libraries that the tests need.
        runner: Who runs the tests: ``pytest``, or ``django`` and ``sympy`` for these two repositories.
        tests: Folders and files of the tests besides those that look like tests by their names.
        licence: Of the repository.
        split: Of the data set.
    """

    id: str
    repo: str
    version: str
    statement: str
    patch: str = field(repr=False)
    test_patch: str = field(repr=False)
    fail_to_pass: tuple[str, ...] = field(repr=False)
    pass_to_pass: tuple[str, ...] = field(repr=False)
    base_commit: str = ""
    folder: Path | None = None
    image: str | None = None
    dockerfile: str = field(default="", repr=False)
    python: str = PYTHON
    runner: str = "pytest"
    modules: tuple[str, ...] = (".",)
    libraries: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    licence: str = ""
    split: str = "test"

    @property
    def test_files(self) -> tuple[str, ...]:
        """The files that hold the listed tests, in order."""
        listed = (*self.fail_to_pass, *self.pass_to_pass)
        names = {name.partition("::")[0] for name in listed if self.runner == "pytest" or ".py::" in name}
        if self.runner != "pytest":
            below = "tests/" if self.runner == "django" else ""
            tests = re.compile(rf"{below}(.*/)?test[^/]*\.py")
            names |= {name for name in self._changed_tests if tests.fullmatch(name)}
        return tuple(sorted(names))

    @property
    def test_command(self) -> str:
        """What a person would type in the repository to run its tests."""
        python = "python3" if self.image is None else self.python
        known = {"django": "tests/runtests.py APP", "sympy": "bin/test PATH"}
        return f"{python} {known.get(self.runner, ' '.join(('-m pytest', *self.tests)))}"

    def protected(self, path: str) -> bool:
        """Whether a change of the file ``path`` is left out of what a policy hands in.

        These are tests, what configures them or runs before them, and what is derived from other files.
        """
        if is_test(path) or _DERIVED.search(path) or path.rpartition("/")[2] in _CONFIGURATION:
            return True
        if path.endswith((".pth", ".pyc", ".pyo")):
            return True
        held = (*self.tests, *self._changed_tests)
        return any(
            path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/") for name in held
        )

    @property
    def _changed_tests(self) -> tuple[str, ...]:
        return tuple(re.findall(r"^diff --git a/(\S+) b/\S+$", self.test_patch, re.M))


def load(
    place: Path, *, images: str = SWE_BENCH, python: str = TESTBED_PYTHON, split: str | None = None
) -> list[Instance]:
    """The instances of a folder made by ``agentgym data build repair``, or of a JSON or JSONL file.

    Args:
        place: The folder or the file.
        images: Name of the image of an instance whose record names none, with ``{id}``, ``{id_1776}`` or
            ``{id_s}`` in it.
        python: The interpreter of the images that runs the tests; it has to have pytest.
        split: Of a record that names none.

    Raises:
        DataUnavailable: It cannot be read.
        UsageError: A record is none, or nobody here can run its tests.
    """
    source = place / "instances.jsonl" if place.is_dir() else place
    try:
        text = source.read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip().startswith("[") else list(_lines(text))
    except (OSError, ValueError) as error:
        raise DataUnavailable(
            f"{source} cannot be read: {error}",
            hint="give a folder of `agentgym data build repair`, or a JSON or JSONL file of records",
        ) from error
    return [_instance(record, source, images, python, split) for record in records]


def _lines(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def _instance(
    record: Mapping[str, Any], source: Path, images: str, python: str, split: str | None
) -> Instance:
    try:
        id = str(record["instance_id"])
        made = Instance(
            id=id,
            repo=str(record["repo"]),
            version=str(record.get("version") or ""),
            statement=str(record["problem_statement"]),
            patch=str(record["patch"]),
            test_patch=str(record["test_patch"]),
            fail_to_pass=_listed(record["FAIL_TO_PASS"]),
            pass_to_pass=_listed(record["PASS_TO_PASS"]),
        )
        if made.repo in _RUNNERS:
            made = replace(
                made,
                runner=_RUNNERS[made.repo],
                fail_to_pass=tuple(map(_as_pytest, made.fail_to_pass)),
                pass_to_pass=tuple(map(_as_pytest, made.pass_to_pass)),
            )
        ours = record.get("agentgym")
        if ours is not None:
            for name in (id, *ours["libraries"]):
                # They are folders of this machine, whose files a policy will see.
                if not re.fullmatch(r"\w[\w.+-]*", name):
                    raise ValueError(f"{name!r} cannot name a folder")
            return replace(
                made,
                folder=source.parent / "repositories" / id,
                modules=tuple(ours["modules"]),
                libraries=tuple(ours["libraries"]),
                tests=tuple(ours["tests"]),
                licence=str(ours["licence"]),
                split=str(ours["split"]),
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{source.name} holds a record that is no instance: {type(error).__name__}: {error}",
            hint="each needs instance_id, repo, patch, test_patch, problem_statement, FAIL_TO_PASS "
            "and PASS_TO_PASS",
        ) from error
    strange = [name for name in made.fail_to_pass if ".py" not in name.partition("::")[0]]
    if strange and made.runner == "pytest":
        raise UsageError(
            f"the tests of {id} are not named as pytest names them: {strange[0]!r}",
            hint=f"of repositories with a test runner of their own, {' and '.join(_RUNNERS)} are supported: "
            "leave the records of others out",
        )
    if not made.fail_to_pass:
        raise UsageError(f"the record of {id} lists no test that a repair makes pass", hint="leave it out")
    if not made.test_files:
        raise UsageError(f"the record of {id} names no file of tests", hint="leave it out")
    lower = id.lower()
    try:
        named = images.format(id=id, id_1776=lower.replace("__", "_1776_"), id_s=lower.replace("__", "_s_"))
    except (LookupError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{images!r} cannot name images: {error}", hint="write {id}, {id_1776} or {id_s} in it"
        ) from error
    return replace(
        made,
        base_commit=str(record.get("base_commit") or ""),
        image=str(record.get("image_name") or record.get("docker_image") or named),
        dockerfile=str(record.get("dockerfile") or ""),
        python=python,
        split=str(record.get("split") or split or "test"),
    )


def _as_pytest(name: str) -> str:
    """Pytest's name of a test of Django; any other name stays."""
    found = _METHOD.fullmatch(name)
    if found is None:
        return name
    method, module, kind = found.groups()
    if kind == method and "." in module:
        module, _, kind = module.rpartition(".")
    return f"tests/{module.replace('.', '/')}.py::{kind}::{method}"


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    made = json.loads(value) if isinstance(value, str) else value
    if not isinstance(made, list) or not all(isinstance(name, str) for name in made):
        raise ValueError("a list of tests is none")
    return tuple(made)
