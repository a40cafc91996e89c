from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from agentgym.errors import ContextExceeded, PolicyFailed, UsageError  # noqa: E402
from agentgym.policies import models  # noqa: E402
from agentgym.policies.base import Completion, Request, Sampling, TurnView  # noqa: E402
from agentgym.policies.transformers import TransformersPolicy  # noqa: E402

VIEW = TurnView("", "", "", 0, ())
PROMPTS = [(5, 6, 7), (9,), tuple(range(3, 90)), (40, 41, 42, 43), tuple(range(100, 130)), (5, 6, 7)]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    # In fp64 other rows in the batch change nothing that the fp32 sampler can see.
    return models.load(tiny_model, dtype=torch.float64, device="cpu")


@pytest.fixture
def policy(loaded: tuple[Any, Any]) -> Iterator[TransformersPolicy]:
    policy = TransformersPolicy(*loaded, stop_ids=())
    yield policy
    asyncio.run(policy.aclose())


@pytest.fixture
def own(loaded: tuple[Any, Any]) -> Iterator[TransformersPolicy]:
    """A policy whose model a test may break."""
    policy = TransformersPolicy(copy.deepcopy(loaded[0]), loaded[1], stop_ids=())
    yield policy
    asyncio.run(policy.aclose())


def request(prompt: tuple[int, ...], seed: int = 0, **sampling: Any) -> Request:
    return Request(f"{seed}", prompt, Sampling(**{"max_tokens": 8, **sampling}), seed, VIEW)


def generate(policy: TransformersPolicy, *requests: Request) -> list[Completion]:
    return asyncio.run(policy.generate(requests))


def same(one: Completion, other: Completion) -> bool:
    return (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


async def busy(policy: TransformersPolicy) -> None:
    """Return once the worker has taken a call in."""
    while not policy._running:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class Passes(list[Any]):
    """Records the shapes of forward passes: ``(rows, tokens, logits kept)``."""

    def __init__(self, policy: TransformersPolicy) -> None:
        policy.model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.append((*kwargs["input_ids"].shape, output.logits.shape[1]))

    @property
    def prompts(self) -> list[tuple[int, int]]:
        return [(rows, tokens) for rows, tokens, _ in self if tokens > 1]


def test_greedy_equals_generate(policy: TransformersPolicy) -> None:
    ours = generate(policy, *(request(p, temperature=0) for p in PROMPTS))
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        expected = policy.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
        )
        assert completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert completion.finish_reason == "length" and len(completion.logprobs) == 8


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_distribution_sampled_from(
    policy: TransformersPolicy, temperature: float
) -> None:
    for prompt, completion in zip(
        PROMPTS,
        generate(policy, *(request(p, i, temperature=temperature) for i, p in enumerate(PROMPTS))),
        strict=True,
    ):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(prompt) - 1 : -1]
        logps = (logits / (temperature or 1)).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), logps, atol=1e-5, rtol=0)


def test_seed_decides(policy: TransformersPolicy) -> None:
    first, again, other = generate(policy, *(request(PROMPTS[2], seed) for seed in (1, 1, 2)))
    assert first == again and first.token_ids != other.token_ids


def test_text_is_a_reading_of_the_tokens(policy: TransformersPolicy) -> None:
    for completion in generate(policy, *(request((5,), seed) for seed in range(20))):
        assert completion.text == policy.renderer.decode(completion.token_ids)


requests = st.builds(
    request,
    st.builds(
        lambda beginning, rest: (*range(3, 3 + beginning), *rest),
        st.sampled_from([0, 10, 30]),
        st.lists(st.integers(3, 300), min_size=1, max_size=30),
    ),
    st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.8, 1.5]),
    top_p=st.sampled_from([1.0, 0.7]),
    top_k=st.sampled_from([0, 20]),
    max_tokens=st.integers(1, 12),
    stop=st.sampled_from([(), ("a",), ("zzz", "e ")]),
)


