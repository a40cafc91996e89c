"""The contract of an environment, checked by using it: what ``agentgym check ID`` runs.

Invariant: a finding is about what was observed of the environment (calls made, values returned, threads
left behind), never about how it is written; the same id, arguments and seed are checked the same way.
Every item makes its own environments and closes them, so one failure does not hide the next.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agentgym.contract import ITEMS, Broken, NotApplicable, Subject
from agentgym.errors import UsageError
from agentgym.walk import short


@dataclass(frozen=True, slots=True)
class Finding:
    """One item of the contract.

    Attributes:
        name: The item.
        ok: Whether it holds; ``None`` where it does not apply or was not tried (``detail`` says why).
        detail: What was seen.
        hint: What to change, where it does not hold.
        seconds: Time it took.
    """

    name: str
    ok: bool | None
    detail: str = ""
    hint: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """All findings on one environment.

    Attributes:
        env: The environment's id.
        kwargs: Arguments it was made with.
        seed: Seed of the check.
        episodes: Number of tasks sampled.
        findings: In the order of the items.
        seconds: Time of the whole check.
    """

    env: str
    kwargs: Mapping[str, Any]
    seed: int
    episodes: int
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no item was found broken."""
        return all(finding.ok is not False for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {
            "env": self.env,
            "kwargs": json.loads(json.dumps(dict(self.kwargs), default=repr)),
            "seed": self.seed,
            "episodes": self.episodes,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }


def check(
    env_id: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    episodes: int = 3,
    seed: int = 0,
    seconds: float = 300.0,
) -> Report:
    """Check an environment against the contract.

    Args:
        env_id: As :func:`agentgym.make`.
        kwargs: Arguments of the environment.
        episodes: Number of tasks sampled, spread over the splits.
        seed: Of everything drawn here.
        seconds: Budget. An item that is unfinished when it is spent counts as broken, since a hang looks
            the same; its thread is left behind.

    Returns:
        The report; a broken environment is a finding, not an exception.

    Raises:
        UnknownName: No such id or argument.
        MissingDependency: The family's packages are not installed.
        UsageError: The id names no :class:`agentgym.Env`, or ``episodes`` is not positive.
    """
    if episodes < 1:
        raise UsageError(f"a check samples at least one task, not {episodes}", hint="episodes=3")
    subject = Subject(env_id, dict(kwargs or {}), episodes, seed)
    with subject.made():
        pass
    begun = time.monotonic()
    findings: list[Finding] = []
    items = list(ITEMS.items())

    def work() -> None:
        for name, item in items:
            started = time.monotonic()
            if started - begun > seconds:
                return
            findings.append(_judge(name, item, subject, started))

    # A hanging environment must not hang its check: a daemon thread can be left behind.
    thread = threading.Thread(target=work, name="agentgym-check", daemon=True)
    thread.start()
    thread.join(max(0.0, seconds - (time.monotonic() - begun)))
    done = list(findings)
    if thread.is_alive():
        done.append(
            Finding(
                items[len(done)][0],
                False,
                f"unfinished when the {seconds:g} s of the check were over",
                "the environment hangs, or is slow: give the check more seconds",
            )
        )
    late = "not tried: the time of the check was over"
    done += [Finding(name, None, late) for name, _ in items[len(done) :]]
    return Report(env_id, subject.kwargs, seed, episodes, tuple(done), time.monotonic() - begun)


def _judge(name: str, item: Callable[[Subject], str], subject: Subject, started: float) -> Finding:
    try:
        ok, detail, hint = True, item(subject), ""
    except NotApplicable as reason:
        return Finding(name, None, str(reason), "", time.monotonic() - started)
    except Broken as broken:
        ok, detail, hint = False, str(broken), broken.hint
    except (Exception, SystemExit) as error:
        ok, detail = False, f"raised {type(error).__name__}: {short(str(error))}"
        hint = getattr(error, "hint", "") or "the environment may raise only for a wrong order of calls"
    return Finding(name, ok, detail, hint, time.monotonic() - started)
