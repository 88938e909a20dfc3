"""Multiple choice by log-probability: the likeliest of a row's choices, all of them in one forward pass behind the same question."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm

from interlace.data.lengths import expanded_length, prefix_of
from interlace.data.reading import Outcome, Row
from interlace.data.sample import Sample, Text, Turn
from interlace.errors import InputError
from interlace.inference.evaluation import prediction_of
from interlace.inference.generation import Generator
from interlace.model.forward import PackedModel, model_inputs
from interlace.ranks import Ranks

_SHOWN = 5


def choices_of(outcome: Outcome) -> list[str]:
    """What a row names in `metadata.choices`."""
    assert outcome.sample is not None
    choices: list[str] = outcome.sample.metadata.get("choices", [])
    return choices


def rank_choices(generator: Generator, outcomes: Sequence[Outcome], batch_size: int, ranks: Ranks | None = None) -> list[dict[str, Any]]:
    """A prediction for each row: the choice with the highest log-probability, end of the answer included, summed over its tokens; on every rank.

    `metadata.choice_log_probs` holds those of all choices, in their order.

    Args:
        outcomes: rows with choices.
        batch_size: most choices that are scored at once; all choices of a row stand together.

    Raises:
        InputError: rows without choices, or whose reference is none of them; an image that cannot be opened.
    """
    _check(outcomes)
    ranks, scorer = ranks or Ranks(), Scorer(generator)
    batches: list[list[int]] = []
    for number in sorted(range(len(outcomes)), key=lambda number: -scorer.length(outcomes[number])):
        if not batches or sum(len(choices_of(outcomes[i])) for i in (*batches[-1], number)) > batch_size:
            batches.append([])
        batches[-1].append(number)
    found: dict[int, list[float]] = {}
    with scorer, tqdm(total=len(outcomes), desc="ranking choices", unit="row", leave=False, disable=not ranks.is_main) as bar:
        for batch in batches[ranks.rank :: ranks.world_size]:
            found |= dict(zip(batch, scorer.log_probs([outcomes[i] for i in batch]), strict=True))
            bar.update(len(batch) * ranks.world_size)
    scores = {number: values for of_rank in ranks.gather(found) for number, values in of_rank.items()}
    return [_chosen(outcome, scores[number]) for number, outcome in enumerate(outcomes)]


def _check(outcomes: Sequence[Outcome]) -> None:
    """Refuses rows that have nothing to choose from, or whose reference is not among it."""
    problems = []
    for outcome in outcomes:
        choices, where = choices_of(outcome), f"{outcome.record.file}: row {outcome.record.index}"
        are_texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
        if not are_texts or len(set(choices)) < max(len(choices), 2):
            problems.append(f"{where}: metadata.choices: expected a list of two or more different texts, got {str(choices)[:80]}")
        elif (reference := prediction_of(outcome, "")["reference"]) not in choices:
            problems.append(f"{where}: the reference {reference[:40]!r} is none of the choices {str(choices)[:80]}")
    if problems:
        more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise InputError("\n  ".join([f"{len(problems):,} rows whose choices cannot be ranked", *problems[:_SHOWN]]) + more)


def _chosen(outcome: Outcome, log_probs: Sequence[float]) -> dict[str, Any]:
    prediction = prediction_of(outcome, choices_of(outcome)[max(range(len(log_probs)), key=log_probs.__getitem__)])
    return {**prediction, "metadata": {**prediction["metadata"], "choice_log_probs": list(log_probs)}}


class Scorer:
    """Log-probabilities of given answers, by the forward pass of training; inside `with`, after which the model generates as before."""

    def __init__(self, generator: Generator):
        self.processing, self.device = generator.processing, generator.device
        self.model: Any = generator.model.get_base_model() if isinstance(generator.model, PeftModel) else generator.model
        self.collator = self.processing.collator(share_prefix=True)

    def __enter__(self) -> "Scorer":
        self._attention = self.model.config.get_text_config()._attn_implementation
        self._packed = PackedModel(self.model).eval()
        return self

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation({"text_config": self._attention, "vision_config": "sdpa"})

    @staticmethod
    def length(outcome: Outcome) -> int:
        """Of a row, in tokens."""
        assert outcome.row is not None
        return outcome.row.length

    @torch.no_grad()
    def log_probs(self, outcomes: Sequence[Outcome]) -> list[list[float]]:
        """Of each row's choices."""
        rows = [row for outcome in outcomes for row in self._rows(outcome)]
        batch = self.collator.pack(list(enumerate(rows))).to(self.device)
        if batch.pixel_values is not None:
            batch = replace(batch, pixel_values=batch.pixel_values.to(self.model.dtype))
        scores = self._packed(**model_inputs(batch, None)).log_probs.float()
        sums = torch.zeros(len(rows), device=self.device).index_add(0, batch.sequence_index, scores).tolist()
        by_row = iter([value for _, value in sorted(zip(batch.row_numbers, sums, strict=True))])
        return [[next(by_row) for _ in choices_of(outcome)] for outcome in outcomes]

    def _rows(self, outcome: Outcome) -> list[Row]:
        """The row once for each choice, which alone is supervised."""
        row, template = outcome.row, self.processing.template
        assert isinstance(outcome.sample, Sample) and row is not None
        rows = []
        for choice in choices_of(outcome):
            encoded = template.with_answer(row.encoded, Turn("assistant", (Text(choice),)))
            prefix = prefix_of(encoded, template.image_token_id)
            rows.append(Row(row.file, row.index, encoded, row.images, row.image_tokens, expanded_length(encoded, row.image_tokens), *prefix))
        return rows
