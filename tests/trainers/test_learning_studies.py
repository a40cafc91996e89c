"""The learning studies: statistics over paired seeds, the report, and resumption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from agentgym import config as configuration
from agentgym import journal
from agentgym.errors import UsageError
from agentgym.trainers import launch
from agentgym.trainers.metrics import load as load_metrics

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the studies, which are no package."""
    if not FOLDER.exists():
        pytest.skip("the benchmarks are not here: no source checkout")
    monkeypatch.syspath_prepend(str(FOLDER))
    import report
    import statistics_of_seeds
    import studies

    yield {"report": report, "statistics": statistics_of_seeds, "studies": studies}
    for name in ("report", "statistics_of_seeds", "studies"):
        sys.modules.pop(name, None)


def run_of(root: Path, study: str, arm: str, seed: int, values: list[float]) -> None:
    folder = root / study / arm / str(seed)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    lines = [json.dumps({"step": i, "eval/success": v}) for i, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_intervals_are_students_over_seeds(learning: Any) -> None:
    made = learning["statistics"].estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made.mean == 3 and made.seeds == 5
    assert made.high - made.mean == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), abs=1e-9)
    assert math.isinf(learning["statistics"].estimate([1.0]).high)


def test_differences_are_paired_by_seed(learning: Any) -> None:
    paired = learning["statistics"].paired
    gap = paired({0: 0.5, 1: 0.9, 2: 0.4}, {0: 0.4, 1: 0.8, 7: 0.0})
    assert (gap.mean, gap.seeds) == (pytest.approx(0.1), 2)
    assert gap.high - gap.low == pytest.approx(0, abs=1e-9), "equal gaps, whatever the seeds' own spread"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_final_is_the_mean_of_the_last_three(learning: Any) -> None:
    curve = [(0, 0.0), (1, 1.0), (2, 0.5), (3, 0.6)]
    assert learning["statistics"].final(curve) == pytest.approx(0.7)
    assert learning["statistics"].area(curve) == pytest.approx(0.525)


def test_the_report_says_what_was_not_run_and_keeps_the_page(learning: Any, tmp_path: Path) -> None:
    study = learning["studies"].read(FOLDER / "spear.toml")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "learning.md"
    page.write_text("before\n\n<!-- figures: spear -->\nold\n<!-- end: spear -->\n\nafter\n")
    for seed in range(2):
        run_of(tmp_path, "spear", "grpo", seed, [0.1, 0.2, 0.3, 0.4])
        run_of(tmp_path, "spear", "spear", seed, [0.1, 0.4, 0.5, 0.6 + 0.1 * seed])
    text = learning["report"].write(study, tmp_path, tmp_path / "docs")
    assert "| gigpo | 0 | not run | | |" in text and "| grpo | 2 | 30.0% (30.0% to 30.0%)" in text
    assert "| spear - grpo | 2 | +21.7% (" in text
    assert page.read_text().startswith("before") and page.read_text().endswith("after\n")
    assert "old" not in page.read_text()
    ElementTree.parse(tmp_path / "docs" / "learning" / "spear.svg")


def test_a_page_on_which_the_figures_do_not_end_is_left_as_it_is(learning: Any, tmp_path: Path) -> None:
    study = learning["studies"].read(FOLDER / "spear.toml")
    page = tmp_path / "learning.md"
    page.write_text("<!-- figures: spear -->\nand no end")
    with pytest.raises(UsageError, match="and no <!-- end"):
        learning["report"].write(study, tmp_path, tmp_path)
    assert page.read_text() == "<!-- figures: spear -->\nand no end"


def test_a_finished_run_is_not_done_again(learning: Any, tmp_path: Path) -> None:
    run_of(tmp_path, "spear", "grpo", 0, [0.1])
    before = (tmp_path / "spear" / "grpo" / "0" / "metrics.jsonl").read_bytes()
    none = learning["studies"].Arm("none", "no-such-preset", (), ())
    assert learning["studies"]._train(none, [], tmp_path / "spear" / "grpo" / "0", print) == ""
    assert (tmp_path / "spear" / "grpo" / "0" / "metrics.jsonl").read_bytes() == before


