"""The three places on disk, and no others: cache, data, runs.

Invariant: whatever lies in the cache can be rebuilt; nothing is written outside these places.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agentgym.errors import StorageFailed

# https://bford.info/cachedir/: backups leave such folders out.
TAG = "CACHEDIR.TAG"
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by AgentGym; it can be made again.\n"


def cache_dir(*parts: str) -> Path:
    """``$AGENTGYM_CACHE`` (default: the XDG cache), joined with ``parts`` and created.

    The first of ``parts`` gets a ``CACHEDIR.TAG`` when it is made: what lacks one is not ours to delete.
    """
    root = Path(os.environ.get("AGENTGYM_CACHE") or _xdg("XDG_CACHE_HOME", ".cache")).expanduser()
    path = root.joinpath(*parts)
    try:
        if parts and not (entry := root / parts[0]).exists():
            root.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another process was first
                entry.mkdir()
                (entry / TAG).write_text(_SIGNATURE, encoding="ascii")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(
            f"cannot create the cache folder {path}: {error.strerror}",
            hint="set AGENTGYM_CACHE to a folder that can be written",
        ) from error
    return path


def data_path() -> list[Path]:
    """The folders searched for data sets: ``$AGENTGYM_DATA`` (``:``-separated), then the XDG data folder."""
    listed = [Path(p).expanduser() for p in os.environ.get("AGENTGYM_DATA", "").split(os.pathsep) if p]
    return [*listed, Path(_xdg("XDG_DATA_HOME", ".local/share"))]


def find_data(*parts: str) -> Path | None:
    """The first existing file or folder ``parts`` on the data path, or ``None``."""
    return next((p for root in data_path() if (p := root.joinpath(*parts)).exists()), None)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that replaces it when the block ends without an error.

    Readers never see half a file; a crash leaves the old one. The mode is that of any new file: the
    umask's, not the private one of a temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default) / "agentgym"
