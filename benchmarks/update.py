"""Speed and peak memory of one GRPO update beside TRL's, and what exact entropies cost.

Each side runs in a process of its own, TRL's in the environment that `make peers` makes, and they take turns
within one run. The same on both: model (SmolLM2, random weights), token ids, advantages, loss (clipped,
mean over tokens, then over rows), AdamW, clipping of gradients, micro-batch (all rows at once), bf16 autocast
over fp32 weights, gradient checkpointing (TRL's default), number of threads. TRL's side is its own
``training_step`` on prepared inputs and its optimiser's step: no generation, no rewards. Both report
entropies. Loss and gradient norm are in the report: they must agree, or the times mean nothing.

Ratios are medians over pairs of turns; ``cpu_ratio`` counts CPU seconds, which other load disturbs less.
Memory is ``VmHWM`` of a fresh process after two updates; ``growth_ratio`` leaves out what it held before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent.parent / "build" / "peers" / "bin" / "python"
MODEL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
ROWS = 8
# Tokens of the prompt, whether all rows share it, and the lengths of what was sampled and observed, in turn.
SHAPES: dict[str, tuple[int, bool, list[int]]] = {
    "independent": (128, False, [128]),
    "agentic": (768, True, [40, 24, 40, 24, 40, 24, 40, 24]),
    "memory": (512, False, [512]),
}
LR, CLIP = 1e-6, 1.0


def measure(repeats: int = 5, agentic_repeats: int = 3) -> dict[str, Any]:
    """Tokens a second, ratios, peak memory and the cost of entropies.

    Raises:
        RuntimeError: TRL's environment is missing, or a side ended early.
    """
    if not PEERS.exists():
        raise RuntimeError(f"there is no {PEERS}: run `make peers` first")
    report: dict[str, Any] = {"layers": MODEL["num_hidden_layers"]}
    for shape, turns in (("independent", repeats), ("agentic", agentic_repeats)):
        sides = Side("ours", shape), Side("trl", shape)
        report[shape] = _compare(*sides, turns)
        report["threads"] = {side.name: side.ready["threads"] for side in sides}
        report["versions"] = {side.name: side.ready["versions"] for side in sides}
    report["entropy"] = _entropy(Side("ours", "independent"), repeats)
    report["memory"] = _memory()
    return report


class Side:
    """A process that makes an update whenever it is told to.

    Args:
        name: ``ours`` or ``trl``.
        shape: Of :data:`SHAPES`.
    """

    def __init__(self, name: str, shape: str) -> None:
        python = str(PEERS) if name == "trl" else sys.executable
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-P", __file__, name, shape],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.name, self.shape = name, shape
        self.ready = self._answer()

    def tell(self, what: str) -> dict[str, Any]:
        """Seconds, loss, gradient norm and memory of one more update."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the side {self.name} ended early: {last}")


def _compare(ours: Side, trl: Side, repeats: int) -> dict[str, Any]:
    first = {side.name: side.tell("step") for side in (ours, trl)}  # warm-up, and the same weights
    pairs = []
    for turn in range(repeats):
        order = (ours, trl) if turn % 2 else (trl, ours)
        pairs.append({side.name: side.tell("step") for side in order})
    for side in (ours, trl):
        side.end()
    prompt, _, turns = SHAPES[ours.shape]
    tokens = ROWS * (prompt + sum(turns))

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return round(statistics.median(value(pair) for pair in pairs), 3)

    return {
        "tokens": tokens,
        "ours_tokens_per_second": median(lambda pair: tokens / pair["ours"]["wall"]),
        "trl_tokens_per_second": median(lambda pair: tokens / pair["trl"]["wall"]),
        "ratio": median(lambda pair: pair["trl"]["wall"] / pair["ours"]["wall"]),
        "cpu_ratio": median(lambda pair: pair["trl"]["cpu"] / pair["ours"]["cpu"]),
        "wall": {name: [round(pair[name]["wall"], 2) for pair in pairs] for name in ("ours", "trl")},
        "cpu": {name: [round(pair[name]["cpu"], 2) for pair in pairs] for name in ("ours", "trl")},
        "loss": {name: answer["loss"] for name, answer in first.items()},
        "grad_norm": {name: answer["grad_norm"] for name, answer in first.items()},
        "memory": _peaks(*((side, pairs[-1][side.name]["peak"]) for side in (ours, trl))),
    }


def _entropy(ours: Side, repeats: int) -> dict[str, Any]:
    """Steps whose loss has an exact, differentiable entropy bonus, beside steps without entropies."""
    ours.tell("entropy")
    pairs = []
    for turn in range(repeats):
        order = ("entropy", "plain") if turn % 2 else ("plain", "entropy")
        pairs.append({what: ours.tell(what) for what in order})
    ours.end()
    return {
        "cost": round(statistics.median(p["entropy"]["wall"] / p["plain"]["wall"] - 1 for p in pairs), 4),
        "cpu_cost": round(statistics.median(p["entropy"]["cpu"] / p["plain"]["cpu"] - 1 for p in pairs), 4),
        "wall": {what: [round(p[what]["wall"], 2) for p in pairs] for what in ("entropy", "plain")},
        "cpu": {what: [round(p[what]["cpu"], 2) for p in pairs] for what in ("entropy", "plain")},
    }


def _memory() -> dict[str, Any]:
    """Peaks at 8 x 1,024 tokens of prompts that share nothing, one process at a time."""
    peaks = []
    for name in ("ours", "trl"):
        side = Side(name, "memory")
        side.tell("step")
        peaks.append((side, side.tell("step")["peak"]))
        side.end()
    return _peaks(*peaks)


