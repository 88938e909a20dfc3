"""Predictions for data with references, and their scores."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from interlace.data.dataset import check_ledger, default_cache_dir
from interlace.data.ledger import Ledger
from interlace.data.places import MediaFolder
from interlace.data.reading import Outcome, RowReader, records_of
from interlace.data.sample import Sample
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.inference.generation import Generator, Prompt
from interlace.inference.interleave_bench import PUBLISHED
from interlace.inference.metrics import score
from interlace.inference.partial import PartialPredictions
from interlace.ranks import Ranks


def read_questions(entry: dict[str, Any], generator: Generator, max_length: int, max_image_pixels: int, ranks: Ranks | None = None) -> list[Outcome]:
    """The checked rows of a dataset entry, each with a reference answer, on every rank.

    Raises:
        InputError: bad rows, listed with file and index.
    """
    processing = generator.processing
    kept = MediaFolder(default_cache_dir() / "media")
    reader = RowReader(processing.template, processing.row_image_tokens, processing.image_settings, max_length, "error", max_image_pixels, kept)
    records = tqdm(records_of(read_entries([entry], 0)), desc="checking rows", unit="row", leave=False, disable=ranks is not None and not ranks.is_main)
    outcomes = list(reader.outcomes(iter(records)))
    check_ledger(Ledger.of([outcome.entry for outcome in outcomes]), "error", "error", None)
    return outcomes


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
    return [_prediction(outcome, answers[i]) for i, outcome in enumerate(outcomes)]


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


def _prediction(outcome: Outcome, answer: str) -> dict[str, Any]:
    sample, record, row = outcome.sample, outcome.record, outcome.row
    assert isinstance(sample, Sample) and row is not None
    return {
        "id": sample.identifier or f"{record.file}:{record.index}",
        "prediction": answer,
        "reference": sample.turns[-1].text,
        "metadata": {"dataset": record.source.name, **sample.metadata, "num_images": len(row.images)},
    }


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Reads `predictions.jsonl`.

    Raises:
        InputError: missing, broken, or without the four keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: {error.msg}") from None
        texts = [row.get(name) for name in ("prediction", "reference")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or "id" not in row or not isinstance(row.get("metadata"), dict):
            raise InputError(f"{path}: line {number}: expected id, prediction (text), reference (text) and metadata (object)")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no predictions")
    return rows


def write_scores(output_dir: Path, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes `predictions.jsonl` and `metrics.json`; returns the metrics."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in predictions]
    (output_dir / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    metrics = score(predictions)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return metrics


def metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics as aligned lines of text."""
    rows = [("overall", metrics["overall"])]
    rows += [(f"  {name}", value) for name, value in metrics["datasets"].items()]
    rows += [(f"  {name} image{'' if name == '1' else 's'}", value) for name, value in metrics["num_images"].items()]
    lines = [f"{name:28s} {value['score']:7.1%}  of {value['count']:,}{_remarks(value)}" for name, value in rows]
    return "\n".join(lines + _bench_table(metrics))


def _remarks(value: dict[str, Any]) -> str:
    lenient = f", {value['lenient']:.1%} by a lenient reading" if "lenient" in value else ""
    return lenient + (f", {value['skipped']:,} without a reference left out" if "skipped" in value else "")


def _bench_table(metrics: dict[str, Any]) -> list[str]:
    """Categories of LLaVA-Interleave Bench beside what its authors published."""
    if not metrics["categories"]:
        return []
    lines = ["", f"{'LLaVA-Interleave Bench':28s} {'here':>7s} {''.join(f'{size:>7s}' for size in PUBLISHED)}  (published, arXiv 2407.07895)"]
    here = {name: f"{value['score']:.1%}" for name, value in metrics["categories"].items()}
    here |= {"mean of all nine": f"{metrics['average']:.1%}"} if "average" in metrics else {}
    for name, figure in {**here, "in_domain_average": ""}.items():
        published = "".join(f"{row[name]:7.1%}" if name in row else f"{'':7s}" for row in PUBLISHED.values())
        missing = metrics["categories"].get(name, {}).get("missing", ())
        lines.append(f"  {name:26s} {figure:>7s} {published}{'  without ' * bool(missing)}{', '.join(missing)}".rstrip())
    return lines
