"""An append-only file of checksummed records with one writer, which survives the death of that writer.

Invariants: a record is appended by one ``write`` and never changed; it is finished once that call returned,
so the death of the process at any byte loses no finished record; whatever a failed or torn write left at the
end is cut off, and damage anywhere before the end is an error, never skipped; the lock dies with its holder.

The file starts with a preamble: ``AGENTGYM``, the schema version (u32) and the CRC-32 of these twelve bytes
(u32). A record is the mark ``ff 41 47 52``, the payload's length (u32), the payload's CRC-32 (u32), the
CRC-32 of these twelve bytes (u32), and the payload: UTF-8 text, never empty. All integers are little-endian.
The byte ``ff`` never occurs in UTF-8, so a mark is never part of a payload, and whole records can be found
behind a damaged one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentgym.errors import JournalError, StorageFailed
from agentgym.paths import atomic_write

_MAGIC, _MARK = b"AGENTGYM", b"\xffAGR"
_PREAMBLE, _HEAD, _CRC = struct.Struct("<8sI"), struct.Struct("<4sII"), struct.Struct("<I")
_PREAMBLE_SIZE, HEAD_SIZE = _PREAMBLE.size + _CRC.size, _HEAD.size + _CRC.size


class RecordWriter:
    """The one writer of a file of records. Make it with :meth:`create` or :meth:`open`.

    Args:
        path: The file.
        lock: Descriptor of the locked ``PATH.lock``; the writer owns it.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock, self._fd = lock, -1
        self._failure: StorageFailed | None = None
        _writers.add(self)

    @classmethod
    def create(cls, path: Path, schema: int, first: bytes) -> RecordWriter:
        """Start a new file with one record; it appears whole or not at all.

        Raises:
            JournalError: The file exists, or another process writes it.
            StorageFailed: It cannot be written.
        """
        writer = cls._locked(path)
        try:
            if path.exists():
                raise JournalError(
                    f"{path.parent} already holds a journal",
                    hint="resume that run, or choose another folder for a new one",
                )
            preamble = _checked(_PREAMBLE.pack(_MAGIC, schema))
            with writer.storing():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(preamble + _frame(first))
                    sync_path(temporary)
                sync_path(path.parent)
            writer._open()
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def open(cls, path: Path) -> RecordWriter:
        """Lock an existing file; read it to its end and call :meth:`cut` before the first append.

        Raises:
            JournalError: There is no such file, or another process writes it.
            StorageFailed: It cannot be written.
        """
        if not path.exists():
            raise _no_journal(path)
        writer = cls._locked(path)
        try:
            writer._open()
        except BaseException:
            writer.close()
            raise
        return writer

    def append(self, payload: bytes) -> None:
        """Append one record; it is finished when this returns.

        Raises:
            StorageFailed: The disk is full or broken. The file ends with its last whole record, and the
                writer takes no more.
        """
        self.require_writable()
        rest = memoryview(_frame(payload))
        with self.storing():
            start = os.lseek(self._fd, 0, os.SEEK_END)
            try:
                # A short write means that the disk is full; writing the rest makes the kernel say why.
                while rest := rest[os.write(self._fd, rest) :]:
                    pass
            except OSError:
                os.ftruncate(self._fd, start)
                raise

    def cut(self, size: int) -> None:
        """Cut the file back to ``size`` bytes: a torn end that :class:`RecordReader` found."""
        with self.storing():
            os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Return when every record would outlive a power cut.

        Raises:
            StorageFailed: The disk refused; the writer takes no more records.
        """
        self.require_writable()
        with self.storing():
            os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the file and its lock; a second call does nothing."""
        for descriptor in (self._fd, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._lock = -1

    @property
    def writable(self) -> bool:
        """Whether it is open and nothing has failed."""
        return self._fd >= 0 and self._failure is None

    def require_writable(self) -> None:
        """Refuse where a write failed before, or the writer is closed.

        Raises:
            StorageFailed: The earlier failure again.
            JournalError: It is closed.
        """
        if self._failure is not None:
            raise StorageFailed(self._failure.message, hint=self._failure.hint)
        if self._fd < 0:
            raise JournalError(f"{self.path} is closed", hint="open the journal again to continue it")

    @contextmanager
    def storing(self) -> Iterator[None]:
        """A block that writes: an error of the disk in it ends the writer.

        Raises:
            StorageFailed: For any ``OSError`` inside.
        """
        try:
            yield
        except OSError as error:
            self._failure = storage_failed(self.path, error)
            raise self._failure from error

    def __del__(self) -> None:
        self.close()

    @classmethod
    def _locked(cls, path: Path) -> RecordWriter:
        name = path.with_name(path.name + ".lock")
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageFailed(
                f"cannot write in {path.parent}: {error.strerror}",
                hint="choose another folder (--out), or check its permissions and the free space",
            ) from error
        try:
            # The kernel lets go of a flock when its holder dies, however it dies.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace") or "of unknown id"
            os.close(lock)
            raise JournalError(
                f"another writer has the run in {path.parent}",
                hint=f"it is process {holder}: wait for it, stop it, or choose another folder",
            ) from None
        except OSError as error:
            os.close(lock)
            raise storage_failed(path, error) from error
        return cls(path, lock)

    def _open(self) -> None:
        with self.storing():
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)


