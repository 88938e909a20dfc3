"""Images changed: that the changed questions are what they are said to be, and that the demo model's answers show what each of its tasks rests on."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate_model
from interlace.data.media import open_images
from interlace.data.reading import Outcome, Row
from interlace.data.sample import Place
from interlace.inference.ablations import Ablations, ablate, partners, shuffled, some_of, spans_of, traded
from interlace.inference.diagnostics import Ablated, diagnosis, insensitive, write_diagnosis
from interlace.inference.evaluation import predict, question_of, read_questions
from interlace.inference.generation import Generator, load_generator
from interlace.ranks import Ranks
from tests import small_families, test_families
from tests.conftest import DEMO_MODEL, write_rows
from tests.test_scripts import run
from tests.test_video import write_video

LETTERS = "ABCD"
NAMES = ["wide", "tall", "square", "large"]


@pytest.mark.parametrize("names", ["AB", "ABC", "AAB", "AABB", "AAAB", "ABCDE", "ABCA"])
def test_shuffling_moves_as_many_images_as_can_be_moved(names: str) -> None:
    images = [Place(name) for name in names]
    most = max(sum(one != other for one, other in zip(names, order, strict=True)) for order in itertools.permutations(names))
    seen = set()
    for seed in range(30):
        order = shuffled(images, random.Random(seed))
        assert order is not None and sorted(order) == list(range(len(names)))
        assert sum(names[i] != names[k] for i, k in enumerate(order)) == most > 0
        seen.add(tuple(order))
    assert len(seen) > 1 or len(names) == 2


@pytest.mark.parametrize("names", ["", "A", "AAA"])
def test_what_cannot_be_told_apart_is_not_moved(names: str) -> None:
    images = [Place(name) for name in names]
    assert shuffled(images, random.Random(0)) is None and traded(images, random.Random(0)) is None


def test_two_different_images_trade_places() -> None:
    names = "ABAC"
    seen = set()
    for seed in range(60):
        order = traded([Place(name) for name in names], random.Random(seed))
        assert order is not None and sorted(order) == [0, 1, 2, 3]
        moved = [i for i, k in enumerate(order) if i != k]
        assert len(moved) == 2 and names[moved[0]] != names[moved[1]]
        seen.add(tuple(moved))
    assert len(seen) == 5  # all pairs but the two copies of A


@pytest.fixture(scope="module", params=["demo", "llava_onevision", "qwen2_vl"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, Path]:
    """A model, and a folder of pictures of several sizes: one number of tokens for all, one that depends on the number of images, one on their size."""
    folder = tmp_path_factory.mktemp("asked")
    small_families.make_pictures(folder)
    if request.param == "demo":
        return load_generator(str(DEMO_MODEL)), folder
    family = test_families if request.param == "llava_onevision" else small_families
    return load_generator(str(family.make_model(request.param, tmp_path_factory.mktemp("model")))), folder


def read(generator: Generator, folder: Path, rows: Sequence[Sequence[str]], places: Sequence[Sequence[bool]] | None = None) -> list[Outcome]:
    """Rows with these pictures, each behind its letter; places: where a letter stands alone."""
    records = []
    for number, names in enumerate(rows):
        kept = [True] * len(names) if places is None else places[number]
        question = "".join(f"Image {LETTERS[i]}: {'<image>' * there}\n" for i, there in enumerate(kept)) + "Which one?"
        images = [f"{name}.png" for name, there in zip(names, kept, strict=True) if there]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "image A"}]
        records.append({"id": f"row {number}", **({"image": images} if images else {}), "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    return read_questions({"data_files": str(folder / "rows.json")}, generator)


def row_of(outcome: Outcome) -> Row:
    assert outcome.row is not None
    return outcome.row


def changed(outcome: Outcome, row: Row) -> Outcome:
    return Outcome(outcome.record, outcome.format, outcome.sample, row, None)


def names_of(row: Row) -> list[str]:
    return [Path(place.path).stem for place in row.images]


@pytest.mark.parametrize("name", ["shuffled", "references"])
def test_moved_images_are_the_row_written_in_that_order(asked: tuple[Generator, Path], tmp_path: Path, name: str) -> None:
    generator, folder = asked
    (outcome,) = read(generator, folder, [NAMES])
    ((_, image, row),) = Ablations(generator.processing, tmp_path).of(name, row_of(outcome))
    assert image is None and sorted(names_of(row)) == sorted(NAMES) and names_of(row) != NAMES
    (written,) = read(generator, folder, [names_of(row)])
    assert question_of(changed(outcome, row), generator) == question_of(written, generator)
    assert row.length == row_of(written).length


def test_grey_images_have_the_size_and_the_tokens_of_the_others(asked: tuple[Generator, Path], tmp_path: Path) -> None:
    generator, folder = asked
    (outcome,) = read(generator, folder, [NAMES])
    found = list(Ablations(generator.processing, tmp_path).of("blanked", row_of(outcome)))
    assert [(name, image) for name, image, _ in found] == [("blanked", 1), ("blanked", 2), ("blanked", 3), ("blanked", 4), ("all_blanked", None)]
    originals = open_images(row_of(outcome).images)
    for _, image, row in found:
        assert question_of(changed(outcome, row), generator).input_ids == question_of(outcome, generator).input_ids
        assert generator.processing.row_image_tokens([opened.size for opened in open_images(row.images)]) == list(row.image_tokens)
        for number, (opened, original) in enumerate(zip(open_images(row.images), originals, strict=True), 1):
            assert opened.size == original.size
            if image in (None, number):
                assert (np.asarray(opened) == 128).all()
            else:
                assert (np.asarray(opened) == np.asarray(original)).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_dropped_image_leaves_the_row_written_without_it(asked: tuple[Generator, Path], tmp_path: Path, count: int) -> None:
    generator, folder = asked
    (outcome,) = read(generator, folder, [NAMES[4 - count :]])
    found = list(Ablations(generator.processing, tmp_path).of("dropped", row_of(outcome)))
    assert [image for _, image, _ in found] == list(range(1, count + 1))
    for _, image, row in found:
        (written,) = read(generator, folder, [NAMES[4 - count :]], [[i + 1 != image for i in range(count)]])
        prompt, wanted = question_of(changed(outcome, row), generator), question_of(written, generator)
        assert prompt.images == wanted.images and row.image_tokens == row_of(written).image_tokens
        decode = generator.processing.tokenizer.decode  # the pieces of text beside the image may be tokenized apart
        assert decode(prompt.input_ids) == decode(wanted.input_ids)
        assert row.length - len(prompt.input_ids) == row_of(outcome).length - len(question_of(outcome, generator).input_ids)  # the answer


def test_a_video_is_one_image_that_turns_grey_or_goes(tmp_path: Path) -> None:
    generator = load_generator(str(DEMO_MODEL))
    small_families.make_pictures(tmp_path)
    write_video(tmp_path / "v.mp4", times=list(range(0, 75, 5)))
    record = {"images": ["wide.png", "tall.png"], "videos": ["v.mp4", "v.mp4"], "query": "<image>\n<video>\n<video>\n<image>\nWhich?", "response": "2"}
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    (outcome,) = read_questions({"data_files": str(tmp_path / "rows.json")}, generator)
    images = row_of(outcome).images
    spans = spans_of(images)
    assert (len(images) - 2) // 2 == len(spans[1]) == len(spans[2]) > 1
    assert [number for span in spans for number in span] == list(range(len(images)))
    ablations = Ablations(generator.processing, tmp_path)
    for (_, image, row), span in zip(ablations.of("dropped", row_of(outcome)), spans, strict=True):
        assert image == spans.index(span) + 1
        assert row.images == images[: span.start] + images[span.stop :]
        question = record["query"].split("\n")
        question[image - 1] = ""
        left = {"images": ["wide.png", "tall.png"], "videos": ["v.mp4", "v.mp4"]}
        left["images" if image in (1, 4) else "videos"].pop(image == 4)
        (tmp_path / "left.json").write_text(json.dumps([record | left | {"query": "\n".join(question)}]))
        (written,) = read_questions({"data_files": str(tmp_path / "left.json")}, generator)
        prompt, wanted = question_of(changed(outcome, row), generator), question_of(written, generator)
        assert (prompt.input_ids, prompt.images) == (wanted.input_ids, wanted.images)
    for (_, _, row), span in zip(ablations.of("blanked", row_of(outcome)), [*spans, range(len(images))], strict=True):
        assert [place != original for place, original in zip(row.images, images, strict=True)] == [number in span for number in range(len(images))]


def test_swapped_images_are_all_of_another_row_of_as_many_tokens(asked: tuple[Generator, Path], tmp_path: Path) -> None:
    generator, folder = asked
    rows = [["wide", "tall"], ["tall", "wide"], ["square", "large"], ["line", "odd"], ["large"], ["dot"], ["wide"]]
    outcomes = read(generator, folder, rows)
    able = partners(outcomes)
    for outcome, names in zip(outcomes, rows, strict=True):
        same = [row_of(other) for other in outcomes if row_of(other).image_tokens == row_of(outcome).image_tokens]
        fitting = [row.images for row in same if not set(names_of(row)) & set(names)]
        found = [row for _, _, row in Ablations(generator.processing, tmp_path, partners=able).of("swapped", row_of(outcome))]
        assert len(found) == bool(fitting)
        for row in found:
            assert row.images in fitting
            assert question_of(changed(outcome, row), generator).input_ids == question_of(outcome, generator).input_ids


def test_a_row_is_changed_by_its_seed_whatever_other_rows_there_are(asked: tuple[Generator, Path], tmp_path: Path) -> None:
    generator, folder = asked
    outcomes = read(generator, folder, [NAMES] * 12)

    def orders(rows: Sequence[Outcome], seed: int) -> list[list[str]]:
        return [names_of(row) for outcome in rows for _, _, row in Ablations(generator.processing, tmp_path, seed).of("shuffled", row_of(outcome))]

    assert orders(outcomes, 0) == orders(outcomes, 0) != orders(outcomes, 1)
    assert orders(outcomes[5:], 0) == orders(outcomes, 0)[5:]
    assert len(set(map(tuple, orders(outcomes, 0)))) > 1


def test_some_rows_are_spread_over_data_sets_and_numbers_of_images() -> None:
    rows = [{"metadata": {"dataset": name, "num_images": count}} for name in "xy" for count in (0, 1, 2) for _ in range(50)]
    chosen = some_of(rows, 40)
    assert chosen == sorted(set(chosen)) and len(chosen) == 40
    assert set(Counter((rows[i]["metadata"]["dataset"], rows[i]["metadata"]["num_images"]) for i in chosen).values()) == {10}
    assert some_of(rows, 0) == some_of(rows, 1000) == [i for i, row in enumerate(rows) if row["metadata"]["num_images"]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, list[Outcome]]:
    """The demo model, and rows in which only the place decides (name_k) or nothing depends on it: the same question about scans of one digit."""
    generator = load_generator(str(DEMO_MODEL))
    outcomes = read_questions({"data_files": "demo", "split": "validation"}, generator)
    named = [outcome for outcome in outcomes if outcome.sample is not None and outcome.sample.metadata["dataset"] == "name"]
    scans: dict[str, list[str]] = {}
    for outcome in named:
        scans.setdefault(outcome.sample.turns[-1].text, []).append(row_of(outcome).images[0].path)  # type: ignore[union-attr]
    records = []
    for number in range(24):
        digit, count = str(number % 10), 2 + number % 3
        images = random.Random(number).sample(sorted(set(scans[digit])), count)
        letter = LETTERS[number % count]
        question = "".join(f"Image {LETTERS[i]}: <image>\n" for i in range(count)) + f"What digit is in image {letter}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"image {letter}: {digit}"}]
        records.append({"id": f"same-{number}", "image": images, "conversations": turns, "metadata": {"dataset": "same digit"}})
    path = tmp_path_factory.mktemp("same") / "rows.json"
    path.write_text(json.dumps(records))
    same = read_questions({"data_files": str(path), "image_folder": str(Path(images[0]).parent)}, generator)
    placed = [outcome for outcome in outcomes if outcome.sample is not None and outcome.sample.metadata["dataset"] == "name_k"]
    return generator, [*placed[:24], *same, *named[:8]]


def test_the_demo_shows_what_each_task_rests_on(demo: tuple[Generator, list[Outcome]], tmp_path: Path) -> None:
    generator, outcomes = demo
    predictions = predict(generator, outcomes, 32, 12)
    ablated = ablate(generator, outcomes, predictions, evaluate_model.ABLATIONS, 64, 12)
    found = write_diagnosis(tmp_path, ablated, predictions)
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == json.loads(json.dumps(found))
    assert set(found["ablations"]) == {"shuffled", "references", "blanked", "all_blanked", "dropped", "swapped"}
    assert found["rows"] == 56
    moved = found["ablations"]["shuffled"]["datasets"]
    assert set(moved) == {"name_k", "same digit"}  # one image cannot be moved
    assert moved["name_k"]["before"] >= 0.9 and moved["name_k"]["drop"] >= 0.5 and moved["name_k"]["interval"][0] > 0.3
    assert moved["same digit"]["before"] >= 0.9 and abs(moved["same digit"]["drop"]) <= 0.1 and moved["same digit"]["interval"][0] <= 0
    grey = found["ablations"]["all_blanked"]["datasets"]
    assert all(grey[name]["drop"] >= 0.5 for name in ("name_k", "same digit", "name"))
    # one grey image of several: about one in so many is the one that the question is about
    one = found["ablations"]["blanked"]
    assert one["datasets"]["name_k"]["drop"] < grey["name_k"]["drop"] - 0.2
    counts = Counter(len(row_of(outcome).images) for outcome in outcomes)
    assert {name: value["count"] for name, value in one["images"].items()} == {str(k): sum(n for c, n in counts.items() if c >= k) for k in (1, 2, 3, 4)}
    assert {name: value["count"] for name, value in one["num_images"].items()} == {str(count): rows for count, rows in sorted(counts.items())}
    same = found["insensitive"]
    by_hand = [row.number for row in ablated if row.ablation == "all_blanked" and row.prediction["prediction"] == predictions[row.number]["prediction"]]
    assert (same["count"], same["of"], insensitive(ablated, predictions)) == (len(by_hand), 56, by_hand)


def test_every_changed_question_is_asked_once(demo: tuple[Generator, list[Outcome]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one image, blanking it is blanking all; with two, shuffling is trading; ids tell the questions apart."""
    generator, outcomes = demo
    rows = [outcomes[-1], next(outcome for outcome in outcomes if len(row_of(outcome).images) == 2)]
    questions: list[Outcome] = []

    def count(generator: Generator, outcomes: list[Outcome], batch_size: int, max_new_tokens: int, partial: Any, ranks: Ranks | None) -> list[dict[str, Any]]:
        questions.extend(outcomes)
        return predict(generator, outcomes, batch_size, max_new_tokens)

    monkeypatch.setattr("interlace.inference.ablations.predict", count)
    ablated = ablate(generator, rows, predict(generator, rows, 8, 12), ["shuffled", "references", "blanked"], 8, 12)
    assert len(ablated) == 2 + 5 and len(questions) == 1 + 4
    assert len({outcome.sample.identifier for outcome in questions if outcome.sample is not None}) == 5