def test_every_study_resolves_and_its_arms_share_what_they_are_compared_on(learning: Any) -> None:
    found = learning["studies"].studies()
    assert found
    for study in found.values():
        assert len(study.seeds) >= 5 and study.pairs
        launch.resolve("pocket", overrides=[*study.start])
        shared: list[Any] = []
        for arm in study.arms.values():
            _, config = launch.resolve(
                arm.preset, overrides=["model=tiny", *study.settings, *arm.settings], added=arm.added
            )
            assert config.evaluation.every and config.steps // config.evaluation.every >= 3
            episodes = config.steps * config.groups * config.group_size
            shared.append((config.env, config.steps, episodes, config.evaluation, config.optimiser.lr))
        assert all(one == shared[0] for one in shared)


TINY = """
title = "Tiny"
environment = "AskEnv."
seeds = [0, 1]
pairs = [["rloo", "grpo"]]
start = [
  "env=agentgym.testing:AskEnv", "env.kwargs.digits=3", "hidden=32", "layers=1", "vocabulary=300",
  "tokenizer_episodes=8", "demonstrations=32", "rollout.max_tokens=4", "optimiser.lr=5e-3",
]
settings = [
  "env=agentgym.testing:AskEnv", "env.kwargs.digits=3", "groups=2", "group_size=4", "steps=1000000",
  "rollout.layout=turn", "rollout.max_tokens=4", "rollout.deterministic=true", "model.autocast=none",
  "model.rollout_dtype=float32", "loss.kl_coef=0", "optimiser.lr=1e-3", "evaluation.every=10",
  "evaluation.episodes=8", "evaluation.temperature=1.0", "trackers=[]", "checkpoint_every=2",
]
[arms.grpo]
preset = "grpo"
[arms.rloo]
preset = "rloo"
"""


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below ``folder``, and when it was written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def begun(root: Path, arm: Any, seed: int, *settings: str, study: str = "tiny") -> Path:
    """A finished run as `agentgym train` leaves it, but for its model and its steps."""
    run_of(root, study, arm.name, seed, [0.5])
    out = root / study / arm.name / str(seed)
    _, config = launch.resolve(arm.preset, overrides=["model=x", *settings, f"seed={seed}"], added=arm.added)
    header = {"kind": "train", "config": config.model_dump(mode="json")}
    journal.Journal.create(out, header).close()
    configuration.save(config, out / "config.toml")
    return out


def test_a_run_with_other_settings_is_neither_taken_for_the_study_s_nor_reported(
    learning: Any, tmp_path: Path
) -> None:
    """What a smoke run left, or an earlier version of the study's file."""
    (tmp_path / "tiny.toml").write_text(TINY)
    studies = learning["studies"]
    study = studies.read(tmp_path / "tiny.toml")
    grpo, rloo = study.arms["grpo"], study.arms["rloo"]
    same = begun(tmp_path, grpo, 0, *study.settings)
    begun(tmp_path, grpo, 1, *study.settings, "steps=40")
    begun(tmp_path, rloo, 0, *study.settings, "steps=40")
    settings = ["model=elsewhere", *study.settings]
    assert studies._train(grpo, [*settings, "seed=0"], same, print) == ""
    refused = studies._train(rloo, [*settings, "seed=0"], tmp_path / "tiny" / "rloo" / "0", print)
    assert "steps is 40 there and 1000000 here" in refused and "--runs" in refused
    assert (
        studies._train(rloo, [*settings, "steps=40", "seed=0"], tmp_path / "tiny" / "rloo" / "0", print) == ""
    )

    told: list[str] = []
    found = studies.results(study, tmp_path, told.append)
    assert {arm: {*curves} for arm, curves in found.items()} == {"grpo": {0}, "rloo": set()}
    assert [line.partition(":")[0] for line in told] == ["tiny/grpo/1 is left out", "tiny/rloo/0 is left out"]


