"""list, doctor, check, new, data, play, bench."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym import datasets
from agentgym.cli import machine

Run = Callable[..., Any]
ECHO = "agentgym.testing:EchoEnv"


# list ---------------------------------------------------------------------------------------


def test_list_names_environments_policies_and_algorithms(agentgym: Run) -> None:
    document = agentgym("list", "--json").json
    coin = next(e for e in document["environments"] if e["id"] == "agentgym/TextWorld-CoinCollector-v0")
    assert coin["summary"] and coin["extra"] == "text" and coin["default_split"] == "test"
    assert coin["splits"].keys() == {"train", "valid", "test"} and coin["splits"]["test"] >= 100
    assert {"random", "expert", "human"} <= {p["name"] for p in document["policies"]}
    assert {"grpo", "cloning", "dapo"} <= {a["name"] for a in document["algorithms"]}
    text = agentgym("list").out
    assert "agentgym/TextWorld-Cooking-v0" in text and "test* " in text and "grpo" in text


def test_in_a_pipe_no_line_ends_in_blanks(piped: Run) -> None:
    for command in (("list",), ("doctor", "--no-network"), ("check", ECHO, "--episodes", 1)):
        lines = piped(*command).out.splitlines()
        assert lines and all(line == line.rstrip() for line in lines)


def test_a_family_that_cannot_be_imported_says_what_it_needs(
    agentgym: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentgym.errors import MissingData, MissingDependency

    def missing(id: str) -> None:
        if "ALFWorld" in id:
            raise MissingData("alfworld", ["/data"])
        raise MissingDependency("textworld", "text") if "Coin" in id else ValueError("[bold]broken[/]\nmore")

    monkeypatch.setattr("agentgym.cli.list._tasks", missing)
    rows = {row["id"]: row for row in agentgym("list", "--json").json["environments"]}
    assert rows["agentgym/TextWorld-CoinCollector-v0"]["needs"] == "extra text"
    assert rows["agentgym/TextWorld-Cooking-v0"]["needs"] == "attention: ValueError: [bold]broken[/]"
    assert rows["agentgym/ALFWorld-v0"]["needs"] == "data: agentgym data get alfworld"
    text = agentgym("list").out
    assert "needs extra text" in text and "[bold]broken[/]" in text


# doctor -------------------------------------------------------------------------------------


def test_doctor_finds_every_part_and_gives_a_fix_for_what_is_missing(agentgym: Run) -> None:
    findings = {f["name"]: f for f in agentgym("doctor", "--no-network", "--json").json}
    expected = {"Python", "extra text", "extra train", "torch", "GPU", "cores", "memory", "locale"}
    expected |= {
        "disk: cache",
        "disk: data",
        "disk: runs",
        "Java",
        "bubblewrap",
        "Chromium",
        "Xvfb",
        "Docker",
    }
    assert expected <= findings.keys() and "model hub" not in findings
    assert findings["Python"]["state"] == "ok"
    for finding in findings.values():
        assert finding["state"] in ("ok", "limited", "missing") and finding["detail"]
        assert finding["fix"] or finding["state"] != "missing"
    assert "→" in agentgym("doctor", "--no-network").out


def test_doctor_names_the_extra_of_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: None if name in ("peft", "torch") else real(name))
    found = {f.name: f for f in machine.examine(network=False)}
    assert found["extra train"].state == "missing" and "peft" in found["extra train"].detail
    assert found["extra train"].fix == found["torch"].fix == 'pip install "agentgym-llm[train]"'


def test_doctor_sees_a_cpu_build_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "_run", lambda command: (0, "NVIDIA H200, 143771, 9.0"))
    [build] = machine.torch_build()
    assert build.state == "limited" and "torch==2.13.0" in build.fix
    [card] = machine.gpu()
    assert card.state == "ok" and card.detail == "NVIDIA H200, 140 GiB, bf16"


def test_programs_that_are_missing_refuse_or_hang_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._program("Java", ["java"], "default-jre-headless", "the JVM").state == "missing"
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk 17'\n")
    java.chmod(0o755)
    assert machine._program("Java", ["java"], "x", "the JVM").detail == "openjdk 17"
    java.write_text("#!/bin/sh\necho broken; exit 3\n")
    assert machine._program("Java", ["java"], "x", "the JVM").detail == "java fails: broken"
    monkeypatch.setattr(machine, "SECONDS", 0.2)
    java.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    assert "timed out" in machine._program("Java", ["java"], "x", "the JVM").detail


def test_a_probe_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "not a number")
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: "")
    found = {f.name: f for f in machine.examine(network=False)}
    assert "could not be examined" in found["memory"].detail


def test_limits_of_control_groups_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory.max": str(4 * machine.GIB),
        "memory.current": str(machine.GIB),
        "cpu.max": "50000 100000",
    }
    for name, value in files.items():
        (tmp_path / name).write_text(value)
    monkeypatch.setattr(machine, "_control_groups", lambda controller: [tmp_path])
    [memory] = machine.memory()
    assert memory.state == "limited" and "allows 4.0 GiB and has 3.0 left" in memory.detail
    [cores] = machine.cores()
    assert cores.state == "limited" and "limited to 0.5" in cores.detail


def test_a_hub_that_is_far_or_switched_off_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    [finding] = machine.hub()
    assert finding.state == "limited" and "cannot be reached" in finding.detail
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert [f.state for f in machine.hub()] == ["limited"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [f.fix for f in machine.hub()] == ["unset HF_HUB_OFFLINE"]


def test_doctor_diagnoses_a_template(agentgym: Run, tiny_model: Path) -> None:
    report = agentgym("doctor", "template", tiny_model, "--json").json
    assert report["own_template"] is True and report["end_of_turn"] == "<|im_end|>"
    assert "prefix: kept" in agentgym("doctor", "template", tiny_model).out
    missing = agentgym("doctor", "template", "/no/such/folder")
    assert missing.code == 1 and "hint:" in missing.err


# check --------------------------------------------------------------------------------------


def test_check_passes_what_keeps_the_contract(agentgym: Run) -> None:
    result = agentgym("check", ECHO, "--env", "turns=2", "--episodes", 1, "--json")
    assert result.code == 0 and result.json["ok"] is True and result.json["kwargs"] == {"turns": 2}
    assert "keeps the contract" in agentgym("check", ECHO, "--episodes", 1).out


def test_check_fails_what_breaks_it_and_shows_hostile_text_as_text(
    agentgym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(
        "from agentgym.testing import EchoEnv\n"
        "class Broken(EchoEnv):\n"
        "    def act(self, action):\n"
        "        raise ValueError('\\x1b[2J[bold]no[/bold]')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = agentgym("check", "broken_package:Broken", "--episodes", 1)
    assert result.code == 1 and "broken" in result.out
    assert "\x1b" not in result.out and "␛[2J[bold]no[/bold]" in result.out
    assert agentgym("check", "broken_package:Broken", "--episodes", 1, "--json").json["ok"] is False


def test_check_of_an_unknown_id_names_the_near_one(agentgym: Run) -> None:
    result = agentgym("check", "TextWorld-Simpel-v0")
    assert result.code == 2 and "TextWorld-Simple-v0" in result.err


# new ----------------------------------------------------------------------------------------


def test_new_writes_a_package_and_overwrites_nothing(agentgym: Run) -> None:
    result = agentgym("new", "my-maze", "--folder", "here")
    assert result.code == 0 and Path("here/my-maze/pyproject.toml").is_file()
    assert "pip install -e 'here/my-maze[dev]'" in result.out
    assert agentgym("new", "my-maze", "--folder", "here").code == 2
    assert agentgym("new", "1nonsense").code == 2


# data ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AGENTGYM_CACHE", str(folder))
    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path / "data"))
    (folder / "models" / "one").mkdir(parents=True)
    (folder / "models" / "one" / "weights").write_bytes(b"x" * 2_500_000)
    (folder / "games").mkdir()
    for made in ("models", "games"):
        (folder / made / "CACHEDIR.TAG").touch()
    (folder / "mine").mkdir()
    (folder / "outside").symlink_to(tmp_path)
    return folder


def test_data_list_shows_entries_and_sizes(agentgym: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    rows = {row["path"]: row for row in agentgym("data", "list", "--json").json}
    assert rows[str(cache / "models")] == {
        "place": "cache",
        "path": str(cache / "models"),
        "bytes": 2_500_000,
    }
    assert rows["runs/a"]["place"] == "runs"
    assert rows[str(cache / "outside")]["bytes"] < 1000  # a link is not followed
    text = agentgym("data", "list").out
    assert "2.5 MB" in text and f"data: nothing at {tmp_path / 'data'}" in text


def test_data_clear_asks_and_deletes_no_more_than_the_cache(
    agentgym: Run, cache: Path, tmp_path: Path, terminal: Run
) -> None:
    (tmp_path / "kept").write_text("kept")
    assert "add --yes" in agentgym("data", "clear").err
    assert "known: games, models;" in agentgym("data", "clear", "zzz").err
    asked = terminal("data", "clear", "models")
    asked.wait_for("delete? [y/N]")
    asked.type("n\n")
    assert asked.wait() == 0 and (cache / "models").exists()
    assert agentgym("data", "clear", "models", "--yes").code == 0
    assert not (cache / "models").exists() and (cache / "games").exists()
    assert agentgym("data", "clear", "--yes").code == 0
    assert sorted(path.name for path in cache.iterdir()) == ["mine", "outside"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert "nothing that AgentGym made" in agentgym("data", "clear").out


def test_data_get_prints_the_folder(agentgym: Run, tiny_model: Path) -> None:
    assert agentgym("data", "get", tiny_model).out == f"{tiny_model}\n"


def test_data_get_obtains_a_data_set_from_what_is_at_hand(
    agentgym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTGYM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "words_data.py").write_text(
        "import shutil\n"
        "def obtain(folder, progress, source):\n"
        "    progress(1, 1)\n"
        "    shutil.copy(source, folder / 'words.txt')\n"
    )
    monkeypatch.setitem(
        datasets.known(), "words", datasets.DataSet("words", "two words", "CC0", "words_data:obtain")
    )
    (tmp_path / "mine.txt").write_text("one two")
    assert "two words" in agentgym("data", "list").out
    folder = tmp_path / "data" / "words"
    assert agentgym("data", "get", "words", "--from", tmp_path / "mine.txt").out == f"{folder}\n"
    assert (folder / "words.txt").read_text() == "one two"
    assert "two words" not in agentgym("data", "list").out
    refused = agentgym("data", "get", "wrods", "--from", tmp_path / "mine.txt")
    assert refused.code != 0 and "did you mean 'words'" in refused.err


def test_data_build_makes_the_games_that_eval_draws(agentgym: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textworld")
    import agentgym as package
    from agentgym.environments.text import textworld_games

    asked: list[str] = []

    def generate(tasks: Any, *, processes: int, progress: Any) -> int:
        asked[:] = [task.id for task in tasks]
        progress(len(asked), len(asked))
        return len(asked) - 1

    monkeypatch.setattr(textworld_games, "generate", generate)
    name = "agentgym/TextWorld-CoinCollector-v0"
    result = agentgym("data", "build", "textworld", name, "--split", "test", "--count", 5, "--seed", 3)
    assert "4 games made, 1 were in the cache" in result.out
    assert asked == package.make(name).unwrapped.tasks("test").sample(5, 3)  # type: ignore[attr-defined]
    agentgym("data", "build", "textworld", name, "--split", "train", "--count", 2)
    assert asked == ["train-000000", "train-000001"]
    agentgym("data", "build", "textworld", "--count", 1)
    assert len(asked) == 5
    assert agentgym("data", "build", "textworld", name, "--count", 10**9).code == 2


# play ---------------------------------------------------------------------------------------


def test_play_is_a_game_at_a_terminal(terminal: Run) -> None:
    game = terminal("play", ECHO, "--task", "echo-test-3", "--env", "turns=2", "--solution")
    shown = game.wait_for("> ")
    words = shown.split("solution: ")[1].split("\n")[0].strip().split(", ")
    listed = dict(reversed(line.split()) for line in shown.splitlines() if line[:4].strip().isdecimal())
    game.type(f"{listed[words[0]]}\n")
    assert "reward +0.5" in game.wait_for("> ")
    game.type(f"{words[1]}\n")
    assert game.wait() == 0
    assert "Right." in game.wait_for("solved after 2 turns, score 1")


@pytest.mark.parametrize(
    ("key", "code", "said"), [("\x04", 0, "left after 1 turn"), ("\x03", 130, "interrupted")]
)
def test_play_can_be_left(terminal: Run, key: str, code: int, said: str) -> None:
    game = terminal("play", ECHO, "--seed", 1, "--env", "turns=3")
    game.wait_for("> ")
    game.type("nonsense\n")
    assert "not understood" in game.wait_for("> ")
    # Python's readline misses an interrupt in the instant between its prompt and its wait for a key.
    time.sleep(0.3)
    game.leave(key)
    assert game.wait() == code
    assert "Traceback" not in game.wait_for(said)


def test_play_mistakes(agentgym: Run) -> None:
    assert "did you mean" in agentgym("play", ECHO, "--task", "echo-tset-3").err
    assert agentgym("play", ECHO, "--split", "tset").code == 2
    assert agentgym("play", "nonsense").code == 2


# bench --------------------------------------------------------------------------------------


def test_bench_runs_the_checkouts_benchmarks(
    agentgym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {
        "machine": {"cpu": "a CPU", "system": "Linux", "cores": 2, "python": "3.11", "load": 0.5},
        "figures": [
            {"name": "one", "value": 0.2, "unit": "ms", "bound": "at most", "limit": 0.3, "ok": True},
            {"name": "two", "value": 0.4, "unit": "ms", "bound": "at most", "limit": 0.3, "ok": False},
            {"name": "three", "value": None, "unit": "s", "bound": "at most", "limit": 1, "ok": None,
             "error": "why"},
        ],
    }  # fmt: skip
    script = tmp_path / "core.py"
    script.write_text(f"print({json.dumps(report)!r})")
    monkeypatch.setattr("agentgym.cli.bench._checkout", lambda: tmp_path)
    assert agentgym("bench", "core", "--json").json == report
    for suite in ("environments", "training"):
        (tmp_path / f"{suite}.py").write_text(script.read_text())
        assert agentgym("bench", suite, "--json").json == report
    text = agentgym("bench", "core").out
    assert all(word in text for word in ("0.2 ms", "ok", "missed", "not measured", "why", "a CPU, 2 cores"))
    script.write_text("raise SystemExit(3)")
    assert "exit code 3" in agentgym("bench", "core").err


def test_bench_without_a_checkout_says_so(
    agentgym: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import agentgym as package

    monkeypatch.setattr(package, "__file__", str(tmp_path / "agentgym" / "__init__.py"))
    result = agentgym("bench", "core")
    assert result.code == 2 and "clone the repository" in result.err


def test_a_benchmark_that_fails_is_a_figure_without_a_value(tmp_path: Path) -> None:
    import runpy

    checkout = Path(__file__).parents[2] / "benchmarks"
    core = runpy.run_path(str(checkout / "figures.py"))
    target = core["Target"]("x", "engine.a.b", "ms", "at most", 0.3)
    figure = core["_figure"]
    assert figure(target, {"a": {"b": 0.3}})["ok"] is True
    assert figure(target, {"a": {"b": 0.31}})["ok"] is False
    assert figure(target, {"error": "died"})["error"] == "died" and figure(target, {})["ok"] is None
    core["_run"].__globals__["HERE"] = tmp_path
    (tmp_path / "engine.py").write_text("raise ValueError('no luck')")
    assert core["_run"]("engine") == {"error": "ValueError: no luck"}
    for suite in ("core", "environments", "training"):
        for target in runpy.run_path(str(checkout / f"{suite}.py"))["TARGETS"]:
            assert target.limit >= 0 and target.bound in ("at most", "at least")
            assert (checkout / f"{target.benchmark}.py").is_file()
