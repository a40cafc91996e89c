"""Containers: what they may use, who ended them, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import SandboxFailed, UsageError
from agentgym.sandboxes import Mount, Sandbox, SandboxEnded, SandboxSpec, make_backend, records
from agentgym.sandboxes.daemon import Daemon, Unwrap, ignored
from agentgym.sandboxes.docker import DockerBackend
from agentgym.sandboxes.images import build

T = TypeVar("T")
MIB = 1 << 20
WRITTEN = {"/work", "/tmp", "/var/tmp", "/dev/shm"}


@pytest.fixture(scope="module")
def client(docker_daemon: str) -> Iterator[Callable[[Callable[[Any], T]], T]]:
    """The daemon, spoken to from outside."""
    made = Daemon(docker_daemon)
    yield made.do
    made.close()


def play(body: Callable[[Any], Awaitable[T]], spec: SandboxSpec | None = None, **options: Any) -> T:
    """Run ``body`` with a sandbox."""

    async def main() -> T:
        async with DockerBackend(**options) as backend, await backend.start(spec) as sandbox:
            return await body(sandbox)

    return asyncio.run(main())


def python(sandbox: Sandbox, code: str, **given: Any) -> Any:
    return sandbox.exec(["python3", "-c", code], **given)


def ours(client: Any, pid: int = 0) -> list[str]:
    """What a process, by default this one, has there: containers, and images of snapshots."""
    wanted = {"label": ["agentgym.id"]}
    found = client(lambda c: c.containers(all=True, filters=wanted) + c.images(filters=wanted))
    owner = f"{pid or os.getpid()}:"
    return [one["Id"] for one in found if one["Labels"]["agentgym.owner"].startswith(owner)]


# Limits ----------------------------------------------------------------------------------------


@pytest.mark.docker
def test_processes_are_limited() -> None:
    fork = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(20); os._exit(0)
        made += 1
except OSError as error:
    print(made, error.errno)
"""

    async def body(box: Sandbox) -> tuple[str, str]:
        bomb = await python(box, fork, seconds=30)
        await box.exec("kill -9 -1")
        return bomb.stdout, (await box.exec("echo on", seconds=30)).stdout

    told, after = play(body, SandboxSpec(pids=40))
    made, errno = map(int, told.split())
    assert made < 40 and errno == 11 and after == "on\n"


@pytest.mark.docker
def test_memory_is_limited_in_one_process_and_in_many() -> None:
    grow = "import sys; x = bytearray(int(sys.argv[1]) << 20); import time; time.sleep(2); print('had it')"

    async def body(box: Sandbox) -> None:
        one = await box.exec(["python3", "-c", grow, "400"], seconds=30)
        assert one.return_code == -9 and not one.timed_out and "had it" not in one.stdout
        command = f'for i in 1 2 3 4 5 6; do python3 -c "{grow}" 60 & done; wait'
        many = await box.exec(command, seconds=60)
        assert many.stdout.count("had it") < 4

    play(body, SandboxSpec(memory=192 * MIB))


@pytest.mark.docker
def test_files_in_memory_are_charged_to_it() -> None:
    async def body(box: Sandbox) -> None:
        done = await box.exec("head -c 200000000 /dev/zero > big", seconds=30)
        assert not done.ok

    play(body, SandboxSpec(memory=64 * MIB, disk=512 * MIB))


@pytest.mark.docker
def test_a_sandbox_whose_worker_is_out_of_memory_ended_by_its_own_doing() -> None:
    async def body(box: Any) -> None:
        # What a command has not read yet lies with the worker: it is the largest process.
        asking = [box.exec(["sleep", "9"], stdin=b"x" * (3 * MIB), seconds=20) for _ in range(30)]
        done = await asyncio.gather(*asking)
        assert box.ended and "memory" in box.ended
        assert {result.ended for result in done} == {box.ended}
        with pytest.raises(SandboxEnded, match="memory"):
            await box.exec("true")

    play(body, SandboxSpec(memory=48 * MIB))


