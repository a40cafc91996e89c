"""What every backend holds to, as the contract's docstrings say it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from agentgym.errors import UsageError
from agentgym.sandboxes import (
    Backend,
    PathRefused,
    Process,
    Sandbox,
    SandboxEnded,
    SandboxSpec,
    make_backend,
    server,
)

T = TypeVar("T")
MIB = 1 << 20
PLAIN = SandboxSpec(memory=256 * MIB, disk=64 * MIB)


class Host:
    """A backend on an event loop of its own, and a sandbox that the tests share which do not end it."""

    def __init__(self, kind: str, runner: asyncio.Runner, backend: Backend) -> None:
        self.kind, self.run, self.backend = kind, runner.run, backend
        self.sandbox: Sandbox = self.run(backend.start(PLAIN))

    @property
    def isolated(self) -> bool:
        return self.backend.tier == "isolated"

    @asynccontextmanager
    async def fresh(self, **given: Any) -> AsyncIterator[Sandbox]:
        async with await self.backend.start(replace(PLAIN, **given)) as sandbox:
            yield sandbox


BACKENDS = [
    "process",
    pytest.param("bubblewrap", marks=pytest.mark.bubblewrap),
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("writable", marks=pytest.mark.docker),
    "remote",
]


@asynccontextmanager
async def opened(kind: str) -> AsyncIterator[Backend]:
    """A backend of a kind."""
    match kind:
        case "remote":
            config = server.HostConfig(token="a token of the tests")
            with socket.create_server(("127.0.0.1", 0)) as listening:
                async with make_backend("process", unsafe=True) as inner:
                    serving = server.build(config, inner)
                    task = asyncio.create_task(serving.serve(sockets=[listening]))
                    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
                    async with make_backend("remote", url=url, token=config.token) as backend:
                        yield backend
                    serving.should_exit = True
                    await task
        case "process":
            async with make_backend("process", unsafe=True) as backend:
                yield backend
        case "writable":
            async with make_backend("docker", writable=True) as backend:
                yield backend
        case _:
            async with make_backend(kind) as backend:
                yield backend


@pytest.fixture(params=BACKENDS, scope="module")
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    if request.param in ("docker", "writable"):
        request.getfixturevalue("docker_daemon")
    with asyncio.Runner() as runner:
        context = opened(request.param)
        made = Host(request.param, runner, runner.run(context.__aenter__()))
        try:
            yield made
        finally:
            runner.run(context.__aexit__(None, None, None))


def result(host: Host, command: Any, **given: Any) -> Any:
    return host.run(host.sandbox.exec(command, **given))


def waiting(name: str) -> str:
    """A command that waits for a file."""
    return f"until test -e {name}; do sleep 0.05; done"


# Commands --------------------------------------------------------------------------------------


def test_a_command_has_its_output_and_its_status(host: Host) -> None:
    done = result(host, "echo one; echo two >&2; exit 3")
    assert (done.stdout, done.stderr, done.return_code) == ("one\n", "two\n", 3)
    assert not done.ok and not done.timed_out and not done.ended and done.seconds > 0
    assert result(host, ["/bin/echo", "a b", "*"]).stdout == "a b *\n"
    assert result(host, "true").ok


def test_what_cannot_be_started_is_a_result(host: Host) -> None:
    missing = result(host, ["no-such-program", "-v"])
    assert missing.return_code == 127 and "no-such-program" in missing.stderr
    assert result(host, "true", cwd="no/such/folder").return_code == 127
    folder = result(host, ["/usr"])
    assert folder.return_code == 127 and "Permission denied" in folder.stderr


def test_a_signal_ends_a_command(host: Host) -> None:
    assert result(host, ["/bin/sh", "-c", "kill -15 $$"]).return_code == -15
    assert result(host, ["/bin/sh", "-c", "kill -9 $$"]).return_code == -9


def test_a_deadline_ends_a_command_and_its_group(host: Host) -> None:
    done = result(host, "echo begun; sleep 60 & wait", seconds=2)
    assert done.timed_out and done.return_code == -9 and done.stdout == "begun\n" and not done.ended
    assert done.seconds < 30
    assert result(host, "echo still here").stdout == "still here\n"
    with pytest.raises(UsageError, match="deadline"):
        result(host, "true", seconds=0)


def test_a_background_process_holds_nothing_up(host: Host) -> None:
    started = time.monotonic()
    done = result(host, "sleep 90 & echo begun", seconds=80)
    assert done.stdout == "begun\n" and done.ok and time.monotonic() - started < 60


def test_output_beyond_the_limit_is_counted(host: Host) -> None:
    done = result(host, "head -c 300000 /dev/zero | tr '\\0' x; head -c 70000 /dev/zero >&2", limit=1000)
    assert done.stdout == "x" * 1000 and done.cut_stdout == 299_000
    assert len(done.stderr) == 1000 and done.cut_stderr == 69_000 and done.ok


def test_a_flood_of_output_is_stopped_by_the_deadline(host: Host) -> None:
    done = result(host, "yes", seconds=2, limit=10_000)
    assert done.timed_out and len(done.stdout) == 10_000 and done.cut_stdout > 10_000


def test_output_is_text_whatever_it_is(host: Host) -> None:
    assert result(host, "printf 'a\\377b\\303\\244'").stdout == "a�bä"


def test_input_reaches_a_command(host: Host) -> None:
    assert result(host, "cat", stdin="grüße".encode()).stdout == "grüße"
    assert result(host, "cat").stdout == ""
    data = os.urandom(3 * MIB)
    assert result(host, ["wc", "-c"], stdin=data).stdout.strip() == str(len(data))
    # Nobody reads it, and nobody waits for that.
    assert result(host, "exit 4", stdin=data).return_code == 4


def test_variables_and_folder(host: Host) -> None:
    host.run(host.sandbox.write("sub/here", "1"))
    done = result(host, "echo $WORD; ls", env={"WORD": "deed"}, cwd="sub")
    assert done.stdout == "deed\nhere\n"
    seen = result(host, "env").stdout
    assert "PATH=" in seen and "HOME=" in seen and "LANG=C.UTF-8" in seen
    assert not [name for name in ("AGENTGYM", "PYTEST", "VIRTUAL_ENV") if name in seen]

    async def own() -> str:
        async with host.fresh(env={"ONE": "1", "TWO": "2"}) as sandbox:
            return (await sandbox.exec("echo $ONE$TWO$THREE", env={"TWO": "two"})).stdout

    assert host.run(own()) == "1two\n"


def test_output_streams_as_it_comes(host: Host) -> None:
    pieces: list[tuple[str, bytes]] = []

    async def play() -> None:
        came = asyncio.Event()

        def take(stream: str, piece: bytes) -> None:
            pieces.append((stream, piece))
            came.set()

        async with host.fresh() as box:
            command = f"echo first; {waiting('go')}; echo second >&2; head -c 5000 /dev/zero"
            running = asyncio.create_task(box.exec(command, on_output=take, limit=100, seconds=60))
            await asyncio.wait_for(came.wait(), 60)
            assert pieces == [("stdout", b"first\n")], "it came before the others were written"
            await box.write("go", b"")
            done = await running
            assert ("stderr", b"second\n") in pieces
            assert sum(len(p[1]) for p in pieces if p[0] == "stdout") == 100 == len(done.stdout)

    host.run(play())


def test_whoever_takes_output_may_fail_and_nobody_else_does(host: Host) -> None:
    def fail(stream: str, piece: bytes) -> None:
        raise LookupError(stream)

    with pytest.raises(LookupError, match="stdout"):
        result(host, "echo one", on_output=fail)
    assert result(host, "echo two").stdout == "two\n"


def test_many_run_at_a_time_and_a_hung_one_holds_up_nobody(host: Host) -> None:
    meet = "touch met{n}; until set -- met*; test $# -ge 30; do sleep 0.2; done; echo {n}"

    async def many() -> list[str]:
        async with host.fresh() as box:
            hung = asyncio.create_task(box.exec(waiting("go"), seconds=600))
            # Each ends when all have begun.
            commands = (meet.format(n=n) for n in range(30))
            done = await asyncio.gather(*(box.exec(command, seconds=60) for command in commands))
            assert not hung.done()
            await box.write("go", b"")
            assert (await hung).ok
            return [one.stdout for one in done]

    assert host.run(many()) == [f"{n}\n" for n in range(30)]


def test_cancelling_ends_the_command(host: Host) -> None:
    async def cancel() -> None:
        async with host.fresh() as box:
            command = f"touch begun; {waiting('go')}; touch cancelled; sleep 60"
            task = asyncio.create_task(box.exec(command, seconds=600))
            assert (await box.exec(waiting("begun"), seconds=60)).ok
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await box.write("go", b"")
            await asyncio.sleep(0.5)
            assert not (await box.exec("test -e cancelled")).ok

    host.run(cancel())


@pytest.mark.parametrize("command", [[], ["a\0b"]])
def test_what_is_no_command_is_refused(host: Host, command: list[str]) -> None:
    with pytest.raises(UsageError):
        result(host, command)


# Processes that are spoken to ------------------------------------------------------------------


async def everything(process: Process) -> dict[str, bytes]:
    found = {"stdout": b"", "stderr": b""}
    while (piece := await process.read(60)) is not None:
        found[piece[0]] += piece[1]
    return found


def test_a_process_is_spoken_to(host: Host) -> None:
    async def talk() -> None:
        process = await host.sandbox.open(["/bin/sh"], env={"A": "1"}, cwd="/")
        await process.write(b"echo one; pwd >&2\n")
        told = {"stdout": b"", "stderr": b""}
        while told != {"stdout": b"one\n", "stderr": b"/\n"}:
            piece = await process.read(60)
            assert piece is not None
            told[piece[0]] += piece[1]
        with pytest.raises(TimeoutError):
            await process.read(0.1)
        assert process.returned is None
        await process.write(b"echo two; exit 5\n")
        assert await everything(process) == {"stdout": b"two\n", "stderr": b""}
        assert process.returned == 5 and await process.read(1) is None
        await process.write(b"too late\n")
        await process.close()

    host.run(talk())


def test_a_process_waits_when_nobody_reads(host: Host) -> None:
    async def wait() -> None:
        process = await host.sandbox.open(
            ["/bin/sh", "-c", "head -c 3000000 /dev/zero; touch poured; sleep 9"]
        )
        await asyncio.sleep(0.5)
        assert not (await host.sandbox.exec("test -e poured")).ok, "it was read without anybody asking"
        size = 0
        while size < 3_000_000:
            piece = await process.read(60)
            assert piece is not None
            size += len(piece[1])
        await process.signal(15)
        assert await process.read(60) is None and process.returned == -15

    host.run(wait())


def test_closing_a_process_kills_it(host: Host) -> None:
    async def close() -> None:
        async with host.fresh() as box:
            command = f"echo on; {waiting('go')}; touch survived; sleep 60"
            process = await box.open(["/bin/sh", "-c", command])
            assert await process.read(60) == ("stdout", b"on\n")
            await process.close()
            await box.write("go", b"")
            await asyncio.sleep(0.5)
            assert not (await box.exec("test -e survived")).ok
            missing = await box.open(["no-such-program"])
            told = await everything(missing)
            assert missing.returned == 127 and b"no-such-program" in told["stderr"]

    host.run(close())


# Files -----------------------------------------------------------------------------------------


def test_files_are_written_and_read(host: Host) -> None:
    async def both() -> None:
        box = host.sandbox
        data = os.urandom(5 * MIB + 7)
        await box.write("deep/er/file", data)
        assert await box.read("deep/er/file") == data
        assert await box.read(f"{box.spec.workdir}/deep/er/file") == data
        await box.write("deep/er/file", "kürzer")
        assert await box.read("deep/er/file") == "kürzer".encode()
        await box.write("empty", b"")
        assert await box.read("empty") == b""
        await box.write("run", "#!/bin/sh\necho ran", mode=0o755)
        assert (await box.exec("./run")).stdout == "ran\n"
        await box.exec("ln -s deep/er/file link")
        assert await box.read("link") == "kürzer".encode()

    host.run(both())


@pytest.mark.parametrize(
    ("make", "path"),
    [
        ("true", "missing"),
        ("mkdir -p folder", "folder"),
        ("test -p pipe || mkfifo pipe", "pipe"),
        ("true", "/dev/zero"),
        ("ln -sf loop loop", "loop"),
        ("head -c 5000 /dev/zero > large", "large"),
        ("true", "run\0run"),
    ],
)
def test_what_is_no_small_regular_file_is_not_read(host: Host, make: str, path: str) -> None:
    result(host, make)
    with pytest.raises(PathRefused):
        host.run(host.sandbox.read(path, limit=4999))
    assert result(host, "true").ok


@pytest.mark.parametrize(
    ("make", "path"),
    [
        ("mkdir -p folder", "folder"),
        ("test -p pipe || mkfifo pipe", "pipe"),
        ("touch file", "file/below"),
        ("true", "/proc/nowhere/file"),
    ],
)
def test_what_is_no_regular_file_is_not_written(host: Host, make: str, path: str) -> None:
    result(host, make)
    with pytest.raises(PathRefused):
        host.run(host.sandbox.write(path, "x"))


def tree(folder: Path) -> dict[str, str]:
    found = {}
    for place in sorted(folder.rglob("*")):
        kind = place.lstat().st_mode
        name = str(place.relative_to(folder))
        if stat.S_ISLNK(kind):
            found[name] = f"-> {os.readlink(place)}"
        elif stat.S_ISDIR(kind):
            found[name] = "/"
        else:
            found[name] = f"{stat.S_IMODE(kind):o} {place.read_text()}"
    return found


def test_folders_go_in_and_out(host: Host, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "file").write_text("content")
    (source / "a" / "run").write_text("#!/bin/sh\n")
    (source / "a" / "run").chmod(0o755)
    (source / "a" / "file").symlink_to("b/file")
    (source / "none").mkdir()
    for number in range(60):
        (source / f"many{number}").write_text(str(number))
    host.run(host.sandbox.upload(source, "up"))
    assert result(host, "cat up/a/file; echo; test -x up/a/run && ls up | wc -l").stdout.split() == [
        "content",
        "62",
    ]
    host.run(host.sandbox.download("up", tmp_path / "back"))
    assert tree(tmp_path / "back") == tree(source)
    host.run(host.sandbox.upload(source / "none", "up/none"))
    host.run(host.sandbox.upload(source / "many7", "one/file"))
    host.run(host.sandbox.download("one/file", tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "7"


def test_what_leads_out_is_not_uploaded(host: Host, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    for number, link in enumerate(["/etc/passwd", "../../outside"]):
        source = tmp_path / f"{number}" / "source"
        source.mkdir(parents=True)
        (source / "link").symlink_to(link)
        with pytest.raises(UsageError, match="leads out"):
            host.run(host.sandbox.upload(source, "uploaded"))
    special = tmp_path / "special"
    special.mkdir()
    os.mkfifo(special / "pipe")
    with pytest.raises(UsageError):
        host.run(host.sandbox.upload(special, "uploaded"))
    with pytest.raises(UsageError, match="not there"):
        host.run(host.sandbox.upload(tmp_path / "missing", "uploaded"))


def test_what_leads_out_is_not_downloaded(host: Host, tmp_path: Path) -> None:
    links = {
        "root": "/",
        "up": "../..",
        "passwd": "/etc/passwd",
        "twice": "in/../../..",
        "ok": "in/file",
        "in/back": "..",
        # Each of the two leads inside by its words; this one out, by way of the other.
        "in/out": "back/..",
    }
    commands = [f"ln -sfn {link} h/{name}" for name, link in links.items()]
    made = result(
        host,
        "; ".join(["mkdir -p h/in; echo x > h/in/file; chmod 6755 h/in/file; mkfifo h/pipe", *commands]),
    )
    assert made.ok, made.stderr
    host.run(host.sandbox.download("h", tmp_path / "got"))
    assert tree(tmp_path / "got") == {"in": "/", "in/back": "-> ..", "in/file": "755 x\n", "ok": "-> in/file"}


@pytest.mark.parametrize(
    ("make", "limits"),
    [
        ("head -c 20000 /dev/zero > d/file", {"max_bytes": 19_999}),
        ("for i in 1 2 3 4 5 6; do echo > d/$i; done", {"max_files": 5}),
        ("truncate -s 50M d/sparse", {"max_bytes": MIB}),
    ],
)
def test_a_download_is_whole_or_nothing(
    host: Host, tmp_path: Path, make: str, limits: dict[str, int]
) -> None:
    assert result(host, f"rm -rf d; mkdir d; {make}").ok
    with pytest.raises(PathRefused):
        host.run(host.sandbox.download("d", tmp_path / "got", **limits))
    assert not list(tmp_path.iterdir())


def test_a_download_needs_a_place_and_a_source(host: Host, tmp_path: Path) -> None:
    with pytest.raises(PathRefused):
        host.run(host.sandbox.download("nothing-here", tmp_path / "got"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="already"):
        host.run(host.sandbox.download(".", tmp_path / "taken"))


# Snapshots -------------------------------------------------------------------------------------


def test_a_snapshot_brings_files_back(host: Host) -> None:
    async def play() -> None:
        async with host.fresh() as box:
            await box.exec("mkdir a; echo 1 > a/one; ln -s /usr/bin/env env; echo x > run; chmod 751 run")
            await box.exec("touch -d '2020-01-01 12:00' a/one")
            # Folders and links may have got another time; a build looks at its files'.
            look = "find . -type f -printf '%p %m %s %Ts\\n'; find . ! -type f -printf '%p %M %l\\n'"
            before = (await box.exec(look)).stdout
            kept = await box.snapshot()
            await box.exec("rm -rf a; echo 2 > two; chmod 600 run; sleep 60 & echo")
            await box.restore(kept)
            assert sorted((await box.exec(look)).stdout.split("\n")) == sorted(before.split("\n"))
            if host.isolated:
                listed = await box.exec("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done")
                assert "sleep 60" not in listed.stdout
            async with await host.backend.start(snapshot=kept) as other:
                assert (await other.exec("cat a/one")).stdout == "1\n"
                await other.exec("echo changed > a/one")
            assert (await box.exec("cat a/one")).stdout == "1\n"
            await host.backend.forget(kept)
            await host.backend.forget(kept)
            with pytest.raises(UsageError, match="snapshot"):
                await box.restore(kept)
            with pytest.raises(UsageError, match="snapshot"):
                await host.backend.start(snapshot=kept)

    host.run(play())


def test_a_fork_goes_its_own_way(host: Host) -> None:
    async def play() -> None:
        async with host.fresh(env={"NAME": "both"}) as box:
            await box.write("shared", "from the first")
            async with await box.fork() as other:
                assert other.id != box.id
                assert await other.read("shared") == b"from the first"
                assert (await other.exec("echo $NAME")).stdout == "both\n"
                await other.write("shared", "the other's")
                await box.write("mine", "1")
                assert not (await other.exec("test -e mine")).ok
            assert await box.read("shared") == b"from the first"

    host.run(play())


def test_a_file_with_holes_has_them_still_in_a_fork(host: Host) -> None:
    async def play() -> None:
        async with host.fresh() as box:
            await box.exec(
                "truncate -s 30M hole; echo end >> hole; ln hole same; head -c 100000 /dev/zero > flat"
            )
            async with await box.fork() as other:
                seen = await other.exec("tail -c 4 hole; stat -c %s hole same flat; du -sm . | cut -f1")
                assert seen.stdout.split()[:4] == ["end", "31457284", "31457284", "100000"]
                if host.kind in ("bubblewrap", "docker"):
                    assert int(seen.stdout.split()[4]) < 20, "what is free may not cost anything in the copy"

    host.run(play())


def test_what_a_process_wrote_before_it_ended_is_read_to_the_end(host: Host) -> None:
    """It waits in a pipe while its reader takes its time."""

    async def play() -> None:
        async with host.fresh() as box:
            for size in (300_000, 1_000_000):
                process = await box.open(["sh", "-c", f"head -c {size} /dev/zero; echo done >&2; exit 3"])
                await asyncio.sleep(0.3)
                read = {"stdout": 0, "stderr": 0}
                while (piece := await process.read(60)) is not None:
                    read[piece[0]] += len(piece[1])
                assert (read, process.returned) == ({"stdout": size, "stderr": 5}, 3)
                await process.close()
            # One that nobody reads to its end holds nothing up.
            process = await box.open(["head", "-c", "300000", "/dev/zero"])
            await asyncio.sleep(0.3)
            await process.close()
            assert (await box.exec("ls /proc/self/fd | wc -l")).ok

    host.run(play())


def test_what_a_process_left_running_does_not_go_on_for_it(host: Host) -> None:
    """What is in its pipes when it ends is the last of it, however much another writes, and however late."""
    script = f"yes & {waiting('go')}; echo last >&2; exit 3"

    async def play() -> None:
        async with host.fresh() as box:
            process = await box.open(["sh", "-c", script])
            read = {"stdout": 0, "stderr": 0}
            async with asyncio.timeout(60):
                while (piece := await process.read(60)) is not None:
                    if read["stdout"] <= MIB < read["stdout"] + len(piece[1]):  # it floods
                        await box.write("go", b"")
                    read[piece[0]] += len(piece[1])
                    await asyncio.sleep(0.01)  # a reader that is slower than what writes
            assert (read["stderr"], process.returned) == (5, 3)
            await process.close()
            async with asyncio.timeout(60):
                assert (await box.exec("yes & exit 3", seconds=50)).return_code == 3

    host.run(play())


def test_a_source_is_copied_and_never_changed(host: Host, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("before")
    (tmp_path / "link").symlink_to("sub/file")

    async def play() -> str:
        async with host.fresh(source=tmp_path) as box:
            return (await box.exec("cat link; echo after > sub/file; cat link")).stdout

    assert host.run(play()) == "beforeafter\n"
    assert (tmp_path / "sub" / "file").read_text() == "before"


# Ends ------------------------------------------------------------------------------------------


def test_a_closed_sandbox_says_so(host: Host) -> None:
    async def play() -> None:
        box = await host.backend.start(PLAIN)
        running = asyncio.create_task(box.exec("sleep 60"))
        await asyncio.sleep(0.2)
        await box.close()
        await box.close()
        assert (await running).ended
        for use in (box.exec("true"), box.read("x"), box.write("x", "y"), box.snapshot(), box.fork()):
            with pytest.raises(UsageError, match="closed"):
                await use

    host.run(play())


def test_one_command_in_a_sandbox_of_its_own(host: Host) -> None:
    done = host.run(host.backend.run(["/bin/sh", "-c", "echo hi; exit 2"], PLAIN))
    assert (done.stdout, done.return_code) == ("hi\n", 2)
    assert host.run(host.backend.run(["sleep", "60"], PLAIN, seconds=0.5)).timed_out


def test_code_that_ends_its_sandbox_is_data(host: Host) -> None:
    async def play() -> None:
        async with host.fresh() as box:
            # Its parent is the worker; where that is a namespace's first process, it cannot be killed so.
            done = await box.exec("kill -9 $PPID; sleep 2; echo survived")
            if box.ended:
                assert done.ended == box.ended and done.return_code == -9
                with pytest.raises(SandboxEnded):
                    await box.exec("true")
                with pytest.raises(SandboxEnded):
                    await box.read("x")
            else:
                assert host.isolated and (await box.exec("echo on")).stdout == "on\n"

    host.run(play())


def test_code_that_kills_everything_is_data(host: Host) -> None:
    if not host.isolated:
        pytest.skip("outside a namespace that is the whole machine")

    async def play() -> None:
        async with host.fresh() as box:
            done = await box.exec(["python3", "-c", "import os; os.kill(-1, 9)"], seconds=20)
            assert done.return_code in (-9, 0, 1) and not done.timed_out
            try:
                assert (await box.exec("echo on")).stdout == "on\n"
            except SandboxEnded as error:
                assert error.why

    host.run(play())


LOOK = """
import os
for pid in os.listdir("/proc"):
    if pid.isdigit() and int(pid) != os.getpid():
        for name in ("mem", "maps", "environ"):
            try:
                open(f"/proc/{pid}/{name}", "rb", buffering=0).close()
                print(pid, name)
            except PermissionError:
                pass
        try:
            print(pid, os.listdir(f"/proc/{pid}/fd"))
        except PermissionError:
            pass
