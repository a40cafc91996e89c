"""A sandbox host and its clients: who gets in, what they may ask for, and what is left when one goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect

from agentgym.errors import MissingDependency, SandboxFailed, UsageError
from agentgym.sandboxes import (
    Backend,
    Mount,
    PathRefused,
    SandboxEnded,
    SandboxSpec,
    make_backend,
    records,
    server,
    wire,
)

T = TypeVar("T")
MIB = 1 << 20
TOKEN = "a token of the tests"


@asynccontextmanager
async def hosted(**settings: Any) -> AsyncIterator[tuple[str, Any]]:
    """A host of plain processes: its address and its server."""
    config = server.HostConfig(token=TOKEN, **settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with make_backend("process", unsafe=True) as inner:
            serving = server.build(config, inner)
            task = asyncio.create_task(serving.serve(sockets=[listening]))
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}", serving
            finally:
                serving.should_exit = True
                await task


def play(body: Callable[[Backend], Awaitable[T]], **settings: Any) -> T:
    async def main() -> T:
        async with hosted(**settings) as (url, _), make_backend("remote", url=url, token=TOKEN) as backend:
            return await body(backend)

    return asyncio.run(main())


def mine() -> list[str]:
    return [record.id for record in records.listed() if record.pid == os.getpid()]


def test_only_who_knows_the_token_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        async with hosted() as (url, _):
            async with make_backend("remote", url=url, token="another one, a wrong one") as backend:
                with pytest.raises(UsageError, match="token"):
                    await backend.start()
            monkeypatch.setenv("AGENTGYM_SANDBOX_TOKEN", TOKEN)
            async with make_backend("remote", url=url) as backend:
                assert (await backend.run(["echo", "in"])).stdout == "in\n"

    asyncio.run(ask())
    monkeypatch.delenv("AGENTGYM_SANDBOX_TOKEN")
    with pytest.raises(UsageError, match="token"):
        make_backend("remote", url="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="no sandbox host"):
        make_backend("remote", url="127.0.0.1:8010", token=TOKEN)
    with pytest.raises(UsageError, match="too short"):
        server.HostConfig(token="short")


def test_a_host_that_is_not_there_is_a_failure_of_infrastructure() -> None:
    async def ask() -> None:
        with socket.create_server(("127.0.0.1", 0)) as held:
            port = held.getsockname()[1]
        async with make_backend("remote", url=f"http://127.0.0.1:{port}", token=TOKEN) as backend:
            with pytest.raises(SandboxFailed, match="cannot be reached"):
                await backend.start()

    asyncio.run(ask())


@pytest.mark.parametrize(
    "spec",
    [
        SandboxSpec(mounts=(Mount(Path("/etc"), "/data"),)),
        SandboxSpec(rootfs=Path("/")),
        SandboxSpec(network="host"),
    ],
)
def test_a_client_gets_nothing_of_the_host_s(spec: SandboxSpec) -> None:
    async def ask(backend: Backend) -> None:
        with pytest.raises(UsageError, match="remote sandbox takes no"):
            await backend.start(spec)

    play(ask)


def test_a_host_has_room_for_so_many() -> None:
    async def ask(backend: Backend) -> None:
        one, _ = [await backend.start() for _ in range(2)]
        with pytest.raises(SandboxFailed, match="2 sandboxes already"):
            await one.fork()
        await one.close()
        async with await backend.start() as other:
            assert (await other.exec("true")).ok

    play(ask, sandboxes=2)


def test_long_content_travels_in_pieces() -> None:
    async def ask(backend: Backend) -> None:
        async with await backend.start() as box:
            data = os.urandom(9 * MIB)
            await box.write("file", data)
            assert await box.read("file") == data
            command = "head -c 9000000 /dev/zero | tr '\\0' x; cat >&2"
            done = await box.exec(command, stdin=b"y", limit=10 * MIB)
            assert done.stdout == "x" * 9_000_000 and done.stderr == "y" and not done.cut_stdout
            with pytest.raises(PathRefused):
                await box.read("file", limit=MIB)

    play(ask)


def test_a_cut_connection_is_a_failure_of_infrastructure() -> None:
    async def ask() -> None:
        async with hosted() as (url, serving), make_backend("remote", url=url, token=TOKEN) as backend:
            box = await backend.start()
            running = asyncio.create_task(box.exec("sleep 60"))
            await asyncio.sleep(0.3)
            serving.should_exit = True
            with pytest.raises(SandboxFailed, match="is cut"):
                await running
            with pytest.raises(SandboxFailed, match="is cut"):
                await box.read("x")
            with pytest.raises(SandboxFailed):
                await backend.start()

    asyncio.run(ask())
    assert not mine()


def test_the_host_tells_by_itself_that_a_sandbox_ended() -> None:
    async def ask(backend: Backend) -> None:
        box = await backend.start()
        process = await box.open(["/bin/sh", "-c", "sleep 0.3; kill -9 $PPID"])
        for _ in range(1200):
            if box.ended:
                break
            await asyncio.sleep(0.05)
        assert box.ended
        with pytest.raises(SandboxEnded):
            await process.read(60)

    play(ask, lease=4.0)


def test_a_silent_client_loses_its_sandboxes() -> None:
    async def ask() -> None:
        async with hosted(lease=2.0) as (url, _):
            address = f"ws{url.removeprefix('http')}{wire.PATH}"
            async with connect(address, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as line:
                request = {"n": 1, "do": "start", "spec": {}}
                await line.send(b"".join(wire.messages(request)))
                assert json.loads((await line.recv())[4:])["hello"] == "process"
                assert b'"id"' in await line.recv() and len(mine()) == 1
                with pytest.raises(Exception, match="lease ended"):
                    await asyncio.wait_for(line.recv(), 60)
            assert not mine()

            # One that speaks keeps them, though it asks for nothing.
            async with make_backend("remote", url=url, token=TOKEN) as backend:
                box = await backend.start()
                await asyncio.sleep(3.0)
                assert (await box.exec("true")).ok

    asyncio.run(ask())


def test_nothing_is_left_of_a_client_that_was_killed(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from agentgym.sandboxes import make_backend

async def main():
    backend = make_backend("remote", url=sys.argv[1], token=sys.argv[2])
    box = await backend.start()
    await box.snapshot()
    await box.fork()
    running = asyncio.create_task(box.exec("sleep 600", seconds=600))
    await asyncio.sleep(0.3)
    print("on", flush=True)
    await running

asyncio.run(main())
"""

    async def ask() -> None:
        async with hosted() as (url, _):
            client = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, url, TOKEN, stdout=subprocess.PIPE
            )
            assert client.stdout is not None and await client.stdout.readline() == b"on\n"
            assert len(mine()) >= 2
            client.send_signal(signal.SIGKILL)
            await client.wait()
            for _ in range(600):
                if not mine():
                    break
                await asyncio.sleep(0.1)
            assert not mine()

    asyncio.run(ask())


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0\0\0\2[]",
        b"\0\0\0\4null",
        b"\xff\xff\xff\xff{}",
        b'\0\0\0\x0f{"do": "start"}',
        b'\0\0\0\x0a{"n": "x"}',
        b"\0\0\0\2{}" + b"x" * 100,
        *wire.messages({"n": 2, "do": "exec", "box": "process-0"}),
        *wire.messages({"n": 2, "do": "__init__"}),
        *wire.messages({"n": 2, "do": "next", "p": 77}),
        *wire.messages({"n": 2, "do": "start", "spec": {"memory": "all"}}),
        *wire.messages({"n": 2, "do": "entry", "entry": ["file", "../../x", 420, ""]}, b"x"),
    ],
)
def test_whoever_breaks_the_rules_is_told_or_cut_off(message: bytes) -> None:
    async def ask() -> None:
        async with hosted() as (url, _):
            address = f"ws{url.removeprefix('http')}{wire.PATH}"
            async with connect(address, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as line:
                await line.recv()
                await line.send(message)
                await line.send(b"".join(wire.messages({"n": 2, "do": "upload", "box": "x", "target": "x"})))
                try:
                    assert b'"error"' in await asyncio.wait_for(line.recv(), 60)
                except Exception as error:
                    assert "1008" in str(error)
            async with make_backend("remote", url=url, token=TOKEN) as backend:
                assert (await backend.run(["true"])).ok

    asyncio.run(ask())


# Folders on the wire ---------------------------------------------------------------------------

names = st.lists(st.sampled_from(["a", "b", "..", ".", "", "c\0", "/"]), max_size=4).map("/".join)
links = st.lists(st.sampled_from(["a", "b", "..", ".", "/"]), max_size=5).map("/".join)
entries = st.lists(
    st.tuples(st.sampled_from(["file", "folder", "link", "more", "pipe"]), names, st.just(0o6755), links),
    max_size=8,
)


@given(entries)
def test_what_lands_stays_where_it_lands(tmp_path_factory: pytest.TempPathFactory, given_: Any) -> None:
    around = tmp_path_factory.mktemp("around")
    landing = wire.Landing(around / "it", 1000, 10)
    try:
        for entry in given_:
            landing.take(list(entry), b"x")
        landing.finish()
    except PathRefused:
        pass
    assert {place.name for place in around.iterdir()} <= {"it"}
    for place in around.rglob("*"):
        assert place.resolve().is_relative_to((around / "it").resolve()), (place, os.readlink(place))
        assert place.is_symlink() or not place.stat().st_mode & 0o7000


def test_a_folder_may_be_only_so_large(tmp_path: Path) -> None:
    landing = wire.Landing(tmp_path / "it", 10, 3)
    landing.take(["file", "a", 0o644, ""], b"x" * 10)
    with pytest.raises(PathRefused, match="more"):
        landing.take(["more", "a", 0o644, ""], b"x")
    landing = wire.Landing(tmp_path / "other", 10, 3)
    with pytest.raises(PathRefused, match="more"):
        for number in range(9):
            landing.take(["folder", f"f{number}", 0o755, ""], b"")


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a", hint="b"),
        PathRefused("a", hint="b"),
        SandboxEnded("why"),
        SandboxFailed("a", hint="b"),
    ],
)
def test_an_error_keeps_its_kind(error: Exception) -> None:
    back = wire.raised(json.loads(json.dumps(wire.told(error))))
    assert type(back) is type(error) and str(back) == str(error)


