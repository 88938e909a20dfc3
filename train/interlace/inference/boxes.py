"""Boxes in answers: found in the text, and held against those of a reference."""

import re

Box = tuple[float, float, float, float]  # left, top, right, bottom, in whatever unit the text has

_ACCURATE = 0.5
_NUMBER = r"([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))"
_COMMA = r"(?:\s*[,;]\s*|\s+)"
_NEXT_CORNER = r"\s*[\])]\s*,?\s*[\[(]\s*"
_FOUR = rf"{_NUMBER}{_COMMA}{_NUMBER}(?:{_NEXT_CORNER}|{_COMMA}){_NUMBER}{_COMMA}{_NUMBER}"
_BOX = re.compile(rf"[\[(]\s*{_FOUR}\s*[\])]", re.ASCII)
_BARE = re.compile(rf"\s*{_FOUR}\s*", re.ASCII)
_FULL_WIDTH = str.maketrans("（）［］【】，；、", "()[][],;,")


def boxes_in(text: str) -> list[Box]:
    """The boxes of an answer, in order: four numbers in brackets, `[x1, y1, x2, y2]` or `(x1, y1), (x2, y2)`, with any text around; or four bare numbers.

    The corners may be any two that face each other.
    """
    text = text.translate(_FULL_WIDTH)
    bare = _BARE.fullmatch(text)
    found = [bare] if bare else list(_BOX.finditer(text))
    corners = [[float(number) for number in match.groups()] for match in found]
    return [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in corners]


def intersection_over_union(one: Box, other: Box) -> float:
    """The area that two boxes share, over the area that either covers; 0 for boxes without area."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared) if shared else 0.0


def mean_iou(prediction: str, reference: str) -> float | None:
    """Mean IoU of the boxes, as `matched` pairs them; a box too many or too few counts as 0. None where the reference has no box."""
    return _mean([iou for iou, _ in matched(prediction, reference)], prediction, reference)


def box_accuracy(prediction: str, reference: str) -> float | None:
    """As `mean_iou`, of 1 for every pair with an IoU of at least 0.5."""
    return _mean([float(iou >= _ACCURATE) for iou, _ in matched(prediction, reference)], prediction, reference)


def matched(prediction: str, reference: str) -> list[tuple[float, tuple[int, int]]]:
    """IoU and numbers of the pairs of a predicted with an expected box: the pair with the largest IoU first, then the largest of those left, and so on."""
    pairs = [
        (intersection_over_union(found, expected), (i, j)) for i, found in enumerate(boxes_in(prediction)) for j, expected in enumerate(boxes_in(reference))
    ]
    taken: list[tuple[float, tuple[int, int]]] = []
    for iou, (i, j) in sorted(pairs, key=lambda pair: (-pair[0], pair[1])):
        if all(i != other_i and j != other_j for _, (other_i, other_j) in taken):
            taken.append((iou, (i, j)))
    return taken


def _mean(scores: list[float], prediction: str, reference: str) -> float | None:
    expected = len(boxes_in(reference))
    return sum(scores) / max(expected, len(boxes_in(prediction))) if expected else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