@pytest.mark.docker
def test_processors_are_limited() -> None:
    burn = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        break
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print(time.process_time())
"""
    done = play(lambda box: python(box, burn + "time.sleep(0.5)"), SandboxSpec(cpus=0.5))
    used = sum(map(float, done.stdout.split()))
    assert 0 < used < 1.5, "four processes burnt more than half a processor for two seconds"


@pytest.mark.docker
def test_bytes_and_files_are_limited() -> None:
    fill = "import os\nfor n in range(400):\n with open(f'{n}', 'wb') as f: f.write(bytes(1 << 20))"

    async def body(box: Sandbox) -> None:
        for folder in WRITTEN:
            full = await python(box, f"import os; os.chdir({folder!r})\n{fill}", seconds=30)
            assert "No space left" in full.stderr
        used = (await box.exec(f"du -sm {' '.join(WRITTEN)} | cut -f1")).stdout.split()
        assert 20 <= sum(map(int, used)) <= 34
        for folder in WRITTEN:
            await box.exec(f"rm -rf {folder}/*")
            many = f"import os; os.chdir({folder!r})\nfor n in range(2000): open(f'{{n}}', 'w').close()"
            assert "No space left" in (await python(box, many)).stderr
        count = int((await box.exec(f"find {' '.join(WRITTEN)} -type f | wc -l")).stdout)
        assert 900 <= count <= 1000

    play(body, SandboxSpec(disk=32 * MIB, inodes=1000))


@pytest.mark.docker
def test_nothing_else_can_be_written() -> None:
    async def body(box: Sandbox) -> None:
        find = "find / -xdev -writable ! -type l 2>/dev/null"
        assert set((await box.exec(find)).stdout.split()) <= WRITTEN, "where others are mounted"
        each = "while read m; do test -d $m -a -w $m && echo $m; done"
        mounts = await box.exec(f"cut -d' ' -f2 /proc/mounts | {each}")
        assert set(mounts.stdout.split()) <= WRITTEN | {"/dev/mqueue"}
        for path in ("/etc/passwd", "/x", "/proc/sys/kernel/core_pattern", "/sys/fs/cgroup/memory/x"):
            assert not (await box.exec(f"echo x > {path}")).ok, path

    play(body)


@pytest.mark.docker
def test_there_is_no_network_and_no_way_out() -> None:
    calls = """
import ctypes, errno, socket
C = ctypes.CDLL(None, use_errno=True)
# By their numbers on x86-64: ptrace, keyctl, add_key, bpf, userfaultfd, perf_event_open, io_uring_setup,
# mount, unshare, setns, process_vm_readv, process_vm_writev, request_key, pivot_root, fsopen, kexec_load
for number in (101, 250, 248, 321, 323, 298, 425, 165, 272, 308, 310, 311, 249, 155, 430, 246):
    assert C.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM, number
for flags in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    assert C.syscall(56, flags | 17, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM, flags
assert C.syscall(435, 0, 0) == -1 and ctypes.get_errno() == errno.ENOSYS
for request in (0x5412, 0x541C, 0x7700005412):
    asked = ctypes.c_ulong(request)
    assert C.syscall(16, 0, asked, 0) == -1 and ctypes.get_errno() == errno.EPERM, request
for family in (40, 38, 17):
    try:
        socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_STREAM)
    except PermissionError:
        continue
    raise SystemExit(f"family {family}")
assert [name for _, name in socket.if_nameindex()] == ["lo"]
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
assert status["NoNewPrivs"] == "1\\n" and status["Seccomp"] == "2\\n"
print("held")
"""
    assert os.uname().machine == "x86_64" or pytest.skip("the numbers are x86-64's")
    done = play(lambda box: python(box, calls))
    assert done.stdout == "held\n", done.stderr


@pytest.mark.docker
def test_what_is_mounted_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from outside")
    tmp_path.chmod(0o755)
    spec = SandboxSpec(mounts=(Mount(tmp_path, "/data"),), workdir="/home/task")

    async def body(box: Sandbox) -> None:
        seen = await box.exec("cat /data/file; pwd; echo x > /data/new; echo x > here; cat here")
        assert seen.stdout == "from outside/home/task\nx\n" and "Read-only" in seen.stderr

    play(body, spec)
    assert [place.name for place in tmp_path.iterdir()] == ["file"]


# The filter ------------------------------------------------------------------------------------

TIOCSTI, TIOCLINUX = 0x5412, 0x541C


def allowed(call: str, *arguments: int) -> bool:
    """What the profile says of a call, read as the daemon's documentation says it is read."""
    for rule in json.loads(build.PROFILE.read_text())["syscalls"]:
        if call in rule["names"] and all(
            {
                "SCMP_CMP_EQ": lambda value, a: value == a["value"],
                "SCMP_CMP_MASKED_EQ": lambda value, a: value & a["value"] == a["valueTwo"],
            }[a["op"]](arguments[a["index"]], a)
            for a in rule.get("args", ())
        ):
            return bool(rule["action"] == "SCMP_ACT_ALLOW")
    return False


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_profile_lets_every_request_of_a_terminal_through_but_two(request: int, above: int) -> None:
    wide = above << 32
    assert allowed("ioctl", 0, request | wide) == (request not in (TIOCSTI, TIOCLINUX))
    assert not allowed("ioctl", 0, TIOCSTI | wide) and not allowed("ioctl", 0, TIOCLINUX | wide)
    for bit in range(32):
        for value in (TIOCSTI, TIOCLINUX):
            assert allowed("ioctl", 0, value ^ (1 << bit) | wide)


