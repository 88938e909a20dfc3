"""Predictions for data with references."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from interlace.data.dataset import check_ledger, default_cache_dir
from interlace.data.ledger import Ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import Outcome, RowReader, records_of
from interlace.data.sample import Sample
from interlace.data.sources import read_entries
from interlace.inference.generation import Generator, Prompt
from interlace.inference.metrics import check_rows


def read_questions(entry: dict[str, Any], generator: Generator, max_length: int, max_image_pixels: int) -> list[Outcome]:
    """The checked rows of a dataset entry, each with a reference answer.

    Raises:
        InputError: bad rows, listed with file and index.
    """
    processing = generator.processing
    kept = MediaFolder(default_cache_dir() / "media")
    reader = RowReader(processing.template, processing.row_image_tokens, processing.image_settings, max_length, "error", max_image_pixels, kept)
    records = tqdm(records_of(read_entries([entry], 0)), desc="checking rows", unit="row", leave=False)
    outcomes = list(reader.outcomes(iter(records)))
    check_ledger(Ledger.of([outcome.entry for outcome in outcomes]), "error", "error", None)
    return outcomes


def question_of(outcome: Outcome, generator: Generator) -> tuple[Prompt, str]:
    """The conversation before the last answer, and that answer, the reference."""
    assert isinstance(outcome.sample, Sample) and outcome.row is not None
    encoded = outcome.row.encoded
    start = encoded.answer_starts[-1]
    return Prompt(generator.expanded(encoded.input_ids[:start].tolist(), outcome.row.image_tokens), outcome.row.images), outcome.sample.turns[-1].text


def predict(generator: Generator, outcomes: Sequence[Outcome], batch_size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers: one `{id, prediction, reference, metadata}` per row, in order; rows of like length share a batch."""
    by_length = sorted(range(len(outcomes)), key=lambda i: outcomes[i].row.length)  # type: ignore[union-attr]
    predictions: list[dict[str, Any]] = [{} for _ in outcomes]
    with tqdm(total=len(outcomes), desc="generating", unit="row", leave=False) as bar:
        for start in range(0, len(outcomes), batch_size):
            numbers = by_length[start : start + batch_size]
            questions = [question_of(outcomes[i], generator) for i in numbers]
            answers = generator.answer([prompt for prompt, _ in questions], max_new_tokens)
            for i, (_, reference), answer in zip(numbers, questions, answers, strict=True):
                sample, record, row = outcomes[i].sample, outcomes[i].record, outcomes[i].row
                assert sample is not None and row is not None
                metadata = {"dataset": record.source.name, **sample.metadata, "num_images": len(row.images)}
                predictions[i] = {
                    "id": sample.identifier or f"{record.file}:{record.index}",
                    "prediction": answer,
                    "reference": reference,
                    "metadata": metadata,
                }
            bar.update(len(numbers))
    return predictions


def check_metrics(outcomes: Sequence[Outcome], metric: str | None) -> None:
    """Whether the rows can be scored, before hours go into their answers; see `check_rows`.

    Raises:
        InputError: what keeps them from it.
    """
    samples = [(outcome.record, outcome.sample) for outcome in outcomes]
    check_rows(((f"{record.file}: row {record.index}", sample.metadata) for record, sample in samples if sample is not None), metric)
