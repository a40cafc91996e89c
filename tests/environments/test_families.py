"""What holds for every registered family, whatever it is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentgym
from agentgym.check import check
from agentgym.errors import MissingDependency
from agentgym.registry import base

# What a family needs beside its packages: data to obtain, shared data, a program.
OBTAINED = {
    "BFCL-MultiTurn-v0": "bfcl",
    "HumanEval-v0": "humaneval",
    "Tau2-Airline-v0": "tau2",
    "Tau2-Retail-v0": "tau2",
}
SHARED = {"ALFWorld-v0": "alfworld", "SearchQA-v0": "search", "TextToSQL-v0": "spider"}
JAVA = ("ScienceWorld-v0", "TextWorldExpress-v0")
# These have no tasks of their own: tests/environments/bridges/test_openenv.py gives one a server, and
# tests/environments/code/test_terminal_folders.py gives the other folders.
SERVED = ("OpenEnv-v0", "TaskFolder-v0")

IDS = [id.removeprefix("agentgym/") for id in agentgym.families() if id.startswith("agentgym/")]


@pytest.fixture(params=[id for id in IDS if id not in SERVED])
def family(
    request: pytest.FixtureRequest,
    obtained: Callable[[str], Path],
    shared_data: Callable[[str], Path],
    repair_data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """An id whose data are there."""
    id = str(request.param)
    if id == "Repair-v0":
        # One instance of each split: all of them take minutes to build.
        monkeypatch.setenv("AGENTGYM_DATA", str(repair_data("texttable-1.7.1", "webcolors-24.8.0").parent))
    if id in OBTAINED:
        obtained(OBTAINED[id])
    if id in SHARED:
        shared_data(SHARED[id])
    if id in JAVA and shutil.which("java") is None:
        pytest.skip("there is no Java")
    try:
        agentgym.make(id).close()
    except MissingDependency as error:
        pytest.skip(str(error))
    return id


@pytest.fixture
def env(family: str) -> Iterator[Any]:
    made = agentgym.make(family)
    yield made
    made.close()


def test_members_of_a_group_share_task_seed_and_first_observation(family: str, env: Any) -> None:
    tasks = base(env).tasks(base(env).splits[0])
    task_id = tasks.sample(1, seed=3)[0]
    begun = []
    other = agentgym.make(family)
    for member in (env, env, other):
        observation, info = member.reset(seed=11, options={"task_id": task_id})
        begun.append((task_id, observation, info))
    other.close()
    assert begun[0] == begun[1] == begun[2]
    assert begun[0][2]["task_id"] == task_id


def test_a_seed_draws_the_same_task_everywhere(family: str, env: Any) -> None:
    other = agentgym.make(family)
    assert env.reset(seed=5)[1]["task_id"] == other.reset(seed=5)[1]["task_id"]
    other.close()


@pytest.mark.slow
def test_every_family_keeps_the_contract(family: str) -> None:
    report = check(family, episodes=3, seconds=280)
    assert not [finding for finding in report.findings if finding.ok is False]


def test_every_family_says_in_one_line_what_one_does_there() -> None:
    for id, known in agentgym.families().items():
        if id.startswith("agentgym/"):
            assert known.summary and "\n" not in known.summary
