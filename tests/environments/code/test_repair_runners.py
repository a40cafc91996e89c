"""Repository repair: repositories whose tests are not run as pytest alone would run them."""

from __future__ import annotations

import ast
import asyncio
import difflib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym.environments.code import repair_scoring
from agentgym.environments.code.repair_instances import Instance, load
from agentgym.environments.code.repair_measure import RUNNER, Run
from agentgym.environments.code.repair_scoring import Verdict
from agentgym.errors import UsageError
from agentgym.sandboxes import Sandbox, SandboxSpec, make_backend

WRONG, RIGHT = "def add(a, b):\n    return a - b\n", "def add(a, b):\n    return a + b\n"

RUNTESTS = """
import argparse, sys, unittest

parser = argparse.ArgumentParser()
parser.add_argument("modules", nargs="*")
parser.add_argument("--verbosity", type=int)
parser.add_argument("--settings")
parser.add_argument("--parallel", type=int)
given = parser.parse_args()
assert given.settings == "test_sqlite" and given.parallel == 1
tests = unittest.defaultTestLoader.loadTestsFromNames(given.modules)
sys.exit(bool(unittest.TextTestRunner(verbosity=given.verbosity).run(tests).failures))
"""
BASE = """
import unittest
from django.core import add

class Base:
    def test_inherited(self):
        self.assertEqual(add(0, 0), 0)

class Shared(unittest.TestCase):
    def test_shared(self):
        self.assertEqual(add(7, 0), 7)
"""
METHODS = """
import unittest
from django.core import add
from sums.base import Base, Shared

class Sums(Base, unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(1, 2), 3)

    def test_parts(self):
        for number in (1, 2):
            with self.subTest(number=number):
                self.assertEqual(add(number, 1), number + 1)

    def test_told(self):
        "Sums of nothing are nothing."
        self.assertEqual(add(0, 0), 0)

    def test_more(self):
        '''
        Adding twice adds more.
        '''
        self.assertEqual(add(add(1, 1), 1), 3)

    @unittest.skip("not here")
    def test_skipped(self):
        raise AssertionError

    def test_broken(self):
        raise ValueError
"""
FUNCTIONS = """
from sympy.core import add

class Skipped(Exception):
    pass

def test_add():
    assert add(1, 2) == 3

def test_zero():
    assert add(0, 0) == 0

def test_skipped():
    raise Skipped

def test_broken():
    raise ValueError

def test_many():
    for number in (0, 1):
        yield check, number

def check(number):
    assert add(number, 0) == number
"""

DJANGO = (
    {"tests/runtests.py": RUNTESTS, "tests/sums/__init__.py": "", "tests/sums/base.py": BASE},
    "tests/sums/tests.py",
    METHODS,
)
SYMPY: tuple[dict[str, str], str, str] = (
    {"sympy/tests/__init__.py": ""},
    "sympy/tests/test_sums.py",
    FUNCTIONS,
)


def change(path: str, old: str, new: str) -> str:
    """A patch, as git writes it; of a new file where there was nothing."""
    lines = difflib.unified_diff(
        old.splitlines(True), new.splitlines(True), f"a/{path}" if old else "/dev/null", f"b/{path}"
    )
    return f"diff --git a/{path} b/{path}\n" + ("" if old else "new file mode 100644\n") + "".join(lines)


def made(folder: Path, record: Mapping[str, object]) -> Instance:
    """The instance of a record, with the repository in a folder instead of an image."""
    package = str(record["repo"]).partition("/")[0]
    files, place, text = DJANGO if package == "django" else SYMPY
    for path, content in {**files, f"{package}/__init__.py": "", f"{package}/core.py": WRONG}.items():
        (folder / "repository" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "repository" / path).write_text(content)
    whole = {
        "instance_id": "o__n-1",
        "patch": change(f"{package}/core.py", WRONG, RIGHT),
        "test_patch": change(place, "", text),
        "problem_statement": "Sums are wrong.",
        **record,
    }
    (folder / "records.json").write_text(json.dumps([whole]))
    (found,) = load(folder / "records.json")
    return replace(found, image=None, base_commit="", folder=folder / "repository")


