"""What this machine has: one finding a part, each with the command that would mend it.

Invariant: a probe installs nothing, takes at most a few seconds, and never fails: what it cannot find out is
a finding too. No heavy package is imported to learn whether it is there.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agentgym import paths
from agentgym.errors import AgentGymError, StorageFailed

DISTRIBUTION = "agentgym-llm"
SECONDS = 5.0
GIB = 2**30

State = Literal["ok", "limited", "missing"]

# What each extra is good for, in the order of the table.
EXTRAS = {
    "text": "text games and worlds: TextWorld, ALFWorld, ScienceWorld, TextWorldExpress, BabyAI",
    "search": "question answering over a corpus",
    "apis": "function calling: BFCL, tau2",
    "bridges": "environments of Gymnasium, GEM, TextArena, reasoning-gym, OpenEnv",
    "serve": "serving environments over OpenEnv's protocol",
    "train": "language models: evaluation and training",
    "web": "browser environments",
    "docker": "sandboxes in containers",
    "mcp": "tools over the Model Context Protocol",
    "bench": "benchmarks",
    "vllm": "vLLM as the rollout backend",
    "ray": "rollouts on many machines",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the machine.

    Attributes:
        name: What was looked at.
        state: ``ok``; ``limited``: works, but less than it could; ``missing``: what needs it cannot run.
        detail: What was found.
        fix: The one command (or step) that mends it; empty for ``ok``.
    """

    name: str
    state: State
    detail: str
    fix: str = ""


def examine(*, network: bool = True) -> list[Finding]:
    """Look at everything.

    Args:
        network: Ask whether the model hub can be reached.
    """
    probes: list[Callable[[], Iterator[Finding]]] = [
        python, extras, torch_build, gpu, cores, memory, disk, java, bubblewrap, chromium, xvfb, docker, text,
    ]  # fmt: skip
    if network:
        probes.append(hub)
    findings: list[Finding] = []
    for probe in probes:
        try:
            findings += probe()
        except Exception as error:
            detail = f"could not be examined: {type(error).__name__}: {error}"
            findings.append(Finding(probe.__name__, "limited", detail))
    return findings


def python() -> Iterator[Finding]:
    """The interpreter and its platform."""
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}"
    fix = "" if supported else "make a virtual environment with Python 3.11, 3.12 or 3.13"
    yield Finding("Python", "ok" if supported else "limited", detail, fix)


def extras() -> Iterator[Finding]:
    """Which extras of the distribution are installed."""
    wanted: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if match:
            wanted.setdefault(match[2], []).append(match[1])
    for extra, purpose in EXTRAS.items():
        missing = [name for name in wanted.get(extra, []) if _version(name) is None]
        if missing:
            detail = f"{purpose}; not installed: {', '.join(missing)}"
            yield Finding(f"extra {extra}", "missing", detail, f'pip install "{DISTRIBUTION}[{extra}]"')
        else:
            have = ", ".join(f"{name} {_version(name)}" for name in wanted.get(extra, []))
            yield Finding(f"extra {extra}", "ok", f"{purpose}; {have}")


def torch_build() -> Iterator[Finding]:
    """Whether torch is a CPU or a CUDA build, and whether that fits the machine."""
    version = _version("torch")
    if version is None:
        yield Finding("torch", "missing", "not installed", f'pip install "{DISTRIBUTION}[train]"')
        return
    # PyPI's Linux wheels are CUDA builds; CPU builds say so in their local version.
    on_cpu = "+cpu" in version
    if on_cpu and shutil.which("nvidia-smi"):
        fix = f"pip install --force-reinstall --no-deps torch=={version.split('+')[0]}"
        yield Finding("torch", "limited", f"{version}: a CPU build beside an NVIDIA GPU", fix)
    else:
        yield Finding("torch", "ok", f"{version} ({'CPU' if on_cpu else 'CUDA'} build)")


def gpu() -> Iterator[Finding]:
    """NVIDIA GPUs, and bf16 on what will do the arithmetic."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    code, output = _run(query)
    if code == 0 and output:
        for line in output.splitlines():
            name, memory, capability = (part.strip() for part in line.split(","))
            bf16 = "bf16" if float(capability) >= 8 else "no bf16: set dtype float16 or float32"
            yield Finding("GPU", "ok", f"{name}, {float(memory) / 1024:.0f} GiB, {bf16}")
        return
    detail = "no NVIDIA GPU" if code is None else f"nvidia-smi failed: {output.splitlines()[:1] or code}"
    fix = "use small models (smollm2), or a machine with an NVIDIA GPU"
    yield Finding("GPU", "limited", f"{detail}; models run on the CPU", fix)
    flags = _cpu_flags()
    fast = sorted({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"} & flags)
    if fast:
        yield Finding("bf16", "ok", f"in the CPU's hardware ({', '.join(fast)})")
    else:
        fix = "model.rollout_dtype=float32 (in a config or on the command line)"
        yield Finding("bf16", "limited", "emulated by this CPU: slower than float32", fix)


def cores() -> Iterator[Finding]:
    """CPU cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{usable} of {os.cpu_count()}"
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        detail += f", limited to {quota:g} by the control group"
        yield Finding("cores", "limited", detail, f"export OMP_NUM_THREADS={max(1, int(quota))}")
    else:
        yield Finding("cores", "ok", detail)


