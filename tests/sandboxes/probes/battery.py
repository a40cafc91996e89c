"""Attacks on a sandbox, one by one, each judged by what can be seen of it outside.

Invariant: what code inside says of itself counts only against the sandbox. A probe ends in a verdict:
``held`` with what was seen; ``declared``: the backend says beforehand that it does not hold this here; or
``broken``.

It runs by itself, so that it can be an ordinary user where the tests are root:
``python battery.py BACKEND USER FOLDER``. It reads names of probes, a line each, and answers with a line of
JSON each; USER 0 stays who it is.
"""

from __future__ import annotations

# ruff: noqa: ASYNC240, SIM905 - it waits for nothing but its own small files
import asyncio
import contextlib
import ctypes
import errno
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentgym.errors import SandboxFailed
from agentgym.sandboxes import (
    Backend,
    ExecResult,
    PathRefused,
    Sandbox,
    SandboxEnded,
    SandboxSpec,
    make_backend,
)

MIB = 1 << 20
SPEC = SandboxSpec(memory=256 * MIB, disk=64 * MIB, inodes=4096, pids=64, cpus=1.0)
ATTACKS = Path(__file__).with_name("attacks.py").read_text()
REFUSED = {errno.EPERM, errno.ENOSYS, errno.EACCES}


class Broken(Exception):
    """The sandbox did not hold."""


class Declared(Exception):
    """The backend says that it does not hold this here."""


Probe = Callable[["Lab"], Awaitable[str]]
PROBES: dict[str, Probe] = {}


def probe(function: Probe) -> Probe:
    PROBES[function.__name__] = function
    return function


def must(holds: object, evidence: object) -> None:
    if not holds:
        raise Broken(str(evidence)[:1500])


class Visits:
    """Services of the host, which note whoever comes."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.abstract = f"agentgym-{secrets.token_hex(6)}"
        self.path = str(folder / "socket")
        self._sockets: list[socket.socket] = []
        self.tcp = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0), "tcp")[1]
        self.udp = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 0), "udp")[1]
        self.tcp6 = 9
        with contextlib.suppress(OSError):  # a machine without IPv6
            self.tcp6 = self._listen(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0), "tcp6")[1]
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.abstract, "abstract")
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, self.path, "path")
        self.hosts = ["127.0.0.1", "0.0.0.0"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.connect(("192.0.2.1", 9))  # sends nothing; tells the address that this machine has
            self.hosts.append(made.getsockname()[0])

    def _listen(self, family: int, kind: int, address: Any, name: str) -> Any:
        made = socket.socket(family, kind)
        made.bind(address)
        if kind == socket.SOCK_STREAM:
            made.listen()
        self._sockets.append(made)
        threading.Thread(target=self._wait, args=(made, kind, name), daemon=True).start()
        return made.getsockname()

    def _wait(self, made: socket.socket, kind: int, name: str) -> None:
        while True:
            try:
                if kind == socket.SOCK_STREAM:
                    made.accept()[0].close()
                else:
                    made.recv(100)
            except OSError:
                return
            self.seen.append(name)

    def close(self) -> None:
        for made in self._sockets:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
            made.close()


@dataclass
class Peak:
    """The most that was seen of a sandbox's processes at one time."""

    count: int = 0
    held: int = 0
    cpu: float = 0.0


class Lab:
    """One backend, one user, and what of the host is watched."""

    def __init__(self, kind: str, backend: Backend, folder: Path, token: str, paths: list[str]) -> None:
        self.kind, self.backend, self.folder = kind, backend, folder
        self.token, self.paths = token, paths
        self.visits = Visits(folder)
        self.worst = 0.0
        self._shared: Sandbox | None = None
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            self.worst = max(self.worst, time.monotonic() - before - 0.005)

    async def shared(self) -> Sandbox:
        """A sandbox that many probes use."""
        if self._shared is None or self._shared.ended:
            if self._shared is not None:
                await self._shared.close()
            self._shared = await self.start()
        return self._shared

    async def start(self, **given: Any) -> Sandbox:
        sandbox = await self.backend.start(replace(SPEC, **given))
        await sandbox.write("/tmp/attacks.py", ATTACKS)
        return sandbox

    @contextlib.asynccontextmanager
    async def fresh(self, **given: Any) -> AsyncIterator[Sandbox]:
        async with await self.start(**given) as sandbox:
            yield sandbox

    async def result(
        self, sandbox: Sandbox, name: str, *arguments: Any, seconds: float = 30, limit: int = MIB
    ) -> ExecResult:
        return await sandbox.exec(command(name, *arguments), seconds=seconds, limit=limit)

    async def told(
        self, name: str, *arguments: Any, sandbox: Sandbox | None = None, seconds: float = 30
    ) -> Any:
        """What an attack reports."""
        result = await self.result(sandbox or await self.shared(), name, *arguments, seconds=seconds)
        lines = result.stdout.splitlines()
        if not lines or not result.ok:
            raise RuntimeError(f"the attack itself failed: {result}")
        return json.loads(lines[-1])

    @contextlib.asynccontextmanager
    async def watched(self, sandbox: Sandbox) -> AsyncIterator[Peak]:
        """Look at a sandbox's processes from outside, all the time."""
        namespace = (await self.told("namespaces", sandbox=sandbox))["pid"]
        peak, ended = Peak(), threading.Event()
        cpus: dict[str, float] = {}
        tick = os.sysconf("SC_CLK_TCK")

        def look() -> None:
            while not ended.wait(0.02):
                count = held = 0
                for name in os.listdir("/proc"):
                    if name.isdigit():
                        with contextlib.suppress(OSError, ValueError):
                            if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                                stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                                count += 1
                                held += int(stat[21]) * 4096
                                cpus[name] = (int(stat[11]) + int(stat[12])) / tick
                peak.count, peak.held = max(peak.count, count), max(peak.held, held)
                peak.cpu = sum(cpus.values())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield peak
        finally:
            ended.set()
            await asyncio.to_thread(thread.join)

    def user(self) -> int:
        """Who the sandboxes' processes are on the host."""
        made = getattr(self.backend, "_launcher", None)
        return int(made.uid) if made is not None else os.getuid()

    async def close(self) -> None:
        self._ticking.cancel()
        if self._shared is not None:
            await self._shared.close()
        self.visits.close()


