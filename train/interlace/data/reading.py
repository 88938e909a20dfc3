"""One record -> one row: its format understood, its media found and checked, its ids and labels written, its length made to fit."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from interlace.data.formats import FORMATS, recognise
from interlace.data.ledger import EXCLUDED, Entry
from interlace.data.lengths import ImageTokens, TooLong, VideoTokens, expanded_length, fit, longest_path, media_tokens, most_frames, prefix_of
from interlace.data.media import check_image
from interlace.data.places import Finder, MediaFolder, frame_folder
from interlace.data.sample import BadRow, Image, Place, PreferencePair, Sample, Turn, Video, media_of, with_frames
from interlace.data.shards import ArchiveRow
from interlace.data.sources import Source
from interlace.data.template import ChatTemplate, Encoded
from interlace.data.video import VideoIndex, check_video, choose_frames, choose_numbers

Kind = Literal["supervised", "preference"]
_MOST_REMEMBERED = {"check_image": 50_000, "check_video": 500}  # a long video's index takes 100 kB
_VERSION = 8  # raise it when the same record would make another row: rows on disk are made anew


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it stands in its source."""

    source: Source
    index: int
    value: Any

    @property
    def file(self) -> str:
        return self.source.file


def records_of(sources: Sequence[Source]) -> Iterator[Record]:
    """The records of some sources, one after another.

    Raises:
        InputError: a file as a whole cannot be read.
    """
    for source in sources:
        for index, value, _ in source.rows():
            yield Record(source, index, value)


def wanted_kind(sources: Sequence[Source]) -> Kind:
    """Which kind of rows the sources hold, by the first one that can be recognised."""
    for record in records_of(sources):
        value = record.value.value if isinstance(record.value, ArchiveRow) else record.value
        try:
            name = record.source.format or recognise(value)[0]
        except BadRow:
            continue
        return "preference" if name == "preference" else "supervised"
    return "supervised"


def parse(record: Record, wanted: Kind = "supervised") -> tuple[str, Sample | PreferencePair, Mapping[str, Place | bytes]]:
    """A record's format and why, its sample, and the files of its archive; opens none of them.

    Raises:
        BadRow: no record of a known format, or of the other kind.
    """
    value, members = record.value, {}
    if isinstance(value, ArchiveRow):
        value, members = value.value, value.members
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"expected an object, got {type(value).__name__}")
    kind, why = (record.source.format, "as the entry says") if record.source.format else recognise(value)
    sample = FORMATS[kind](value)
    if wanted == "supervised" and isinstance(sample, PreferencePair):
        raise BadRow("preference_row", "a chosen and a rejected answer: train such rows with preference_finetune.py")
    if wanted == "preference" and isinstance(sample, Sample):
        raise BadRow("no_preference_row", "one answer where a chosen and a rejected one are needed: train such rows with supervised_finetune.py")
    return f"{kind} ({why})", sample, members


@dataclass(frozen=True, slots=True)
class Row:
    """An admitted row. `image_tokens` counts the tokens of each of its images (video frames included); `length` is in expanded tokens.

    `prefix_ids` and `prefix_images` count the ids and images of what other rows may begin with, too: all up to the last image before the first answer.
    """

    file: str
    index: int
    encoded: Encoded
    images: tuple[Place, ...]
    image_tokens: tuple[int, ...]
    length: int
    prefix_ids: int = 0
    prefix_images: int = 0

    @property
    def prefix(self) -> tuple[bytes, tuple[Place, ...], tuple[int, ...]]:
        """The same for rows that begin with the same images and text."""
        return self.encoded.input_ids[: self.prefix_ids].tobytes(), self.images[: self.prefix_images], self.image_tokens[: self.prefix_images]

    @property
    def prefix_length(self) -> int:
        """The prefix in expanded tokens."""
        return self.prefix_ids - self.prefix_images + sum(self.image_tokens[: self.prefix_images])

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss of this row counts (the first token of a row has no predecessor to predict it)."""
        return int((self.encoded.labels[1:] >= 0).sum())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record: its format and why, sample and row if it is admitted, and the ledger entry if it is not simply trained.

    `dropped` is what a shortened row left out, as ids; `watched` are the paths, beside its media, that it
    rests on: folders of frames, links.
    """

    record: Record
    format: str
    sample: Sample | PreferencePair | None
    row: Row | None
    entry: Entry | None
    dropped: Encoded | None = None
    watched: tuple[str, ...] = ()


