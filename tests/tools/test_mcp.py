from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentgym
from agentgym.actions import write_calls
from agentgym.env import Env, Transition
from agentgym.errors import ConfigError, ForkUnsupported, MissingDependency, ToolFailed, UsageError
from agentgym.messages import ToolCall
from agentgym.task import Task, TaskSet
from agentgym.tools import Toolbox, ToolResult, read_turn, tool
from agentgym.tools import mcp as mcp_module

pytest.importorskip("mcp")

from mcp import types

from agentgym.tools.mcp import McpServer, McpTools, read_servers
from agentgym.tools.mcp_environment import McpEnvironment, with_servers
from agentgym.tools.mcp_wire import as_text

KITCHEN = Path(__file__).parent / "servers" / "kitchen.py"
STDIO = {"command": [sys.executable, str(KITCHEN)], "timeout": 10.0}


def called(tools: McpTools, name: str, **arguments: Any) -> ToolResult:
    return tools.run(Toolbox(tools.tools()).acall(ToolCall(name, arguments)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid: int, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A kitchen over HTTP, at a free port where none is given."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(KITCHEN), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=["stdio", "http"])
def kitchen(request: pytest.FixtureRequest) -> Iterator[McpTools]:
    if request.param == "stdio":
        with McpTools({"kitchen": STDIO}) as tools:
            yield tools
    else:
        with listening() as (url, _), McpTools({"kitchen": {"url": url, "timeout": 10.0}}) as tools:
            yield tools


class TestCalls:
    def test_the_tools_and_their_schemas(self, kitchen: McpTools) -> None:
        made = {one.name: one for one in kitchen.tools()}
        assert list(made)[:3] == ["add", "remember", "fail"]
        assert "spawn_child" in made  # of spawn/child, which is no name for a chat template
        assert made["add"].is_async
        assert made["add"].schema["function"]["description"] == "Add two numbers."
        assert made["add"].schema["function"]["parameters"]["required"] == ["a", "b"]

    def test_a_call(self, kitchen: McpTools) -> None:
        assert called(kitchen, "add", a=1, b=2) == ToolResult("3", value="3")

    def test_wrong_arguments_never_reach_the_server(self, kitchen: McpTools) -> None:
        assert called(kitchen, "add", a=1, b="x").content == "Error: add: b: 'x' is not of type 'integer'"

    def test_an_error_of_a_tool_is_data(self, kitchen: McpTools) -> None:
        told = called(kitchen, "fail")
        assert told == ToolResult("Error: Error executing tool fail: the pan is hot", ok=False)

    def test_whatever_a_result_holds_becomes_text(self, kitchen: McpTools) -> None:
        assert called(kitchen, "parts").content == (
            "é\n[image: image/png, 11 bytes, not shown]\n[menu: file:///menu]\n[file:///recipe]\nsalt"
        )

    def test_calls_at_once(self, kitchen: McpTools) -> None:
        async def together() -> list[ToolResult]:
            box = Toolbox(kitchen.tools())
            return await asyncio.gather(*(box.acall(ToolCall("wait", {"seconds": 0.3})) for _ in range(8)))

        started = time.monotonic()
        # On an event loop that is not the connections'.
        assert [told.content for told in asyncio.run(together())] == ["waited"] * 8
        assert time.monotonic() - started < 2

    def test_one_that_is_cancelled_leaves_the_others(self, kitchen: McpTools) -> None:
        async def cancelled() -> str:
            box = Toolbox(kitchen.tools())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await box.acall(ToolCall("wait", {"seconds": 30.0}))
            return (await box.acall(ToolCall("add", {"a": 2, "b": 2}))).content

        assert asyncio.run(cancelled()) == "4"


def test_a_call_over_its_deadline_is_data_where_the_server_lives() -> None:
    with McpTools({"kitchen": {**STDIO, "timeout": 0.5}}) as tools:
        told = called(tools, "wait", seconds=60)
        assert told == ToolResult("Error: wait did not end within 0.5 s", ok=False)
        assert called(tools, "add", a=1, b=1).content == "2"


def test_one_that_answers_no_ping_is_infrastructure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_module, "PING_SECONDS", 0.3)
    with McpTools({"kitchen": {**STDIO, "timeout": 0.5}}) as tools:
        with pytest.raises(ToolFailed, match=r"did not answer within 0\.5 s, nor to a ping"):
            called(tools, "freeze", seconds=60)
        with pytest.raises(ToolFailed, match="is gone"):
            called(tools, "add", a=1, b=1)


def test_one_that_dies_is_infrastructure_and_can_be_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    with McpTools({"kitchen": STDIO}) as tools:
        assert called(tools, "remember", word="a").content == "a"
        with pytest.raises(ToolFailed, match=r"died: it ended with status 3; its last words: (?s:.*)oh no"):
            called(tools, "die")
        with pytest.raises(ToolFailed, match="is gone: it ended with status 3"):
            called(tools, "add", a=1, b=1)
        tools.restart()
        assert called(tools, "remember", word="b").content == "b"
    # What the server wrote to its streams is in the error, and nowhere else.
    assert capfd.readouterr() == ("", "")


def test_one_over_http_that_dies(capfd: pytest.CaptureFixture[str]) -> None:
    with listening() as (url, process), McpTools({"kitchen": {"url": url, "timeout": 2.0}}) as tools:
        assert called(tools, "add", a=1, b=1).content == "2"
        process.kill()
        process.wait()
        with pytest.raises(ToolFailed):
            called(tools, "add", a=1, b=1)
    assert capfd.readouterr() == ("", "")


def test_one_over_http_that_forgot_the_session() -> None:
    with listening() as (url, process), McpTools({"kitchen": {"url": url, "timeout": 5.0}}) as tools:
        assert called(tools, "add", a=1, b=1).content == "2"
        process.kill()
        process.wait()
        with listening(int(url.split(":")[2].removesuffix("/mcp"))):
            with pytest.raises(ToolFailed):
                called(tools, "add", a=1, b=1)
            tools.restart()
            assert called(tools, "add", a=1, b=1).content == "2"


def test_the_whole_process_group_ends() -> None:
    with McpTools({"kitchen": STDIO}) as tools:
        child = int(called(tools, "spawn_child").content)
        assert alive(child)
    assert gone(child)


def test_a_server_gets_no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with McpTools({"kitchen": {**STDIO, "env": {"MINE": "1"}}}) as tools:
        names = called(tools, "variables").content.splitlines()
    assert "MINE" in names
    assert "PATH" in names
    assert "OPENAI_API_KEY" not in names


def test_names_that_collide_get_the_servers_before_them() -> None:
    with McpTools({"a": STDIO, "b": STDIO}) as tools:
        names = [one.name for one in tools.tools()]
        assert {"a_add", "b_add"} <= set(names)
        assert "add" not in names
        assert called(tools, "a_remember", word="x").content == "x"
        assert called(tools, "b_remember", word="y").content == "y"
    with McpTools({"k": STDIO}) as tools:
        assert {"k_add", "fail"} <= {one.name for one in tools.tools(reserved=["add"])}
        with pytest.raises(UsageError, match="two tools are called 'k_add'"):
            tools.tools(reserved=["add", "k_add"])


@pytest.mark.parametrize(
    ("server", "error", "words"),
    [
        ({"command": ["/nowhere/at/all"]}, UsageError, "cannot be started: .*No such file"),
        (
            {"command": [sys.executable, "-c", "import sys; sys.exit('no key')"]},
            ToolFailed,
            "status 1; .*no key",
        ),
        ({"command": ["sleep", "60"], "start_timeout": 0.3}, ToolFailed, "did not answer within 0.3 s"),
        ({"command": ["cat"], "start_timeout": 5}, ToolFailed, "could not be greeted"),
        ({"url": "http://127.0.0.1:9/mcp", "start_timeout": 3}, ToolFailed, "MCP server 's'"),
    ],
)
def test_one_that_cannot_be_had(server: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        McpTools({"s": server}).open()


def test_closed_connections_say_so() -> None:
    tools = McpTools({"kitchen": STDIO}).open()
    (add, *_) = tools.tools()
    tools.close()
    tools.close()
    with pytest.raises(UsageError, match="are closed"):
        tools.run(add.acall({"a": 1, "b": 1}))
    with pytest.raises(ToolFailed, match="are closed"):
        asyncio.run(add.acall({"a": 1, "b": 1}))

    async def later() -> list[str]:
        async with McpTools({"kitchen": STDIO}) as again:
            return [one.name for one in again.tools()]

    assert "add" in asyncio.run(later())


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        McpTools({})
    assert caught.value.extra == "mcp"


class TestConfig:
    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "mcp.toml"
        file.write_text(
            '[train]\nx = 1\n[mcp.servers.files]\ncommand = ["npx", "files", "/data"]\ntimeout = 5\n'
            '[mcp.servers.web]\nurl = "https://example.org/mcp"\nheaders = { Authorization = "Bearer x" }\n'
        )
        found = read_servers(file)
        assert found["files"].command == ("npx", "files", "/data")
        assert (found["files"].timeout, found["web"].timeout) == (5.0, 60.0)
        assert found["web"].headers == {"Authorization": "Bearer x"}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "names no MCP server"),
            ('[mcp.servers.a]\ncommand = ["x"]\nurl = "http://x"', "a command or a url, and not both"),
            ("[mcp.servers.a]\n", "a command or a url"),
            ("[mcp.servers.a]\ncommand = []", "a command or a url"),
            ('[mcp.servers.a]\nurl = "file:///x"', "file:///x"),
            ('[mcp.servers.a]\nurl = "http://x"\nenv = { A = "1" }', "env and cwd"),
            ('[mcp.servers.a]\ncommand = ["x"]\nheaders = { A = "1" }', "headers"),
            ('[mcp.servers.a]\ncommand = ["x"]\ntimeout = 0', "deadline"),
            ('[mcp.servers.a]\ncommand = ["x"]\ntimeuot = 1', "timeuot"),
            ('[mcp.server.a]\ncommand = ["x"]', "other tables"),
            ("[mcp]\nservers = 3", "names no MCP server"),
            ("[mcp.servers]\na = 3", "'a' is no table"),
            ('[mcp.servers.a]\ncommand = "x"', "command"),
        ],
    )
    def test_what_is_none(self, tmp_path: Path, text: str, words: str) -> None:
        file = tmp_path / "mcp.toml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_servers(file)

    def test_descriptions_are_checked_at_once(self) -> None:
        with pytest.raises(ConfigError):
            McpTools({"a": {"command": ["x"], "timeout": "soon"}})
        assert McpTools({"a": McpServer(command=("x",))})


