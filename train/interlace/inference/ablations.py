"""Answers to the same questions with images changed.

`shuffled`: every image moves to the place of another one. `references`: two images trade places, so that what the text says of one of them, in whatever
words, means the other. `blanked`: one image, and once all of them, is grey. `dropped`: one image is gone with its tokens. `swapped`: all images are another
row's. The text is never changed; nor, but for `dropped`, is the number of tokens: an image that is left alone may get more of them (LLaVA-NeXT cuts it into
tiles). A video is one image where images turn grey or go, and where they move, each of its frames is.
"""

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from interlace.data.lengths import expanded_length
from interlace.data.media import open_images
from interlace.data.reading import Outcome, Row
from interlace.data.sample import Place, Sample
from interlace.inference.diagnostics import Ablated
from interlace.inference.evaluation import predict
from interlace.inference.generation import Generator
from interlace.inference.metrics import dataset_of, row_scores
from interlace.inference.partial import PartialPredictions
from interlace.model.processing import Processing
from interlace.ranks import Ranks

_GREY = (128, 128, 128)
_MOST_TRIES = 50  # for a partner without an image in common


@dataclass(frozen=True)
class Ablations:
    """Makes the changed rows: the same for the same seed and row, whatever other rows there are, but for the partners of `swapped`.

    Args:
        processing: of the model. folder: gets grey images. seed: decides what is drawn.
        partners: row -> those whose images it may be given.
    """

    processing: Processing
    folder: Path
    seed: int = 0
    partners: Mapping[tuple[str, int], Sequence[Row]] = field(default_factory=dict)

    def of(self, name: str, row: Row) -> Iterator[tuple[str, int | None, Row]]:
        """(name, image, row) for every way in which the row can be changed so; nothing where it cannot."""
        random_of_row = random.Random(f"{self.seed} {name} {Path(row.file).name} {row.index}")
        match name:
            case "shuffled" | "references":
                order = shuffled(row.images, random_of_row) if name == "shuffled" else traded(row.images, random_of_row)
                if order is not None:
                    yield name, None, self._moved(row, order)
            case "blanked":
                grey = self._grey(row)
                for image, span in enumerate(self._spans(row), 1):
                    yield name, image, _with_images(row, [*row.images[: span.start], *grey[span.start : span.stop], *row.images[span.stop :]])
                yield "all_blanked", None, _with_images(row, grey)
            case "dropped":
                sizes = [opened.size for opened in open_images(row.images)]
                for image, span in enumerate(self._spans(row), 1):
                    yield name, image, self._without(row, span, sizes)
            case "swapped":
                group = self.partners.get((row.file, row.index), ())
                drawn = random_of_row.sample(group, min(len(group), _MOST_TRIES))
                if (other := next((other for other in drawn if not set(other.images) & set(row.images)), None)) is not None:
                    yield name, None, _with_images(row, other.images)

    def _spans(self, row: Row) -> list[range]:
        """See `spans_of`; a model that sees a video as one medium knows them better, as they may lie in a folder."""
        videos = {number: video for video in self.processing.images.videos(row.image_tokens) for number in video}
        return list(dict.fromkeys(videos.get(i, range(i, i + 1)) for i in range(len(row.images)))) if videos else spans_of(row.images)

    def _moved(self, row: Row, order: Sequence[int]) -> Row:
        """A row with its images in another order. The place decides whether a model sees a frame of a video or an image, where it tells them apart."""
        images = [row.images[i] for i in order]
        if not (videos := self.processing.images.videos(row.image_tokens)):
            return _with_images(row, images, [row.image_tokens[i] for i in order])
        tokens = self._counted(row.image_tokens, [opened.size for opened in open_images(images)], [number for video in videos for number in video])
        return replace(_with_images(row, images, tokens), length=expanded_length(row.encoded, tokens))

    def _counted(self, image_tokens: Sequence[int], sizes: Sequence[tuple[int, int]], in_videos: Collection[int]) -> list[int]:
        """Number of tokens of each image by its (width, height); those in videos have theirs already."""
        counted = iter(self.processing.row_image_tokens([size for number, size in enumerate(sizes) if number not in in_videos]))
        return [tokens if number in in_videos else next(counted) for number, tokens in enumerate(image_tokens)]

    def _grey(self, row: Row) -> list[Place]:
        """Grey images of the sizes of a row's own."""
        places = []
        for image in open_images(row.images):
            path = self.folder / f"{image.width}x{image.height}.png"
            if not path.exists():
                PIL.Image.new("RGB", image.size, _GREY).save(path)
            places.append(Place(str(path.resolve())))
        return places

    def _without(self, row: Row, span: range, sizes: Sequence[tuple[int, int]]) -> Row:
        """A row without some images and the newline that the template puts behind each; the others count as a model counts that many images.

        Args:
            sizes: (width, height) of the row's images.
        """
        encoded, template = row.encoded, self.processing.template
        kept = np.ones(len(encoded.input_ids), bool)
        for start in np.flatnonzero(encoded.input_ids == template.image_token_id)[span.start : span.stop]:
            is_newline = template.style.newline_after_image and template.tokenizer.decode(encoded.input_ids[start + 1 : start + 2].tolist()) == "\n"
            kept[start : start + 1 + is_newline] = False
        changed: dict[str, Any] = {name: getattr(encoded, name)[kept] for name in ("input_ids", "labels", "weights")}
        changed |= {name: tuple(int(kept[:at].sum()) for at in getattr(encoded, name)) for name in ("answer_starts", "exchange_ends")}
        left = [number for number in range(len(row.images)) if number not in span]
        in_videos = {number for video in self.processing.images.videos(row.image_tokens) for number in video}
        images = tuple(row.images[number] for number in left)
        frames = [at for at, number in enumerate(left) if number in in_videos]
        tokens = tuple(self._counted([row.image_tokens[number] for number in left], [sizes[number] for number in left], frames))
        encoded = replace(encoded, num_images=len(images), **changed)
        return replace(row, encoded=encoded, images=images, image_tokens=tokens, length=expanded_length(encoded, tokens), prefix_ids=0, prefix_images=0)