def command(name: str, *arguments: Any) -> list[str]:
    return ["python3", "-B", "/tmp/attacks.py", name, json.dumps(arguments)]


def calls_of(told: dict[str, Any], *names: str) -> str:
    """See that system calls were refused; says how."""
    seen = []
    for label, (status, said) in told.items():
        if not any(label == name or label.startswith(name + " ") for name in names):
            continue
        if status < 0:
            seen.append(f"{label}: ended by {signal.Signals(-status).name}")
            continue
        found = json.loads(said)
        allowed = REFUSED | ({errno.EINVAL} if label == "setuid" else set())
        must(found is None or (found[0] < 0 and found[1] in allowed), f"{label}: {said}")
        seen.append(f"{label}: " + ("none here" if found is None else errno.errorcode[found[1]]))
    if not seen:
        raise RuntimeError(f"nothing was tried of {names}")
    return ", ".join(seen)


def refusing(*names: str) -> Probe:
    async def tried(lab: Lab) -> str:
        if not hasattr(lab, "calls"):
            lab.calls = await lab.told("calls", seconds=60)  # type: ignore[attr-defined]
        return calls_of(lab.calls, *names)  # type: ignore[attr-defined]

    return tried


for _name, _calls in {
    "mount": ("mount", "mount --bind", "mount -o"),
    "umount": ("umount2",),
    "new_mount_api": ("fsopen", "fsmount", "open_tree", "move_mount", "mount_setattr"),
    "unshare": ("unshare",),
    "clone_namespaces": ("clone",),
    "clone3": ("clone3",),
    "setns": ("setns",),
    "chroot_pivot": ("chroot", "pivot_root"),
    "file_handles": ("name_to_handle_at", "open_by_handle_at"),
    "keyrings": ("keyctl", "add_key", "request_key"),
    "bpf": ("bpf",),
    "io_uring": ("io_uring_setup",),
    "userfaultfd": ("userfaultfd",),
    "perf_events": ("perf_event_open",),
    "ptrace": ("ptrace",),
    "other_memory": ("process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd"),
    "modules": ("init_module", "finit_module", "delete_module", "kexec_load"),
    "machine": ("reboot", "swapon", "quotactl", "syslog", "acct", "fanotify_init", "lookup_dcookie"),
    "clocks_and_names": ("settimeofday", "clock_settime", "sethostname"),
    "hardware_ports": ("iopl", "ioperm", "modify_ldt"),
    "become_root": ("setuid",),
}.items():
    PROBES[_name] = refusing(*_calls)


@probe
async def foreign_calls(lab: Lab) -> str:
    """System calls of i386 and x32."""
    told = await lab.told("foreign")
    for name, (status, said) in told.items():
        must(status < 0 or json.loads(said) < 0, f"{name}: {status} {said}")
    return str({name: status for name, (status, _) in told.items()}) if told else "no such conventions here"


@probe
async def socket_families(lab: Lab) -> str:
    """Every family of sockets, also with high bits set."""
    told = await lab.told("families")
    must(set(told) <= {"1", "2", "10", "16"}, told)
    must(not any(high for made in told.values() for _, high in made if False), told)
    return f"families {sorted(map(int, told))}"


@probe
async def raw_sockets(lab: Lab) -> str:
    told = await lab.told("raw")
    must(told["interfaces"] in (["lo"], []), told)
    must(all(told[name][0] == "refused" for name in ("icmp", "raw6", "packet")), told)
    return f"interfaces {told['interfaces']}"


@probe
async def terminal_input(lab: Lab) -> str:
    """TIOCSTI, also with high bits set."""
    told = await lab.told("terminal")
    must(told.pop("tty")[0] == "refused", told)
    must(all(done[0] < 0 for done in told.values()), told)
    return str({name: errno.errorcode[done[1]] for name, done in told.items()})


@probe
async def capabilities(lab: Lab) -> str:
    told = await lab.told("privileges")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        must(int(told[name][0], 16) == 0, told)
    must(told["NoNewPrivs"] == ["1"] and told["Seccomp"] == ["2"], told)
    must(0 not in told["ids"] and told["become root"][0] == "refused", told)
    return "no capability, no_new_privs, seccomp"


