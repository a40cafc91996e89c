"""``agentgym eval``: one JSON document, resumption, comparison, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agentgym import journal, registry
from agentgym.journal import Journal

Run = Callable[..., Any]
ECHO = "agentgym.testing:EchoEnv"
KEYS = {"env", "policy", "split", "seed", "episodes", "success", "reward", "turns", "infra_failed", "seconds"}


def test_stdout_is_one_json_document_and_nothing_else(piped: Run) -> None:
    result = piped(
        "eval", ECHO, "--policy", "expert", "--split", "valid", "--episodes", 6, "--seed", 4, "--json"
    )
    report = result.json
    assert result.code == 0 and result.out.startswith("{")
    assert report.keys() >= KEYS
    assert [report[k] for k in ("env", "policy", "split", "seed", "episodes")] == [
        ECHO,
        "expert",
        "valid",
        4,
        6,
    ]
    assert (
        report["success"]["mean"] == 1
        and report["reward"] == {"mean": 1.0}
        and report["turns"] == {"mean": 1}
    )
    low, high = report["success"]["ci95"]
    assert 0.5 < low < high == 1
    assert report["infra_failed"] == 0 and report["seconds"] > 0
    assert json.loads(Path(report["run"], "report.json").read_text()) == report
    assert "6 of 6 episodes" in result.err


def test_a_family_says_how_many_episodes_where_none_are_asked_for(
    agentgym: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (registry._families, gymnasium.envs.registration.registry):
        monkeypatch.setitem(known, "agentgym/EvalSize-v0", None)
        known.pop("agentgym/EvalSize-v0")  # the fixture takes away what is registered now
    registry.register("agentgym/EvalSize-v0", ECHO, episodes=7)
    whole = agentgym("eval", "agentgym/EvalSize-v0", "--policy", "expert", "--json")
    asked = agentgym("eval", "agentgym/EvalSize-v0", "--policy", "expert", "--episodes", 3, "--json")
    assert (whole.json["episodes"], asked.json["episodes"]) == (7, 3)


def test_what_libraries_print_goes_to_stderr(
    agentgym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chatty.py").write_text(
        "import os, subprocess\n"
        "from agentgym.policies.simple import RandomPolicy\n"
        "class Chatty(RandomPolicy):\n"
        "    name = 'chatty'\n"
        "    def __init__(self, context):\n"
        "        super().__init__()\n"
        "        print('loading')\n"
        "        os.write(1, b'raw ')\n"
        "        subprocess.run(['echo', 'child'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = agentgym("eval", ECHO, "--policy", "chatty:Chatty", "--episodes", 2, "--json")
    assert result.json["policy"] == "chatty:Chatty"
    assert all(noise in result.err for noise in ("loading", "raw", "child"))


def test_the_table_and_the_markdown_say_the_same(agentgym: Run) -> None:
    arguments = ("eval", ECHO, "--policy", "expert", "--episodes", 8, "--samples", 4)
    table = agentgym(*arguments, "--out", "a").out
    markdown = agentgym(*arguments, "--out", "b", "--markdown").out
    for text in (table, markdown):
        assert "8 on 2 tasks, 4 samples each" in text
        assert "100.0 % (95 % interval 34.2 to 100.0 %)" in text
        assert "pass@4" in text
    assert "agentgym view a" in table
    assert markdown.startswith("| figure | value |\n|---|---|\n")
    assert agentgym(*arguments, "--json", "--markdown").code == 2


def test_wrappers_and_arguments_reach_the_environment(agentgym: Run) -> None:
    report = agentgym(
        "eval", ECHO, "--policy", "random", "--env", "turns=9", "--max-turns", 3, "--parser", "tags",
        "--history", 2, "--list-actions", "--episodes", 2, "--json",
    ).json  # fmt: skip
    assert report["outcomes"] == {"truncated(turns)": 2}
    assert report["invalid_actions"] == 0
    [first, *_] = journal.load(Path(report["run"])).values()
    assert first.turns[0].completion.startswith("<") and "apple" in first.turns[2].observation[0].text  # type: ignore[union-attr]


def test_the_parser_has_options(agentgym: Run) -> None:
    words = (ECHO, "--policy", "expert", "--parser", "hermes", "--episodes", 3, "--json")
    assert agentgym("eval", *words).code != 0  # a word is no call
    report = agentgym("eval", *words, "--parser-option", "messages=true").json
    assert report["success"]["mean"] == 1
    header = journal.header(Path(report["run"]))
    assert header["env"]["parser_options"] == {"messages": True}
    assert "did you mean 'messages'" in agentgym("eval", *words, "--parser-option", "mesages=true").err


def test_a_policy_that_is_never_understood_does_not_play_for_ever(agentgym: Run) -> None:
    deaf = ("--parser", "hermes", "--policy-option", "parser=plain")
    report = agentgym("eval", ECHO, "--policy", "random", *deaf, "--episodes", 1, "--json").json
    assert report["outcomes"] == {"truncated(turns)": 1} and report["turns"] == {"mean": 100}


def test_the_same_seed_gives_the_same_report(agentgym: Run) -> None:
    arguments = ("eval", ECHO, "--policy", "random", "--episodes", 12, "--env", "words=2", "--json")
    one, two, other = (agentgym(*arguments, "--seed", seed).json for seed in (1, 1, 2))
    same = ("success", "reward", "turns", "outcomes", "pass_at_k")
    assert [one[k] for k in same] == [two[k] for k in same]
    assert one["run"] != two["run"]
    assert other["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name an environment"),
        ((ECHO,), "name a policy"),
        (("agentgym/TextWorld-Cokking-v0", "--policy", "random"), "TextWorld-Cooking-v0"),
        (("agentgym.testing:EkoEnv", "--policy", "random"), "cannot import"),
        ((ECHO, "--policy", "random", "--env", "trns=3"), "did you mean 'turns'?"),
        ((ECHO, "--policy", "random", "--env", "turns"), "key=value"),
        ((ECHO, "turns=3", "--policy", "random"), "--env KEY=VALUE"),
        ((ECHO, "--policy", "random", "--env", "turns=1", "--env", "turns=2"), "given twice"),
        ((ECHO, "--policy", "random", "--env", "turns=0"), "at least 1"),
        ((ECHO, "--policy", "random", "--split", "tset"), "test"),
        ((ECHO, "--policy", "random", "--parser", "tag"), "tags"),
        ((ECHO, "--policy", "random", "--episodes", "0"), "0"),
        ((ECHO, "--policy", "random", "--episodes", "5", "--samples", "2"), "take 4 or 6 episodes"),
        ((ECHO, "--policy", "random", "--temperature", "-1"), "temperature"),
        (("--resume", "nowhere"), "journal"),
        ((ECHO, "--policy", "expert", "--like", "nowhere"), "journal"),
    ],
)
def test_mistakes_are_explained(agentgym: Run, arguments: tuple[str, ...], said: str) -> None:
    result = agentgym("eval", *arguments, "--json")
    assert result.code in (1, 2)
    assert said in result.err
    assert result.out == ""
    assert not Path("runs").exists()


def test_lost_episodes_are_told_and_end_in_a_non_zero_exit(agentgym: Run) -> None:
    arguments = (
        "eval", "agentgym.testing:CrashEnv", "--policy", "expert", "--env", "worker=thread",
        "--split", "train", "--episodes", 4, "--attempts", 1,
    )  # fmt: skip
    whole = agentgym(*arguments, "--json")
    assert (whole.code, whole.json["infra_failed"]) == (0, 0)
    # Of the tasks that fail in reset, this seed draws the one that raises.
    lost = agentgym(*arguments, "--split", "begin", "--episodes", 1, "--seed", 1, "--out", "lost", "--json")
    assert lost.json["outcomes"] == {"infra_failed(environment)": 1}
    assert lost.code == 1
    assert lost.json["success"] == {"mean": None, "ci95": None}
    assert "infrastructure lost 1 of 1 episodes" in lost.err
    assert "agentgym eval --resume lost" in lost.err


def test_a_run_resumes_from_its_folder_alone(agentgym: Run) -> None:
    first = agentgym(
        "eval", ECHO, "--policy", "expert", "--env", "turns=2", "--episodes", 4, "--out", "run", "--json"
    )
    again = agentgym("eval", "--resume", "run", "--json", "--concurrency", 2)
    assert again.code == 0
    same = KEYS - {"seconds"}
    assert {k: again.json[k] for k in same} == {k: first.json[k] for k in same}
    typed = ("eval", ECHO, "--policy", "expert", "--env", "turns=2", "--episodes", 4)
    assert agentgym(*typed, "--resume", "run", "--json").code == 0
    for option, value in (("--seed", 3), ("--max-turns", 2), ("--policy", "random"), ("--temperature", 1)):
        other = agentgym("eval", "--resume", "run", option, value)
        assert other.code == 2 and f"not {value!r}" in other.err
    over = agentgym("eval", ECHO, "--policy", "expert", "--out", "run")
    assert over.code == 1 and "already holds a journal" in over.err


def test_a_run_of_training_is_not_resumed_here(agentgym: Run) -> None:
    Journal.create("run", {"kind": "train"}).close()
    result = agentgym("eval", "--resume", "run")
    assert result.code == 2 and "agentgym train --resume run" in result.err


def test_secrets_are_asked_for_again(agentgym: Run) -> None:
    class_of = ("--policy", "random", "--policy-option", "api_key=sk-1234567890abcdef1234")
    result = agentgym("eval", ECHO, *class_of, "--episodes", 1)
    assert result.code == 2 and "api_key" in result.err  # the random policy has no such option
    header = {
        "kind": "eval", "env": {"id": ECHO}, "policy": "random", "policy_options": {"api_key": "sk-12"},
        "evaluation": {}, "tasks": "1", "agentgym": "0",
    }  # fmt: skip
    Journal.create("run", header).close()
    again = agentgym("eval", "--resume", "run")
    assert again.code == 2 and "add --policy-option api_key=" in again.err


def test_like_takes_the_environment_of_another_run(agentgym: Run) -> None:
    agentgym(
        "eval",
        ECHO,
        "--policy",
        "expert",
        "--env",
        "turns=3",
        "--max-turns",
        2,
        "--episodes",
        2,
        "--out",
        "a",
    )
    like = agentgym("eval", "--like", "a", "--policy", "expert", "--episodes", 3, "--json").json
    assert like["turns"] == {"mean": 2} and like["episodes"] == 3
    over = agentgym(
        "eval", "--like", "a", "--policy", "expert", "--max-turns", 3, "--episodes", 3, "--json"
    ).json
    assert over["success"]["mean"] == 1


def test_like_takes_limits_and_layout_of_a_training_run(agentgym: Run) -> None:
    config = {
        "env": {"id": ECHO, "kwargs": {"turns": 4}, "max_turns": 2, "split": None, "tasks": 8},
        "rollout": {"layout": "turn", "max_tokens": 5, "temperature": 0.7, "stop": [], "system": "Hi.",
                    "concurrency": 4, "deterministic": True},
    }  # fmt: skip
    Journal.create("train", {"kind": "train", "config": config}).close()
    report = agentgym("eval", "--like", "train", "--policy", "expert", "--episodes", 2, "--json").json
    header = journal.header(report["run"])
    rollout = header["evaluation"]["rollout"]
    assert header["env"]["max_turns"] == 2 and header["env"]["kwargs"] == {"turns": 4}
    assert (rollout["layout"], rollout["system"], rollout["deterministic"]) == ("turn", "Hi.", False)
    assert (rollout["sampling"]["max_tokens"], rollout["sampling"]["temperature"]) == (5, 0)
    Journal.create("other", {"kind": "train"}).close()
    assert "names no environment" in agentgym("eval", "--like", "other", "--policy", "expert").err


def test_against_compares_task_by_task(agentgym: Run) -> None:
    agentgym("eval", ECHO, "--policy", "random", "--episodes", 16, "--out", "a")
    arguments = ("eval", ECHO, "--policy", "expert", "--episodes", 16, "--against", "a")
    difference = agentgym(*arguments, "--json").json["difference"]
    assert difference["tasks"] == 16 and 0.5 < difference["mean"] <= 1
    assert difference["ci95"][0] <= difference["mean"] <= difference["ci95"][1]
    assert "on 16 shared tasks" in agentgym(*arguments).out
    other = agentgym(
        "eval", ECHO, "--policy", "expert", "--split", "valid", "--episodes", 2, "--against", "a"
    )
    assert other.code == 2 and "share no task" in other.err
    assert "success" in other.out  # the evaluation itself is done


def test_against_is_looked_for_before_anything_runs(agentgym: Run) -> None:
    failed = agentgym("eval", ECHO, "--policy", "expert", "--out", "b", "--against", "nothing")
    assert failed.code == 1 and "no journal in nothing" in failed.err
    assert not Path("b").exists()


def slow_run(terminal: Run, turns: int) -> Any:
    """An evaluation at a terminal that has recorded so many turns and goes on."""
    running = terminal(
        "eval", "agentgym.testing:GuessEnv", "--policy", "random", "--env", "delay=0.05", "--env", "turns=16",
        "--episodes", 4, "--concurrency", 2, "--out", "run",
    )  # fmt: skip
    path = Path("run") / journal.FILE
    while not path.exists() or len([r for r in journal.read("run") if r.type == "turn"]) < turns:
        assert running.alive()
        time.sleep(0.05)
    return running


def finished_turns() -> dict[str, int]:
    return {name: len(trajectory.turns) for name, trajectory in journal.load("run").items()}


def resumes_without_loss(agentgym: Run, before: dict[str, int]) -> None:
    report = agentgym("eval", "--resume", "run", "--json").json
    assert report["outcomes"] == {"truncated(environment)": 4}
    after = journal.attempts("run")
    # Every turn that was finished is a turn of an episode that went on, not of one that began again.
    assert all(len(after[name]) == 1 and len(after[name][0].turns) >= n for name, n in before.items())


def test_an_interrupt_leaves_a_run_that_the_printed_command_finishes(terminal: Run, agentgym: Run) -> None:
    running = slow_run(terminal, 3)
    running.type("\x03")
    assert running.wait() == 130
    said = running.wait_for("resume with: agentgym eval --resume run")
    assert "interrupted" in said and "Traceback" not in said
    resumes_without_loss(agentgym, finished_turns())


def test_a_killed_run_loses_no_finished_turn(terminal: Run, agentgym: Run) -> None:
    running = slow_run(terminal, 3)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = finished_turns()
    assert sum(before.values()) >= 3
    resumes_without_loss(agentgym, before)
