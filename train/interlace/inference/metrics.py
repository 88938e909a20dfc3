"""Scores of predictions against references: which metric scores a row, and what is told of which rows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interlace.errors import InputError
from interlace.inference.answer_metrics import Rule, anls, best_of, exact_match, relaxed_accuracy, vqa_accuracy
from interlace.inference.boxes import box_accuracy, mean_iou
from interlace.inference.caption_metrics import CorpusMetric, bleu, cider
from interlace.inference.interleave_bench import CATEGORIES, choice_accuracy, lenient_choice_accuracy, rouge_l

Prediction = Mapping[str, Any]  # id, prediction, reference, metadata
_SHOWN = 5


@dataclass(frozen=True)
class Metric:
    """`rule` scores a row, `also` gives further figures of it; or `corpus` scores rows all together."""

    rule: Rule | None = None
    also: Mapping[str, Rule] = field(default_factory=dict)
    corpus: CorpusMetric | None = None


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric(best_of(exact_match)),
    "choice_accuracy": Metric(best_of(choice_accuracy), {"lenient": best_of(lenient_choice_accuracy)}),
    "vqa_accuracy": Metric(vqa_accuracy),
    "relaxed_accuracy": Metric(best_of(relaxed_accuracy)),
    "anls": Metric(best_of(anls)),
    "rouge_l": Metric(best_of(rouge_l)),
    "bleu": Metric(corpus=bleu),
    "cider": Metric(corpus=cider),
    "iou": Metric(best_of(mean_iou), {"accuracy_at_0.5": best_of(box_accuracy)}),
}
# LLaVA-Interleave Bench's `metadata.question_type` -> the metric of such a row
QUESTION_TYPES: Mapping[str, str] = {"open-ended": "rouge_l", "multi-choice": "choice_accuracy"}


@dataclass(frozen=True)
class _Scored:
    """A row with its metric's name and its score: None where it does not count, 0 where rows are scored together; `also` are further figures."""

    row: Prediction
    metric: str
    pair: tuple[str, Sequence[str]]
    score: float | None
    also: Mapping[str, float]


def metric_of(metadata: Mapping[str, Any]) -> str:
    """The name of a row's metric: `metadata.metric`, or what its `question_type` says, or else `default_metric`, exact match."""
    kind = metadata.get("question_type")
    by_kind = QUESTION_TYPES.get(kind) if isinstance(kind, str) else None
    return metadata.get("metric") or by_kind or metadata.get("default_metric") or "exact_match"


def references_of(row: Prediction) -> list[str]:
    """The answers that a prediction is held against: `metadata.references`, else its reference."""
    return row["metadata"].get("references") or [row["reference"]]


def dataset_of(row: Prediction) -> str:
    """The data set that a row is from; `all` where it does not say."""
    return str(row["metadata"].get("dataset", "all"))


def num_images_of(row: Prediction) -> str:
    """A row's number of images; `unknown` where it does not say."""
    return str(row["metadata"].get("num_images", "unknown"))


