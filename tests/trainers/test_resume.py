"""Resuming: bit for bit in deterministic mode; no finished turn is lost in any."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agentgym import config as configuration
from agentgym import journal
from agentgym.errors import JournalError, UsageError
from agentgym.trainers import launch
from agentgym.trainers.checkpoint import latest
from agentgym.trainers.metrics import load as load_metrics
from agentgym.trainers.run import Silent
from agentgym.trajectory import Trajectory

Train = Callable[..., Path]
RUN = [
    "env.kwargs.turns=2", "steps=5", "groups=2", "group_size=3", "optimiser.lr=1e-3", "checkpoint_every=2",
    "evaluation.every=3", "evaluation.episodes=4", "env.invalid_penalty=0.1", "loss.kl_coef=0.01",
    "env.parser=tags",
]  # fmt: skip


class Interrupted(BaseException):
    """Stands in for Ctrl-C."""


class Stop(Silent):
    """Interrupts at the ``turn``-th turn or behind the ``step``-th step; keeps what was reported."""

    def __init__(self, turn: int = -1, step: int = -1) -> None:
        self.at, self.behind, self.told = turn, step, list[tuple[str, int]]()

    def turn(self, trajectory: Trajectory) -> None:
        self.told.append((trajectory.id, len(trajectory.turns)))
        if len(self.told) == self.at:
            raise Interrupted

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.behind:
            raise Interrupted


def resume(folder: Path, progress: Any = None) -> Path:
    algorithm, config = launch.reopen(folder)
    return launch.launch(algorithm, config, folder, resume=True, progress=progress)


def plain(trajectory: Trajectory) -> Any:
    """Everything of a trajectory but times and the number of attempts."""
    turns = [dataclasses.replace(turn, seconds={}) for turn in trajectory.turns]
    return dataclasses.replace(trajectory, turns=turns, attempt=0)


def state(folder: Path) -> Any:
    """Weights, optimiser, metrics that are no times, and trajectories of a run."""
    saved = latest(folder / "checkpoints")
    assert saved is not None
    return (
        (folder / "model" / "model.safetensors").read_bytes(),
        {p.name: p.read_bytes() for p in sorted(saved.folder.iterdir())},
        [
            {k: v for k, v in metrics.items() if not k.startswith("time/")}
            for _, metrics in sorted(load_metrics(folder).items())
        ],
        {name: plain(t) for name, t in journal.load(folder).items()},
    )


@pytest.fixture
def uninterrupted(train: Train, tmp_path: Path) -> Any:
    train(tmp_path / "whole", "grpo", *RUN)
    return state(tmp_path / "whole")


@pytest.mark.parametrize(
    "stop",
    [{"turn": 5}, {"step": 0}, {"turn": 17}, {"step": 1}, {"step": 2}, {"turn": 43}, {"step": 4}],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    train: Train, uninterrupted: Any, tmp_path: Path, stop: dict[str, int]
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", "grpo", *RUN, progress=Stop(**stop))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == uninterrupted


def test_interrupted_twice_and_resumed_when_done(train: Train, uninterrupted: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", "grpo", *RUN, progress=Stop(turn=30))
    with pytest.raises(Interrupted):
        resume(tmp_path / "cut", Stop(turn=8))
    for _ in range(2):
        resume(tmp_path / "cut")
        assert state(tmp_path / "cut") == uninterrupted


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("dapo", ("steps=3", "groups=2", "group_size=4", "filter_rounds=2", "env.invalid_penalty=0.1")),
        (
            "grpo",
            ("steps=3", "groups=2", "model.lora.rank=2", "model.lora.dropout=0.1", "env.invalid_penalty=0.1"),
        ),
        ("cloning", ("steps=4", "demonstrations=8", "evaluation.every=2", "evaluation.episodes=4")),
    ],
)
def test_every_algorithm_resumes(train: Train, tmp_path: Path, name: str, overrides: tuple[str, ...]) -> None:
    overrides = ("checkpoint_every=1", "env.parser=tags", *overrides)
    train(tmp_path / "whole", name, *overrides)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", name, *overrides, progress=Stop(step=1))
    resume(tmp_path / "cut")
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


def test_finished_turns_are_not_sampled_again(train: Train, tmp_path: Path) -> None:
    first = Stop(turn=9)
    overrides = ["env.kwargs.turns=3", "steps=1", "groups=2", "group_size=3", "rollout.deterministic=false"]
    with pytest.raises(Interrupted):
        train(tmp_path / "r", "grpo", *overrides, progress=first)
    before = journal.load(tmp_path / "r")
    second = Stop()
    resume(tmp_path / "r", second)
    after = journal.load(tmp_path / "r")
    assert not set(first.told[:-1]) & set(second.told)
    for name, count in first.told:
        assert after[name].turns[:count] == before[name].turns[:count]
    # An answer that cannot be read is a turn, and none of the environment's.
    assert all(len(t.turns) >= 3 and t.valid for t in after.values()) and len(after) == 6


def test_a_live_run_is_refused(train: Train, tmp_path: Path) -> None:
    class Second(Silent):
        def step(self, step: int, metrics: Mapping[str, float]) -> None:
            with pytest.raises(JournalError, match="process"):
                resume(tmp_path / "r")
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "r", "grpo", "steps=1", progress=Second())


def test_a_folder_that_holds_a_run_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "r", "grpo", "steps=0")
    with pytest.raises(UsageError, match="already holds a run") as caught:
        train(tmp_path / "r", "grpo", "steps=0")
    assert "--resume" in caught.value.hint
    with pytest.raises(UsageError, match="no run to resume"):
        resume(tmp_path / "none")


REPORTING = """
import sys
from agentgym.cli import train
from agentgym.cli.root import main
told = open(sys.argv[1], "a", buffering=1)
count = train.Watch.turn
def turn(self, trajectory):
    told.write(f"{trajectory.id} {len(trajectory.turns)}\\n")
    count(self, trajectory)
