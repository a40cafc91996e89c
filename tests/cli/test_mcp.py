from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp")

import httpx
from mcp import ClientSession, McpError, StdioServerParameters, types
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

GAMES = '''
import subprocess, sys, time
from agentgym.actions import Malformed
from agentgym.env import Env, Transition
from agentgym.errors import ToolFailed
from agentgym.messages import ImagePart, TextPart
from agentgym.task import Task, TaskSet
from agentgym.tools import Toolbox, ToolError, read_turn, tool

SECRET = "xyzzy"


class Door(Env[str]):
    """Say the word; with the tools `say` and `crash`."""

    worker = "async"
    splits = ("train", "test")
    default_split = "test"

    def __init__(self, *, render_mode=None):
        pass

    def tasks(self, split):
        def make(id):
            return Task(id, split, "Say the word.", private={"word": SECRET + "-" + id})
        return TaskSet(split, [f"{split}-{n}" for n in range(3)], make, version="1")

    def begin(self, task):
        print("noise on standard output")
        subprocess.run(["sh", "-c", "echo more noise; cat"])
        self.box = Toolbox([tool(self.say), tool(self.crash)])
        return f"{task.instruction} ({task.id})", {"tools": self.box.schemas}

    def act(self, action):
        turn = read_turn(action)
        if not isinstance(turn, tuple):
            return Transition(f"You said {getattr(turn, 'message', turn)}.", info={"valid_action": False})
        result = self.box.call(turn[0])
        won = result.value is True
        info = {"valid_action": result.ok, "success": won, "role": "tool"}
        return Transition("It opens." if won else result.content, float(won), terminated=won, info=info)

    def say(self, word: str) -> bool:
        """Say a word."""
        if word == self.task.private["word"]:
            return True
        raise ToolError("nothing happens")

    def crash(self) -> None:
        """Crash."""
        raise ToolFailed("it broke near " + self.task.private["word"])


class Count(Env[str]):
    """Plain text, and pictures. Actions are words."""

    worker = "async"
    splits = ("train",)

    def __init__(self, *, limit=3, render_mode=None):
        self.limit = limit

    def tasks(self, split):
        return TaskSet(split, ["1"], lambda id: Task(id, split, "Count up."), version="1")

    def begin(self, task):
        self.n = 0
        return "Count up from 1.", {"admissible_actions": ["1"]}

    def act(self, action):
        if action.startswith("wait"):
            time.sleep(30)
        right = action.strip() == str(self.n + 1)
        self.n += right
        done = self.n == self.limit
        return Transition(f"{self.n} \\ud800", float(right), terminated=done, info={"success": done})

    def content(self, observation):
        return (TextPart(str(observation)), ImagePart(b"\\x89PNG-not-really"))
'''

