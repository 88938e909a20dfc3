"""Predictions for data with references."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from interlace.data.dataset import default_cache_dir
from interlace.data.ledger import Ledger, check_ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import Outcome, Row, RowReader, records_of
from interlace.data.sample import BadRow, Sample
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.inference.generation import Generator, Prompt
from interlace.inference.metrics import check_rows
from interlace.inference.partial import PartialPredictions
from interlace.inference.predictions import told_apart
from interlace.inference.references import name_of
from interlace.ranks import Ranks

LIMITS: dict[str, Any] = {"max_length": 32_768, "max_image_pixels": 50_000_000, "num_frames": 16, "video_fps": None}  # of rows
_TOKENS_PER_STEP = 64  # of a prompt, that take about as long as a step of decoding


def read_questions(
    entry: dict[str, Any], generator: Generator, limits: Mapping[str, Any] = LIMITS, metric: str | None = None, ranks: Ranks | None = None
) -> list[Outcome]:
    """The checked rows of a dataset entry, each with a reference answer, on every rank.

    Args:
        limits: those in `LIMITS`, of a `RowReader`; others are ignored.
        metric: see `questions_of`.

    Raises:
        InputError: bad rows, or rows that cannot be scored, listed with file and index.
    """
    processing = generator.processing
    kept = MediaFolder(default_cache_dir() / "media")
    counted = (processing.row_image_tokens, processing.image_settings)
    reader = RowReader(
        processing.template, *counted, too_long="error", kept=kept, video_tokens=processing.video_tokens, **{name: limits[name] for name in LIMITS}
    )
    records = tqdm(records_of(read_entries([entry], 0)), desc="checking rows", unit="row", leave=False, disable=ranks is not None and not ranks.is_main)
    outcomes = list(reader.outcomes(iter(records)))
    check_ledger(Ledger.of([outcome.entry for outcome in outcomes]), "error", "error", None)
    return questions_of(outcomes, metric)


def questions_of(outcomes: Sequence[Outcome], metric: str | None = None) -> list[Outcome]:
    """The rows with ids that are told apart, and `metric` as that of rows that do not say how they are scored.

    Raises:
        InputError: rows that cannot be scored, before hours go into their answers; see `check_rows`.
    """
    names = told_apart([name_of(outcome.record, _sample(outcome)) for outcome in outcomes])
    asked = {"default_metric": metric} if metric else {}
    found = []
    for outcome, name in zip(outcomes, names, strict=True):
        sample = _sample(outcome)
        found.append(replace(outcome, sample=replace(sample, identifier=name, metadata={**sample.metadata, **asked})))
    check_rows((f"{outcome.record.file}: row {outcome.record.index}", _sample(outcome).metadata) for outcome in found)
    return found


def _sample(outcome: Outcome) -> Sample:
    assert isinstance(outcome.sample, Sample)
    return outcome.sample


def _row(outcome: Outcome) -> Row:
    assert outcome.row is not None
    return outcome.row


def question_of(outcome: Outcome, generator: Generator) -> Prompt:
    """The conversation before the last answer, which is the reference."""
    row = _row(outcome)
    start = row.encoded.answer_starts[-1]
    ids = generator.expanded(row.encoded.input_ids[:start].tolist(), row.image_tokens)
    return Prompt(ids, row.images, row.image_tokens, row.prefix_length, row.prefix_images)


def predict(
    generator: Generator,
    outcomes: Sequence[Outcome],
    batch_size: int,
    max_new_tokens: int,
    partial: PartialPredictions | None = None,
    ranks: Ranks | None = None,
    before_round: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Greedy answers: one `{id, prediction, reference, metadata}` per row, in order, on every rank.

    Args:
        batch_size: most rows in a batch; halved where a batch does not fit into the memory.
        partial: where answers are kept until all are there; those that are kept there already are not made again.
        ranks: take a batch each per round; None for this process alone.
        before_round: called on all ranks, equally often.

    Raises:
        InputError: images that were whole by their headers and cannot be decoded, with their rows; on all ranks.
    """
    ranks = ranks or Ranks()
    problems: list[str] = []
    answers = {number: text for kept in ranks.gather(partial.read() if partial else {}) for number, text in kept.items()}
    batches = [[i for i in batch if i not in answers] for batch in batches_of(outcomes, batch_size)]
    rounds = rounds_of([batch for batch in batches if batch], outcomes, ranks.world_size, generator.in_step)
    with tqdm(total=sum(len(batch) for of_rank in rounds for batch in of_rank), desc="generating", unit="row", leave=False, disable=not ranks.is_main) as bar:
        for of_rank in rounds:
            before_round()
            for batch in of_rank[ranks.rank : ranks.rank + 1]:
                found, problem = _found(generator, outcomes, batch, max_new_tokens)
                answers |= found
                problems += problem
                if partial is not None:
                    partial.add(found)
            bar.update(sum(map(len, of_rank)))
    problems = [problem for of_rank in ranks.gather(problems) for problem in of_rank]
    if problems:
        raise InputError("\n  ".join([f"{len(problems)} batches could not be answered; mend or leave out these rows and start again", *problems]))
    answers = {number: text for of_rank in ranks.gather(answers) for number, text in of_rank.items()}
    return [prediction_of(outcome, answers[i]) for i, outcome in enumerate(outcomes)]


