"""How likely a model finds the gold answer after each turn: mean log-probs of its tokens, without gradient.

Invariant: a score depends on the model, the context's tokens and the wrapped answer alone, not on what
follows the context nor on how contexts are packed; equal contexts are scored once, so that their scores are
equal to the last bit. The three forms differ in packing only and agree to rounding:

==============  ==========================================================================================
``sequential``  one forward a context
``batched``     contexts side by side, right-padded, within a budget of tokens
``masked``      each trajectory's tokens once: the answer's copies stand behind the longest context and are
                read together under a block mask; each attends to a prefix of the context and to itself,
                and its positions go on from that prefix's end (IGPO, arXiv 2510.14967)
==============  ==========================================================================================

Contexts of a trajectory are prefixes of one another until a template forks or a layout opens a segment a
turn; ``masked`` finds out by the tokens, and gives a row to each context that no other one goes on from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agentgym.errors import UsageError
from agentgym.trainers.logprobs import token_logprobs
from agentgym.trainers.packing import ATTENTION
from agentgym.trajectory import Trajectory

Form = Literal["masked", "batched", "sequential"]


@dataclass(frozen=True, slots=True)
class WrappedAnswer:
    """A gold answer as the policy would close with it.

    Attributes:
        text: The answer alone.
        token_ids: Of opening, answer and closing, up to the answer's last token: what follows that one is
            tokenised with it, and then no causal model lets it reach back.
        gold: Indices in ``token_ids`` of the answer's tokens, ascending.
    """

    text: str
    token_ids: tuple[int, ...]
    gold: tuple[int, ...]


def wrap_answer(tokenizer: Any, answer: str, *, prefix: str, suffix: str) -> WrappedAnswer:
    """Tokenise ``prefix + answer + suffix`` in one piece and find the answer's tokens by their characters.

    A token that holds characters of the answer and of its wrapper counts as the answer's.

    Args:
        tokenizer: A Hugging Face tokenizer that tells offsets (a "fast" one).
        answer: The gold answer.
        prefix: What opens it, e.g. a closing thought and ``<answer>``.
        suffix: What closes it.

    Raises:
        UsageError: The tokenizer tells no offsets, or the answer has no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, and the gold "
            "answer's tokens are found by that",
            hint="load the model with its fast tokenizer: its folder needs a tokenizer.json",
        )
    encoded = tokenizer(prefix + answer + suffix, add_special_tokens=False, return_offsets_mapping=True)
    begin, end = len(prefix), len(prefix) + len(answer)
    offsets = encoded["offset_mapping"]
    gold = tuple(i for i, (first, past) in enumerate(offsets) if first < end and past > begin)
    if not answer.strip() or not gold:
        raise UsageError(
            f"the gold answer {answer!r} has no tokens", hint="leave out tasks whose answer is empty"
        )
    return WrappedAnswer(answer, tuple(encoded["input_ids"][: gold[-1] + 1]), gold)


def turn_contexts(trajectory: Trajectory) -> list[tuple[int, ...]]:
    """What the policy had read when each turn's completion began; one a turn, token for token.

    The first is the prompt alone, the next one ends with the first turn's result and the generation prompt.

    Raises:
        UsageError: A turn has no tokens.
    """
    made: list[tuple[int, ...]] = []
    for turn in trajectory.turns:
        start = turn.span[0]
        if start <= 0 or turn.segment >= len(trajectory.segments):
            raise UsageError(
                f"turn {turn.index} of trajectory {trajectory.id} has no prompt tokens",
                hint="only token trajectories can be scored; agentgym.trainers.batch.tokenize makes them",
            )
        made.append(tuple(trajectory.segments[turn.segment].token_ids[:start]))
    return made


class Query(NamedTuple):
    """How likely is ``answer`` after ``context``?"""

    context: tuple[int, ...]
    answer: WrappedAnswer