@probe
async def inherited(lab: Lab) -> str:
    """Variables and open files of the host's processes."""
    secret = f"secret-{lab.token}"
    os.environ["AGENTGYM_PROBE"] = secret
    try:
        async with lab.fresh() as sandbox:
            told = await lab.told("privileges", sandbox=sandbox)
            found = await sandbox.exec("cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'")
    finally:
        del os.environ["AGENTGYM_PROBE"]
    must(secret not in str(told) + found.stdout, "a variable of the host's is seen")
    must(
        set(told["environment"]) <= {"HOME", "TMPDIR", "PATH", "LANG", "PWD", "LC_CTYPE"}, told["environment"]
    )
    must(set(told["open files"]) <= {0, 1, 2, 3}, told["open files"])  # 3 is the folder that it lists
    return "standard streams and five variables"


@probe
async def host_user(lab: Lab) -> str:
    """Who its processes are on the host."""
    async with lab.fresh() as sandbox:
        namespace = (await lab.told("namespaces", sandbox=sandbox))["pid"]
        running = asyncio.create_task(sandbox.exec("sleep 3", seconds=10))
        await asyncio.sleep(0.3)
        users = set()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(place / "ns" / "pid") == namespace:
                    status = (place / "status").read_text()
                    users |= set(status.partition("Uid:")[2].splitlines()[0].split())
        running.cancel()
    must(users and "0" not in users, users)
    return f"user {', '.join(sorted(users))}"


@probe
async def setuid_programs(lab: Lab) -> str:
    told = await lab.told("setuid", lab.token)
    must(told["ran"]["su"][0] != 0 and told["ran"]["mount"][0] != 0, told["ran"])
    must("0" not in told["own"][1].split(), told)
    return f"{len(told['there'])} set-user-id programs are seen, none gives anything"


@probe
async def host_files(lab: Lab) -> str:
    """Canaries, homes, secrets, our own code and environment."""
    told = await lab.told("files", lab.paths, lab.token)
    must(not told["hits"], told["hits"])
    secret = [place for place in told["found"] if not place.startswith("/proc/") or "root/" in place]
    hidden = (
        "/root",
        "/home",
        "/opt",
        "/srv",
        "/boot",
        "/media",
        str(Path(sys.prefix)),
        str(Path(__file__).parents[3]),
    )
    seen = [place for place in secret if place.startswith(hidden) and told["found"][place]]
    must(not seen, seen)
    must("root:$" not in str(told["found"]) and "/etc/shadow" not in told["found"], told["found"])
    expected = set(
        [
            "bin",
            "dev",
            "etc",
            "lib",
            "lib32",
            "lib64",
            "libx32",
            "proc",
            "run",
            "sbin",
            "tmp",
            "usr",
            "var",
            "work",
        ]
    )
    if lab.kind == "docker":
        expected |= set(["boot", "home", "media", "mnt", "opt", "root", "srv", "sys", ".dockerenv"])
    must(set(told["top"]) <= expected, told["top"])
    if lab.kind == "bubblewrap":
        must(
            {kind for _, kind in told["mounts"]} <= {"tmpfs", "proc", "devtmpfs", "devpts"} | disk_kinds(),
            told["mounts"],
        )
    return f"nothing of {len(lab.paths)} places by 50 ways"


def disk_kinds() -> set[str]:
    """File systems that /usr, /etc/ssl and /dev may lie on."""
    kinds = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[4] in ("/", "/usr", "/dev", "/etc"):
            kinds.add(rest.split()[0])
    return kinds


@probe
async def read_only(lab: Lab) -> str:
    told = await lab.told("readonly")
    done = [place for place, found in told.items() if found[0] == "done"]
    must(not done, done)
    return f"{len(told)} writes refused"


@probe
async def kernel_settings(lab: Lab) -> str:
    """/proc/sys, sysrq, /sys: core_pattern was writable once where root started it."""
    watched = [
        Path("/proc/sys/kernel") / name
        for name in ("core_pattern", "modprobe", "hostname", "pid_max", "randomize_va_space")
    ]
    before = [place.read_text() for place in watched if place.exists()]
    told = await lab.told("settings")
    must(
        [place.read_text() for place in watched if place.exists()] == before,
        "a setting of the host's was changed",
    )
    # Whoever has no audit identity may take one, of its own.
    done = [place for place, found in told.items() if found[0] == "done" and place != "/proc/self/loginuid"]
    must(not done, done)
    return f"{len(told)} refused; the host's settings are as they were"


@probe
async def device_nodes(lab: Lab) -> str:
    told = await lab.told("devices")
    there = told.pop("there")
    done = [name for name, found in told.items() if found[0] == "done"]
    must(not done, done)
    return f"/dev has {' '.join(there)}"


@contextlib.contextmanager
def victim(user: int) -> Any:
    """A process of the host that runs as the same user as the sandbox's."""
    given = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 and user else {}
    made = subprocess.Popen(["sleep", "100"], **given)  # type: ignore[call-overload]
    try:
        yield made
    finally:
        made.kill()
        made.wait()


@probe
async def host_processes(lab: Lab) -> str:
    """Signals to processes of the host that belong to the same user."""
    async with lab.fresh() as sandbox:
        with victim(lab.user()) as made:
            victims = [made.pid, os.getpid(), os.getppid(), os.getpgrp(), -1 * os.getpgrp()]
            told = await lab.told("kill", victims, sandbox=sandbox, seconds=60)
            must(made.poll() is None, "a process of the host was killed")
            must(not set(told["seen"]) & set(victims[:2]), told["seen"])
        must((await sandbox.exec("echo on")).stdout == "on\n", "its first process was killed by its own")
    return f"{len(told['seen'])} processes seen, none of the host's"