@given(
    drawn=st.lists(requests, min_size=1, max_size=10), limits=st.tuples(st.integers(1, 8), st.integers(1, 60))
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_completion_does_not_depend_on_company(
    loaded: tuple[Any, Any], drawn: list[Request], limits: tuple[int, int]
) -> None:
    policy = TransformersPolicy(*loaded, stop_ids=(7, 30), max_batch=limits[0], prefill_tokens=limits[1])

    async def scenario() -> None:
        alone = [(await policy.generate([r]))[0] for r in drawn]
        together = await policy.generate(drawn)
        apart = [c for [c] in await asyncio.gather(*(policy.generate([r]) for r in drawn))]
        for one, two, three in zip(alone, together, apart, strict=True):
            assert same(one, two) and same(one, three)
            torch.testing.assert_close(one.logprobs, two.logprobs, atol=1e-5, rtol=0)
        assert await policy.generate(drawn) == together, "one call at a time is reproducible bit for bit"
        await policy.aclose()

    asyncio.run(scenario())


def test_end_token_ends_a_completion_and_is_not_text(loaded: tuple[Any, Any]) -> None:
    free = TransformersPolicy(*loaded, stop_ids=())
    [full] = generate(free, request((5,), 3))
    asyncio.run(free.aclose())
    end = full.token_ids[4]
    stopping = TransformersPolicy(*loaded, stop_ids=(end,))
    [cut] = generate(stopping, request((5,), 3))
    asyncio.run(stopping.aclose())
    at = full.token_ids.index(end)
    assert cut.token_ids == full.token_ids[: at + 1] and cut.logprobs == full.logprobs[: at + 1]
    assert cut.finish_reason == "stop" and cut.text == free.renderer.decode(full.token_ids[:at])


def test_end_of_turn_is_an_end_token_by_default(loaded: tuple[Any, Any]) -> None:
    policy = TransformersPolicy(*loaded)
    end = loaded[1].convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        completions = generate(policy, *(request((5,), seed, max_tokens=400) for seed in range(8)))
    asyncio.run(policy.aclose())
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and all(c.token_ids[-1] == end and "<|im_end|>" not in c.text for c in stopped)
    assert all(end not in c.token_ids for c in completions if c.finish_reason == "length")


def test_stop_string_ends_a_completion_and_stays(policy: TransformersPolicy) -> None:
    [full] = generate(policy, request((5,), 4, max_tokens=30))
    texts = [policy.renderer.decode(full.token_ids[: i + 1]) for i in range(30)]
    stop = texts[12][-3:]
    [cut] = generate(policy, request((5,), 4, max_tokens=30, stop=("never seen", stop)))
    at = next(i for i, text in enumerate(texts) if stop in text)
    assert cut.finish_reason == "stop" and stop in cut.text
    assert cut.token_ids == full.token_ids[: at + 1]


def test_prompt_past_the_context_is_refused_and_its_neighbour_served(policy: TransformersPolicy) -> None:
    async def scenario() -> list[Any]:
        return await asyncio.gather(
            policy.generate([request((5,) * 505)]),
            policy.generate([request((5,) * 504)]),
            return_exceptions=True,
        )

    refused, served = asyncio.run(scenario())
    assert policy.context_limit == 512
    assert isinstance(refused, ContextExceeded) and refused.limit == 512
    assert len(served[0].token_ids) == 8


@pytest.mark.parametrize(
    "bad",
    [
        request(()),
        request((384,)),
        request((-1,)),
        request((5,), temperature=-1),
        request((5,), temperature=float("nan")),
        request((5,), top_p=0),
        request((5,), top_k=-1),
        request((5,), max_tokens=0),
    ],
)
def test_impossible_request_never_meets_a_batch(policy: TransformersPolicy, bad: Request) -> None:
    with pytest.raises(UsageError):
        generate(policy, bad)
    assert len(generate(policy, request((5,)))) == 1


def test_broken_model_fails_its_batch_and_no_other(own: TransformersPolicy, monkeypatch: Any) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(
            own.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory\nlong"))
        )
        with pytest.raises(PolicyFailed, match=r"decoding failed: RuntimeError: out of memory$"):
            generate(own, request((5,)), request((6,)))
    assert len(generate(own, request((5,)))[0].token_ids) == 8


def test_diverged_weights_are_a_failure_and_not_text(own: TransformersPolicy) -> None:
    with torch.no_grad():
        own.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PolicyFailed, match="not finite"):
        generate(own, request((5,)))


