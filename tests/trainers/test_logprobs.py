"""Log-probs and entropies from hidden states equal the naive computation, and logits never pile up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentgym.errors import UsageError
from agentgym.trainers.logprobs import token_logprobs

H, V, N = 8, 37, 23


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
def test_values_and_gradients_equal_the_naive_computation(chunk, temperature):
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(
        hidden, weight, targets, temperature=temperature, with_entropy=True, chunk=chunk
    )
    expected, expected_entropy = naive(hidden, weight, targets, temperature)
    assert entropy is not None
    assert torch.allclose(logp, expected, atol=1e-12, rtol=0)
    assert torch.allclose(entropy, expected_entropy, atol=1e-12, rtol=0)
    direction = torch.linspace(-1, 2, N, dtype=torch.float64)
    ours = torch.autograd.grad((direction * logp + direction.flip(0) * entropy).sum(), (hidden, weight))
    theirs = torch.autograd.grad(
        (direction * expected + direction.flip(0) * expected_entropy).sum(), (hidden, weight)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_gradients_equal_finite_differences():
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets[:4], temperature=0.7, with_entropy=True, chunk=3),
        (hidden[:4].detach().requires_grad_(), weight),
    )


def test_the_same_on_a_real_model(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    ids = torch.arange(4, 40).view(2, 18)
    logits = model(input_ids=ids).logits[:, :-1]
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    logp, _ = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:], chunk=7)
    assert torch.allclose(logp, expected, atol=1e-12, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(logp.sum(), parameters)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)


def test_uniform_logits_have_the_entropy_of_the_vocabulary_and_a_sure_one_has_none():
    hidden = torch.tensor([[0.0], [400.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([2, 0]), with_entropy=True)
    assert entropy is not None
    assert torch.allclose(entropy, torch.tensor([4.0, 1.0], dtype=torch.float64).log(), atol=1e-12)
    assert logp[1] == 0


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_more_than_a_chunk_of_logits_ever_exists():
    hidden = torch.randn(640, 4).requires_grad_()
    weight = torch.randn(1000, 4).requires_grad_()
    with LargestTensor() as seen:
        logp, entropy = token_logprobs(
            hidden, weight, torch.zeros(640, dtype=torch.long), with_entropy=True, chunk=16
        )
        assert entropy is not None
        (logp + entropy).sum().backward()
    assert seen.elements == 16 * 1000


def test_under_autocast_the_projection_runs_in_bfloat16_and_the_softmax_in_float32():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = token_logprobs(hidden, weight, targets)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16 and logp.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logp, expected, atol=1e-6)
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    exact = torch.autograd.grad(naive(hidden, weight, targets, 1.0)[0].sum(), hidden)[0]
    assert torch.allclose(hidden.grad, exact, atol=0.05 * float(exact.abs().max()))


def test_a_frozen_output_layer_gets_no_gradient():
    hidden, weight, targets = inputs()
    logp, _ = token_logprobs(hidden, weight.detach(), targets)
    logp.sum().backward()
    assert hidden.grad is not None


def test_no_targets_at_all():
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(hidden[:0], weight, targets[:0], with_entropy=True)
    assert entropy is not None and logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_misaligned_targets_are_refused_with_the_alignment():
    hidden, weight, targets = inputs()
    with pytest.raises(UsageError, match=r"hidden\[:, :-1\] predicts"):
        token_logprobs(hidden, weight, targets[1:])


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"chunk": 0}])
def test_numbers_that_cannot_be_are_refused(fields):
    hidden, weight, targets = inputs()
    with pytest.raises(UsageError, match="must be positive"):
        token_logprobs(hidden, weight, targets, **fields)


@pytest.mark.parametrize("use", ["logp", "entropy", "neither"])
def test_what_the_loss_does_not_use_has_no_gradient(use):
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(hidden, weight, targets, with_entropy=True, chunk=5)
    expected, expected_entropy = naive(hidden, weight, targets, 1.0)
    chosen, theirs = {"logp": (logp, expected), "entropy": (entropy, expected_entropy)}.get(
        use, (0 * logp, 0 * expected)
    )
    assert chosen is not None
    ours = torch.autograd.grad(chosen.sum(), (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(theirs.sum(), (hidden, weight)), strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_many_tiles_of_bfloat16_add_up_in_float32():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(200, 16, generator=generator).requires_grad_()
    weight = torch.randn(300, 16, generator=generator).requires_grad_()
    targets = torch.randint(300, (200,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = token_logprobs(hidden, weight, targets, with_entropy=True, chunk=3)
    assert entropy is not None
    ours = torch.autograd.grad((logp + entropy).sum(), (hidden, weight))
    exact, exact_entropy = naive(hidden, weight, targets, 1.0)
    theirs = torch.autograd.grad((exact + exact_entropy).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 0.01 * float(b.norm())