class RecordReader:
    """Reads a file of records, also one that is being written; never changes it.

    Args:
        path: The file.
        schema: The newest schema version that the caller understands.

    Attributes:
        offset: Where the next record will start, in bytes.
        torn: Bytes after the last whole record when :meth:`poll` last came to the end: a record that is
            just being written, or one that a dying writer left unfinished.
    """

    def __init__(self, path: Path, schema: int) -> None:
        self.path, self._schema = path, schema
        self.offset = self.torn = 0

    def poll(self) -> Iterator[tuple[int, bytes]]:
        """Offset and payload of the whole records from :attr:`offset` on; call again for later ones.

        Raises:
            JournalError: No such file, none of this format, a newer schema, or damage before its end.
        """
        if not self.path.exists():
            raise _no_journal(self.path)
        with self.path.open("rb") as file:
            if self.offset == 0:
                self._check(file.read(_PREAMBLE_SIZE))
                self.offset = _PREAMBLE_SIZE
            while True:
                file.seek(self.offset)
                head = file.read(HEAD_SIZE)
                payload = _payload(head, file.read(_length(head)))
                if payload is None:
                    # Read again: a living writer may have finished the record in between.
                    file.seek(self.offset)
                    tail = file.read()
                    payload = _payload_at(tail, 0)
                if payload is None:
                    self._judge(tail)
                    return
                start, self.offset = self.offset, self.offset + HEAD_SIZE + len(payload)
                yield start, payload

    def _check(self, preamble: bytes) -> None:
        if len(preamble) < _PREAMBLE_SIZE or preamble != _checked(preamble[: _PREAMBLE.size]):
            raise JournalError(
                f"{self.path} is no journal, or its first bytes are damaged",
                hint="expected a file that AgentGym wrote; restore it from a copy",
            )
        magic, schema = _PREAMBLE.unpack_from(preamble)
        if magic != _MAGIC or schema < 1:
            raise JournalError(f"{self.path} is no journal", hint="name the folder of a run")
        if schema > self._schema:
            raise JournalError(
                f"{self.path} has schema version {schema}; this release reads up to {self._schema}",
                hint="a newer release wrote it: pip install --upgrade agentgym-llm",
            )

    def _judge(self, tail: bytes) -> None:
        """Tell a torn end from damage: behind a torn end there is nothing."""
        position = tail.find(_MARK, 1)
        while position >= 0 and _payload_at(tail, position) is None:
            position = tail.find(_MARK, position + 1)
        if position >= 0 or self.offset == _PREAMBLE_SIZE:
            raise JournalError(
                f"{self.path} is damaged at byte {self.offset}: the checksum of a record does not match",
                hint="restore the file from a copy, or start the run anew",
            )
        self.torn = len(tail)


def sync_path(path: Path) -> None:
    """``fsync`` a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(head: bytes) -> bytes:
    return head + _CRC.pack(zlib.crc32(head))


def _frame(payload: bytes) -> bytes:
    return _checked(_HEAD.pack(_MARK, len(payload), zlib.crc32(payload))) + payload


def _length(head: bytes) -> int:
    """The payload's length by a record's head, 0 where the head is not whole."""
    if len(head) < HEAD_SIZE or head != _checked(head[: _HEAD.size]) or not head.startswith(_MARK):
        return 0
    return int(_HEAD.unpack_from(head)[1])


def _payload(head: bytes, payload: bytes) -> bytes | None:
    length = _length(head)
    if not length or len(payload) != length or zlib.crc32(payload) != _HEAD.unpack_from(head)[2]:
        return None
    return payload


def _payload_at(data: bytes, position: int) -> bytes | None:
    head = data[position : position + HEAD_SIZE]
    start = position + HEAD_SIZE
    return _payload(head, data[start : start + _length(head)])


def _no_journal(path: Path) -> JournalError:
    return JournalError(f"there is no journal in {path.parent}", hint="name the folder of a run")


def storage_failed(path: Path, error: OSError) -> StorageFailed:
    """What to raise where a file of a run cannot be written."""
    return StorageFailed(
        f"cannot write {path}: {error.strerror}",
        hint="free or enlarge the disk, check the folder's permissions, then resume the run; "
        "every turn recorded so far is whole",
    )


_writers: weakref.WeakSet[RecordWriter] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked worker inherits the lock: were it to outlive the writer, the run could not be resumed.
    for writer in list(_writers):
        writer.close()


os.register_at_fork(after_in_child=_release_in_child)
