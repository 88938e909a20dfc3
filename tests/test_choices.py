"""The likeliest choice: log-probs of choices behind one shared question against transformers on each by itself."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.data.reading import Outcome
from interlace.errors import InputError
from interlace.inference.choices import rank_choices
from interlace.inference.evaluation import predict, question_of, read_questions
from interlace.inference.generation import Generator, load_generator
from tests.conftest import fast_first, write_rows
from tests.small_families import SMALL, make_model
from tests.test_families import make_model as make_tiled_model
from tests.test_scripts import run

CHOICES = ["digit 3", "digit 7", "image A", "2 of 4", "a much longer answer\nin two lines"]


def rows_with_choices(folder: Path) -> Path:
    """Rows of zero to three images, some of two exchanges, each with two to five choices."""
    path, randomness = write_rows(folder, 9), random.Random(0)
    rows = json.loads(path.read_text())
    for row in rows:
        choices = randomness.sample(CHOICES, randomness.randint(2, 5))
        row["conversations"][-1]["value"] = choices[0]
        row["metadata"]["choices"] = choices
    path.write_text(json.dumps(rows))
    return path


def by_the_library(generator: Generator, outcome: Outcome) -> list[float]:
    """Log-prob of every choice behind the question, each in a forward pass of its own."""
    template, prompt, model = generator.processing.template, question_of(outcome, generator), generator.model
    assert outcome.sample is not None
    found = []
    for choice in outcome.sample.metadata["choices"]:
        answer = [*template.tokenizer(choice, add_special_tokens=False)["input_ids"], template.end]
        ids = torch.tensor([prompt.input_ids + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, **generator._vision([prompt.images], ids)).logits[0, -len(answer) - 1 : -1]
        found.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
    return found


FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "internvl"]


@pytest.mark.parametrize("family", fast_first(FAMILIES, 1))
def test_the_likeliest_choice_is_the_library_s(tmp_path: Path, family: str) -> None:
    if family != "llava":
        (tmp_path / "model").mkdir()
        (make_model if family in SMALL else make_tiled_model)(family, tmp_path / "model")
    generator = load_generator("demo" if family == "llava" else str(tmp_path / "model"))
    outcomes = read_questions({"data_files": str(rows_with_choices(tmp_path))}, generator)
    generated = predict(generator, outcomes, 4, 4)
    expected = [by_the_library(generator, outcome) for outcome in outcomes]
    for batch_size in (1, 12):
        found = rank_choices(generator, outcomes, batch_size)
        for row, wanted in zip(found, expected, strict=True):
            assert row["metadata"]["choice_log_probs"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            assert row["prediction"] == row["metadata"]["choices"][max(range(len(wanted)), key=wanted.__getitem__)]
    assert predict(generator, outcomes, 4, 4) == generated  # the model generates as before


def test_the_script_ranks_choices(tmp_path: Path) -> None:
    data = rows_with_choices(tmp_path)
    done = run("evaluate_model.py", "--model-path", "demo", "--data-files", data, "--rank-choices", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["prediction"] in row["metadata"]["choices"] for row in rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.jsonl", "metrics.json", "evaluation.html"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b"]}, "row 2: the reference"),
        ({"choices": ["a", "a"]}, "row 2: metadata.choices: expected a list of two or more different texts"),
        ({"choices": "abc"}, "row 2: metadata.choices: expected a list of two or more different texts"),
        ({"choices": ["digit 3"]}, "1 rows whose choices cannot be ranked"),
        (None, "row 0: metadata.choices: expected a list of two or more different texts, got \\[\\]"),
    ],
)
def test_choices_that_cannot_be_ranked_are_refused(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    path = rows_with_choices(tmp_path)
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        if change is None:
            del row["metadata"]["choices"]
        elif number == 2:
            row["metadata"] |= change
    path.write_text(json.dumps(rows))
    generator = load_generator("demo")
    outcomes = read_questions({"data_files": str(path)}, generator)
    with pytest.raises(InputError, match=message):
        rank_choices(generator, outcomes, 4)
