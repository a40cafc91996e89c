"""The Python interpreter that a policy speaks to, inside a sandbox: runs cells, and keeps their names.

Invariants: a cell's output is whatever reaches file descriptors 1 and 2, its subprocesses' too; after it come
a new line, the cell's mark and its status, whatever the cell did to streams, descriptors and handlers; and
the only frames in a traceback are the cell's own. It runs as the code that it serves does, and is trusted as
little.

It runs by itself, with any Python from 3.8 on, as ``python3 -u -c``. A request is the length of a cell (4
bytes, big endian), a mark of 32 letters, and that many bytes of UTF-8.
"""

# ruff: noqa: E402 - the path comes first

from __future__ import annotations

import sys

# The files of the working directory shadow nothing that is used here.
sys.path[:] = [place for place in sys.path if place]

import ast
import contextlib
import io
import linecache
import os
import signal
import traceback
import types

MARK = 32


class Interpreter:
    """Names, and the way in and out."""

    def __init__(self) -> None:
        # Away from the numbers that cells use; not passed on to what they start.
        self.requests, self.output = os.dup(0), os.dup(1)
        self.nothing = os.open(os.devnull, os.O_RDONLY)
        self.owner = os.getpid()
        self.count = -1  # the first request is empty: it asks whether this is ready
        self.module = types.ModuleType("__main__")
        sys.modules["__main__"] = self.module
        sys.path.insert(0, "")

    def serve(self) -> None:
        """Run cells until there are no more."""
        while True:
            head = self.read(4 + MARK)
            text = self.read(int.from_bytes(head[:4], "big"))
            self.restore()
            status = self.run(text.decode("utf-8", "replace"))
            if os.getpid() != self.owner:
                os._exit(0)  # a child that a cell made and left behind
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            self.write(b"\n%s %d\n" % (head[4:], status))

    def read(self, size: int) -> bytes:
        """So many bytes; the end of requests is the end of everything."""
        pieces = []
        while size:
            piece = os.read(self.requests, min(size, 1 << 20))
            if not piece:
                os._exit(0)
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def write(self, data: bytes) -> None:
        """Straight to the host."""
        while data:
            data = data[os.write(self.output, data) :]

    def restore(self) -> None:
        """Give the next cell its streams, whatever the last one did to them."""
        os.dup2(self.nothing, 0)
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            if getattr(getattr(sys, name, None), "closed", True):
                raw = open(number, mode + "b", buffering=0, closefd=False)  # noqa: SIM115
                text = io.TextIOWrapper(raw, "utf-8", "replace", write_through=True)
                setattr(sys, name, text)

    def run(self, text: str) -> int:
        """Run a cell; returns its status: 0, or 1 where it raised."""
        self.count += 1
        name = f"<cell {self.count}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tree = compile(text, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
            assert isinstance(tree, ast.Module)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            if tree.body:
                exec(compile(tree, name, "exec", dont_inherit=True), self.module.__dict__)
            if last is not None:
                shown = ast.Interactive([last])
                exec(compile(shown, name, "single", dont_inherit=True), self.module.__dict__)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return 0
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.tell(error)
            return 1

    def tell(self, error: BaseException) -> None:
        """Write a traceback of the cells' own frames."""
        ours, frames = globals(), error.__traceback__
        while frames is not None and frames.tb_frame.f_globals is ours:
            frames = frames.tb_next
        try:
            told = traceback.TracebackException(type(error), error, frames)
            text = "".join(told.format() if frames is not None else told.format_exception_only())
        except BaseException:
            text = f"{type(error).__name__}, whose message cannot be read\n"
        self.write(text.encode("utf-8", "replace"))


if __name__ == "__main__":
    Interpreter().serve()
