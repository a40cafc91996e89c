"""Packs a folder into a stream, or fills one from it: a program that runs inside a sandbox.

Invariant: a stream that one sandbox packed is unpacked in another one and read nowhere else: no archive that
untrusted code may have shaped is ever opened on the host.

``python3 -I -S -B -c SOURCE pack FOLDER`` writes a tar archive to its output. ``... unpack FOLDER`` reads one
from its input, says ``.`` for each mebibyte that it has taken, so that its host can keep pace, and ``!`` at
the end. Any Python from 3.6 on runs it.
"""

import os
import sys
import tarfile
from typing import IO, Any

PIECE = 1 << 20


class Paced:
    """Standard input that tells how much of it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def read(self, size: int) -> bytes:
        """Read ``size`` bytes; fewer at the end alone."""
        pieces, missing = [], size
        while missing:
            piece = os.read(0, missing)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        before, self.taken = self.taken, self.taken + size - missing
        os.write(1, b"." * (self.taken // PIECE - before // PIECE))
        return b"".join(pieces)


def pack(folder: str) -> None:
    """Write what lies in a folder; sockets and devices are left out."""
    os.chdir(folder)
    opened = []
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for place, folders, files in os.walk("."):
            for name in [*folders, *files]:
                path = os.path.join(place, name)
                try:
                    entry = archive.gettarinfo(path)
                    if entry is None or (entry.isdev() and not entry.isfifo()):
                        continue
                    if (entry.isdir() or entry.isreg()) and not readable(path, entry):
                        opened.append((path, entry.mode))
                    if entry.isreg():
                        with open(path, "rb") as content:
                            # It may have grown or shrunk meanwhile; the header says what comes.
                            entry.size = os.fstat(content.fileno()).st_size
                            whole: Any = Whole(content)
                            archive.addfile(entry, whole)
                    else:
                        archive.addfile(entry)
                except FileNotFoundError:
                    continue
    for path, mode in opened:
        os.chmod(path, mode)


class Whole:
    """A file that seems to go on with zeros when it is shorter than it was."""

    def __init__(self, content: IO[bytes]) -> None:
        self.content = content

    def read(self, size: int) -> bytes:
        """Read ``size`` bytes."""
        return self.content.read(size).ljust(size, b"\0")


def readable(path: str, entry: tarfile.TarInfo) -> bool:
    """Let the owner read what nobody may; whether that was so already."""
    if os.access(path, os.R_OK | (os.X_OK if entry.isdir() else 0)):
        return True
    os.chmod(path, 0o700)
    return False


def unpack(folder: str) -> None:
    """Make what the archive holds; folders get their modes and times last."""
    os.chdir(folder)
    folders = []
    paced: Any = Paced()
    with tarfile.open(fileobj=paced, mode="r|") as archive:
        for entry in archive:
            if entry.name.startswith("/") or ".." in entry.name.split("/"):
                continue
            if entry.isdir():
                folders.append((entry.name, entry.mode, entry.mtime))
                entry.mode |= 0o700
            if entry.isreg():
                put(archive, entry)
                continue
            # The archive's owner is nobody's business: all is this user's.
            entry.uid, entry.gid, entry.uname, entry.gname = os.getuid(), os.getgid(), "", ""
            if hasattr(tarfile, "fully_trusted_filter"):
                archive.extract(entry, filter="fully_trusted")
            else:
                archive.extract(entry)
    for name, mode, changed in reversed(folders):
        os.utime(name, (changed, changed))
        os.chmod(name, mode)
    os.write(1, b"!")


def put(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
    """Make a file; its holes, which the archive has as zeros, are holes again."""
    if os.path.dirname(entry.name):
        os.makedirs(os.path.dirname(entry.name), exist_ok=True)
    content = archive.extractfile(entry)
    with open(entry.name, "wb") as sink:
        while content is not None:
            piece = content.read(65536)
            if not piece:
                break
            if piece.count(0) == len(piece):
                sink.seek(len(piece), 1)
            else:
                sink.write(piece)
        sink.truncate()
    os.utime(entry.name, (entry.mtime, entry.mtime))
    os.chmod(entry.name, entry.mode & 0o777)


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]](sys.argv[2])
