"""``agentgym eval``: run a policy on a sample of tasks and say how good it is, and how sure that is."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentgym.cli.options import STACK_FIELDS, given, key_values, stack_options
from agentgym.cli.output import messages, reserved_stdout, results, show, write_json
from agentgym.cli.root import resumable
from agentgym.errors import UsageError
from agentgym.redaction import MASK

if TYPE_CHECKING:
    from rich.console import Console

    from agentgym.evaluation.report import Report
    from agentgym.evaluation.run import EvaluationConfig
    from agentgym.trajectory import Trajectory
    from agentgym.wrappers.stack import EnvConfig

SAMPLING_FIELDS = ("temperature", "top_p", "max_tokens")
ROLLOUT_FIELDS = ("concurrency", "layout", "system")
EVALUATION_FIELDS = ("split", "episodes", "samples", "seed", "attempts")
MAX_TOKENS = 64
# A policy that no environment understands would play for ever.
MAX_TURNS = 100


@dataclass(slots=True)
class Evaluation:
    """Everything a run of ``agentgym eval`` is."""

    env: EnvConfig
    policy: str
    config: EvaluationConfig
    out: Path
    policy_options: dict[str, Any] = field(default_factory=dict)
    resume: bool = False


@click.command("eval", context_settings={"allow_extra_args": True})
@click.argument("id", required=False)
@click.option(
    "--policy",
    metavar="NAME",
    help="expert (or oracle), nop, random, a plug-in, or a model: folder, hub name, smollm2.",
)
@click.option("--split", metavar="NAME", help="Default: the family's.")
@click.option(
    "--episodes",
    type=click.IntRange(1),
    help="Number of episodes.  [default: the family's, often 100]",
)
@click.option("--samples", type=click.IntRange(1), help="Episodes on each task, for pass@k.  [default: 1]")
@click.option("--seed", type=click.IntRange(0), help="Draws the tasks; roots every other seed.  [default: 0]")
@stack_options
@click.option("--policy-option", "policy_pairs", multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option(
    "--temperature", type=click.FloatRange(0), help="Default: 0 for one sample a task, 1 for several."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus mass.")
@click.option("--max-tokens", type=click.IntRange(1), help=f"Longest completion.  [default: {MAX_TOKENS}]")
@click.option("--layout", type=click.Choice(["chat", "turn"]), help="One conversation, or a prompt a turn.")
@click.option("--system", metavar="TEXT", help="System message; how to answer is added.")
@click.option("--like", type=click.Path(path_type=Path), help="Take the environment and limits of this run.")
@click.option("--concurrency", type=click.IntRange(1), help="Episodes alive at once.  [default: 16]")
@click.option("--deterministic", is_flag=True, default=None, help="Equal samples whatever the timing.")
@click.option(
    "--attempts", type=click.IntRange(1), help="Runs of an episode that infrastructure fails.  [default: 3]"
)
@click.option(
    "--max-failure-rate", type=click.FloatRange(0, 1), default=0.05, show_default=True,
    help="Exit with 1 if infrastructure lost a larger share.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; default runs/eval-TIME.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder.")
@click.option("--against", type=click.Path(path_type=Path), help="Compare with this run, paired by task.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--markdown", is_flag=True, help="A Markdown table on stdout.")
@click.pass_context
def command(
    context: click.Context,
    /,
    max_failure_rate: float,
    against: Path | None,
    as_json: bool,
    markdown: bool,
    **options: Any,
) -> None:
    """Evaluate a policy on tasks of the environment ID.

    Tasks are a seeded sample of the split without replacement. An episode ends after 100 turns if
    --max-turns says nothing else. The run is recorded and can be resumed; `agentgym view` shows its episodes.
    """
    from agentgym import journal

    if context.args:
        raise UsageError(
            f"{context.args[0]!r} is one argument too many",
            hint="arguments of the environment are given as --env KEY=VALUE",
        )
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    with reserved_stdout():
        wanted = _resumed(options) if options["resume"] else _new(options)
        if against is not None:
            journal.header(against)  # A mistyped folder must not cost a whole evaluation.
        report = _run(wanted)
        document, incomparable = report.to_json(), None
        if against is not None:
            try:
                document["difference"] = _difference(against, wanted.out, report.seed)
            except UsageError as error:  # said below: the evaluation itself is done
                incomparable = error
    if as_json:
        write_json(document)
    elif markdown:
        click.echo(report.markdown(), nl=False)
    else:
        _print(results(), report, document.get("difference"))
    if incomparable is not None:
        raise incomparable
    if report.failure_rate > max_failure_rate or report.success is None:
        _complain(messages(), report, max_failure_rate, wanted.out)
        raise SystemExit(1)


def _new(options: Mapping[str, Any]) -> Evaluation:
    """A new evaluation: what was typed over what ``--like`` names over the defaults."""
    from agentgym.evaluation.run import EvaluationConfig
    from agentgym.policies.base import Sampling
    from agentgym.registry import families
    from agentgym.rollout.engine import RolloutConfig
    from agentgym.wrappers.stack import EnvConfig

    stack, rollout = _like(options["like"]) if options["like"] else ({}, {})
    if options["id"] is None and "id" not in stack:
        raise click.UsageError("name an environment; `agentgym list` shows them")
    if options["policy"] is None:
        raise click.UsageError("name a policy: --policy expert, random, or a model")
    kwargs = {**stack.get("kwargs", {}), **key_values(options["env_options"])}
    id = _full(options["id"]) if options["id"] else stack["id"]
    env = EnvConfig(**{**stack, **given(options, STACK_FIELDS), "id": id, "kwargs": kwargs})
    if env.max_turns is None:
        env = replace(env, max_turns=MAX_TURNS)
    samples = options["samples"] or 1
    sampling = {
        "max_tokens": MAX_TOKENS,
        **rollout.pop("sampling", {}),
        "temperature": 0.0 if samples == 1 else 1.0,
        **given(options, SAMPLING_FIELDS),
    }
    rollout = {
        **rollout,
        **given(options, (*ROLLOUT_FIELDS, "deterministic")),
        "sampling": Sampling(**sampling),
    }
    chosen = given(options, EVALUATION_FIELDS)
    if "episodes" not in chosen and (family := families().get(id)) is not None:
        chosen["episodes"] = family.episodes
    config = EvaluationConfig(**chosen, rollout=RolloutConfig(**rollout))
    out = options["out"] or _free_folder()
    return Evaluation(env, options["policy"], config, out, key_values(options["policy_pairs"]))


def _resumed(options: Mapping[str, Any]) -> Evaluation:
    """The evaluation that an interrupted run's header describes."""
    from agentgym import journal
    from agentgym.evaluation.run import EvaluationConfig
    from agentgym.wrappers.stack import EnvConfig

    out = options["resume"]
    header = journal.header(out)
    if header.get("kind") != "eval":
        raise UsageError(f"the run in {out} is no evaluation", hint=f"agentgym train --resume {out}?")
    env = EnvConfig.from_json(header["env"])
    kwargs = {**env.kwargs, **key_values(options["env_options"])}
    # What was typed again must agree with the run; evaluate() compares.
    env = replace(env, kwargs=kwargs, **given(options, STACK_FIELDS))
    if options["id"]:
        env = replace(env, id=_full(options["id"]))
    chosen = {**header.get("policy_options", {}), **key_values(options["policy_pairs"])}
    for option, values in (("--env", kwargs), ("--policy-option", chosen)):
        for key in (k for k, v in values.items() if v == MASK):
            raise UsageError(
                f"{key} is a secret and was not saved with the run", hint=f"add {option} {key}=…"
            )
    config = EvaluationConfig.from_json(header["evaluation"])
    rollout = replace(
        config.rollout,
        sampling=replace(config.rollout.sampling, **given(options, SAMPLING_FIELDS)),
        **given(options, (*ROLLOUT_FIELDS, "deterministic")),
    )
    config = replace(config, rollout=rollout, **given(options, EVALUATION_FIELDS))
    policy = options["policy"] or header["policy"]
    return Evaluation(env, policy, config, out, chosen, resume=True)


