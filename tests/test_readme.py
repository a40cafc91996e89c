"""The examples of the README and of the documentation run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "\n```python\n" in path.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_of_a_page_run(
    page: Path,
    tmp_path: Path,
    tiny_model: Path,
    obtained: Callable[[str], Path],
    repair_data: Callable[..., Path],
) -> None:
    if "default-jre" in page.read_text() and shutil.which("java") is None:
        pytest.skip("there is no Java")
    for data in re.findall(r"^(?:\$ )?agentgym data get (\w+)", page.read_text(), re.MULTILINE):
        obtained(data)
    places = [os.environ["AGENTGYM_DATA"]]
    if "agentgym data build repair" in page.read_text():
        # Only what the page plays: all of them take minutes.
        named = re.findall(r'"task_id": "(.+?)"', page.read_text())
        places += [str(repair_data(*named).parent)] if named else []
    script = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
    # The same code on a model of a few thousand weights instead of 135 million.
    (tmp_path / "page.py").write_text(script.replace("smollm2", str(tiny_model)))
    data_path = {"AGENTGYM_DATA": os.pathsep.join(places)}
    env = {**os.environ, **data_path, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_the_makefile_has_the_commands_that_the_readme_names() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets
