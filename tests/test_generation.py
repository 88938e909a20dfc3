"""Answers in batches: shared beginnings, resumption, several processes; tiny models, float32 on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.data.reading import Outcome
from interlace.data.sample import Image, Text, Turn
from interlace.errors import InputError
from interlace.inference.evaluation import batches_of, predict, read_questions
from interlace.inference.generation import Generator, Prompt, load_generator
from interlace.inference.partial import PartialPredictions, fingerprint_of
from interlace.model.families import family_of
from interlace.ranks import Ranks
from tests.conftest import DEMO_MODEL, ROOT, fast_first, write_rows
from tests.small_families import SMALL, make_model, make_pictures
from tests.test_families import FAMILIES
from tests.test_families import make_model as make_tiled_model

WORDS = ["Which?", "Read all images in order.", "What digit is in image B, and why is it there?", "Is it?"]


def questions_about_one_scene(tmp_path: Path, count: int) -> Path:
    """Rows of two scenes of three images: `count` questions about the first, one about the second, and one without an image."""
    write_rows(tmp_path, 1)
    rows = []
    for number, names in enumerate([(0, 1, 2)] * count + [(3, 4)] + [()]):
        start = "".join(f"Image {letter}: <image>\n" for letter, _ in zip("ABC", names, strict=False))
        turns = [{"from": "human", "value": start + WORDS[number % len(WORDS)]}, {"from": "gpt", "value": "digit 3"}]
        rows.append({"id": str(number), "image": [f"pictures/{name}.png" for name in names], "conversations": turns})
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps(rows))
    return path


def outcomes_of(generator: Generator, path: Path) -> list[Outcome]:
    return read_questions({"data_files": str(path)}, generator)


def count_images(generator: Generator) -> list[int]:
    """Appends the number of pictures of every call of the tower."""
    model: Any = generator.model
    tower, counts = getattr(model.model, family_of(model.config).vision_tower), []
    tower.register_forward_hook(lambda module, args, kwargs, output: counts.append(len(kwargs.get("pixel_values", args[0] if args else ()))), with_kwargs=True)
    return counts


def test_what_questions_begin_with_is_computed_once(tmp_path: Path) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, questions_about_one_scene(tmp_path, 5))
    images, tokens = count_images(generator), []
    model: Any = generator.model
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()) if kwargs["inputs_embeds"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    found = predict(generator, outcomes, 5, 6)
    assert sum(images) == 3 + 2  # each scene's images once
    rests = [outcome.row.length - outcome.row.prefix_length for outcome in outcomes[:5]]  # type: ignore[union-attr]
    assert sum(tokens) < outcomes[0].row.prefix_length + 5 * max(rests) + 2 * outcomes[5].row.length  # type: ignore[union-attr]
    alone = load_generator("demo")
    assert found == predict(alone, outcomes, 1, 6)


MODELS = [*SMALL, *FAMILIES]


@pytest.mark.parametrize("family", fast_first(MODELS, 2))
def test_shared_or_alone_the_answers_are_the_same_in_every_family(tmp_path: Path, family: str) -> None:
    """Also where more images come behind the trunk, and where a model cannot share."""
    folder = (make_tiled_model if family in FAMILIES else make_model)(family, tmp_path)
    make_pictures(tmp_path)
    generator = load_generator(str(folder))
    names = ("wide", "tall", "square")
    prompts = []
    for number, more in enumerate(["", "square", ""]):
        parts = [part for name in (*names, *([more] if more else [])) for part in (Text("look "), Image(str(tmp_path / f"{name}.png")))]
        prompts.append(generator.prompt([Turn("user", (*parts, Text(WORDS[number])))]))
    trunk = next(i for i, ids in enumerate(zip(*(prompt.input_ids for prompt in prompts), strict=False)) if len(set(ids)) > 1)
    shared = [replace(prompt, trunk_length=trunk, trunk_images=3) for prompt in prompts]
    found = generator.answer(shared, 6)
    assert found == [generator.answer([prompt], 6)[0] for prompt in prompts]
    assert found == generator.answer(prompts, 6)
    assert any(found)


def test_rows_that_share_stand_together_and_the_longest_come_first(tmp_path: Path) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, questions_about_one_scene(tmp_path, 5))
    batches = batches_of(outcomes, 4)
    assert sorted(number for batch in batches for number in batch) == list(range(7))
    lengths = [[outcomes[number].row.length for number in batch] for batch in batches]  # type: ignore[union-attr]
    assert [max(batch) for batch in lengths] == sorted((batch[0] for batch in lengths), reverse=True)
    assert sorted(len(batch) for batch in batches) == [1, 2, 4]  # the scene's five in two, and the others in one


class Ended(Exception):
    pass


def test_an_evaluation_that_was_ended_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, write_rows(tmp_path, 12))
    expected = predict(generator, outcomes, 3, 6)
    fingerprint, answer, calls = fingerprint_of("demo", outcomes, {}), Generator.answer, []

    def limited(self: Generator, prompts: list[Prompt], *args: Any) -> list[str]:
        if len(calls) == 2:
            raise Ended
        calls.append(len(prompts))
        return answer(self, prompts, *args)

    monkeypatch.setattr(Generator, "answer", limited)
    with pytest.raises(Ended):
        predict(generator, outcomes, 3, 6, PartialPredictions(tmp_path / "out", fingerprint, 0))
    (kept,) = (tmp_path / "out").iterdir()
    with kept.open("a") as file:
        file.write('\n[11, "half a li')  # as a run that is killed leaves it
    monkeypatch.setattr(Generator, "answer", lambda self, prompts, *args: (calls.append(len(prompts)), answer(self, prompts, *args))[1])
    calls.clear()
    partial = PartialPredictions(tmp_path / "out", fingerprint, 0)
    assert predict(generator, outcomes, 3, 6, partial) == expected
    assert sum(calls) == 12 - 2 * 3
    assert len(partial.read()) == 12
    assert PartialPredictions(tmp_path / "out", fingerprint_of("demo", outcomes[:-1], {}), 0).read() == {}
    assert PartialPredictions(tmp_path / "out", fingerprint_of("demo", outcomes, {"max_new_tokens": 7}), 0).read() == {}
    partial.remove()
    assert not list((tmp_path / "out").iterdir())


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, write_rows(tmp_path, 8))
    expected, answer, sizes = predict(generator, outcomes, 8, 4), Generator.answer, []

    def small(self: Generator, prompts: list[Prompt], *args: Any) -> list[str]:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return answer(self, prompts, *args)

    monkeypatch.setattr(Generator, "answer", small)
    assert predict(generator, outcomes, 8, 4) == expected
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_rows_share_only_where_that_pays(tmp_path: Path) -> None:
    """Two short questions about one small image had better stand in a full batch; about a long scene they share it."""
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, questions_about_one_scene(tmp_path, 2))
    assert [len(batch) for batch in batches_of(outcomes, 32)] == [4]
    long = [replace(outcome, row=replace(outcome.row, image_tokens=tuple(700 for _ in outcome.row.images))) for outcome in outcomes]  # type: ignore[union-attr,type-var]
    assert sorted(len(batch) for batch in batches_of(long, 32)) == [2, 2]


def test_what_comes_with_a_model_changes_no_answer(tmp_path: Path) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, write_rows(tmp_path, 5))
    expected = predict(generator, outcomes, 5, 6)
    model: Any = generator.model
    model.generation_config.repetition_penalty = 1e6
    model.generation_config.suppress_tokens = [generator.processing.tokenizer.convert_tokens_to_ids("1")]
    assert predict(generator, outcomes, 5, 6) == expected


def test_images_that_cannot_be_decoded_are_named_with_their_rows_once_the_others_are_answered(tmp_path: Path) -> None:
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, write_rows(tmp_path, 8))
    picture = Path(outcomes[1].row.images[0].path)  # type: ignore[union-attr]
    content = bytearray(picture.read_bytes())
    place = content.index(b"IDAT") + 20
    content[place : place + 8] = b"\0" * 8  # whole by header and end
    picture.write_bytes(content)
    broken = [outcome.record.index for outcome in outcomes if any(image.path == str(picture) for image in outcome.row.images)]  # type: ignore[union-attr]
    partial = PartialPredictions(tmp_path / "out", "x", 0)
    with pytest.raises(InputError) as caught:
        predict(generator, outcomes, 1, 4, partial)
    assert all(f"rows.json: row {index}: " in str(caught.value) for index in broken) and picture.name in str(caught.value)
    assert set(partial.read()) == set(range(8)) - set(broken)


def test_ranks_share_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank makes its own part, and with what the others found, all of them."""
    generator = load_generator("demo")
    outcomes = outcomes_of(generator, write_rows(tmp_path, 10))
    expected, answer, made = predict(generator, outcomes, 3, 4), Generator.answer, []
    monkeypatch.setattr(Generator, "answer", lambda self, prompts, *args: (made.append(len(prompts)), answer(self, prompts, *args))[1])
    found: dict[int, str] = {}
    for rank in range(2):
        ranks = Ranks()
        ranks.rank, ranks.world_size = rank, 2
        ranks.gather = lambda value, rank=rank: [value] if not value else (found.update(value), [found])[1]  # type: ignore[method-assign]
        if rank == 0:
            with pytest.raises(KeyError):  # the other rank's are not there yet
                predict(generator, outcomes, 3, 4, ranks=ranks)
        else:
            assert predict(generator, outcomes, 3, 4, ranks=ranks) == expected
    assert sum(made) == len(outcomes)


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    data = write_rows(tmp_path, 11)
    outputs = []
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for number, (launcher, more) in enumerate([([], []), (two, []), (two, ["--fsdp"])]):
        out = tmp_path / str(number)
        words = [
            "train/evaluate_model.py",
            "--model-path",
            DEMO_MODEL,
            "--data-files",
            data,
            "--max-new-tokens",
            "8",
            "--batch-size",
            "3",
            "--output-dir",
            out,
            *more,
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("overall") == 1
        outputs.append({path.name: path.read_text() for path in out.iterdir()})
    assert outputs[0] == outputs[1] == outputs[2]
    assert set(outputs[0]) == {"predictions.jsonl", "metrics.json", "evaluation.html"}
