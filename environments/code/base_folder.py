"""Code environments in which what lies in the sandbox in the end is the artifact.

Invariant: what is judged was copied out while the sandbox ran, at ``submit`` or at the last turn, and is
removed from this machine at the end of the environment at the latest.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from agentgym.environments.code.base import CodeEnv
from agentgym.tools import Tool, tool


class FolderEnv(CodeEnv):
    """Base class of such families: one says what is copied (:meth:`take`) and removes it (:meth:`forget`)."""

    @abstractmethod
    async def take(self) -> Any:
        """A copy on this machine of what is judged, in place of an earlier one; or why there is none."""

    @abstractmethod
    def forget(self) -> None:
        """Remove what the episode left on this machine; there may be nothing."""

    def submit_tool(self) -> Tool:
        """The tool that hands in."""

        async def submit() -> str:
            """Hand in the files as they are now. This ends the task."""
            self.hand_in(await self.take())
            return "submitted"

        return tool(submit)

    async def unsubmitted(self) -> Any:
        """What is there at the last turn."""
        return await self.take()

    def shut(self) -> Any:
        """Remove what is left, then as :meth:`CodeEnv.shut`."""
        self.forget()
        return super().shut()
