"""Whether two answers are the same by algebra, asked in a sandbox of its own.

Invariant: an answer is read and compared inside, by a grammar that executes nothing
(:mod:`agentgym.environments.code.symbolic_judge`), within a deadline and the sandbox's limits; what runs into
them is not the same. That the judge does not start is :class:`~agentgym.errors.JudgeFailed`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from agentgym.environments.code.boxed import LONGEST, plain
from agentgym.environments.code.relay import PYTHON, START_SECONDS, Silent, Speaker, TooLong
from agentgym.environments.code.sympy_pack import FILE, give_sympy
from agentgym.errors import JudgeFailed
from agentgym.sandboxes import Sandbox, SandboxEnded, SandboxSpec

SPEC = SandboxSpec(env={"PYTHONPATH": FILE, "PYTHONHASHSEED": "0"}, pids=32)
"""What the judge's sandbox is made of."""

_INSIDE = "symbolic_judge.py"
_SOURCE = Path(__file__).with_name(_INSIDE).read_bytes()

Verdict = Literal[
    "same", "different", "unfinished", "unreadable answer", "unreadable reference", "time", "ended"
]


async def compare(sandbox: Sandbox, answer: str, reference: str, *, seconds: float) -> Verdict:
    """Compare two answers.

    Args:
        sandbox: A fresh one, of :data:`SPEC`.
        answer: The policy's.
        reference: The right one.
        seconds: Deadline of reading and comparing, the judge's start apart.

    Raises:
        JudgeFailed: The judge does not start.
        SandboxFailed: The machinery around the sandbox broke.
        MissingDependency: SymPy is not installed.
    """
    if len(answer) > LONGEST:
        return "unreadable answer"
    try:
        await give_sympy(sandbox)
        await sandbox.write(_INSIDE, _SOURCE)
        judge = Speaker(await sandbox.open([PYTHON, "-B", _INSIDE]))
        if (said := await judge.line(START_SECONDS)) != b"ready":
            raise JudgeFailed(f"the judge of answers does not start: {said[:200]!r}")
    except (TimeoutError, SandboxEnded, Silent, TooLong) as error:
        raise JudgeFailed(f"the judge of answers does not start: {error}") from error
    try:
        asked = {"answer": plain(answer), "reference": plain(reference)}
        await judge.process.write(json.dumps(asked).encode() + b"\n")
        said = await judge.line(seconds)
    except TimeoutError:
        return "time"
    except (SandboxEnded, Silent, TooLong):
        return "ended"
    finally:
        await judge.process.close()
    return _VERDICTS.get(said, "ended")


_VERDICTS: dict[bytes, Verdict] = {
    b"same": "same",
    b"different": "different",
    b"unfinished": "unfinished",
    b"unreadable answer": "unreadable answer",
    b"unreadable reference": "unreadable reference",
}
