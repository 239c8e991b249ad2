"""This module lists all settings of models, reranking and generating: names, types, defaults, texts and checks.

``from_pretrained``, the command line, the adapters and the tables of the documentation take their settings from
here. This module imports neither torch nor transformers, so that ``grating --help`` need not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, Self

from grating_core.arguments import (
    INPUTS_PREFERENCE,
    PRODUCTS_PREFERENCE,
    Guarantee,
    LongDocuments,
    check_bits,
    check_density,
    check_preference,
    check_target,
    is_number,
    is_one_of,
    parse_budget,
    whole_number,
)
from grating_core.files.places import absolute

if TYPE_CHECKING:
    import torch

    from grating_core.pruning import PruningPolicy
    from grating_core.text.prompts import Prompt

Engine = Literal["auto", "grating", "transformers"]
PruningName = Literal["auto", "cluster", "off"]

_PATHS = ("model", "lens", "adapter", "cache_dir")  # settings that may name a place on this machine


def setting(default: Any, about: str, *, basic: bool = False, shown: bool = True) -> Any:
    """Describe a field.

    Args:
        default: The default. None means the same value.
        about: The text for the documentation, the command line and the adapters.
        basic: Whether a beginner should see the setting.
        shown: Whether the value may be printed. A secret may not.
    """
    return field(default=default, repr=shown, metadata={"about": about, "basic": basic})


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """This class holds the settings of any model. None means that a setting is not given.

    Raises:
        ValueError: A value is not usable; the message names it. Values that depend on the machine or on the
            model's files, such as ``device``, are checked when the model is opened.
    """

    model: str | Path = field(
        metadata={
            "about": "A hub id, a local directory in Hugging Face layout with safetensors weights, a language "
            "model's GGUF file, or a name such as 'bundled:ms-marco-minilm-l12'.",
            "basic": True,
        }
    )
    device: str | torch.device | None = setting(
        None, "'cpu', 'cuda', 'cuda:N' or 'mps'. None takes the best device of this machine.", basic=True
    )
    dtype: str | torch.dtype = setting(
        "auto",
        "'float32', 'bfloat16' or 'float16' for what the layers compute in; 'int8' for matrices in 8 bits, for "
        "rerankers on the CPU. Without a budget they keep the layers without 8 bits as well, which decide close "
        "contests. 'auto' takes bfloat16 where the processor has instructions for it, and float32 elsewhere; or "
        "int8, if kernels for it are there and calibration found that it keeps 0.99 of the top 5.",
        basic=True,
    )
    memory_budget: str | int | None = setting(
        None,
        "How much memory the model may take, in bytes or as a size such as '300MB', beyond what importing the "
        "packages and the tokenizer takes. grating reads from disk what does not fit; results stay the same, but "
        "for rounding. None keeps everything in memory.",
        basic=True,
    )
    max_length: int | None = setting(
        None,
        "The most tokens of a query and a document together. None takes what the model was made for, 8,192 at "
        "most for decoders.",
    )
    adapter: str | Path | None = setting(
        None, "A LoRA adapter as PEFT saves it, a directory or hub id. grating merges it into the weights."
    )
    revision: str | None = setting(
        None, "The branch, tag or commit of the model on the hub. None takes the newest."
    )
    token: str | bool | None = setting(
        None,
        "The access token for the hub. None or True takes the one of 'hf auth login' or HF_TOKEN, False sends "
        "none. It is never written to disk.",
        shown=False,
    )
    cache_dir: str | Path | None = setting(
        None, "The directory that keeps the hub's files. None takes the hub's own place."
    )
    local_files_only: bool = setting(
        False, "Whether to use only files that are kept here, without asking the hub."
    )
    show_progress: bool = field(
        default=False,
        compare=False,
        metadata={"about": "Whether to show progress bars while files are fetched or converted.", "basic": False},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path):
            raise ValueError(f"model={self.model!r} must be a hub id, a directory or another name of a model")
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None:
                object.__setattr__(self, one.name, one.default)
            elif one.name in _PATHS:
                object.__setattr__(self, one.name, absolute(one.name, value))
            elif one.name in ("device", "dtype") and type(value).__module__ == "torch":
                # The name is kept, because models are shared by equal settings.
                object.__setattr__(self, one.name, str(value).removeprefix("torch."))
        if self.max_length is not None:
            object.__setattr__(self, "max_length", whole_number("max_length", self.max_length))
        # Reading the property refuses a value that is no size.
        object.__setattr__(self, "memory_budget", self.budget)

    @cached_property
    def budget(self) -> int | None:
        """The memory budget in bytes; None without one."""
        return None if self.memory_budget is None else parse_budget(self.memory_budget)

    @property
    def name(self) -> str:
        """The name of the model, without the path that leads to it. A hub's id is no path."""
        path = PurePath(self.model)
        return path.name.removesuffix(".gguf") if path.is_absolute() else str(self.model)

    def portable(self) -> Self:
        """Return the settings without the token, with which another process finds the same model."""
        return replace(self, token=None)


