"""The command line: the composition root, which may import any room and which nothing imports."""

from __future__ import annotations

from agentgym.cli.root import main

__all__ = ["main"]
