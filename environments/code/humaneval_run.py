"""What runs the visible examples, inside the policy's sandbox; the policy alone reads what it says.

Invariant: the report is on the second stream, whatever the code prints is on the first.

This file is sent into sandboxes and runs there by itself: it imports nothing but the standard library, and
runs on any Python from 3.9 on.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

SHOWN = 500
"""Longest value shown, in characters."""


def main(told: dict[str, Any]) -> None:
    """Run the code, then the examples, and say of each what it gave."""
    report = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(1, 2)
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(told["prompt"], "prompt.py", "exec"), namespace)
        exec(compile(told["code"], "solution.py", "exec"), namespace)
    except BaseException:
        report.write("The code does not run:\n" + _trace())
        return
    passed = 0
    for source, want in told["examples"]:
        try:
            value = eval(source, namespace)
        except BaseException:
            report.write(f"FAILED {source}\n  expected {want}\n  raised\n{_trace()}")
            continue
        expected = eval(want, {})
        if type(value) is type(expected) and value == expected:
            passed += 1
        else:
            report.write(f"FAILED {source}\n  expected {want}\n  got {_shown(value)}\n")
    count = len(told["examples"])
    report.write(f"{passed} of {count} examples passed.\n" if count else "The code runs; no examples.\n")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except BaseException as error:
        return f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… [{len(text) - SHOWN} more characters]"


def _trace() -> str:
    kind, error, tb = sys.exc_info()
    while tb is not None and tb.tb_frame.f_code.co_filename not in ("prompt.py", "solution.py"):
        tb = tb.tb_next
    return "".join(traceback.format_exception(kind, error, tb, limit=-6))


if __name__ == "__main__":
    main(json.load(sys.stdin))
