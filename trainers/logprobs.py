"""Log-probs and entropies of target tokens, straight from hidden states.

Invariant: at most ``chunk`` rows of logits exist at a time, forward and backward, and they are never kept:
the backward pass computes them again from the hidden states and the normaliser that was saved. With a
vocabulary of 49,152 and fp32, 4,096 tokens of logits are 0.8 GB; a chunk of 256 is 50 MB.

Values and gradients are those of ``log_softmax(hidden @ weight.T / temperature)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentgym.errors import UsageError


class TokenLogprobs(NamedTuple):
    """Log-probs of the targets, and the entropies in nats of the distributions they were drawn from."""

    logp: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int = 256,
) -> TokenLogprobs:
    """Log-probs of targets under a linear output layer without bias.

    Select the positions that are in the loss first (``hidden[:, :-1][mask]``): observation tokens then cost
    no vocabulary projection, and what stands there is never read.

    Args:
        hidden: ``[..., H]``; the states that predict the targets, after the final norm.
        weight: ``[V, H]``; the output layer's weight.
        targets: ``[...]`` integer; the tokens predicted.
        temperature: Of sampling; logits are divided by it.
        with_entropy: Compute exact entropies too, differentiable.
        chunk: Tokens whose logits exist at a time.

    Returns:
        ``[...]`` each; float32 (float64 for float64 inputs). Under autocast, or with half-precision inputs,
        the projection runs in the lower precision and the softmax in float32.

    Raises:
        UsageError: Shapes do not fit, or the temperature or chunk is not positive.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise UsageError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
            "do not fit: [..., H], [V, H] and [...] were expected",
            hint="hidden[:, :-1] predicts input_ids[:, 1:]",
        )
    if temperature <= 0 or chunk <= 0:
        raise UsageError(
            f"temperature {temperature} and chunk {chunk} must be positive",
            hint="greedy rollouts are scored at temperature 1: that is what their log-probs are",
        )
    device = hidden.device.type
    # A custom function runs outside autocast: its type is settled here and hidden and weight are cast to it.
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    flat = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
    with torch.autocast(device, enabled=False):
        logp, entropy = _TokenLogprobs.apply(*flat, temperature, with_entropy, chunk, compute)  # type: ignore[no-untyped-call]
    return TokenLogprobs(
        logp.view(targets.shape), entropy.view(targets.shape) if entropy is not None else None
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk: int,
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        exact = torch.promote_types(compute, torch.float32)
        logp = hidden.new_empty(len(targets), dtype=exact)
        normaliser = torch.empty_like(logp)
        entropy = torch.empty_like(logp)
        head = weight.to(compute)
        for part in _chunks(len(targets), chunk):
            logits = _logits(hidden[part], head, temperature, exact)
            normaliser[part] = logits.logsumexp(1)
            logp[part] = logits.gather(1, targets[part, None]).squeeze(1) - normaliser[part]
            if with_entropy:
                entropy[part] = normaliser[part] - (logits.softmax(1) * logits).sum(1)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.numbers = temperature, chunk, compute
        return logp, entropy if with_entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        temperature, chunk, compute = ctx.numbers
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        head = weight.to(compute)
        scale = grad_logp / temperature
        for part in _chunks(len(targets), chunk):
            log_p = _logits(hidden[part], head, temperature, normaliser.dtype).sub_(normaliser[part, None])
            # d logp / d logits = onehot - p;  d H / d logits = -p (log p + H)
            if grad_entropy is None:
                grad = log_p.exp_().mul_(-scale[part, None])
            else:
                factor = (log_p + entropy[part, None]).mul_(grad_entropy[part, None] / temperature)
                grad = log_p.exp_().mul_(factor.add_(scale[part, None]).neg_())
            grad.scatter_add_(1, targets[part, None], scale[part, None])
            low = grad.to(compute)
            if grad_hidden is not None:
                grad_hidden[part] = (low @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += low.T @ hidden[part].to(compute)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, head: Tensor, temperature: float, exact: torch.dtype) -> Tensor:
    logits = (hidden.to(head.dtype) @ head.T).to(exact)
    return logits if temperature == 1.0 else logits.div_(temperature)
