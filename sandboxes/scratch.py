"""Folders of this machine that hold for a while what goes into sandboxes or came out of them.

Invariant: such a folder is on record from before it is made until it is gone, as sandboxes are: its owner's
death at any moment leaves none behind.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from pathlib import Path

from agentgym.sandboxes import records

KIND = "files"
"""What stands in the place of a backend's name in its record."""


class Scratch:
    """A new, empty folder.

    Args:
        owner: A label for ``agentgym sandbox ps``.
        mode: Who may read it.

    Attributes:
        path: The folder.
    """

    def __init__(self, owner: str, *, mode: int = 0o700) -> None:
        id = f"{KIND}-{secrets.token_hex(6)}"
        self.path = Path(tempfile.gettempdir(), f"agentgym-{id}")
        self._record = records.Record.new(id, KIND, owner, {"folder": str(self.path)})
        records.add(self._record)
        self.path.mkdir(mode=0o700)
        self.path.chmod(mode)

    def close(self) -> None:
        """Remove it; a second call does nothing."""
        clean(self._record)
        records.remove(self._record)


def clean(record: records.Record) -> None:
    """Remove the folder that a record names."""
    shutil.rmtree(str(record.parts["folder"]), ignore_errors=True)
