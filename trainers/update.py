"""The optimiser steps of one collection: minibatches, their loss, and what was seen of it.

Invariant: the loss of an optimiser step is divided by constants that count all of its rows, so that neither
its split into micro-batches nor rows without a gradient, which are not computed, change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from agentgym.policies import models
from agentgym.seeding import derive
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.correction import CorrectionConfig, correction_weights, mismatch_metrics
from agentgym.trainers.covariance import covariance_metrics, covariances, select
from agentgym.trainers.learner import Learner, Loss, Outputs
from agentgym.trainers.method import Method, Step, Term
from agentgym.trainers.policy_loss import PolicyLossConfig, combine_metrics, policy_loss
from agentgym.trainers.run import Run

_SEEN_MEANS = {"approx_kl", "kl_ref", "ratio_mean", "weight_mean", "entropy_mean"}
Seen = Callable[[], dict[str, float]]


def update(
    run: Run,
    methods: Sequence[Method],
    step: Step,
    tokens: Tensor,
    *,
    loss: PolicyLossConfig,
    correction: CorrectionConfig,
    epochs: int,
    minibatches: int,
) -> None:
    """All optimiser steps of a collection; metrics go to ``step.metrics``.

    Args:
        run: Whose learner is updated.
        methods: Whose terms and hooks take part.
        step: The collection.
        tokens: ``[B, T-1]`` advantages.
        loss: Clipping, aggregation, KL, entropy.
        correction: Importance correction between engine and trainer.
        epochs: Passes over the collection.
        minibatches: Optimiser steps a pass.
    """
    # A row whose advantages are all 0 has no gradient unless a penalty acts on it: it is counted in the
    # denominators and not computed.
    acts = bool(loss.kl_coef or loss.entropy_coef) or any(m.acts for m in methods)
    with_entropy = bool(loss.entropy_coef) or any(m.with_entropy for m in methods)
    updates: list[dict[str, float]] = []
    skipped = 0
    # Tokens that the covariance's penalty holds have a gradient without an advantage too.
    held = nothing = torch.zeros_like(step.whole.loss_mask)
    for epoch in range(epochs):
        seed = derive(run.config.seed, "minibatches", step.number, epoch)
        for part, chosen in enumerate(split(step.rows, minibatches, seed)):
            selected, covariance = None, dict[str, float]()
            if loss.covariance is not None:
                selected, covariance = select_tokens(
                    run, step.whole.loss_mask, step.old, chosen, tokens, loss, seed
                )
                held = selected if loss.covariance.kind == "kl" else nothing
            share, seen = make_loss(
                chosen,
                tokens,
                loss=loss,
                correction=correction,
                old=step.old,
                ref=step.ref,
                selected=selected,
                terms=partial(_terms, methods, step, chosen),
            )
            live = [row for row in chosen if acts or bool(tokens[row.index].any() | held[row.index].any())]
            skipped += len(chosen) - len(live)
            beside = [b for m in methods if (b := m.beside(step, epoch, part)) is not None]
            if live or beside:
                result = run.learner.step(live, share, with_entropy=with_entropy, beside=beside)
                updates.append(result | (seen() if live else {}) | covariance)
            for method in methods:
                method.after_update(step, chosen)
    step.metrics["updates_per_step"] = float(len(updates))
    step.metrics["rows_skipped"] = skipped / epochs
    step.metrics |= over_updates(updates)


def make_loss(
    chosen: Sequence[Row],
    tokens: Tensor,
    *,
    loss: PolicyLossConfig,
    correction: CorrectionConfig,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    selected: Tensor | None = None,
    scale: float = 1.0,
    terms: Callable[[Denominators], Sequence[Term]] = lambda denominators: (),
) -> tuple[Loss, Seen]:
    """The loss of one optimiser step over the rows ``chosen``, and a function that tells what it saw.

    Args:
        chosen: Rows of this optimiser step; the denominators count all of them.
        tokens: ``[B, T-1]`` advantages by row index.
        loss: Clipping, aggregation, KL, entropy.
        correction: Importance correction between engine and trainer.
        old: ``[B, T-1]`` log-probs before the update; ``None``: the present ones (on-policy).
        ref: ``[B, T-1]`` log-probs of the reference.
        selected: ``[B, T-1]`` bool; the tokens that ``loss.covariance`` treats apart: see `select_tokens`.
        scale: What the whole loss is multiplied by.
        terms: What methods add, made once for the step's denominators.
    """
    lengths = torch.tensor([row.sampled for row in chosen])
    denominators = Denominators.of(lengths, length_norm=loss.length_norm)
    extra = terms(denominators)
    shares: list[Mapping[str, Tensor]] = []
    pairs: list[tuple[Tensor, Tensor]] = []

    def share(batch: Batch, outputs: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        logp, mask = outputs.log_probs, batch.loss_mask
        width = mask.shape[1]

        def here(x: Tensor) -> Tensor:
            return x[batch.row.cpu(), :width].to(logp.device)

        logp_old = logp.detach() if old is None else here(old)
        value, metrics = policy_loss(
            logp,
            logp_old,
            here(tokens),
            mask,
            config=loss,
            denominators=denominators,
            weights=correction_weights(logp_old, batch.logp_rollout, mask, correction),
            logp_ref=None if ref is None else here(ref),
            entropy=outputs.entropy,
            turn=batch.turn,
            selected=None if selected is None else here(selected),
        )
        shares.append(metrics)
        pairs.append((logp_old[mask], batch.logp_rollout[mask]))
        added: dict[str, Tensor] = {}
        for term in extra:
            addition, more = term(batch, outputs, here)
            value = value + addition
            added |= more
        return value if scale == 1.0 else scale * value, added

    def seen() -> dict[str, float]:
        trainer, engine = (torch.cat(side) for side in zip(*pairs, strict=True))
        everything = torch.ones_like(trainer, dtype=torch.bool)
        metrics = combine_metrics(shares)
        metrics.pop("loss/total", None)  # the learner's own counts the terms too
        # Rows that were not computed are in the denominators, but no mean over tokens has seen them.
        for name in _SEEN_MEANS & metrics.keys():
            metrics[name] *= denominators.tokens / len(trainer)
        return metrics | mismatch_metrics(trainer, engine, everything)

    return share, seen


def select_tokens(
    run: Run,
    whole: Tensor,
    old: Tensor | None,
    chosen: Sequence[Row],
    tokens: Tensor,
    loss: PolicyLossConfig,
    seed: int,
) -> tuple[Tensor, dict[str, float]]:
    """The tokens of one optimiser step that ``loss.covariance`` treats apart, and metrics.

    All of the step's log-probs are needed before the first of its micro-batches: a pass of its own.

    Args:
        run: Whose learner says the present log-probs.
        whole: ``[B, T-1]`` bool; the loss mask of all rows that ``chosen`` may be of, by row index.
        old: ``[B, T-1]`` log-probs of the proximal policy; ``None``: the present ones.
        chosen: Rows of this optimiser step.
        tokens: ``[B, T-1]`` advantages.
        loss: Whose ``covariance`` and clip range.
        seed: Of this optimiser step.

    Returns:
        ``[B, T-1]`` bool by row index of the collection.
    """
    assert loss.covariance is not None
    index = torch.tensor([row.index for row in chosen])
    now = run.learner.score(chosen)[index]
    width = now.shape[1]
    mask, gain = whole[index, :width], tokens[index, :width]
    before = now if old is None else old[index, :width]
    low, high = loss.clip_bounds
    part = select(gain, now, before, mask, loss.covariance, 1 - low, high - 1, seed, rows=index)
    selected = torch.zeros_like(whole)
    selected[index, :width] = part
    return selected, covariance_metrics(covariances(gain, now, mask), part, mask)


def _terms(
    methods: Sequence[Method], step: Step, chosen: Sequence[Row], denominators: Denominators
) -> list[Term]:
    return [t for m in methods if (t := m.term(step, chosen, denominators)) is not None]


def split(rows: Sequence[Row], parts: int, seed: int) -> list[list[Row]]:
    """Rows of each optimiser step of a pass; a trajectory's rows stay together."""
    owners = sorted({row.trajectory for row in rows})
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed)).tolist()
    part = {owners[o]: i * parts // len(order) for i, o in enumerate(order)}
    made: list[list[Row]] = [[] for _ in range(parts)]
    for row in rows:
        made[part[row.trajectory]].append(row)
    return [chosen for chosen in made if chosen]


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimiser steps as one: extremes of extremes, sums of times, means of all else."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for seen in updates for name in seen):
        values = [seen[name] for seen in updates if name in seen]
        if name.endswith("_max"):
            metrics[name] = max(values)
        elif name.endswith("_min"):
            metrics[name] = min(values)
        else:
            metrics[name] = sum(values) / (1 if name.startswith("time/") else len(values))
    return metrics


class Reference:
    """The frozen policy that the KL penalty holds to: the weights that the run started from."""

    def __init__(self, run: Run) -> None:
        section = run.config.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
        model, _ = models.load(run.config.model.name, dtype=torch.float32)
        self._learner = Learner(model, section, run.config.optimiser, temperature=run.learner.temperature)

    def score(self, rows: Sequence[Row]) -> Tensor:
        """``[B, T-1]`` log-probs of the targets."""
        return self._learner.score(rows)
