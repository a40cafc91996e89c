"""A package from outside the repository, installed as any other, adds a part of each kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent / "plugin"
PYTHON = [sys.executable, "-W", "error"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has the package installed."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run(command: list[str], env: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run([*PYTHON, *command], env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(code: str, env: dict[str, str]) -> Any:
    return json.loads(run(["-c", f"import json, sys\n{code}"], env))


def test_its_environment_is_made_by_id(installed: dict[str, str]) -> None:
    code = (
        "import agentgym\n"
        "env = agentgym.make('example/Lamps-v0', lamps=4)\n"
        "observation, info = env.reset(options={'task_id': 'row-1'})\n"
        "print(json.dumps([observation, info, env.step('press 0')[:4], list(agentgym.families())]))\n"
    )
    observation, info, step, ids = told(code, installed)
    assert observation == "Lamps: on on off off"
    assert info["task_id"] == "row-1"
    assert info["admissible_actions"] == ["press 0", "press 1", "press 2", "press 3"]
    assert step == ["Lamps: off off off off", 1.0, True, False]
    assert "example/Lamps-v0" in ids
    assert "agentgym/TextWorld-Cooking-v0" in ids


def test_gymnasium_makes_it_by_naming_the_package(installed: dict[str, str]) -> None:
    code = (
        "import gymnasium, agentgym_plugin_example\n"
        "agentgym_plugin_example.register()\n"
        "print(json.dumps(gymnasium.make('example/Lamps-v0').reset(seed=0)[1]['instruction']))\n"
    )
    assert told(code, installed) == "Switch all lamps off."


def test_its_environment_keeps_the_contract(installed: dict[str, str]) -> None:
    code = (
        "from agentgym.check import check\n"
        "print(json.dumps(check('example/Lamps-v0', episodes=6).to_json()))\n"
    )
    report = told(code, installed)
    assert report["ok"], [f for f in report["findings"] if f["ok"] is False]
    assert [f["name"] for f in report["findings"] if f["ok"] is not True] == []


def test_its_policy_is_made_by_name(installed: dict[str, str]) -> None:
    code = (
        "import asyncio\n"
        "from agentgym.policies import make_policy\n"
        "from agentgym.policies.base import PolicyContext, Request, Sampling, TurnView\n"
        "policy = make_policy('sweep', PolicyContext(options={'parser': 'tags'}))\n"
        "turns = [TurnView('e', 't', 'x', i, (), ('a', 'b')) for i in range(3)]\n"
        "requests = [Request(str(t.turn), (), Sampling(), 0, t) for t in turns]\n"
        "print(json.dumps([policy.name, [c.text for c in asyncio.run(policy.generate(requests))]]))\n"
    )
    name, texts = told(code, installed)
    assert name == "sweep"
    assert [("a" if "a</" in t else "b") for t in texts] == ["a", "b", "a"]
    assert all("<action>" in text for text in texts)


def test_its_algorithm_is_found_by_name_and_nothing_is_imported_before(installed: dict[str, str]) -> None:
    pytest.importorskip("torch")
    code = (
        "import agentgym\n"
        "from agentgym import plugins\n"
        "before = 'agentgym_plugin_example' in sys.modules, 'torch' in sys.modules\n"
        "names = sorted(plugins.declared('algorithms')), sorted(plugins.declared('commands'))\n"
        "found = plugins.find('algorithms', 'rejection', {}, 'algorithm')\n"
        "print(json.dumps([before, names, found.config.__name__]))\n"
    )
    before, (algorithms, commands), found = told(code, installed)
    assert before == [False, False]
    assert "rejection" in algorithms
    assert "lamps" in commands
    assert found == "RejectionConfig"


def test_its_algorithm_trains_a_model_on_its_environment(
    installed: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    code = (
        "from pathlib import Path\n"
        "from agentgym.trainers.launch import launch, resolve\n"
        "overrides = ['env.id=example/Lamps-v0', 'env.kwargs.lamps=3', 'env.max_turns=2', 'steps=1',\n"
        f"    'model.name={tiny_model}', 'model.autocast=none', 'groups=2', 'group_size=2',\n"
        "    'least_reward=0', 'rollout.max_tokens=4', 'rollout.concurrency=4', 'trackers=[]']\n"
        "algorithm, config = resolve('rejection', [], overrides)\n"
        f"model = launch(algorithm, config, Path({str(tmp_path / 'run')!r}))\n"
        "print(json.dumps(str(model)))\n"
    )
    # torch and transformers warn of their own affairs
    done = run(["-W", "ignore", "-c", f"import json\n{code}"], installed)
    model = Path(json.loads(done.splitlines()[-1]))
    assert (model / "model.safetensors").exists()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["rows_kept"] > 0
    assert lines[0]["nll"] > 0


def test_the_command_line_knows_all_of_it(installed: dict[str, str]) -> None:
    main = ["-c", "import sys; from agentgym.cli import main; sys.exit(main())"]
    listed = json.loads(run([*main, "list", "--json"], installed))
    assert "example/Lamps-v0" in [row["id"] for row in listed["environments"]]
    assert "sweep" in [row["name"] for row in listed["policies"]]
    assert "rejection" in [row["name"] for row in listed["algorithms"]]
    assert run([*main, "lamps", "row-9"], installed).splitlines() == [
        "Lamps: on on on on on off",
        "press 0 -> Lamps: off off on on on off",
        "press 3 -> Lamps: off off off off off off",
    ]