def memory() -> Iterator[Finding]:
    """Memory, as the kernel and the control group give it."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    limit, used = _memory_limit()
    if limit is not None and limit < total:
        free = min(free, limit - used)
        detail += f"; the control group allows {limit / GIB:.1f} GiB and has {(limit - used) / GIB:.1f} left"
    if free < 10 * GIB:
        fix = "train with fewer tokens a micro-batch, or with a smaller model"
        yield Finding("memory", "limited", f"{detail}; `make demo` wants 10 GiB", fix)
    else:
        yield Finding("memory", "ok", detail)


def disk() -> Iterator[Finding]:
    """Room in the three places, and whether they can be written."""
    places = [("data", paths.data_path()[0], "AGENTGYM_DATA"), ("runs", Path("runs").absolute(), "--out")]
    try:
        places.insert(0, ("cache", paths.cache_dir(), "AGENTGYM_CACHE"))
    except StorageFailed as error:
        yield Finding("disk: cache", "missing", error.message, error.hint)
    for name, place, setting in places:
        fix = f"point {setting} at a folder with room that can be written"
        existing = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            yield Finding(f"disk: {name}", "missing", f"{place} cannot be written", fix)
        else:
            detail = f"{place}, {free / GIB:.1f} GiB free"
            yield (
                Finding(f"disk: {name}", "ok", detail)
                if free >= 5 * GIB
                else Finding(f"disk: {name}", "limited", detail, fix)
            )


def java() -> Iterator[Finding]:
    """A Java runtime, for environments that run on one."""
    yield _program("Java", ["java", "-version"], "default-jre-headless", "environments that run on the JVM")


def bubblewrap() -> Iterator[Finding]:
    """Bubblewrap, and whether the kernel lets it make a sandbox: one is made."""
    from agentgym.sandboxes import make_backend

    async def tried() -> Finding:
        async with make_backend("bubblewrap") as backend:
            done = await backend.run(["/bin/true"], seconds=4 * SECONDS)
            limits = ", ".join(sorted(backend.enforces))
        if done.ok:
            return Finding("bubblewrap", "ok", f"makes sandboxes; held: {limits}")
        return Finding("bubblewrap", "missing", f"a sandbox does not work: {done.stderr.strip()[:200]}")

    try:
        yield asyncio.run(tried())
    except AgentGymError as error:
        yield Finding(
            "bubblewrap", "missing", f"no sandboxes without containers: {error.message}", error.hint
        )


def chromium() -> Iterator[Finding]:
    """A Chromium for browser environments."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            yield _program("Chromium", [name, "--version"], "chromium", "browser environments")
            return
    root = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    if found := sorted(root.glob("chromium-*")):
        yield Finding("Chromium", "ok", str(found[-1]))
    else:
        yield Finding("Chromium", "missing", "not found; for browser environments", _apt("chromium"))


def xvfb() -> Iterator[Finding]:
    """A virtual display for desktop environments."""
    if path := shutil.which("Xvfb"):
        yield Finding("Xvfb", "ok", path)
    else:
        yield Finding("Xvfb", "missing", "not found; for desktop environments", _apt("xvfb"))


def docker() -> Iterator[Finding]:
    """A container daemon that answers."""
    finding = _program("Docker", ["docker", "--version"], "docker.io", "sandboxes in containers")
    if finding.state == "ok":
        code, output = _run(["docker", "info", "--format", "{{.ServerVersion}}"])
        if code == 0:
            finding = Finding("Docker", "ok", f"daemon {output}")
        elif "permission denied" in output:
            fix = "sudo usermod -aG docker $USER, then log in again"
            finding = Finding("Docker", "missing", "this user may not talk to the daemon", fix)
        else:
            finding = Finding(
                "Docker", "missing", "the daemon does not answer", f"{_sudo()}service docker start"
            )
    yield finding


def hub() -> Iterator[Finding]:
    """Whether models can be downloaded."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    fix = "give models as local folders; smollm2 comes from the Python package index"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding("model hub", "limited", "switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")
        return
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=SECONDS):
            yield Finding("model hub", "ok", address)
    except urllib.error.HTTPError as error:  # it answered
        yield Finding("model hub", "limited", f"{address} answers {error.code}", fix)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("model hub", "limited", f"{address} cannot be reached ({reason})", fix)


def text() -> Iterator[Finding]:
    """Whether any character can be printed."""
    encoding = getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") == "utf8":
        yield Finding("locale", "ok", encoding)
    else:
        yield Finding("locale", "limited", f"{encoding}: some characters print as ?", "export LC_ALL=C.UTF-8")


def _program(name: str, command: list[str], package: str, purpose: str) -> Finding:
    code, output = _run(command)
    if code is None:
        return Finding(name, "missing", f"not found; for {purpose}", _apt(package))
    first = (output.splitlines() or [""])[0]
    if code != 0:
        return Finding(name, "missing", f"{command[0]} fails: {first}", _apt(package))
    return Finding(name, "ok", first)


def _run(command: list[str]) -> tuple[int | None, str]:
    """Exit code (``None``: it is not there) and what it said: on stdout, or else on stderr."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        return None, ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def _apt(package: str) -> str:
    if shutil.which("apt-get"):
        return f"{_sudo()}apt-get install -y {package}"
    return f"install {package} with this system's package manager"


def _sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    listed = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return set(" ".join(listed).split())


def _memory_limit() -> tuple[int | None, int]:
    """The tightest memory limit of this process's control groups and what is used of it, in bytes."""
    tightest: tuple[int | None, int] = None, 0
    for group in _control_groups("memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(group / limit_file)
            if limit.isdigit() and (tightest[0] is None or int(limit) < tightest[0]):
                tightest = int(limit), int(_read(group / used_file) or 0)
    return tightest


def _cpu_quota() -> float | None:
    """The tightest quota of this process's control groups, in cores."""
    quotas = []
    for group in _control_groups("cpu"):
        v2 = _read(group / "cpu.max").split()
        v1 = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
        for quota, period in (pair for pair in (v2, v1) if len(pair) == 2):
            if quota.isdigit() and period.isdigit():
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of its parents, for both versions of control groups."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        group = root / own.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent == root or root in parent.parents)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