def _peaks(ours: tuple[Side, int], trl: tuple[Side, int]) -> dict[str, Any]:
    """MiB, and ratios."""
    grown = [peak - side.ready["before"] for side, peak in (ours, trl)]
    return {
        **{side.name: {"peak": peak, "before": side.ready["before"]} for side, peak in (ours, trl)},
        "ratio": round(ours[1] / trl[1], 3),
        "growth_ratio": round(grown[0] / grown[1], 3),
    }


# The sides ----------------------------------------------------------------------------------


def serve(name: str, shape: str) -> None:
    """Answer each line of stdin with an update."""
    import torch

    update = {"ours": ours, "trl": trl}[name](shape)
    packages = ("torch", "transformers", "trl" if name == "trl" else "agentgym-llm")
    versions = {package: metadata.version(package) for package in packages}
    _say({"threads": torch.get_num_threads(), "before": _status("VmRSS"), "versions": versions})
    for line in sys.stdin:
        started, spent = time.perf_counter(), time.process_time()
        loss, norm = update(line.strip())
        seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - spent}
        _say({**seconds, "loss": loss, "grad_norm": norm, "peak": _status("VmHWM")})


def ours(shape: str) -> Callable[[str], tuple[float, float]]:
    """AgentGym's learner."""
    import torch

    from agentgym.trainers.aggregation import Denominators
    from agentgym.trainers.batch import Row
    from agentgym.trainers.config import ModelSection, OptimiserSection
    from agentgym.trainers.learner import Learner
    from agentgym.trainers.policy_loss import PolicyLossConfig, policy_loss
    from agentgym.trajectory import Segment

    ids, mask, prompt, advantages = _batch(shape)
    rows = []
    for i, tokens in enumerate(ids.tolist()):
        sampled = [False] * prompt + mask[i].bool().tolist()
        edges = [j for j in range(1, len(sampled) + 1) if (j < len(sampled) and sampled[j]) != sampled[j - 1]]
        turns = tuple((n, *edges[2 * n : 2 * n + 2]) for n in range(len(edges) // 2))
        rows.append(Row(Segment(tokens, sampled, [0.0] * len(tokens)), i, i, turns))
    learner = Learner(
        _model(),
        ModelSection(name="smollm2", autocast="bfloat16", gradient_checkpointing=True),
        OptimiserSection(lr=LR, max_grad_norm=CLIP, micro_batch_tokens=ids.numel()),
    )
    denominators = Denominators.of(torch.tensor([row.sampled for row in rows]))

    def update(what: str) -> tuple[float, float]:
        bonus = 0.001 if what == "entropy" else 0.0
        config = PolicyLossConfig(aggregation="seq-mean-token-mean", entropy_coef=bonus)

        def loss(batch: Any, outputs: Any) -> Any:
            made = policy_loss(
                outputs.logp, outputs.logp.detach(), advantages[batch.row, None].expand_as(outputs.logp),
                batch.loss_mask, config=config, denominators=denominators, entropy=outputs.entropy,
            )  # fmt: skip
            return made[0], {}

        done = learner.step(rows, loss, with_entropy=what != "plain")
        return done["loss/total"], done["grad_norm"]

    return update


def trl(shape: str) -> Callable[[str], tuple[float, float]]:
    """TRL's GRPOTrainer, with completions and advantages that are given."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    ids, mask, prompt, advantages = _batch(shape)
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=True, gradient_checkpointing=True,
        per_device_train_batch_size=ROWS, num_generations=ROWS, gradient_accumulation_steps=1,
        max_completion_length=ids.shape[1] - prompt, loss_type="grpo", beta=0.0, epsilon=0.2,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP,
        report_to=[], logging_steps=1, save_strategy="no",
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[PAD]"))
    trainer = GRPOTrainer(
        model=_model(),
        args=arguments,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * ROWS}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]"
        ),
    )
    # What Trainer.train() does before its loop.
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.optimizer = model, optimizer
    trainer.current_gradient_accumulation_steps = 1
    trainer._prepare_inputs = lambda inputs: inputs
    completion = ids[:, prompt:]
    inputs = {
        "prompt_ids": ids[:, :prompt], "prompt_mask": torch.ones(ROWS, prompt, dtype=torch.long),
        "completion_ids": completion, "completion_mask": torch.ones_like(completion),
        "tool_mask": mask, "advantages": advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip

    def update(what: str) -> tuple[float, float]:
        loss = trainer.training_step(model, dict(inputs), None)
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad()
        return float(loss), float(norm)

    return update


def _model() -> Any:
    """The same weights whatever the version of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**MODEL)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def _batch(shape: str) -> tuple[Any, Any, int, Any]:
    """Token ids ``[8, T]``, mask of what was sampled after the prompt, the prompt's length, advantages."""
    import torch

    prompt, shared, turns = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, MODEL["vocab_size"], (ROWS, prompt + sum(turns)), generator=generator)
    if shared:
        ids[:, :prompt] = ids[0, :prompt]
    sampled = [int(i % 2 == 0) for i, length in enumerate(turns) for _ in range(length)]
    return ids, torch.tensor([sampled] * ROWS), prompt, torch.linspace(-1.0, 1.5, ROWS)


def _status(key: str) -> int:
    """A line of ``/proc/self/status``, in MiB; ``VmHWM`` is this process's alone, unlike ``ru_maxrss``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) // 1024
    return 0


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if len(sys.argv) > 1:
        serve(*sys.argv[1:])
    else:
        print(json.dumps(measure(), indent=2))