@dataclass
class Headers:
    """What was found in the headers of media, remembered for the rows that use them again."""

    found: dict[str, dict[Place, Any]] = field(default_factory=lambda: {name: {} for name in _MOST_REMEMBERED})

    def of(self, place: Place, check: Callable[[Place, int], Any], max_pixels: int) -> Any:
        """The result of `check_image` or `check_video`, looked up once per place.

        Raises:
            BadRow: what the check raised.
        """
        found = self.found[check.__name__]
        if place not in found:
            if len(found) >= _MOST_REMEMBERED[check.__name__]:
                found.clear()
            try:
                found[place] = check(place, max_pixels)
            except BadRow as error:
                found[place] = BadRow(error.reason, error.detail)  # not the error itself, which holds on to every frame it has passed
        result = found[place]
        if isinstance(result, BadRow):
            raise BadRow(result.reason, result.detail)
        return result


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows.

    Args:
        template: writes the prompt.
        image_tokens: (width, height) of each image of a row -> number of tokens of each.
        image_settings: names what `image_tokens` depends on; part of the fingerprint.
        max_length, too_long: the length policy, in expanded tokens.
        max_image_pixels: larger images, and videos with larger frames, are bad.
        kept: where media go that are no files.
        num_frames, video_fps: how many frames of a video are taken.
        video_tokens: number of frames of a video -> number of tokens of each, for a model that sees it as one medium; None: they are images.
        kind: which rows are wanted; the other kind is bad.
    """

    template: ChatTemplate
    image_tokens: ImageTokens
    image_settings: str
    max_length: int
    too_long: TooLong
    max_image_pixels: int
    kept: MediaFolder
    num_frames: int = 16
    video_fps: float | None = None
    kind: Kind = "supervised"
    video_tokens: VideoTokens | None = None

    def fingerprint(self) -> str:
        """A hash of everything, beside the record and its media, that decides what a row becomes."""
        names = ("image_settings", "max_length", "too_long", "max_image_pixels", "num_frames", "video_fps", "kind")
        settings = [_VERSION, self.template.fingerprint, self.kept.urls, *(getattr(self, name) for name in names)]
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def read(self, record: Record, headers: Headers) -> Outcome:
        """The outcome of one record."""
        kind, sample = "", None
        if record.index in record.source.excluded:
            return Outcome(record, kind, None, None, Entry(record.file, record.index, "skipped", EXCLUDED, record.source.excluded[record.index]))
        try:
            kind, sample, members = parse(record, self.kind)
            finder = Finder(record.source.image_roots, record.source.video_roots, self.kept, members)
            visuals = [self._visual(item, finder, headers) for item in media_of(_turns_of(sample))]
            encoded, places, tokens, fewer = self._encode(sample, visuals, headers)
            kept, shortened = fit(encoded, tokens, self.template.image_token_id, self.max_length, self.too_long)
        except BadRow as error:
            return Outcome(record, kind, None, None, Entry(record.file, record.index, "skipped", error.reason, error.detail))
        dropped = None if kept is encoded else _rest(encoded, kept)
        places, tokens = places[: kept.num_images], tokens[: kept.num_images]
        row = Row(record.file, record.index, kept, tuple(places), tuple(tokens), expanded_length(kept, tokens), *prefix_of(kept, self.template.image_token_id))
        reason = "too_long" if shortened else "fewer_frames" if fewer else "opening_assistant_turn" if sample.note else None
        detail = "; ".join(text for text in (sample.note, fewer, shortened) if text)
        entry = Entry(record.file, record.index, "shortened", reason, detail) if reason else None
        return Outcome(record, kind, sample, row, entry, dropped, (*(visual.folder for visual in visuals if visual.folder), *finder.followed))

    def _visual(self, item: Image | Video, finder: Finder, headers: Headers) -> "_Visual":
        """An image or a video with its sizes and all the frames that may be chosen from."""
        if isinstance(item, Image):
            place = finder.find(item, "image")
            return _Visual((place,), self._checked(place, check_image, headers), is_video=False)
        if item.frames:
            return _Visual(tuple(finder.find(frame, "video") for frame in item.frames), None, is_video=True)
        place = finder.find(item, "video")
        if place.size < 0 and Path(place.path).is_dir():
            frames = [Image(str(Path(item.path) / frame.name)) for frame in frame_folder(Path(place.path))]
            return _Visual(tuple(finder.find(frame, "video") for frame in frames), None, is_video=True, folder=place.path)
        index: VideoIndex = self._checked(place, check_video, headers)
        return _Visual((place,), (index.width, index.height), is_video=True, index=index)

    def _checked(self, place: Place, check: Callable[[Place, int], Any], headers: Headers) -> Any:
        try:
            return headers.of(place, check, self.max_image_pixels)
        except BadRow:
            self.kept.forget(place)
            raise

    def _encode(self, sample: Sample | PreferencePair, visuals: Sequence["_Visual"], headers: Headers) -> tuple[Encoded, list[Place], list[int], str]:
        """The row's ids with the places and tokens of its images, and what was done to its videos ("" if nothing)."""
        encoded, places, tokens = self._written(sample, visuals, self.num_frames, headers)
        videos = [visual for visual in visuals if visual.is_video]
        length = longest_path(encoded, [count for counts in tokens for count in counts], self.template.image_token_id)
        fewer = ""
        if videos and self.too_long == "fewer_frames" and length > self.max_length:
            frame_tokens = [counts for visual, counts in zip(visuals, tokens, strict=True) if visual.is_video]
            base = length - sum(map(sum, frame_tokens))
            most = most_frames(base, frame_tokens, self.max_length)
            encoded, places, tokens = self._written(sample, visuals, most, headers)
            fewer = f"{length} tokens; max_length is {self.max_length}; at most {most} of {max(map(len, frame_tokens))} frames of each video"
        return encoded, [place for group in places for place in group], [count for counts in tokens for count in counts], fewer

    def _written(
        self, sample: Sample | PreferencePair, visuals: Sequence["_Visual"], num_frames: int, headers: Headers
    ) -> tuple[Encoded, list[list[Place]], list[list[int]]]:
        places = [visual.chosen(num_frames, self.video_fps) for visual in visuals]
        sizes = [
            [visual.size or headers.of(place, check_image, self.max_image_pixels) for place in group] for visual, group in zip(visuals, places, strict=True)
        ]
        # an answer with a prompt of its own is a row of its own: a model may count a single image in another way than one of several
        first = len(media_of(sample.prompt)) if isinstance(sample, PreferencePair) else len(sizes)
        are_videos = [visual.is_video for visual in visuals]
        parts = (slice(first), slice(first, None))
        tokens = [group for part in parts for group in media_tokens(sizes[part], are_videos[part], self.image_tokens, self.video_tokens)]
        counts = iter(map(len, places))
        if isinstance(sample, Sample):
            return self.template.encode(replace(sample, turns=with_frames(sample.turns, counts))), places, tokens
        prompt = with_frames(sample.prompt, counts)
        rejected = None if sample.rejected_prompt is None else with_frames(sample.rejected_prompt, counts)
        return self.template.encode_pair(replace(sample, prompt=prompt, rejected_prompt=rejected)), places, tokens

    def outcomes(self, records: Iterator[Record]) -> Iterator[Outcome]:
        """The outcomes of records, in order."""
        headers = Headers()
        for record in records:
            yield self.read(record, headers)


@dataclass(frozen=True, slots=True)
class _Visual:
    """An image, or a video with what its frames are chosen from: the places of frames, or one file and its index."""

    places: tuple[Place, ...]
    size: tuple[int, int] | None
    is_video: bool
    index: VideoIndex | None = None
    folder: str = ""

    def chosen(self, num_frames: int, video_fps: float | None) -> list[Place]:
        if self.index is not None:
            return [replace(self.places[0], pts=pts) for pts in choose_frames(self.index, num_frames, video_fps)]
        if self.is_video:
            return [self.places[number] for number in choose_numbers(len(self.places), num_frames)]
        return list(self.places)


def _turns_of(sample: Sample | PreferencePair) -> tuple[Turn, ...]:
    return sample.turns if isinstance(sample, Sample) else (*sample.prompt, *(sample.rejected_prompt or ()))


def _rest(encoded: Encoded, kept: Encoded) -> Encoded:
    start = len(kept.input_ids)
    return Encoded(encoded.input_ids[start:], encoded.labels[start:], encoded.weights[start:], encoded.num_images - kept.num_images)
