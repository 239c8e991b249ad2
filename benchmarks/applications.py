"""Applications as people build them, with grating and with what their framework has for reranking.

    make bench-deps
    .venv/bin/python -m benchmarks.applications --data DIRECTORY

The directory holds the collections cranfield, cisi and locomo. **RAG**, in LangChain on Cranfield and in
LlamaIndex on CISI: BM25's ten best and the ten nearest by embedding (bge-small-en-v1.5 in an embedded Qdrant),
joined by the framework's own reciprocal rank fusion; the best ten of both are kept. **Agent memory**, in
LlamaIndex on LoCoMo: the ``VectorMemoryBlock`` of a conversation recalls the 20 turns nearest to a question about
it, and five are kept. **Long context**, in LangChain on Cranfield: of a text of 30 documents, up to three of which
answer the query, what fits into 1,500 tokens is kept.

Every system has a process of its own with the same first stage in it, and the systems take turns. In the first
round every question is put to every system, which gives the quality. The rounds that follow repeat the first few,
of which the median time is taken, and the mean over them. The embeddings of texts are computed once; that of the
query is part of its time. Memory is counted over what the process holds once everything is imported, the first
stage has answered and a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.collections import Collection, conversation, load_collection
from benchmarks.report import RESULTS, Output, Row, write_result
from benchmarks.worker import Answer, Ask, Ready, System, Worker, loaded, return_memory, take_turns
from grating_core.files.places import cache_directory
from grating_core.files.writing import replacing
from grating_core.models.bundled import BUNDLED_RERANKER, bundled_embedder, bundled_model

PEERS = (
    *("sentence-transformers", "langchain-classic", "langchain-huggingface", "llama-index-core", "qdrant-client"),
)
DOCUMENTS = 30  # in a long text
PLANTED = 3  # of them relevant, at most

Span = tuple[int, int]

Judge = Callable[[Sequence[list[Any]]], float]
"""Says how good it is, as a mean over the questions, what was kept for each of them."""


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Attributes:
        id: Its name in the collection.
        text: What is asked.
        place: Where the answer is looked for, if not in all the texts: the name of a conversation, or a long text.
    """

    id: str
    text: str
    place: str = ""


@dataclass(frozen=True)
class Corpus:
    """What a first stage searches.

    Attributes:
        texts: Texts by their ids.
        vectors: float32 ``[T, D]``: their embeddings.
        embedder: Directory of the model that made them.
    """

    texts: dict[str, str]
    vectors: NDArray[np.float32]
    embedder: Path


@dataclass(frozen=True)
class Reranking:
    """What follows a first stage.

    Attributes:
        model: Directory of the reranker.
        kind: ``"none"``, ``"usual"`` or ``"grating"``.
        options: Options of the reranker.
    """

    model: Path
    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Application:
    """An application on one collection.

    Attributes:
        name: Its name in the table.
        measure: Name of what :attr:`judge` measures.
        questions: What is asked.
        systems: What is compared.
        judge: Says how good answers are.
    """

    name: str
    measure: str
    questions: list[Question]
    systems: list[System]
    judge: Judge


def load_langchain_rag(ready: Ready, **settings: Any) -> Ask:
    """Load hybrid RAG in LangChain; only this process imports the framework."""
    from benchmarks.langchain_systems import rag

    return rag(ready, **settings)


def load_langchain_context(ready: Ready, **settings: Any) -> Ask:
    """Load the choice of a context in LangChain; only this process imports the framework."""
    from benchmarks.langchain_systems import long_context

    return long_context(ready, **settings)


def load_llamaindex_rag(ready: Ready, **settings: Any) -> Ask:
    """Load hybrid RAG in LlamaIndex; only this process imports the framework."""
    from benchmarks.llamaindex_systems import rag

    return rag(ready, **settings)


def load_llamaindex_memory(ready: Ready, **settings: Any) -> Ask:
    """Load an agent's memory in LlamaIndex; only this process imports the framework."""
    from benchmarks.llamaindex_systems import memory

    return memory(ready, **settings)