def judged(instance: Instance, *patches: str) -> list[Verdict]:
    async def judge() -> list[Verdict]:
        async with make_backend("bubblewrap") as backend:

            def start(spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
                @asynccontextmanager
                async def opened() -> AsyncIterator[Sandbox]:
                    async with await backend.start(spec) as sandbox:
                        yield sandbox

                return opened()

            return [await repair_scoring.score(start, instance, patch.encode()) for patch in patches]

    return asyncio.run(judge())


OF_DJANGO = {
    "repo": "django/django",
    "FAIL_TO_PASS": [
        "test_add (sums.tests.Sums)",
        "test_parts (sums.tests.Sums.test_parts)",
        "Adding twice adds more.",
    ],
    "PASS_TO_PASS": [
        "Sums of nothing are nothing.",
        "test_inherited (sums.tests.Sums)",
        "test_shared (sums.base.Shared)",
    ],
}
OF_SYMPY = {
    "repo": "sympy/sympy",
    "FAIL_TO_PASS": ["test_add"],
    "PASS_TO_PASS": '["test_zero", "test_many"]',
}
# Every test passes, by the hand of the code that is tested.
FORGED = {
    "django": """
import unittest
for name in ("addFailure", "addError", "addSubTest"):
    setattr(unittest.TestResult, name, lambda self, test, *rest: self.addSuccess(test))
""",
    "sympy": """
import inspect
def emptied(found):
    if getattr(found, "__name__", "").startswith("test"):
        found.__code__ = (lambda: None).__code__.replace(co_filename=found.__code__.co_filename)
        return True
inspect.isfunction = emptied
""",
}


def test_names_of_other_runners_become_pytest_s(tmp_path: Path) -> None:
    instance = made(tmp_path, OF_DJANGO)
    assert instance.fail_to_pass == (
        "tests/sums/tests.py::Sums::test_add",
        "tests/sums/tests.py::Sums::test_parts",
        "Adding twice adds more.",
    )
    assert instance.test_files == ("tests/sums/base.py", "tests/sums/tests.py")
    assert instance.test_command == "python3 tests/runtests.py APP"
    assert made(tmp_path, OF_SYMPY).test_files == ("sympy/tests/test_sums.py",)
    with pytest.raises(UsageError, match="django/django and sympy/sympy are supported") as caught:
        made(tmp_path, {**OF_SYMPY, "repo": "sympy/other"})
    assert "test_add" in str(caught.value)
    with pytest.raises(UsageError, match="lists no test that a repair makes pass"):
        made(tmp_path, {**OF_SYMPY, "FAIL_TO_PASS": []})
    with pytest.raises(UsageError, match="names no file of tests"):
        made(tmp_path, {**OF_SYMPY, "test_patch": change("README", "", "x\n")})


@pytest.mark.bubblewrap
@pytest.mark.parametrize("record", [OF_DJANGO, OF_SYMPY], ids=["django", "sympy"])
def test_a_repair_is_rewarded_and_a_forged_report_is_not(
    tmp_path: Path, record: Mapping[str, object]
) -> None:
    instance = made(tmp_path, record)
    package = instance.runner
    place = f"{package}/core.py"
    other, forged = WRONG.replace("-", "*"), WRONG + FORGED[package]
    good, bad, lie = judged(instance, *(change(place, WRONG, text) for text in (RIGHT, other, forged)))
    assert (good.success, good.why, good.fail_to_pass, good.pass_to_pass) == (True, "", 1.0, 1.0)
    assert not bad.success and bad.fail_to_pass < 1.0
    assert (lie.success, lie.why) == (False, "a test that always fails did not fail")


@pytest.mark.bubblewrap
def test_what_is_equal_to_everything_repairs_nothing(tmp_path: Path) -> None:
    text = FUNCTIONS + "\ndef test_sum():\n    seen = add(1, 2)\n    assert seen == 1 + 2\n"
    record = {**OF_SYMPY, "FAIL_TO_PASS": ["test_sum"], "PASS_TO_PASS": []}
    instance = made(tmp_path, {**record, "test_patch": change(SYMPY[1], "", text)})
    any_ = "class Any(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\n\n\n"
    equal = change("sympy/core.py", WRONG, any_ + "def add(a, b):\n    return Any(0)\n")
    right, wrong = judged(instance, instance.patch, equal)
    assert right.success
    assert (wrong.success, wrong.why) == (False, "a test that always fails did not fail")


def test_a_name_that_a_record_cut_at_a_space_means_all_that_begin_so(tmp_path: Path) -> None:
    names = (
        "sympy/tests/test_sums.py::test_ad",
        "sympy/tests/test_sums.py::test_add[days",
        "a.py::test_b[c]",
    )
    instance = replace(made(tmp_path, OF_SYMPY), runner="pytest")
    runs = [
        Run({f"{names[1]} of]": told, f"{names[1]} off]": "passed", names[2]: "passed"}, {}, {}, True, "", "")
        for told in ("passed", "failed")
    ]
    meant = repair_scoring._meant(instance, names, runs)
    assert meant == {names[0], f"{names[1]} of]", f"{names[1]} off]", names[2]}


@pytest.mark.bubblewrap
def test_a_listed_test_that_is_not_there_does_not_pass(tmp_path: Path) -> None:
    record = {**OF_SYMPY, "PASS_TO_PASS": ["test_zero", "test_gone", "test_skipped", "test_broken"]}
    instance = made(tmp_path, record)
    (verdict,) = judged(instance, instance.patch)
    assert (verdict.success, verdict.fail_to_pass, verdict.pass_to_pass) == (False, 1.0, 0.25)


def test_what_runs_inside_is_python_3_6() -> None:
    ast.parse(RUNNER.read_text(), feature_version=(3, 6))
    assert "from __future__" not in RUNNER.read_text()
