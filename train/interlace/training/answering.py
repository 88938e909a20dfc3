"""Answers to some of the evaluation rows while training goes on: what the model says, beside how likely it finds what it should say."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments

from interlace.arguments import did_you_mean
from interlace.data.reading import Headers, Outcome, Row, RowReader, records_of
from interlace.data.sample import Place, Sample
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.files import write_whole
from interlace.inference.evaluation import predict, prediction_of, questions_of
from interlace.inference.generation import Generator
from interlace.inference.metrics import score
from interlace.model.loading import Processing
from interlace.model.tuning import TunedModel
from interlace.ranks import Ranks
from interlace.training.fragments import gathered

_MOST_DATASETS = 20  # that are logged one by one
_MOST_EXAMPLES = 16  # that trackers show


@dataclass(frozen=True)
class Example:
    """A question with its images, the answer given and the one wanted."""

    identifier: str
    question: str
    images: tuple[Place, ...]
    prediction: str
    reference: str


@dataclass
class Answers:
    """Questions that are asked at every evaluation.

    Args:
        outcomes: rows with a reference answer each.
        processing: of the model.
        batch_size: rows.
        max_new_tokens: of an answer.
        folder: gets `step-N.jsonl`, in the form of `predictions.jsonl`; None on ranks that do not write.
        chosen: a data set that is logged however many there are.
    """

    outcomes: Sequence[Outcome]
    processing: Processing
    batch_size: int
    max_new_tokens: int
    folder: Path | None
    chosen: str | None = None
    examples: list[Example] = field(default_factory=list)  # of the latest evaluation, for trackers

    def scores(
        self, tuned: TunedModel, root: nn.Module, args: TrainingArguments, ranks: Ranks, step: int, before_round: Callable[[], None]
    ) -> dict[str, float]:
        """`score` over all questions, and of each data set; called on all ranks.

        Args:
            root: what the engine has wrapped.
            step: names the file.
            before_round: see `predict`.
        """
        is_shared = isinstance(root, FSDPModule) or (args.deepspeed is not None and args.hf_deepspeed_config.is_zero3())  # type: ignore[attr-defined]
        with generating(tuned, args) as model:
            generator = Generator(model, self.processing, args.device, in_step=is_shared and not ranks.is_alone)
            predictions = predict(generator, self.outcomes, self.batch_size, self.max_new_tokens, ranks=ranks, before_round=before_round)
        if self.folder is not None:
            try:
                self.folder.mkdir(exist_ok=True)
                write_whole(self.folder / f"step-{step}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))
            except OSError as error:  # a full disk; the next checkpoint will tell whether the run has to end
                tqdm.write(f"warning: the answers of step {step} could not be written: {error}")
        self.examples[:] = [_example(outcome, row) for outcome, row in zip(self.outcomes[:_MOST_EXAMPLES], predictions, strict=False)]
        metrics = score(predictions)
        are_logged = 1 < len(metrics["datasets"]) <= _MOST_DATASETS
        datasets = {f"score/{name}": value["score"] for name, value in metrics["datasets"].items() if are_logged or name == self.chosen}
        return {"score": metrics["overall"]["score"], **datasets}

    def choose(self, metric: str) -> None:
        """Takes `eval_score/NAME` as the metric that the best checkpoint is chosen by; every other metric is none of its business.

        Raises:
            InputError: no question is of a data set of this name.
        """
        kind, _, name = metric.removeprefix("eval_").partition("/")
        if kind != "score" or not name:
            return
        known = sorted({str(prediction_of(outcome, "")["metadata"]["dataset"]) for outcome in self.outcomes})
        if name not in known:
            raise InputError(
                f"metric_for_best_model: no question is of a data set {name!r}{did_you_mean(name, known)}; expected eval_score, or eval_score/ and one of "
                f"{', '.join(known)} (of the {len(self.outcomes)} rows that eval_generate_rows allows)"
            )
        self.chosen = name


def _example(outcome: Outcome, prediction: Mapping[str, Any]) -> Example:
    sample, row = outcome.sample, outcome.row
    assert isinstance(sample, Sample) and row is not None
    asked = [turn.text for turn in sample.turns if turn.role == "user"]
    return Example(prediction["id"], asked[-1] if asked else "", row.images, prediction["prediction"], prediction["reference"])


def questions(rows: Sequence[Row], entries: Sequence[Mapping[str, Any]], reader: RowReader, seed: int, count: int) -> list[Outcome]:
    """Up to `count` evaluation rows, evenly spread, with what their records say beside ids: reference and metadata.

    Args:
        rows: all of them, as they were read from `entries`.
    """
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    wanted = {(row.file, row.index) for row in (rows[int(number)] for number in numbers)}
    headers, found = Headers(), {}
    for record in records_of(read_entries(list(entries), seed)):
        place = record.file, record.index
        if place in wanted and place not in found:
            found[place] = reader.read(record, headers)
    return questions_of([outcome for outcome in found.values() if isinstance(outcome.sample, Sample) and outcome.row is not None])


@contextmanager
def generating(tuned: TunedModel, args: TrainingArguments) -> Iterator[PreTrainedModel]:
    """The model as `generate` takes it: with its tower, transformers' own attention and, where an engine has sliced it, those weights whole that are used
    outside of any module's call."""
    packed, model = tuned.packed, tuned.base
    was_training, attention = packed.training, model.config.get_text_config()._attn_implementation
    packed.eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    if tuned.tower is not None:
        tuned.tower.module.to(args.device)
        tuned.tower.attach_to(model)
    if isinstance(packed, FSDPModule):
        packed.unshard()
    whole = {} if packed.newline is None or packed.family.tiling is None else {packed.family.tiling.newline: gathered(packed.newline.weight)}
    vars(model.model).update(whole)  # found before the parameter of the same name
    compute = torch.bfloat16 if args.bf16 else torch.float16
    try:
        with torch.autocast(args.device.type, compute, enabled=args.bf16 or args.fp16):
            yield model
    finally:
        for name in whole:
            del vars(model.model)[name]
        if isinstance(packed, FSDPModule):
            packed.reshard()
        if tuned.tower is not None:
            tuned.tower.detach_from(model)
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        packed.train(was_training)