def test_the_profile_names_what_it_allows() -> None:
    for call in (
        "ptrace", "process_vm_readv", "process_vm_writev", "keyctl", "add_key", "request_key", "bpf", "setns",
        "userfaultfd", "perf_event_open", "mount", "umount2", "pivot_root", "move_mount", "open_tree",
        "fsopen", "fsmount", "mount_setattr", "unshare", "io_uring_setup", "io_uring_enter", "clone3",
        "io_uring_register", "init_module", "kexec_load", "open_by_handle_at", "reboot", "pidfd_getfd",
        "chroot",
    ):  # fmt: skip
        assert not allowed(call, 0, 0, 0)
    assert not any(allowed("socket", family, 1, 0) for family in range(64) if family not in (1, 2, 10, 16))
    assert allowed("socket", 16, 3, 0) and not allowed("socket", 16, 3, 12), "no netfilter over netlink"
    assert allowed("clone", 0x3D0F00) and not allowed("clone", 0x10000011)


def test_the_stream_of_two_outputs_is_taken_apart_wherever_it_is_cut() -> None:
    def frame(kind: int, content: bytes) -> bytes:
        return bytes([kind, 0, 0, 0]) + len(content).to_bytes(4, "big") + content

    stream = frame(1, b"one") + frame(2, b"trouble") + frame(1, b"") + frame(1, b"two" * 100)
    for size in (1, 2, 3, 7, 8, 9, 50, len(stream)):
        unwrap = Unwrap()
        told = b"".join(unwrap(stream[at : at + size]) for at in range(0, len(stream), size))
        assert told == b"one" + b"two" * 100 and unwrap.said == b"trouble"


# Who ended it ----------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.parametrize("way", ["kill", "remove", "stop"])
def test_what_somebody_outside_ends_is_a_failure_of_infrastructure(client: Any, way: str) -> None:
    async def body(box: Any) -> None:
        running = asyncio.create_task(box.exec("sleep 60"))
        await asyncio.sleep(0.3)
        end = {
            "kill": lambda c: c.kill(box._container),
            "remove": lambda c: c.remove_container(box._container, force=True),
            "stop": lambda c: c.stop(box._container, timeout=0),
        }[way]
        await asyncio.to_thread(client, end)
        with pytest.raises(SandboxFailed, match="outside"):
            await running
        with pytest.raises(SandboxFailed, match="outside"):
            await box.read("x")

    play(body)
    assert not ours(client)


@pytest.mark.docker
def test_a_daemon_that_is_gone_is_a_failure_of_infrastructure(tmp_path: Path) -> None:
    async def nobody() -> None:
        async with make_backend("docker", base_url=f"unix://{tmp_path}/nobody") as backend:
            with pytest.raises(SandboxFailed, match="cannot be reached"):
                await backend.start()

    asyncio.run(nobody())


@pytest.mark.docker
def test_a_daemon_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("agentgym.sandboxes.daemon.CALL_SECONDS", 2.0)
    path = tmp_path / "hangs"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(8)

        async def wait() -> int:
            ticks = 0
            async with DockerBackend(base_url=f"unix://{path}") as backend:
                starting = asyncio.create_task(backend.start())
                while not starting.done():
                    await asyncio.sleep(0.02)
                    ticks += 1
                with pytest.raises(SandboxFailed):
                    await starting
            return ticks

        assert asyncio.run(wait()) > 30
    for thread in threading.enumerate():
        if thread.name.startswith("agentgym-docker"):
            thread.join(10)


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"CgroupDriver": "none", "CgroupVersion": "1"}, "no control groups"),
        (
            {"CgroupDriver": "cgroupfs", "CgroupVersion": "1", "SecurityOptions": ["name=rootless"]},
            "without root",
        ),
        (
            {"CgroupDriver": "cgroupfs", "CgroupVersion": "2", "PidsLimit": True, "CpuCfsQuota": True},
            "memory",
        ),
        ({"OSType": "windows"}, "windows"),
    ],
)
def test_a_daemon_that_ignores_limits_is_refused(info: dict[str, Any], why: str) -> None:
    assert why in ignored(info)
    held = {"MemoryLimit": True, "PidsLimit": True, "CpuCfsQuota": True, "CgroupDriver": "systemd"}
    assert not ignored({**held, "CgroupVersion": "2", "SecurityOptions": ["name=rootless"]})


