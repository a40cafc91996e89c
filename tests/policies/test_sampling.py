from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from agentgym.policies.base import Sampling  # noqa: E402
from agentgym.policies.sampling import draw, uniforms  # noqa: E402

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS, count: int = 20_000) -> torch.Tensor:
    """How often each token is drawn over an even grid of uniform numbers: its probability to 1 / count."""
    u = (np.arange(count) + 0.5) / count
    drawn, _ = draw(logits.expand(count, -1), [sampling] * count, u)
    return torch.bincount(drawn, minlength=logits.numel()) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_with_their_probability(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(temperature=temperature)), expected, atol=1e-4, rtol=0)


def test_top_k_keeps_the_k_most_probable() -> None:
    expected = [*torch.tensor([2.0, 1.0]).softmax(-1).tolist(), 0, 0, 0]
    torch.testing.assert_close(frequencies(Sampling(top_k=2)), torch.tensor(expected), atol=1e-4, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    first = LOGITS.softmax(-1)[0].item()  # 0.644
    assert frequencies(Sampling(top_p=first - 0.01)).tolist() == [1, 0, 0, 0, 0]
    assert (frequencies(Sampling(top_p=first + 0.01)) > 0).tolist() == [True, True, False, False, False]


def test_top_p_counts_what_top_k_left() -> None:
    # Of the two that top_k keeps the first has 0.73: 0.7 of what is left is reached by it alone.
    assert frequencies(Sampling(top_k=2, top_p=0.7)).tolist() == [1, 0, 0, 0, 0]
    assert frequencies(Sampling(top_p=0.7))[1] > 0


def test_flat_distribution_wider_than_the_shortcut_keeps_its_nucleus() -> None:
    kept = frequencies(Sampling(top_p=0.5), torch.linspace(0, 0.1, 2600), count=4000) > 0
    assert 1200 < kept.sum() < 1300 and kept[-1200:].all()


def test_greedy_takes_the_most_probable_and_reports_untempered_log_probs() -> None:
    tokens, logps = draw(LOGITS[None], [Sampling(temperature=0)], np.array([0.99]))
    assert tokens.tolist() == [0]
    torch.testing.assert_close(logps, LOGITS.log_softmax(-1)[:1])


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.8}])
def test_log_probs_are_tempered_and_not_truncated(truncation: dict[str, float]) -> None:
    sampling = replace(Sampling(temperature=0.5), **truncation)
    tokens, logps = draw(LOGITS[None], [sampling], np.array([0.95]))
    torch.testing.assert_close(logps, (LOGITS / 0.5).log_softmax(-1)[tokens])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_extreme_numbers_never_draw_an_impossible_token(u: float) -> None:
    logits = torch.cat([torch.tensor([-math.inf]), torch.randn(5000), torch.full((3,), -math.inf)])[None]
    for sampling in (Sampling(), Sampling(top_k=7), Sampling(top_p=0.99)):
        tokens, logps = draw(logits, [sampling], np.array([u]))
        assert 1 <= tokens.item() <= 5000 and logps.isfinite().all()


def test_rare_tokens_can_all_be_drawn() -> None:
    rare, mass, count = 10_000, 1e-6, 200
    logits = torch.zeros(rare + 1)
    logits[0] = math.log(rare * (1 - mass) / mass)  # the others share the mass: 1e-10 each
    u = 1 - mass + mass * (np.arange(count) + 0.5) / count
    tokens, _ = draw(logits.expand(count, -1), [Sampling()] * count, u)
    assert len(set(tokens.tolist())) > count * 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_show_in_the_log_prob(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
    _, logps = draw(logits, [Sampling(temperature=temperature)] * 2, np.array([0.5, 0.5]))
    assert logps.isfinite().tolist() == [False, True]


params = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 10_000]),
)


@given(
    rows=st.lists(st.tuples(params, st.integers(0, 2**63 - 1)), min_size=1, max_size=6), ties=st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_a_row_does_not_depend_on_the_others(rows: list[tuple[Sampling, int]], ties: bool) -> None:
    logits = torch.randn(len(rows), 2000, generator=torch.Generator().manual_seed(len(rows)))
    logits = logits.round() if ties else logits
    u = np.array([uniforms(seed, 1)[0] for _, seed in rows])
    together, logps = draw(logits, [p for p, _ in rows], u)
    for i, (p, _) in enumerate(rows):
        alone, logp = draw(logits[i : i + 1], [p], u[i : i + 1])
        assert alone.item() == together[i].item()
        torch.testing.assert_close(logp, logps[i : i + 1])


def test_random_numbers_belong_to_seed_and_position() -> None:
    assert (uniforms(7, 4) == uniforms(7, 9)[:4]).all()
    assert not set(uniforms(7, 100)) & set(uniforms(8, 100))
    assert uniforms(2**63 - 1, 1).shape == (1,)
    many = np.concatenate([uniforms(seed, 10) for seed in range(2000)])
    assert abs(many.mean() - 0.5) < 0.01 and abs((many < 0.1).mean() - 0.1) < 0.01