def test_concurrent_calls_share_forward_passes(own: TransformersPolicy) -> None:
    passes = Passes(own)

    async def scenario() -> None:
        await asyncio.gather(*(own.generate([request((5, 6, i), i, max_tokens=20)]) for i in range(3, 19)))

    asyncio.run(scenario())
    assert len(passes) < 16 * 20 / 4


def test_finished_rows_make_room_for_waiting_ones(loaded: tuple[Any, Any]) -> None:
    policy = TransformersPolicy(copy.deepcopy(loaded[0]), loaded[1], stop_ids=(), max_batch=4)
    passes = Passes(policy)
    lengths = [40, 2, 2, 2, 2, 2, 2, 2, 2]
    generate(policy, *(request((5, i + 3), i, max_tokens=n) for i, n in enumerate(lengths)))
    asyncio.run(policy.aclose())
    decoding = [rows for rows, tokens, _ in passes if tokens == 1]
    assert len(decoding) == 39, "short completions run beside the long one, not after it"
    assert max(decoding) <= 4


def test_prefill_is_split_keeps_one_logit_and_pads_little(own: TransformersPolicy) -> None:
    passes = Passes(own)
    own._decoder._prefill_tokens = 128
    lengths = [400, 100, 99, 98, 30, 29, 12, 5, 4]
    generate(own, *(request(tuple(range(3, 3 + n % 300)) + (9,) * (n - n % 300), n) for n in lengths))
    assert all(kept == 1 for _, _, kept in passes)
    assert all(rows * tokens <= 128 for rows, tokens in passes.prompts)
    assert sum(rows * tokens for rows, tokens in passes.prompts) < sum(lengths) * 1.25 + 64


def test_identical_prompts_are_read_once(own: TransformersPolicy) -> None:
    passes = Passes(own)
    completions = generate(own, *(request((5, 6, 7, 8), seed) for seed in range(8)))
    assert passes.prompts == [(1, 4)] and len({c.token_ids for c in completions}) == 8


def test_common_beginning_is_read_once(own: TransformersPolicy) -> None:
    passes = Passes(own)
    generate(own, *(request((*range(3, 53), *range(60, 64 + i)), i) for i in range(6)))
    assert passes.prompts == [(1, 53), (6, 6)], "every prompt keeps a token to sample after"


def test_cache_stays_within_its_limit(loaded: tuple[Any, Any]) -> None:
    policy = TransformersPolicy(copy.deepcopy(loaded[0]), loaded[1], stop_ids=(), max_cache_tokens=100)
    passes = Passes(policy)
    generate(policy, *(request((5,) * 12 + (i + 3,), i, max_tokens=7) for i in range(10)))
    assert max(rows for rows, _, _ in passes) == 5
    [alone] = generate(policy, request((5,) * 200))
    asyncio.run(policy.aclose())
    assert len(alone.token_ids) == 8, "a request larger than the limit runs alone"


def test_cancelled_request_is_dropped(policy: TransformersPolicy) -> None:
    async def scenario() -> tuple[Completion, Completion]:
        doomed = asyncio.create_task(policy.generate([request((5,), 1, max_tokens=500)]))
        kept = asyncio.create_task(policy.generate([request((6,), 2, max_tokens=60)]))
        await busy(policy)
        doomed.cancel()
        [completion] = await kept
        assert doomed.cancelled()
        [after] = await policy.generate([request((6,), 2, max_tokens=60)])
        assert not policy._running
        return completion, after

    before, after = asyncio.run(scenario())
    assert same(before, after)


def test_many_event_loops_one_policy(policy: TransformersPolicy) -> None:
    assert len({generate(policy, request((5,), 1))[0] for _ in range(3)}) == 1


def test_loop_that_dies_while_waiting_harms_nobody(policy: TransformersPolicy) -> None:
    async def leave() -> None:
        task = asyncio.create_task(policy.generate([request((5,), max_tokens=300)]))
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(leave())
    assert len(generate(policy, request((5,)))) == 1


