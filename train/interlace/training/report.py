"""`report.html`: the story of a run on one page that needs nothing but itself, made from what the run has written and logged."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from interlace.arguments import SCHEMA_PATH, Arguments
from interlace.data.ledger import Ledger
from interlace.data.media import open_images
from interlace.data.page import data_uri, filled
from interlace.data.sample import BadRow
from interlace.data.sources import NAMED_FORMATS, is_hub_name
from interlace.data.template import IGNORE_INDEX
from interlace.model.loading import ADAPTER_CONFIG, Processing
from interlace.redaction import readable
from interlace.training.clock import PREFERENCE_PHASES
from interlace.training.row_report import DROP_LIST, MEANINGS, TABLE, RowReport

PAGE = Path(__file__).with_name("report.html")
_POINTS = 400  # of a curve: more than a screen shows
_ENTRIES, _SUSPECTS, _IMAGES = 20, 12, 6
_THUMBNAIL = 160  # pixels
_PIECES, _LETTERS = 6, 400  # of a row: questions and answers, and letters of each, the last ones
_SMALL = 64  # images are enlarged to this, dot by dot
_EVALUATED = ("data_files", "split", "image_folder", "name", "weight", "chat_template")  # keys that evaluate_model.py has, learns from the model or needs not
# panel -> the logged figures that it draws
_PANELS = {
    "Loss": ("loss", "eval_loss"),
    "Token accuracy": ("token_accuracy", "eval_token_accuracy"),
    "Reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "Reward margin": ("rewards/margins", "eval_rewards/margins", "eval_rewards/margins_blank", "eval_rewards/margins_swapped"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Tokens per second": ("tokens_per_second",),
    "MFU": ("mfu",),
}


@dataclass(frozen=True)
class Peak:
    """The most bytes that any process of the run has had: as `device` ("cuda", "cpu") counts them; `forecast` by what they are for, None where there is none,
    and then `reason` says why."""

    device: str
    measured: int
    forecast: Mapping[str, int] | None
    reason: str = ""


@dataclass(frozen=True)
class Story:
    """What the page tells: the resolved `arguments` without secrets, the trainer's `history`, `minutes` of training since step `since`, and the rest."""

    output_dir: Path
    arguments: Arguments
    ledger: Ledger
    history: Sequence[Mapping[str, float]]
    steps: int
    minutes: float
    since: int
    environment: Mapping[str, Any]
    peak: Peak
    rows: RowReport | None = None
    processing: Processing | None = None


def page(story: Story) -> str:
    """The HTML page."""
    data: dict[str, Any] = {"output_dir": str(story.output_dir), "model": readable(str(story.arguments["model_name_or_path"])), "folder": str(Path.cwd())}
    data |= {"steps": story.steps, "minutes": story.minutes, "since": story.since, "environment": dict(story.environment), "peak": asdict(story.peak)}
    data |= {"panels": panels(story.history), "evaluations": evaluations(story.history), "time": time_shares(story.history), "last": _last(story.history)}
    data |= {"ledger": _ledger(story.ledger), "arguments": _arguments(story.arguments)}
    data["commands"] = commands(story.output_dir, story.arguments, any("rewards/margins" in entry for entry in story.history))
    data["rows"] = None if story.rows is None else _rows(story.rows, story.processing, story.output_dir)
    return filled(PAGE, data)


def panels(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The curves: title, and for each logged figure its points [step, value], thinned to what a screen shows. Values that are not finite are left out."""
    found = []
    for title, names in _PANELS.items():
        series = []
        for name in names:
            points = [[entry["step"], entry[name]] for entry in history if name in entry and np.isfinite(entry[name])]
            if points:
                series.append({"name": name.replace("_", " "), "points": _thinned(points)})
        if series:
            found.append({"title": title, "series": series})
    return found


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """The means of neighbouring points, few enough to draw; the first and the last stay as they are."""
    if len(points) <= _POINTS:
        return points
    parts = np.array_split(np.array(points[1:-1]), _POINTS - 2)
    return [points[0], *([float(value) for value in part.mean(0)] for part in parts), points[-1]]


def evaluations(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Of each figure of the evaluations, but for their own speed: the first and the last, with their steps."""
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith("eval_"))
    speeds = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    found = []
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if name in entry and np.isfinite(entry[name])]
        if points and name not in speeds:
            found.append({"name": name.removeprefix("eval_").replace("_", " "), "first": points[0], "last": points[-1]})
    return found