def test_what_cannot_be_spoken_to_is_refused() -> None:
    for url in ("https://machine:2376", "ssh://machine", "npipe:////./pipe/docker"):
        with pytest.raises(UsageError, match="cannot speak"):
            DockerBackend(base_url=url)
    with pytest.raises(UsageError, match="user"):
        DockerBackend(user="nobody")


@pytest.mark.docker
def test_an_image_without_python_says_so(client: Any) -> None:
    import io
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("nothing"))
    client(lambda c: c.import_image_from_data(content.getvalue(), repository="agentgym/test", tag="bare"))
    try:
        with pytest.raises(UsageError, match="no python3"):
            play(lambda box: box.exec("true"), SandboxSpec(image="agentgym/test:bare"))
    finally:
        client(lambda c: c.remove_image("agentgym/test:bare"))
    assert not ours(client)


@pytest.mark.docker
def test_a_runtime_is_the_daemon_s() -> None:
    async def body(box: Any) -> Any:
        return await asyncio.to_thread(
            box._home.daemon.do, lambda c: c.inspect_container(box._container)["HostConfig"]["Runtime"]
        )

    assert play(body, runtime="runc") == "runc"
    with pytest.raises(UsageError, match="no runtime 'runsc-of-nobody'"):
        play(body, runtime="runsc-of-nobody")


# What is left ----------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.parametrize("writable", [False, True])
def test_nothing_is_left(client: Any, writable: bool) -> None:
    async def many() -> None:
        async with DockerBackend(writable=writable) as backend:
            boxes = await asyncio.gather(*(backend.start(owner="test") for _ in range(3)))
            kept = await boxes[0].snapshot()
            forked = await boxes[0].fork()
            again = await backend.start(snapshot=kept)
            assert await boxes[1].exec("true") and (await again.exec("true")).ok
            assert {r.id for r in records.listed()} >= {box.id for box in (*boxes, forked, again)}
            await boxes[1].close()
            starting = asyncio.create_task(backend.start())
            await asyncio.sleep(0.05)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting

    asyncio.run(many())
    assert not ours(client)
    assert not [r for r in records.listed() if r.backend == "docker" and r.pid == os.getpid()]


@pytest.mark.docker
@pytest.mark.parametrize("after", [0.1, 0.6, 3.0])
def test_nothing_is_left_of_a_process_that_was_killed(client: Any, after: float) -> None:
    code = """
import asyncio
from agentgym.sandboxes import make_backend

async def main():
    backend = make_backend("docker")
    print("on", flush=True)
    while True:
        box = await backend.start()
        await box.write("file", "x" * 1000)
        await box.snapshot()
        task = asyncio.create_task(box.exec("sleep 600", seconds=600))

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"on\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 60
    while left := [r.id for r in records.listed() if r.pid == process.pid] + ours(client, process.pid):
        assert time.monotonic() < until, left
        time.sleep(0.3)


@pytest.mark.docker
def test_containers_whose_owner_is_gone_are_found_by_their_labels(client: Any) -> None:
    code = """
import asyncio, os
from agentgym.sandboxes import make_backend, records

async def main():
    records.add = lambda record: None
    box = await make_backend("docker", writable=True).start()
    await box.snapshot()
    print(os.getpid(), box.id, flush=True)
    os._exit(0)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    pid, id = done.stdout.split()
    assert id.startswith("docker-")
    # Any start looks for them.
    play(lambda box: box.exec("true"))
    assert not ours(client, int(pid))


@pytest.mark.docker
def test_the_base_image_is_made_by_a_command(docker_daemon: str) -> None:
    command = [sys.executable, "-m", "agentgym.cli", "sandbox", "build"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{build.tag()}\n", done.stderr


# A root that is written ------------------------------------------------------------------------


@pytest.mark.docker
def test_a_writable_root_is_kept_by_its_snapshot() -> None:
    async def main() -> None:
        async with DockerBackend(writable=True, user="0:0") as backend:
            assert backend.enforces.isdisjoint({"disk", "inodes"})
            async with await backend.start() as box:
                assert (
                    await box.exec("echo tool > /usr/local/bin/tool; echo work > file; id -u")
                ).stdout == "0\n"
                async with await box.fork() as other:
                    assert (await other.exec("cat /usr/local/bin/tool file")).stdout == "tool\nwork\n"
                status = await box.read("/proc/self/status")
                assert b"CapEff:\t0000000000000000" in status

    asyncio.run(main())
