"""What the losses of single rows say about the rows: simple rules of the field, on arrays.

A row is measured against its contemporaries: rows of the same file with about as many supervised tokens, trained at about the same time, for losses fall
within an epoch, too, and a mean over few tokens varies more. The measure is the modified z-score (Iglewicz and Hoaglin, 1993) of the logarithm of the loss,
whose usual limit is 3.5. A row that stays far above the others over the epochs is one that is hard to learn, which often means a wrong label (Swayamdipta
et al., Dataset Cartography, arXiv 2009.10795); one that was learned and is lost again is forgotten (Toneva et al., arXiv 1812.05159).
"""

import warnings

import numpy as np

LIMIT = 3.5
LEAST_LOSS = np.log(2)  # no row is suspicious whose tokens are likelier than not
_LEARNED = 0.01  # differences between losses below this one mean nothing
_LEAST_DEVIATION = np.log(2) / LIMIT  # of logarithms: where losses hardly vary, a row has to stand out by a factor of two
_FEWEST = 32  # rows that make a group of their own
_TIMES = 20  # parts of an epoch
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


def excesses(losses: np.ndarray, steps: np.ndarray, files: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """(rows,) modified z-scores of one epoch's losses among contemporaries; NaN where a row was not trained, infinite where its loss was not finite.

    Args:
        losses: (rows,) mean per token. steps: (rows,) when in the epoch. files: (rows,) number of the file. num_tokens: (rows,) supervised ones.
    """
    found = np.where(np.isinf(losses), np.inf, np.nan)
    size = np.floor(np.log2(np.maximum(num_tokens, 1)))
    for file in np.unique(files):
        mine = np.flatnonzero((files == file) & np.isfinite(losses))
        if not len(mine):
            continue
        values = np.log(np.maximum(losses[mine], _LEARNED)).astype(np.float64)
        order = np.argsort(steps[mine], kind="stable")
        for part in np.array_split(order, max(1, min(_TIMES, len(mine) // _FEWEST))):
            values[part] -= np.median(values[part])
        center, deviation = _spread(values)
        scores = (values - center) / deviation
        for group in np.unique(size[mine]):
            members = size[mine] == group
            if members.sum() >= _FEWEST:
                center, deviation = _spread(values[members])
                scores[members] = (values[members] - center) / deviation
        found[mine] = scores
    return found


def _spread(values: np.ndarray) -> tuple[float, float]:
    center = float(np.median(values))
    return center, max(_MAD_TO_DEVIATION * float(np.median(np.abs(values - center))), _LEAST_DEVIATION)


def judged(losses: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each row's score over the run, (rows,), and flag -> (rows,) whether it is raised.

    The first epoch, in which much is new to the model, counts only where there is no other. `high_loss`: the row stands out, and its tokens are less likely
    than not. `likely_mislabel`: it does so after an epoch in which the model could have learned it. `forgotten`: better than half of its contemporaries in one
    epoch, standing out in a later one. `not_finite`, `not_trained`: as they say.

    Args:
        losses, scores: (rows, epochs), see `excesses`.
    """
    seen = ~np.isnan(losses)
    times = seen.sum(1)
    counts = seen & ((times == 1)[:, None] | (np.cumsum(seen, 1) > 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows that were never trained have no mean
        score, loss = (np.nanmean(np.where(counts, values, np.nan), 1) for values in (scores, losses))
    broken = np.isinf(losses).any(1)
    high = (score > LIMIT) & (loss > LEAST_LOSS) & ~broken
    stands_out = (scores > LIMIT) & (losses > LEAST_LOSS)
    was_good = np.zeros_like(seen)
    was_good[:, 1:] = np.logical_or.accumulate(scores < 0, 1)[:, :-1]
    flags = {"likely_mislabel": high & (times > 1), "high_loss": high & (times <= 1), "forgotten": (stands_out & was_good).any(1) & ~high & ~broken}
    return score, flags | {"not_finite": broken, "not_trained": times == 0}
