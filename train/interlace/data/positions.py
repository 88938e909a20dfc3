"""Positions of tokens for models that see rows and columns in an image (mRoPE, arXiv 2409.12191, section 2.1)."""

from collections.abc import Iterable

import numpy as np


def grid_positions(is_image: np.ndarray, grids: Iterable[tuple[int, int]], start: int) -> tuple[np.ndarray, int]:
    """(3, T) positions in time, in rows and in columns, and the one that follows them.

    A text token has the same in all three, one more than what stands before it. An image's tokens have one time, and their row and column counted from there;
    what follows the image goes on behind the longer of its sides.

    Args:
        is_image: (T,) which tokens are an image's.
        grids: (rows, columns) of each image, in order; its tokens lie row after row.
        start: position of the first token.
    """
    positions = np.empty((3, len(is_image)), np.int64)
    done, at = 0, np.flatnonzero(is_image)
    for rows, columns in grids:
        first, at = int(at[0]), at[rows * columns :]
        positions[:, done:first] = np.arange(start, start + first - done)
        start += first - done
        done = first + rows * columns
        assert is_image[first:done].all()
        positions[:, first:done] = start
        positions[1, first:done] += np.repeat(np.arange(rows), columns)
        positions[2, first:done] += np.tile(np.arange(columns), rows)
        start += max(rows, columns)
    assert not len(at)
    positions[:, done:] = np.arange(start, start + len(is_image) - done)
    return positions, start + len(is_image) - done
