"""Seconds of scoring a gold answer after each of eight turns: block-masked beside one forward a turn.

Random weights in two shapes, contexts that grow by about a hundred tokens a turn; the forms alternate within
one run and the median of the repeats counts. ``ratio`` is sequential over masked for one trajectory;
``cpu_ratio`` the same for CPU seconds, which other load on the machine disturbs less; ``group_ratio`` is for
four trajectories that share their prompt, whose score of it is taken once in either form.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

TURNS = 8
PROMPT, TURN = 100, 100
WRAPPER, GOLD = 8, 6
GROUP = 4
SHAPES = {
    "pocket": {
        "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 6,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip


def measure(repeats: int = 3, *, shapes: Sequence[str] = tuple(SHAPES)) -> dict[str, Any]:
    """Seconds of both forms, their ratio and the largest difference of their scores, for each shape."""
    import torch

    report: dict[str, Any] = {"turns": TURNS, "threads": torch.get_num_threads(), "dtype": "torch.float32"}
    for name in shapes:
        report[name] = _compare(name, repeats)
    report["ratio"] = min(report[name]["ratio"] for name in shapes)
    report["cpu_ratio"] = min(report[name]["cpu_ratio"] for name in shapes)
    return report


def _compare(name: str, repeats: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agentgym.trainers.answer_scoring import Form, Query, WrappedAnswer, score_answers

    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPES[name]
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=True, **shape)
    model = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    answer = WrappedAnswer(
        "gold", tuple(_tokens(WRAPPER + GOLD, draw)), tuple(range(WRAPPER, WRAPPER + GOLD))
    )
    prompt = _tokens(PROMPT, draw)
    group: list[list[Query]] = []
    for _ in range(GROUP):
        # Turns of unequal lengths, a hundred tokens in the mean.
        lengths = [TURN + 10 * (turn % 3 - 1) for turn in range(TURNS - 1)]
        ids = prompt + _tokens(sum(lengths), draw)
        ends = [PROMPT + sum(lengths[:turn]) for turn in range(TURNS)]
        group.append([Query(tuple(ids[:end]), answer) for end in ends])

    forms: tuple[Form, ...] = ("sequential", "batched", "masked")
    one, all_of_them = group[0], [query for own in group for query in own]
    wall: dict[str, list[float]] = {form: [] for form in forms}
    cpu: dict[str, list[float]] = {form: [] for form in forms}
    groups: dict[str, list[float]] = {form: [] for form in forms}
    scores = {form: score_answers(model, one, form=form) for form in forms}
    for _ in range(repeats):
        for form in forms:
            started, spent = time.perf_counter(), time.process_time()
            score_answers(model, one, form=form)
            wall[form].append(time.perf_counter() - started)
            cpu[form].append(time.process_time() - spent)
    for _ in range(min(repeats, 1)):
        for form in ("sequential", "masked"):
            started = time.perf_counter()
            score_answers(model, all_of_them, form=form)
            groups[form].append(time.perf_counter() - started)
    return {
        **{f"{form}_seconds": statistics.median(wall[form]) for form in forms},
        "ratio": _ratio(wall),
        "cpu_ratio": _ratio(cpu),
        "group_ratio": _ratio(groups),
        "largest_difference": float((scores["masked"] - scores["sequential"]).abs().max()),
    }


def _tokens(count: int, draw: Any) -> list[int]:
    import torch

    ids: list[int] = torch.randint(3, 2000, (count,), generator=draw).tolist()
    return ids


def _ratio(seconds: dict[str, list[float]]) -> float:
    pairs = zip(seconds["sequential"], seconds["masked"], strict=True)
    return statistics.median(sequential / masked for sequential, masked in pairs)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