PLAY = Callable[[ClientSession], Awaitable[Any]]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A process's variables, with the games on its import path."""
    (tmp_path / "games.py").write_text(GAMES)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENTGYM_SERVE")}
    return {**kept, "PYTHONPATH": str(tmp_path)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentgym.cli", "mcp", *arguments]


@contextlib.contextmanager
def http_server(environ: dict[str, str], *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    line = command(*arguments)
    process = subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("serving ")
        yield said.split()[-1], process
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def over_stdio(environ: dict[str, str], *arguments: str) -> AsyncIterator[ClientSession]:
    line = command(*arguments)
    server = StdioServerParameters(command=line[0], args=line[1:], env=environ)
    with Path(os.devnull).open("w") as nothing:  # noqa: ASYNC230
        async with stdio_client(server, nothing) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            yield session


@contextlib.asynccontextmanager
async def over_http(url: str, token: str | None = None) -> AsyncIterator[ClientSession]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        httpx.AsyncClient(headers=headers, timeout=30) as client,
        streamable_http_client(url, http_client=client) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield session


@pytest.fixture(params=["stdio", "http"])
def play(request: pytest.FixtureRequest, environ: dict[str, str]) -> Callable[..., Any]:
    """Plays with a real client against a real server."""

    def run(body: PLAY, *arguments: str) -> Any:
        async def stdio() -> Any:
            async with over_stdio(environ, *arguments) as session:
                return await body(session)

        async def http(url: str) -> Any:
            async with over_http(url) as session:
                return await body(session)

        if request.param == "stdio":
            return asyncio.run(stdio())
        with http_server(environ, *arguments, "--http", "127.0.0.1:0") as (url, _):
            return asyncio.run(http(url))

    return run


def words(result: types.CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, types.TextContent))


def facts(result: types.CallToolResult) -> dict[str, Any]:
    assert result.structuredContent is not None
    return result.structuredContent


def test_an_episode_with_tools(play: Callable[..., Any]) -> None:
    async def body(session: ClientSession) -> None:
        listed = {one.name: one for one in (await session.list_tools()).tools}
        assert list(listed) == ["say", "crash", "reset", "act"]
        assert listed["say"].inputSchema["required"] == ["word"]
        assert listed["say"].description == "Say a word."

        early = await session.call_tool("say", {"word": "x"})
        assert early.isError
        assert "call reset" in words(early)

        begun = await session.call_tool("reset", {"task_id": "test-1"})
        assert words(begun) == "Say the word. (test-1)"
        assert facts(begun) == {"task_id": "test-1", "split": "test", "done": False}

        wrong = await session.call_tool("say", {"word": "x"})
        assert (wrong.isError, words(wrong)) == (True, "Error: nothing happens")
        assert facts(wrong) == {
            "task_id": "test-1", "split": "test", "score": 0.0, "success": False, "valid_action": False,
            "terminated": False, "truncated": False, "reward": 0.0, "done": False,
        }  # fmt: skip

        # What does not fit is a turn, and the environment's to answer.
        assert words(await session.call_tool("say", {})) == "Error: say: word: Field required"
        assert words(await session.call_tool("sya", {})) == "Error: there is no tool 'sya'; try say."
        assert words(await session.call_tool("act", {"action": "hello"})) == "You said hello."

        right = await session.call_tool("say", {"word": "xyzzy-test-1"})
        assert words(right) == "It opens.\n[The episode is over; reset starts another.]"
        assert not right.isError
        told = facts(right)
        assert (told["reward"], told["score"], told["success"], told["done"]) == (1.0, 1.0, True, True)

        over = await session.call_tool("say", {"word": "x"})
        assert (over.isError, "reward" in facts(over)) == (True, False)
        again = await session.call_tool("reset", {"split": "train", "seed": 1})
        assert facts(again)["split"] == "train"

    play(body, "games:Door")


def test_a_text_environment_with_pictures(play: Callable[..., Any]) -> None:
    async def body(session: ClientSession) -> None:
        assert [one.name for one in (await session.list_tools()).tools] == ["reset", "act"]
        begun = await session.call_tool("reset", {})
        assert facts(begun)["admissible_actions"] == ["1"]
        text, image = (await session.call_tool("act", {"action": "1"})).content
        assert isinstance(text, types.TextContent)
        assert text.text == "1 ?"  # half of a surrogate pair cannot travel
        assert isinstance(image, types.ImageContent)
        assert (base64.b64decode(image.data), image.mimeType) == (b"\x89PNG-not-really", "image/png")
        last = await session.call_tool("act", {"action": "2"})
        assert (facts(last)["done"], facts(last)["success"]) == (True, True)

    play(body, "games:Count", "--env", "limit=2")


def test_what_cannot_be_asked(environ: dict[str, str]) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("reset", {"task_id": "nowhere"}, "unknown task 'nowhere'"),
        ("reset", {"split": "nowhere"}, "unknown split 'nowhere'"),
        ("reset", {"seed": "x"}, "valid integer"),
        ("reset", {"sede": 1}, "reset takes no 'sede'"),
        ("act", {}, "act takes one argument"),
        ("act", {"action": 3}, "string"),
    ]

    async def body() -> None:
        async with over_stdio(environ, "games:Door") as session:
            for name, arguments, told in cases:
                assert not (await session.call_tool("reset", {})).isError
                result = await session.call_tool(name, arguments)
                assert result.isError
                assert told in words(result)
                assert (facts(result)["done"], "boundary" in facts(result)["error"]) == (False, False)

    asyncio.run(body())


def test_a_failure_ends_the_episode_without_a_reward_and_tells_nothing_private(
    play: Callable[..., Any],
) -> None:
    async def body(session: ClientSession) -> None:
        await session.call_tool("reset", {"task_id": "test-2"})
        broke = await session.call_tool("crash", {})
        assert (broke.isError, words(broke)) == (True, "it broke near ***")
        assert facts(broke)["error"]["boundary"] == "tool"
        assert facts(broke)["done"]
        assert "reward" not in facts(broke)
        assert (await session.call_tool("say", {"word": "x"})).isError
        assert words(await session.call_tool("reset", {"task_id": "test-0"})) == "Say the word. (test-0)"

    play(body, "games:Door")


def test_a_step_over_its_deadline_is_a_failure(environ: dict[str, str]) -> None:
    async def body() -> None:
        async with over_stdio(
            environ, "games:Count", "--worker", "process", "--step-timeout", "1"
        ) as session:
            await session.call_tool("reset", {})
            late = await session.call_tool("act", {"action": "wait"})
            assert facts(late)["error"]["boundary"] == "environment"
            await session.call_tool("reset", {})
            assert not (await session.call_tool("act", {"action": "1"})).isError

    asyncio.run(body())


