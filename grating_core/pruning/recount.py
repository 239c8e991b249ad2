"""A recount decides who belongs to the top K where 8 bits cannot: few candidates are scored again without them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def in_doubt(scores: Array, places: NDArray[np.int64], doubt: float) -> NDArray[np.bool_]:
    """Mark the candidates that scores, which may be off by some doubt, neither put into the top K nor keep out.

    The bar lies in the middle between the last score of the top K and the next one. If these two are nearer to
    the bar than the doubt, then all who are as near are in doubt.

    Args:
        scores: Scores of N candidates in R requests, float64 ``[R, N]``; minus infinity for whoever has stopped.
        places: K of each request, int64 ``[R]``; 0 where everything is decided.
        doubt: The distance from the bar within which a score is in doubt.

    Returns:
        The marks, bool ``[R, N]``.
    """
    ordered = -np.sort(-scores, axis=1)
    last, following = (
        np.take_along_axis(ordered, np.clip(place, 0, scores.shape[1] - 1)[:, None], 1)
        for place in (places - 1, places)
    )
    open_to_doubt = ((places > 0) & (places < scores.shape[1]))[:, None] & np.isfinite(following)
    bar = np.where(open_to_doubt, (last + following) / 2, np.inf)
    marked: NDArray[np.bool_] = np.abs(scores - bar) <= doubt
    marked &= open_to_doubt & (last - bar <= doubt)
    return marked
