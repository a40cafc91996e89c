"""A policy that decodes with a Hugging Face model in this process.

Invariant: one worker thread owns the model. Calls that come while it works join the running batch between
two tokens, first come first served; a call that finds it idle is decoded by itself, its rows in the order
given, so a caller that makes one call at a time gets results that depend on its requests alone. New weights
enter only when no row is half sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agentgym.errors import AgentGymError, ContextExceeded, PolicyFailed, UsageError
from agentgym.policies import models
from agentgym.policies.base import Completion, Policy, Request
from agentgym.policies.decoding import Decoder, Row
from agentgym.policies.templates import HuggingFaceRenderer


class TransformersPolicy(Policy):
    """Samples completions from a Hugging Face causal language model.

    Args:
        model: A model's name or folder (see :func:`agentgym.policies.models.resolve`), or a loaded model.
        tokenizer: The tokenizer of a loaded model.
        dtype: Of the weights when they are loaded here; by default the fastest for inference on the device.
        device: Where to load them; by default the first GPU if there is one, else the CPU.
        max_batch: Completions decoded at once.
        max_cache_tokens: Tokens, padding included, that the key-value cache may grow to; it bounds the batch.
        prefill_tokens: Prompt tokens in one forward pass; it bounds the activations.
        context_limit: Tokens of prompt and completion; by default what the model was made for.
        stop_ids: Tokens that end a completion; by default the template's end of turn and the end tokens that
            tokenizer and model declare.
        tools: JSON Schemas of the tools that every prompt describes.

    Raises:
        ModelUnavailable: The name resolves nowhere.
        UsageError: A loaded model without a tokenizer, or a model without attention.
    """

    def __init__(
        self,
        model: Any = "smollm2",
        tokenizer: Any = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        max_batch: int = 32,
        max_cache_tokens: int = 131072,
        prefill_tokens: int = 4096,
        context_limit: int | None = None,
        stop_ids: Collection[int] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        name = Path(model).name if isinstance(model, Path) else model if isinstance(model, str) else ""
        if name:
            model, loaded = models.load(model, dtype=dtype, device=device)
            tokenizer = tokenizer or loaded
        elif tokenizer is None:
            raise UsageError("a loaded model needs its tokenizer", hint="pass tokenizer=, or a model's name")
        if getattr(model, "_is_stateful", False):
            raise UsageError(
                f"{type(model).__name__} keeps a recurrent state, which this policy cannot batch",
                hint="use a model with attention in every layer",
            )
        self.model, self.tokenizer = model, tokenizer
        self.renderer: HuggingFaceRenderer = HuggingFaceRenderer(tokenizer, tools=tools)
        self.name = name or str(model.config._name_or_path) or type(model).__name__
        self.version = 0
        config = model.config.get_text_config()
        self.context_limit = context_limit or getattr(config, "max_position_embeddings", None)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._max_batch, self._max_cache_tokens = max_batch, max_cache_tokens
        stops = _stop_ids(model, self.renderer) if stop_ids is None else stop_ids
        self._decoder = Decoder(model, stops, self.renderer.decode, prefill_tokens=prefill_tokens)
        self._ready = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._updates: deque[_Update] = deque()
        self._running: dict[Row, _Call] = {}
        self._broken = ""
        self._closed = False
        self._thread: threading.Thread | None = None

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See :meth:`agentgym.policies.base.Policy.generate`.

        Raises:
            ContextExceeded: A prompt and its longest completion do not fit; nothing was sampled.
            PolicyFailed: The model failed on the batch, or the policy is closed.
            UsageError: A request that no model could serve.
        """
        for request in requests:
            self._check(request)
        loop = asyncio.get_running_loop()
        calls = [_Call(Row(request), loop) for request in requests]
        self._hand_over(self._calls, calls)
        results = await asyncio.gather(*(call.future for call in calls), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if isinstance(result, Completion)]

    async def update_weights(self, weights: Iterable[tuple[str, Any]]) -> int:
        """Copy ``weights`` into the model, once no row is half sampled; return the new version.

        Names are those of the model's state dictionary, with or without the prefixes that peft adds. Weights
        that are not named stay.

        Raises:
            UsageError: A name or a shape that the model does not have.
        """
        update = _Update(weights, asyncio.get_running_loop())
        self._hand_over(self._updates, [update])
        await update.future
        return self.version

    async def aclose(self) -> None:
        """End the worker thread; unfinished completions fail."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _check(self, request: Request) -> None:
        sampling, prompt = request.sampling, request.prompt_ids
        if not prompt or not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise UsageError(
                f"request {request.id}: the prompt needs token ids from 0 to {self._vocabulary - 1}",
                hint="encode it with the policy's own renderer",
            )
        if sampling.max_tokens < 1 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
            raise UsageError(f"max_tokens >= 1, top_k >= 0 and 0 < top_p <= 1 are expected, not {sampling}")
        if not 0 <= sampling.temperature < math.inf:
            raise UsageError(f"the temperature is {sampling.temperature}; a finite one >= 0 is expected")
        if self.context_limit is not None and len(prompt) + sampling.max_tokens > self.context_limit:
            raise ContextExceeded(len(prompt), self.context_limit)

    def _hand_over(self, queue: deque[Any], jobs: Sequence[Any]) -> None:
        # All at once: the worker never sees half of a call.
        with self._ready:
            if self._closed:
                raise PolicyFailed("the policy is closed")
            queue.extend(jobs)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="agentgym-decode")
                self._thread.start()
            self._ready.notify()

    def _work(self) -> None:
        """The worker thread: take in, step, deliver, until closed."""
        while self._wait():
            try:
                self._turn()
            except Exception as error:
                failure = PolicyFailed(f"decoding failed: {_line(error)}")
                failure.__cause__ = error
                self._abandon(failure)
        self._abandon(closed := PolicyFailed("the policy was closed before it answered"))
        for job in [*self._calls, *self._updates]:
            job.reject(closed)

    def _wait(self) -> bool:
        """Sleep until there is work; false once the policy is closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._closed or self._calls or self._updates or self._running)
            return not self._closed

    def _turn(self) -> None:
        """Weights if they wait and no row is half sampled; otherwise one token for every row."""
        self._running = {row: call for row, call in self._running.items() if not call.dropped}
        self._decoder.keep(self._running.__contains__)
        if self._updates and not self._running:
            self._apply(self._updates.popleft())
            return
        entering = [] if self._updates else self._entering()
        self._running |= {call.row: call for call in entering}
        ended = self._decoder.admit([call.row for call in entering]) if entering else []
        if self._decoder.rows:
            ended += self._decoder.step()
        for row in ended:
            self._running.pop(row).resolve(self._decoder.completion(row, self.version))

    def _abandon(self, error: Exception) -> None:
        for call in self._running.values():
            call.reject(error)
        self._running.clear()
        self._decoder.keep(lambda row: False)

    def _entering(self) -> list[_Call]:
        """The calls to take in now: as many as fit, but a busy batch is not disturbed for a few."""
        if self._broken:
            while self._calls:
                self._calls.popleft().reject(PolicyFailed(self._broken))
        rows = self._decoder.rows
        if rows and 4 * len(self._calls) < len(rows):
            return []
        taken: list[_Call] = []
        longest = max((row.longest for row in rows), default=0)
        while self._calls and len(rows) + len(taken) < self._max_batch:
            if self._calls[0].dropped:
                self._calls.popleft()
                continue
            longest = max(longest, self._calls[0].row.longest)
            count = len(rows) + len(taken) + 1
            if count > 1 and count * longest > self._max_cache_tokens:
                break
            taken.append(self._calls.popleft())
        return taken

    def _apply(self, update: _Update) -> None:
        copied = False
        try:
            target = {**dict(self.model.named_buffers()), **_parameters(self.model)}
            with torch.no_grad():
                for name, tensor in update.weights:
                    target_tensor = target.get(_plain(name))
                    if target_tensor is None:
                        raise UsageError(
                            f"the model has no weight {name!r}",
                            hint="send merged weights under the names of the model's state dictionary",
                        )
                    if target_tensor.shape != tensor.shape:
                        raise UsageError(
                            f"weight {name!r} has shape {tuple(tensor.shape)}, expected "
                            f"{tuple(target_tensor.shape)}"
                        )
                    target_tensor.copy_(tensor)
                    copied = True
        except Exception as error:
            if copied:
                self._broken = "a weight update failed half-way; send all weights again"
            update.reject(error if isinstance(error, AgentGymError) else PolicyFailed(_line(error)))
            return
        self._broken = ""
        self.version += 1
        update.resolve(None)


class _Job:
    """Something the worker owes an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()

    @property
    def dropped(self) -> bool:
        """Nobody waits for it any more."""
        return self.future.cancelled() or self._loop.is_closed()

    def resolve(self, result: Any) -> None:
        self._settle(lambda: self.future.set_result(result))

    def reject(self, error: Exception) -> None:
        self._settle(lambda: self.future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        def settle_once() -> None:
            if not self.future.done():
                settle()

        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(settle_once)


class _Call(_Job):
    def __init__(self, row: Row, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.row = row


class _Update(_Job):
    def __init__(self, weights: Iterable[tuple[str, Any]], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.weights = weights


def _stop_ids(model: Any, renderer: HuggingFaceRenderer) -> set[int]:
    """What ends a completion: the template's end of turn, and the end tokens of tokenizer and model."""
    ends: list[Any] = renderer.encode(renderer.end_of_turn) if renderer.end_of_turn else []
    ends.append(renderer.tokenizer.eos_token_id)
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends += declared if isinstance(declared, list) else [declared]
    return {end for end in ends if end is not None}


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    # Tied weights have two names and one tensor; either name may come.
    return dict(model.named_parameters(remove_duplicate=False))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
