"""A sentence-transformers model is a list of modules. Those behind the transformer are a head.

The layout is that of ``CrossEncoder.save_pretrained`` of sentence-transformers 5.4 and later. The files of a
module are in a folder of its own. The transformer's files are in the model's directory itself, or in a folder too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from grating_core.errors import GratingError, ModelNotFoundError, UnsupportedModelError
from grating_core.files.reading import read_json_or
from grating_core.models.family import Family, Fields, HeadModule, ModelSpec, Pooling
from grating_core.models.heads import FUNCTIONS, score_modules

LIST = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_TYPE = "sentence_transformers."
_WITHOUT = ("Transformer", "LogitScore")  # modules of a model that is a classifier, or that is asked a question
_EMBEDDING = "sentence_embedding"  # the name of what pooling gives, and by default of what the other modules give
_SCORES = "scores"
_POOLINGS: dict[str, Pooling] = {"cls": "first", "lasttoken": "last", "mean": "mean"}
_OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WAY_OUT = "Take a checkpoint whose head is part of the transformers model, or one with other modules"


class Listed(NamedTuple):
    """This class is an entry of a model's list of modules.

    Attributes:
        kind: The module's class, such as ``"Dense"``.
        folder: The module's folder in the model's directory; empty for the directory itself.
    """

    kind: str
    folder: str


@dataclass(frozen=True)
class ModularHead:
    """This class is a head made of modules.

    Attributes:
        pooling: The token that the head reads: ``"first"``, ``"last"``, or ``"mean"`` of all.
        modules: The modules, in order.
        folders: The folder of each module with weights.
    """

    pooling: Pooling
    modules: tuple[HeadModule, ...]
    folders: tuple[str, ...]

    def instead_of(self, family: Family) -> Family:
        """Return the family of a transformer with this head instead of its own."""
        names = [f"{module.role}/{part}" for module in self.modules for part in module.parts]
        return replace(
            family,
            spec=partial(_spec, family.spec, self),
            head=dict(zip(names, names, strict=True)),
            score=score_modules,
            asks=False,
            prompt=None,
        )


def _spec(spec: Callable[[Fields], ModelSpec], head: ModularHead, fields: Fields) -> ModelSpec:
    """Return the spec of a transformer with another head."""
    found = spec(fields)
    biased = {f"{module.role}/{part}" for module in head.modules for part in module.parts if part in module.biased}
    return replace(
        found, pooling=head.pooling, temperature=1.0, modules=head.modules, biased=found.biased | biased
    )


def read_list(directory: Path) -> list[Listed]:
    """Return the modules of a model's ``modules.json``; an empty list if it has none.

    Raises:
        ModelNotFoundError: The file cannot be read, or names a folder outside the model's directory.
        UnsupportedModelError: A module is not one of sentence-transformers' own, but code of the checkpoint.
    """
    path = directory / LIST
    with blaming(path):
        kinds = [str(entry["type"]) for entry in read_json_or(path, [])]
        folders = [str(entry.get("path") or "") for entry in read_json_or(path, [])]
    for kind, folder in zip(kinds, folders, strict=True):
        if folder and not is_inside(folder):
            raise ModelNotFoundError(f"{path} names {folder!r}, which is no folder in the model's own directory")
        if not kind.startswith(_TYPE):
            raise UnsupportedModelError(
                f"{path} has the module {kind}, whose code comes with the checkpoint and is never run. {_WAY_OUT}"
            )
    return [Listed(kind.rpartition(".")[2], folder) for kind, folder in zip(kinds, folders, strict=True)]


def transformer_folder(directory: Path) -> Path:
    """Return the folder with the configuration, the tokenizer and the weights of the transformer of a model."""
    return next((directory / folder for kind, folder in read_list(directory) if kind == "Transformer"), directory)


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what sentence-transformers' settings of a model say; an empty dictionary if there are none.

    Raises:
        ModelNotFoundError: The file is damaged.
    """
    return read_object(directory / SETTINGS)


def activation_function(directory: Path, stated: Fields) -> str | None:
    """Return the class of the function that makes a model's scores of its logits; None if the files do not say.

    Args:
        directory: The model's directory.
        stated: The fields of its ``config.json``.

    Raises:
        ModelNotFoundError: The settings of sentence-transformers are damaged.
    """
    own = stated.get("sentence_transformers")
    found = (
        read_settings(directory).get("activation_fn"),
        own.get("activation_fn") if isinstance(own, dict) else None,
        stated.get("sbert_ce_default_activation_function"),  # the name before sentence-transformers 4
    )
    return next((name for name in found if isinstance(name, str)), None)


