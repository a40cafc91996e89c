"""Two releases told apart: what is source, what is a test, and what runs agree about."""

from __future__ import annotations

from pathlib import Path

from agentgym.environments.code.repair_measure import (
    Layout,
    Run,
    distribution,
    layout,
    lists,
    source_change,
)
from agentgym.environments.code.repair_measure import test_change as change_of_tests


def write(place: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def test_a_layout_is_found_with_and_without_a_folder_of_sources(tmp_path: Path) -> None:
    flat = write(
        tmp_path / "flat",
        {"setup.py": "", "one.py": "", "test_one.py": "", "pkg/__init__.py": "", "pkg/tests/test_a.py": "",
         "docs/conf.py": "", "pkg.egg-info/PKG-INFO": "", "conftest.py": "", "noxfile.py": ""},
    )  # fmt: skip
    assert layout(flat) == Layout((".",), ("one.py", "pkg"), ("test_one.py", "pkg/tests"))
    source = write(
        tmp_path / "source",
        {"src/pkg/__init__.py": "", "src/pkg/test_in.py": "", "tests/test_a.py": "", "tests/__init__.py": ""},
    )
    assert layout(source) == Layout(("src",), ("src/pkg",), ("tests", "src/pkg/test_in.py"))


def test_a_change_is_split_into_sources_and_tests(tmp_path: Path) -> None:
    old = {"pkg/__init__.py": "1", "pkg/_version.py": "1", "pkg/gone.py": "", "pkg/same.py": "",
           "README": "1", "tests/test_a.py": "1", "tests/data/x": "1"}  # fmt: skip
    new = {"pkg/__init__.py": "2", "pkg/_version.py": "2", "pkg/new.json": "{}", "pkg/same.py": "",
           "README": "2", "tests/test_a.py": "2", "tests/data/x": "2",
           "pkg/tests/test_b.py": "", "conftest.py": ""}  # fmt: skip
    before, after = write(tmp_path / "old", old), write(tmp_path / "new", new)
    where = Layout((".",), ("pkg",), ("tests",))
    assert source_change(before, after, where) == {
        "pkg/__init__.py": b"2", "pkg/gone.py": None, "pkg/new.json": b"{}",
    }  # fmt: skip
    assert change_of_tests(before, after, where).keys() == {
        "tests/test_a.py", "tests/data/x", "pkg/tests/test_b.py", "conftest.py",
    }  # fmt: skip


def test_only_what_every_run_agrees_about_is_listed() -> None:
    def run(**outcomes: str) -> Run:
        return Run(outcomes, {}, {}, True, "", "3.11")

    before = [
        run(a="failed", b="passed", c="failed", d="passed", e="failed"),
        run(a="failed", b="passed", e="passed"),
    ]
    after = [
        run(a="passed", b="passed", c="passed", d="passed", e="passed", f="passed", g="passed", h="skipped"),
        run(a="passed", b="passed", c="failed", d="passed", e="passed", f="passed", h="xfailed"),
    ]
    told = lists(before, after)
    assert told.fail_to_pass == ("a", "f")
    assert told.pass_to_pass == ("b",)
    assert told.unstable == ("c", "d", "e", "g")


def test_metadata_are_copied_or_made(tmp_path: Path) -> None:
    assert distribution(tmp_path, "my.pkg", "1.0") == {
        "my_pkg-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: my.pkg\nVersion: 1.0\n"
    }
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.0\nSummary: s\n")
    assert b"Summary: s" in distribution(tmp_path, "x", "1.0")["x-1.0.dist-info/METADATA"]