def _full(id: str) -> str:
    """``id`` as reports give it, the namespace included; an import path stays."""
    from agentgym.registry import resolve

    return id if ":" in id and not id.startswith("agentgym:") else resolve(id)


def _like(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The environment and the rollout settings of another run, an evaluation or a training run."""
    import dataclasses

    from agentgym import journal
    from agentgym.policies.base import Sampling
    from agentgym.wrappers.stack import EnvConfig

    header = journal.header(run)
    if header.get("kind") == "eval":
        rollout = dict(header["evaluation"]["rollout"])
        return dict(header["env"]), _without(rollout, "seed", "deterministic")
    config = header.get("config", {})
    if not {"env", "rollout"} <= config.keys():
        raise UsageError(
            f"the run in {run} names no environment", hint="name an evaluation or a training run"
        )
    known = {f.name for f in dataclasses.fields(EnvConfig)}
    stack = {name: value for name, value in config["env"].items() if name in known}
    sampled = {f.name for f in dataclasses.fields(Sampling)}
    rollout = _without(config["rollout"], "deterministic")
    sampling = {name: rollout.pop(name) for name in sampled & rollout.keys()}
    return stack, {**rollout, "sampling": {**sampling, "stop": tuple(sampling.get("stop", ()))}}


def _run(wanted: Evaluation) -> Report:
    from agentgym.evaluation.run import evaluate
    from agentgym.policies import PolicyContext, make_policy

    console = messages()
    answers = {"parser": wanted.env.parser, "parser_options": dict(wanted.env.parser_options)}
    options = {**answers, **wanted.policy_options}
    context = PolicyContext(wanted.env.id, dict(wanted.env.kwargs), options)
    with console.status(f"loading {wanted.policy}"):
        policy = make_policy(wanted.policy, context)
    again = f"agentgym eval --resume {shlex.quote(str(wanted.out))}"
    try:
        with resumable(again, wanted.out), _Watch(console, wanted.config.episodes) as watch:
            return evaluate(
                wanted.env,
                policy,
                wanted.config,
                out=wanted.out,
                resume=wanted.resume,
                name=wanted.policy,
                policy_options=wanted.policy_options,
                on_episode=watch.episode,
            )
    finally:
        asyncio.run(policy.aclose())


class _Watch:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, episodes: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._total = console, episodes
        self._done = self._won = 0
        self._every = max(1, episodes // 10)
        self._bar = Progress(
            TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[success]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=episodes, success="")

    def __enter__(self) -> _Watch:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def episode(self, trajectory: Trajectory) -> None:
        """Count an episode that ended."""
        self._done += 1
        self._won += trajectory.success
        success = f"success {100 * self._won / self._done:.0f} %"
        self._bar.update(self._task, completed=self._done, success=success)
        if not self._console.is_terminal and self._done % self._every == 0:
            self._console.print(f"{self._done} of {self._total} episodes, {success}")


def _difference(against: Path, out: Path, seed: int) -> dict[str, Any]:
    from agentgym import journal
    from agentgym.evaluation.report import compare

    mean, low, high, tasks = compare(journal.load(against).values(), journal.load(out).values(), seed=seed)
    return {"run": str(against), "mean": mean, "ci95": [low, high], "tasks": tasks}


def _print(console: Console, report: Report, difference: Mapping[str, Any] | None) -> None:
    show(console, report.table())
    if difference is not None:
        mean, (low, high) = 100 * difference["mean"], difference["ci95"]
        console.print(
            f"{mean:+.1f} points of success against {difference['run']}, 95 % interval "
            f"{100 * low:+.1f} to {100 * high:+.1f}, on {difference['tasks']} shared tasks",
            soft_wrap=True,
        )
    console.print(f"\nread the episodes: agentgym view {report.run}", soft_wrap=True)


def _complain(console: Console, report: Report, limit: float, out: Path) -> None:
    from agentgym import journal
    from agentgym.viewer.terminal import untrusted

    console.print(
        f"error: infrastructure lost {report.infra_failed} of {report.episodes} episodes, "
        f"more than the {100 * limit:g} % that --max-failure-rate allows"
    )
    reasons = {t.outcome.detail: None for t in journal.load(out).values() if t.outcome and not t.valid}
    for reason in itertools.islice(reasons, 3):
        console.print(untrusted(f"  {reason}"), soft_wrap=True)
    console.print(f"hint: mend the cause, then agentgym eval --resume {out}", soft_wrap=True)


def _free_folder() -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names: Iterator[str] = itertools.chain([stamp], (f"{stamp}-{n}" for n in itertools.count(2)))
    return next(path for name in names if not (path := Path("runs") / f"eval-{name}").exists())


def _without(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in names}
