"""Prompts ask decoder rerankers: here are the official formats, and one for any other instruct model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.models.directory import is_gguf
from grating_core.text.chat import ChatFormat
from grating_core.text.inputs import Inputs, read_inputs
from grating_core.text.rendered import pair_format

_log = logging.getLogger("grating")
_SLOT = re.compile(r"\{(instruction|query|document)\}")


@dataclass(frozen=True)
class Prompt:
    """A prompt asks a decoder whether a document answers a query.

    Attributes:
        pieces: The text of a pair, with the slots ``{instruction}``, ``{query}`` and ``{document}``. Each piece is
            tokenised on its own, because some models were trained so. Special tokens are written out. The document
            comes once; the text behind it in the same piece counts as a piece of its own.
        yes: The answer whose logit is the score. It must be a single token of the model, or is a token's number.
        no: The answer whose logit is subtracted from it; None to subtract nothing.
        instruction: The instruction to judge by, if the user gives none.
        instruction_format: The format of an instruction in its slot. An empty instruction leaves the slot empty.
        max_length: The most tokens of a pair, if the user gives no limit.
        temperature: The number that the score is divided by, so that its logistic function is the probability.
        ending: The text behind each document that is tokenised together with it, because they may share a token.
        stripped: Whether white space around query and document is left out.

    Raises:
        ValueError: There is no slot for the query or the document, or more than one for the document.
    """

    pieces: tuple[str, ...]
    yes: str | int = "yes"
    no: str | int | None = "no"
    instruction: str = ""
    instruction_format: str = "{instruction}"
    max_length: int = 8192
    temperature: float = 1.0
    ending: str = ""
    stripped: bool = False

    def __post_init__(self) -> None:
        pieces: object = self.pieces
        if isinstance(pieces, str):
            raise ValueError(f"pieces={pieces!r} must be a tuple of texts; write pieces=({pieces!r},)")
        object.__setattr__(self, "pieces", tuple(self.pieces))  # a list would not be hashable
        slots = [slot for piece in self.pieces for slot in _SLOT.findall(piece)]
        if slots.count("document") != 1 or "query" not in slots:
            raise ValueError(
                f"template has the slots {slots}; a prompt needs {{query}}, and {{document}} exactly once: "
                f"write them into its pieces"
            )

    @property
    def takes_instruction(self) -> bool:
        """Whether there is a slot for an instruction."""
        return any("{instruction}" in piece for piece in self.pieces)

    @property
    def asked(self) -> str:
        """The part of a model's identity that stands for the question and the score, but not the instruction."""
        asked = (self.pieces, self.yes, self.no, self.temperature, self.ending, self.stripped)
        return json.dumps(asked)

    def fill(self, query: str, instruction: str | None) -> tuple[list[str], str, list[str]]:
        """Return the pieces before the document's piece, the text that it begins with, and the pieces behind.

        Args:
            query: The query.
            instruction: The instruction to judge by; None for the prompt's own.
        """
        wanted = self.instruction if instruction is None else instruction
        values = {
            "query": query,
            "instruction": self.instruction_format.replace("{instruction}", wanted) if wanted else "",
        }
        number = next(number for number, piece in enumerate(self.pieces) if "{document}" in piece)
        head, _, tail = self.pieces[number].partition("{document}")
        after = [piece for piece in (tail, *self.pieces[number + 1 :]) if piece]
        return (
            [_filled(piece, values) for piece in self.pieces[:number]],
            _filled(head, values),
            [_filled(piece, values) for piece in after],
        )


def _filled(piece: str, values: Mapping[str, str]) -> str:
    # All slots are filled at once, so that a query with "{document}" in it stays as it is.
    return _SLOT.sub(lambda slot: values[slot[1]], piece)


_BGE = Prompt(
    # https://huggingface.co/BAAI/bge-reranker-v2-gemma
    pieces=("<bos>", "A: {query}", "\n", "B: {document}", "\n", "{instruction}"),
    yes="Yes",
    no=None,
    instruction="Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either 'Yes' or 'No'.",
    max_length=1024,
)

