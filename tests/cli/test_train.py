"""``agentgym train`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from agentgym.cli.root import main
from agentgym.journal import Journal

GIVEN = ["env=agentgym.testing:EchoEnv", "model=tiny"]


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_dry_run_prints_the_config_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("dapo", *GIVEN, "env.kwargs.api_key=hunter22", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["loss"]["clip_high"] == 0.28 and "hunter22" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no algorithm named"),
        (["gropo", *GIVEN], "grpo"),
        (["grpo", *GIVEN, "group_sise=2"], "group_size"),
        (["--resume", "nowhere"], "no run to resume"),
        (["--resume", "evaluated"], "agentgym eval --resume evaluated"),
        (["grpo", "--resume", "nowhere"], "takes the saved config"),
    ],
)
def test_mistakes_are_explained(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Journal.create("evaluated", {"kind": "eval"}).close()
    assert call(*arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and "hint:" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trackers=['wandv']", "wandb"),
        ("env.parser=tag", "tags"),
        ("model=./none", "none"),
        ("env=agentgym.testing:EchoEmv", "EchoEmv"),
    ],
)
def test_what_cannot_be_had_leaves_a_message_and_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, wrong: str, message: str
) -> None:
    folder = tmp_path / "r"
    assert call("grpo", GIVEN[0], f"model={tiny_model}", wrong, "--out", str(folder)) in (1, 2)
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors and "resume with" not in errors
    assert not folder.exists()