@probe
async def kill_everybody(lab: Lab) -> str:
    """kill -9 -1."""
    async with lab.fresh() as sandbox:
        with victim(lab.user()) as made:
            result = await lab.result(sandbox, "everybody", seconds=10)
            must(made.poll() is None, "a process of the host was killed")
        must(result.return_code == -9, result)
        return f"return code {result.return_code}, ended: {sandbox.ended or 'no'}"


@probe
async def host_memory(lab: Lab) -> str:
    """/proc/PID/mem and its like of the host's processes."""
    with victim(lab.user()) as made:
        told = await lab.told("memories", [made.pid, os.getpid()])
    done = [place for place, found in told.items() if found[0] == "done"]
    must(not done, done)
    return f"{len(told)} refused"


@probe
async def network(lab: Lab) -> str:
    """IP, IPv6, abstract and named sockets, DNS, loopback, netlink: services of the host note no visit."""
    visits = lab.visits
    before = len(visits.seen)
    with socket.socket() as mine:  # the services do note a visit
        mine.connect(("127.0.0.1", visits.tcp))
    told = await lab.told(
        "network", visits.tcp, visits.udp, visits.tcp6, visits.abstract, visits.path, visits.hosts, seconds=90
    )
    await asyncio.sleep(0.1)
    must(visits.seen[before:] == ["tcp"], visits.seen[before:])
    udp = [name for name, found in told.items() if found[0] == "done" and "udp" not in name]
    must(not udp, {name: told[name] for name in udp})
    must(told["netlink link up"][-1] != 0, told["netlink link up"])
    return f"{len(told)} tried, no visit"


# Limits ---------------------------------------------------------------------------------------


