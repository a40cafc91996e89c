"""``agentgym view``: plain in a pipe, a pager at a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym.journal import Journal
from agentgym.messages import TextPart
from agentgym.outcome import Outcome
from agentgym.trajectory import Segment, Trajectory, Turn

Run = Callable[..., Any]
HOSTILE = "\x1b[2J[red]look[/red]"


@pytest.fixture
def run(tiny_model: Path) -> Path:
    """A run of four episodes: solved, not solved (40 turns, hostile text), lost, still running."""
    ends = [Outcome.completed(), Outcome.truncated("turns"), Outcome.infra_failed("sandbox", "it died")]
    with Journal.create("run", {"kind": "eval", "policy": str(tiny_model)}) as journal:
        for number, length in enumerate((2, 40, 1, 1)):
            trajectory = Trajectory(f"e{number}", "test/Rooms-v0", f"room-{number}", instruction="Find it.")
            journal.begin(trajectory)
            trajectory.segments.append(Segment())
            for index in range(length):
                trajectory.segments[0].append_context([100 + index])
                span = trajectory.segments[0].append_sampled([33, 34], [-0.1, -3.0])
                seen = (TextPart(f"{HOSTILE if number == 1 else 'A hall.'} {index}"),)
                last = number == 0 and index == length - 1
                said = f"go {index}"
                turn = Turn(index, 0, span, seen, said, said, float(last), success=last)
                trajectory.turns.append(turn)
                journal.turn(trajectory)
            if number < len(ends):
                trajectory.outcome = ends[number]
                journal.end(trajectory)
    return Path("run")


def test_in_a_pipe_it_is_a_list(piped: Run, run: Path) -> None:
    result = piped("view", run)
    assert [line.split()[:3] for line in result.out.splitlines()[1:]] == [
        ["e0", "room-0", "completed"],
        ["e1", "room-1", "truncated(turns)"],
        ["e2", "room-2", "infra_failed(sandbox)"],
        ["e3", "room-3", "running"],
    ]
    assert "\x1b" not in result.out


def test_in_a_pipe_an_episode_is_text(agentgym: Run, run: Path) -> None:
    shown = agentgym("view", run, "e1").out
    assert "turn 40" in shown and "␛[2J[red]look[/red] 39" in shown and "\x1b" not in shown
    assert "room-0" not in shown
    every = agentgym("view", run, "--all").out
    assert all(f"room-{i}" in every for i in range(4)) and "it died" in every


def test_tokens_are_read_with_the_runs_own_tokenizer(agentgym: Run, run: Path) -> None:
    shown = agentgym("view", run, "e0", "--tokens").out
    assert "segment 0: 6 tokens, 4 sampled" in shown and "100" not in shown
    unknown = agentgym("view", run, "e0", "--tokens", "--model", "no-such-model").out
    assert "100 33 34 101 33 34" in unknown and "--model" in unknown


@pytest.mark.parametrize(
    ("kind", "ids"), [("solved", ["e0"]), ("unsolved", ["e1"]), ("lost", ["e2"]), ("running", ["e3"])]
)
def test_a_filter(agentgym: Run, run: Path, kind: str, ids: list[str]) -> None:
    assert [line.split()[0] for line in agentgym("view", run, "--only", kind).out.splitlines()[1:]] == ids


def test_mistakes(agentgym: Run, run: Path) -> None:
    assert "known: e0, e1, e2, e3" in agentgym("view", run, "e9").err
    assert agentgym("view", "nowhere").code == 1
    Journal.create("empty", {}).close()
    assert "no episodes yet" in agentgym("view", "empty").out
    assert "no such episodes" in agentgym("view", "empty", "--only", "solved").out


def test_the_pager_lists_opens_pages_searches_and_leaves_the_terminal_as_it_was(
    terminal: Run, run: Path
) -> None:
    pager = terminal("view", run)
    assert "room-3" in pager.wait_for("1 of 4  enter open")
    pager.type("j")
    pager.wait_for("2 of 4")
    pager.type("\r")
    first = pager.wait_for("2 of 4  n next")
    assert "turn 1" in first and "turn 40" not in first and "␛[2J[red]look[/red] 0" in first
    pager.type("G")
    assert "not solved" in pager.wait_for("2 of 4  n next")
    pager.type("g")
    pager.wait_for("turn 1 ")
    pager.type("/LOOK[/RED] 2")
    pager.wait_for("/LOOK[/RED] 2")
    pager.type("7\x7f8\r")
    assert "look[/red] 28" in pager.wait_for("line ")
    pager.type("/nothing of the kind\r")
    pager.wait_for("is not here")
    pager.type("p")
    assert "room-0" in pager.wait_for("1 of 4")
    pager.type("t")
    assert "6 tokens, 4 sampled" in pager.wait_for("t text")
    pager.type("n")
    pager.wait_for("2 of 4")
    pager.type("l")
    pager.wait_for("room-3")
    pager.type("/ROOM-2\r")
    pager.wait_for("3 of 4")
    pager.type("\x1b[B")
    pager.wait_for("4 of 4")
    pager.type("q")
    assert pager.wait() == 0
    # The alternate screen was left and the cursor shown again.
    assert "\x1b[?1049l" in pager.left and "\x1b[?25h" in pager.left


def test_the_pager_starts_with_the_episode_that_was_named(terminal: Run, run: Path) -> None:
    pager = terminal("view", run, "e2")
    assert "it died" in pager.wait_for("3 of 4  n next")
    pager.type("\x03")
    assert pager.wait() == 0


def test_a_small_window_that_changes_its_size_is_drawn_again(terminal: Run, run: Path) -> None:
    pager = terminal("view", run)
    pager.wait_for("1 of 4")
    pager.resize(3, 40)
    pager.wait_for("1 of 4")
    pager.type("q")
    assert pager.wait() == 0
