"""This is the command ``grating generate``."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from grating_core.cli.inputs import read_documents
from grating_core.cli.options import Takes
from grating_core.cli.output import err, tell, write, write_text
from grating_core.settings import AnswerSettings, GenerationSettings

if TYPE_CHECKING:
    from grating_core.results import Generation


def generate(
    prompt: str,
    settings: Annotated[GenerationSettings, Takes()],
    answer: Annotated[AnswerSettings, Takes()],
    chat: bool = True,
) -> None:
    """Answer a prompt with a language model, which need not fit into memory.

    Args:
        prompt: The prompt, or - for standard input.
        chat: Whether the prompt is a message to answer or the beginning of a text.
    """
    text = read_documents("-", format="text")[0] if prompt == "-" else prompt
    with err.status("Loading ..."):
        from grating_core.generation import StreamedCausalLM

        loaded = StreamedCausalLM.open(settings)
    with loaded:
        stream = loaded.stream(
            [{"role": "user", "content": text}] if chat else text,
            max_new_tokens=answer.max_new_tokens,
            temperature=answer.temperature,
            top_p=answer.top_p,
            seed=answer.seed,
            stop=answer.stop,
        )
        generation = _written(stream)
    tell(_speed_line(generation), "dim")


def _written(stream: Generator[str, None, Generation]) -> Generation:
    """Print a text as it comes, and return what it took."""
    while True:
        try:
            write_text(next(stream))
        except StopIteration as end:
            write("\n")
            generation: Generation = end.value
            return generation


def _speed_line(generation: Generation) -> str:
    tokens, after = generation.new_tokens, generation.seconds - generation.seconds_to_first
    speed = f", the others {(tokens - 1) / after:,.1f} a second" if tokens > 1 else ""
    line = f"{tokens} tokens; the first after {generation.seconds_to_first:.2f} s{speed}"
    if not generation.bytes_read:
        return line
    rate = generation.hit_rate
    found = "" if rate is None else f", {rate:.0%} of the columns were in memory"
    each = (generation.bytes_read - generation.bytes_to_first) / max(1, tokens - 1)
    return (
        f"{line}; read {generation.bytes_to_first / 1e6:,.0f} MB for the prompt and {each / 1e6:,.1f} MB a token, "
        f"waited {generation.seconds_waited:.2f} s for the disk{found}"
    )
