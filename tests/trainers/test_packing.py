"""Shared-prefix packing: what is read once gives the log-probs and gradients of what is read row by row."""

from __future__ import annotations

import functools
import itertools
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentgym.trainers.batch import COPIED, Batch, Row, collate, micro_batches
from agentgym.trainers.config import ModelSection, OptimiserSection
from agentgym.trainers.families import MEMBERS, WORTH, families
from agentgym.trainers.learner import Heads, Learner, Loss
from agentgym.trainers.packing import has_dropout, pack, prepare
from agentgym.trajectory import Segment

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}


def model(family: str = "Llama", dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A tiny random model whose norms keep the precision that they are given."""
    import transformers

    torch.manual_seed(3)
    shape = getattr(transformers, f"{family}Config")(**{**SHAPE, **config})
    made = getattr(transformers, f"{family}ForCausalLM")(shape).to(dtype)

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return torch.as_tensor(self.weight * (x * scale))

    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    return made


def learner(
    family: str = "Llama",
    dtype: torch.dtype = torch.float64,
    *,
    budget: int = 10**6,
    packs: bool | None = None,
    config: dict[str, Any] | None = None,
    heads: Heads = "policy",
    temperature: float = 1.0,
    **section: Any,
) -> Learner:
    """A learner; ``packs=False`` reads its rows padded. A value head says something from the start."""
    torch.manual_seed(3)
    fields = {"name": "tiny", "autocast": "none", **section}
    made = Learner(
        model(family, dtype, **config or {}),
        ModelSection.model_validate(fields),
        OptimiserSection(micro_batch_tokens=budget),
        heads=heads,
        temperature=temperature,
    )
    if made.value_head is not None:
        made.value_head.weight.data.normal_()
    if packs is not None:
        assert made._packs
        made._packs = packs
    return made


@functools.cache
def pair(family: str, dtype: torch.dtype, heads: Heads = "policy") -> tuple[Learner, Learner]:
    packed = learner(family, dtype, packs=True, heads=heads)
    return packed, learner(family, dtype, packs=False, heads=heads)


def row(tokens: Sequence[int], mask: Sequence[bool], index: int) -> Row:
    """Spans of sampled tokens are turns."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    turns = tuple((n, edges[2 * n], edges[2 * n + 1]) for n in range(len(edges) // 2))
    return Row(Segment(list(tokens), list(mask), [-1.0] * len(tokens)), index, index, turns)


@st.composite
def groups(draw: Any) -> list[Row]:
    """Groups that begin alike for 0 to 14 tokens, in part sampled; members may be equal."""
    made: list[Row] = []
    system = draw(st.lists(st.integers(3, 31), max_size=6))
    for _ in range(draw(st.integers(1, 3))):
        prefix = system + draw(st.lists(st.integers(3, 31), max_size=8))
        spoken = draw(st.lists(st.booleans(), min_size=len(prefix), max_size=len(prefix)))
        for _ in range(draw(st.integers(1, 5))):
            rest = draw(st.lists(st.integers(3, 5), min_size=0 if len(prefix) > 1 else 2, max_size=9))
            mask = spoken + draw(st.lists(st.booleans(), min_size=len(rest), max_size=len(rest)))
            mask[-1] = True
            made.append(row(prefix + rest, mask, len(made)))
    return made


def weighted(batch: Batch, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Any loss that tells rows, columns and turns apart, of log-probs and entropies."""
    columns = torch.arange(outputs.logp.shape[1], dtype=outputs.logp.dtype)
    weights = torch.cos(batch.row[:, None] + 0.7 * columns + batch.turn) * batch.loss_mask
    return (weights * (outputs.logp + 0.3 * outputs.entropy)).sum(), {}


def valued(batch: Batch, outputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """As :func:`weighted`, of squared values too; without a policy head of them alone.

    Squares are some hundreds in all, and weights of both signs would cancel them down to fp32's noise.
    """
    columns = torch.arange(outputs.value.shape[1], dtype=outputs.value.dtype)
    weights = (1.5 + torch.sin(1 + batch.row[:, None] + 0.3 * columns)) * batch.loss_mask
    value = (weights * outputs.value**2).sum()
    return value if outputs.logp is None else value + weighted(batch, outputs)[0], {}


def gradient(of: Learner, rows: list[Row], loss_of: Loss = weighted) -> tuple[float, dict[str, Tensor]]:
    loss = of.backward(rows, loss_of, with_entropy=True)["loss/total"]
    return loss, {name: p.grad.clone() for name, p in of.trainable.items() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 0
    for name in one:
        assert float((one[name] - other[name]).abs().max()) <= tolerance * largest, name


def agentic(members: int = 6, shared: int = 30) -> list[Row]:
    """Two groups of several turns, and rows by themselves."""
    random = torch.Generator().manual_seed(5)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 32, (n,), generator=random).tolist()

    made = []
    for _ in range(2):
        prefix = tokens(shared)
        for member in range(members):
            lengths = [3 + member, 4, 2 + member]
            mask = [False] * shared + [i % 2 == 0 for i, n in enumerate(lengths) for _ in range(n)]
            made.append(row(prefix + tokens(sum(lengths)), mask, len(made)))
    return made + [
        row(tokens(n), [False] * 2 + [True] * (n - 2), len(made) + i) for i, n in enumerate((5, 41, 17))
    ]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@given(rows=groups())
@settings(max_examples=40, deadline=None)
def test_packed_equals_row_by_row(family: str, rows: list[Row]) -> None:
    for dtype, tolerance in EXACT.items():
        packed, padded = pair(family, dtype)
        (loss, one), (expected, other) = gradient(packed, rows), gradient(padded, rows)
        assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert_equal(other, one, tolerance)


@pytest.mark.parametrize("heads", ["both", "value"])
@given(rows=groups())
@settings(max_examples=20, deadline=None)
def test_a_value_head_reads_the_same_states(heads: Heads, rows: list[Row]) -> None:
    for dtype, tolerance in EXACT.items():
        packed, padded = pair("Llama", dtype, heads)
        (loss, one), (expected, other) = gradient(packed, rows, valued), gradient(padded, rows, valued)
        assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert {"value_head.weight", "value_head.bias"} <= one.keys()
        assert_equal(other, one, tolerance)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "head_dim": 8},
    ],
    ids=str,
)
def test_any_number_of_key_heads_and_tied_embeddings_pack(config: dict[str, Any]) -> None:
    rows = agentic()
    for dtype, tolerance in EXACT.items():
        packed = learner(dtype=dtype, packs=True, config=config)
        padded = learner(dtype=dtype, packs=False, config=config)
        one, other = gradient(packed, rows)[1], gradient(padded, rows)[1]
        assert ("lm_head.weight" in one) is not config.get("tie_word_embeddings", False)
        assert_equal(other, one, tolerance)


@given(order=st.permutations(range(15)))
@settings(max_examples=10, deadline=None)
def test_what_the_heads_say_of_a_row_depends_on_no_other_row(order: list[int]) -> None:
    """Log-probs at the rollout's temperature, entropies and values, whatever the order and the budget."""
    rows = agentic()
    for dtype, tolerance in EXACT.items():
        of = learner(dtype=dtype, heads="both", temperature=0.7, budget=100, packs=True)
        alone = learner(dtype=dtype, heads="both", temperature=0.7, packs=False)
        said = of.judge([rows[i] for i in order], with_entropy=True)._asdict()
        expected = alone.judge(rows, with_entropy=True)._asdict()
        for name, values in said.items():
            assert values is not None and values.dtype == dtype
            largest = float(expected[name].abs().max())
            assert float((values - expected[name]).abs().max()) <= tolerance * largest > 0, name


def test_a_group_larger_than_a_family_is_read_as_several() -> None:
    prefix = list(range(3, 23))
    rows = [
        row([*prefix, 3 + i // 29, 3 + i % 29, 3, 4], [False] * 20 + [True] * 4, i)
        for i in range(MEMBERS + 9)
    ]
    sizes = [len(f.members) for f in families([tuple(r.segment.token_ids) for r in rows])]
    assert sum(sizes) == len(rows) and max(sizes) <= MEMBERS and len(sizes) > 1
    for dtype, tolerance in EXACT.items():
        packed, padded = pair("Llama", dtype)
        assert_equal(gradient(padded, rows)[1], gradient(packed, rows)[1], tolerance)


def test_a_row_longer_than_the_budget_is_read_whole_and_its_group_beside_it() -> None:
    """Four rows of 70 tokens that share 60, under a budget of 65: each is a micro-batch, none is cut."""
    rows = [
        row([3 + j % 7 for j in range(60)] + [10 + i] * 10, [False] * 60 + [True] * 10, i) for i in range(4)
    ]
    short = row([3, 9, 9, 8], [False, False, True, True], 4)
    of = learner(budget=65)
    read = [batch.attention_mask.sum(1).tolist() for batch in of.batches([*rows, short])]
    assert sorted(read) == [[4], [70], [70], [70], [70]]
    assert_equal(gradient(learner(packs=False), [*rows, short])[1], gradient(of, [*rows, short])[1], 1e-9)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_group_s_prefix_is_read_once_with_equal_gradients(family: str) -> None:
    rows = agentic()
    for dtype, tolerance in EXACT.items():
        packed, padded = learner(family, dtype), learner(family, dtype, packs=False)
        seen: list[Tensor] = []
        packed.model.get_input_embeddings().register_forward_hook(
            lambda _, args, __, to=seen: to.append(args[0])
        )
        assert_equal(gradient(padded, rows)[1], gradient(packed, rows)[1], tolerance)
        assert [len(x) for x in seen] == [1]
        assert seen[0].numel() == sum(map(len, rows)) - 2 * 5 * 30


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_x2_no_number_of_micro_batches_changes_a_gradient(family: str) -> None:
    rows = agentic()
    for dtype, tolerance in EXACT.items():
        whole = gradient(learner(family, dtype, packs=True), rows)[1]
        counts = []
        for budget in (190, 100, 50, 1):
            of = learner(family, dtype, budget=budget)
            counts.append(len(list(of.batches(rows))))
            assert_equal(whole, gradient(of, rows[::-1])[1], tolerance)
        assert counts[0] >= 2 and counts[1] >= 4 and counts[2] >= 8 and counts[3] == len(rows)


def test_x8_right_padding_changes_nothing() -> None:
    of, rows = learner(), agentic()
    batch = collate(rows)

    def widened(name: str) -> Tensor:
        value: Tensor = getattr(batch, name)
        fill = 7 if name == "input_ids" else 0
        return torch.nn.functional.pad(value, (0, 9), value=fill) if value.ndim == 2 else value

    wider = Batch(*map(widened, Batch.__slots__))
    narrow, wide = of.forward(batch, with_entropy=True), of.forward(wider, with_entropy=True)
    for one, other in ((narrow.log_probs, wide.log_probs), (narrow.entropy, wide.entropy)):
        assert one is not None and other is not None
        assert torch.allclose(one, other[:, : one.shape[1]], rtol=0, atol=1e-12)
        assert not other[:, one.shape[1] :].any()


def test_log_probs_are_those_of_full_logits() -> None:
    of, rows = learner(), agentic()
    scored = of.score(rows)
    for r in rows:
        with torch.no_grad():
            logits = of.model(input_ids=torch.tensor([r.segment.token_ids])).logits[0, :-1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(r.segment.token_ids[1:])[:, None])[:, 0]
        expected = torch.where(torch.tensor(r.segment.loss_mask[1:]), exact, 0.0)
        assert torch.allclose(scored[r.index, : len(r) - 1], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("section", [{"gradient_checkpointing": True}, {"lora": {"rank": 2}}])
def test_checkpointed_layers_and_adapters_pack_too(section: dict[str, Any]) -> None:
    rows = agentic()
    packed, padded = learner(packs=True, **section), learner(packs=False, **section)
    if "lora" in section:  # adapters start at 0: move them, so that both matrices have a gradient
        for of in (packed, padded):
            torch.manual_seed(1)
            for p in of.trainable.values():
                p.data = torch.randn_like(p) * 0.1
    assert_equal(gradient(padded, rows)[1], gradient(packed, rows)[1], 1e-9)


def test_under_autocast_packed_and_padded_round_alike() -> None:
    rows = agentic()
    packed = gradient(learner(dtype=torch.float32, autocast="bfloat16", packs=True), rows)[1]
    exact = gradient(learner(dtype=torch.float32, packs=False), rows)[1]
    assert_equal(exact, packed, 0.05)


def test_dropout_is_read_row_by_row_in_training_only() -> None:
    rows = agentic()
    of = learner(lora={"rank": 2, "dropout": 0.5})
    plain = learner(lora={"rank": 2, "dropout": 0.5}, packs=False)
    of.model.train()
    assert not of.packs
    of.model.eval()
    assert of.packs
    assert_equal(gradient(plain, rows)[1], gradient(of, rows)[1], 1e-12)
    assert has_dropout(model(attention_dropout=0.1)) and not has_dropout(model())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mistral", {"sliding_window": 4}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("Llama", {"attn_implementation": "eager"}),
    ],
)
def test_another_attention_is_left_as_it_is(family: str, config: dict[str, Any]) -> None:
    of = learner(family, config=config)
    before = of.model.config._attn_implementation
    assert not of.packs and before in ("sdpa", "eager")
    rows = agentic()
    logp = of.score(rows)
    full = of.model(input_ids=torch.tensor([rows[0].segment.token_ids])).logits[0, :-1].log_softmax(-1)
    exact = full.gather(1, torch.tensor(rows[0].segment.token_ids[1:])[:, None])[:, 0]
    mask = torch.tensor(rows[0].segment.loss_mask[1:])
    assert torch.allclose(logp[0, : len(mask)][mask], exact[mask], rtol=0, atol=1e-10)


def test_a_model_that_mixes_tokens_elsewhere_fails_the_trial() -> None:
    odd = model()
    layer = odd.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + torch.nn.functional.pad(x, (0, 0, 1, -1))  # as a convolution would
    assert not prepare(odd) and odd.config._attn_implementation == "sdpa"


def test_a_prepared_model_is_saved_as_it_came(tmp_path: Path) -> None:
    plain, prepared = model(), model()
    assert prepare(prepared)
    plain.save_pretrained(tmp_path / "plain")
    prepared.save_pretrained(tmp_path / "prepared")
    one, other = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "prepared"))
    assert one == other
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(
        plain(ids, attention_mask=attention).logits, prepared(ids, attention_mask=attention).logits
    )


def cost(rows: list[tuple[int, ...]], cuts: Sequence[int]) -> int:
    """Tokens of consecutive families; one that saves too little shares nothing."""
    tokens = 0
    for start, end in itertools.pairwise([0, *cuts, len(rows)]):
        part = rows[start:end]
        shared = 0
        while all(len(r) > shared for r in part) and len({r[shared] for r in part}) == 1:
            shared += 1
        total, saved = sum(map(len, part)), shared * (len(part) - 1)
        tokens += total - (saved if saved >= WORTH * total else 0)
    return tokens


@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=8))
def test_no_other_families_leave_fewer_tokens(rows: set[tuple[int, ...]]) -> None:
    given_rows = sorted(rows, key=len)
    made = families(given_rows)
    assert sorted(i for family in made for i in family.members) == list(range(len(rows)))
    for family in made:
        assert len({given_rows[i][: family.shared] for i in family.members}) == 1
        assert family.shared or len(family.members) == 1
    read = sum(sum(len(given_rows[i]) for i in f.members) - f.shared * (len(f.members) - 1) for f in made)
    ordered = sorted(rows)
    every = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(rows)), n) for n in range(len(rows))
    )
    assert read == min(cost(ordered, cuts) for cuts in every)


@given(groups(), st.integers(1, 80))
def test_packed_micro_batches_are_a_partition_within_the_budget(rows: list[Row], budget: int) -> None:
    parts = list(micro_batches(rows, budget, packed=True))
    assert sorted(r.index for part in parts for r in part) == list(range(len(rows)))
    for part in parts:
        batch = collate(part)
        different = {tuple(r.segment.token_ids) for r in part}
        read = pack(batch.input_ids, batch.attention_mask.sum(1).tolist()).input_ids.numel()
        assert len(different) == 1 or read <= budget
        assert len(different) == 1 or sum(map(len, different)) <= COPIED * budget


def test_a_group_lies_together_and_its_prefix_counts_once() -> None:
    rows = agentic(members=4, shared=40)

    def together(budget: int) -> list[set[int]]:
        return [{r.index for r in part} for part in micro_batches(rows[::-1], budget, packed=True)]

    assert together(10**6) == [set(range(11))]
    group = 40 + sum(len(r) - 40 for r in rows[:4])
    assert [set(range(4)), set(range(4, 8))] == sorted(together(group)[:2], key=min)
    assert len(list(micro_batches(rows, group))) > len(together(group))
