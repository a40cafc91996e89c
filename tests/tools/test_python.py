from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentgym.sandboxes import Sandbox
from agentgym.sandboxes.session import PythonSession
from agentgym.tools import ToolResult, make_tool
from agentgym.tools.python import python_tool

Run = Callable[..., Any]


def calls(play: Run, *cells: str, **options: Any) -> list[ToolResult]:
    async def body(sandbox: Sandbox) -> list[ToolResult]:
        made = python_tool(sandbox, **options)
        return [await made.acall({"code": code}) for code in cells]

    told: list[ToolResult] = play(body)
    return told


def test_names_go_on(play: Run) -> None:
    told = calls(play, "x = 20", "x * 2 + 2", "y", "import os; os._exit(1)", "'x' in globals()")
    assert [result.content for result in told[:2]] == ["(no output)", "42"]
    assert told[2].content.endswith("NameError: name 'y' is not defined")
    assert told[3].content == (
        "[the interpreter ended with status 1; its state is lost, and the next call starts a new one]"
    )
    assert told[4].content == "False"
    assert all(result.ok for result in told)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("```python\n1 + 1\n```", "2"),
        ("```\n1 + 1\n```\n", "2"),
        (" ```py\nx = '`'\nx\n``` ", "'`'"),
        ("s = '''\n```\n'''\nlen(s)", "5"),
    ],
)
def test_a_fence_is_taken_off(play: Run, code: str, value: str) -> None:
    assert calls(play, code)[0].content == value


def test_a_fence_inside_is_left(play: Run) -> None:
    (told,) = calls(play, "```python\n1\n```\n```python\n2\n```")
    assert "SyntaxError" in told.content


def test_deadlines(play: Run) -> None:
    (told,) = calls(play, "import time\nprint('said')\ntime.sleep(60)", seconds=0.7)
    assert told.content.startswith("said\nTraceback")
    assert told.content.endswith("KeyboardInterrupt\n[interrupted: it did not end within 0.7 s]")


def test_what_cannot_be_run_and_long_output(play: Run) -> None:
    empty, long = calls(play, "", "print('x' * 100_000)", limit=1_000)
    assert empty.content == "Error: there is nothing to run"
    assert "… [99001 characters left out] …" in long.content


def test_a_sandbox_that_the_policy_ended_is_data(broken: Run) -> None:
    async def body(sandbox: Sandbox) -> ToolResult:
        return await python_tool(sandbox).acall({"code": "1"})

    told = broken(body)
    assert not told.ok
    assert "the sandbox has ended" in told.content


def test_by_name_and_over_a_session(play: Run) -> None:
    async def body(sandbox: Sandbox) -> str:
        session = PythonSession(sandbox)
        await session.run("x = 'shared'", seconds=10)
        return (await make_tool("python", sandbox=session).acall({"code": "print(x)"})).content

    assert play(body) == "shared"