def test_drops_by_hand() -> None:
    """Two rows: of the first, with two images, the second one decides; the second has one image, and does not need it."""
    predictions = [{"id": i, "prediction": "a", "reference": "a", "metadata": {"dataset": "x", "num_images": 2 - i}} for i in range(2)]
    answers = [("blanked", 0, 1, "a", 1.0), ("blanked", 0, 2, "b", 0.0), ("all_blanked", 0, None, "b", 0.0), ("blanked", 1, 1, "a", 1.0)]
    answers.append(("all_blanked", 1, None, "a", 1.0))
    ablated = [Ablated(name, row, image, {"prediction": text}, 1.0, score) for name, row, image, text, score in answers]
    found = diagnosis(ablated, predictions)
    one = found["ablations"]["blanked"]
    assert {name: one["overall"][name] for name in ("count", "before", "score", "drop", "changed")} == dict(
        count=2, before=1, score=0.75, drop=0.25, changed=0.25
    )
    assert {name: (value["count"], value["drop"]) for name, value in one["images"].items()} == {"1": (2, 0.0), "2": (1, 1.0)}
    assert one["images"]["2"]["interval"] is None
    assert {name: value["drop"] for name, value in one["num_images"].items()} == {"1": 0.0, "2": 0.5}
    assert found["ablations"]["all_blanked"]["images"] == {}
    assert found["insensitive"] == {"count": 1, "of": 2, "score": 1.0, "rows": [{"id": 1, "dataset": "x"}]}


def test_the_script_diagnoses_and_reports(tmp_path: Path) -> None:
    data = write_rows(tmp_path, 8)
    words = ["--model-path", "demo", "--data-files", data, "--max-new-tokens", "8", "--diagnose-rows", "4", "--report-rows", "3"]
    done = run("evaluate_model.py", *words, "--diagnose", "shuffled", "dropped", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert set(found["ablations"]) == {"shuffled", "dropped"} and found["rows"] == 4
    assert "shuffled" in done.stdout and str(tmp_path / "out" / "diagnostics.json") in done.stdout
    assert "With the images changed" in (tmp_path / "out" / "evaluation.html").read_text()
    wrong = run("evaluate_model.py", *words, "--diagnose", "shufled", "--output-dir", tmp_path / "never")
    assert (wrong.returncode, "shufled" in wrong.stderr, (tmp_path / "never").exists()) == (2, True, False)