@pytest.mark.parametrize(
    ("content", "structured", "text"),
    [
        ([], None, ""),
        ([], {"a": [1, "é"]}, '{"a": [1, "é"]}'),
        ([types.TextContent(type="text", text="x")], {"a": 1}, "x"),
        (
            [types.AudioContent(type="audio", data="AAAA", mimeType="audio/wav")],
            None,
            "[audio: audio/wav, 3 bytes, not shown]",
        ),
        (
            [
                types.EmbeddedResource(
                    type="resource",
                    resource=types.BlobResourceContents(uri="file:///b", blob="AAA="),  # type: ignore[arg-type]
                )
            ],
            None,
            "[file:///b: binary, 2 bytes, not shown]",
        ),
    ],
)  # fmt: skip
def test_results_as_text(content: list[Any], structured: dict[str, Any] | None, text: str) -> None:
    assert as_text(types.CallToolResult(content=content, structuredContent=structured)) == text


class Words(Env[str]):
    """Takes messages, and calls of a tool of its own. Its task tries to bring a server along."""

    worker = "async"
    splits = ("train",)

    def __init__(self, *, tools: bool = True, render_mode: str | None = None) -> None:
        self._with_tools = tools

    def tasks(self, split: str) -> TaskSet:
        evil = {"mcp": {"servers": {"evil": {"command": ["touch", "evil"]}}}}
        return TaskSet(split, ["1"], lambda id: Task(id, split, "Speak.", metadata=evil), version="1")

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        self.actions: list[str] = []
        self._box = Toolbox([tool(name="add", description="Add nothing.")(lambda: "nothing")])
        info = {"mcp": {"servers": {"evil": {"command": ["touch", "evil"]}}}}
        return "Speak.", {**info, "tools": self._box.schemas} if self._with_tools else info

    def act(self, action: str) -> Transition:
        self.actions.append(action)
        turn = read_turn(action)
        if isinstance(turn, tuple):
            return Transition(self._box.call(turn[0]).content, 0.5, info={"role": "tool"})
        return Transition(f"You said {action}.", 1.0, terminated=action == "bye", info={"success": True})


