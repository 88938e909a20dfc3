"""LLaVA-Interleave Bench: its authors' rules on strings that nobody expects, categories, and what is printed."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge import Rouge

from interlace.inference.interleave_bench import CATEGORIES, PUBLISHED, choice_accuracy, lenient_choice_accuracy, normalised, rouge_l
from interlace.inference.metrics import score
from interlace.inference.predictions import metrics_table
from tests.test_scripts import run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        (" A cat,\ta dog\n", "a cat a dog"),  # the comma touches a space: it goes
        ("left/right", "left right"),  # no space in sight: a space takes its place
        ("left/right or up/ down", "leftright or up down"),  # one that touches a space takes all of its kind along
        ("up/ down", "up down"),
        ("1,000 km/h", "1000 kmh"),  # digits around a comma: every mark goes
        ("1,a b-c", "1 a b c"),
        ("3.14 is pi.", "3.14 is pi"),
        ("No. 5", "no 5"),
        (".5 of it...", ".5 of it"),
        ("'(A)'", "a"),
        ("“中文。”是吗？", "“中文。”是吗？"),  # other scripts' marks stay
        ("It's 5 o'clock", "it's 5 o'clock"),
        ("'''", ""),
        ("", ""),
        ("A: yes", "a: yes"),  # a colon is no mark
        ("x" + "." * 40, "x" + "." * 8),  # 32 periods, no more
        ("$5 & 10%", "$5 & 10%"),
    ],
)
def test_normalised_by_hand(text: str, expected: str) -> None:
    assert normalised(text) == expected


def by_the_letter(text: str) -> str:
    """The rule once more, spelt out mark by mark from its description."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    result = text
    for mark in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]:
        is_deleted = f"{mark} " in text or f" {mark}" in text or bool(re.search("(\\d)(,)(\\d)", text))
        result = "".join("" if letter == mark and is_deleted else " " if letter == mark else letter for letter in result)
    kept, left = [], 32
    for place, letter in enumerate(result):
        if letter == "." and left and not re.match(r"\d", result[place + 1 : place + 2]):
            left -= 1
        else:
            kept.append(letter)
    result = "".join(kept)
    for quote in ("'", '"', ")", "("):
        result = result.strip(quote)
    return result.strip().lower()


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="aB1. ,:;/()'\"-?!\n\t中", max_size=60))
def test_any_text_is_normalised_as_described_and_never_stops_the_scorer(text: str) -> None:
    assert normalised(text) == by_the_letter(text)
    for one, other in ((text, "a b. c"), ("a b. c", text)):
        found = rouge_l(one, other)
        assert found is None or 0 <= found <= 1
    assert choice_accuracy(text, "a") <= lenient_choice_accuracy(text, "a")


def test_rouge_is_the_package_s_of_normalised_texts() -> None:
    prediction, reference = "The cat sat on the mat. It slept.", "A cat sat on a mat, asleep."
    expected = Rouge().get_scores("the cat sat on the mat it slept", "a cat sat on a mat asleep")[0]["rouge-l"]["f"]
    assert rouge_l(prediction, reference) == expected
    assert rouge_l("", reference) == 0
    assert rouge_l("anything", " . ") is None
    assert rouge_l("same same", "same") == pytest.approx(1)  # words count once
    long = "word " * 102  # 510 characters, and one more word that is cut to two letters
    assert rouge_l(long + "tail", "tail") == 0 < rouge_l(long[5:] + "tail", "tail")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prediction", "strict", "lenient"),
    [
        ("A", 1, 1),
        ("a.", 1, 1),
        ("(A)", 1, 1),
        (" A \n", 1, 1),
        ("A. yes", 0, 1),
        ("(A) yes", 0, 1),
        ("Answer: A", 1, 1),
        ("Answer: (A).", 1, 1),
        ("A: yes", 1, 1),
        ("B: no, A: yes", 0, 0),  # "no A" is no single letter, B is
        ("The answer is A", 0, 1),
        ("The answer is B because A is wrong", 0, 0),
        ("A cat", 0, 0),
        ("Option A", 0, 1),
        ("The answer is a dog", 0, 0),
        ("the answer is a.", 0, 1),
        ("I choose a picture; choice a dog", 0, 0),
        ("答案：A", 0, 0),
        ("B", 0, 0),
        ("", 0, 0),
        ("AB", 0, 0),
        ("C: A: z", 1, 1),
    ],
)
def test_multiple_choice_by_hand(prediction: str, strict: int, lenient: int) -> None:
    assert (choice_accuracy(prediction, "A"), lenient_choice_accuracy(prediction, "A")) == (strict, lenient)


def test_choices_that_are_words_match_as_words() -> None:
    assert choice_accuracy("Yes.", "yes") == lenient_choice_accuracy("Yes.", "yes") == 1
    assert lenient_choice_accuracy("Yes, it is", "yes") == 0


def row(dataset: str, kind: str | None, prediction: str, reference: str) -> dict[str, object]:
    metadata = {"dataset": dataset, "num_images": 2} | ({"question_type": kind} if kind else {})
    return {"id": f"{dataset}-{prediction}", "prediction": prediction, "reference": reference, "metadata": metadata}


def test_categories_are_unweighted_means_over_their_data_sets() -> None:
    rows = [row("Spot-the-Diff", "open-ended", "a b", "a b")] * 3 + [row("CLEVR-Change", "open-ended", "x", "y"), row("CLEVR-Change", "open-ended", "x", "")]
    rows += [row("NLVR2_Mantis", "multi-choice", "A. yes", "A"), row("mine", None, "1", "1")]
    rows[-1]["metadata"]["question_type"] = ["no", "name"]  # type: ignore[index]
    metrics = score(rows)
    assert metrics["categories"]["spot_the_diff"] == {"score": pytest.approx(0.5), "metric": "rouge_l", "count": 4, "missing": ["Birds-to-Words"]}
    assert metrics["datasets"]["CLEVR-Change"] == {"score": 0.0, "metric": "rouge_l", "count": 1, "skipped": 1}
    assert metrics["categories"]["nlvr2"] == {"score": 0.0, "metric": "choice_accuracy", "count": 1}
    assert metrics["datasets"]["NLVR2_Mantis"]["lenient"] == 1
    assert metrics["datasets"]["mine"] == {"score": 1.0, "metric": "exact_match", "count": 1}
    assert set(metrics["categories"]) == {"spot_the_diff", "nlvr2"}
    assert "average" not in metrics
    every = [row(name, "open-ended", "a", "a") for members in CATEGORIES.values() for name in members]
    assert score(every)["average"] == pytest.approx(1)
    assert set(PUBLISHED["7B"]) <= {*CATEGORIES, "in_domain_average"}


def test_a_file_of_predictions_is_scored_without_a_model(tmp_path: Path) -> None:
    rows = [row("QBench", "multi-choice", "B. blurred", "B"), row("QBench", "multi-choice", "A", "A"), row("VIST", "open-ended", "a dog", "a dog runs")]
    path = tmp_path / "given.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in rows))
    done = run("evaluate_model.py", "--predictions", path, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(score(rows)))
    assert metrics_table(metrics) in done.stdout
    assert re.search(r"qbench +50\.0% +52\.0% +74\.2% +76\.7%", done.stdout)
    assert re.search(r"story +\d+\.\d% +without AESOP, FlintstonesSV, PororoSV", done.stdout)
    assert "QBench                       50.0%  of 2, 100.0% by a lenient reading" in done.stdout