def read_head(directory: Path) -> ModularHead | None:
    """Return the head that a model's modules make; None if it is part of the transformer.

    Raises:
        ModelNotFoundError: The file of a module is missing or damaged, or a module does not fit the one before it.
        UnsupportedModelError: grating does not implement a module or one of its settings, or the model makes
            embeddings.
    """
    listed = read_list(directory)
    if all(kind in _WITHOUT for kind, _ in listed):
        return None
    path = directory / LIST
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedModelError(
            f"{path} has {', '.join(kinds)}: grating runs a transformer whose head is its own, or a transformer, "
            f"Pooling and modules behind it. {_WAY_OUT}"
        )
    if (kind := read_settings(directory).get("model_type", "SentenceTransformer")) != "CrossEncoder":
        raise UnsupportedModelError(
            f"{directory / SETTINGS} says model_type={kind!r}: this is a model that makes embeddings, and no "
            f"reranker. Take a cross-encoder"
        )
    pooling, width = _pooling(directory / listed[1].folder / "config.json")
    modules, widths = [], {_EMBEDDING: width}
    for kind, folder in listed[2:]:
        if kind == "Dropout":  # it does nothing outside training
            continue
        if (read := _READERS.get(kind)) is None:
            raise UnsupportedModelError(
                f"{path} has {kind} behind the transformer, which grating does not implement. {_WAY_OUT}"
            )
        config = directory / folder / "config.json"
        with blaming(config):
            fields = read_object(config, needed=True)
            module = read(config, folder, fields)
        if module.source not in widths:
            raise UnsupportedModelError(
                f"{config} has module_input_name={module.source!r}, which no module before it gives: "
                f"there are {', '.join(widths)}. {_WAY_OUT}"
            )
        if module.columns not in (None, widths[module.source]):
            raise ModelNotFoundError(
                f"{config} describes a module of {module.columns} features, but {module.source} before it has "
                f"{widths[module.source]}: the module belongs to another model"
            )
        widths[module.target] = module.rows or widths[module.source]
        modules.append(module)
    if widths.get(_SCORES) != 1:
        raise UnsupportedModelError(
            f"the modules of {path} give {widths.get(_SCORES, 'no')} scores for a pair, and a reranker has one: "
            f"the last module must have out_features=1 and module_output_name={_SCORES!r}"
        )
    return ModularHead(pooling, tuple(modules), tuple(module.role for module in modules if module.parts))


def check_width(directory: Path, spec: ModelSpec) -> None:
    """Refuse modules that are made for a transformer of another width.

    Raises:
        ModelNotFoundError: The model has such modules.
    """
    head = next((module for module in spec.modules if module.columns), None)
    if head is not None and head.source == _EMBEDDING and head.columns != spec.width:
        raise ModelNotFoundError(
            f"{directory / head.role / 'config.json'} describes a module of {head.columns} features, and the "
            f"transformer's states have {spec.width}: the module belongs to another model"
        )


def _pooling(path: Path) -> tuple[Pooling, int]:
    """Return the pooling that a configuration describes, and the width of its states."""
    with blaming(path):
        fields = read_object(path, needed=True)
        old = [mode for name, mode in _OLD_POOLINGS.items() if fields.get(name)]
        modes = fields.get("pooling_mode") or old or ["mean"]
        modes = [modes] if isinstance(modes, str) else list(modes)
        width = fields.get("embedding_dimension") or fields["word_embedding_dimension"]
        if len(modes) != 1 or modes[0] not in _POOLINGS:
            raise UnsupportedModelError(
                f"{path} has pooling_mode={', '.join(map(str, modes))!r}: grating implements one of "
                f"{', '.join(_POOLINGS)}. {_WAY_OUT}"
            )
        return _POOLINGS[modes[0]], int(width)


def _dense(path: Path, role: str, fields: Mapping[str, Any]) -> HeadModule:
    name = str(fields.get("activation_function") or "torch.nn.modules.activation.Tanh")
    function = name.rpartition(".")[2]
    if not name.startswith("torch.") or function not in FUNCTIONS:
        raise UnsupportedModelError(
            f"{path} has activation_function={name!r}: grating implements torch's {', '.join(FUNCTIONS)}. "
            f"{_WAY_OUT}"
        )
    source = str(fields.get("module_input_name") or _EMBEDDING)
    rows, columns = int(fields["out_features"]), int(fields["in_features"])
    residual = bool(fields.get("use_residual"))
    return HeadModule(
        role=role,
        parts=("linear", "residual") if residual and rows != columns else ("linear",),
        biased=("linear",) if fields.get("bias", True) else (),
        rows=rows,
        columns=columns,
        function=function,
        residual=residual,
        source=source,
        target=str(fields.get("module_output_name") or source),
    )


def _norm(path: Path, role: str, fields: Mapping[str, Any]) -> HeadModule:
    width = int(fields["dimension"])
    return HeadModule(role, ("norm",), ("norm",), width, width, "", False, _EMBEDDING, _EMBEDDING)


def _normalize(path: Path, role: str, fields: Mapping[str, Any]) -> HeadModule:
    source = str(fields.get("module_input_name") or _EMBEDDING)
    target = str(fields.get("module_output_name") or source)
    return HeadModule(role, (), (), None, None, "", False, source, target)


_READERS: dict[str, Callable[[Path, str, Mapping[str, Any]], HeadModule]] = {
    "Dense": _dense,
    "LayerNorm": _norm,
    "Normalize": _normalize,
}


def read_object(path: Path, *, needed: bool = False) -> dict[str, Any]:
    """Return the object that a JSON file of a model holds; an empty one if there is no such file.

    Args:
        path: The file.
        needed: Whether the file must be there.

    Raises:
        ModelNotFoundError: The file is missing though it is needed, or damaged.
    """
    with blaming(path):
        if needed and not path.exists():
            raise ModelNotFoundError(f"{path} is missing: fetch the model again, with the folders of its modules")
        found = read_json_or(path, {})
        if not isinstance(found, dict):
            raise TypeError("it is not a JSON object")
        return found


def is_inside(name: str) -> bool:
    """Tell whether a relative path stays in its directory, on every system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.anchor or ".." in path.parts for path in paths)


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into one that names the file."""
    try:
        yield
    except GratingError:
        raise
    except KeyError as error:
        raise ModelNotFoundError(f"{path} cannot be read: it lacks {error}") from error
    except (ValueError, OSError, TypeError, AttributeError, OverflowError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
