"""What is asked in each application, of which systems, and how good their answers are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import ir_measures
import numpy as np
from ir_measures import P, R, Success, nDCG
from numpy.typing import NDArray

from benchmarks.applications.worker import Corpus, Job, Question, System
from benchmarks.collections import Collection, conversation
from grating_core.files.locks import replace_file
from grating_core.files.places import cache_directory
from grating_core.models.bundled import BUNDLED_RERANKER, bundled_embedder, bundled_model

Framework = Literal["LangChain", "LlamaIndex"]
Span = tuple[int, int]

Judge = Callable[[Sequence[list[Any]]], dict[str, float]]
"""Means over the questions, by several measures, of how good it is what was kept for each of them."""

DOCUMENTS = 30  # in a long text
PLANTED = 3  # of them relevant, at most


@dataclass(frozen=True)
class Application:
    """An application on one collection.

    Attributes:
        name: What the table calls it.
        job: What every system is given.
        systems: What is compared.
        judge: Says how good answers are.
    """

    name: str
    job: Job
    systems: list[System]
    judge: Judge


def hybrid_rag(framework: Framework, collection: Collection, questions: int, budget: str) -> Application:
    """The ten best of what BM25 and embeddings find together."""
    asked = [Question(name, collection.queries[name]) for name in sample(collection, questions)]
    return Application(
        f"RAG in {framework}, {collection.name}",
        _search_job(f"benchmarks.applications.{framework.lower()}:rag", collection, asked),
        [*_usual(framework, batch_size=2), *_grating("GratingRerank", budget)],
        lambda kept: judge_rankings([nDCG @ 10, P @ 10], collection, asked, kept),
    )


def agent_memory(collection: Collection, questions: int, budget: str) -> Application:
    """The five turns of a conversation that a question about it brings to mind."""
    asked = [
        Question(name, collection.queries[name], conversation(name)) for name in sample(collection, questions)
    ]
    return Application(
        f"agent memory in LlamaIndex, {collection.name}",
        _search_job("benchmarks.applications.llamaindex:memory", collection, asked),
        [*_usual("LlamaIndex", batch_size=4), *_grating("GratingRerank", budget)],
        lambda kept: judge_rankings([R @ 5, Success @ 5, nDCG @ 5], collection, asked, kept),
    )


def long_context(collection: Collection, questions: int, budget: str) -> Application:
    """The passages of a long text that answer a question and fit into the prompt."""
    texts = [plant(collection, name, seed) for seed, name in enumerate(sample(collection, questions))]
    asked = [Question(text.query, collection.queries[text.query], text.text) for text in texts]
    return Application(
        f"long context in LangChain, {collection.name}",
        Job("benchmarks.applications.langchain:long_context", bundled_model(BUNDLED_RERANKER), asked),
        [*_usual("LangChain", batch_size=2), *_grating("GratingContextSelector", budget)],
        lambda kept: {"passages kept": mean(map(share_kept, texts, kept))},
    )


def _usual(framework: Framework, *, batch_size: int) -> list[System]:
    """No reranker, and the framework's usual one, as it is and as fast as its user can make it.

    Args:
        framework: Whose.
        batch_size: Of 1, 2, 4, 8 and 16 the fastest on such texts, or within 3 % of it.
    """
    name = "CrossEncoderReranker" if framework == "LangChain" else "SentenceTransformerRerank"
    compared = [
        System("no reranker", "none"),
        System(name, "usual"),
        System(f"{name}, batches of {batch_size}", "usual", {"batch_size": batch_size}),
    ]
    if framework == "LlamaIndex":  # takes the weights as they are
        return compared
    settings = {"batch_size": batch_size, "dtype": "bfloat16"}
    return [*compared, System(f"{name}, batches of {batch_size}, bfloat16", "usual", settings)]


def _grating(name: str, budget: str) -> list[System]:
    compared = [System(name, "grating"), System(f"{name}, {budget}", "grating", {"memory_budget": budget})]
    if name == "GratingRerank":
        compared.insert(1, System(f"{name}, estimated scores", "grating", {"scores": "estimated"}))
    return compared


def sample(collection: Collection, count: int, seed: int = 0) -> list[str]:
    """Names of queries for which people found something relevant.

    Args:
        collection: Where they are from.
        count: How many; all, if there are fewer.
        seed: Of the sample.
    """
    judged = [name for name in collection.queries if max(collection.grades.get(name, {0: 0}).values()) > 0]
    return random.Random(seed).sample(judged, min(count, len(judged)))


def judge_rankings(
    measures: Sequence[Any], collection: Collection, asked: Sequence[Question], kept: Sequence[list[str]]
) -> dict[str, float]:
    """Means over questions.

    Args:
        measures: Of ir-measures.
        collection: Has the judgements.
        asked: The questions.
        kept: Ids of texts for each of them, best first.
    """
    grades = {question.id: collection.grades[question.id] for question in asked}
    run = {
        question.id: {name: -float(place) for place, name in enumerate(ranking)}
        for question, ranking in zip(asked, kept, strict=True)
    }
    found = ir_measures.calc_aggregate(measures, grades, run)
    return {str(measure): float(found[measure]) for measure in measures}


# Long texts.


@dataclass(frozen=True)
class LongText:
    """Documents of a collection, one after the other, some of which answer a query.

    Attributes:
        query: Its name.
        text: All documents.
        planted: Where those that people judged relevant begin and end.
    """

    query: str
    text: str
    planted: list[Span]


def plant(collection: Collection, query: str, seed: int) -> LongText:
    """Put the best documents for a query into a long text, at random places among others that nobody judged.

    Args:
        collection: Has the documents.
        query: Its name.
        seed: Of the choice and of the order.
    """
    generator = random.Random(seed)
    grades = collection.grades[query]
    relevant = sorted((name for name in grades if grades[name] > 0), key=lambda name: -grades[name])[:PLANTED]
    others = [name for name in collection.texts if name not in grades and collection.texts[name]]
    names = relevant + generator.sample(others, DOCUMENTS - len(relevant))
    generator.shuffle(names)
    text, planted = "", []
    for name in names:
        if name in relevant:
            planted.append((len(text), len(text) + len(collection.texts[name])))
        text += collection.texts[name] + "\n\n"
    return LongText(query, text, planted)


def share_kept(text: LongText, kept: list[Span]) -> float:
    """Mean over the planted documents of the share of their characters that was kept."""
    characters = {place for start, end in kept for place in range(start, end)}
    return mean(len(characters.intersection(range(*span))) / (span[1] - span[0]) for span in text.planted)


# First stages.


def _search_job(build: str, collection: Collection, asked: list[Question]) -> Job:
    embedder = bundled_embedder()
    corpus = Corpus(collection.texts, embed(embedder, list(collection.texts.values())), embedder)
    return Job(build, bundled_model(BUNDLED_RERANKER), asked, corpus)


def embed(embedder: Path, texts: list[str]) -> NDArray[np.float32]:
    """The embeddings of texts, computed once.

    Args:
        embedder: Directory of a sentence-transformers model.
        texts: What is embedded.

    Returns:
        float32 ``[T, D]``.
    """
    digest = hashlib.sha256("\0".join([embedder.name, *texts]).encode()).hexdigest()[:16]
    path = cache_directory() / "benchmarks" / f"embeddings-{digest}.npy"
    if not path.is_file():
        from sentence_transformers import SentenceTransformer  # only here: it takes seconds to import

        encoder = SentenceTransformer(str(embedder), device="cpu")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(buffer := BytesIO(), encoder.encode_document(texts, show_progress_bar=True))
        replace_file(path, buffer.getvalue())
    vectors: NDArray[np.float32] = np.load(path)
    return vectors
