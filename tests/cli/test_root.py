"""The command itself: names, exit codes, messages, plug-ins, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import click
import pytest

import agentgym as package
from agentgym import plugins
from agentgym.cli import root
from agentgym.errors import JournalError, MissingDependency, StorageFailed, UsageError

Run = Callable[..., Any]


def raising(error: BaseException) -> click.Command:
    @click.command("raising")
    def command() -> None:
        raise error

    return command


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[[click.Command | str], None]:
    """Declare the plug-in command ``extra``: an object of this test, or an import path."""

    def declare(command: click.Command | str) -> None:
        value = command if isinstance(command, str) else f"{__name__}:extra"
        point = EntryPoint("extra", value, "agentgym.commands")
        if not isinstance(command, str):
            monkeypatch.setitem(sys.modules, __name__, type("module", (), {"extra": command}))
        monkeypatch.setattr(
            plugins, "declared", lambda group: {"extra": point} if group == "commands" else {}
        )

    return declare


def test_help_names_every_command_and_imports_none(piped: Run) -> None:
    code = (
        "import sys\n"
        "try:\n"
        "    from agentgym.cli import main; main(['--help'])\n"
        "except SystemExit: pass\n"
        "commands = [m for m in sys.modules if m.startswith('agentgym.cli.')]\n"
        "print(commands, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['agentgym.cli.root'] False"
    for name in root.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", [*root.COMMANDS])
def test_every_command_explains_itself_without_heavy_imports(name: str) -> None:
    code = (
        "import sys\n"
        "try:\n"
        f"    from agentgym.cli import main; main([{name!r}, '--help'])\n"
        "except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'textworld'} & sys.modules.keys()\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split("\n")[:2] == ["0", "set()"]
    assert "Usage: agentgym" in done.stdout


def test_version(agentgym: Run) -> None:
    assert package.__version__ in agentgym("--version").out


def test_an_unknown_command_names_the_near_one(agentgym: Run) -> None:
    result = agentgym("evel")
    assert result.code == 2 and "did you mean eval" in result.err
    assert "agentgym --help" in agentgym("zzzzzz").err


def test_a_wrong_option_is_a_usage_error(agentgym: Run) -> None:
    result = agentgym("list", "--jsn")
    assert result.code == 2 and "--json" in result.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no such thing", hint="try another"), 2, "error: no such thing\nhint: try another\n"),
        (MissingDependency("torch", "train"), 1, "agentgym-llm[train]"),
        (StorageFailed("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (ZeroDivisionError("of ours"), 1, "error: ZeroDivisionError: of ours\nhint: set AGENTGYM_DEBUG=1"),
        (click.ClickException("from click"), 1, "Error: from click"),
        (SystemExit(3), 3, ""),
    ],
)
def test_errors_become_exit_codes_and_messages(
    agentgym: Run, declare: Run, error: BaseException, code: int, message: str
) -> None:
    declare(raising(error))
    result = agentgym("extra")
    assert result.code == code
    assert message in result.err
    assert result.out == ""


def test_debug_shows_where(
    declare: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTGYM_DEBUG", "1")
    declare(raising(UsageError("no such thing")))
    with pytest.raises(SystemExit):
        root.main(["extra"])
    err = capfd.readouterr().err
    assert "Traceback" in err and "error: no such thing" in err


def test_what_resumes_is_said_once_the_run_exists(agentgym: Run, declare: Run, tmp_path: Any) -> None:
    @click.command("extra")
    @click.argument("fails")
    def command(fails: str) -> None:
        with root.resumable("agentgym eval --resume here", tmp_path / "run"):
            raise {
                "interrupt": KeyboardInterrupt(),
                "disk": StorageFailed("full"),
                "usage": UsageError("the run in here has another seed"),
                "lock": JournalError("another process writes this run"),
            }[fails]

    declare(command)
    assert "resume" not in agentgym("extra", "interrupt").err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.agj").touch()
    for fails in ("interrupt", "disk"):
        assert agentgym("extra", fails).err.count("resume with: agentgym eval --resume here") == 1
    for helpless in ("usage", "lock"):
        assert "resume with" not in agentgym("extra", helpless).err


def test_a_plugged_in_command_is_listed_and_run(agentgym: Run, declare: Run) -> None:
    @click.command("extra")
    def command() -> None:
        click.echo("hello")

    declare(command)
    assert ["extra", "(plug-in", f"{__name__}:extra)"] in [
        line.split() for line in agentgym("--help").out.splitlines()
    ]
    assert agentgym("extra").out == "hello\n"


@pytest.mark.parametrize(
    "path", ["no_such_module:command", "agentgym.errors:nothing", "agentgym.errors:UsageError"]
)
def test_a_broken_plug_in_is_named_and_hides_nothing(agentgym: Run, declare: Run, path: str) -> None:
    declare(path)
    assert "list" in agentgym("--help").out
    result = agentgym("extra")
    assert result.code == 2 and "extra" in result.err


def test_a_warning_is_one_line(agentgym: Run, declare: Run) -> None:
    @click.command("extra")
    def command() -> None:
        import warnings

        warnings.simplefilter("default")
        warnings.warn("a plug-in failed", stacklevel=1)

    declare(command)
    assert agentgym("extra").err == "warning: a plug-in failed\n"


def test_a_reader_that_went_away_is_no_error() -> None:
    command = f"{sys.executable} -c 'from agentgym.cli import main; main([\"--help\"])' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_terminal_that_knows_ascii_alone_gets_question_marks(piped: Run) -> None:
    result = piped("doctor", "--no-network", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert result.code == 0 and "? " in result.out
    assert "locale" in result.out and "LC_ALL=C.UTF-8" in result.out