def time_shares(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Mean seconds of a step in each of its phases, weighed by the steps that a log speaks of."""
    logged = [entry for entry in history if "data_seconds" in entry]
    if not logged:
        return []
    ends = np.array([entry["step"] for entry in logged])
    steps = np.maximum(np.diff(ends, prepend=0), 1)
    phases = [phase for phase in PREFERENCE_PHASES if f"{phase}_seconds" in logged[0]]
    means = {phase: float(np.average([entry.get(f"{phase}_seconds", 0.0) for entry in logged], weights=steps)) for phase in phases}
    return [{"name": phase, "seconds": seconds} for phase, seconds in means.items() if seconds > 0]


def _last(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = {name: value for entry in history for name, value in entry.items() if np.isfinite(value)}
    speeds = sorted(entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry)
    names = ("loss", "token_accuracy", "eval_loss", "eval_token_accuracy", "eval_score", "mfu", "eval_rewards/accuracies", "eval_rewards/margins")
    return {name: last[name] for name in names if name in last} | ({"tokens_per_second": speeds[len(speeds) // 2]} if speeds else {})


def _ledger(ledger: Ledger) -> dict[str, Any]:
    counts = {name: getattr(ledger, name) for name in ("rows", "trained", "shortened", "skipped")}
    entries = [{name: readable(str(value)) for name, value in asdict(entry).items()} for entry in islice(ledger.entries, _ENTRIES)]
    return {"counts": counts, "reasons": ledger.reasons.most_common(), "entries": entries}


def _arguments(arguments: Arguments) -> list[dict[str, Any]]:
    """Every argument with its value, and whether that is not the default; in the order of the schema."""
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    known = [name for name in schema if name in arguments]
    return [
        {"name": name, "value": json.dumps(arguments[name], ensure_ascii=False), "is_chosen": arguments[name] != schema[name].get("default")} for name in known
    ]


def commands(output_dir: Path, arguments: Arguments, has_pairs: bool = False) -> list[dict[str, str]]:
    """What to do with the model: title and shell command, to be run where the training was; or title and `note`, why there is none.

    Args:
        has_pairs: the rows are pairs of answers.
    """

    def line(script: str, *words: str) -> str:
        return shlex.join(["python", f"train/{script}.py", *words])

    folder = str(output_dir)
    found = [{"title": "Talk to it", "command": line("predict_multiround", "--model-path", folder)}]
    entry = (arguments["dataset"].get("eval") or arguments["dataset"]["train"])[0]
    reason = "a row needs one reference answer, and these are pairs" if has_pairs else _not_evaluated(entry)
    if reason:
        found.append({"title": "Evaluate it", "note": f"evaluate_model.py does not take this run's data as they are: {reason}. Give it files with references."})
    else:
        files = entry["data_files"] if isinstance(entry["data_files"], list) else [entry["data_files"]]
        words = ["--model-path", folder, "--data-files", *files]
        words += [word for name in ("split", "image_folder") if entry.get(name) for word in (f"--{name.replace('_', '-')}", entry[name])]
        found.append({"title": "Evaluate it", "command": line("evaluate_model", *words, "--output-dir", str(output_dir / "evaluation"))})
    if (output_dir / ADAPTER_CONFIG).is_file():
        whole = output_dir.with_name(f"{output_dir.resolve().name}_merged")
        found.append({"title": "Merge the adapter into its base", "command": line("merge_adapter", "--adapter-path", folder, "--output-dir", str(whole))})
    return [*found, {"title": "Serve it to OpenAI clients", "command": line("predict_multiround", "--model-path", folder, "--serve")}]


def _not_evaluated(entry: Mapping[str, Any]) -> str:
    """Why `evaluate_model.py` would not score the rows of an entry as the run has read them; empty if it would."""
    files, split = entry["data_files"], entry.get("split")
    others = [name for name, value in entry.items() if name not in _EVALUATED and value not in (None, "", [], "all")]
    if entry.get("name") in NAMED_FORMATS:
        others.append("name")
    if others:
        return f"it has no option for {', '.join(others)}"
    if files == "demo":
        return "" if split in (None, "train", "validation", "test") else f"it has no option for split {split}"
    return "it reads no data set from the hub" if split or (isinstance(files, str) and is_hub_name(files)) else ""


def _rows(report: RowReport, processing: Processing | None, output_dir: Path) -> dict[str, Any]:
    suspects = [report.entry(number) | _content(report, number, processing) for number in report.suspects(_SUSPECTS)]
    flags = [{"name": name, "rows": count, "meaning": MEANINGS[name]} for name, count in report.counts().items() if count]
    measured = np.isfinite(report.gap)
    gap = {"rows": int(measured.sum()), "mean": float(report.gap[measured].mean())} if measured.any() else None
    found = {"flags": flags, "files": report.files(), "epochs": [epoch + 1 for epoch in report.epochs], "suspects": suspects, "gap": gap}
    return found | {"table": str(output_dir / TABLE), "drop_list": str(output_dir / DROP_LIST)}


def _content(report: RowReport, number: int, processing: Processing | None) -> dict[str, Any]:
    """What a row says: its text as [text, is an answer] in order, and small pictures."""
    if processing is None:
        return {}
    row = report.rows[number]
    is_answer = row.encoded.labels != IGNORE_INDEX
    ends = [0, *(np.flatnonzero(np.diff(is_answer)) + 1).tolist(), len(is_answer)]
    texts = [str(processing.tokenizer.decode(row.encoded.input_ids[start:end].tolist(), skip_special_tokens=True)).strip() for start, end in pairwise(ends)]
    pieces = [[readable(text[-_LETTERS:]), bool(is_answer[start])] for text, start in zip(texts, ends, strict=False) if text]
    try:
        images = [_small(image) for image in open_images(row.images[:_IMAGES])]
    except BadRow:
        images = []
    return {"pieces": pieces[:_PIECES], "pictures": images}


def _small(image: PIL.Image.Image) -> str:
    """A picture for the page, as a `data:` address."""
    image = image.convert("RGB")
    if max(image.size) <= _SMALL:
        return data_uri(image)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return data_uri(image)
