"""Lamps in a row: a switch turns its own lamp and both neighbours. The task is darkness."""

from __future__ import annotations

from typing import Any

from agentgym import Env, Task, TaskSet, Transition
from agentgym.errors import UsageError


class Lamps(Env[str]):
    """Task ``row-N`` is lit by the switches that are the bits of ``N``; the same ones darken it.

    Args:
        lamps: Length of the row.
        render_mode: ``None`` or ``ansi``.
    """

    worker = "async"
    fork_mode = "copy"

    def __init__(self, lamps: int = 6, *, render_mode: str | None = None) -> None:
        # Of the rows with 3n + 2 lamps some are dark at once and some have no unique solution.
        if lamps < 3 or lamps > 16 or lamps % 3 == 2:
            raise UsageError(f"no row has {lamps} lamps", hint="lamps is 3 to 16 and not 5, 8, 11 or 14")
        self.lamps = lamps
        self.row: list[bool] = []

    def tasks(self, split: str) -> TaskSet:
        """A quarter of all rows each to ``valid`` and ``test``, the rest to ``train``."""
        quarters = {"valid": (0,), "test": (1,), "train": (2, 3)}[self.require_split(split)]
        ids = [f"row-{number}" for number in range(1, 2**self.lamps) if number % 4 in quarters]
        return TaskSet(split, ids, lambda task_id: self._task_of(task_id, split))

    def begin(self, task: Task) -> tuple[str, dict[str, Any]]:
        """Light the lamps."""
        self.row = [False] * self.lamps
        for action in task.private["solution"]:
            self._press(action)
        return self._seen(), {"admissible_actions": self._switches()}

    def act(self, action: str) -> Transition:
        """Press a switch."""
        valid = action in self._switches()
        if valid:
            self._press(action)
        dark = not any(self.row)
        text = self._seen() if valid else f"There is no switch {action[:40]!r}. {self._seen()}"
        info = {"valid_action": valid, "success": dark, "admissible_actions": self._switches()}
        return Transition(text, float(dark), dark, False, info)

    def expert(self, task: Task) -> list[str]:
        """The switches that lit the row."""
        return list(task.private["solution"])

    def copy_state(self) -> Env[str]:
        """The row is the whole state."""
        made = self.fresh()
        assert isinstance(made, Lamps)
        made.row = list(self.row)
        return made

    def _task_of(self, task_id: str, split: str) -> Task:
        number = int(task_id.removeprefix("row-"))
        solution = [switch for bit, switch in enumerate(self._switches()) if number >> bit & 1]
        return Task(task_id, split, "Switch all lamps off.", private={"solution": solution})

    def _switches(self) -> list[str]:
        return [f"press {lamp}" for lamp in range(self.lamps)]

    def _press(self, action: str) -> None:
        switch = int(action.removeprefix("press "))
        for lamp in range(max(switch - 1, 0), min(switch + 2, self.lamps)):
            self.row[lamp] = not self.row[lamp]

    def _seen(self) -> str:
        return "Lamps: " + " ".join("on" if lamp else "off" for lamp in self.row)
