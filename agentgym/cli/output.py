"""Where the command line writes.

Invariant: results go to stdout, everything else (progress, messages, what libraries print) to stderr, so that
stdout can be piped: with ``--json`` it is one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType

# Wide enough that no row of a table wraps when it is piped into another program.
_PIPED_WIDTH = 160


def results() -> Console:
    """The console of results. Strings given to it are never read as markup or emoji codes."""
    return _console(stderr=False)


def messages() -> Console:
    """The console of progress and messages."""
    return _console(stderr=True)


def show(console: Console, table: RenderableType) -> None:
    """Print ``table``; into a pipe without the blanks that fill its lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def write_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def reserved_stdout() -> Iterator[None]:
    """Keep stdout free for the result: what the block and its child processes print goes to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
