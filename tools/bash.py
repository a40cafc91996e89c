"""The tool ``bash``: one shell in a sandbox, which goes on from call to call.

Invariant: a call that ran is no failed call, whatever its exit status: the status is told after the output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from agentgym.sandboxes.base import Sandbox
from agentgym.sandboxes.session import LIMIT, ShellSession, refusal
from agentgym.tools.base import Tool, ToolError, tool
from agentgym.tools.sandboxed import NOTES, as_words, told


def bash_tool(
    sandbox: Sandbox | ShellSession,
    *,
    seconds: float = 60.0,
    limit: int = LIMIT,
    description: str | None = None,
) -> Tool:
    """``bash(command)``: run a command in a shell that keeps its directory, variables and functions.

    Args:
        sandbox: Where the shell runs, or the shell.
        seconds: Deadline of a command.
        limit: Characters of output shown; the middle of a longer one is left out. A shell that is given has
            its own.
        description: What to tell the policy, in place of the default.
    """
    shell = sandbox if isinstance(sandbox, ShellSession) else ShellSession(sandbox, limit=limit)
    words = description or (
        "Run a command in a bash that goes on from call to call: its working directory, variables, functions "
        f"and background processes are kept. Standard input is empty. A command has {seconds:g} seconds; "
        "start what takes longer in the background, with its output in a file."
    )

    async def bash(command: Annotated[str, Field(description="What to run; several lines are fine.")]) -> str:
        if (problem := refusal(command)) is not None:
            raise ToolError(problem)
        with told():
            answer = await shell.run(command, seconds=seconds)
        text = as_words(answer, seconds)
        if answer.status:
            text = "\n".join([*([text] if text else []), f"[exit status {answer.status}]"])
        return text or "(no output)"

    return replace(tool(name="bash", description=words)(bash), limit=shell.limit + NOTES)
