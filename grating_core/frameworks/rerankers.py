"""The adapters' rerankers have these fields; here they are loaded, shared, kept from changes and written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SecretStr,
    SerializationInfo,
    create_model,
    field_serializer,
    model_validator,
)

from grating_core.arguments import check_threshold
from grating_core.context import Passage, Selector
from grating_core.frameworks.fields import ModelFields, fields_of
from grating_core.frameworks.requests import is_blank
from grating_core.pruning import ClusterPolicy, Off, PruningPolicy
from grating_core.reranker import Reranker
from grating_core.results import RankedDocument, RerankResult
from grating_core.settings import RerankSettings

HIGHLIGHTS = "highlights"
"""The name of the metadata with the sentences that carried a score."""
_WANTED = ("scores", "score_threshold", "raw_scores", "deadline", "highlights")
DEFAULT_MODEL = "cross-encoder/ms-marco-MiniLM-L12-v2"

if TYPE_CHECKING:
    # Editors and type checkers take the fields from the settings themselves, which are frozen. These fields are so
    # as well, but others are not, and mypy wants all or none: hence "ignore[misc]" wherever there are more fields.
    class _Fields(ModelFields, RerankSettings):  # type: ignore[misc]
        model: str = DEFAULT_MODEL
        token: str | SecretStr | bool | None = None  # type: ignore[assignment]
        show_progress: bool = Field(init=False)
else:
    _Fields = create_model("_Fields", __base__=ModelFields, **fields_of(RerankSettings, model=DEFAULT_MODEL))


RAW_SCORES = Field(
    default=False,
    description="Whether scores are raw logits in the place of probabilities, and a threshold as well.",
)


class RerankerFields(_Fields):  # type: ignore[misc]
    """These are the settings of a reranker. It is loaded on construction, and shared by all with the same ones.

    They are fixed from then on; ``model_copy(update={…})`` makes another object with other settings. Copies share
    the reranker.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings", validate_assignment=True)

    reranker: Reranker = Field(
        default=None,  # type: ignore[assignment]  # only until _load has run
        exclude=True,
        repr=False,
        description="A ready Reranker, instead of all settings of the model.",
    )

    @model_validator(mode="after")
    def _load(self) -> Self:
        names = [one.name for one in fields(RerankSettings)]
        # By __dict__, so that it does not count as given.
        if "reranker" not in self.model_fields_set:
            self.__dict__["reranker"] = Reranker.open_shared(self._settings(RerankSettings))
        elif clash := [name for name in names if name in self.model_fields_set]:
            raise ValueError(f"reranker is given and brings its own {', '.join(clash)}: leave those out")
        else:
            self.__dict__["model"] = str(self.reranker.model_path)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RerankerFields.model_fields:
            raise AttributeError(
                f"{name} is fixed, since the model has been loaded with it: "
                f"model_copy(update={{{name!r}: {'…' if name == 'token' else repr(value)}}}) makes another "
                f"{type(self).__name__}"
            )
        super().__setattr__(name, value)

    def _refuse_ready(self) -> None:
        """Refuse to write down a reranker that was given ready-made.

        Raises:
            ValueError: It was.
        """
        if "reranker" in self.model_fields_set:
            raise ValueError(
                "reranker was given ready-made, and how it was made is not known: give its model and settings "
                "instead, then they can be written"
            )

    @field_serializer("pruning")
    def _write_pruning(self, pruning: str | PruningPolicy, info: SerializationInfo) -> Any:
        if info.mode == "python" and not isinstance(pruning, str | Off | ClusterPolicy):
            return pruning
        return policy_as_json(pruning, f"{type(self).__name__}(**data, pruning=...)")