@torch.no_grad()
def score_answers(
    model: Any,
    queries: Sequence[Query],
    *,
    form: Form = "masked",
    temperature: float = 1.0,
    token_budget: int = 4096,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Mean log-prob of each query's gold tokens under the model's present weights, in eval mode.

    Args:
        model: A Hugging Face causal language model whose output layer is one matrix; peft adapters count.
        queries: ``Q`` of them.
        form: How they are packed.
        temperature: That the log-probs are taken at; 1 is the model's own distribution.
        token_budget: Padded tokens of a forward; a longer row has one of its own. ``masked`` adds a mask of
            (tokens of copies) x (row length) elements a row.
        autocast: Lower precision of the forward, e.g. ``torch.bfloat16``.

    Returns:
        ``[Q]`` float64 on the CPU, means over the gold tokens; a score may be infinite or NaN where the
        model's are.

    Raises:
        UsageError: A context is empty, or the model's attention cannot take the mask of ``masked``.
    """
    if not all(query.context for query in queries):
        raise UsageError("a context is empty", hint="a prompt has at least one token")
    if form == "masked":
        _require_maskable(model)
    places: dict[tuple[bytes, tuple[int, ...], tuple[int, ...]], int] = {}
    distinct: list[Query] = []
    slots: list[int] = []
    for query in queries:
        key = (_key(query.context), query.answer.token_ids, query.answer.gold)
        if key not in places:
            places[key] = len(distinct)
            distinct.append(query)
        slots.append(places[key])
    scores = torch.zeros(len(distinct), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for rows in _packed(distinct, form, token_budget):
            for index, score in _forward(model, rows, form, temperature, autocast):
                scores[index] = score
    finally:
        model.train(was_training)
    return scores[torch.tensor(slots, dtype=torch.long)]


@dataclass(frozen=True, slots=True)
class _Row:
    """A context, and behind it the copies of answers: ``(index of the query, context length, answer)``."""

    context: tuple[int, ...]
    copies: list[tuple[int, int, WrappedAnswer]]

    def __len__(self) -> int:
        # The last gold token is predicted and never read.
        return len(self.context) + sum(len(answer.token_ids) - 1 for _, _, answer in self.copies)


def _key(context: Sequence[int]) -> bytes:
    # Big-endian words: comparing bytes orders contexts as comparing their tokens does, and much faster.
    return np.asarray(context, dtype=">u4").tobytes()


def _packed(queries: Sequence[Query], form: Form, token_budget: int) -> Iterator[list[_Row]]:
    rows: list[_Row] = []
    if form == "masked":
        # Extensions of a context come right before it in descending order: if any row continues it, the
        # newest one does.
        keys = [_key(query.context) for query in queries]
        longest = None
        for index in sorted(range(len(queries)), key=keys.__getitem__, reverse=True):
            context, answer = queries[index]
            if longest is None or not longest.startswith(keys[index]):
                longest = keys[index]
                rows.append(_Row(context, []))
            rows[-1].copies.append((index, len(context), answer))
    else:
        rows = [_Row(q.context, [(i, len(q.context), q.answer)]) for i, q in enumerate(queries)]
    current: list[_Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if current and (form == "sequential" or len(current[0]) * (len(current) + 1) > token_budget):
            yield current
            current = []
        current.append(row)
    if current:
        yield current


def _forward(
    model: Any, rows: Sequence[_Row], form: Form, temperature: float, autocast: torch.dtype | None
) -> Iterator[tuple[int, float]]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.lm_head.weight.device
    # Of each gold token: row and column of the state that predicts it, and the token.
    where: list[tuple[int, int, int]] = []
    owners: list[tuple[int, int]] = []
    behind = max(len(row.context) for row in rows) if form == "masked" else 0
    for r, row in enumerate(rows):
        start = behind or len(row.context)
        for index, prefix, answer in row.copies:
            where += [(r, start + g - 1 if g else prefix - 1, answer.token_ids[g]) for g in answer.gold]
            owners.append((index, len(answer.gold)))
            start += len(answer.token_ids) - 1
    at = torch.tensor(where, dtype=torch.long, device=device)
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        if form == "masked":
            hidden = _read_masked(base.model, rows, autocast or base.dtype, device)
        else:
            ids, real = _padded([(*row.context, *row.copies[0][2].token_ids[:-1]) for row in rows], device)
            hidden = base.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        logp, _ = token_logprobs(
            hidden[at[:, 0], at[:, 1]], base.lm_head.weight, at[:, 2], temperature=temperature
        )
    parts = torch.split(logp.double().cpu(), [count for _, count in owners])
    for (index, _), part in zip(owners, parts, strict=True):
        yield index, float(part.mean())


def _read_masked(trunk: Any, rows: Sequence[_Row], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[B, W + C, H]``: states of the contexts, ``W`` wide, and of all copies behind them.

    The contexts are read first, by the fast causal attention that takes no mask; the copies then attend to
    their keys and values. So no token is read twice, and the mask has C rows, not W + C.
    """
    # Right padding comes after all that is real: a causal model needs no mask for it.
    contexts, _ = _padded([row.context for row in rows], device)
    first = trunk(input_ids=contexts, use_cache=True)
    reads = [[(prefix, answer.token_ids[:-1]) for _, prefix, answer in row.copies] for row in rows]
    copies, _ = _padded([[t for _, read in own for t in read] for own in reads], device)
    width, more = contexts.shape[1], copies.shape[1]
    if not more:
        return first.last_hidden_state  # type: ignore[no-any-return]
    positions = np.zeros((len(rows), more), np.int64)
    seen = np.zeros((len(rows), more, width + more), np.bool_)
    for r, own in enumerate(reads):
        start = 0
        for prefix, read in own:
            end = start + len(read)
            positions[r, start:end] = np.arange(prefix, prefix + len(read))
            seen[r, start:end, :prefix] = True
            seen[r, start:end, width + start : width + end] = np.tri(len(read), dtype=np.bool_)
            start = end
        seen[r, start:, 0] = True  # padding has to see something, or its softmax is NaN
    allowed = torch.from_numpy(seen).to(device)[:, None]
    # eager and sdpa both add the mask to the scores
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    second = trunk(
        input_ids=copies,
        attention_mask=mask.masked_fill_(~allowed, torch.finfo(dtype).min),
        position_ids=torch.from_numpy(positions).to(device),
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    return torch.cat([first.last_hidden_state, second.last_hidden_state], 1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ``[B, T]`` token ids, and 1 where they are real."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    real = np.zeros_like(ids)
    for r, row in enumerate(rows):
        ids[r, : len(row)], real[r, : len(row)] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)


def _require_maskable(model: Any) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = bool(kinds - {"full_attention"}) or (not kinds and getattr(config, "sliding_window", None))
    attention = config._attn_implementation
    if windowed or attention not in ("sdpa", "eager", ATTENTION):
        reason = f"layers with {', '.join(sorted(kinds)) or 'a sliding window'}" if windowed else attention
        raise UsageError(
            f"the block mask of form='masked' needs full attention by sdpa or eager, and "
            f"{type(model).__name__} has {reason}",
            hint="choose form='batched', which any model can take",
        )
