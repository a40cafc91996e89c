"""The tool ``python``: one interpreter in a sandbox, which goes on from call to call.

Invariant: code that raised is no failed call: its traceback is what the call gave.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from agentgym.sandboxes.base import Sandbox
from agentgym.sandboxes.session import LIMIT, PythonSession, refusal
from agentgym.tools.base import Tool, ToolError, tool
from agentgym.tools.sandboxed import NOTES, as_words, told

_FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


def python_tool(
    sandbox: Sandbox | PythonSession,
    *,
    seconds: float = 30.0,
    limit: int = LIMIT,
    description: str | None = None,
) -> Tool:
    """``python(code)``: run code in an interpreter that keeps its names.

    A Markdown fence around the whole code is taken off.

    Args:
        sandbox: Where the interpreter runs, or the interpreter.
        seconds: Deadline of a call.
        limit: Characters of output shown; the middle of a longer one is left out. An interpreter that is
            given has its own.
        description: What to tell the policy, in place of the default.
    """
    session = sandbox if isinstance(sandbox, PythonSession) else PythonSession(sandbox, limit=limit)
    words = description or (
        "Run Python code in an interpreter that goes on from call to call: its names, imports and files are "
        "kept. You see what is printed, the value of the last line where it is an expression, and the "
        f"traceback of an error. A call has {seconds:g} seconds."
    )

    async def python(code: Annotated[str, Field(description="Python code; several lines are fine.")]) -> str:
        if (fenced := _FENCE.fullmatch(code)) is not None and "```" not in fenced[1]:
            code = fenced[1]
        if (problem := refusal(code)) is not None:
            raise ToolError(problem)
        with told():
            answer = await session.run(code, seconds=seconds)
        return as_words(answer, seconds) or "(no output)"

    return replace(tool(name="python", description=words)(python), limit=session.limit + NOTES)