def test_new_weights_change_version_and_samples(own: TransformersPolicy) -> None:
    [before] = generate(own, request((5,), temperature=0))
    new = {name: tensor + 0.05 for name, tensor in own.model.state_dict().items()}
    assert asyncio.run(own.update_weights(new.items())) == 1 == own.version
    [after] = generate(own, request((5,), temperature=0))
    assert (before.version, after.version) == (0, 1) and before.logprobs != after.logprobs
    for name, tensor in own.model.state_dict().items():
        torch.testing.assert_close(tensor, new[name])


def test_new_weights_may_have_the_names_that_peft_gives(own: TransformersPolicy) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    new = torch.ones_like(own.model.state_dict()[name], dtype=torch.float32)
    peft = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    asyncio.run(own.update_weights([(peft, new)]))
    torch.testing.assert_close(own.model.state_dict()[name], new.double())


@pytest.mark.parametrize(("name", "shape"), [("no.such.weight", (1,)), ("model.norm.weight", (3,))])
def test_weights_that_do_not_fit_are_refused(
    own: TransformersPolicy, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match=name):
        asyncio.run(own.update_weights([(name, torch.zeros(shape))]))
    assert own.version == 0 and len(generate(own, request((5,)))) == 1


def test_half_an_update_is_not_sampled_from(own: TransformersPolicy) -> None:
    good = [(name, tensor.clone()) for name, tensor in own.model.state_dict().items()]

    def torn() -> Iterator[tuple[str, Any]]:
        yield good[0]
        raise OSError("the disk went away")

    with pytest.raises(PolicyFailed, match="the disk went away"):
        asyncio.run(own.update_weights(torn()))
    with pytest.raises(PolicyFailed, match="half-way"):
        generate(own, request((5,)))
    asyncio.run(own.update_weights(good))
    assert len(generate(own, request((5,)))) == 1


def test_new_weights_wait_for_running_rows_and_for_no_others(loaded: tuple[Any, Any]) -> None:
    policy = TransformersPolicy(copy.deepcopy(loaded[0]), loaded[1], stop_ids=(), max_batch=1)
    same_weights = [(name, tensor.clone()) for name, tensor in policy.model.state_dict().items()]

    async def scenario() -> list[int]:
        calls = [asyncio.create_task(policy.generate([request((5,), i, max_tokens=40)])) for i in range(4)]
        await busy(policy)
        assert await policy.update_weights(same_weights) == 1
        completions = [completion for [completion] in await asyncio.gather(*calls)]
        await policy.aclose()
        return [completion.version for completion in completions]

    assert asyncio.run(scenario()) == [0, 1, 1, 1]


def test_closing_ends_the_worker_and_fails_what_waits(loaded: tuple[Any, Any]) -> None:
    policy = TransformersPolicy(*loaded, stop_ids=())

    async def scenario() -> None:
        waiting = asyncio.create_task(policy.generate([request((5,), max_tokens=500)]))
        await asyncio.sleep(0.01)
        await policy.aclose()
        with pytest.raises(PolicyFailed, match="closed"):
            await waiting
        await policy.aclose()
        with pytest.raises(PolicyFailed, match="closed"):
            await policy.generate([request((5,))])

    asyncio.run(scenario())
    assert policy._thread is not None and not policy._thread.is_alive()


def test_loaded_model_needs_its_tokenizer(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        TransformersPolicy(loaded[0])


def test_model_by_folder(tiny_model: Path) -> None:
    policy = TransformersPolicy(str(tiny_model), device="cpu")
    completions = generate(policy, request((5,), temperature=0))
    asyncio.run(policy.aclose())
    assert len(completions) == 1 and policy.renderer.end_of_turn == "<|im_end|>"


@pytest.mark.slow
def test_smollm2_answers_in_a_batch() -> None:
    from agentgym.messages import Message

    policy = TransformersPolicy("smollm2")
    renderer = policy.renderer
    questions = ["What is the capital of France?", "Say hello. " * 40]
    asked = [
        request(
            tuple(renderer.encode(renderer.render([Message.of("user", q)], generation_prompt=True))),
            temperature=0,
            max_tokens=16,
        )
        for q in questions
    ]
    france, _ = generate(policy, *asked)
    asyncio.run(policy.aclose())
    assert france.text == "The capital of France is Paris." and france.finish_reason == "stop"