def grouped(rows: Iterable[Any], group_of: Callable[[Any], Any], summary: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """`summary` of the rows of every group. Groups have names or numbers, which come in their order; a row of anything else is in none."""
    groups = defaultdict(list)
    for row in rows:
        if isinstance(name := group_of(row), (str, int)):
            groups[str(name)].append(row)
    return {name: summary(groups[name]) for name in sorted(groups, key=lambda name: (len(name) * name.isdecimal(), name))}


def check_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Holds metadata, each with the words that name its row, against what scoring needs.

    Raises:
        InputError: metrics that nobody knows, or references that are no texts, named with their rows; or the package of a metric is not installed.
    """
    problems: list[str] = []
    used: set[str] = set()
    for where, metadata in rows:
        names = [name for key in ("metric", "default_metric") if (name := metadata.get(key)) is not None]
        unknown = [name for name in names if not isinstance(name, str) or name not in METRICS]
        references = metadata.get("references")
        if unknown:
            problems.append(f"{where}: no metric {unknown[0]!r}")
        elif references is not None and not (isinstance(references, list) and references and all(isinstance(text, str) for text in references)):
            problems.append(f"{where}: references: expected a list of texts, got {str(references)[:80]}")
        else:
            used.add(metric_of(metadata))
    if problems:
        more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        known = f"the metrics are {', '.join(METRICS)}"
        raise InputError(f"{len(problems):,} rows cannot be scored; {known}\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    for name in sorted(used):
        if corpus := METRICS[name].corpus:
            corpus([])  # is its library there?


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The contents of `metrics.json`: overall, per data set (`metadata.dataset`), per category of LLaVA-Interleave Bench and per number of images; per source,
    task (`question_type`), position of the decisive image and metric where rows tell or differ.

    Scores of rows are means in 0..1; where rows are scored together (BLEU, CIDEr), a group's score is that of the group, and counts once for each of its rows
    where metrics meet. `overall` weighs every row the same, a category and `average` every data set and category. Rows that do not count are `skipped`.

    Raises:
        InputError: see `check_rows`.
    """
    check_rows((f"prediction {number}", row["metadata"]) for number, row in enumerate(predictions))
    rows = [_scored(row) for row in predictions]
    datasets = grouped(rows, lambda scored: dataset_of(scored.row), _summary)
    categories = _categories(datasets)
    complete = {"average": sum(value["score"] for value in categories.values()) / len(CATEGORIES)} if _is_complete(categories) else {}
    told = {"sources": "source", "tasks": "question_type", "decisive_image": "decisive_image"}
    more = {name: grouped(rows, lambda scored, key=key: scored.row["metadata"].get(key), _summary) for name, key in told.items()}  # type: ignore[misc]
    by_metric = grouped(rows, lambda scored: scored.metric, _summary)
    more |= {"by_metric": by_metric} if len(by_metric) > 1 else {}
    return {
        "overall": _summary(rows),
        "datasets": datasets,
        "categories": categories,
        **complete,
        "num_images": grouped(rows, lambda scored: num_images_of(scored.row), _summary),
        **{name: groups for name, groups in more.items() if groups},
    }


def _scored(row: Prediction) -> _Scored:
    name, prediction, references = metric_of(row["metadata"]), row["prediction"], references_of(row)
    metric = METRICS[name]
    if metric.rule is None:
        references = [reference for reference in references if any(letter.isalnum() for letter in reference)]  # else there is no word to find again
        return _Scored(row, name, (prediction, references), 0.0 if references else None, {})
    also = {figure: value for figure, rule in metric.also.items() if (value := rule(prediction, references)) is not None}
    return _Scored(row, name, (prediction, references), metric.rule(prediction, references), also)


def _summary(rows: Sequence[_Scored]) -> dict[str, Any]:
    """Score, metric and count of some rows, and the further figures that all of them have."""
    counted = [row for row in rows if row.score is not None]
    total = sum(row.score for row in counted if row.score is not None)
    metrics = sorted({row.metric for row in rows})
    also: dict[str, Any] = {}
    for name in metrics:
        pairs = [row.pair for row in counted if row.metric == name]
        if pairs and (corpus := METRICS[name].corpus):
            together = corpus(pairs)
            total += together.pop("score") * len(pairs)
            also |= together if len(metrics) == 1 else {}
    found: dict[str, Any] = {"score": total / max(len(counted), 1), "metric": ", ".join(metrics), "count": len(counted)}
    if len(counted) < len(rows):
        found["skipped"] = len(rows) - len(counted)
    for figure in sorted({figure for row in counted for figure in row.also}):
        values = [row.also[figure] for row in counted if figure in row.also]
        also |= {figure: sum(values) / len(values)} if len(values) == len(counted) else {}
    return found | also


def _categories(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of which there is a data set: the unweighted mean over the data sets; `missing` names those that a published figure rests on besides."""
    found: dict[str, dict[str, Any]] = {}
    for name, members in CATEGORIES.items():
        there = [member for member in members if member in datasets and datasets[member]["count"]]
        if there:
            parts = [datasets[member] for member in there]
            metrics = sorted({part["metric"] for part in parts})
            found[name] = {
                "score": sum(part["score"] for part in parts) / len(parts),
                "metric": ", ".join(metrics),
                "count": sum(part["count"] for part in parts),
            }
            found[name] |= {"missing": missing} if (missing := [member for member in members if member not in there]) else {}
    return found


def _is_complete(categories: Mapping[str, Mapping[str, Any]]) -> bool:
    return len(categories) == len(CATEGORIES) and not any("missing" in value for value in categories.values())


def row_scores(predictions: Sequence[Prediction]) -> list[float | None]:
    """The score of each row by its own rule, 0..1; None where it does not count, and where rows are scored together: BLEU, CIDEr."""
    rows = [_scored(row) for row in predictions]
    return [None if METRICS[row.metric].corpus else row.score for row in rows]
