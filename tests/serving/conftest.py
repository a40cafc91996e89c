"""Servers on an event loop of a thread of their own, and one small environment that does what it is told."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")

from websockets.sync.client import ClientConnection, connect

from agentgym.serving.run import ServeConfig, build, listen
from agentgym.serving.sessions import Limits, Sessions
from agentgym.wrappers.stack import EnvConfig

OBEDIENT = '''
import time

from agentgym.env import Env, Transition
from agentgym.messages import ImagePart, TextPart
from agentgym.actions import Malformed, read_calls
from agentgym.task import Task, TaskSet

SECRET = "the answer is violet"
DOUBLE = {"type": "function", "function": {"name": "double", "description": "Twice a number.",
          "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}


class Obedient(Env):
    """Does what the action says."""

    splits = ("train", "test")

    def __init__(self, api_key="", worker=None, *, render_mode=None):
        self._key = api_key
        if worker:
            self.worker = worker

    def tasks(self, split):
        ids = [f"{self.require_split(split)}-{i}" for i in range(3)]
        return TaskSet(split, ids, lambda i: Task(i, split, "Obey.", {"level": 1}, {"answer": SECRET}))

    def begin(self, task):
        return f"{task.id} {int(self.np_random.integers(1000))}", {"tools": [DOUBLE]}

    def act(self, action):
        calls = read_calls(action)
        if not isinstance(calls, Malformed) and calls[0].name == "double":
            return Transition(str(2 * calls[0].arguments["n"]), 0.5)
        verb, _, rest = action.partition(" ")
        if verb == "sleep":
            time.sleep(float(rest))
        elif verb == "say":
            return Transition(rest)
        elif verb == "tell":
            raise RuntimeError(f"{SECRET}, key {self._key}")
        elif verb == "reward":
            return Transition("ok", float(rest))
        elif verb == "stop":
            return Transition("over", 1.0, True, False, {"success": True})
        elif verb == "cut":
            return Transition("cut", 0.0, False, True)
        return Transition("ok")


class Pictured(Obedient):
    def content(self, observation):
        return (TextPart("before"), ImagePart(b"png"), TextPart(observation))
'''


@pytest.fixture
def obedient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path of the environment; worker processes find it too."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "obedient_env.py").write_text(OBEDIENT)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    return "obedient_env:Obedient"


@dataclass
class Served:
    """A running server."""

    port: int
    sessions: Sessions

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def connect(self, **options: Any) -> Client:
        """A WebSocket client."""
        return Client(connect(f"{self.ws}/ws", proxy=None, **options))


class Client:
    """The protocol by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket.__enter__()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def send(self, kind: str, data: Any = None) -> None:
        self.socket.send(json.dumps({"type": kind} if data is None else {"type": kind, "data": data}))

    def receive(self) -> Any:
        return json.loads(self.socket.recv(timeout=60))

    def ask(self, kind: str, data: Any = None) -> Any:
        """The answer's data."""
        self.send(kind, data)
        answer = self.receive()
        assert answer["type"] != "error", answer
        return answer["data"]

    def fail(self, kind: str, data: Any = None) -> Any:
        """The error's data."""
        self.send(kind, data)
        answer = self.receive()
        assert answer["type"] == "error", answer
        return answer["data"]

    def reset(self, **data: Any) -> Any:
        return self.ask("reset", data)

    def step(self, text: str) -> Any:
        return self.ask("step", {"text": text})


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start ``serve(id, kwargs, limits..., **ServeConfig)``; all are stopped after the test."""
    running: list[tuple[threading.Thread, Any]] = []

    def start(
        id: str = "agentgym.testing:EchoEnv",
        kwargs: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        env: dict[str, Any] | None = None,
        **options: Any,
    ) -> Served:
        config = ServeConfig(
            EnvConfig(id, kwargs or {}, **(env or {})), port=0, limits=Limits(**(limits or {})), **options
        )
        sessions = Sessions(config.env, split=config.split, limits=config.limits)
        listening = listen(config.host, 0)
        up = threading.Event()
        server = build(config, sessions, up.set)

        def run() -> None:
            with listening:
                asyncio.run(server.serve(sockets=[listening]))

        thread = threading.Thread(target=run)
        thread.start()
        running.append((thread, server))
        assert up.wait(60)
        return Served(listening.getsockname()[1], sessions)

    yield start
    for _, server in running:
        server.should_exit = True
    for thread, _ in running:
        thread.join(60)
        assert not thread.is_alive()
