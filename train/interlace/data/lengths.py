"""Lengths in expanded tokens, known without decoding, and what happens to a row that is too long."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from interlace.data.sample import BadRow
from interlace.data.template import IGNORE_INDEX, Encoded

ImageTokens = Callable[[Sequence[tuple[int, int]]], list[int]]  # (width, height) of each image of a row -> number of tokens of each
VideoTokens = Callable[[int], list[int]]  # how many frames a video has -> number of tokens of each
TooLong = Literal["drop_turns", "drop_row", "error", "fewer_frames"]
ImageIds = Callable[[int], Sequence[int]]  # an image's number of tokens -> its ids: those that features fill, and what the model has around and between them


def media_tokens(
    sizes: Sequence[Sequence[tuple[int, int]]], are_videos: Sequence[bool], image_tokens: ImageTokens, video_tokens: VideoTokens | None
) -> list[list[int]]:
    """Number of tokens of each image of each medium of one row.

    Args:
        sizes: (width, height) of each image of each medium: one, or the frames of a video.
        video_tokens: None where the frames of a video are images.
    """
    media = list(zip(sizes, are_videos, strict=True))
    tokens = iter(image_tokens([size for group, is_video in media if video_tokens is None or not is_video for size in group]))
    return [[next(tokens) for _ in group] if video_tokens is None or not is_video else video_tokens(len(group)) for group, is_video in media]


def expanded_length(encoded: Encoded, image_tokens: Sequence[int]) -> int:
    """Tokens of a row when each image counts as all of its tokens."""
    return len(encoded.input_ids) - encoded.num_images + sum(image_tokens)


def longest_path(encoded: Encoded, image_tokens: Sequence[int], image_token_id: int) -> int:
    """Tokens that the last token of a row can look back on, itself included: all of them; of a preference pair, the prompt and the longer answer."""
    length = expanded_length(encoded, image_tokens)
    if not encoded.leaf_starts:
        return length
    counts = np.ones(len(encoded.input_ids), np.int64)
    counts[encoded.input_ids == image_token_id] = image_tokens
    chosen, rejected = (int(counts[:start].sum()) for start in encoded.leaf_starts)
    return chosen + max(rejected - chosen, length - rejected)


def expand(encoded: Encoded, image_tokens: Sequence[int], image_token_id: int, image_ids: ImageIds | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`input_ids`, `labels`, `weights` with each image as all of its tokens, unsupervised; (expanded length,) each.

    Args:
        image_ids: None for a run of `image_token_id`.
    """
    is_image = encoded.input_ids == image_token_id
    repeats = np.ones(len(encoded.input_ids), np.int64)
    repeats[is_image] = image_tokens
    ids, labels, weights = (np.repeat(values, repeats) for values in (encoded.input_ids, encoded.labels, encoded.weights))
    if image_ids is not None:
        for start, tokens in zip((repeats.cumsum() - repeats)[is_image], image_tokens, strict=True):
            ids[start : start + tokens] = image_ids(tokens)
    return ids, labels, weights


def prefix_of(encoded: Encoded, image_token_id: int) -> tuple[int, int]:
    """(ids, images) of all up to the last image before the first supervised token; (0, 0) without such an image, and of preference pairs."""
    supervised = np.flatnonzero(encoded.labels >= 0)
    if not len(supervised) or encoded.leaf_starts:
        return 0, 0
    images = np.flatnonzero(encoded.input_ids[: supervised[0]] == image_token_id)
    return (int(images[-1]) + 1, len(images)) if len(images) else (0, 0)


def fit(encoded: Encoded, image_tokens: Sequence[int], image_token_id: int, max_length: int, too_long: TooLong) -> tuple[Encoded, str]:
    """The row cut to `max_length` by whole exchanges from its end, so that images stay whole and every kept answer keeps its context.

    Returns:
        The row, and what was dropped ("" if nothing).

    Raises:
        BadRow: `too_long` if even the first exchange does not fit, if what fits teaches nothing, or by policy.
    """
    length = longest_path(encoded, image_tokens, image_token_id)
    if length <= max_length:
        return encoded, ""
    if too_long not in ("drop_turns", "fewer_frames") or encoded.leaf_starts:  # an answer of a preference pair cannot be left out
        raise BadRow("too_long", f"{length} tokens; max_length is {max_length}")
    is_image = encoded.input_ids == image_token_id
    extra = np.zeros(len(encoded.input_ids), np.int64)
    extra[is_image] = np.asarray(image_tokens) - 1
    lengths = np.cumsum(1 + extra)
    fitting = [end for end in encoded.exchange_ends if lengths[end - 1] <= max_length]
    if not fitting:
        raise BadRow("too_long", f"{length} tokens, {lengths[encoded.exchange_ends[0] - 1]} in the first exchange; max_length is {max_length}")
    end = fitting[-1]
    if (encoded.labels[1:end] == IGNORE_INDEX).all():
        raise BadRow("too_long", f"{length} tokens; what fits into max_length {max_length} holds no supervised token")
    dropped = len(encoded.exchange_ends) - len(fitting)
    kept = Encoded(
        encoded.input_ids[:end], encoded.labels[:end], encoded.weights[:end], int(is_image[:end].sum()), tuple(fitting), encoded.answer_starts[: len(fitting)]
    )
    return kept, f"{length} tokens; max_length is {max_length}; dropped {dropped} of {len(encoded.exchange_ends)} exchanges from the end"


def most_frames(base_length: int, frame_tokens: Sequence[Sequence[int]], max_length: int) -> int:
    """The most frames that every video of a row may have so that the row fits; at least 1, also where even that does not fit. The last one is always seen.

    Args:
        base_length: tokens of the row without the frames of its videos.
        frame_tokens: for each video, the tokens of each of its frames.
    """
    most = max(map(len, frame_tokens))
    while most > 1 and base_length + sum(sum(_fewer(tokens, most)) for tokens in frame_tokens) > max_length:
        most -= 1
    return most


def _fewer(tokens: Sequence[int], most: int) -> Sequence[int]:
    return tokens if len(tokens) <= most else [*tokens[: most - 1], tokens[-1]]
