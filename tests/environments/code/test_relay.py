"""Tests in one sandbox, code in another: what crosses, and what cannot."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter, namedtuple
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.environments.code.relay import Verdict, relay
from agentgym.environments.code.relayed import LONGEST, decoded, encoded, line
from agentgym.errors import JudgeFailed
from agentgym.sandboxes import make_backend

numbers = st.integers() | st.floats() | st.complex_numbers() | st.booleans()
hashable = st.recursive(
    st.none() | numbers | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
plain = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_cross_exactly(value: Any) -> None:
    back = decoded(json.loads(line(value)))
    # repr tells 1 from 1.0 from True, 0.0 from -0.0, and nan from nothing else.
    assert sorted(repr(back)) == sorted(repr(value)) and type(back) is type(value)
    if value == value and "nan" not in repr(value):
        assert back == value


def test_numbers_cross_whatever_their_size() -> None:
    for value in (10**5000, -(2**70), math.inf, -math.inf, 5e-324, -0.0, "\ud800", True, (1,), set()):
        back = decoded(json.loads(line(value)))
        assert repr(back)[:99] == repr(value)[:99] if not isinstance(value, int) else back == value


def test_a_subclass_crosses_as_what_it_is_a_subclass_of() -> None:
    class Sly(list[int]):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Colour(IntEnum):
        RED = 3

    point = namedtuple("point", "x y")
    for value, crossed in (
        (Sly([1]), [1]),
        (Colour.RED, 3),
        (point(1, 2), (1, 2)),
        (Counter("aa"), {"a": 2}),
    ):
        back = decoded(encoded(value))
        assert back == crossed and type(back) is type(crossed)


@pytest.mark.parametrize(
    "value", [object(), range(3), iter([]), print, 1j.__class__, [object()], {1: object()}]
)
def test_anything_else_does_not_cross(value: Any) -> None:
    with pytest.raises(ValueError, match="no plain value"):
        line(value)


def test_what_is_too_deep_or_too_long_does_not_cross() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="too deeply"):
        line(deep)
    with pytest.raises(ValueError, match="more than"):
        line("x" * LONGEST)


@pytest.mark.parametrize(
    "given", [[], ["i"], ["q", 1], 3, {"i": 1}, ["i", []], ["d", [1]], ["s", [["l", []]]]]
)
def test_what_is_no_value_is_refused(given: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        decoded(given)


def judged(
    code: str, tests: str, where: Mapping[str, Any], *, seconds: float = 20.0, function: str = "f"
) -> Verdict:
    async def play() -> Verdict:
        async with (
            make_backend(where["sandbox"], **where.get("sandbox_options", {})) as backend,
            await backend.start() as judge,
            await backend.start() as candidate,
        ):
            return await relay(
                judge,
                candidate,
                tests=tests,
                programs=["import math", code],
                function=function,
                seconds=seconds,
            )

    return asyncio.run(play())


DOUBLE = """
def check(candidate):
    assert candidate(3) == 6 and type(candidate(3)) is int
    assert candidate("ab") == "abab"
    assert candidate([1.5]) == [1.5, 1.5]
    try:
        candidate(None)
    except TypeError as error:
        assert "unsupported" in str(error)
    else:
        assert False
"""


def test_right_code_passes_and_wrong_code_fails(sandboxed: Mapping[str, Any]) -> None:
    assert judged("def f(x): return x * 2", DOUBLE, sandboxed) == Verdict(True, "", 5)
    assert judged("def f(x): return x + x + 0", DOUBLE, sandboxed) == Verdict(False, "test", 3)


ALWAYS = "class Always:\n  def __eq__(self, other): return True\n  __ne__ = __lt__ = __bool__ = __eq__\n"
PASSED = 'import os\nfor fd in range(3, 30):\n  try: os.write(fd, b"passed\\n" * 9)\n  except OSError: pass\n'

CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit when called": "def f(x): raise SystemExit(0)",
    "hard exit": "import os; os._exit(0)",
    "kill all": "import os\ndef f(x): os.kill(-1, 9)",
    "object": ALWAYS + "def f(x): return Always()",
    "object inside": ALWAYS + "def f(x): return [Always(), {1: Always()}]",
    "exception": ALWAYS + "class E(Always, Exception): pass\ndef f(x): raise E('passed')",
    "stop iteration": "def f(x): raise StopIteration",
    "says so": PASSED,
    "says so when called": "def f(x):\n" + "".join(f"  {row}\n" for row in PASSED.splitlines()),
    "patches": "import builtins, json\nbuiltins.AssertionError = OSError\njson.dumps = lambda *a, **k: ''",
    "exit handler": "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))",
    "syntax": "def f(x: return",
    "no function": "g = 1",
    "nan": "def f(x): return float('nan')",
    "floods": "import os\ndef f(x):\n  while True:\n    for fd in range(3, 9):\n"
    "      try: os.write(fd, b'=1' * 9999)\n      except OSError: pass",
    "too long": "def f(x): return 'x' * (1 << 22)",
    "too deep": "def f(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a",
    "nonsense": "import sys\ndef f(x):\n  sys.modules['__main__'].line = lambda v: '[' * 100000\n  return 1",
}

STRICT = """
def check(candidate):
    assert all(candidate(x) == x + 1 for x in range(3))
    assert list(map(candidate, [4, 5])) == [5, 6]
"""


def test_only_an_answer_passes(unsafe: Mapping[str, Any]) -> None:
    assert judged("def f(x): return x + 1", STRICT, unsafe) == Verdict(True, "", 5)


@pytest.mark.bubblewrap
@pytest.mark.parametrize("cheat", CHEATS)
def test_no_trick_passes(cheat: str) -> None:
    verdict = judged(CHEATS[cheat], STRICT, {"sandbox": "bubblewrap"}, seconds=10.0)
    assert not verdict.passed, verdict


def test_code_that_does_not_answer_in_time_fails(unsafe: Mapping[str, Any]) -> None:
    assert judged("def f(x):\n  while True: pass", STRICT, unsafe, seconds=1.0) == Verdict(False, "time", 1)


def test_code_does_not_see_the_tests(unsafe: Mapping[str, Any]) -> None:
    code = """
import gc, sys
def f(x):
    held = [repr(o) for o in gc.get_objects() if isinstance(o, dict)] + list(map(repr, sys.argv))
    return any("SECRET" "7" in text for text in held)
"""
    tests = 'def check(candidate):\n    SECRET7 = "SECRET7"\n    assert candidate(1) is False\n'
    assert judged(code, tests, unsafe).passed


def test_tests_that_do_not_start_are_no_verdict(unsafe: Mapping[str, Any]) -> None:
    with pytest.raises(JudgeFailed, match="do not start"):
        judged("def f(x): return x", "raise RuntimeError", unsafe)