def spans_of(images: Sequence[Place]) -> list[range]:
    """The numbers of each image, and of the frames of each video, which are one thing."""
    spans: list[range] = []
    for number, place in enumerate(images):
        last = images[number - 1]
        if number and place.pts is not None and last.pts is not None and (place.path, place.offset) == (last.path, last.offset) and place.pts >= last.pts:
            spans[-1] = range(spans[-1].start, number + 1)
        else:
            spans.append(range(number, number + 1))
    return spans


def shuffled(images: Sequence[Place], random_of_row: random.Random) -> list[int] | None:
    """An order of the images in which as many places as can be show another image than before: all of them, unless more than half are the same image.

    None where all are the same.
    """
    copies = defaultdict(list)
    for number, place in enumerate(images):
        copies[place].append(number)
    if len(copies) < 2:
        return None
    groups = random_of_row.sample(list(copies.values()), len(copies))
    listed = [number for group in groups for number in random_of_row.sample(group, len(group))]
    step = max(map(len, groups))  # from any copy, this far along the list stands another image, wherever that is possible
    order = [0] * len(images)
    for at, number in enumerate(listed):
        order[number] = listed[(at + step) % len(listed)]
    return order


def traded(images: Sequence[Place], random_of_row: random.Random) -> list[int] | None:
    """The order in which two different images have traded places; None where all are the same."""
    pairs = [(i, j) for i in range(len(images)) for j in range(i) if images[i] != images[j]]
    if not pairs:
        return None
    one, other = random_of_row.choice(pairs)
    order = list(range(len(images)))
    order[one], order[other] = other, one
    return order


def _with_images(row: Row, images: Sequence[Place], image_tokens: Sequence[int] | None = None) -> Row:
    return replace(row, images=tuple(images), image_tokens=tuple(image_tokens or row.image_tokens))


def partners(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], list[Row]]:
    """For each row those of its data set whose images take as many tokens each, itself included."""
    groups = defaultdict(list)
    for outcome in outcomes:
        assert outcome.row is not None and outcome.sample is not None
        groups[str(outcome.sample.metadata.get("dataset", outcome.record.source.name)), outcome.row.image_tokens].append(outcome.row)
    return {(row.file, row.index): group for group in groups.values() for row in group}


def some_of(predictions: Sequence[Mapping[str, Any]], most: int) -> list[int]:
    """Numbers of up to `most` rows with images, rising: evenly from all, in the order of their data sets and numbers of images; all for 0."""
    able = [number for number, row in enumerate(predictions) if row["metadata"]["num_images"]]
    able.sort(key=lambda number: (dataset_of(predictions[number]), predictions[number]["metadata"]["num_images"], number))
    few = min(most or len(able), len(able))
    return sorted(able[i * len(able) // few] for i in range(few))


def ablate(
    generator: Generator,
    outcomes: Sequence[Outcome],
    predictions: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    most_rows: int = 0,
    seed: int = 0,
    partial: PartialPredictions | None = None,
    ranks: Ranks | None = None,
) -> list[Ablated]:
    """The answers to changed questions, each different one asked once; `predictions` are the answers to the rows as they are, one each.

    Args:
        names: see the module. most_rows: see `some_of`. partial, ranks: see `predict`.

    Raises:
        BadRow: an image that cannot be opened.
    """
    numbers = some_of(predictions, most_rows)
    before = row_scores(predictions)
    numbers = [number for number in numbers if before[number] is not None]
    with TemporaryDirectory(prefix="interlace-grey-") as folder:
        ablations = Ablations(generator.processing, Path(folder), seed, partners([outcomes[number] for number in numbers]))
        looked = tqdm(numbers, desc="changing images", unit="row", leave=False, disable=ranks is not None and not ranks.is_main)
        changed = [(number, *found) for number in looked for name in names for found in ablations.of(name, _row_of(outcomes[number]))]
        asked: dict[tuple[Any, ...], int] = {}
        questions: list[Outcome] = []
        for number, name, image, row in changed:
            key = number, row.images, row.encoded.input_ids.tobytes()
            if key not in asked:
                asked[key] = len(questions)
                questions.append(_question(outcomes[number], row, f"{predictions[number]['id']} {name} {image or ''}".strip()))
        answers = predict(generator, questions, batch_size, max_new_tokens, partial, ranks)
    scores = row_scores(answers)
    found = []
    for number, name, image, row in changed:
        place = asked[number, row.images, row.encoded.input_ids.tobytes()]
        old, new = before[number], scores[place]
        assert old is not None
        if new is not None:
            found.append(Ablated(name, number, image, answers[place], old, new))
    return found


def _row_of(outcome: Outcome) -> Row:
    assert outcome.row is not None
    return outcome.row


def _question(outcome: Outcome, row: Row, identifier: str) -> Outcome:
    assert isinstance(outcome.sample, Sample)
    return replace(outcome, row=row, sample=replace(outcome.sample, identifier=identifier))