train.Watch.turn = turn
main(["train", *sys.argv[2:]])
"""


def start(told: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REPORTING, str(told), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip


def wait_for(told: Path, lines: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not told.exists() or told.read_text().count("\n") < lines:
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reported(told: Path) -> list[tuple[str, int]]:
    whole = told.read_text().rpartition("\n")[0]
    return [(line.split()[0], int(line.split()[1])) for line in whole.splitlines()]


def command(tiny_model: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        "grpo", "env=agentgym.testing:EchoEnv", "env.kwargs.words=2", f"model={tiny_model}",
        "rollout.max_tokens=4", "trackers=[]", "model.autocast=none", *overrides, "--out", str(folder),
    ]  # fmt: skip


def kill_after(turns: int, told: Path, arguments: list[str]) -> None:
    child = start(told, *arguments)
    wait_for(told, turns, child)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


def test_kill_9_loses_no_finished_turn(
    train: Train, uninterrupted: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder, told = tmp_path / "killed", tmp_path / "told"
    kill_after(31, told, command(tiny_model, folder, *RUN, "rollout.deterministic=true"))
    found = journal.load(folder)
    assert len(reported(told)) >= 31
    for name, count in reported(told):
        assert len(found[name].turns) >= count
    again = start(told, "--resume", str(folder))
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert state(folder) == uninterrupted


def test_a_run_that_died_before_its_config_was_written_goes_on(
    train: Train, uninterrupted: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder, told = tmp_path / "killed", tmp_path / "told"
    kill_after(5, told, command(tiny_model, folder, *RUN, "rollout.deterministic=true"))
    whole = (folder / "config.toml").read_bytes()
    (folder / "config.toml").unlink()
    resume(folder)
    assert (folder / "config.toml").read_bytes() == whole
    assert state(folder) == uninterrupted


def test_the_journal_of_a_run_without_a_config_asks_for_its_secrets(tmp_path: Path) -> None:
    given = ["env=agentgym.testing:EchoEnv", "model=none", "env.kwargs.api_key=hidden"]
    _, config = launch.resolve("grpo", overrides=given)
    header = {"kind": "train", "config": config.model_dump(mode="json")}
    journal.Journal.create(tmp_path, header).close()
    with pytest.raises(UsageError, match=r"env\.kwargs\.api_key is a secret"):
        launch.reopen(tmp_path)
    assert launch.reopen(tmp_path, [given[-1]])[1] == config


@pytest.mark.parametrize("secret", ['["serve", "--api-key", "hidden"]', '"https://me:hidden@host/data"'])
def test_a_secret_inside_a_setting_is_asked_for_too(tmp_path: Path, secret: str) -> None:
    given = [
        "env=agentgym.testing:EchoEnv",
        "model=none",
        "rollout.system=***Hear***",
        f"env.kwargs.at={secret}",
    ]
    _, config = launch.resolve("grpo", overrides=given)
    configuration.save(config, tmp_path / "config.toml")
    assert "hidden" not in (tmp_path / "config.toml").read_text()
    with pytest.raises(UsageError, match=r"env\.kwargs\.at is a secret"):
        launch.reopen(tmp_path)
    assert launch.reopen(tmp_path, [given[-1]])[1] == config


def test_an_evaluation_is_not_trained_on_with(tiny_model: Path, tmp_path: Path) -> None:
    journal.Journal.create(tmp_path, {"kind": "eval"}).close()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="no run to resume") as caught:
        launch.reopen(tmp_path)
    assert "agentgym eval --resume" in caught.value.hint
    algorithm, config = launch.resolve(
        "grpo", overrides=["env=agentgym.testing:EchoEnv", f"model={tiny_model}"]
    )
    with pytest.raises(UsageError, match="no run to resume"):
        launch.launch(algorithm, config, tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_ctrl_c_leaves_a_whole_journal_and_says_how_to_go_on(tiny_model: Path, tmp_path: Path) -> None:
    folder, told = tmp_path / "r", tmp_path / "told"
    child = start(told, *command(tiny_model, folder, "steps=100000", "groups=2", "group_size=2"))
    wait_for(told, 10, child)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"resume with: agentgym train --resume {folder}" in errors and "Traceback" not in errors
    found = journal.load(folder)
    assert all(len(found[name].turns) >= count for name, count in reported(told))
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