def test_errors_of_other_kinds_are_failures_of_the_host() -> None:
    for error in (ValueError("x"), MissingDependency("docker", "docker"), OSError(2, "x")):
        assert type(wire.raised(wire.told(error))) is SandboxFailed
    assert type(wire.raised(wire.told(TimeoutError()))) is TimeoutError
    for odd in (None, [], {}, {"kind": 7}):
        assert type(wire.raised(odd)) is SandboxFailed


# The command -----------------------------------------------------------------------------------


def agentgym(*arguments: str, **given: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "agentgym.cli", "sandbox", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given)


def test_a_host_is_served_seen_and_ended(tmp_path: Path) -> None:
    file, env = tmp_path / "token", {**os.environ, "AGENTGYM_CACHE": str(tmp_path / "cache")}
    options = ["--backend", "process", "--option", "unsafe=true", "--port", "0", "--token-file", str(file)]
    with agentgym("serve", *options, env=env) as host:
        assert host.stdout is not None
        line = host.stdout.readline()
        url = line.split()[-1]
        assert line == f"serving process sandboxes at {url}\n"
        assert file.stat().st_mode & 0o777 == 0o600

        async def use() -> None:
            async with make_backend("remote", url=url, token=file.read_text().strip()) as backend:
                box = await backend.start(owner="tests")
                assert (await box.exec("echo there")).stdout == "there\n"
                with agentgym("ps", "--json", env=env) as seen:
                    [row] = json.loads(seen.communicate()[0])
                assert row["id"] == box.id and row["owner"] == "remote tests" and not row["orphaned"]
                # The host's end ends it.
                host.send_signal(signal.SIGTERM)
                with pytest.raises(SandboxFailed):
                    await asyncio.wait_for(box.exec("sleep 30"), 25)

        asyncio.run(use())
        _, said = host.communicate(timeout=30)
        assert host.returncode == 0 and "stopped" in said
    with agentgym("ps", env=env) as seen:
        assert seen.communicate()[1].strip() == "no sandbox runs"


