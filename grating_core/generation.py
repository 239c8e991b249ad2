"""This module generates text with a language model that need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import torch

from grating_core.engine.decode import Cache, advance, new_cache
from grating_core.engine.sampling import Sampler
from grating_core.forking import Interrupted, Lock, Threads, computed
from grating_core.lifetime import Loaded, closed_on_error
from grating_core.memory.meter import Meter, PeakMemory
from grating_core.memory.plan import tokens_of_slice
from grating_core.models.causal_lm import CausalLM
from grating_core.opening.language_models import LoadedLanguageModel, open_language_model
from grating_core.results import FinishReason, Generation
from grating_core.settings import AnswerSettings, GenerationSettings
from grating_core.telemetry import generating
from grating_core.text.messages import Messages

_SLICE_TOKENS = {"cuda": 8192, "mps": 4096}  # on the CPU it depends on the size of the layers


class StreamedCausalLM(Loaded[CausalLM, GenerationSettings]):
    """A streamed language model generates text with as much of its weights in memory as a budget says.

    :meth:`from_pretrained` makes one. Several threads may call it, and a forked child. Calls of :meth:`generate`
    take turns, and open streams go on token by token beside them. Each has keys and values of its own; a memory
    budget counts them once. Pickling and copying keep only the settings, without a ``token``; the model is then
    loaded again.
    """

    def __init__(
        self, loaded: LoadedLanguageModel, *, model_path: Path, max_length: int, slice_tokens: int | None = None
    ) -> None:
        model, plan = loaded.model, loaded.plan
        self._loaded: CausalLM | None = model
        self._tokenizer = loaded.tokenizer
        self._end_tokens = loaded.end_tokens
        usual = plan.slice_tokens if plan else _SLICE_TOKENS.get(model.device.type, tokens_of_slice(model.work))
        self._slice_tokens = slice_tokens or usual
        self._requests = Lock()  # one request at a time has keys and values, as planned
        self._calls = Threads(1, "grating-generate")
        self._turn = Lock()  # held for one pass: held for a stream, an open stream would block all others
        self.plan = plan
        """The plan of the memory budget; None without a budget."""
        self.model_path = model_path
        """The local directory that the weights were read from."""
        self.max_length = max_length
        """The most tokens of a prompt together with its continuation."""

    @classmethod
    def from_pretrained(  # noqa: D417 - the settings describe the other arguments
        cls,
        model: str | Path,
        *,
        device: str | torch.device | None = GenerationSettings.device,
        dtype: str | torch.dtype | None = GenerationSettings.dtype,
        memory_budget: str | int | None = GenerationSettings.memory_budget,
        bits: int | None = GenerationSettings.bits,
        kv_bits: int | None = GenerationSettings.kv_bits,
        mlp_density: float | None = GenerationSettings.mlp_density,
        inputs_preference: float | None = GenerationSettings.inputs_preference,
        products_preference: float | None = GenerationSettings.products_preference,
        max_length: int | None = GenerationSettings.max_length,
        adapter: str | Path | None = GenerationSettings.adapter,
        revision: str | None = GenerationSettings.revision,
        token: str | bool | None = GenerationSettings.token,
        cache_dir: str | Path | None = GenerationSettings.cache_dir,
        local_files_only: bool | None = GenerationSettings.local_files_only,
        show_progress: bool | None = GenerationSettings.show_progress,
    ) -> StreamedCausalLM:
        """Load a language model.

        :class:`~grating_core.settings.GenerationSettings` describes all arguments. Most calls need these at most:

        Args:
            model: A hub id such as ``"Qwen/Qwen3-4B"``, or a local directory with safetensors weights.
            device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best device of this machine.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the processor has
                instructions for it, else float32.
            memory_budget: How much memory loading and generating may take, in bytes or as a size such as
                ``"300MB"``; the text stays the same. None keeps everything in memory.
            bits: 8 or 4 bits for each weight, on the CPU; None for the weights as they are.
            mlp_density: The share of the MLPs' weights that each new token uses, on the CPU; None for all.

        Raises:
            ModelNotFoundError: The name leads to no usable weights.
            UnsupportedModelError: grating does not generate with weights of this kind.
            BudgetError: The memory budget is too small; the message states the smallest that works. It is a
                ``ValueError`` as well.
            FileError: The file with quantised weights or with columns is damaged, or belongs to other weights.
            StorageError: That file cannot be written.
            ValueError: An argument is not usable; the message names it. None means that an argument is not given.
        """
        given = locals()
        del given["cls"]
        return cls.open(GenerationSettings(**given))

    @classmethod
    def shared(cls, model: str | Path, **settings: Any) -> StreamedCausalLM:
        """Return the process's one language model with these settings, loaded if nobody holds it yet.

        It is freed when the last holder lets go of it. Do not close it: others may be using it.

        Args:
            model: See :meth:`from_pretrained`.
            settings: See :meth:`from_pretrained`.
        """
        return cls.open_shared(GenerationSettings(model=model, **settings))

    @classmethod
    def _open(cls, settings: GenerationSettings) -> StreamedCausalLM:
        opened = open_language_model(settings)
        with closed_on_error(opened):
            return cls(opened.load(), model_path=opened.stored.directory, max_length=opened.window)

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = AnswerSettings.max_new_tokens,
        temperature: float = AnswerSettings.temperature,
        top_p: float = AnswerSettings.top_p,
        seed: int | None = AnswerSettings.seed,
        stop: Sequence[str] = AnswerSettings.stop,
    ) -> Generation:
        """Continue a text, or answer messages.

        Args:
            prompt: A string or a list of messages. A string is continued as it is, and special tokens in it are
                tokens. Messages, ``{"role": "user", "content": "…"}`` with the roles system, user and assistant,
                go through the model's chat template; special tokens in them are text, and reasoning is left out.
            max_new_tokens: The most tokens to generate.
            temperature: How freely tokens are picked; 0 always takes the likeliest.
            top_p: The total probability of the likeliest tokens to pick from, above 0 and at most 1.
            seed: The seed of the random numbers; None for another text every time.
            stop: Strings that end the text; they are not part of it.

        Returns:
            The text, and what it took.

        Raises:
            ValueError: An argument is not usable; the message names it. Raised before any computing.
            FileError: Weights cannot be read from disk any more. The next call works if they are back.
            ScoreError: The model's logits are not finite numbers.
            RuntimeError: The model has been closed.
        """
        stream = self.stream(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        return self._finish(stream, lambda: False)

    async def agenerate(self, prompt: str | Messages, **settings: Any) -> Generation:
        """Call :meth:`generate` in a worker thread, so that the event loop goes on.

        When the task is cancelled, computing stops after the current token.
        """
        self._model()  # refuse at once
        abandoned = Event()

        def work() -> Generation:
            return self._finish(self.stream(prompt, **settings), abandoned.is_set)

        try:
            return await self._calls.run(work)
        finally:
            abandoned.set()

    def _finish(self, stream: Generator[str, None, Generation], pause: Callable[[], bool]) -> Generation:
        with self._requests:
            while not pause():
                try:
                    next(stream)
                except StopIteration as end:
                    generation: Generation = end.value
                    return generation
        raise Interrupted

    def stream(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = AnswerSettings.max_new_tokens,
        temperature: float = AnswerSettings.temperature,
        top_p: float = AnswerSettings.top_p,
        seed: int | None = AnswerSettings.seed,
        stop: Sequence[str] = AnswerSettings.stop,
    ) -> Generator[str, None, Generation]:
        """Generate a text piece by piece; arguments and errors are those of :meth:`generate`.

        Returns:
            An iterator over pieces of text as they come. Closing it ends the work. ``yield from`` gives the
            :class:`Generation` to a generator of your own.
        """
        model = self.model
        how = AnswerSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        prompt_ids = self._tokenizer.encode(prompt)
        if len(prompt_ids) + how.max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt has {len(prompt_ids):,} tokens, which with max_new_tokens={how.max_new_tokens} is more "
                f"than max_length={self.max_length}: shorten the prompt, or ask for fewer tokens"
            )
        sampler = Sampler(float(how.temperature), float(how.top_p), how.seed, model.device)
        stream = self._stream(prompt_ids, how.max_new_tokens, sampler, tuple(how.stop))
        return generating(stream, self.name, prompt, how)

    def _stream(
        self, prompt_ids: list[int], max_new_tokens: int, sampler: Sampler, stop: tuple[str, ...]
    ) -> Generator[str, None, Generation]:
        started = perf_counter()
        model = self.model
        cache = computed(new_cache, model, len(prompt_ids) + max_new_tokens)
        peak = None if self.plan is None else PeakMemory(model.device)
        text = self._tokenizer.stream(prompt_ids, stop)
        pieces: list[str] = []
        usage: list[Meter] = []
        moments: list[float] = []
        finish_reason: FinishReason = "length"
        next_ids = prompt_ids
        while len(moments) < max_new_tokens and not text.stopped:
            with self._turn:
                model = self.model
                before = replace(model.meter)
                token = computed(self._next_token, model, next_ids, cache, sampler, peak)
                usage.append(model.meter.since(before))
            moments.append(perf_counter() - started)
            if token in self._end_tokens:
                finish_reason = "stop"
                break
            del model  # an open stream must not keep the weights of a model that is closed
            if piece := text.add(token):
                pieces.append(piece)
                yield piece
            next_ids = [token]
        if text.stopped:
            finish_reason = "stop"
        elif piece := text.rest():
            pieces.append(piece)
            yield piece
        total = _total(usage)
        return Generation(
            text="".join(pieces),
            finish_reason=finish_reason,
            prompt_tokens=len(prompt_ids),
            new_tokens=len(moments),
            seconds_to_first=moments[0],
            seconds=moments[-1],
            bytes_read=total.bytes_read,
            bytes_to_first=usage[0].bytes_read,
            seconds_waited=total.seconds_waited,
            hit_rate=_total(usage[1:]).column_hit_rate,  # the prompt uses all columns
        )

    def _next_token(
        self, model: CausalLM, ids: list[int], cache: Cache, sampler: Sampler, peak: PeakMemory | None
    ) -> int:
        return sampler.pick(advance(model, ids, cache, slice_tokens=self._slice_tokens, peak=peak))

    @property
    def model(self) -> CausalLM:
        """The loaded model. Raises ``RuntimeError`` when it has been closed."""
        return self._model()

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layers compute in."""
        return self.model.dtype

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model's tokenizer makes of a text, special tokens not counted."""
        return self._tokenizer.count(text)

    def room(self, prompt: str | Messages) -> int:
        """Return how many tokens may follow a prompt; 0 or less if the prompt fills the window.

        Args:
            prompt: See :meth:`generate`.

        Raises:
            ValueError: The prompt is not usable; the message says why.
        """
        return self.max_length - len(self._tokenizer.encode(prompt))


def _total(steps: list[Meter]) -> Meter:
    return Meter(*map(sum, zip(*map(astuple, steps), strict=True))) if steps else Meter()
