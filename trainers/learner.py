"""The learner: fp32 master weights, an optimiser, and one way to take a step.

Invariants: the gradient of a step does not depend on how its rows are split into micro-batches; the
log-prob of a token is taken at the temperature it was sampled at; only hidden states of sampled tokens meet
the vocabulary, so full logits never exist.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from agentgym.errors import UsageError
from agentgym.trainers.batch import Batch, Row, collate, distinct, micro_batches
from agentgym.trainers.config import ModelSection, OptimiserSection
from agentgym.trainers.logprobs import token_logprobs
from agentgym.trainers.packing import has_dropout, pack, prepare


class Outputs(NamedTuple):
    """What a model says of a micro-batch, ``[B, T-1]`` each, 0 off the mask.

    Attributes:
        logp: Log-probs of the targets; ``None`` for a critic.
        entropy: Entropies in nats of the distributions they were drawn from, if asked for.
        value: The value head's, of the state before each target; ``None`` without that head.
    """

    logp: Tensor | None
    entropy: Tensor | None = None
    value: Tensor | None = None

    @property
    def log_probs(self) -> Tensor:
        """``logp`` of a model that has a policy head."""
        assert self.logp is not None
        return self.logp


Loss = Callable[[Batch, Outputs], tuple[Tensor, Mapping[str, Tensor]]]
Heads = Literal["policy", "value", "both"]


class Learner:
    """A causal language model that is being trained, as a policy, as a critic, or as both.

    Args:
        model: A Hugging Face causal language model in fp32.
        section: Autocast, adapters, gradient checkpointing.
        optimiser: AdamW's numbers.
        temperature: Of the rollouts; log-probs are taken at it.
        planned_updates: Updates of the whole run, which the learning rate's schedule spans.
        heads: ``policy``: the model's own output layer. ``value``: one number a token, from a linear layer
            that starts at 0. ``both``: both over one trunk.

    Attributes:
        updates: Optimiser steps done.
        scheduled: Those of them that moved the learning rate's schedule.

    Raises:
        UsageError: The model's output layer is more than one matrix.
    """

    def __init__(
        self,
        model: Any,
        section: ModelSection,
        optimiser: OptimiserSection,
        *,
        temperature: float = 1.0,
        planned_updates: int = 0,
        heads: Heads = "policy",
    ) -> None:
        self.model = _with_lora(model, section) if section.lora is not None else model
        self.heads = heads
        if heads != "value":
            _require_plain_head(model)
        if section.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self._packs, self._random = prepare(model), has_dropout(self.model)
        self.device = next(self.model.parameters()).device
        self.temperature, self.planned_updates = temperature, planned_updates
        self.updates = self.scheduled = 0
        self._section, self._optimiser_section = section, optimiser
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.value_head: nn.Linear | None = None
        if heads != "policy":
            self.value_head = _value_head(model).to(self.device)
            self.trainable |= {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        if heads == "value":  # an output layer of its own has nothing to say; a tied one is the embedding
            self.trainable = {n: p for n, p in self.trainable.items() if not n.endswith("lm_head.weight")}
        self.optimiser = torch.optim.AdamW(
            self.trainable.values(),
            lr=optimiser.lr,
            betas=optimiser.betas,
            eps=optimiser.eps,
            weight_decay=optimiser.weight_decay,
            fused=True,
        )

    def step(
        self,
        rows: Sequence[Row],
        loss: Loss,
        *,
        with_entropy: bool = False,
        scheduled: bool = True,
        beside: Sequence[tuple[Sequence[Row], Loss]] = (),
    ) -> dict[str, float]:
        """One optimiser step over ``rows``.

        Args:
            rows: All rows of the step.
            loss: ``(micro-batch, outputs)`` to the micro-batch's share of the loss, divided by global
                constants, and metrics that add up over micro-batches.
            with_entropy: Compute exact entropies.
            scheduled: Move the learning rate's schedule; a step beyond those that were planned does not.
            beside: Further rows, each with a loss of their own, whose gradients are added.

        Returns:
            ``loss/total``, ``grad_norm``, ``lr``, ``tokens``, ``tokens_in_loss``, ``time/update`` and the
            summed metrics. A step whose gradient is not finite is skipped: ``skipped_updates`` is 1.
        """
        started = time.perf_counter()
        totals = self.backward(rows, loss, with_entropy=with_entropy, beside=beside)
        rows = [*rows, *(row for others, _ in beside for row in others)]
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self._optimiser_section.max_grad_norm)
        lr = self.learning_rate
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.updates += 1
        self.scheduled += int(scheduled)
        tokens = sum(len(row) for row in rows)
        seconds = time.perf_counter() - started
        return {
            **totals,
            "grad_norm": float(norm),
            "lr": lr,
            "skipped_updates": 0.0 if finite else 1.0,
            "tokens": float(tokens),
            "tokens_in_loss": float(sum(row.sampled for row in rows)),
            "time/update": seconds,
        }

    def backward(
        self,
        rows: Sequence[Row],
        loss: Loss,
        *,
        with_entropy: bool = False,
        beside: Sequence[tuple[Sequence[Row], Loss]] = (),
    ) -> dict[str, float]:
        """The gradient of :meth:`step`, left in the parameters; return the summed loss and metrics."""
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        totals: dict[str, float] = {"loss/total": 0.0}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Dropout depends on the update alone: a resumed run draws what the uninterrupted one drew.
            torch.manual_seed(self.updates)
            parts = ((batch, of) for chosen, of in ((rows, loss), *beside) for batch in self.batches(chosen))
            for batch, of in parts:
                share, metrics = of(batch, self.forward(batch, with_entropy=with_entropy))
                if share.requires_grad:
                    share.backward()  # type: ignore[no-untyped-call]
                totals["loss/total"] += float(share.detach())
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def score(self, rows: Sequence[Row]) -> Tensor:
        """Log-probs under the present weights, without gradient.

        Returns:
            ``[B, T-1]`` by row index, on the CPU; 0 off the mask.
        """
        return self.judge(rows).log_probs

    @torch.no_grad()
    def judge(self, rows: Sequence[Row], *, with_entropy: bool = False) -> Outputs:
        """All that the heads say under the present weights, without gradient and without dropout.

        Returns:
            ``[B, T-1]`` each by row index, on the CPU; 0 off the mask.
        """
        self.model.eval()
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        shape = max(row.index for row in rows) + 1, max(map(len, rows)) - 1
        said: dict[str, Tensor] = {}
        for batch in self.batches(rows):
            for name, values in self.forward(batch, with_entropy=with_entropy)._asdict().items():
                if values is not None:
                    whole = said.setdefault(name, torch.zeros(shape, dtype=dtype))
                    whole[batch.row.cpu(), : values.shape[1]] = values.cpu()
        return Outputs(said.get("logp"), said.get("entropy"), said.get("value"))

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """The rows in micro-batches of ``micro_batch_tokens``."""
        budget = self._optimiser_section.micro_batch_tokens
        for chosen in micro_batches(rows, budget, packed=self.packs):
            yield collate(chosen).to(self.device)

    @property
    def packs(self) -> bool:
        """Whether rows that begin alike are now read with their beginning once."""
        return self._packs and not (self._random and self.model.training)

    def forward(self, batch: Batch, *, with_entropy: bool = False) -> Outputs:
        """What the heads say of a micro-batch, in fp32, or in fp64 for an fp64 model.

        Equal rows are read once; a dropout mask is theirs together.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        read, place = distinct(batch)
        mask = batch.loss_mask[read]
        logp = entropy = value = None
        with self._autocast():
            states = self._states(base, batch, read, mask)
            if self.heads != "value":
                logp, entropy = token_logprobs(
                    states,
                    base.lm_head.weight,
                    batch.targets[read][mask],
                    temperature=self.temperature,
                    with_entropy=with_entropy,
                )
        if self.value_head is not None:
            value = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            empty = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
            return empty.masked_scatter(mask, values)[place]

        return Outputs(spread(logp), spread(entropy), spread(value))

    def _states(self, base: Any, batch: Batch, read: Tensor, mask: Tensor) -> Tensor:
        """``[K, H]``: the hidden states, after the final norm, that predict the targets of ``mask``."""
        ids, attention = batch.input_ids[read], batch.attention_mask[read]
        if self.packs:
            return pack(ids, attention.sum(1).tolist()).read(base.model, mask)
        hidden: Tensor = base.model(
            input_ids=ids, attention_mask=attention, use_cache=False
        ).last_hidden_state
        return hidden[:, :-1][mask]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full weights by the base model's names, adapters merged, for a policy's ``update_weights``."""
        if self._section.lora is None:
            for name, parameter in self.model.named_parameters():
                yield name, parameter.detach()
            return
        from peft.tuners.lora import LoraLayer

        base: Any = self.model.get_base_model()
        adapted: list[tuple[str, Any]] = [
            (name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)
        ]
        merged = {
            f"{name}.weight": module.get_base_layer().weight.detach()
            + module.get_delta_weight("default").detach()
            for name, module in adapted
        }
        for name, parameter in base.named_parameters():
            plain = name.replace(".base_layer.", ".")
            if "lora_" not in name:
                yield plain, merged.get(plain, parameter.detach())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Trainable weights, the optimiser's moments by parameter name, and counters."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                moments[f"{name}/{key}"] = torch.as_tensor(value)
        weights = {name: p.detach().contiguous() for name, p in self.trainable.items()}
        return weights, moments, {"updates": self.updates, "scheduled": self.scheduled}

    def load_state(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], counters: Mapping[str, Any]
    ) -> None:
        """Inverse of :meth:`state`.

        Raises:
            UsageError: The names are another model's.
        """
        if weights.keys() != self.trainable.keys():
            strange = sorted(weights.keys() ^ self.trainable.keys())[:3]
            raise UsageError(
                f"the checkpoint's weights are another model's: {', '.join(strange)} …",
                hint="resume with the model and adapter settings that the run was started with",
            )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])
        self.optimiser.state.clear()
        for name, parameter in self.trainable.items():
            own = {
                key.removeprefix(f"{name}/"): value.to(parameter.device, copy=True)
                for key, value in moments.items()
                if key.rpartition("/")[0] == name
            }
            if own:
                self.optimiser.state[parameter] = own
        self.updates, self.scheduled = int(counters["updates"]), int(counters["scheduled"])

    @property
    def learning_rate(self) -> float:
        """Of the next update: a linear warm-up, then the schedule, which ends just above 0."""
        section, warmup = self._optimiser_section, self._optimiser_section.warmup_updates
        if self.scheduled < warmup:
            return section.lr * (self.scheduled + 1) / warmup
        done = min(1.0, (self.scheduled - warmup) / max(1, self.planned_updates - warmup))
        if section.schedule == "linear":
            return section.lr * (1.0 - done)
        if section.schedule == "cosine":
            return section.lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return section.lr

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._section.autocast == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _require_plain_head(model: Any) -> None:
    head: Any = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    bare = getattr(head, "bias", None) is None and not hasattr(head, "base_layer")
    if not (isinstance(head, nn.Linear) and bare) or softcap:
        raise UsageError(
            f"log-probs need an output layer that is one matrix, and {type(model).__name__}'s is "
            f"{'soft-capped' if softcap else head}",
            hint="choose a model without a bias or soft-cap on its logits, and no adapter on lm_head",
        )


def _value_head(model: Any) -> nn.Linear:
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _with_lora(model: Any, section: ModelSection) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = section.lora
    assert lora is not None
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