@probe
async def fork_bomb(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        async with lab.watched(sandbox) as peak:
            result = await lab.result(sandbox, "forks", 1.0, seconds=4)
        # Its processes end by themselves; one that does not is the sandbox's own affair.
        must(peak.count <= SPEC.pids + 1, f"{peak.count} processes at a time, {SPEC.pids} allowed")
        must(peak.count > SPEC.pids // 2, f"only {peak.count}: {result}")
        again = await sandbox.exec("echo on", seconds=10)
        must(again.stdout == "on\n" or again.ended or again.return_code == 127, again)
    return f"{peak.count} processes at most"


@probe
async def thread_bomb(lab: Lab) -> str:
    told = await lab.told("threads")
    must(told["made"] <= SPEC.pids, told)
    return f"{told['made']} threads"


@probe
async def memory_in_one(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        async with lab.watched(sandbox) as peak:
            result = await lab.result(sandbox, "memory", 2048, 1.0)
        must(not result.ok, result)
    return within(peak)


@probe
async def memory_in_many(lab: Lab) -> str:
    """Eight times 150 MB."""
    async with lab.fresh() as sandbox:
        async with lab.watched(sandbox) as peak:
            result = await lab.result(sandbox, "many", 8, 150, 0.7)
        whole = json.loads(result.stdout)["whole"] if result.ok else 0
        must(whole <= 1, f"{whole} of 8 had their memory")
    return within(peak) + f", {whole} of 8 left"


@probe
async def memory_of_heirs(lab: Lab) -> str:
    """Thirty processes with the same 30 MB hold little more than one of them: none has to die."""
    async with lab.fresh() as sandbox:
        told = await lab.told("heirs", 30, 30, 0.7, sandbox=sandbox)
    must(told["whole"] == 30, told)
    return "all 30 left"


def within(peak: Peak) -> str:
    # A look from outside counts shared pages several times, and a watcher needs a moment.
    must(peak.held < 3 * SPEC.memory, f"{peak.held // MIB} MiB at a time, {SPEC.memory // MIB} allowed")
    return f"{peak.held // MIB} MiB at most"


def host_shared() -> int:
    """Bytes of the machine's memory that files hold and no process."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("there is no Shmem")


def shared_memory(kind: str) -> Probe:
    async def tried(lab: Lab) -> str:
        async with lab.fresh(disk=64 * MIB) as sandbox:
            before, most = host_shared(), 0
            running = asyncio.create_task(lab.result(sandbox, "shared", kind, 1500, seconds=20))
            while not running.done():
                await asyncio.sleep(0.01)
                most = max(most, host_shared() - before)
            result = running.result()
            if result.return_code == 1:
                raise RuntimeError(f"the attack itself failed: {result}")
            got = json.loads(result.stdout)["got"] if result.ok else 0
        # Others use this machine: two samples say the same, or one of them says no.
        must(
            min(got * MIB, most) <= SPEC.memory + SPEC.disk, f"{got} MiB, the host has {most // MIB} MiB more"
        )
        return f"{got} MiB" if result.ok else f"ended: {result.return_code} {result.ended}"

    return tried


PROBES["memory_memfd"] = shared_memory("memfd")
PROBES["memory_system_v"] = shared_memory("sysv")
PROBES["memory_anonymous"] = shared_memory("anonymous")
PROBES["memory_zero"] = shared_memory("zero")
PROBES["memory_tmp"] = shared_memory("/tmp")
PROBES["memory_shm"] = shared_memory("/dev/shm")
PROBES["memory_unlinked"] = shared_memory("unlinked")


@probe
async def processor_time(lab: Lab) -> str:
    async with lab.fresh(cpus=0.5) as sandbox:
        async with lab.watched(sandbox) as peak:
            await lab.result(sandbox, "spin", 4, 1.5)
        if "cpus" not in lab.backend.enforces:
            raise Declared("the backend does not say that it holds processor time here; deadlines do")
        must(peak.cpu < 1.3, f"{peak.cpu:.2f} s of processor time in 1.5 s, half a processor allowed")
    return f"{peak.cpu:.2f} s in 1.5 s"


@probe
async def file_watches(lab: Lab) -> str:
    """Watchers of file systems are counted for a user and all its sandboxes: the user has some left."""
    async with lab.fresh() as one, lab.fresh() as other:
        made = 0
        for sandbox in (one, other):
            process = await sandbox.open(command("watches"))
            told = await process.read(20)
            made += json.loads(told[1])["made"] if told else 0
        libc = ctypes.CDLL(None, use_errno=True)
        mine = [libc.inotify_init1(0o2000000) for _ in range(10)]
        for fd in mine:
            if fd >= 0:
                os.close(fd)
        must(min(mine) >= 0, f"{made} watchers inside, and none is left")
    return f"{made} inside two, and some are left"


@probe
async def disk_bytes(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        told = await lab.told("disk", 400, sandbox=sandbox, seconds=60)
        must(told["got"] <= SPEC.disk + 2 * MIB, told)
        must((await sandbox.exec("echo on")).stdout == "on\n", "a full disk ended it")
    return f"{told['got'] // MIB} MiB of {SPEC.disk // MIB}"


@probe
async def disk_inodes(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        result = await lab.result(sandbox, "inodes", 50_000, seconds=60)
        made = json.loads(result.stdout)["made"]
        if "inodes" not in lab.backend.enforces:
            raise Declared("the backend does not say that it holds inodes here")
        must(made <= SPEC.inodes, made)
    return f"{made} files"


@probe
async def zip_bomb(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        told = await lab.told("bomb", 96, sandbox=sandbox, seconds=60)
        must(told["got"] <= SPEC.disk, told)
        await refuses(sandbox.download("/work/bomb", lab.folder / "bomb", max_bytes=16 * MIB))
    return f"{told['size']} bytes became {told['got'] // MIB} MiB"


@probe
async def limits_are_hard(lab: Lab) -> str:
    told = await lab.told("limits")
    must(told["RLIMIT_CORE"] == [0, 0] and told["RLIMIT_FSIZE"][1] > 0, told)
    must(0 < told["RLIMIT_NOFILE"][1] <= 65_536, told)
    return f"core {told['RLIMIT_CORE']}, files {told['RLIMIT_NOFILE']}, size {told['RLIMIT_FSIZE']}"


# Output, frames, hanging ----------------------------------------------------------------------


@probe
async def output_flood(lab: Lab) -> str:
    """200 MB on both streams."""
    sandbox = await lab.shared()
    result = await lab.result(sandbox, "flood", [1, 2], 100, limit=10_000)
    must(len(result.stdout) == len(result.stderr) == 10_000, (len(result.stdout), len(result.stderr)))
    must(result.cut_stdout + 10_000 == result.cut_stderr + 10_000 == 100 * MIB, result.cut_stdout)
    return f"{result.cut_stdout} bytes cut of each"


@probe
async def background_flood(lab: Lab) -> str:
    async with lab.fresh() as sandbox:
        result = await lab.result(sandbox, "flood", [1, 2], 300, True, limit=10_000)
        must(len(result.stdout) <= 10_000, len(result.stdout))
        must((await sandbox.exec("echo on")).stdout == "on\n", "it is gone")
    return f"its own end is told after {result.seconds:.1f} s"


def forging(kind: str) -> Probe:
    async def tried(lab: Lab) -> str:
        async with lab.fresh() as sandbox:
            process = await sandbox.open(["cat"])
            sibling = asyncio.create_task(sandbox.exec("sleep 0.5; echo sibling", seconds=5))
            result = await lab.result(sandbox, "forge", kind, 3000, seconds=10)
            await sibling
            with contextlib.suppress(TimeoutError, SandboxEnded):
                for _ in range(50):
                    if await process.read(0.05) is None:
                        break
            said = result.stdout.rpartition('"ends": ')[2].partition(",")[0]
            ends = said if said.isdigit() else "unknown"
            how = f"{ends} ways to the worker; " + (sandbox.ended or "it goes on")
        return how[:200]

    return tried


for _kind in (
    "giant",
    "unknown",
    "half",
    "stray",
    "empty",
    "output",
    "results",
    "rubbish",
    "refusals",
    "greeting",
):
    PROBES[f"forged_{_kind}"] = forging(_kind)


@probe
async def stolen_requests(lab: Lab) -> str:
    """A command that reads what is for the worker: nobody waits longer than the deadline, and it is data."""
    async with lab.fresh() as sandbox:
        running = asyncio.create_task(lab.result(sandbox, "steal", seconds=5))
        await asyncio.sleep(0.5)
        others = asyncio.gather(*(sandbox.exec("true", seconds=1) for _ in range(5)), return_exceptions=True)
        done = await asyncio.wait_for(others, 40)
        await running
        for one in done:
            must(isinstance(one, (ExecResult, SandboxEnded)), repr(one))
    return f"{sum(isinstance(one, ExecResult) and one.ok for one in done)} of 5 went through"


@probe
async def crashed_worker(lab: Lab) -> str:
    """The worker's memory overwritten."""
    async with lab.fresh() as sandbox:
        result = await lab.result(sandbox, "crash", seconds=10)
        after = None
        try:
            after = await sandbox.exec("echo on", seconds=5)
        except SandboxEnded as error:
            after = error
        must(isinstance(after, (ExecResult, SandboxEnded)), after)
    return f"{result.ended or result.return_code}; then {sandbox.ended or 'on'}"


@probe
async def hanging(lab: Lab) -> str:
    """Commands that ignore signals, stop themselves, close everything, leave a child: siblings go on."""
    async with lab.fresh() as sandbox:
        lab.worst = 0.0
        ways = ("ignoring", "closed", "stopped", "left", "reading", "busy")
        hung = [asyncio.create_task(lab.result(sandbox, "hang", way, seconds=1.0)) for way in ways]
        slowest = 0.0
        while not all(task.done() for task in hung):
            before = time.monotonic()
            result = await sandbox.exec("true", seconds=10)
            slowest = max(slowest, time.monotonic() - before)
            must(result.ok, result)
            await asyncio.sleep(0.02)
            must(slowest < 2, f"a sibling took {slowest:.1f} s")
        for way, task in zip(ways, hung, strict=True):
            result = task.result()
            if way == "left":
                must(result.return_code == 7 and result.seconds < 1, result)
            else:
                must(result.timed_out and result.return_code == -9 and result.seconds < 4, (way, result))
    return f"a sibling took {slowest * 1000:.0f} ms at most, the event loop {lab.worst * 1000:.0f} ms"


@probe
async def hanging_reads(lab: Lab) -> str:
    """Files that are none."""
    async with lab.fresh() as sandbox:
        await sandbox.exec(
            "mkfifo pipe; ln -s /dev/zero zero; ln -s /proc/kmsg kmsg; ln -s loop loop; mkdir d"
        )
        before = time.monotonic()
        for place in (
            "pipe",
            "zero",
            "kmsg",
            "loop",
            "d",
            "/dev/tty",
            "/dev/ptmx",
            "/proc/1/mem",
            "/proc/kcore",
        ):
            await refuses(sandbox.read(place))
        for place in (
            "pipe",
            "zero",
            "loop",
            "d",
            "/dev/full",
            "/etc/passwd",
            "/proc/sys/kernel/core_pattern",
            "/x",
        ):
            await refuses(sandbox.write(place, b"x"))
        took = time.monotonic() - before
        must(took < 10, took)
    return f"{took * 1000:.0f} ms"


async def refuses(doing: Awaitable[Any]) -> None:
    try:
        done = await doing
    except PathRefused:
        return
    raise Broken(f"it was allowed: {done!r}"[:200])


@probe
async def odd_commands(lab: Lab) -> str:
    """Arguments of 1 MB, variables with odd names and values, commands that are not there."""
    sandbox = await lab.shared()
    large = await sandbox.exec(["echo", "x" * MIB])
    must(large.return_code in (126, 127), large.return_code)
    odd = {
        "A=B": "c",
        "x y": "1",
        "é": "ü",
        "NEW\nLINE": "\n",
        "": "empty",
        "LD_PRELOAD": "/tmp/none.so",
        "L": "x" * 200_000,
    }
    for name, value in odd.items():
        result = await sandbox.exec("true", env={name: value})
        must(not result.ended, (name, result))
    for words in (["/nowhere"], ["/tmp"], ["/etc/passwd"], [""], ["-c"], ["\udcff"], ["a" * 5000]):
        must(not (await sandbox.exec(words)).ok, words)
    must((await sandbox.exec("echo on")).stdout == "on\n", "it is gone")
    once = await lab.backend.run(["/bin/echo", "x" * 150_000], SPEC)
    must(not once.ok and not once.ended, once.return_code)
    must((await lab.backend.run(["/bin/true"], SPEC)).ok, "no more one-shots")
    return "results, each of them"


@probe
async def forged_failure(lab: Lab) -> str:
    """Code that pretends that the machinery around it broke."""
    for text, code in (
        ("bwrap: Creating new namespace failed", 1),
        ("cannot start: x", 126),
        ("OCI runtime", 125),
    ):
        result = await lab.backend.run(["/bin/sh", "-c", f"echo '{text}' >&2; exit {code}"], SPEC)
        must(result.return_code == code and not result.ok, result)
    for words in (["/nowhere"], ["nowhere"], ["/tmp"], ["/etc/passwd"]):
        result = await lab.backend.run(words, SPEC)
        must(result.return_code in (126, 127), result)
    return "data"


@probe
async def memory_ends_it(lab: Lab) -> str:
    """A sandbox that ends itself is data."""
    async with lab.fresh(memory=64 * MIB) as sandbox:
        result = await sandbox.exec(
            "python3 -c 'import os\nwhile 1: b = bytearray(1 << 28); b[::4096] = b[::4096]'", seconds=20
        )
        must(not result.ok, result)
        try:
            after = str((await sandbox.exec("echo on", seconds=5)).stdout)
        except SandboxEnded as error:
            after = error.why
    return f"{result.return_code}, then {after.strip()}"


# Files in and out -----------------------------------------------------------------------------


def tree(kind: str) -> Probe:
    async def tried(lab: Lab) -> str:
        target = lab.folder / f"tree-{kind}-{secrets.token_hex(4)}"
        async with lab.fresh(inodes=30_000) as sandbox:
            await lab.told("tree", kind, sandbox=sandbox)
            said = "copied"
            try:
                await sandbox.download("/work/tree", target, max_bytes=64 * MIB)
            except PathRefused as error:
                said = error.message
                must(not os.path.lexists(target), "something was left")
            for folder, folders, names in os.walk(target):
                for name in folders + names:
                    place = Path(folder, name)
                    mode = place.lstat().st_mode
                    must(mode & 0o6000 == 0, f"{place} has {mode:o}")
                    must(place.is_symlink() or place.is_dir() or place.is_file(), f"{place} is special")
                    if place.is_symlink():
                        where = Path(os.path.realpath(place))
                        must(target.resolve() in (where, *where.parents), f"{place} leads to {where}")
            with contextlib.suppress(PathRefused):
                async with await sandbox.fork() as other:
                    must((await other.exec("ls /work", seconds=20)).stdout == "tree\n", "the fork is another")
        left = [place.name for place in lab.folder.iterdir() if place.name.startswith(f".{target.name}")]
        must(not left, left)
        shutil.rmtree(target, ignore_errors=True)
        return said[:200]

    return tried


for _kind in ("links", "special", "names", "deep", "sparse", "many"):
    PROBES[f"download_{_kind}"] = tree(_kind)


@probe
async def swapped_folders(lab: Lab) -> str:
    """A folder that is a link to the host's when it is read."""
    outside = lab.folder / f"outside-{secrets.token_hex(4)}"
    outside.mkdir()
    outside.chmod(0o755)
    (outside / "canary").write_text(lab.token)
    (outside / "canary").chmod(0o644)
    harmless = lab.folder / f"harmless-{secrets.token_hex(4)}"
    harmless.mkdir()
    (harmless / "file").write_text("mine")
    copies = 0
    async with lab.fresh() as sandbox:
        process = await sandbox.open(command("swap", str(outside)))
        await process.read(10)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            target = lab.folder / f"swap-{secrets.token_hex(4)}"
            with contextlib.suppress(PathRefused):
                await sandbox.download("/work/tree", target)
            found = [place.read_text() for place in target.rglob("*") if place.is_file()]
            must(all(text == "mine" for text in found), found)
            shutil.rmtree(target, ignore_errors=True)
            with contextlib.suppress(PathRefused):
                async with await sandbox.fork() as other:
                    seen = (await other.exec("cat /work/*/* /work/*/*/*", seconds=20)).stdout
                    must(lab.token not in seen, "the fork has a file of the host's")
            await asyncio.gather(sandbox.upload(harmless, "tree/a"), return_exceptions=True)
            copies += 1
    must(sorted(os.listdir(outside)) == ["canary"], os.listdir(outside))
    shutil.rmtree(outside)
    shutil.rmtree(harmless)
    return f"{copies} copies of each kind"


@probe
async def uploads_stay_inside(lab: Lab) -> str:
    """Uploads through links that the code inside laid."""
    outside = lab.folder / f"up-{secrets.token_hex(4)}"
    source = lab.folder / f"source-{secrets.token_hex(4)}"
    for place in (outside, source):
        place.mkdir()
        place.chmod(0o777)
    (source / "file").write_text("uploaded")
    async with lab.fresh() as sandbox:
        await sandbox.exec(f"ln -s {outside} out; mkfifo pipe; ln -s /etc/passwd p; ln -s / root")
        for target in ("out", "root/etc", "root/usr", "pipe", "p", "out/../../x"):
            await asyncio.gather(sandbox.upload(source, target), return_exceptions=True)
            await asyncio.gather(sandbox.write(target + "/file", "x"), return_exceptions=True)
    must(os.listdir(outside) == [], os.listdir(outside))
    for place in (outside, source):
        shutil.rmtree(place)
    return "nothing outside"


# Together -------------------------------------------------------------------------------------


@probe
async def neighbours(lab: Lab) -> str:
    """Two sandboxes of one owner see nothing of each other."""
    async with lab.fresh() as one, lab.fresh() as other:
        await one.exec("echo secret-of-one > /tmp/mine; echo secret-of-one > /dev/shm/mine; sleep 60 & echo")
        seen = await other.exec(
            "cat /tmp/mine /dev/shm/mine /work/mine; cat /proc/*/cmdline | tr '\\0' ' '; ls /tmp /dev/shm"
        )
        must("secret-of-one" not in seen.stdout and "sleep" not in seen.stdout, seen.stdout)
        spaces = [await lab.told("namespaces", sandbox=sandbox) for sandbox in (one, other)]
        same = {name for name in spaces[0] if spaces[0][name] == spaces[1].get(name)}
        must(not same & {"pid", "mnt", "net", "ipc", "uts"}, same)
        host = {name for name, inode in spaces[0].items() if inode == os.readlink(f"/proc/self/ns/{name}")}
        must(not host & {"pid", "mnt", "net", "ipc", "uts"}, host)
    return f"namespaces in common with the host: {sorted(host)}"


@probe
async def counts_apart(lab: Lab) -> str:
    """Processes of many sandboxes of one user count for each by itself."""
    spec: dict[str, Any] = {"pids": 12, "memory": 64 * MIB, "disk": MIB}
    boxes = []
    try:
        for _ in range(8):
            boxes.append(await lab.start(**spec))
        script = "for i in 1 2 3 4 5 6; do sleep 2 & done; sleep 0.7; jobs | wc -l"
        done = await asyncio.gather(*(box.exec(["/bin/bash", "-c", script], seconds=20) for box in boxes))
        must(all(result.stdout.strip() == "6" for result in done), [(r.stdout, r.stderr[:100]) for r in done])
        most = await boxes[0].exec(
            ["/bin/bash", "-c", "for i in $(seq 40); do sleep 0.5 & done; jobs -r | wc -l"], seconds=20
        )
        must(int(most.stdout.strip() or 0) <= 12, most.stdout)
    finally:
        await asyncio.gather(*(box.close() for box in boxes))
    return "8 sandboxes, 6 of 12 processes each"


@probe
async def launcher_killed(lab: Lab) -> str:
    """The machinery killed from the host is a failure, never data."""
    if lab.kind != "bubblewrap":
        return "another backend's"
    async with make_backend(lab.kind, **lab.options) as backend:  # type: ignore[attr-defined]
        sandbox = await backend.start(SPEC)
        running = asyncio.create_task(sandbox.exec("sleep 20", seconds=30))
        await asyncio.sleep(0.3)
        backend._launcher._process.kill()  # type: ignore[attr-defined]
        try:
            raise Broken(f"it gave {await running}")
        except SandboxFailed as error:
            said = error.message
        await sandbox.close()
        async with await backend.start(SPEC) as another:  # and it mends itself
            must((await another.exec("echo on")).stdout == "on\n", "no new launcher")
    return said


@probe
async def outer_process_killed(lab: Lab) -> str:
    """So is bubblewrap's outer process."""
    if lab.kind != "bubblewrap":
        return "another backend's"
    async with lab.fresh() as sandbox:
        namespace = (await lab.told("namespaces", sandbox=sandbox))["pid"]
        running = asyncio.create_task(sandbox.exec("sleep 20", seconds=30))
        await asyncio.sleep(0.3)
        inner = [place for place in Path("/proc").glob("[0-9]*") if _first(place, namespace)]
        parent = int((inner[0] / "stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        try:
            raise Broken(f"it gave {await running}")
        except SandboxFailed as error:
            said = error.message
    return said


def _first(place: Path, namespace: str) -> bool:
    """Whether a process, by its folder in /proc, is the first of a namespace."""
    try:
        if os.readlink(place / "ns" / "pid") != namespace:
            return False
        return (place / "status").read_text().split("NSpid:")[1].splitlines()[0].split()[-1] == "1"
    except OSError:
        return False


# Running by itself ----------------------------------------------------------------------------


def canaries(token: str) -> list[Path]:
    """Files that no sandbox may see, in places that exist here and can be written."""
    made = []
    for folder in map(
        Path, (Path.home(), *"/tmp /var/tmp /opt /run /srv /home /dev/shm /mnt /media".split())
    ):
        place = folder / f"canary-{token}"
        with contextlib.suppress(OSError):
            place.write_text(token)
            place.chmod(0o644)
            made.append(place)
    return made


def prepare(kind: str) -> dict[str, Any]:
    """Load what cannot be read any more as somebody else; returns the backend's options."""
    import agentgym.sandboxes.served  # noqa: F401

    if kind != "bubblewrap":
        return {}
    import email.parser  # noqa: F401
    import encodings.ascii
    import encodings.idna
    import encodings.latin_1  # noqa: F401
    import importlib.metadata  # noqa: F401

    from agentgym.sandboxes import bubblewrap, cgroups, namespaces, seccomp  # noqa: F401

    for counted in (True, False):
        seccomp.program(counted)
    return {"program": namespaces.found_program()}


def become(user: int, folder: Path) -> None:
    """Be an ordinary user from now on, in a folder of its own."""
    os.environ["HOME"] = str(folder)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: otherwise its own /proc is root's


async def serve(kind: str, options: dict[str, Any], folder: Path, token: str, paths: list[str]) -> None:
    loop = asyncio.get_running_loop()
    async with make_backend(kind, **options) as backend:
        lab = Lab(kind, backend, folder, token, paths)
        lab.options = options  # type: ignore[attr-defined]
        while name := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            started = time.monotonic()
            lab.worst = 0.0
            try:
                async with asyncio.timeout(120):
                    verdict = ["held", await PROBES[name](lab)]
                # Nothing that happens inside may hold up whoever waits for other things.
                if lab.worst > 2.0:
                    verdict = ["broken", f"the event loop stood still for {lab.worst:.2f} s"]
            except Declared as error:
                verdict = ["declared", str(error)]
            except Broken as error:
                verdict = ["broken", str(error)]
            except BaseException:
                verdict = ["broken", traceback.format_exc()[-3000:]]
            verdict += [name, f"{time.monotonic() - started:.2f}", f"{lab.worst:.3f}"]
            print(json.dumps(verdict), flush=True)
        await lab.close()


def main(kind: str, user: int, folder: Path) -> None:
    token = secrets.token_hex(8)
    made = canaries(token)
    paths = [str(place) for place in made]
    paths += [
        "/etc/shadow",
        "/root",
        "/home",
        "/opt",
        "/srv",
        "/boot",
        "/media",
        "/var/lib",
        "/var/log",
        "/run/secrets",
    ]
    paths += [
        "/root/.ssh",
        "/root/.bashrc",
        "/etc/ssh",
        "/var/run",
        sys.prefix,
        str(Path(__file__).parents[3]),
    ]
    paths += ["/proc/kcore", "/sys/kernel", str(folder), str(Path(__file__))]
    options = prepare(kind)
    child = os.fork()
    if child == 0:  # the canaries are removed by who made them
        if user:
            become(user, folder)
        asyncio.run(serve(kind, options, folder, token, paths))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    for place in made:
        place.unlink(missing_ok=True)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit("sandboxes are Linux's")
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