def policy_as_json(pruning: str | PruningPolicy, reading: str) -> str | dict[str, Any]:
    """Return a policy as JSON can hold it, such that :class:`RerankerFields` takes it.

    Args:
        pruning: The name of a policy, or the policy.
        reading: A call that reads settings without a policy, for the error.

    Raises:
        ValueError: It is an object of somebody's own.
    """
    if isinstance(pruning, str):
        return pruning
    if type(pruning) is Off:
        return "off"
    if type(pruning) is ClusterPolicy:
        return asdict(pruning)
    raise ValueError(
        f"pruning={pruning!r} cannot be written as JSON, because it is an object of your own: write the rest with "
        f"exclude={{'pruning'}}, and read it with {reading}"
    )


class RankingFields(RerankerFields):  # type: ignore[misc]
    """These are the settings of ranking, beside how many are kept."""

    scores: Literal["exact", "estimated"] = Field(
        default="exact",
        description="'exact' scores are the full model's. With 'estimated' sure winners stop early, which is "
        "faster; their scores are estimates.",
    )
    score_threshold: float | None = Field(
        default=None,
        description="What has a lower score is left out, so that fewer may come back, or none. The threshold is a "
        "probability from 0 to 1. It needs exact scores, because the level of an estimate may be off.",
    )
    raw_scores: bool = RAW_SCORES
    deadline: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for a whole call. When they are over, the best ranking so far comes back, with "
        "estimates marked. None takes as long as it takes.",
    )
    highlights: bool = Field(
        default=False,
        description="Whether a document's metadata say which sentences carried its score: 'highlights' is a list "
        "of dictionaries, best first, with text, worth (1 for the best), start and stop (places in the text "
        "that was judged).",
    )
    max_query_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens of a query. The end of a longer one is kept, where a conversation's last "
        "words are. None keeps half of what the model can read.",
    )

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        check_threshold(self.score_threshold, raw_scores=self.raw_scores, scores=self.scores)
        return self

    def _ranked(self, query: str, texts: list[str], top_n: int | None) -> RerankResult:
        """Rank texts; None keeps all of them."""
        return self.reranker.rerank(*self._request(query, texts, top_n), **self._wanted)

    async def _aranked(self, query: str, texts: list[str], top_n: int | None) -> RerankResult:
        return await self.reranker.arerank(*self._request(query, texts, top_n), **self._wanted)

    @property
    def _wanted(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _WANTED}

    def _request(self, query: str, texts: list[str], top_n: int | None) -> tuple[str, list[str], int]:
        top_k = max(1, len(texts)) if top_n is None else int(top_n)
        return self.reranker.tail(query, self.max_query_tokens), texts, top_k

    def _score(self, ranked: RankedDocument) -> float:
        return ranked.score if self.raw_scores else ranked.probability

    def _highlights(self, ranked: RankedDocument) -> dict[str, list[dict[str, Any]]]:
        """Return the metadata of highlights; none if they are not wanted."""
        if not self.highlights:
            return {}
        return {
            HIGHLIGHTS: [{"text": ranked.text[one.start : one.stop], **asdict(one)} for one in ranked.highlights]
        }


class SelectingFields(RerankerFields):  # type: ignore[misc]
    """These are the settings of selecting passages."""

    max_tokens: int = Field(ge=1, description="The most tokens of all passages together.")
    chunk_tokens: int = Field(
        default=256,
        ge=1,
        description="About how many tokens a chunk has at most. It is kept or left out as a whole.",
    )
    count_tokens: Callable[[str], int] | None = Field(
        default=None,
        description="A function that says how many tokens a text has, such as llm.get_num_tokens. None takes the "
        "reranker's tokenizer.",
    )
    raw_scores: bool = RAW_SCORES

    def _passages(self, query: str, texts: list[str]) -> list[Passage]:
        """Return the best passages of texts; after a blank query their beginning, as much as fits."""
        selector = Selector(self.reranker, self.max_tokens, self.chunk_tokens, self.count_tokens)
        return selector.leading(texts) if is_blank(query) else selector.best(query, texts)

    def _score(self, passage: Passage) -> float | None:
        return passage.score if self.raw_scores else passage.probability
