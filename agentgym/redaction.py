"""What must never reach a saved config or a log: keys, tokens, passwords.

Invariant: a redacted structure has the same shape and keys as the original; only values change. A name is a
secret when a person would call it one: ``api_key`` and ``HF_TOKEN`` are, ``max_tokens``, ``eos_token`` and
``api_key_env`` are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {
        "password",
        "passwd",
        "passphrase",
        "secret",
        "secrets",
        "apikey",
        "credential",
        "credentials",
        "authorization",
        "pwd",
        "passcode",
        "cookie",
        "cookies",
    }
)
_KEY_OWNERS = frozenset({"api", "access", "private", "signing", "encryption", "auth", "ssh"})
_TOKEN_OWNERS = _KEY_OWNERS | {"bearer", "refresh", "session", "hf", "hub", "github", "gitlab", "wandb"}
# Keys that look things up.
_PLAIN_KEYS = frozenset(
    {"sort", "cache", "primary", "foreign", "group", "public", "partition", "index", "dict", "json", "row"}
    | {"column", "task", "state", "anchor", "map", "hot", "arrow", "shortcut", "no", "any", "each", "per"}
    | {"unknown", "missing", "known", "record", "metric", "tree", "seed", "node", "lookup", "hash", "config"}
)
# Names of tokens that a model reads, and of counts: the word `token` is no secret there.
_MODEL_TOKENS = frozenset(
    {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "stop", "end", "begin", "start", "image"}
    | {"per", "next", "first", "last", "new"}
)
# Where a secret is found, rather than the secret.
_PLACES = frozenset({"env", "var", "variable", "file", "path", "name", "names", "id", "ids"})

_SHAPES = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|xox[a-z]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
)
_BEARER = re.compile(r"\b((?i:bearer|basic)) +(?=[\w.~+/-]*[\d=])[\w.~+/=-]{8,}")
_USER_INFO = re.compile(r"(://)[^/@\s]+@")
_ASSIGNMENT = re.compile(r"([\w.-]+)(\s*=\s*)([^\s&,;]+)")


def is_secret(name: str) -> bool:
    """Whether a value under this key, option or variable name must not be shown."""
    words = [word.lower() for word in _WORD.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    if not words or words[-1] in _PLACES:
        return False
    if _SECRET_WORDS.intersection(words):
        return True
    owners = zip(["", *words], words, strict=False)
    if any(word in ("key", "keys") and owner in _KEY_OWNERS for owner, word in owners):
        return True
    owner = words[-2] if len(words) > 1 else ""
    if words[-1] == "auth" or (words[-1] == "key" and owner and owner not in _PLAIN_KEYS):
        return True
    if words[-1] == "token":
        return owner not in _MODEL_TOKENS
    return words[-1] == "tokens" and owner in _TOKEN_OWNERS


def redact_text(text: str) -> str:
    """``text`` with well-known shapes of keys, URL passwords and ``secret_name=value`` masked."""
    text = _SHAPES.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _USER_INFO.sub(rf"\1{MASK}@", text)
    return _ASSIGNMENT.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if is_secret(m[1]) else m[0], text)


def secret_values(mapping: Mapping[str, Any]) -> set[str]:
    """The strings that :func:`redact` masks for their key's sake, to be kept out of texts that quote them.

    Strings of fewer than four characters are left out: they occur in any text.
    """
    found: set[str] = set()

    def look(name: str, value: Any, secret: bool) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                look(str(key), inner, secret or is_secret(str(key)))
        elif isinstance(value, str):
            if secret and len(value) >= 4:
                found.add(value)
        elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            for inner in value:
                look(name, inner, secret)

    look("", mapping, False)
    return found


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``mapping`` without secrets, nested mappings and sequences included.

    Empty values, ``None`` and booleans stay under a secret's name: that a key is unset, or asked for, is
    worth knowing. In a command line (``["--api-key", "…"]``) the value after a secret option is masked.
    """
    return {key: _redact_entry(str(key), value) for key, value in mapping.items()}


def _redact_entry(name: str, value: Any) -> Any:
    if not is_secret(name) or value is None or isinstance(value, bool):
        return _redact_value(value)
    if isinstance(value, Mapping):
        return {key: _redact_entry(name, inner) for key, inner in value.items()}
    return MASK if isinstance(value, int | float) or value else value


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [
            MASK if isinstance(before, str) and before.startswith("-") and is_secret(before) else shown
            for before, shown in zip(["", *value], map(_redact_value, value), strict=False)
        ]
    return value
