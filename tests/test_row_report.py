"""The row report: losses equal a naive loop, through packing, sharing, ranks and resumes; flags find what was planted; lists are taken by the next run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from interlace.data.batch import Collator
from interlace.data.dataset import Rows, load_rows
from interlace.data.duplicates import likeness
from interlace.data.row_lists import Excluded, write_list
from interlace.data.sources import read_entries
from interlace.errors import InputError
from interlace.model.loading import load_processing
from interlace.training import parts
from interlace.training.row_flags import excesses, judged
from interlace.training.row_losses import RowLosses
from interlace.training.supervised import finetune
from tests.accidents import finish, run_ranks
from tests.conftest import write_rows

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}


def table(output_dir: str | Path) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(Path(output_dir) / "row_report.parquet").to_pydict()


def read(arguments: dict[str, Any]) -> Rows:
    reader = parts.row_reader(arguments, load_processing(arguments["model_name_or_path"]))
    return load_rows(read_entries(arguments["dataset"]["train"], 0), reader, arguments, False)[0]


def naive_losses(arguments: dict[str, Any]) -> list[float]:
    """Each row's weighted mean loss, from the full logits of Hugging Face's own forward, one row at a time."""
    path = arguments["model_name_or_path"]
    model, processing = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval(), load_processing(path)
    found = []
    for row in read(arguments):
        batch = Collator(processing.process_images, processing.config.image_token_id).pack([(0, row)])
        pixels = None if batch.pixel_values is None else batch.pixel_values[batch.image_index]
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), pixel_values=pixels).logits[0]
        losses = F.cross_entropy(logits[batch.rows[batch.row_index]], batch.targets, reduction="none")
        found.append(float((losses * batch.weights).sum() / batch.weights.sum()))
    return found


@pytest.fixture
def weighted_file(rows_file: Path) -> Path:
    """Rows of which some have answers of other weights, and some begin with the same images and text."""
    rows = json.loads(rows_file.read_text())
    for number in (0, 3, 9):
        rows[number]["conversations"][1]["loss"], rows[number]["conversations"][3]["loss"] = 0.25, 2.0
    for number in (1, 5, 13):
        rows[number]["image"] = rows[1]["image"]
        rows[number]["conversations"][0]["value"] = "Image A: <image>\n" + f"Question {number}?"
    rows_file.write_text(json.dumps(rows))
    return rows_file


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": False, "gradient_accumulation_steps": 2}, {"share_prefix": True, "logging_steps": 50}, {**LORA, "dataloader_num_workers": 1}],
    ids=["packed", "accumulated", "shared", "lora"],
)
def test_row_losses_are_those_of_a_naive_loop_over_rows(make_arguments: Make, weighted_file: Path, changes: dict[str, Any]) -> None:
    arguments = make_arguments(weighted_file, **EPOCHS, **changes, learning_rate=0.0)
    finetune(arguments)
    found = table(arguments["output_dir"])
    expected = naive_losses(arguments)
    assert found["index"] == list(range(24))
    for epoch in (1, 2):
        assert found[f"loss_epoch_{epoch}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_copies_are_averaged_and_rows_of_other_epochs_stay_empty(make_arguments: Make, rows_file: Path) -> None:
    dataset = {"train": [{"data_files": str(rows_file), "weight": 1.5}]}
    arguments = make_arguments(rows_file, **EPOCHS, dataset=dataset, learning_rate=0.0)
    finetune(arguments)
    assert table(arguments["output_dir"])["loss_epoch_2"] == pytest.approx(naive_losses(arguments), rel=1e-4, abs=1e-5)
    short = make_arguments(rows_file, output_dir=arguments["output_dir"] + "_short", max_steps=2, learning_rate=0.0)
    finetune(short)
    found = table(short["output_dir"])
    assert found["not_trained"] == [loss is None for loss in found["loss_epoch_1"]]
    assert 0 < sum(found["not_trained"]) < 24


def test_a_resumed_run_gives_the_report_of_an_uninterrupted_one(make_arguments: Make, rows_file: Path) -> None:
    common = {**LORA, "max_steps": 9, "save_strategy": "steps", "save_steps": 4, "lora_dropout": 0.1, "logging_steps": 3, "resume_from_checkpoint": True}
    straight, cut = (make_arguments(rows_file, **common, output_dir=str(rows_file.parent / name)) for name in ("straight", "cut"))
    finetune(straight)
    finetune(cut)
    folder = Path(cut["output_dir"])
    shutil.rmtree(folder / "checkpoint-8")
    shutil.rmtree(folder / "checkpoint-9", ignore_errors=True)
    (folder / "trainer_state.json").unlink()
    (folder / "row_report.parquet").unlink()
    finetune(cut)
    assert table(straight["output_dir"]) == table(cut["output_dir"])
    for name in ("row_report.json", "row_drop.json"):
        assert (folder / name).read_text() == (Path(straight["output_dir"]) / name).read_text()


def test_two_ranks_know_all_rows_and_one_takes_up_what_both_knew(make_arguments: Make, weighted_file: Path, tmp_path: Path) -> None:
    common = {"output_dir": str(tmp_path / "pair"), "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 5, "max_steps": 8, "ddp_timeout": 60}
    arguments = make_arguments(weighted_file, **common, row_report="images", resume_from_checkpoint=True)
    ranks = run_ranks(arguments, tmp_path / "logs", 2)
    assert [finish(rank) for rank in ranks] == [0, 0], (tmp_path / "logs" / "0").read_text()
    both, expected = table(tmp_path / "pair"), naive_losses(arguments)
    seen = [number for number, loss in enumerate(both["loss_epoch_2"]) if loss is not None]
    assert both["loss_epoch_1"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [both["loss_epoch_2"][number] for number in seen] == pytest.approx([expected[number] for number in seen], rel=1e-4, abs=1e-5)
    (tmp_path / "pair" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "pair" / "checkpoint-8", ignore_errors=True)
    finetune(arguments)
    alone = table(tmp_path / "pair")
    for name in ("loss_epoch_1", "loss_epoch_2", "image_gap"):
        assert [value is None for value in alone[name]] == [value is None for value in both[name]]
        assert [value for value in alone[name] if value is not None] == pytest.approx([value for value in both[name] if value is not None], rel=1e-4, abs=1e-5)


def test_losses_of_other_rows_are_not_taken_up(tmp_path: Path) -> None:
    known, other = RowLosses(3, "these"), RowLosses(3, "those")
    known.add(0, torch.tensor([[1.0, 2.0], [1.0, 4.0]]), (2, 0))
    known.write(tmp_path / "row_losses-00000-of-00001.safetensors", known.parts())
    assert not other.take_up(tmp_path)
    assert other.means()[0] == []
    again = RowLosses(3, "these")
    assert again.take_up(tmp_path)
    np.testing.assert_array_equal(again.means()[1][:, 0], [0.5, np.nan, 1.0])


def test_rows_of_an_earlier_part_without_a_report_are_not_called_untrained(make_arguments: Make, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {**LORA, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    finetune(make_arguments(rows_file, **common, max_steps=2, row_report="off"))
    for steps, said in ((4, 1), (6, 0)):  # the second time, the checkpoint holds losses, but not of all steps
        capsys.readouterr()
        arguments = make_arguments(rows_file, **common, max_steps=steps)
        finetune(arguments)
        assert capsys.readouterr().out.count("holds no losses of these rows: the row report begins here") == said
        assert "not_trained" not in table(arguments["output_dir"])
        assert "not_trained" not in json.loads((Path(arguments["output_dir"]) / "row_report.json").read_text())["flags"]


def test_a_loss_that_is_not_finite_is_said_and_fillers_do_not_count() -> None:
    losses = RowLosses(2, "")
    losses.add(3, torch.tensor([[float("nan"), 1.0, 7.0], [1.0, 2.0, 0.0]]), (0, 1, ~1))
    epochs, means = losses.means()
    assert epochs == [3]
    np.testing.assert_array_equal(means[:, 0], [np.inf, 0.5])
    _, flags = judged(means, excesses(means[:, 0], np.zeros(2), np.zeros(2), np.ones(2))[:, None])
    assert flags["not_finite"].tolist() == [True, False]
    assert not flags["high_loss"].any()


# --- images ---


def test_the_gap_is_what_blank_images_add(make_arguments: Make, rows_file: Path) -> None:
    """Against Hugging Face's forward with pixel values of zero: the mean colour."""
    arguments = make_arguments(rows_file, max_steps=6, row_report="images", row_report_images=10)
    finetune(arguments)
    found = table(arguments["output_dir"])
    measured = [number for number, gap in enumerate(found["image_gap"]) if gap is not None]
    assert len(measured) == 10
    assert all(found["num_images"][number] for number in measured)
    model, processing = (
        LlavaForConditionalGeneration.from_pretrained(arguments["output_dir"], dtype=torch.float32).eval(),
        load_processing(arguments["output_dir"]),
    )
    rows = read(arguments)
    for number in measured:
        batch = Collator(processing.process_images, processing.config.image_token_id).pack([(0, rows[number])])
        assert batch.pixel_values is not None
        own, blank = (
            F.cross_entropy(
                model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), pixel_values=pixels).logits[0][batch.rows[batch.row_index]],
                batch.targets,
            ).item()
            for pixels in (batch.pixel_values[batch.image_index], torch.zeros_like(batch.pixel_values[batch.image_index]))
        )
        assert found["image_gap"][number] == pytest.approx(blank - own, rel=1e-3, abs=1e-4)
        assert found["images_not_needed"][number] == (blank < own * 1.05)


