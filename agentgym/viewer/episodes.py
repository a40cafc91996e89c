"""Episodes as something to read: a list of them, one turn by turn, and the tokens as the model saw them.

Invariant: what an environment or a policy wrote is shown as text alone (:mod:`agentgym.viewer.terminal`), in
the order it happened, and whole; a reward is shown only where the outcome allows one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentgym.messages import Content, TextPart, text_of
from agentgym.trajectory import Segment, Trajectory, Turn
from agentgym.viewer.terminal import printable, untrusted

Decode = Callable[[Sequence[int]], str]
Decoder = Callable[[], Decode | None]

CONTEXT = "dim"
SAMPLED = "bold green"
UNLIKELY = "bold yellow"
# Below one in ten: the sampler, not the model's first choice, decided here.
_UNLIKELY_LOGP = -2.302585
_BROKEN = "\ufffd"


def summary(trajectory: Trajectory) -> tuple[str, ...]:
    """One line of the list: id, task, outcome, success, reward, turns, sampled tokens."""
    outcome = "running" if trajectory.outcome is None else str(trajectory.outcome)
    valid = trajectory.valid
    return (
        trajectory.id,
        trajectory.task_id,
        outcome,
        ("solved" if trajectory.success else "-") if valid else "",
        f"{trajectory.reward:g}" if valid else "",
        str(len(trajectory.turns)),
        str(trajectory.sampled_tokens or ""),
    )


def index(trajectories: Iterable[Trajectory], *, marked: int | None = None) -> Table:
    """A table of episodes.

    Args:
        trajectories: In the order of the rows.
        marked: Row to highlight.
    """
    table = Table("episode", "task", "outcome", "success", box=None, pad_edge=False, header_style="bold")
    for name in ("reward", "turns", "tokens"):
        table.add_column(name, justify="right")
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for row, trajectory in enumerate(trajectories):
        cells = [untrusted(cell, width=80) for cell in summary(trajectory)]
        cells[2].stylize("" if trajectory.valid else "red")
        cells[3].stylize("green")
        table.add_row(*cells, style="reverse" if row == marked else "")
    return table


def episode(trajectory: Trajectory) -> Group:
    """One episode, turn by turn."""
    shown: list[RenderableType] = [_head(trajectory)]
    opening = text_of(trajectory.turns[0].observation) if trajectory.turns else ""
    if trajectory.instruction not in opening:
        shown.append(untrusted(trajectory.instruction, "italic"))
    for turn in trajectory.turns:
        shown += _turn(turn)
    if trajectory.final_observation:
        shown += [
            Rule(Text("after the last turn"), align="left", style="dim"),
            *_content(trajectory.final_observation),
        ]
    shown += [Rule(style="dim"), _end(trajectory)]
    return Group(*shown)


def tokens(trajectory: Trajectory, decoder: Decoder) -> Group:
    """The token sequences of one episode, sampled tokens coloured.

    Args:
        trajectory: The episode.
        decoder: Called if there are tokens; gives the text of token ids, or ``None``: ids are shown.
    """
    shown: list[RenderableType] = [_head(trajectory)]
    if not trajectory.segments:
        shown.append(Text("no tokens: the policy speaks text"))
        return Group(*shown)
    decode = decoder()
    legend = Text().append("context ", CONTEXT)
    legend.append("sampled ", SAMPLED).append("sampled at less than 10 %", UNLIKELY)
    if decode is None:
        legend.append("  ids: the tokenizer cannot be had, name one with --model", "red")
    shown.append(legend)
    for number, segment in enumerate(trajectory.segments):
        title = f"segment {number}: {len(segment)} tokens, {sum(segment.loss_mask)} sampled"
        shown += [Rule(Text(title), align="left", style="cyan"), _segment(segment, decode)]
    return Group(*shown)


def _head(trajectory: Trajectory) -> Text:
    head = untrusted(trajectory.id, "bold")
    facts = [trajectory.env_id, trajectory.task_id, trajectory.split, f"seed {trajectory.env_seed}"]
    if trajectory.attempt:
        facts.append(f"attempt {trajectory.attempt + 1}")
    return head.append_text(untrusted("  " + "  ".join(filter(None, facts))))


def _turn(turn: Turn) -> Iterator[RenderableType]:
    start, end = turn.span
    facts = [f"turn {turn.index + 1}"]
    if turn.reward:
        facts.append(f"reward {turn.reward:+g}")
    if not turn.valid_action:
        facts.append("not understood")
    if end > start:
        facts.append(f"{end - start} tokens")
    if turn.finish_reason != "stop":
        facts.append(f"finish: {turn.finish_reason}")
    facts += [f"{name} {seconds:.2f} s" for name, seconds in turn.seconds.items() if seconds >= 0.005]
    yield Rule(untrusted("  ".join(facts)), align="left", style="cyan" if turn.valid_action else "yellow")
    yield from _content(turn.observation)
    yield untrusted("> ", "bold").append_text(untrusted(turn.completion, "bold green"))
    if turn.action != turn.completion:
        yield untrusted("action: ", "dim").append_text(
            untrusted(turn.action or "none could be read", "green")
        )


def _content(content: Content) -> Iterator[Text]:
    for part in content:
        if isinstance(part, TextPart):
            yield untrusted(part.text)
        else:
            yield untrusted(f"[{part.media_type}, {len(part.data)} bytes, sha256 {part.digest[:12]}]", "dim")


def _end(trajectory: Trajectory) -> Text:
    _, _, outcome, success, reward, turns, sampled = summary(trajectory)
    facts = [
        outcome,
        success.replace("-", "not solved"),
        f"reward {reward}" if reward else "",
        f"{turns} turns",
    ]
    facts.append(f"{sampled} tokens sampled" if sampled else "")
    facts += [f"{name} {value:g}" for name, value in trajectory.scores.items()]
    end = untrusted("  ".join(filter(None, facts)), "bold")
    if trajectory.outcome is not None and trajectory.outcome.detail:
        end.append_text(untrusted(f"\n{trajectory.outcome.detail}", "red"))
    return end


def _segment(segment: Segment, decode: Decode | None) -> Text:
    text = Text()
    for start, end, piece in _pieces(segment, decode):
        if not segment.loss_mask[start]:
            style = CONTEXT
        else:
            style = UNLIKELY if min(segment.logp_rollout[start:end]) < _UNLIKELY_LOGP else SAMPLED
        text.append(printable(piece), style)
    return text


def _pieces(segment: Segment, decode: Decode | None) -> Iterator[tuple[int, int, str]]:
    """``(start, end, text)``: a run of context tokens, or as few sampled ones as make whole characters."""
    ids, mask = segment.token_ids, segment.loss_mask
    start = 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and not mask[start] and not mask[end]:
            end += 1
        if decode is None:
            yield start, end, "".join(f"{token} " for token in ids[start:end])
        else:
            # A character may be spelled with up to four tokens.
            while (
                _BROKEN in (piece := decode(ids[start:end])) and mask[start] and end < len(ids) and mask[end]
            ):
                if end - start == 4:
                    break
                end += 1
            yield start, end, piece
        start = end
