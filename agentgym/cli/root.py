"""The ``agentgym`` command: a group whose subcommands are imported when they run.

Invariants: ``agentgym --help`` imports no subcommand and no plug-in; an exception becomes an exit code and a
message in one place, :func:`main`; and no traceback reaches a person unless ``AGENTGYM_DEBUG=1`` asks for it.

Exit codes: 0 done; 1 failed, or the reader of the output went away; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

import agentgym
from agentgym import plugins
from agentgym.errors import AgentGymError, JournalError, UsageError, nearest

# Each module agentgym.cli.<name> holds a click command called ``command``.
COMMANDS = {
    "list": "Environments, policies and algorithms that can be named.",
    "play": "Play an environment yourself.",
    "eval": "Evaluate a policy: success with its interval, pass@k, turns, tokens.",
    "train": "Train a policy.",
    "view": "Read the episodes of a run.",
    "serve": "Serve an environment to OpenEnv clients.",
    "mcp": "Serve an environment to MCP clients.",
    "check": "Hold an environment to the contract.",
    "new": "Scaffold an installable environment package.",
    "sandbox": "See and clean up sandboxes; serve them to other machines.",
    "data": "Pre-generate games; see and clear what lies on disk.",
    "bench": "Measure speed on this machine.",
    "doctor": "What this machine can run, and what to do about the rest.",
}


class LazyGroup(click.Group):
    """Built-in commands by name, and those that installed packages declare in ``agentgym.commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, the built-in ones first."""
        return [*COMMANDS, *sorted(plugins.declared("commands").keys() - COMMANDS.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command called ``cmd_name``."""
        if cmd_name in COMMANDS:
            loaded: Any = importlib.import_module(f"agentgym.cli.{cmd_name}").command
        elif cmd_name in plugins.declared("commands"):
            point = plugins.declared("commands")[cmd_name]
            try:
                loaded = point.load()
            except Exception as error:
                raise UsageError(
                    f"the command plug-in {cmd_name!r} ({point.value}) cannot be loaded: {error}",
                    hint="reinstall or remove the package that declares it",
                ) from error
        else:
            return None
        if not isinstance(loaded, click.Command):
            raise UsageError(f"the command {cmd_name!r} is a {type(loaded).__name__}, not a click command")
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        if args and args[0] not in self.list_commands(ctx):
            near = nearest(args[0], self.list_commands(ctx))
            hint = f"did you mean {' or '.join(near)}?" if near else "`agentgym --help` lists the commands"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        rows = list(COMMANDS.items())
        for name in self.list_commands(ctx)[len(COMMANDS) :]:
            rows.append((name, f"(plug-in {plugins.declared('commands')[name].value})"))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(agentgym.__version__, prog_name="agentgym")
def root() -> None:
    """Agentic language-model environments, evaluation and training behind one Gymnasium interface."""


@contextlib.contextmanager
def resumable(command: str, run: Path | None = None) -> Iterator[None]:
    """Say how to go on if the block is interrupted or fails: ``command`` is printed after the message.

    Nothing is said of what going on cannot mend: wrong usage, a journal that cannot be written.

    Args:
        command: What resumes.
        run: Folder of the run; nothing is said before it holds a journal.
    """
    try:
        yield
    except (KeyboardInterrupt, AgentGymError) as error:
        helps = not isinstance(error, (UsageError, JournalError))
        if helps and (run is None or (run / "journal.agj").exists()):
            error.add_note(f"resume with: {command}")
        raise


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    debug = os.environ.get("AGENTGYM_DEBUG", "") not in ("", "0")
    if not debug:
        warnings.showwarning = _show_warning
    try:
        code = root.main(args=arguments, prog_name="agentgym", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would flush the broken stream once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, click.Abort) as error:
        _say(error, "interrupted")
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, AgentGymError):
            _say(error, f"error: {error.message}", error.hint)
        else:
            what = f"{type(error).__name__}: {error}"
            _say(error, f"error: {what}", "set AGENTGYM_DEBUG=1 to see where; if it is ours, report it")
        code = 2 if isinstance(error, UsageError) else 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(error: BaseException, message: str, hint: str = "") -> None:
    print(message, file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    # click turns an interrupt into an Abort; the note stays on what caused it.
    sources = (error, error.__cause__, error.__context__)
    notes = dict.fromkeys(note for source in sources for note in getattr(source, "__notes__", ()))
    for note in notes:
        print(note, file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)