PROMPTS: dict[str, Prompt] = {
    # https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
    "qwen3-reranker": Prompt(
        pieces=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
            'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
            "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
    "bge-reranker-v2-gemma": _BGE,
    # https://huggingface.co/BAAI/bge-reranker-v2-minicpm-layerwise; it has heads of its own instead of an answer.
    "bge-reranker-v2-minicpm-layerwise": Prompt(
        pieces=("<s>", *_BGE.pieces[1:]), yes="Yes", no=None, instruction=_BGE.instruction, max_length=1024
    ),
    # FlagEmbedding/inference/reranker/decoder_only/lightweight.py of https://github.com/FlagOpen/FlagEmbedding
    "bge-reranker-v2.5-gemma2-lightweight": Prompt(
        pieces=_BGE.pieces,
        instruction="Predict whether passage B contains an answer to query A.",
        max_length=1024,
    ),
    # https://huggingface.co/zeroentropy/zerank-1, modeling_zeranker.py: the query is the system's message.
    "zerank": Prompt(
        pieces=(
            "<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n",
        ),
        yes="Yes",
        no=None,
        temperature=5.0,
        stripped=True,
    ),
    # https://huggingface.co/ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b: the logit of token 0, "!".
    "ctxl-rerank-v2": Prompt(
        pieces=(
            "Check whether a given document contains information helpful to answer the query.\n"
            "<Document> {document}",
            "<Query> {query}{instruction} ??",
        ),
        yes="!",
        no=None,
        instruction_format=" {instruction}",
        ending="\n",
    ),
    # https://huggingface.co/nvidia/llama-nemotron-rerank-1b-v2, whose tokenizer begins each text with that token.
    "nemotron-rerank": Prompt(pieces=("<|begin_of_text|>question:{query} \n \n passage:{document}",)),
    # https://github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py
    "mxbai-rerank-v2": Prompt(
        pieces=(
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n",
            "{instruction}query: {query}",
            "\n",
            "document: {document}",
            "\n",
            "You are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your "
            "binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        yes="1",
        no="0",
        instruction_format="instruction: {instruction}\n",
    ),
}
"""The official formats, by the name that ``template=`` takes."""

# Patterns of the names of the models, or of their directories, that were trained with these formats.
_MODELS = {
    "qwen3-reranker": r"qwen3-reranker",
    "bge-reranker-v2-gemma": r"bge-reranker-v2-gemma",
    "bge-reranker-v2-minicpm-layerwise": r"bge-reranker-v2-minicpm",
    "bge-reranker-v2.5-gemma2-lightweight": r"bge-reranker-v2\.5-gemma2",
    "mxbai-rerank-v2": r"mxbai-rerank-\w+-v2",
    "zerank": r"zerank-[12]",
    "ctxl-rerank-v2": r"ctxl-rerank-v2",
    "nemotron-rerank": r"llama-nemotron-rerank-\d|nv-rerankqa-1b",
}

_ANY_MODEL = (
    "{instruction}\n\nQuery: {query}\n\nDocument: {document}\n\n"
    "Does the document meet the requirements? Answer only yes or no."
)
_ANY_INSTRUCTION = "Judge whether the document is relevant to the query."


class Asked(Protocol):
    """This protocol is for families: it says how their models are asked."""

    @property
    def causal(self) -> bool:
        """Whether a model may take a prompt."""

    @property
    def asks(self) -> bool:
        """Whether the score is the logit of an answer."""

    @property
    def prompt(self) -> str | None:
        """The name of the official prompt of all models of the family; None if they have none."""


def find_prompt(template: Prompt | str | None, model: str, directory: Path, family: Asked) -> Prompt | None:
    """Find the prompt of a model; None if its tokenizer joins the two texts without a question.

    Args:
        template: The user's choice: a prompt, or the name of an official one. None takes the model's own.
        model: The name that the user gave the model; official formats are known by it.
        directory: The model's directory, or its GGUF file.
        family: The model's family.

    Raises:
        ModelNotFoundError: The tokenizer's settings or its chat template are damaged.
        UnsupportedModelError: The model's own format cannot be used.
        ValueError: ``template`` is neither a prompt nor the name of one.
    """
    names = (Path(model).name, *_names(directory.resolve()))
    official = next((prompt for name in names if (prompt := official_prompt(name))), None)
    if template is None and (inputs := read_inputs(directory)).used:
        own = _own_prompt(directory, inputs, family)
        # Such files do not say what the score is divided by.
        return own if own is None or official is None else replace(own, temperature=official.temperature)
    if not family.causal and family.prompt is None:
        if template is None:
            return None
        raise ValueError(
            f"template={template!r}: this model takes no template, because its tokenizer joins query and "
            f"document. Leave the template out"
        )
    if isinstance(template, Prompt):
        return template
    if template is not None:
        if isinstance(template, str) and template in PROMPTS:
            return PROMPTS[template]
        raise ValueError(
            f"template={template!r} is not known; use one of {', '.join(PROMPTS)}, or a Prompt of your own"
        )
    if official is not None:
        return official
    if family.prompt is not None:
        return PROMPTS[family.prompt]
    if not family.asks:
        return None
    _warn_once(model)
    return _chat_prompt(directory)


def _own_prompt(directory: Path, inputs: Inputs, family: Asked) -> Prompt | None:
    """Return the prompt that a model's files describe; None if its tokenizer joins the texts."""
    if family.asks != (inputs.answers is not None):
        raise UnsupportedModelError(
            f"{directory / 'modules.json'} does not fit the model's architecture: LogitScore reads logits of "
            f"tokens, and other modules read something else. Pass template=Prompt(...)"
        )
    if inputs.chat is None:
        return None
    found, (yes, no) = pair_format(directory, inputs), inputs.answers or (0, None)
    return Prompt(
        pieces=found.pieces,
        yes=yes,
        no=no,
        instruction=found.instruction,
        instruction_format=found.instruction_format,
        ending=found.ending,
        stripped=found.stripped,
    )


@cache  # a model may be opened many times
def _warn_once(model: str) -> None:
    """Log that a model is asked a question that it was not trained with."""
    _log.warning(
        "model=%r is asked the default question, because no official prompt is known for this name. If it was "
        "trained with one, set template= to its name (%s) or to a Prompt with its words",
        model,
        ", ".join(PROMPTS),
    )


def _names(path: Path) -> list[str]:
    """Return the names that a model may have, as its path shows them."""
    if is_gguf(path):
        return [path.name, path.parent.name]
    # In the hub's cache it is models--owner--name/snapshots/revision.
    return [path.name, path.parent.parent.name] if path.parent.name == "snapshots" else [path.name]


def usual_length(prompt: Prompt | None, family: Asked) -> int | None:
    """Return the most tokens of a pair if the user gives no limit; None for the model's whole window."""
    if prompt is not None:
        return prompt.max_length
    return Prompt.max_length if family.causal else None


def official_prompt(model: str) -> Prompt | None:
    """Return the format that a model was trained with; None if neither its name nor its directory's is known."""
    names = (name for name, pattern in _MODELS.items() if re.search(pattern, model, re.IGNORECASE))
    return PROMPTS.get(next(names, ""))


def _chat_prompt(directory: Path) -> Prompt:
    """Return a yes/no question in the chat format of an instruct model; plain text if it has none."""
    try:
        # Thinking is off, because the next token has to be the answer.
        text = ChatFormat(directory).render([{"role": "user", "content": _ANY_MODEL}], enable_thinking=False)
    except Exception as error:  # a template is a program, which may fail in any way
        raise ModelNotFoundError(f"the chat template in {directory} cannot be used: {error}") from error
    return Prompt(pieces=(f"{_ANY_MODEL}\n" if text is None else text,), instruction=_ANY_INSTRUCTION)
