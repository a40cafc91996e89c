"""What the tools that work in a sandbox share: how its errors reach a policy.

Invariant: a sandbox that the policy's own doing ended, and a path that it may not use, are told to it as
text; a sandbox that broke is raised, and so is a caller's mistake, such as a sandbox closed too early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agentgym.errors import ToolFailed, UsageError
from agentgym.sandboxes.base import PathRefused, SandboxEnded
from agentgym.sandboxes.session import Answer
from agentgym.tools.base import ToolError

NOTES = 1_000
"""Characters that a tool's answer may have beyond what its session keeps of the output."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn errors of a sandbox into what a tool raises.

    Raises:
        ToolError: The code inside ended the sandbox, or a path was refused.
        ToolFailed: The caller used the sandbox as it cannot be used.
        SandboxFailed: As it came.
    """
    try:
        yield
    except SandboxEnded as error:
        raise ToolError(f"the sandbox has ended and nothing more can be run in it: {error.why}") from error
    except PathRefused as error:
        raise ToolError(error.message) from error
    except UsageError as error:
        raise ToolFailed(error.message, hint=error.hint) from error


def as_words(answer: Answer, seconds: float) -> str:
    """An answer of a session as a policy reads it: the output, then what else there is to know.

    Args:
        answer: What a command gave.
        seconds: The deadline that it had.
    """
    notes = []
    if answer.timed_out:
        notes.append(f"interrupted: it did not end within {seconds:g} s")
    if answer.lost:
        notes.append(f"{answer.lost}; its state is lost, and the next call starts a new one")
    output = answer.output.removesuffix("\n")
    return "\n".join([*([output] if output else []), *(f"[{note}]" for note in notes)])