@dataclass(frozen=True, kw_only=True)
class RerankSettings(ModelSettings):
    """This class holds the settings of a reranker."""

    engine: Engine = setting(
        "auto",
        "What computes the layers. 'auto' takes grating's own layers where they know the architecture, and else "
        "transformers' classifiers, which are slower, drop nothing early and take no memory budget. 'grating' "
        "refuses other architectures; 'transformers' computes all classifiers so.",
    )
    pruning: PruningName | PruningPolicy = setting(
        "auto",
        "How candidates are dropped early. 'auto' uses the lens of the model and drops none where there is no "
        "lens; 'cluster' is the rule of the GRATING paper; 'off' drops none. Python also takes a policy object.",
        basic=True,
    )
    target: float = setting(
        0.98,
        "The share of the full model's top K that pruning keeps, on average over requests like those that the "
        "lens was calibrated on. A higher target prunes less.",
        basic=True,
    )
    guarantee: Guarantee = setting(
        "share", "What the target counts. 'set' makes it the probability that the whole top K is kept."
    )
    lens: str | Path | None = setting(
        None,
        "The directory of the lens to prune by. None takes the lens that was calibrated here for this model, "
        "or the one that comes with grating.",
    )
    recalibrate: float = setting(
        0.0,
        "The share of requests, from 0 (off) to 1, that grating computes again without pruning while nobody "
        "waits. What pruning lost there moves its margins until the target is kept.",
    )
    long_documents: LongDocuments = setting(
        "truncate",
        "What happens to a document that does not fit into the window. 'truncate' cuts its end; 'windows' "
        "scores overlapping windows and takes the best.",
    )
    template: Prompt | str | None = setting(
        None,
        "The name of the official prompt that a decoder is asked with, such as 'qwen3-reranker'. Python also "
        "takes a Prompt. None takes the model's own. Encoders have no template.",
    )
    instruction: str | None = setting(
        None, "What a decoder is to judge by, if its template has a place for it. None takes the template's words."
    )
    cutoff_layers: int | None = setting(
        None,
        "The layer whose head gives the score, for models with heads behind several layers, such as "
        "bge-reranker-v2-minicpm-layerwise. The layers behind it are left out. None takes the last.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.target)
        if self.cutoff_layers is not None:
            object.__setattr__(self, "cutoff_layers", whole_number("cutoff_layers", self.cutoff_layers))
        if not is_one_of(Engine, self.engine):
            raise ValueError(f"engine={self.engine!r} must be 'auto', 'grating' or 'transformers'")
        if not is_one_of(Guarantee, self.guarantee):
            raise ValueError(f"guarantee={self.guarantee!r} must be 'share' or 'set'")
        if not is_one_of(LongDocuments, self.long_documents):
            raise ValueError(f"long_documents={self.long_documents!r} must be 'truncate' or 'windows'")
        if self.instruction is not None and not isinstance(self.instruction, str):
            raise ValueError(f"instruction={self.instruction!r} must be a string or None")
        if not is_number(self.recalibrate) or not 0 <= self.recalibrate <= 1:
            raise ValueError(
                f"recalibrate={self.recalibrate!r} must be a share of requests: a number from 0 (off) to 1"
            )
        is_policy = hasattr(self.pruning, "route") and not isinstance(self.pruning, type)
        if not is_policy and not is_one_of(PruningName, self.pruning):
            raise ValueError(
                f"pruning={self.pruning!r} is unknown; use 'auto', 'cluster', 'off', or an object with a route "
                f"method"
            )
        if self.lens is not None and self.pruning != "auto":
            raise ValueError(
                f"lens={self.lens!r} and pruning={self.pruning!r} exclude each other: a lens takes 'auto'"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(ModelSettings):
    """This class holds the settings of a language model that generates text."""

    max_length: int | None = setting(
        None,
        "The most tokens of a prompt and its continuation together. None takes what the model was made for, "
        "4,096 at most. A memory budget pays for the keys and values of that many tokens.",
    )
    mlp_density: float | None = setting(
        None,
        "The share of the MLPs' weights that each new token chooses, above 0 and at most 1 (dynamic input "
        "pruning, on the CPU). grating then reads fewer bytes within a budget, and the text differs from the "
        "dense model's. What is in memory or read on the way is used as well. None uses all.",
        basic=True,
    )
    inputs_preference: float | None = setting(
        None,
        "What counts of an MLP's input whose columns are not in memory, above 0 and at most 1, with mlp_density "
        "and a memory budget. Less reads fewer bytes and changes the text more; 1 prefers no column. None takes "
        f"what grating simulate has fitted to this model, or else {INPUTS_PREFERENCE}.",
    )
    products_preference: float | None = setting(
        None,
        f"The same for a gated product. None takes what was fitted, or else {PRODUCTS_PREFERENCE}.",
    )
    bits: int | None = setting(
        None,
        "The bits of each weight, on the CPU: 8 takes half of the memory of bfloat16 and changes the text hardly, "
        "4 takes about a third and changes it more. grating makes them of the model's weights the first time, "
        "and keeps them in its cache directory. None takes the weights as they are.",
        basic=True,
    )
    kv_bits: int | None = setting(
        None,
        "The bits of keys and values, 8, which take half of the memory of bfloat16. None keeps them as computed.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "int8":
            raise ValueError(
                f"dtype={self.dtype!r} is for rerankers: use bits=8 for weights in 8 bits, and leave dtype out"
            )
        check_bits("bits", self.bits, (8, 4), "the bits of a weight")
        check_bits("kv_bits", self.kv_bits, (8,), "the bits of keys and values")
        if self.mlp_density is not None:
            check_density(self.mlp_density)
        for name in ("inputs_preference", "products_preference"):
            if (preference := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_preference(name, preference))


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """This class holds the settings of one generated text.

    Raises:
        ValueError: A value is not usable; the message names it.
    """

    max_new_tokens: int = setting(256, "The most tokens to generate.")
    temperature: float = setting(
        0.0,
        "How freely tokens are picked. 0 always takes the likeliest; above 0, tokens are picked at random, by "
        "probabilities that a higher temperature makes more alike.",
    )
    top_p: float = setting(
        1.0,
        "The probability, above 0 and at most 1, of the likeliest tokens that are picked from, together.",
    )
    seed: int | None = setting(
        None,
        "The seed of the random numbers. The same seed gives the same text, unless mlp_density chooses other "
        "columns because another budget has others in memory, or because another disk was measured. "
        "None gives another text every time.",
    )
    stop: Sequence[str] = setting((), "Strings that end the text. They are not part of it.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens))
        if self.seed is not None and whole_number("seed", self.seed, 0) >= 2**63:
            raise ValueError(f"seed={self.seed!r} must be below 2**63")
        if not is_number(self.temperature) or not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature!r} must be a number, 0 or more")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be a number above 0, 1 at most")
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise ValueError(f"stop={self.stop!r} must be a list of strings")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r} has {text!r} in it; each must be a string that is not empty")
