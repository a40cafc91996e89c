"""SymPy for a sandbox that has none: one file, which any sandbox can be given.

Invariant: the file holds the host's own SymPy and mpmath, compiled by the Python that will import them, in a
sandbox that nobody else's code has entered. It is kept in the cache, and made again if that is lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from weakref import WeakKeyDictionary

from agentgym import paths
from agentgym.environments.code.relay import PYTHON
from agentgym.errors import MissingDependency, SandboxFailed
from agentgym.sandboxes import Sandbox

FILE = "sympy.zip"
"""Its name in a sandbox's working directory, and the value of ``PYTHONPATH`` that finds it."""

PACKAGES = ("sympy", "mpmath")
LARGEST = 64 << 20
SECONDS = 300.0
"""Deadline of compiling, which takes seconds."""

_LEFT_OUT = {"tests", "benchmarks", "__pycache__", "_antlr", "autolev"}
_COMPILE = """
import importlib._bootstrap_external as loader, sys, zipfile
with zipfile.ZipFile("sources.zip") as read, zipfile.ZipFile("made.zip", "w", zipfile.ZIP_DEFLATED) as made:
    for name in read.namelist():
        source = read.read(name)
        code = compile(source, name, "exec", dont_inherit=True, optimize=2)
        entry = zipfile.ZipInfo(name + "c", (1980, 1, 1, 0, 0, 0))
        made.writestr(entry, loader._code_to_timestamp_pyc(code, 0, len(source)), zipfile.ZIP_DEFLATED)
"""
_MAGIC = "import importlib.util as u, sys; print(u.MAGIC_NUMBER.hex(), *sys.version_info[:2])"

_known: dict[tuple[str, ...], bytes] = {}
_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def required() -> None:
    """Say early that SymPy is missing.

    Raises:
        MissingDependency: It is not installed.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependency(package, "code")


async def give_sympy(sandbox: Sandbox) -> None:
    """Write the file into a fresh sandbox.

    Raises:
        MissingDependency: SymPy is not installed.
        SandboxFailed: It cannot be compiled there.
        SandboxEnded: The sandbox ended.
    """
    key = (sandbox.backend, sandbox.spec.image or "", str(sandbox.spec.rootfs or ""))
    if key not in _known:
        async with _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if key not in _known:
                _known[key] = await _packed(sandbox)
    await sandbox.write(FILE, _known[key])


async def _packed(sandbox: Sandbox) -> bytes:
    required()
    asked = await sandbox.exec([PYTHON, "-I", "-c", _MAGIC])
    name = [*(f"{package}-{version(package)}" for package in PACKAGES), *asked.stdout.split()]
    if not asked.ok or not all(part.isalnum() for part in asked.stdout.split()):
        raise SandboxFailed(f"the Python of a sandbox does not answer: {asked.stderr.strip()[-300:]}")
    # The recipe is part of the name: another one is another file.
    kept = paths.cache_dir("sympy") / f"{'-'.join([*name, _recipe()])}.zip"
    if not kept.is_file():
        made = await _compiled(sandbox)
        with paths.atomic_write(kept) as target:
            target.write_bytes(made)
    return kept.read_bytes()


async def _compiled(sandbox: Sandbox) -> bytes:
    await sandbox.write("sources.zip", await asyncio.to_thread(_sources))
    done = await sandbox.exec([PYTHON, "-I", "-B", "-c", _COMPILE], seconds=SECONDS)
    if not done.ok:
        raise SandboxFailed(f"SymPy cannot be compiled in a sandbox: {done.stderr.strip()[-300:] or done}")
    made = await sandbox.read("made.zip", limit=LARGEST)
    await sandbox.exec(["/bin/rm", "-f", "sources.zip", "made.zip"])
    return made


def _recipe() -> str:
    return hashlib.sha256(f"{_COMPILE}{sorted(_LEFT_OUT)}".encode()).hexdigest()[:12]


def _sources() -> bytes:
    """The packages' Python files, without their tests."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as made:
        for package in PACKAGES:
            spec = find_spec(package)
            assert spec is not None and spec.origin is not None
            root = Path(spec.origin).parent
            for path in sorted(root.rglob("*.py")):
                inside = path.relative_to(root.parent)
                if not _LEFT_OUT & set(inside.parts):
                    made.writestr(inside.as_posix(), path.read_bytes())
    return held.getvalue()