def find_systems(
    load: Callable[..., Ask], usual: str, fastest: dict[str, Any], budget: str, **common: Any
) -> list[System]:
    """Name no reranker, the framework's usual one, the same as fast as its user can make it, and grating.

    Args:
        load: Loads each of them.
        usual: Name of the usual one's class.
        fastest: Its settings that are fastest on such texts, or within 3 % of it.
        budget: Memory budget of the last.
        common: Further arguments of ``load``.
    """
    told = ", ".join(f"{name}={value}" for name, value in fastest.items())
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("no reranker", "none", {}),
        (usual, "usual", {}),
        (f"{usual}, {told}", "usual", fastest),
        ("grating", "grating", {}),
        (f"grating, {budget}", "grating", {"memory_budget": budget}),
    ]
    model = bundled_model(BUNDLED_RERANKER)
    return [
        System(name, load, {**common, "reranking": Reranking(model, kind, options)})
        for name, kind, options in kinds
    ]


def rag_in_langchain(data: Path, count: int, budget: str) -> Application:
    """The ten best of what BM25 and embeddings find together."""
    collection = load_collection(data / "cranfield")
    questions = [Question(name, collection.queries[name]) for name in sample(collection, count)]
    common = {"corpus": embedded(collection), "first": questions[0]}
    fastest = {"batch_size": 2, "dtype": "bfloat16"}
    systems = find_systems(load_langchain_rag, "CrossEncoderReranker", fastest, budget, **common)
    judge = judge_by("nDCG@10", collection, questions)
    return Application("RAG in LangChain, Cranfield", "nDCG@10", questions, systems, judge)


def rag_in_llamaindex(data: Path, count: int, budget: str) -> Application:
    """The ten best of what BM25 and embeddings find together."""
    collection = load_collection(data / "cisi")
    questions = [Question(name, collection.queries[name]) for name in sample(collection, count)]
    common = {"corpus": embedded(collection), "first": questions[0]}
    systems = find_systems(load_llamaindex_rag, "SentenceTransformerRerank", {"batch_size": 2}, budget, **common)
    judge = judge_by("nDCG@10", collection, questions)
    return Application("RAG in LlamaIndex, CISI", "nDCG@10", questions, systems, judge)


def agent_memory(data: Path, count: int, budget: str) -> Application:
    """The five turns of a conversation that a question about it brings to mind."""
    collection = load_collection(data / "locomo")
    questions = [
        Question(name, collection.queries[name], conversation(name)) for name in sample(collection, 3 * count)
    ]
    common = {"corpus": embedded(collection), "first": questions[0]}
    systems = find_systems(
        load_llamaindex_memory, "SentenceTransformerRerank", {"batch_size": 4}, budget, **common
    )
    judge = judge_by("R@5", collection, questions)
    return Application("agent memory in LlamaIndex, LoCoMo", "evidence in the five", questions, systems, judge)


