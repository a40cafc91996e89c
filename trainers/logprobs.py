"""Log-probs and entropies of target tokens, straight from hidden states.

Invariant: no more logits than those of ``chunk`` tokens exist at a time, forward and backward (with entropies
twice as much memory), and they are never kept: the backward pass computes them again from the hidden states
and the normaliser that was saved. With a vocabulary of 49,152 and fp32, 4,096 tokens of logits are 0.8 GB; a
chunk of 256 is 50 MB.

Values and gradients are those of ``log_softmax(hidden @ weight.T / temperature)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentgym.errors import UsageError

# Tokens of a tile in the backward pass, in chunks.
TALLER = 8


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
        entropy = torch.empty_like(logp) if with_entropy else None
        head = weight.to(compute)
        tile = _Tile(min(chunk, len(targets)) * len(weight), compute, hidden.device)
        for part in _chunks(len(targets), chunk):
            logits = tile.logits(hidden[part], head, temperature)
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, targets[part, None])
            if entropy is None:
                total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            else:
                # H = log sum(e^z) - sum(z e^z) / sum(e^z), with z below the largest logit.
                odds = torch.exp(logits.sub_(largest), out=tile.second(logits.shape))
                total = odds.sum(1, keepdim=True)
                entropy[part] = (total.log() - odds.mul_(logits).sum(1, keepdim=True) / total).squeeze(1)
            log_total = largest + total.log()
            logp[part] = (chosen - log_total).squeeze(1)
            normaliser[part] = log_total.squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.numbers = temperature, chunk, compute
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        temperature, chunk, compute = ctx.numbers
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        scale = torch.zeros_like(normaliser) if grad_logp is None else grad_logp / temperature
        # Tall tiles of as many logits: every row of tiles adds to all of grad_weight, which is slow.
        height = max(1, min(len(targets), chunk * TALLER))
        width = max(1, chunk * len(weight) // height)
        tile = _Tile(height * min(width, len(weight)), compute, hidden.device)
        for part in _chunks(len(targets), height):
            states = hidden[part].to(compute)
            for words in _chunks(len(weight), width):
                head = weight[words].to(compute)
                log_p = tile.logits(states, head, temperature).sub_(normaliser[part, None])
                # d logp / d logits = onehot - p;  d H / d logits = -p (log p + H)
                if grad_entropy is None:
                    grad = log_p.exp_().mul_(-scale[part, None])
                else:
                    slope = -grad_entropy[part, None] / temperature
                    p = torch.exp(log_p, out=tile.second(log_p.shape))
                    constant = slope * entropy[part, None] - scale[part, None]
                    grad = torch.addcmul(constant, log_p, slope, out=log_p).mul_(p)
                place = targets[part] - words.start
                here = (place >= 0) & (place < len(head))
                grad.scatter_add_(1, place.where(here, 0)[:, None], scale[part].where(here, 0)[:, None])
                low = tile.lowered(grad)
                if grad_hidden is not None:
                    grad_hidden[part] += low @ head
                if grad_weight is not None:
                    _add_product(grad_weight[words], low.T, states)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class _Tile:
    """Memory for one tile of logits, used again for the next: fresh pages cost as much as the arithmetic."""

    def __init__(self, elements: int, compute: torch.dtype, device: torch.device) -> None:
        exact = torch.promote_types(compute, torch.float32)
        self._low = torch.empty(elements, dtype=compute, device=device)
        self._exact = self._low if exact == compute else torch.empty(elements, dtype=exact, device=device)
        self._second: Tensor | None = None

    def logits(self, hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
        """``hidden @ head.T / temperature``, the product in ``compute``."""
        shape = len(hidden), len(head)
        low = torch.mm(hidden.to(head.dtype), head.T, out=_view(self._low, shape))
        logits = low if self._exact is self._low else _view(self._exact, shape).copy_(low)
        return logits if temperature == 1.0 else logits.div_(temperature)

    def second(self, shape: Sequence[int]) -> Tensor:
        """As much memory again."""
        if self._second is None:
            self._second = torch.empty_like(self._exact)
        return _view(self._second, shape)

    def lowered(self, exact: Tensor) -> Tensor:
        """``exact`` in ``compute``."""
        return exact if self._exact is self._low else _view(self._low, exact.shape).copy_(exact)


def _view(memory: Tensor, shape: Sequence[int]) -> Tensor:
    return memory[: math.prod(shape)].view(*shape)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to += left @ right


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