def test_runs_from_another_start_are_not_reported(learning: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    studies = learning["studies"]
    study = studies.read(tmp_path / "tiny.toml")
    begun(tmp_path, study.arms["grpo"], 0, *study.settings)
    start = tmp_path / "tiny" / "start"
    start.mkdir()
    _, config = launch.resolve("pocket", overrides=[*study.start, "steps=30"])
    configuration.save(config, start / "config.toml")
    journal.Journal.create(start, {"kind": "train"}).close()
    told: list[str] = []
    assert studies.results(study, tmp_path, told.append) == {"grpo": {}, "rloo": {}}
    assert told == ["tiny is left out: in start, steps is 30 there and 400 here"]


def test_other_facts_than_those_of_the_runs_are_refused(learning: Any, tmp_path: Path) -> None:
    studies = learning["studies"]
    study = studies.studies()["igpo"]
    studies.prepare(study, tmp_path)
    before = contents(tmp_path / "facts")
    assert {name for name in before} == {"corpus.jsonl", "questions.jsonl"}
    studies.prepare(study, tmp_path)
    assert contents(tmp_path / "facts") == before, "runs that read them are not disturbed"
    other = dataclasses.replace(study, facts={**study.facts, "people": 25})
    with pytest.raises(UsageError, match="other facts"):
        studies.prepare(other, tmp_path)
    assert contents(tmp_path / "facts") == before


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_stopped(learning: Any, tmp_path: Path) -> None:
    """The command itself: finished runs stay, the one that was cut is resumed exactly, the rest is done."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "tiny.toml").write_text(TINY)
    runs, env = tmp_path / "runs", {**os.environ, "AGENTGYM_CACHE": str(tmp_path / "cache")}
    bench = [sys.executable, "-c", "from agentgym.cli import main; main()", "bench", "learning", "tiny"]
    bench += ["--studies", str(tmp_path / "studies"), "--runs", str(runs)]
    small = ["--at-once", "1", "--set", "steps=40", "--set", "start.steps=30"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*bench, *small], env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    done, cut = runs / "tiny" / "grpo" / "0", runs / "tiny" / "rloo" / "0"
    killed = start()
    deadline = time.monotonic() + 200
    while not list(cut.glob("checkpoints/step-*/state.json")):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert (done / "model" / "config.json").exists() and not (cut / "model").exists()
    before = contents(done), contents(runs / "tiny" / "start"), done.with_name("0.log").read_bytes()
    reached = len(load_metrics(cut))
    assert 0 < reached < 40

    again = start()
    out, err = again.communicate(timeout=250)
    assert again.returncode == 0, err
    assert before == (contents(done), contents(runs / "tiny" / "start"), done.with_name("0.log").read_bytes())
    told = [line.partition(":")[0] for line in err.splitlines() if " done in " in line]
    assert told == ["tiny/rloo/0", "tiny/grpo/1", "tiny/rloo/1"]
    assert "resumed after step" in cut.with_name("0.log").read_text()
    assert "resumed" not in (runs / "tiny" / "rloo" / "1.log").read_text()
    assert out == "", "what --set changed is not reported"

    settings = {seed: launch.reopen(runs / "tiny" / "rloo" / str(seed))[1] for seed in (0, 1)}
    assert {seed: config.seed for seed, config in settings.items()} == {0: 0, 1: 1}
    assert settings[0].steps == 40 and settings[0].model.name == str(runs / "tiny" / "start" / "model")
    assert launch.reopen(runs / "tiny" / "start")[1].steps == 30
    twin = launch.launch(launch.reopen(cut)[0], settings[0], tmp_path / "twin")
    assert (cut / "model" / "model.safetensors").read_bytes() == (twin / "model.safetensors").read_bytes()

    third = start()
    assert third.communicate(timeout=60) == ("", "") and third.returncode == 0, "nothing is left to do"

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "learning.md").write_text("# Page\n")
    ran = TINY.replace("steps=1000000", "steps=40").replace('"hidden=32"', '"steps=30", "hidden=32"')
    (tmp_path / "studies" / "tiny.toml").write_text(ran)
    reported = subprocess.run(
        [*bench, "--report", "--docs", str(docs)], env=env, text=True, capture_output=True, check=True
    )
    study = learning["studies"].read(tmp_path / "studies" / "tiny.toml")
    found = learning["studies"].results(study, runs)
    assert {arm: {*curves} for arm, curves in found.items()} == {"grpo": {0, 1}, "rloo": {0, 1}}
    for arm, curves in found.items():
        assert all([step for step, _ in curve] == [9, 19, 29, 39] for curve in curves.values())
        mean = sum(value for curve in curves.values() for _, value in curve[-3:]) / 6
        assert f"| {arm} | 2 | {mean:.1%} (" in reported.stdout
    assert "| rloo - grpo | 2 | " in reported.stdout
    page = (docs / "learning.md").read_text()
    assert page.startswith("# Page\n") and "| rloo - grpo | 2 | " in page
    plot = ElementTree.parse(docs / "learning" / "tiny.svg").getroot()
    assert len(plot.findall("{*}polyline")) == 6, "a line a seed, and their mean, for each arm"


def test_an_unknown_study_is_named(learning: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "run.py"), "nosuch", "--runs", str(tmp_path)],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2 and "there is no study nosuch, only " in done.stderr
