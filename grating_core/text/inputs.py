"""This module reads what a sentence-transformers model does to the texts of a pair."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.models.modules import (
    SETTINGS,
    blaming,
    read_list,
    read_object,
    read_settings,
    transformer_folder,
)

_FILE = "sentence_bert_config.json"
# What a transformer gives, by the task that it is loaded for.
_OUTPUTS = {
    "feature-extraction": "last_hidden_state",
    "sequence-classification": "logits",
    "text-generation": "logits",
}
# These settings change no token and no score of a pair.
_IDLE = {
    "module_output_name", "unpad_inputs", "query_length", "document_length", "query_expansion", "return_tensors",
    "padding", "padding_side", "pad_to_multiple_of", "truncation", "return_attention_mask",
    "return_token_type_ids",
    "logits_to_keep", "restore_suffix", "use_fast", "clean_up_tokenization_spaces", "torch_dtype", "dtype",
    "attn_implementation", "add_pooling_layer", "device_map", "low_cpu_mem_usage", "use_safetensors",
    "reference_compile", "use_cache", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code",
}  # fmt: skip
_PARTS = {"model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"}


@dataclass(frozen=True)
class Inputs:
    """This class says what a sentence-transformers model does to a pair before its tokenizer.

    Attributes:
        longest: The most tokens of a pair; None if only the tokenizer and the model say so.
        lowercase: Whether capital letters become small ones, whatever the tokenizer does.
        prompt: The text that goes before a query, or the system's message in a chat format.
        chat: The variables of the chat template that makes a text of a pair; None if the tokenizer joins the two.
        structured: Whether that template takes contents as lists of parts.
        answers: The tokens whose logits are the score; the second is None if only one counts. None without them.
    """

    longest: int | None = None
    lowercase: bool = False
    prompt: str = ""
    chat: Mapping[str, Any] | None = None
    structured: bool = False
    answers: tuple[int, int | None] | None = None

    @property
    def used(self) -> bool:
        """Whether the model's files say more of a pair than its tokenizer does."""
        return self.chat is not None or self.answers is not None


@dataclass(frozen=True)
class _Transformer:
    """This class is the settings of a transformer as they are taken out of the file one by one."""

    path: Path
    fields: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Any]:
        """Return the settings within a setting."""
        found = self.fields.pop(name, None) or {}
        if not isinstance(found, dict):
            raise TypeError(f"{name} is not a JSON object")
        return found

    def refuse(self, others: Collection[str], where: str = "") -> None:
        """Refuse settings that may change the score."""
        if left := sorted(set(others) - _IDLE):
            raise UnsupportedModelError(
                f"{self.path} has {where}{left[0]}, which grating does not implement, and which may change the "
                f"score. Take the setting out if it does not"
            )


def read_inputs(directory: Path) -> Inputs:
    """Return what the files of a model say about its texts.

    Args:
        directory: The model's directory, or its GGUF file.

    Raises:
        ModelNotFoundError: One of the files is missing or damaged.
        UnsupportedModelError: A setting is not implemented; the message names it.
    """
    listed, settings = read_list(directory), read_settings(directory)
    score = next((directory / folder for kind, folder in listed if kind == "LogitScore"), None)
    if not listed or (score is None and settings.get("model_type") != "CrossEncoder"):
        return Inputs()
    if len(listed) == 1:
        task = "sequence-classification"
    else:
        task = "feature-extraction" if score is None else "text-generation"
    path = transformer_folder(directory) / _FILE
    with blaming(path):
        read = _Transformer(path, dict(read_object(path)))
        stated = read.part("processing_kwargs")
        processing = {name: dict(stated.get(name) or {}) for name in ("chat_template", "text", "common")}
        longest, lowercase = _cut(read, processing), bool(read.fields.pop("do_lower_case", False))
        chat, structured = _chat(read, task, processing["chat_template"])
        read.refuse(read.fields)
    return Inputs(
        longest=longest,
        lowercase=lowercase,
        prompt=_prompt(directory / SETTINGS, settings, directory / listed[1].folder if len(listed) > 1 else None),
        chat=chat,
        structured=structured,
        answers=None if score is None else _answers(score / "config.json"),
    )


def _cut(read: _Transformer, processing: Mapping[str, dict[str, Any]]) -> int | None:
    """Return the most tokens of a pair; None if the settings do not say."""
    found = [processing[name].pop("max_length", None) for name in ("chat_template", "text", "common")]
    found.append(read.fields.pop("max_seq_length", None))
    for name in _PARTS & read.fields.keys():
        part = read.part(name)
        if name in ("tokenizer_args", "processor_kwargs"):
            found.insert(-1, part.pop("model_max_length", None))
        read.refuse(part, f"{name}.")
    for name in ("text", "common"):
        read.refuse(processing[name], f"processing_kwargs.{name}.")
    return next((int(number) for number in found if number is not None), None)


def _chat(read: _Transformer, task: str, variables: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Return the variables of the chat template, and whether it takes lists; None without a chat format."""
    if (stated := read.fields.pop("transformer_task", task)) != task:
        raise UnsupportedModelError(
            f"{read.path} has transformer_task={stated!r}, and with these modules it must be {task!r}"
        )
    forms = read.part("modality_config")
    form = forms.get("message") or forms.get("text") or {}
    output = form.get("method_output_name", _OUTPUTS[task])
    if form.get("method", "forward") != "forward" or output not in (_OUTPUTS[task], [_OUTPUTS[task]]):
        raise UnsupportedModelError(
            f"{read.path} reads {form.get('method')}: {output} of the transformer; grating reads its "
            f"{_OUTPUTS[task]} only"
        )
    if forms and not {"text", "message"} & forms.keys():
        raise UnsupportedModelError(f"{read.path} is for {', '.join(forms)}, and grating ranks texts")
    if "message" not in forms:
        return None, False
    return {n: v for n, v in variables.items() if n not in _IDLE}, forms["message"].get("format") != "flat"


def _prompt(path: Path, settings: Mapping[str, Any], second: Path | None) -> str:
    """Return the text that goes before a query if the user gives none."""
    prompts, name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str | None) or name not in prompts:
        raise ModelNotFoundError(f"{path} has default_prompt_name={name!r}, which is none of its prompts")
    prompt = prompts[name] or ""
    if prompt and second is not None and read_object(second / "config.json").get("include_prompt") is False:
        raise UnsupportedModelError(
            f"{second / 'config.json'} has include_prompt=false, and the model has a prompt: grating does not "
            f"leave a prompt out of the pooling"
        )
    return prompt


def _answers(path: Path) -> tuple[int, int | None]:
    """Return the tokens whose logits are the score."""
    with blaming(path):
        fields = read_object(path, needed=True)
        if (name := fields.get("module_input_name", "causal_logits")) != "causal_logits":
            raise UnsupportedModelError(f"{path} has module_input_name={name!r}, which no module before it gives")
        yes, no = fields["true_token_id"], fields.get("false_token_id")
        if any(isinstance(token, bool) or not isinstance(token, int | None) for token in (yes, no)) or yes is None:
            raise TypeError(f"true_token_id={yes!r} and false_token_id={no!r} must be numbers of tokens")
        return yes, no