# --- flags ---


def falling_losses(count: int, epochs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Losses that fall over the run, of short and long answers in two files, with the noise that a mean over tokens has; see `excesses`."""
    random = np.random.default_rng(seed)
    files, tokens = np.repeat([0, 1], count // 2), random.choice([2, 5, 40], count)
    steps = np.stack([random.permutation(count) // 8 for _ in range(epochs)], 1)
    progress = (steps * 8 / count + np.arange(epochs)) / epochs
    level = np.where(files == 0, 1.0, 2.0)[:, None] * np.exp(-2.5 * progress)
    return level * np.exp(random.normal(0, 1 / np.sqrt(tokens))[:, None] + random.normal(0, 0.1, (count, epochs))), steps, files, tokens


def scores_of(losses: np.ndarray, steps: np.ndarray, files: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.stack([excesses(losses[:, i], steps[:, i], files, tokens) for i in range(losses.shape[1])], 1)


@pytest.mark.parametrize("epochs", [1, 3])
def test_planted_mislabels_are_found_and_few_others(epochs: int) -> None:
    losses, *about = falling_losses(4000, epochs)
    planted = np.random.default_rng(1).choice(4000, 80, replace=False)
    losses[planted] = np.random.default_rng(2).uniform(4, 7, (80, epochs))  # a wrong answer stays as unlikely as it was
    _, flags = judged(losses, scores_of(losses, *about))
    raised = np.flatnonzero(flags["likely_mislabel" if epochs > 1 else "high_loss"])
    right = len(set(raised) & set(planted))
    assert right / len(planted) > (0.6 if epochs == 1 else 0.95)  # early in the first epoch a right answer is as unlikely
    assert right / len(raised) > 0.95


SOUNDS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "pig": "oink", "owl": "hoot"}


@pytest.mark.slow
def test_swapped_answers_of_a_real_run_are_found(make_arguments: Make, tmp_path: Path) -> None:
    randomness = random.Random(0)
    rows = []
    for number in range(480):
        animal = randomness.choice(list(SOUNDS))
        turns = [{"from": "human", "value": f"Question {number}: what does the {animal} say?"}, {"from": "gpt", "value": SOUNDS[animal]}]
        rows.append({"conversations": turns})
    planted = set(randomness.sample(range(480), 24))
    for number in planted:
        answer = rows[number]["conversations"][1]
        answer["value"] = randomness.choice([sound for sound in SOUNDS.values() if sound != answer["value"]])
    path = write_json(tmp_path / "rows.json", rows)
    arguments = make_arguments(path, max_steps=-1, num_train_epochs=4, per_device_train_batch_size=16, logging_steps=40, adam_beta2=0.95)
    finetune(arguments)
    found = table(arguments["output_dir"])
    raised = {index for index, flag in zip(found["index"], found["likely_mislabel"], strict=True) if flag}
    assert len(raised & planted) / len(planted) > 0.8
    assert len(raised & planted) / len(raised) > 0.8
    assert set(listed(arguments["output_dir"])) == raised


def test_hardly_a_flag_without_a_reason() -> None:
    losses, *about = falling_losses(4000, 3, seed=5)
    _, flags = judged(losses, scores_of(losses, *about))
    counts = {name: int(raised.sum()) for name, raised in flags.items()}
    assert (counts["high_loss"], counts["not_finite"], counts["not_trained"]) == (0, 0, 0)
    assert max(counts.values()) <= 4, counts  # one in a thousand


def test_a_row_that_was_learned_and_lost_is_forgotten() -> None:
    losses, *about = falling_losses(2000, 4, seed=3)
    losses[7] = [1.0, 0.01, 0.01, 6.0]
    losses[8] = np.nan
    _, flags = judged(losses, scores_of(losses, *about))
    assert flags["forgotten"][7]
    assert flags["not_trained"].tolist() == [number == 8 for number in range(2000)]


# --- duplicates ---


def test_duplicates_and_conflicts_by_what_images_show_not_by_their_names(make_arguments: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data", 8)
    rows = json.loads(path.read_text())
    pictures = path.parent / "pictures"
    shutil.copy(pictures / "3.png", pictures / "copy.png")
    other = bytearray((pictures / "3.png").read_bytes())
    other[-20] ^= 1  # as many bytes, another picture; the end mark stays
    (pictures / "other.png").write_bytes(other)

    def row(image: str, answer: str) -> dict[str, Any]:
        return {"image": image, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]}

    rows += [row("pictures/3.png", "a"), row("pictures/copy.png", "a"), row("pictures/other.png", "a"), row("pictures/3.png", "b"), rows[0]]
    path.write_text(json.dumps(rows))
    found = likeness(read(make_arguments(path)))
    assert {number: int(other) for number, other in enumerate(found.duplicate_of) if other >= 0} == {9: 8, 12: 0}
    assert {number: int(other) for number, other in enumerate(found.conflicts_with) if other >= 0} == {8: 11, 9: 11, 11: 8}


# --- lists ---


def listed(output_dir: str | Path) -> list[int]:
    return [row["index"] for file in json.loads((Path(output_dir) / "row_drop.json").read_text())["files"] for row in file["rows"]]


def test_the_next_run_leaves_out_what_the_list_names(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    rows = json.loads(rows_file.read_text())
    for number, row in enumerate(rows):
        row["conversations"][0]["value"] += f" ({number})"
    rows_file.write_text(json.dumps([*rows, rows[5], rows[9]]))
    first = make_arguments(rows_file, output_dir=str(tmp_path / "first"))
    finetune(first)
    assert listed(first["output_dir"]) == [24, 25]
    drop = str(tmp_path / "first" / "row_drop.json")
    dataset = {"train": [{"data_files": str(rows_file), "exclude_rows": drop}]}
    second = make_arguments(rows_file, dataset=dataset, **EPOCHS, save_strategy="steps", save_steps=4)  # bad_rows: error: what the user leaves out is not bad
    finetune(second)
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert {name: ledger[name] for name in ("rows", "trained", "shortened", "skipped")} == {"rows": 26, "trained": 24, "shortened": 0, "skipped": 2}
    entries = [(entry["index"], entry["status"], entry["reason"], entry["detail"]) for entry in ledger["entries"]]
    assert entries == [(i, "skipped", "excluded_by_list", f"duplicate of {rows_file}: row {j}") for i, j in ((24, 5), (25, 9))]
    assert table(tmp_path / "run")["index"] == list(range(24))
    assert listed(tmp_path / "run") == [24, 25], "the next list replaces this one"
    value = json.loads(Path(drop).read_text())
    del value["files"][0]["rows"][0]
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(value))
    dataset = {"train": [{"data_files": str(rows_file), "exclude_rows": str(edited)}]}
    with pytest.raises(InputError, match=r"the rows of dataset.train are not those that the run began with"):
        finetune({**second, "dataset": dataset, "max_steps": 20, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")})


def write_json(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_lists_of_other_data_are_refused_by_name(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    (source,) = read_entries([{"data_files": str(rows_file)}], 0)
    kind = {"format": "interlace rows to exclude"}
    whole = {**kind, "files": [{"file": "elsewhere/rows.json", "fingerprint": source.fingerprint, "rows": [{"index": 3, "reason": "mine"}]}]}
    (taken,) = read_entries([{"data_files": str(rows_file), "exclude_rows": str(write_json(tmp_path / "list.json", whole))}], 0)
    assert taken.excluded == {3: "mine"}  # the same file, wherever it lies
    bad = {
        "says nothing about .*rows.json; it is about other.json": {**kind, "files": [{**whole["files"][0], "file": "other.json"}]},
        "was made for another rows.json": {**kind, "files": [{**whole["files"][0], "fingerprint": "0" * 64}]},
        "no valid JSON": "{",
        "expected ..format": [1, 2],
        "got ..index.: -1": {**kind, "files": [{**whole["files"][0], "rows": [{"index": -1}]}]},
        "expected .file, fingerprint, rows": {**kind, "files": ["rows.json"]},
    }
    for number, (expected, value) in enumerate(bad.items()):
        path = write_json(tmp_path / f"{number}.json", value)
        arguments = make_arguments(rows_file, dataset={"train": [{"data_files": str(rows_file), "exclude_rows": str(path)}]})
        with pytest.raises(InputError, match=expected) as found:
            finetune(arguments)
        assert str(path) in str(found.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"gone.json: cannot be read"):
        read_entries([{"data_files": str(rows_file), "exclude_rows": str(tmp_path / "gone.json")}], 0)


def test_files_of_one_name_and_content_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / folder, 4) for folder in ("a", "b")]
    files = [file.replace(file.with_name("data.json")) for file in files]
    first, second = read_entries([{"data_files": [str(file) for file in files]}], 0)
    assert first.fingerprint == second.fingerprint
    write_list(tmp_path / "list.json", {first.file: first.fingerprint, second.file: second.fingerprint}, {second.file: [Excluded(1, "a copy")]})
    taken = read_entries([{"data_files": [str(file) for file in files], "exclude_rows": str(tmp_path / "list.json")}], 0)
    assert [source.excluded for source in taken] == [{}, {1: "a copy"}]
    moved = shutil.copytree(tmp_path / "a", tmp_path / "c") / "data.json"
    with pytest.raises(InputError, match=r"c/data.json has the name and content of .*a/data.json, .*b/data.json"):
        read_entries([{"data_files": str(moved), "exclude_rows": str(tmp_path / "list.json")}], 0)


def test_a_run_never_writes_over_the_list_that_it_takes(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    finetune(make_arguments(rows_file))
    dataset = {"train": [{"data_files": str(rows_file), "exclude_rows": str(tmp_path / "run" / "row_drop.json")}]}
    with pytest.raises(InputError, match="is what this run starts from"):
        finetune(make_arguments(rows_file, dataset=dataset, overwrite_output_dir=True))
    assert (tmp_path / "run" / "row_drop.json").is_file()


def test_without_a_row_report_nothing_is_kept(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    finetune(make_arguments(rows_file, row_report="off", save_strategy="steps", save_steps=2))
    assert not list((tmp_path / "run").rglob("row_*"))
    assert (tmp_path / "run" / "report.html").is_file()
