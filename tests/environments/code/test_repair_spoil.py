"""Tests made to fail: exactly those that are said to, once each, whatever they look like."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.environments.code import repair_spoil
from agentgym.environments.code.repair_scoring import SPOILER

FILES = {
    "test_one.py": '''"""Shapes."""
import functools
import unittest

import pytest


def double(value):
    return 2 * value


@pytest.fixture
def five():
    return 5


def test_literal(five):
    """Said."""
    assert double(five) == 10


@pytest.mark.parametrize(("given", "expected"), [(1, 2), pytest.param("a[", "a[a[", id="x]::y")])
def test_given(given, expected):
    assert double(given) == expected  # a remark


def test_other_way():
    for value in (1, 2):
        text = """
no indent
"""
        assert text


def test_line(): assert double([1]) == [1, 1]


def test_call(): double(1)


def test_returns(five):
    if five:
        return
    assert False


def test_returns_at_the_end():
    try:
        return None
    finally:
        pass


def test_raises():
    with pytest.raises(AssertionError):
        assert double(1) == 3


def test_never_left():
    assert {"a": [double(-1), b"x"]} == {"a": [-2, b"x"]}


def called():
    test_called()


def test_called():
    assert double("") == ""


def test_generator_inside():
    def numbers():
        yield 1
        return
    assert list(numbers()) == [1]


if True:
    def test_defined_below():
        assert double(1.5) == 3.0
else:
    def test_defined_below():
        raise ValueError


class TestMethods:
    value = 1

    def test_method(self):
        assert self.value == 1

    @staticmethod
    def test_static():
        assert double(True) == 2

    class TestInner:
        def test_inner(self):
            assert double("x") == "xx"


class Cases(unittest.TestCase):
    def test_equal(self):
        self.assertEqual(double("x"), "xx", "said")

    def test_true(self):
        self.assertTrue(double(1))

    def test_returns_early(self):
        return


class MoreCases(Cases):
    def test_more(self):
        self.assertListEqual([], double([]))
''',
    "test_two.py": """import unittest
from test_one import Cases as Old, TestMethods
from shared import Mixin, attach


class TestHere(TestMethods):
    def test_here(self):
        assert self.value


class MixedCases(Mixin, unittest.TestCase):
    pass


class MoreMixedCases(MixedCases):
    pass


class MadeCases(unittest.TestCase):
    pass


attach(MadeCases)
globals()["Made2Cases"] = type("Made2Cases", (MadeCases,), {})""",
    "test_tabs.py": "def test_tabs():\n\tif True:\n\t\tvalue = (1,\n2)\n\tassert value\n",
    "test_lines.py": "def test_lines():\r\n    value = 1\r\n    assert value\r\n",
    "test_marked.py": "\ufeffdef test_marked(): pass\n",
}
SHARED = """class Mixin:
    def test_mixed(self):
        assert self.shortDescription() is None


def attach(cls):
    for number in range(2):
        setattr(cls, f"test_made_{number}", lambda self: None)
"""
ALONE = {"test_one.py::test_called", "test_one.py::test_call", "test_marked.py::test_marked"}


def run(folder: Path) -> dict[str, str]:
    """Outcome by test, of pytest in a process of its own."""
    made = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-q", "-rA", "--tb=short", "-p", "no:cacheprovider", *FILES],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    told = re.findall(r"^(PASSED|FAILED|ERROR) (.*?)(?: - .*)?$", made.stdout, re.M)
    assert told, made.stdout + made.stderr
    return {name: outcome.lower() for outcome, name in told}


def test_exactly_the_spoiled_tests_fail(tmp_path: Path) -> None:
    for name, text in {**FILES, "shared.py": SHARED}.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_classes = Test* *Cases\n")
    before = run(tmp_path)
    assert [name for name, outcome in before.items() if outcome != "passed"] == [] and len(before) > 35
    task = {"root": str(tmp_path), "tests": list(before), "places": []}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(SPOILER)],
        input=json.dumps(task), capture_output=True, text=True, check=True,
    )  # fmt: skip
    made: dict[str, Any] = json.loads(done.stdout)
    first, second = map(set, made["spoiled"])
    assert not first & second and first and second
    assert set(before) - first - second == ALONE and set(made["loose"]) == {"test_marked.py::test_marked"}
    for texts, spoiled in zip(made["texts"], (first, second), strict=True):
        for name, text in FILES.items():
            (tmp_path / name).write_bytes(texts.get(name, text).encode())
        after = run(tmp_path)
        assert after.keys() == before.keys()
        assert {name for name, outcome in after.items() if outcome == "failed"} == spoiled


def test_how_many_are_spoiled_tells_nothing_of_one(tmp_path: Path) -> None:
    names = [f"test_{number}" for number in range(20)]
    (tmp_path / "test_a.py").write_text("".join(f"def {name}():\n    assert {name!r}\n" for name in names))
    tests = [f"test_a.py::{name}" for name in names]
    draws = [repair_spoil.spoil(str(tmp_path), tests, [], tests[:10], 3)["spoiled"] for _ in range(20)]
    assert all(sorted(first + second) == sorted(tests) for first, second, *_ in draws)
    assert len({len(first) for first, *_ in draws}) > 2
    further = [set(spoiled) for draw in draws for spoiled in draw[2:]]
    assert set().union(*further) == set(tests[:10]) and not set.intersection(*further)


@pytest.mark.parametrize(
    "text",
    [
        "async def test_it(): assert 1 == 1\n",
        "def test_it():\n    yield\n",
        "@raises(AssertionError)\ndef test_it():\n    assert 1\n",
        "@unittest.expectedFailure\ndef test_it():\n    assert 1\n",
        "def test_it():\n    if x: return\n",
        "def test_it(): raises(x)\n",
    ],
)
def test_what_might_not_fail_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "test_a.py").write_text(text)
    made = repair_spoil.spoil(str(tmp_path), ["test_a.py::test_it"], [])
    assert made == {"texts": [{}, {}], "spoiled": [[], []], "loose": []}


def test_files_that_are_none_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"def (\xff")
    (tmp_path / "deep.py").write_text("(" * 5_000)
    tests = ["bad.py::test_a", "deep.py::test_b", "none.py::test_c", "doc.txt::doc.txt"]
    assert repair_spoil.spoil(str(tmp_path), tests, [])["loose"] == tests


@given(st.text() | st.binary() | st.integers(0, 10**14) | st.floats(0, 1e14))
def test_another_literal_is_not_equal(value: object) -> None:
    other = repair_spoil._other(value)
    assert other and eval(other) != value
    assert isinstance(eval(other), type(value))


def test_a_wrong_comparison_is_wrong() -> None:
    for _ in range(200):
        with pytest.raises(AssertionError):
            exec(repair_spoil._wrong())