def test_an_environment_that_cannot_be_had(environ: dict[str, str]) -> None:
    line = command("games:Nowhere")
    done = subprocess.run(line, env=environ, input="", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Nowhere" in done.stderr


def test_standard_output_carries_the_protocol_alone(environ: dict[str, str]) -> None:
    asked: list[dict[str, Any]] = [
        {"method": "initialize", "params": {"protocolVersion": "2025-06-18", "capabilities": {},
         "clientInfo": {"name": "test", "version": "1"}}},
        {"method": "tools/list"},
        {"method": "tools/call", "params": {"name": "reset", "arguments": {"task_id": "train-0"}}},
        {"method": "tools/call", "params": {"name": "say", "arguments": {"word": "no"}}},
        {"method": "tools/call", "params": {"name": "crash", "arguments": {}}},
    ]  # fmt: skip
    process = subprocess.Popen(
        command("games:Door"), env=environ,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    said = []
    for number, request in enumerate(asked):
        if number == 1:
            process.stdin.write('{"jsonrpc": "2.0", "method": "notifications/initialized"}\nno message\n')
        process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": number, **request}) + "\n")
        process.stdin.flush()
        said.append(process.stdout.readline())
    rest, noise = process.communicate(timeout=20)  # its input ends, and so does it
    assert [json.loads(line)["id"] for line in said] == [0, 1, 2, 3, 4]
    assert (rest, process.returncode) == ("", 0)
    assert "xyzzy" not in "".join(said)
    assert "noise on standard output" in noise
    assert "more noise" in noise


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(environ: dict[str, str], number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("games:Door"), env=environ,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    process.stdin.write(
        json.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": hello}) + "\n"
    )
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    process.communicate()


def test_files_are_no_streams_for_it(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    with (tmp_path / "in").open() as given, (tmp_path / "out").open("w") as taken:
        done = subprocess.run(
            command("games:Door"), env=environ, stdin=given, stdout=taken, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert "no pipes" in done.stderr


class TestHTTP:
    def test_every_session_plays_for_itself(self, environ: dict[str, str]) -> None:
        async def body(url: str) -> None:
            async with over_http(url) as one, over_http(url) as two:
                await one.call_tool("reset", {"task_id": "test-0"})
                await two.call_tool("reset", {"task_id": "test-1"})
                assert facts(await one.call_tool("say", {"word": "xyzzy-test-0"}))["done"]
                told = await two.call_tool("say", {"word": "x"})
                assert (facts(told)["task_id"], facts(told)["done"]) == ("test-1", False)

        with http_server(environ, "games:Door", "--http", "127.0.0.1:0") as (url, _):
            asyncio.run(body(url))

    def test_there_are_as_many_as_may_be_and_one_that_left_makes_room(self, environ: dict[str, str]) -> None:
        async def body(url: str) -> None:
            async with over_http(url) as one:
                assert not (await one.call_tool("reset", {})).isError
                async with over_http(url) as two:
                    full = await two.call_tool("reset", {})
                    assert full.isError
                    assert "all 1 sessions are taken" in words(full)
                    with pytest.raises(McpError, match="all 1 sessions are taken"):
                        await two.list_tools()
            until = time.monotonic() + 10
            while True:
                async with over_http(url) as three:
                    if not (await three.call_tool("reset", {})).isError:
                        return
                assert time.monotonic() < until

        with http_server(environ, "games:Door", "--http", "127.0.0.1:0", "--max-sessions", "1") as (url, _):
            asyncio.run(body(url))

    def test_an_idle_session_gives_its_environment_back(self, environ: dict[str, str]) -> None:
        async def body(url: str) -> None:
            async with over_http(url) as one:
                await one.call_tool("reset", {})
                await asyncio.sleep(1.5)
                late = await one.call_tool("say", {"word": "x"})
                assert (late.isError, "has ended" in words(late)) == (True, True)
                assert not (await one.call_tool("reset", {})).isError

        arguments = ("games:Door", "--http", "127.0.0.1:0", "--session-timeout", "0.5")
        with http_server(environ, *arguments) as (url, _):
            asyncio.run(body(url))

    def test_with_a_token_nobody_else_is_heard(self, environ: dict[str, str]) -> None:
        async def body(url: str) -> None:
            async with over_http(url, "open sesame") as session:
                assert not (await session.call_tool("reset", {})).isError
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                async with httpx.AsyncClient(headers=headers) as client:
                    assert (await client.post(url, json={})).status_code == 401

        given = {**environ, "AGENTGYM_SERVE_TOKEN": "open sesame"}
        with http_server(given, "games:Door", "--http", "127.0.0.1:0") as (url, _):
            asyncio.run(body(url))

    def test_without_one_no_web_page_is_heard(self, environ: dict[str, str]) -> None:
        with http_server(environ, "games:Door", "--http", "127.0.0.1:0") as (url, process):
            for headers in ({"Origin": "https://example.org"}, {"Host": "rebound.example.org"}):
                assert httpx.post(url, json={}, headers=headers).status_code == 403
            assert httpx.get(url.replace("/mcp", "/elsewhere")).status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0

    @pytest.mark.parametrize(
        ("address", "told"),
        [
            ("0.0.0.0:0", "other machines reach this server, and it has no token"),
            ("127.0.0.1", "is no address"),
            ("127.0.0.1:99999", "is no address"),
            (":80", "is no address"),
            ("256.1.1.1:0", "cannot listen|no token"),
        ],
    )
    def test_addresses(self, environ: dict[str, str], address: str, told: str) -> None:
        line = command("games:Door", "--http", address)
        done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert any(part in done.stderr for part in told.split("|"))

    def test_an_empty_token_is_none(self, environ: dict[str, str]) -> None:
        line = command("games:Door", "--http", "127.0.0.1:0", "--token", " ")
        done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=30)
        assert (done.returncode, "the token is empty" in done.stderr) == (2, True)
