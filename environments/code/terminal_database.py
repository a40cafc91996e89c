"""SQLite databases of shell tasks: made, and read of what a policy left.

Invariant: a database that a policy left is copied, opened without trust in its schema, and asked a bounded
amount.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from agentgym.environments.code.terminal_chore import Tree, Wrong, expect, put

MOST_ROWS = 50_000
MOST_STEPS = 50_000
"""Times a thousand steps of SQLite's machine that one database may take."""


def make(place: Path, script: str, tables: dict[str, Iterable[Sequence[object]]]) -> None:
    """A database with rows in its tables."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(place)) as base:
        base.executescript(script)
        for name, rows in tables.items():
            for row in rows:
                base.execute(f"INSERT INTO {name} VALUES ({','.join('?' * len(row))})", tuple(row))
        base.commit()


class Database:
    """A database that a policy may have made.

    Args:
        tree: Where it lies.
        name: Its file.

    Raises:
        Wrong: It is none.
    """

    def __init__(self, tree: Tree, name: str) -> None:
        place = Path(tempfile.mkdtemp()) / "copy.db"
        put(place, tree.data(name))
        if tree.kind(f"{name}-wal") == "file":
            put(place.with_name("copy.db-wal"), tree.data(f"{name}-wal"))
        self.name, self._base, self._left = name, sqlite3.connect(place), MOST_STEPS
        self._base.set_progress_handler(self._step, 1000)
        self.rows("PRAGMA trusted_schema = OFF")
        self.rows("PRAGMA query_only = ON")
        self.rows("SELECT name FROM sqlite_master")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of one of our own queries.

        Raises:
            Wrong: It does not run, or gives too many.
        """
        try:
            found = self._base.execute(query).fetchmany(MOST_ROWS + 1)
        except (sqlite3.Error, ValueError, OverflowError) as error:
            raise Wrong(f"{self.name} cannot be read as asked: {type(error).__name__}") from error
        expect(len(found) <= MOST_ROWS, f"{self.name} holds too much")
        return found

    def table(self, name: str) -> str:
        """The statement that made a table.

        Raises:
            Wrong: There is no table of that name.
        """
        found = self.rows(f"SELECT sql FROM sqlite_master WHERE type = 'table' AND name = '{name}'")
        expect(len(found) == 1, f"{self.name} has no table {name}")
        return str(found[0][0])

    def columns(self, name: str) -> list[str]:
        """Names of a table's columns."""
        self.table(name)
        return [row[1] for row in self.rows(f"PRAGMA table_info({name})")]

    def tables(self) -> set[str]:
        """Names of tables and views, without SQLite's own."""
        found = self.rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        return {row[0] for row in found if not row[0].startswith("sqlite_")}

    def _step(self) -> int:
        self._left -= 1
        return self._left < 0
