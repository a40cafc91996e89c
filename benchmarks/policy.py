"""Tokens a second of the transformers policy beside a plain ``generate`` call.

Same model, prompts, sampling and number of new tokens, alternating within one run; the median of the
repeats. The ratio, policy over ``generate``, is what counts; ``cpu_ratio`` is the same for CPU seconds, which
other load on the machine disturbs less.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

PROMPT_TOKENS = 64
NEW_TOKENS = 32


def measure(
    repeats: int = 5, *, model: str = "smollm2", batches: tuple[int, ...] = (8, 32)
) -> dict[str, Any]:
    """Tokens a second at each batch size, and the ratios."""
    import torch

    from agentgym.policies import models
    from agentgym.policies.base import Request, Sampling, TurnView
    from agentgym.policies.transformers import TransformersPolicy

    loaded, tokenizer = models.load(model)
    beside, _ = models.load(model)  # the policy changes how its own model attends
    policy = TransformersPolicy(beside, tokenizer, stop_ids=(), max_batch=max(batches))
    words = tokenizer.encode("You are in a kitchen. You can see a closed door to the north. " * 32)
    view = TurnView("", "", "", 0, ())
    report: dict[str, Any] = {
        "model": policy.name,
        "dtype": str(loaded.dtype),
        "threads": torch.get_num_threads(),
    }
    # The same sampling on both sides: the whole distribution, no end token.
    options = {
        "do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with asyncio.Runner() as runner:
        for size in batches:
            prompts = [words[i : i + PROMPT_TOKENS] for i in range(size)]
            requests = [
                Request(f"{i:03}", tuple(prompt), Sampling(max_tokens=NEW_TOKENS), i, view)
                for i, prompt in enumerate(prompts)
            ]
            ids = torch.tensor(prompts, device=loaded.device)

            def plain(ids: torch.Tensor = ids) -> None:
                loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)

            def ours(requests: list[Request] = requests) -> None:
                runner.run(policy.generate(requests))

            report[f"batch_{size}"] = _compare(plain, ours, size * NEW_TOKENS, repeats)
        runner.run(policy.aclose())
    return report


def _compare(
    plain: Callable[[], None], ours: Callable[[], None], tokens: int, repeats: int
) -> dict[str, float]:
    plain(), ours()
    wall: dict[str, list[float]] = {"generate": [], "policy": []}
    cpu: dict[str, list[float]] = {"generate": [], "policy": []}
    for _ in range(repeats):
        for name, call in (("generate", plain), ("policy", ours)):
            started, spent = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - spent)
    return {
        "generate_tokens_per_second": tokens / statistics.median(wall["generate"]),
        "policy_tokens_per_second": tokens / statistics.median(wall["policy"]),
        "ratio": statistics.median(g / p for g, p in zip(wall["generate"], wall["policy"], strict=True)),
        "cpu_ratio": statistics.median(g / p for g, p in zip(cpu["generate"], cpu["policy"], strict=True)),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
