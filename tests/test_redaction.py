from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.redaction import MASK, is_secret, redact, redact_text, secret_values


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "apiKey", "OPENAI_API_KEY", "api-key", "api_key_2", "token", "HF_TOKEN", "--token",
        "access_token", "authToken", "api_tokens", "secret", "client_secret", "AWS_SECRET_ACCESS_KEY",
        "password", "db_password", "passwd", "Authorization", "private_key", "credentials",
        "policy.api_key", "openai_key", "ANTHROPIC_KEY", "license_key", "pwd", "auth", "session_cookie",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens", "token_ids", "tokens", "max_sampled_tokens", "token_budget", "eos_token",
        "pad_token_id", "cost_per_token", "key", "keys", "api_key_env", "token_file", "password_path",
        "sort_key", "tokenizer", "secretary", "loss_agg_mode", "token_level", "next_token", "keyboard",
        "base_url", "public_key", "cache_key", "primary_key", "author", "authentic", "no_auth_needed",
    ],
)  # fmt: skip
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_values_are_masked_and_the_shape_stays() -> None:
    given_ = {
        "api_key": "abc",
        "password": 1234,
        "token": None,
        "secret": "",
        "use_token": True,
        "credentials": {"user": "ann", "rest": ["x", {"pin": 7}]},
        "nested": [{"access_token": "t"}, ("plain", 3)],
        "argv": ["train", "--api-key", "abc", "--seed", "3", "policy.api_key=abc"],
        "max_tokens": 256,
    }
    assert redact(given_) == {
        "api_key": MASK,
        "password": MASK,
        "token": None,
        "secret": "",
        "use_token": True,
        "credentials": {"user": MASK, "rest": MASK},
        "nested": [{"access_token": MASK}, ["plain", 3]],
        "argv": ["train", "--api-key", MASK, "--seed", "3", f"policy.api_key={MASK}"],
        "max_tokens": 256,
    }
    assert given_["api_key"] == "abc"


def test_secret_values_are_those_that_are_masked_by_name() -> None:
    given_ = {"api_key": "abcd", "auth": ["efgh", {"pin": "ijkl"}], "token": "abc", "name": "mnop", "n": 3}
    assert secret_values(given_) == {"abcd", "efgh", "ijkl"}
    assert not any(value in str(redact(given_)) for value in secret_values(given_))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key sk-abcdefghijklmnopqrst in a log", "key *** in a log"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("https://ann:pass@host/v1?api_key=abc&x=1", "https://***@host/v1?api_key=***&x=1"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("HF_TOKEN=abc agentgym eval", "HF_TOKEN=*** agentgym eval"),
        ("max_tokens=256 eos_token=<|im_end|>", "max_tokens=256 eos_token=<|im_end|>"),
        ("a task-sk-rest and a basic question", "a task-sk-rest and a basic question"),
    ],
)
def test_secrets_inside_text(text: str, shown: str) -> None:
    assert redact_text(text) == shown


@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
        ),
    )
)
def test_redacting_twice_changes_nothing_more(mapping: dict[str, object]) -> None:
    once = redact(mapping)
    assert once.keys() == mapping.keys()
    assert redact(once) == once