"""


def test_a_command_cannot_look_into_the_worker(host: Host) -> None:
    if not host.isolated:
        pytest.skip("only an isolated worker is where its commands can find it")

    async def play() -> None:
        async with host.fresh() as box:
            done = await box.exec(["python3", "-c", LOOK], stdin=b"a secret")
            assert (done.return_code, done.stdout, done.stderr) == (0, "", "")

    host.run(play())


def test_rubbish_from_a_worker_ends_its_sandbox(host: Host) -> None:
    if not host.isolated:
        pytest.skip("only an isolated worker is where its commands can find it")

    async def play() -> None:
        async with host.fresh() as box:
            forged = "import os; os.write(os.open('/proc/1/fd/1', os.O_WRONLY), b'?' * 100)"
            done = await box.exec(["python3", "-c", forged], seconds=20)
            if done.return_code != 1:
                assert done.ended and box.ended
                with pytest.raises(SandboxEnded):
                    await box.exec("true")

    host.run(play())


def test_memory_is_the_sandbox_s_own_affair(host: Host) -> None:
    async def play() -> None:
        async with host.fresh(memory=128 * MIB) as box:
            done = await box.exec(["python3", "-c", "x = bytearray(600 << 20); print('had it')"], seconds=30)
            assert "had it" not in done.stdout and not done.ok
            try:
                assert (await box.exec("echo on")).stdout == "on\n"
            except SandboxEnded as error:
                assert "memory" in error.why

    host.run(play())


def test_the_spec_is_checked(host: Host) -> None:
    if host.kind in ("docker", "writable"):
        with pytest.raises(UsageError, match="no image"):
            host.run(host.backend.start(SandboxSpec(image="agentgym/none:none")))
        with pytest.raises(UsageError, match="rootfs"):
            host.run(host.backend.start(SandboxSpec(rootfs=Path("/"))))
    else:
        with pytest.raises(UsageError, match="image"):
            host.run(host.backend.start(SandboxSpec(image="agentgym/none:none")))


def test_loopback_is_the_sandbox_s_own(host: Host) -> None:
    if not host.isolated:
        pytest.skip("it isolates nothing")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)"
        done = result(host, ["python3", "-c", reach])
    assert not done.ok and "refused" in done.stderr
