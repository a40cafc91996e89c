"""The learning studies: statistics over paired seeds, the report, and resumption."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from agentgym.trainers import launch

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


def test_a_finished_run_is_not_done_again(learning: Any, tmp_path: Path) -> None:
    run_of(tmp_path, "spear", "grpo", 0, [0.1])
    before = (tmp_path / "spear" / "grpo" / "0" / "metrics.jsonl").read_bytes()
    assert learning["studies"]._train(["no-such-preset"], tmp_path / "spear" / "grpo" / "0", print) == ""
    assert (tmp_path / "spear" / "grpo" / "0" / "metrics.jsonl").read_bytes() == before


def test_every_study_resolves_and_its_arms_share_what_they_are_compared_on(learning: Any) -> None:
    found = learning["studies"].studies()
    assert found
    for study in found.values():
        assert len(study.seeds) >= 5 and study.pairs
        launch.resolve("pocket", overrides=[*study.start])
        for arm in study.arms.values():
            _, config = launch.resolve(
                arm.preset, overrides=["model=tiny", *study.settings, *arm.settings], added=arm.added
            )
            assert config.evaluation.every and config.steps // config.evaluation.every >= 3
            assert not [s for s in arm.settings if s.startswith(("env", "steps", "groups", "evaluation"))]
