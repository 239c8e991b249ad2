"""The command ``grating cache`` lists what lies in grating's cache, and clears it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import typer

from grating_core.cli.output import show, tell, write_json
from grating_core.cli.tables import plain_table
from grating_core.files.caches import KINDS, Cached, clear, contents
from grating_core.files.places import cache_directory

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, kw_only=True)
class ChosenOptions:
    """These options choose some of what lies in the cache.

    Attributes:
        kind: The kind of things, such as columns or lenses. Several may be given. The default is all kinds.
        older_than: How long the things have not been used at least, such as 30d, 12h or 2w.
    """

    kind: Sequence[str] = ()
    older_than: str | None = None

    def __post_init__(self) -> None:
        for kind in self.kind:
            if kind not in KINDS:
                raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")

    @property
    def chosen(self) -> dict[str, Any]:
        """Return the same as arguments of :func:`contents` and :func:`clear`."""
        age = self.older_than and self.older_than.strip()
        return {
            "kinds": self.kind or None,
            "older_than": float(age[:-1]) * _SECONDS[age[-1]] if age else None,
        }


def list_cache(what: ChosenOptions, as_json: bool = False) -> None:
    """List what lies in grating's cache: converted models, lenses, columns, quantised layers, and so on."""
    found = contents(**what.chosen)
    if as_json:
        write_json({"cache": str(cache_directory()), "contents": _as_json(found)})
        return
    table = plain_table("kind", "MB", "last used", "name")
    for one in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
        table.add_row(one.kind, f"{one.size / 1e6:,.1f}", used, one.path.name)
    if found:
        show(table, whole=True)
    show(f"{_together(found)} in {cache_directory()}.")


def clear_cache(
    what: ChosenOptions,
    yes: bool = False,
    as_json: bool = False,
) -> None:
    """Remove things from grating's cache; what is needed is made again. What a process is writing stays.

    Args:
        yes: Whether to remove the things without asking.
    """
    found = contents(**what.chosen)
    if not yes and found:
        tell(f"{_together(found)} will be removed:")
        for one in found:
            tell(f"  {one.kind}: {one.path}")
        if not typer.confirm("Remove them?", err=True):
            tell("Nothing was removed.")
            raise typer.Exit(1)
    done = clear(**what.chosen)
    if as_json:
        kept = [{"path": str(one.path), "reason": reason} for one, reason in done.kept]
        write_json({"removed": _as_json(done.removed), "kept": kept})
        return
    show(f"{_together(done.removed)} removed.")
    for one, reason in done.kept:
        tell(f"{one.path} is kept: {reason}.")


def _together(found: list[Cached]) -> str:
    things = "1 thing" if len(found) == 1 else f"{len(found)} things"
    return f"{things}, {sum(one.size for one in found) / 1e6:,.1f} MB,"


def _as_json(found: Iterable[Cached]) -> list[dict[str, Any]]:
    return [asdict(one) | {"path": str(one.path)} for one in found]