def batches_of(outcomes: Sequence[Outcome], batch_size: int) -> list[list[int]]:
    """Numbers of the rows of each batch: rows that begin with the same images and text together where that pays, the others by length; the longest first, so
    that what does not fit into the memory shows at once."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, outcome in enumerate(outcomes):
        groups[_row(outcome).prefix if _row(outcome).prefix_images else None].append(number)
    alone, shared = groups.pop(None, []), []
    for numbers in groups.values():
        if _pays([_row(outcomes[number]) for number in numbers], batch_size):
            shared.append(numbers)
        else:
            alone += numbers

    def length(number: int) -> int:
        return _row(outcomes[number]).length

    ordered = [sorted(numbers, key=length, reverse=True) for numbers in (alone, *shared)]
    batches = [numbers[start : start + batch_size] for numbers in ordered for start in range(0, len(numbers), batch_size)]
    return sorted(batches, key=lambda batch: length(batch[0]), reverse=True)


def _pays(rows: Sequence[Row], batch_size: int) -> bool:
    """Whether rows with the same beginning had better share it than stand in full batches: they save tokens, but their steps of decoding, which are bound
    by reading the model's weights, are for fewer rows each."""
    saved = (len(rows) - 1) * rows[0].prefix_length
    steps = sum(len(row.encoded.input_ids) - row.encoded.answer_starts[-1] for row in rows)
    return len(rows) > 1 and saved > _TOKENS_PER_STEP * steps / len(rows) * (1 - min(len(rows), batch_size) / batch_size)


def rounds_of(batches: Sequence[list[int]], outcomes: Sequence[Outcome], world_size: int, in_step: bool) -> list[list[list[int]]]:
    """The batches dealt to the ranks: a round has a batch for each, the last one perhaps for some.

    Args:
        in_step: every round has a batch for each rank, a batch twice if need be; those of a round have images all or none, as the tower is called or not.
    """
    if not in_step:
        return [list(batches[start : start + world_size]) for start in range(0, len(batches), world_size)]
    numbers = {shows: [i for batch in batches for i in batch if bool(outcomes[i].row.images) is shows] for shows in (True, False)}  # type: ignore[union-attr]
    size = max(map(len, batches), default=1)
    rounds = []
    for of_kind in numbers.values():
        kind = [of_kind[start : start + size] for start in range(0, len(of_kind), size)]
        kind += kind[-1:] * (-len(kind) % world_size)
        rounds += [kind[start : start + world_size] for start in range(0, len(kind), world_size)]
    return rounds


def _found(generator: Generator, outcomes: Sequence[Outcome], batch: Sequence[int], max_new_tokens: int) -> tuple[dict[int, str], list[str]]:
    """The answers to a batch, or what is wrong with it: other ranks must not wait for one that has stopped."""
    try:
        return dict(zip(batch, _answers(generator, [question_of(outcomes[i], generator) for i in batch], max_new_tokens), strict=True)), []
    except BadRow as error:
        users = [outcomes[i].record for i in batch if any(place.path in error.detail for place in _row(outcomes[i]).images)]
        names = ", ".join(f"{record.file}: row {record.index}" for record in users or [outcomes[i].record for i in batch])
        return {}, [f"{names}: {error.detail}"]


def _answers(generator: Generator, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """The answers of a batch, of its halves where it does not fit into the memory."""
    try:
        return generator.answer(prompts, max_new_tokens)
    except RuntimeError as error:
        if len(prompts) == 1 or generator.in_step or not should_reduce_batch_size(error):
            raise
    generator.free_memory()
    half = len(prompts) // 2
    return _answers(generator, prompts[:half], max_new_tokens) + _answers(generator, prompts[half:], max_new_tokens)


def prediction_of(outcome: Outcome, answer: str) -> dict[str, Any]:
    """A line of `predictions.jsonl`."""
    sample = _sample(outcome)
    metadata = {"dataset": outcome.record.source.name, **sample.metadata, "num_images": len(_row(outcome).images)}
    return {"id": sample.identifier, "prediction": answer, "reference": sample.turns[-1].text, "metadata": metadata}