def test_what_a_killed_process_left_is_collected(tmp_path: Path) -> None:
    env = {**os.environ, "AGENTGYM_CACHE": str(tmp_path / "cache")}
    code = """
import asyncio, os
from agentgym.sandboxes import make_backend, records

async def main():
    records.watch = lambda pid: 0
    box = await make_backend("process", unsafe=True).start(owner="left")
    print(box.id, box._folder, flush=True)
    os._exit(0)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True)
    id, folder = done.stdout.split()
    with agentgym("ps", env=env) as seen:
        out, said = seen.communicate()
        assert id in out and "(gone)" in out and "sandbox gc" in said
    assert Path(folder).is_dir()
    with agentgym("gc", env=env) as seen:
        assert seen.communicate()[0].split() == [id] and not seen.returncode
    assert not Path(folder).exists()
    # What cannot be removed now is told, and holds up nothing else.
    parts = {"url": "unix:///nowhere", "container": "x"}
    left = records.Record("docker-0", "docker", "", 1, 0, time.time() - 100, parts)
    place = tmp_path / "cache" / "sandboxes" / "docker-0.json"
    place.write_text(json.dumps(asdict(left)))
    with agentgym("gc", env=env) as seen:
        assert "1 could not be removed: docker-0" in seen.communicate()[1] and seen.returncode == 1
    assert place.exists()
    with agentgym("gc", "--forget", env=env) as seen:
        assert "forgot docker-0" in seen.communicate()[1] and not seen.returncode
    assert not place.exists()
