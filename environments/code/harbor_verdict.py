"""What a task folder's tests came to, read from what they left.

Invariants: nothing else runs where the tests ran when their reward is read; a reward is a number from 0 to 1
that all that was written agrees on, else it is 0 and the reason is told. All that is read here may be a
policy's: it is bounded, and nothing of it is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from agentgym.sandboxes import ExecResult
from agentgym.sandboxes.base import MIB

MOST_SAID = 4 * MIB
"""Most bytes that tests may print where their output is what decides."""

_RESULT = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_SUMMARY = "short test summary info"

ALONE = 77
"""The return code of :func:`command` where something else still ran."""

_RUN = f"""bash "$1"
if [ "$2" = alone ] && [ "$PPID" = 1 ] && kill -KILL -1 2> /dev/null; then exit {ALONE}; fi
exit 0"""
"""Runs the tests, and ends whatever else runs then: at once, for each moment is one to change a reward in.

``kill`` to all reaches all of a sandbox that has process ids of its own, where its worker is the first one;
it spares whoever calls it, and fails where there was nobody.
"""


def command(script: str, *, alone: bool) -> tuple[str, ...]:
    """What runs the tests.

    Args:
        script: Their path, for bash.
        alone: Whether whatever else runs in the sandbox is killed at their end.
    """
    return ("bash", "-c", _RUN, "judge", script, "alone" if alone else "shared")


def broken(ran: ExecResult) -> str:
    """Why a run of :func:`command` tells nothing; empty where it does."""
    if ran.ended or ran.timed_out:
        return f"its tests did not end: {ran.ended or f'{ran.seconds:.0f} s were over'}"
    return "" if ran.return_code in (0, ALONE) else "what runs its tests was ended by what they run"


def summed(ran: ExecResult) -> tuple[float, str, int]:
    """The reward by what tests printed, why it is 0, and how many tests there were."""
    if ran.cut_stdout:
        return 0.0, f"its tests printed more than {MOST_SAID // MIB} MiB", 0
    passed, count = read_summary(ran.stdout)
    if not count:
        several = ran.stdout.count(_SUMMARY) > 1
        return 0.0, f"its tests printed {'several summaries' if several else 'no summary'}", 0
    return float(passed == count), "" if passed == count else "a test failed", count


def read_reward(data: bytes, name: str) -> float | None:
    """The reward in a file that tests wrote; ``None`` where there is none.

    Args:
        data: Its content.
        name: ``reward.txt``: a number. ``reward.json``: an object with numbers; the one called ``reward``
            counts, or the only one.
    """
    try:
        text = data.decode()
        if name == "reward.txt":
            value: Any = float(text)
        else:
            given = json.loads(text)
            numbers = {
                k: v for k, v in given.items() if isinstance(v, int | float) and not isinstance(v, bool)
            }
            only = next(iter(numbers.values())) if len(numbers) == 1 else None
            value = numbers.get("reward", only)
        return float(value) if value is not None and math.isfinite(value) else None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def agreed(given: Mapping[str, float | None]) -> tuple[float, str]:
    """The reward, and why it is 0 where that is nobody's.

    Args:
        given: What :func:`read_reward` found in each of the files that are there, by name.
    """
    if not given:
        return 0.0, "its tests wrote no reward"
    name, reward = next(iter(given.items()))
    if len(set(given.values())) > 1:
        return 0.0, f"{' and '.join(given)} do not agree"
    if reward is None:
        return 0.0, f"{name} holds no reward"
    if not 0 <= reward <= 1:
        return 0.0, f"{name} holds {reward:g}, and a reward is 0 to 1"
    return reward, ""


def read_summary(output: str) -> tuple[int, int]:
    """How many tests passed, and how many there were, by the summary of pytest's option ``-rA``.

    Where there are several, one of them is somebody else's than pytest's: they tell of no test.
    """
    parts = output.split(_SUMMARY)
    results = [read[1] for line in parts[-1].splitlines() if (read := _RESULT.match(line))]
    return (results.count("PASSED"), len(results)) if len(parts) == 2 else (0, 0)