def context_in_langchain(data: Path, count: int, budget: str) -> Application:
    """The passages of a long text that answer a question and fit into the prompt."""
    collection = load_collection(data / "cranfield")
    names = sample(collection, max(1, count // 3))
    texts = [plant(collection, name, seed) for seed, name in enumerate(names)]
    questions = [Question(text.query, collection.queries[text.query], text.text) for text in texts]
    fastest = {"batch_size": 2, "dtype": "bfloat16"}
    systems = find_systems(load_langchain_context, "CrossEncoderReranker", fastest, budget)
    return Application(
        "long context in LangChain, Cranfield",
        "relevant text kept",
        questions,
        systems,
        lambda kept: mean(map(share_kept, texts, kept)),
    )


MAKERS = {
    "rag-langchain": rag_in_langchain,
    "rag-llamaindex": rag_in_llamaindex,
    "memory": agent_memory,
    "context": context_in_langchain,
}


def sample(collection: Collection, count: int, seed: int = 0) -> list[str]:
    """Choose names of queries for which people found something relevant.

    Args:
        collection: Where they are from.
        count: How many; all, if there are fewer.
        seed: Seed of the sample.
    """
    judged = [name for name in collection.queries if max(collection.grades.get(name, {0: 0}).values()) > 0]
    return random.Random(seed).sample(judged, min(count, len(judged)))


def judge_by(measure: str, collection: Collection, questions: Sequence[Question]) -> Judge:
    """Return the judge that compares rankings with what people judged, by a measure of ir-measures."""

    def judge(kept: Sequence[list[str]]) -> float:
        import ir_measures

        measured = ir_measures.parse_measure(measure)
        run = {
            question.id: {name: -float(place) for place, name in enumerate(ranking)}
            for question, ranking in zip(questions, kept, strict=True)
        }
        grades = {question.id: collection.grades[question.id] for question in questions}
        return float(ir_measures.calc_aggregate([measured], grades, run)[measured])

    return judge


def load_tokenizer(model: Path, ready: Ready) -> None:
    """Be ready with the reranker's tokenizer in memory, which is then let go: the system's own takes its room."""
    return_memory()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    ready()
    del tokenizer


# Long texts.


@dataclass(frozen=True)
class LongText:
    """Documents of a collection, one after the other, some of which answer a query.

    Attributes:
        query: Name of the query.
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
        query: Name of the query.
        seed: Seed of the choice and of the order.
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
    """Return the mean over the planted documents of the share of their characters that was kept."""
    characters = {place for start, end in kept for place in range(start, end)}
    return mean(len(characters.intersection(range(*span))) / (span[1] - span[0]) for span in text.planted)


# First stages.


def embedded(collection: Collection) -> Corpus:
    """Return the texts of a collection with their embeddings, which are computed once."""
    embedder, texts = bundled_embedder(), list(collection.texts.values())
    digest = hashlib.sha256("\0".join([embedder.name, *texts]).encode()).hexdigest()[:16]
    path = cache_directory() / "benchmarks" / f"embeddings-{digest}.npy"
    if not path.is_file():
        from sentence_transformers import SentenceTransformer  # only here: it takes seconds to import

        encoder = SentenceTransformer(str(embedder), device="cpu")
        np.save(buffer := BytesIO(), encoder.encode_document(texts, show_progress_bar=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(buffer.getvalue())
    return Corpus(collection.texts, np.load(path), embedder)


def summarise(
    application: Application, workers: Sequence[Worker], answers: dict[str, list[list[Answer]]], timed: int
) -> list[Row]:
    """Make a row of each system.

    Args:
        application: What was asked.
        workers: The systems' processes.
        answers: The answers of each system, by question and round.
        timed: How many of the questions were asked in every round.

    Raises:
        RuntimeError: The first stage did not find the same for all systems.
    """
    given = [[first.facts["candidates"] for first, *_ in found] for found in answers.values()]
    if any(other != given[0] for other in given):
        raise RuntimeError(f"{application.name}: the systems were not given the same candidates")
    rows = []
    for worker in workers:
        found = answers[worker.system.name]
        rows.append(
            {
                "application": application.name,
                "system": worker.system.name,
                "kind": worker.system.settings["reranking"].kind,
                "questions": len(found),
                "candidates": mean(map(len, given[0])),
                "measure": application.measure,
                "quality": application.judge([first.facts["kept"] for first, *_ in found]),
                "seconds": mean(median(one.seconds for one in rounds) for rounds in found[:timed]),
                "reranking_seconds": mean(
                    median(one.facts["reranking_seconds"] for one in rounds) for rounds in found[:timed]
                ),
                "added_mb": worker.peak_mb,
            }
        )
    usual = next(row for row in rows if row["kind"] == "usual")
    for row in rows:
        for figure in ("seconds", "added_mb"):
            row[f"{figure}_of_usual"] = None if row["kind"] == "none" else row[figure] / usual[figure]
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Holds cranfield, cisi and locomo, in BEIR layout.")],
    only: Annotated[str, typer.Option(help=f"Only those with this in their name: {', '.join(MAKERS)}.")] = "",
    questions: Annotated[
        int,
        typer.Option(help="Questions of RAG; three times as many to the memory, a third of them to long texts."),
    ] = 20,
    timed: Annotated[int, typer.Option(help="How many of them are asked in every round, and timed.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median is taken.")] = 3,
    memory_budget: Annotated[str, typer.Option(help="Memory budget of the reranker that has one.")] = "110MB",
    output: Output = RESULTS,
) -> None:
    """Measure, and write applications.json."""
    rows: list[Row] = []
    for name, make in MAKERS.items():
        if only not in name:
            continue
        application = make(data, questions, memory_budget)
        with loaded(application.systems) as workers:
            answers = take_turns(
                workers, application.questions, rounds=rounds, timed=timed, title=application.name
            )
            rows += summarise(application, workers, answers, timed)
    write_result(output, "applications", rows, rounds=rounds, setting={"timed": timed}, packages=PEERS)


if __name__ == "__main__":
    typer.run(main)
