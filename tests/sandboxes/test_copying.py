"""Copies of a sandbox's files: nothing outside is read or written, whatever the code inside does."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agentgym.sandboxes import PathRefused, make_backend
from agentgym.sandboxes import launcher as launching

SWAPPING = """
import ctypes, os, sys
os.makedirs("/work/a", exist_ok=True)
os.symlink(sys.argv[1], "/work/b")
exchange = ctypes.CDLL(None).renameat2
print("ready", flush=True)
while True:
    exchange(-100, b"/work/a", -100, b"/work/b", 2)
"""
NESTING = """
import os
for _ in range(900):
    os.mkdir("d")
    os.chdir("d")
"""


@pytest.mark.parametrize("kind", ["folder", "file", "pipe"])
def test_what_becomes_something_else_while_it_is_copied_is_left_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, source, target = tmp_path / "secret", tmp_path / "source", tmp_path / "target"
    for place in (secret, source):
        place.mkdir()
    (secret / "canary").write_text("leak")
    (source / "other").write_text("kept")
    if kind == "folder":
        (source / "victim").mkdir()
    else:
        (source / "victim").write_text("")
    looked = os.lstat

    def swapping(path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        found = looked(path, dir_fd=dir_fd)
        if path == "victim":
            (source / "victim").rmdir() if kind == "folder" else (source / "victim").unlink()
            if kind == "pipe":
                os.mkfifo(source / "victim")
            else:
                (source / "victim").symlink_to(secret if kind == "folder" else secret / "canary")
        return found

    monkeypatch.setattr(launching.os, "lstat", swapping)
    launching.copy(str(source), str(target))
    assert sorted(os.listdir(target)) == ["other"]


def test_holes_names_and_modes_are_copied_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    with open(source / "sparse", "wb") as sparse:
        sparse.seek(1 << 30)
        sparse.write(b"end")
        sparse.truncate(2 << 30)
    (source / "run").write_bytes(b"x" * 200_000)
    (source / "run").chmod(0o4755)
    os.link(source / "run", source / "sub" / "twin")
    (source / "link").symlink_to("/nowhere")
    os.mkfifo(source / "pipe")
    launching.copy(str(source), str(target))
    found = (target / "sparse").stat()
    assert found.st_size == 2 << 30 and found.st_blocks * 512 < 1 << 20
    with open(target / "sparse", "rb") as sparse:
        sparse.seek(1 << 30)
        assert sparse.read(4) == b"end\0"
    assert (target / "run").read_bytes() == b"x" * 200_000
    assert stat.S_IMODE((target / "run").stat().st_mode) == 0o755
    assert (target / "run").stat().st_ino == (target / "sub" / "twin").stat().st_ino
    assert os.readlink(target / "link") == "/nowhere" and not os.path.lexists(target / "pipe")


@pytest.mark.bubblewrap
def test_a_folder_swapped_for_a_link_leads_no_copy_out_of_the_sandbox(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "canary").write_text("leak")

    async def attack() -> list[str]:
        async with make_backend("bubblewrap") as backend, await backend.start() as sandbox:
            process = await sandbox.open(["python3", "-c", SWAPPING, str(tmp_path)])
            assert await process.read(20) == ("stdout", b"ready\n")
            found = []
            for _ in range(20):
                snapshot = await sandbox.snapshot()
                async with await backend.start(snapshot=snapshot) as other:
                    found.append((await other.exec("cat /work/*/canary")).stdout)
                await backend.forget(snapshot)
            return found

    assert asyncio.run(attack()) == [""] * 20


@pytest.mark.bubblewrap
def test_files_that_cannot_be_copied_are_the_doing_of_the_code_inside() -> None:
    async def attack() -> None:
        async with make_backend("bubblewrap") as backend, await backend.start() as sandbox:
            assert (await sandbox.exec(["python3", "-c", NESTING])).ok
            with pytest.raises(PathRefused, match="deep"):
                await sandbox.snapshot()
            with pytest.raises(PathRefused, match="deep"):
                await sandbox.fork()
            assert (await sandbox.exec("rm -rf /work/d && echo on")).stdout == "on\n"
            await backend.forget(await sandbox.snapshot())

    asyncio.run(attack())


@pytest.mark.bubblewrap
def test_what_is_restored_has_nothing_of_what_was_there_before() -> None:
    async def attack() -> None:
        async with make_backend("bubblewrap") as backend, await backend.start() as sandbox:
            await sandbox.write("kept", "a")
            snapshot = await sandbox.snapshot()
            await sandbox.exec(["python3", "-c", NESTING])
            await sandbox.exec("chmod 0 /work/kept; touch /tmp/left")
            await sandbox.restore(snapshot)
            assert (await sandbox.exec("ls -A /work /tmp; cat kept")).stdout == "/tmp:\n\n/work:\nkept\na"

    asyncio.run(attack())
