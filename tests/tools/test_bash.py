from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentgym.errors import SandboxFailed, ToolFailed
from agentgym.messages import ToolCall
from agentgym.sandboxes import Process, Sandbox, make_backend
from agentgym.sandboxes.session import ShellSession
from agentgym.tools import Toolbox, ToolResult, make_tool
from agentgym.tools.bash import bash_tool

Run = Callable[..., Any]


def calls(play: Run, *commands: str, **options: Any) -> list[ToolResult]:
    async def body(sandbox: Sandbox) -> list[ToolResult]:
        made = bash_tool(sandbox, **options)
        return [await made.acall({"command": command}) for command in commands]

    told: list[ToolResult] = play(body)
    return told


def test_a_shell_goes_on_and_tells_the_status(play: Run) -> None:
    told = calls(
        play,
        "mkdir a; cd a; X=1",
        "basename $PWD; echo $X",
        "echo no >&2; false",
        "(exit 3)",
        "exit 2",
        "echo .$X",
    )
    assert [result.content for result in told] == [
        "(no output)",
        "a\n1",
        "no\n[exit status 1]",
        "[exit status 3]",
        "[the shell ended with status 2; its state is lost, and the next call starts a new one]",
        ".",
    ]
    assert all(result.ok for result in told)


def test_deadlines(play: Run) -> None:
    (told,) = calls(play, "echo said; sleep 60", seconds=0.5)
    assert told.content == "said\n[interrupted: it did not end within 0.5 s]\n[exit status 130]"


def test_long_output_keeps_both_ends(play: Run) -> None:
    (told,) = calls(play, "seq 1 20000; false", limit=30_000)
    assert told.content.startswith("1\n2\n")
    assert told.content.endswith("\n19999\n20000\n[exit status 1]")
    assert "characters left out] …" in told.content
    assert 30_000 < len(told.content) < 30_100


def test_what_cannot_be_run(play: Run) -> None:
    empty, nul, long = calls(play, "  ", "a\0b", "x" * 300_000)
    assert not (empty.ok or nul.ok or long.ok)
    assert empty.content == "Error: there is nothing to run"
    assert "300000 characters" in long.content


def test_a_sandbox_that_the_policy_ended_is_data(broken: Run) -> None:
    async def body(sandbox: Sandbox) -> ToolResult:
        return await bash_tool(sandbox).acall({"command": "echo"})

    told = broken(body)
    assert not told.ok
    assert told.content.startswith("Error: the sandbox has ended and nothing more can be run in it: ")


def test_ending_it_by_the_call_itself_is_data() -> None:
    async def body() -> list[ToolResult]:
        async with await make_backend("process", unsafe=True).start() as sandbox:
            made = bash_tool(sandbox)
            return [await made.acall({"command": "kill -9 $PPID; sleep 9"}) for _ in range(2)]

    assert all("the sandbox has ended" in told.content for told in asyncio.run(body()))


def test_a_sandbox_that_broke_is_raised(play: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(sandbox: Sandbox) -> None:
        made = bash_tool(sandbox)
        assert (await made.acall({"command": "true"})).ok

        async def fail(self: Process, data: bytes) -> None:
            raise SandboxFailed("the machine is on fire")

        opened = await sandbox.open(["true"])
        monkeypatch.setattr(type(opened), "write", fail)
        with pytest.raises(SandboxFailed, match="on fire"):
            await made.acall({"command": "true"})

    play(body)


def test_a_sandbox_that_the_caller_closed_is_no_data(play: Run) -> None:
    async def body(sandbox: Sandbox) -> None:
        made = bash_tool(sandbox)
        await sandbox.close()
        with pytest.raises(ToolFailed, match="is closed"):
            await made.acall({"command": "true"})

    play(body)


def test_by_name_and_over_a_session(play: Run) -> None:
    async def body(sandbox: Sandbox) -> list[str]:
        shell = ShellSession(sandbox)
        await shell.run("X=shared", seconds=10)
        box = Toolbox([make_tool("bash", sandbox=shell, description="Run.")])
        assert box.schemas[0]["function"]["description"] == "Run."
        assert box.schemas[0]["function"]["parameters"]["required"] == ["command"]
        return [(await box.acall(ToolCall("bash", {"command": "echo $X"}))).content]

    assert play(body) == ["shared"]
