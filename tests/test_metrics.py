"""Metrics of answers against their definitions, on strings that nobody expects; groups; predictions of other origin; what is refused."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.errors import InputError
from interlace.inference.answer_metrics import anls, relaxed_accuracy, vqa_accuracy, vqa_answer
from interlace.inference.boxes import boxes_in, intersection_over_union
from interlace.inference.caption_metrics import bleu, cider
from interlace.inference.metrics import METRICS, check_rows, score
from interlace.inference.predictions import metrics_table, read_predictions, told_apart, write_scores
from interlace.inference.references import read_expected, with_references
from tests.conftest import write_rows
from tests.test_scripts import run

STRANGE = [
    "",
    " ",
    ".",
    "A.",
    "(A)",
    "A. yes",
    "a: b: c",
    "x" * 600,
    "word " * 120,
    "狗在跑，很快。",
    "line\nbreak\ttab",
    "\ud800",
    "[1,2",
    "%",
    "-",
    "1e999",
    "²",
    "🐶",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs.", "2 dogs"),
        ("an APPLE, a pear", "apple pear"),  # the comma touches a space: it goes
        ("left/right", "left right"),  # no space in sight: a space takes its place
        ("1,000 km/h", "1000 kmh"),  # digits around a comma: every mark goes
        ("dont know", "don't know"),
        ("Im sure", "im sure"),  # the table has a capital I, which lower case never meets
        ("he'dve gone, hed've", "he'd've gone he'd've"),
        ("none", "0"),
        ("ten o'clock", "10 o'clock"),
        ("3.14.", "3.14"),
        ("a the an", ""),
        ("是\n的", "是 的"),
    ],
)
def test_answers_are_processed_as_the_official_script_does(text: str, expected: str) -> None:
    assert vqa_answer(text) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people_has_the_published_values(agree: int, expected: float) -> None:
    people = ["The Red one."] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("red 1", people) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=12), st.sampled_from("abcde"))
def test_vqa_accuracy_is_the_mean_over_all_subsets_that_leave_one_out(people: list[str], answer: str) -> None:
    people, answer = [f"w{person}" for person in people], f"w{answer}"
    subsets = list(itertools.combinations(people, len(people) - 1))
    assert vqa_accuracy(answer, people) == pytest.approx(sum(min(subset.count(answer) / 3, 1) for subset in subsets) / len(subsets))


def test_vqa_accuracy_of_few_people() -> None:
    assert vqa_accuracy("Yes!", ["yes"]) == 1
    assert vqa_accuracy("no", ["yes"]) == 0
    assert vqa_accuracy("yes", ["yes", "no"]) == 0.5
    assert vqa_accuracy("yes", ["yes", "yes"]) == vqa_accuracy("yes", ["yes"] * 3) == 1
    assert vqa_accuracy("yes", ["", " "]) is None


def edit_distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, opposite in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != opposite))
    return row[-1]


@settings(deadline=None)
@given(st.text("abAB 中", max_size=12), st.text("abAB 中", min_size=1, max_size=12))
def test_anls_by_its_definition(prediction: str, reference: str) -> None:
    found = anls(prediction, reference)
    if not reference.strip():
        assert found is None
        return
    distance = edit_distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    similarity = 1 - distance / max(len(prediction), len(reference))
    assert found == pytest.approx(similarity if similarity >= 0.5 else 0)


def test_anls_by_hand() -> None:
    assert anls("12/15/89", "12/15/88") == 1 - 1 / 8
    assert anls("ab", "AC") == 0.5  # the threshold itself counts
    assert anls("abc", "axy") == 0
    assert METRICS["anls"].rule is not None
    assert METRICS["anls"].rule("Denver Broncos", ["Broncos", "denver  broncos"]) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("-95", "-100", 1),
        ("5%", "0.05", 1),
        ("12", "12%", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # nothing is near 0: the texts count
        ("Blue ", "blue", 1),
        ("1,000", "1000", 0),
        ("nan", "inf", 0),
        ("1e999", "7", 0),
        ("٣", "3", 0),
        ("", "3", 0),
        ("3", " ", None),
    ],
)
def test_relaxed_accuracy_by_hand(prediction: str, reference: str, expected: float | None) -> None:
    assert relaxed_accuracy(prediction, reference) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[10, 20, 30, 40]",
        "[10,20,30,40]",
        "The dog is at [10.0 20.0 30.0 40.0].",
        "<box>(10,20),(30,40)</box>",
        "<|box_start|>(10, 20) (30, 40)<|box_end|>",
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "dog"}]\n```',
        "[[10, 20, 30, 40]]",
        " 10 20 30 40\n",
        "10, 20, 30, 40",
        "（10，20），（30，40）",
        "[30, 40, 10, 20]",
        "[\n10,\n20,\n30,\n40\n]",
    ],
)
def test_a_box_in_many_spellings(text: str) -> None:
    assert boxes_in(text) == [(10, 20, 30, 40)]


@pytest.mark.parametrize("text", ["", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "10 20 30 40 50", "no box", "[a, b, c, d]", "[1,2,3,4", "[" * 5000, "[1" + " " * 5000])
def test_what_is_no_box(text: str) -> None:
    assert boxes_in(text) == []


corner = st.integers(0, 9)


@settings(deadline=None)
@given(st.tuples(corner, corner, corner, corner), st.tuples(corner, corner, corner, corner))
def test_iou_counts_shared_cells(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        xs, ys = sorted((box[0], box[2])), sorted((box[1], box[3]))
        return set(itertools.product(range(*xs), range(*ys)))

    shared, covered = cells(one) & cells(other), cells(one) | cells(other)
    found = intersection_over_union(*(boxes_in(str(list(box)))[0] for box in (one, other)))
    assert found == pytest.approx(len(shared) / len(covered) if covered else 0)


def test_boxes_of_a_row() -> None:
    rows = [
        row("[0, 0, 10, 10]", "[0, 0, 10, 5]", metric="iou"),  # 1/2
        row("[0, 0, 1, 1] and [20, 0, 30, 10]", "[20, 0, 30, 10]", metric="iou"),  # one too many: 1/2
        row("[5, 0, 10, 10], [0, 0, 10, 10]", "(0,0),(10,10) (0,0),(4,10)", metric="iou"),  # the second goes to the first; [5, ..] and (0,0),(4,10) miss
        row("I see none", "[0, 0, 1, 1]", metric="iou"),
        row("[0, 0, 1, 1]", "anywhere", metric="iou"),
    ]
    assert score(rows)["overall"] == {"score": pytest.approx(1.5 / 4), "metric": "iou", "count": 4, "skipped": 1, "accuracy_at_0.5": pytest.approx(2 / 4)}


def test_bleu_is_of_the_corpus() -> None:
    pairs = [("a b c d e", ["a b c d f"]), ("p q r s", ["p q r s", "p q"])]
    precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
    assert bleu(pairs)["score"] == pytest.approx(math.prod(precisions) ** 0.25)
    assert bleu(pairs[:1])["score"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = bleu([("a b c d", ["a b c d e f"])])
    assert short["score"] == pytest.approx(math.exp(1 - 6 / 4))
    assert "tok:13a" in short["signature"]
    assert bleu([("狗在跑步", ["狗在跑步了"])])["score"] == pytest.approx(math.exp(1 - 5 / 4))  # each character a word


def test_cider_by_hand() -> None:
    pairs = [("p q r e", ["p q r s"]), ("W, x y z!", ["w x y z."])]
    first = 10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4  # all words equally rare: shares of common 1- to 4-grams
    assert cider(pairs)["cider"] == pytest.approx((first + 10) / 2)
    two_references = [("p q r s", ["p q r s", "k l m n"]), pairs[1]]
    assert cider(two_references)["cider"] == pytest.approx((5 + 10) / 2)
    assert cider([("The man's dog isn't", ["the man 's dog is n't"]), pairs[1]]) == pytest.approx({"score": 1, "cider": 10})
    assert cider([("", ["p q r s"]), pairs[1]]) == pytest.approx({"score": 0.5, "cider": 5})


@pytest.mark.parametrize("name", METRICS)
def test_strange_texts_are_scored_too(name: str) -> None:
    rows = [row(prediction, reference, metric=name) for prediction, reference in itertools.product(STRANGE, STRANGE)]
    summary = score(rows)["overall"]
    assert 0 <= summary["score"] <= 1
    assert summary["count"] + summary.get("skipped", 0) == len(STRANGE) ** 2
    same = score([row(text, text, metric=name) for text in ("a dog runs far", "狗在跑步", "[0, 0, 3, 3]")])["overall"]
    assert same["score"] == pytest.approx(1) or name == "choice_accuracy"  # 9 letters and no more
    metrics_table(score(rows))


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=4), st.sampled_from([name for name, metric in METRICS.items() if metric.rule]))
def test_any_text_has_a_score_within_bounds(prediction: str, references: list[str], name: str) -> None:
    rule = METRICS[name].rule
    assert rule is not None
    found = rule(prediction, references)
    assert found is None or 0 <= found <= 1


def row(prediction: str, reference: str, **metadata: Any) -> dict[str, Any]:
    return {"id": f"{prediction}-{reference}-{metadata}", "prediction": prediction, "reference": reference, "metadata": metadata}


def test_groups_are_there_where_the_data_have_them() -> None:
    plain = score([row("a", "a"), row("b", "c")])
    assert set(plain) == {"overall", "datasets", "categories", "num_images"}
    rows = [
        row("a", "a", source="web", decisive_image=10, question_type="counting", num_images=12),
        row("a", "b", source="web", decisive_image=2, num_images=3),
        row("A", "A", question_type="multi-choice", num_images=3),
        row("no", "x", references=["yes", "no"], source=["not", "a", "name"], decisive_image=2),
    ]
    metrics = score(rows)
    assert metrics["sources"] == {"web": {"score": 0.5, "metric": "exact_match", "count": 2}}
    assert {name: value["score"] for name, value in metrics["decisive_image"].items()} == {"2": 0.5, "10": 1.0}
    assert list(metrics["decisive_image"]) == ["2", "10"]
    assert list(metrics["num_images"]) == ["unknown", "3", "12"]
    assert {name: value["metric"] for name, value in metrics["tasks"].items()} == {"counting": "exact_match", "multi-choice": "choice_accuracy"}
    assert metrics["by_metric"]["choice_accuracy"] == {"score": 1.0, "metric": "choice_accuracy", "count": 1, "lenient": 1.0}
    assert metrics["overall"] == {"score": 0.75, "metric": "choice_accuracy, exact_match", "count": 4}
    table = metrics_table(metrics)
    assert "decisive image 10" in table
    assert "source web" in table
    assert "task counting" in table


def test_groups_of_metrics_that_score_rows_together() -> None:
    good, bad = row("a b c d", "a b c d", metric="bleu", dataset="x"), row("k l m n", "p q r s", metric="bleu", dataset="y")
    rows = [good, bad, row("1", "1", dataset="y"), row("say", "!", metric="bleu", dataset="y")]
    metrics = score(rows)
    together = bleu([("a b c d", ["a b c d"]), ("k l m n", ["p q r s"])])["score"]
    assert metrics["by_metric"]["bleu"]["score"] == pytest.approx(together)
    assert metrics["by_metric"]["bleu"]["skipped"] == 1  # a reference without a word
    assert metrics["datasets"]["x"]["score"] == pytest.approx(1)
    assert metrics["overall"]["score"] == pytest.approx((2 * together + 1) / 3)
    assert metrics["overall"]["count"] == 3
    asked = score([{**row, "metadata": {"default_metric": "anls", **row["metadata"]}} for row in rows])
    assert asked["by_metric"]["anls"]["count"] == 1  # of rows that say nothing


def test_rows_that_cannot_be_scored_are_named() -> None:
    rows = [("f.json: row 3", {"metric": "blue"}), ("f.json: row 4", {"references": "yes"}), ("f.json: row 5", {"references": []}), ("f.json: row 6", {})]
    with pytest.raises(InputError, match=r"(?s)3 rows .*bleu.*row 3: no metric 'blue'.*row 4: references: expected a list of texts, got yes.*row 5"):
        check_rows(rows)


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu.metrics.bleu"), ("cider", "pycocoevalcap.cider.cider")])
def test_a_missing_package_is_said_before_anything_is_done(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install -e \".\[evaluation\]\""):
        check_rows([("row 0", {"metric": name})])
    check_rows([("row 0", {})])


@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "b#2"]), max_size=12))
def test_ids_are_told_apart_and_single_ones_stay(names: list[str]) -> None:
    found = told_apart(names)
    assert len(set(found)) == len(names)
    assert told_apart(found) == found
    assert all(new == name or name in names[:i] for i, (name, new) in enumerate(zip(names, found, strict=True)))
    assert all(new.startswith(name) for name, new in zip(names, found, strict=True))


def test_scores_again_are_the_scores_of_the_run(tmp_path: Path) -> None:
    data = write_rows(tmp_path, 6)
    rows = json.loads(data.read_text())
    rows[1] |= {"id": "0", "metadata": {"metric": "anls", "references": ["1", "2"], "decisive_image": 0, "source": "here"}}
    data.write_text(json.dumps(rows))
    done = run(
        "evaluate_model.py", "--model-path", "demo", "--data-files", data, "--max-new-tokens", "4", "--metric", "vqa_accuracy", "--output-dir", tmp_path / "one"
    )
    assert done.returncode == 0, done.stderr
    predictions = tmp_path / "one" / "predictions.jsonl"
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [value["id"] for value in written] == ["0", "0#2", "2", "3", "4", "5"]
    metrics = (tmp_path / "one" / "metrics.json").read_text()
    assert set(json.loads(metrics)["by_metric"]) == {"anls", "vqa_accuracy"}
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({name: value[name] for name in ("id", "prediction")}) for value in written))
    for name, words in (("two", ["--predictions", predictions]), ("three", ["--predictions", bare, "--data-files", data, "--metric", "vqa_accuracy"])):
        again = run("evaluate_model.py", *words, "--output-dir", tmp_path / name)
        assert again.returncode == 0, again.stderr
        assert (tmp_path / name / "metrics.json").read_text() == metrics
    again_with_data, others = with_references(read_predictions(predictions), read_expected({"data_files": str(data)}))
    assert (again_with_data, others) == (written, 0)


def test_half_a_character_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    write_scores(tmp_path, [row("\ud800", "x")])
    assert json.loads((tmp_path / "predictions.jsonl").read_text())["prediction"] == "\ud800"


GIVEN = [{"id": str(i), "prediction": "1", "reference": "1", "metadata": {}} for i in range(4)]


@pytest.mark.parametrize(
    ("lines", "words", "expected"),
    [
        (GIVEN, ["--metric", "vqa_acuracy"], "no metric 'vqa_acuracy'; did you mean 'vqa_accuracy'?"),
        ([*GIVEN, GIVEN[2]], [], "1 id (2) more than once"),
        ([GIVEN[0], {**GIVEN[1], "metadata": {"metric": "blue"}}], [], "line 2: no metric 'blue'"),
        ([{"id": "0", "prediction": "1", "metadata": {}}], [], "line 1: expected id, prediction (text), reference (text; or --data-files"),
        ([GIVEN[0], "{"], [], "line 2: no valid JSON"),
        (GIVEN[:3], ["--data-files", "DATA"], "no prediction for 1 row (3)"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, lines: list[Any], words: list[str], expected: str) -> None:
    data = write_numbers(tmp_path)
    given = tmp_path / "given.jsonl"
    given.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in lines))
    files = [str(data) if word == "DATA" else word for word in words]
    done = run("evaluate_model.py", "--predictions", given, *files, "--output-dir", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()


def write_numbers(folder: Path, *changes: tuple[int, dict[str, Any]]) -> Path:
    """Four rows with ids from 0 that are all answered by 1."""
    rows = [{"id": i, "conversations": [["q", "1"]], "metadata": {"source": "s"}} for i in range(4)]
    for i, change in changes:
        rows[i] = change
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("given", "changes", "expected"),
    [
        ([*GIVEN[:3], {**GIVEN[3], "id": "three"}], [], r"no prediction for 1 row \(3\); the data have no row for 1 prediction \(three\)"),
        ([{**GIVEN[0], "id": f"x{i}"} for i in range(9)], [], r"no prediction for 4 rows .* for 9 predictions \(x0, x1, x2, x3, x4, and 4 more\)"),
        ([{**value, "reference": "of another set"} for value in GIVEN], [], "every prediction names another reference"),
        (GIVEN, [(2, {"id": "2", "messages": [{"role": "user", "content": "q"}]})], "row 2: no_answer"),
        (GIVEN, [(2, {"id": "2", "conversations": [["q", "1"]], "metadata": {"metric": "blue"}})], "data.json: row 2: no metric 'blue'"),
    ],
)
def test_predictions_and_data_that_do_not_match(tmp_path: Path, given: list[dict[str, Any]], changes: list[Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        with_references(given, read_expected({"data_files": str(write_numbers(tmp_path, *changes))}))


def test_a_few_other_references_are_counted_and_the_data_decide(tmp_path: Path) -> None:
    rows = [{**value, "reference": "7"} if value["id"] == "3" else {**value, "reference": None} for value in GIVEN]
    path = tmp_path / "given.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(value) for value in rows))
    predictions, others = with_references(read_predictions(path, needs_reference=False), read_expected({"data_files": str(write_numbers(tmp_path))}))
    assert others == 1
    metrics = score(predictions)
    assert metrics["sources"]["s"] == {"score": 1.0, "metric": "exact_match", "count": 4}
    assert metrics["num_images"] == {"0": metrics["overall"]}


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_predictions(path)
