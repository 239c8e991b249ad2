"""The format of a pair that a chat template with the roles ``query`` and ``document`` describes.

sentence-transformers 5.4 and later write a pair so for a language model: query and document are messages of roles
of their own, and a prompt is the system's message. What the template makes of them is one text, whose tokens are
the model's input.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.text.chat import ChatFormat
from grating_core.text.inputs import Inputs
from grating_core.text.tokenizer import alike

_QUERY, _DOCUMENT, _INSTRUCTION = "{query}", "{document}", "{instruction}"
_MARKS = "qqqQUERYqqq", "dddDOCUMENTddd", "sssSYSTEMsss"  # texts that no template writes by itself
# Texts as they come: with white space around them, quotes, and something that looks like markup.
_PROBES = (" What is 'this'? ", "\tIt is <b>that</b>.\n\n"), ("0", '1 & "2"')
_SPECIAL = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")  # what special tokens look like


class PairFormat(NamedTuple):
    """This class is the text of a pair, with slots.

    Attributes:
        pieces: The text with the slots ``{query}``, ``{document}`` and perhaps ``{instruction}``, without the
            ending.
        ending: The text behind the document.
        stripped: Whether the template takes white space off query and document.
        instruction: The instruction if the user gives none.
        instruction_format: The format of an instruction in its slot.
    """

    pieces: tuple[str, ...]
    ending: str
    stripped: bool
    instruction: str
    instruction_format: str


def pair_format(directory: Path, inputs: Inputs) -> PairFormat:
    """Return the format of a pair that a model's chat template describes.

    Args:
        directory: The model's directory.
        inputs: What its files say about its texts.

    Raises:
        ModelNotFoundError: The chat template is missing or damaged.
        UnsupportedModelError: The template does not show both texts of a pair, or changes them.
    """
    template = _Template(directory, inputs)
    text, instruction, form = _with_slot(template, inputs.prompt)
    if text.count(_DOCUMENT) != 1 or _QUERY not in text:
        raise UnsupportedModelError(
            f"the chat template in {directory} does not show the messages of the roles 'query' and 'document', "
            f"which a pair is. Take another template, or pass template=Prompt(...)"
        )
    filled = text.replace(_INSTRUCTION, form.replace(_INSTRUCTION, instruction) if instruction else "")
    for stripped in (False, True):
        if all(_filled(filled, *probe, stripped) == template.write(*probe, inputs.prompt) for probe in _PROBES):
            head, _, tail = text.partition(_DOCUMENT)
            slots = [tail.index(slot) for slot in (_QUERY, _INSTRUCTION) if slot in tail]
            # A text behind a line break shares no token with what is before it.
            place = tail.rfind("\n", 0, min(slots)) + 1 if slots else len(tail)
            pieces = (head + _DOCUMENT, *([tail[place:]] if slots else ()))
            return PairFormat(pieces, tail[:place], stripped, instruction, form)
    raise UnsupportedModelError(
        f"the chat template in {directory} changes the texts of a pair, which grating does not do. Take another "
        f"template, or pass template=Prompt(...)"
    )


class _Template:
    """This class writes a pair as sentence-transformers does."""

    def __init__(self, directory: Path, inputs: Inputs) -> None:
        self._format = ChatFormat(directory)
        self._directory = directory
        self._structured = inputs.structured
        self._variables = {"add_generation_prompt": False, **(inputs.chat or {})}

    def write(self, query: str, document: str, system: str = "") -> str:
        """Return the text of a pair."""
        texts = [("system", system)] if system else []
        messages = [self._message(*text) for text in (*texts, ("query", query), ("document", document))]
        try:
            text = self._format.render(messages, **self._variables)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ModelNotFoundError(
                f"the chat template in {self._directory} cannot be used for a pair: {error}"
            ) from error
        if text is None:
            raise ModelNotFoundError(
                f"{self._directory} has no chat template, which its sentence_bert_config.json asks for: fetch the "
                f"file chat_template.jinja again"
            )
        return text

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._structured else text}


def _with_slot(template: _Template, prompt: str) -> tuple[str, str, str]:
    """Return the text of a pair with slots, the instruction if the user gives none, and its format."""
    query, document, system = _MARKS
    without = _slotted(template.write(query, document, prompt))
    try:
        told = _slotted(template.write(query, document, system))
    except ModelNotFoundError:  # some templates refuse a system's message
        return without, "", _INSTRUCTION
    if told.count(_INSTRUCTION) != 1:
        return without, "", _INSTRUCTION
    before, _, after = told.partition(_INSTRUCTION)
    if without.startswith(before) and without.endswith(after) and len(without) >= len(before) + len(after):
        own = without[len(before) : len(without) - len(after)]
        if _QUERY not in own and _DOCUMENT not in own:
            return told, own, _INSTRUCTION
    # The message stands in a part of the text that is not there without it. The part's ends cut no special token.
    first, last = len(without) - alike(told[::-1], without[::-1]), alike(told, without)
    special = [range(found.start() + 1, found.end()) for found in _SPECIAL.finditer(without)]
    for start in range(first, last + 1):
        own = told[start : len(told) - (len(without) - start)]
        if not any(start in place for place in special) and _QUERY not in own and _DOCUMENT not in own:
            return without[:start] + _INSTRUCTION + without[start:], "", own
    return without, "", _INSTRUCTION


def _slotted(text: str) -> str:
    for mark, slot in zip(_MARKS, (_QUERY, _DOCUMENT, _INSTRUCTION), strict=True):
        text = text.replace(mark, slot)
    return text


def _filled(text: str, query: str, document: str, stripped: bool) -> str:
    if stripped:
        query, document = query.strip(), document.strip()
    return text.replace(_QUERY, query).replace(_DOCUMENT, document)