def calls(*named: tuple[str, dict[str, Any]]) -> str:
    return write_calls([ToolCall(name, arguments) for name, arguments in named])


class TestEnvironment:
    @pytest.fixture
    def env(self) -> Iterator[McpEnvironment]:
        made = McpEnvironment(Words(), {"kitchen": STDIO})
        yield made
        made.close()

    def test_the_servers_tools_stand_beside_its_own(
        self, env: McpEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        _, info = env.reset(seed=1)
        names = [one["function"]["name"] for one in info["tools"]]
        assert names[:3] == ["add", "kitchen_add", "remember"]
        observation, reward, terminated, truncated, info = env.step(calls(("kitchen_add", {"a": 1, "b": 2})))
        assert (observation, reward, terminated, truncated) == ("3", 0.0, False, False)
        assert info == {"valid_action": True, "score": 0.0, "success": False, "role": "tool"}
        assert env.step(calls(("fail", {})))[4]["valid_action"] is False
        # Nothing that a task or an environment says starts anything.
        assert not list(tmp_path.iterdir())

    def test_every_other_action_passes_as_it_is(self, env: McpEnvironment) -> None:
        env.reset(seed=1)
        actions = ['{"name": "add",  "arguments": {}}', " hello ", '{"name": ', calls(("nope", {})), "bye"]
        told = [env.step(action) for action in actions]
        assert env.unwrapped.actions == actions  # type: ignore[attr-defined]
        assert told[0][0] == "nothing"
        assert told[-1][2]
        for action in (calls(("remember", {"word": "x"})), None):  # the episode is over; no text
            with pytest.raises(UsageError):
                env.step(action)  # type: ignore[arg-type]

    def test_a_turn_of_both_kinds(self, env: McpEnvironment) -> None:
        env.reset(seed=1)
        both = calls(("add", {}), ("remember", {"word": "x"}), ("remember", {"word": "y"}))
        observation, reward, _, _, info = env.step(both)
        assert (observation, reward, info["score"]) == ("x\n\nx,y\n\nnothing", 0.5, 0.5)
        assert env.step(calls(("remember", {"word": "z"})))[4]["score"] == 0.5

    def test_too_many_calls_are_refused_together(self, env: McpEnvironment) -> None:
        env.reset(seed=1)
        observation, *_, info = env.step(calls(*[("remember", {"word": "x"})] * 17))
        assert observation == "A turn holds at most 16 calls of these tools; none of 17 was run."
        assert info["valid_action"] is False
        assert env.step(calls(("remember", {"word": "y"})))[0] == "y"

    def test_every_episode_gets_fresh_servers(self, env: McpEnvironment) -> None:
        for _ in range(2):
            env.reset(seed=1)
            assert env.step(calls(("remember", {"word": "x"})))[0] == "x"

    def test_or_the_same_ones(self) -> None:
        with contextlib.closing(McpEnvironment(Words(tools=False), {"kitchen": STDIO}, fresh=False)) as env:
            for told in ("x", "x,x"):
                _, info = env.reset(seed=1)
                assert info["tools"][0]["function"]["name"] == "add"
                assert env.step(calls(("remember", {"word": "x"})))[0] == told

    def test_a_server_that_dies_is_raised_and_the_next_episode_has_another(self, env: McpEnvironment) -> None:
        env.reset(seed=1)
        with pytest.raises(ToolFailed):
            env.step(calls(("die", {})))
        env.reset(seed=1)
        assert env.step(calls(("remember", {"word": "x"})))[0] == "x"

    def test_the_async_form(self) -> None:
        async def episode() -> list[str]:
            env = McpEnvironment(Words(), {"kitchen": STDIO})
            try:
                await env.areset(seed=1)
                both = calls(("add", {}), ("remember", {"word": "x"}))
                return [
                    (await env.astep(action))[0]
                    for action in (calls(("kitchen_add", {"a": 1, "b": 2})), both, "hi")
                ]
            finally:
                await env.aclose()

        assert asyncio.run(episode()) == ["3", "x\n\nnothing", "You said hi."]

    def test_it_cannot_be_forked_and_tells_no_secrets(self) -> None:
        server = {**STDIO, "env": {"TOKEN": "very-secret"}}
        with contextlib.closing(McpEnvironment(Words(), {"kitchen": server})) as env:
            env.reset(seed=1)
            with pytest.raises(ForkUnsupported):
                agentgym.fork(env)
            assert "very-secret" not in repr(env.spec) + json.dumps(env._saved_kwargs)

    def test_by_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "mcp.toml"
        command = json.dumps(STDIO["command"])
        file.write_text(f"[mcp.servers.kitchen]\ncommand = {command}\n")
        monkeypatch.setitem(sys.modules, "wordgames", sys.modules[__name__])
        made = agentgym.make(
            "agentgym.tools.mcp_environment:with_servers",
            env="wordgames:Words", servers=str(file), options={"tools": False},
        )  # fmt: skip
        with contextlib.closing(made):
            _, info = made.reset(seed=1)
            assert info["tools"][0]["function"]["name"] == "add"
        with pytest.raises(ConfigError):
            with_servers(env="wordgames:Words", servers=tmp_path / "none.toml")


def test_the_servers_end_with_a_process_that_was_killed(tmp_path: Path) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec {sys.executable} {KITCHEN}"
    program = (
        "import sys, time\nfrom agentgym.tools.mcp import McpTools\n"
        f"tools = McpTools({{'k': {{'command': ['sh', '-c', {script!r}]}}}})\n"
        "tools.open()\nprint('open', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert gone(pid)
