"""HumanEval: its problems, its visible examples, and what an episode is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import agentgym
from agentgym.actions import write_calls
from agentgym.environments.code.humaneval import LONGEST, HumanEval
from agentgym.environments.code.humaneval_data import Example, examples, problems
from agentgym.errors import EnvironmentFailed, MissingData, UsageError
from agentgym.evaluation.run import EvaluationConfig, evaluate
from agentgym.messages import ToolCall
from agentgym.policies import PolicyContext, make_policy
from agentgym.registry import base
from agentgym.rollout.engine import RolloutConfig
from agentgym.wrappers.stack import EnvConfig

TRICKY = ("HumanEval/32", "HumanEval/33", "HumanEval/38", "HumanEval/50")
"""Their tests use what the prompt defines, or the function itself."""


@pytest.fixture(scope="module")
def folder(obtained: Callable[[str], Path]) -> Path:
    return obtained("humaneval")


@pytest.fixture
def env(folder: Path, unsafe: Mapping[str, Any]) -> Iterator[HumanEval]:
    made = HumanEval(folder=folder, **unsafe)
    yield made
    made.close()


def call(name: str, code: str) -> str:
    return write_calls([ToolCall(name, {"code": code})])


def begin(env: HumanEval, number: int) -> str:
    return env.reset(seed=0, options={"task_id": f"HumanEval/{number}"})[0]


def test_there_are_164_problems_and_most_have_examples(folder: Path) -> None:
    found = problems(folder)
    assert list(found) == [f"HumanEval/{number}" for number in range(164)]
    assert sum(bool(problem.examples) for problem in found.values()) == 133
    assert sum(len(problem.examples) for problem in found.values()) == 370


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (">>> f(1)\n    2\n    >>> f('a')\n    'aa'", [("f(1)", "2"), ("f('a')", "'aa'")]),
        (">>> round(f(1), 2)  # about\n    2.0", [("round(f(1), 2)  # about", "2.0")]),
        (">>> f(1)\n    what it gives", []),
        (
            "f(1) == 2\n    f([1, (2)]) ➞ [2]\n    f(')') => ')'",
            [("f(1)", "2"), ("f([1, (2)])", "[2]"), ("f(')')", "')'")],
        ),
        ("f(1) ==> true, or not\n    f(2) -> true", [("f(2)", "True")]),
        ("f(1) # returns 'one'\n    f(2) returns 'two'.", [("f(1)", "'one'"), ("f(2)", "'two'")]),
        ("f([1,\n    2]) == 3  # a sum", [("f([1, 2])", "3")]),
        ("f(3) -> 19 - 5 - 6 = 8\n    f(a) => 1\n    f(x=1) == 1\n    of(1) == 2", [("f(3)", "8")]),
        ("f(1, g(2)) == 3\n    f(1", []),
    ],
)
def test_examples_are_read_where_they_parse(told: str, found: list[tuple[str, str]]) -> None:
    prompt = f'def g(x):\n    """ f(9) == 9 """\n\ndef f(x):\n    """Do it.\n    {told}\n    """\n'
    assert list(examples(prompt, "f")) == [Example(*pair) for pair in found]


def test_an_escape_in_a_docstring_is_one_of_the_example(folder: Path) -> None:
    first, *_ = problems(folder)["HumanEval/51"].examples
    assert (first.source, first.want) == ("remove_vowels('')", "''")
    assert any("\\n" in example.source for example in problems(folder)["HumanEval/51"].examples)


def test_running_shows_what_fails(env: HumanEval) -> None:
    observation = begin(env, 0)
    assert "has_close_elements" in observation and "the 2 examples" in observation
    good = "def has_close_elements(numbers: List[float], threshold):\n    return threshold > 0.4\n"
    assert env.step(call("run", "print('hi')\n" + good)) == (
        "FAILED has_close_elements([1.0, 2.0, 3.0], 0.5)\n  expected False\n  got True\n"
        "FAILED has_close_elements([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3)\n  expected True\n  got False\n"
        "0 of 2 examples passed.\n\nIt printed:\nhi",
        0.0,
        False,
        False,
        {"valid_action": True, "score": 0.0, "success": False, "role": "tool"},
    )
    for code, said in (
        ("def f(:", "SyntaxError"),
        ("1 / 0", 'File "solution.py", line 1, in <module>\nZeroDivisionError: division by zero'),
        ("def has_close_elements(a, b): return {}[a]", "TypeError: unhashable type: 'list'"),
        ("def has_close_elements(a, b):\n  class A:\n    __repr__ = None\n  return A()", "whose repr raises"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(3)", "It ended with status 3."),
        ("print('x' * 10**6)", "more characters]"),
    ):
        observation, reward, terminated, *_ = env.step(call("run", code))
        assert said in observation and (reward, terminated) == (0.0, False)
        assert len(observation) < 10_000


def test_an_endless_run_is_stopped(folder: Path, unsafe: Mapping[str, Any]) -> None:
    env = HumanEval(folder=folder, limits={"seconds": 0.5}, **unsafe)
    begin(env, 0)
    assert env.step(call("run", "while True: pass"))[0] == "It was stopped after 0.5 seconds."
    env.close()


def test_code_that_is_too_long_is_refused(env: HumanEval) -> None:
    begin(env, 0)
    for name in ("run", "submit"):
        observation, _, terminated, _, info = env.step(call(name, "x" * (LONGEST + 1)))
        assert "100000 are taken" in observation and not terminated and not info["valid_action"]


@pytest.mark.parametrize("task_id", TRICKY)
def test_the_solution_passes_and_a_stub_does_not(
    task_id: str, folder: Path, sandboxed: Mapping[str, Any]
) -> None:
    env = HumanEval(folder=folder, **sandboxed)
    task = env.find_task(task_id)
    for action in env.expert(task):
        if action == env.expert(task)[0]:
            env.reset(seed=0, options={"task_id": task_id})
        _, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["success"], info["failure"]) == (1.0, True, True, "")
    for code in ("", "x = 1", f"def {task.metadata['function']}(*_): return ''"):
        env.reset(seed=0, options={"task_id": task_id})
        _, reward, terminated, _, info = env.step(call("submit", code))
        assert (reward, terminated, info["success"], info["failure"]) == (0.0, True, False, "test")
    env.close()


def test_a_policy_that_ends_its_sandbox_goes_on_in_another(env: HumanEval) -> None:
    begin(env, 0)
    observation, _, terminated, *_ = env.step(call("run", "import os; os.kill(os.getppid(), 9)"))
    assert "a new one was started" in observation and not terminated
    assert env.step(env.expert(env.task)[1])[1] == 1.0


def test_what_is_hidden_stays_hidden(env: HumanEval) -> None:
    seen = []
    for number in range(0, 164, 40):
        observation, info = env.reset(seed=0, options={"task_id": f"HumanEval/{number}"})
        seen += [observation, json.dumps(info)]
        observation, *_, info = env.step(call("submit", "raise ValueError"))
        seen += [observation, json.dumps(info)]
        hidden = env.task.private["tests"]
        asserted = [row.strip() for row in hidden.splitlines() if "assert" in row and len(row) > 25]
        assert asserted and not [row for row in asserted for text in seen if row in text]
        assert repr(env.task).count("assert") == 0


def test_data_that_are_missing_or_damaged_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"nothing")
    with pytest.raises(EnvironmentFailed, match="cannot be read"):
        HumanEval(folder=tmp_path).tasks("test")
    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(MissingData, match="agentgym data get humaneval"):
        HumanEval().tasks("test")
    with pytest.raises(UsageError, match="test_seconds"):
        HumanEval(test_seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "worth"), [("oracle", 1.0), ("nop", 0.0)])
def test_every_problem_is_solved_by_its_solution_and_by_nothing_less(
    name: str, worth: float, folder: Path, isolated: Mapping[str, Any]
) -> None:
    env = EnvConfig("agentgym/HumanEval-v0", dict(isolated))
    policy = make_policy(name, PolicyContext(env.id, dict(env.kwargs)))
    report = evaluate(env, policy, EvaluationConfig(episodes=164, rollout=RolloutConfig(concurrency=4)))
    assert report.success is not None
    assert (report.tasks, report.success.mean, report.reward) == (164, worth, worth)


def test_the_id_makes_it(folder: Path) -> None:
    env = agentgym.make("agentgym/HumanEval-v0")
    assert isinstance(base(env), HumanEval) and len(base(env).tasks("test")) == 164
    env.close()
