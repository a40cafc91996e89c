"""Fixtures of general use."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from agentgym import datasets, paths
from agentgym.errors import AgentGymError, DataUnavailable, MissingDependency

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LINES = [
    "You are in a kitchen. You can see a closed door to the north, and a table.",
    "There is an apple on the table. Your score is 0 of 1. What do you do next?",
    "go north, go south, go east, go west, take the apple, open the door, look, inventory",
    "system user assistant tool <think>The door is closed, so open it first.</think>",
    '<tool_call>{"name": "look", "arguments": {"at": "door"}}</tool_call> <action>open door</action>',
    "0 1 2 3 4 5 6 7 8 9, aa aaa aaaa, ab abab ababab, \n\n and\t so on.",
]


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and all that it starts does too; the tests press it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test with the marker ``docker`` has a daemon, first of all its fixtures."""
    for item in items:
        if item.get_closest_marker("docker") is not None and isinstance(item, pytest.Function):
            # A list of its own: tests that differ in a parameter alone share one.
            item.fixturenames = ["docker_daemon", *item.fixturenames]


@pytest.fixture(scope="session")
def docker_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Docker daemon that has the base image; also in ``DOCKER_HOST``.

    The one that is set there or runs on this machine; else one of this run's own, which ends with it.
    """
    pytest.importorskip("docker")
    from agentgym.sandboxes.daemon import Daemon
    from agentgym.sandboxes.images import build

    def answers(url: str | None) -> bool:
        made = Daemon(url)
        try:
            return bool(made.do(lambda client: client.ping()))
        except AgentGymError:
            return False
        finally:
            made.close()

    before = os.environ.get("DOCKER_HOST")
    with contextlib.ExitStack() as stack:
        url = before or "unix:///var/run/docker.sock"
        if not answers(url):
            if os.geteuid() or shutil.which("dockerd") is None:
                pytest.skip("no Docker daemon runs here, and none can be started: needs root and dockerd")
            base = tmp_path_factory.getbasetemp()
            folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dockerd"
            folder.mkdir(exist_ok=True)
            url = f"unix://{folder}/docker.sock"
            users = stack.enter_context((folder / "users").open("a"))
            with FileLock(folder / "start.lock"):
                # Waits for one that is just ending.
                fcntl.flock(users, fcntl.LOCK_SH)
                if not answers(url):
                    script = Path(__file__).parent / "sandboxes" / "dockerd.py"
                    nowhere = subprocess.DEVNULL
                    command = [sys.executable, script, folder]
                    subprocess.run(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=True)
                    until = time.monotonic() + 60
                    while not answers(url):
                        if (folder / "ended").exists() or time.monotonic() > until:
                            last = (folder / "log").read_text().strip().splitlines()[-1:]
                            pytest.skip(f"no Docker daemon runs here, and dockerd does not start: {last}")
                        time.sleep(0.2)
        daemon = Daemon(url)
        try:
            daemon.do(build.load)
        except AgentGymError as error:
            pytest.skip(f"there is no base image, and none can be made: {error.message}")
        finally:
            daemon.close()
        os.environ["DOCKER_HOST"] = url
        try:
            yield url
        finally:
            if before is None:
                del os.environ["DOCKER_HOST"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (about 0.1 M weights, context 512) and its byte-level BPE tokenizer.

    Fresh in every session and equal in all of them; ChatML template, ``<|im_end|>`` ends a turn.
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_path() -> Iterator[None]:
    """``AGENTGYM_DATA``: a folder of the cache, the project's shared data, and what was set before."""
    before = os.environ.get("AGENTGYM_DATA")
    places = [paths.cache_dir("test-data"), SHARED, *([before] if before else [])]
    os.environ["AGENTGYM_DATA"] = os.pathsep.join(map(str, places))
    yield
    if before is None:
        del os.environ["AGENTGYM_DATA"]
    else:
        os.environ["AGENTGYM_DATA"] = before


@pytest.fixture(scope="session")
def obtained(data_path: None) -> Callable[[str], Path]:
    """Obtains a data set once for all workers and runs; skips where it cannot be had."""

    def get(name: str) -> Path:
        try:
            return datasets.get(name)
        except DataUnavailable as error:
            pytest.skip(f"the data set {name} cannot be had here: {error.message}")

    return get


@pytest.fixture(scope="session")
def shared_data(data_path: None) -> Callable[[str], Path]:
    """A folder of the project's shared data; skips where that is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"the shared data {name} are absent (looked in {SHARED})")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def repair_data() -> Callable[..., Path]:
    """Builds instances of Repair, of the recipes named or of all; skips where they cannot be had.

    The folder is called ``repair``, and is kept in the cache for as long as the recipes stay as they are.
    """
    from agentgym.environments.code import repair_build
    from agentgym.environments.code.repair_archives import Index
    from agentgym.environments.code.repair_recipes import FILE, Recipes, recipes
    from agentgym.sandboxes import make_backend

    def build(*ids: str) -> Path:
        known = recipes()
        chosen = tuple(recipe for recipe in known.recipes if not ids or recipe.id in ids)
        key = hashlib.sha256(FILE.read_bytes() + repr(ids).encode()).hexdigest()[:16]
        place = paths.cache_dir("test-repair", key) / "repair"
        with FileLock(place.parent / "lock"):
            if place.is_dir():
                return place
            made = Path(tempfile.mkdtemp(dir=place.parent))

            async def run() -> None:
                async with make_backend("bubblewrap") as backend:
                    parts = Recipes(libraries=known.libraries, recipes=chosen)
                    assert await repair_build.build(made, backend, Index(), chosen=parts) == {}

            try:
                asyncio.run(run())
            except (DataUnavailable, MissingDependency) as error:
                pytest.skip(f"instances of Repair cannot be built here: {error.message}")
            made.rename(place)
        return place

    return build


_THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_HEADERS = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% set expected = loop.index0 % 2 == 0 %}"
    "{% if (m.role == 'user') != expected %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + ('<|eot_id|>' if m.role == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)

_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """Jinja sources of templates of every temperament, by name.

    ``chatml``; ``headers`` and ``strip`` trim white space; ``thinking`` drops the thoughts of turns before
    the last user message; ``reorder`` writes the newest message first; ``count`` heads the prompt with the
    number of messages; ``strict`` refuses system and tool messages; ``tools`` describes tools.
    """
    return {
        "chatml": CHATML,
        "headers": _HEADERS,
        "strip": CHATML.replace("message['content']", "message['content'] | trim"),
        "thinking": _THINKING,
        "reorder": CHATML.replace("in messages", "in messages | reverse"),
        "count": "{{ messages | length }}" + CHATML,
        "strict": _STRICT,
        "tools": _TOOLS + CHATML,
    }


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    """The tiny model's tokenizer, with the special tokens that :func:`chat_templates` write."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"bos_token": "<|begin_of_text|>", "additional_special_tokens": ["<|im_start|>", *headers]}
    )
    return tokenizer
