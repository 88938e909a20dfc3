"""Predictions for data with references."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from interlace.data.dataset import check_ledger, default_cache_dir
from interlace.data.ledger import Ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import Outcome, RowReader, records_of
from interlace.data.sample import Sample
from interlace.data.sources import read_entries
from interlace.inference.generation import Generator, Prompt
from interlace.inference.metrics import check_rows
from interlace.inference.partial import PartialPredictions
from interlace.inference.predictions import told_apart
from interlace.ranks import Ranks


def read_questions(
    entry: dict[str, Any], generator: Generator, max_length: int, max_image_pixels: int, metric: str | None = None, ranks: Ranks | None = None
) -> list[Outcome]:
    """The checked rows of a dataset entry, each with a reference answer, on every rank.

    Args:
        metric: see `questions_of`.

    Raises:
        InputError: bad rows, or rows that cannot be scored, listed with file and index.
    """
    processing = generator.processing
    kept = MediaFolder(default_cache_dir() / "media")
    reader = RowReader(processing.template, processing.row_image_tokens, processing.image_settings, max_length, "error", max_image_pixels, kept)
    records = tqdm(records_of(read_entries([entry], 0)), desc="checking rows", unit="row", leave=False, disable=ranks is not None and not ranks.is_main)
    outcomes = list(reader.outcomes(iter(records)))
    check_ledger(Ledger.of([outcome.entry for outcome in outcomes]), "error", "error", None)
    return questions_of(outcomes, metric)


def questions_of(outcomes: Sequence[Outcome], metric: str | None = None) -> list[Outcome]:
    """The rows with ids that are told apart, and `metric` as that of rows that do not say how they are scored.

    Raises:
        InputError: rows that cannot be scored, before hours go into their answers; see `check_rows`.
    """
    names = told_apart([_sample(outcome).identifier or f"{outcome.record.file}:{outcome.record.index}" for outcome in outcomes])
    asked = {"default_metric": metric} if metric else {}
    found = []
    for outcome, name in zip(outcomes, names, strict=True):
        sample = _sample(outcome)
        found.append(replace(outcome, sample=replace(sample, identifier=name, metadata={**sample.metadata, **asked})))
    check_rows(((f"{outcome.record.file}: row {outcome.record.index}", _sample(outcome).metadata) for outcome in found), metric)
    return found


def _sample(outcome: Outcome) -> Sample:
    assert isinstance(outcome.sample, Sample)
    return outcome.sample


def question_of(outcome: Outcome, generator: Generator) -> Prompt:
    """The conversation before the last answer, which is the reference."""
    assert outcome.row is not None
    row, start = outcome.row, outcome.row.encoded.answer_starts[-1]
    ids = generator.expanded(row.encoded.input_ids[:start].tolist(), row.image_tokens)
    return Prompt(ids, row.images, row.prefix_length, row.prefix_images)


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
    """
    ranks = ranks or Ranks()
    answers = {number: text for kept in ranks.gather(partial.read() if partial else {}) for number, text in kept.items()}
    batches = [[i for i in batch if i not in answers] for batch in batches_of(outcomes, batch_size)]
    rounds = rounds_of([batch for batch in batches if batch], outcomes, ranks.world_size, generator.in_step)
    with tqdm(total=sum(len(batch) for of_rank in rounds for batch in of_rank), desc="generating", unit="row", leave=False, disable=not ranks.is_main) as bar:
        for of_rank in rounds:
            before_round()
            for batch in of_rank[ranks.rank : ranks.rank + 1]:
                found = dict(zip(batch, _answers(generator, [question_of(outcomes[i], generator) for i in batch], max_new_tokens), strict=True))
                answers |= found
                if partial is not None:
                    partial.add(found)
            bar.update(sum(map(len, of_rank)))
    answers = {number: text for of_rank in ranks.gather(answers) for number, text in of_rank.items()}
    return [prediction_of(outcome, answers[i]) for i, outcome in enumerate(outcomes)]


def batches_of(outcomes: Sequence[Outcome], batch_size: int) -> list[list[int]]:
    """Numbers of the rows of each batch: rows that begin with the same images and text together, the others by length; the longest first, so that what does not
    fit into the memory shows at once."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, outcome in enumerate(outcomes):
        assert outcome.row is not None
        groups[outcome.row.prefix if outcome.row.prefix_images else None].append(number)
    alone = [number for prefix, numbers in groups.items() if prefix is None or len(numbers) == 1 for number in numbers]
    shared = [numbers for prefix, numbers in groups.items() if prefix is not None and len(numbers) > 1]

    def length(number: int) -> int:
        row = outcomes[number].row
        assert row is not None
        return row.length

    ordered = [sorted(numbers, key=length, reverse=True) for numbers in (alone, *shared)]
    batches = [numbers[start : start + batch_size] for numbers in ordered for start in range(0, len(numbers), batch_size)]
    return sorted(batches, key=lambda batch: length(batch[0]), reverse=True)


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
    sample, row = _sample(outcome), outcome.row
    assert row is not None
    metadata = {"dataset": outcome.record.source.name, **sample.metadata, "num_images": len(row.images)}
    return {"id": sample.identifier, "prediction": answer, "reference": sample.turns[-1].text, "metadata": metadata}
