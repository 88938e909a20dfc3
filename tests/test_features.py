"""The feature cache: no tower call from the second epoch on, the losses of a run without it, and every way in which it can fail."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from interlace.data.batch import Collator, NumberedRows
from interlace.errors import InputError
from interlace.model import features
from interlace.model.features import FeatureCache, FeatureStore, make_room, tower_hash
from interlace.model.forward import FrozenTower, model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.tuning import tune
from interlace.training import caching
from interlace.training.supervised import finetune
from tests.conftest import fast_first, write_rows
from tests.test_families import make_model
from tests.test_sharing import awkward_rows, read_rows
from tests.test_training import history, losses

Make = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of the machine's memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(caching, "_memory_folder", lambda: folder)
    yield folder


@pytest.fixture
def run(make_arguments: Make, tmp_path: Path) -> Callable[..., tuple[list[float], list[float]]]:
    """Trains for three epochs of 6 steps; losses, and images that the tower saw in each step."""
    data = write_rows(tmp_path / "data", 24)
    settings = {"max_steps": -1, "num_train_epochs": 3, "dataloader_num_workers": 0, "lora": True, "cache_dir": str(tmp_path / "cache")}
    runs = iter(range(100))

    def train(**changes: Any) -> tuple[list[float], list[float]]:
        arguments = make_arguments(data, **{**settings, "output_dir": str(tmp_path / f"run_{next(runs)}"), **changes})
        finetune(arguments)
        return losses(arguments["output_dir"]), [entry["images_encoded"] for entry in history(arguments["output_dir"]) if "loss" in entry]

    return train


@pytest.mark.parametrize(("kind", "workers"), fast_first([("memory", 0), ("disk", 2), ("memory", 2), ("disk", 0)], 2))
def test_from_the_second_epoch_on_the_tower_sees_nothing_and_losses_are_the_same(run: Any, memory: Path, kind: str, workers: int) -> None:
    expected, encoded = run(dataloader_num_workers=workers)
    found, seen = run(feature_cache=kind, dataloader_num_workers=workers)
    assert found == pytest.approx(expected, rel=1e-6)
    per_epoch = len(seen) // 3
    assert sum(seen[:per_epoch]) >= 8 and sum(seen[per_epoch:]) == 0 < sum(encoded[per_epoch:])
    assert not list(memory.iterdir())  # given back


def test_a_later_run_finds_what_an_earlier_one_kept_on_disk(run: Any) -> None:
    first, seen = run(feature_cache="disk")
    again, seen_again = run(feature_cache="disk")
    assert sum(seen) > 0 == sum(seen_again)
    assert again == pytest.approx(first, rel=1e-6)


def test_another_processing_or_other_pixels_are_never_taken_for_these(run: Any, tmp_path: Path) -> None:
    run(feature_cache="disk")
    padded, seen = run(feature_cache="disk", image_aspect_ratio="pad")
    assert sum(seen) > 0
    assert padded == pytest.approx(run(image_aspect_ratio="pad")[0], rel=1e-6)
    for path in (tmp_path / "data" / "pictures").iterdir():
        PIL.Image.fromarray(np.random.RandomState(99).randint(0, 255, (20, 24, 3), np.uint8)).save(path)
    changed, seen = run(feature_cache="disk")
    assert sum(seen) > 0
    assert changed == pytest.approx(run()[0], rel=1e-6)


def test_a_hash_names_one_tower_and_one_processing(tiny_dir: Path) -> None:
    tower = FrozenTower(load_model(str(tiny_dir), torch.float32)).module
    before = tower_hash(tower, "a")
    assert before == tower_hash(tower, "a") != tower_hash(tower, "b")
    next(tower.parameters()).data.view(-1)[0] += 1
    assert tower_hash(tower, "a") != before


@pytest.mark.parametrize("damage", [b"", b"nonsense", None], ids=["emptied", "overwritten", "one bit"])
def test_a_damaged_file_is_made_anew(run: Any, tmp_path: Path, damage: bytes | None) -> None:
    expected, _ = run(feature_cache="disk")
    files = sorted((tmp_path / "cache" / "features").rglob("*.safetensors"))
    whole = [load_file(path)["features"].clone() for path in files]  # not mapped: the files are about to change
    for path, content in zip(files, [path.read_bytes() for path in files], strict=True):
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage is None else damage)
    found, seen = run(feature_cache="disk")
    assert sum(seen) >= len(files)
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(load_file(path)["features"], features) for path, features in zip(files, whole, strict=True))


def test_a_disk_that_refuses_is_warned_of_once_and_trained_without(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    expected, encoded = run()
    monkeypatch.setattr(FeatureStore, "write", refuse)
    found, seen = run(feature_cache="disk")
    assert (found, seen) == (expected, encoded)
    assert capsys.readouterr().out.count("warning: the feature cache cannot be written: [Errno 28] No space left on device; training goes on") == 1


def test_it_never_grows_beyond_its_cap(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, _ = run()
    found, seen = run(feature_cache="disk", feature_cache_gib=1.5e-6)  # 1,610 bytes
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache" / "features").rglob("*.safetensors")) <= 1_610
    assert sum(seen[-len(seen) // 3 :]) > 0
    assert capsys.readouterr().out.count("the feature cache is full") == 1


def test_older_towers_make_room(tmp_path: Path) -> None:
    for time, name in enumerate(("old", "newer", "mine")):
        (tmp_path / name).mkdir()
        FeatureStore(tmp_path / name).write("ab", torch.zeros(1, 10, 10), (1, 1))
        os.utime(tmp_path / name, (time, time))
    used = (tmp_path / "old" / "ab" / "ab.safetensors").stat().st_size
    assert make_room(tmp_path / "mine", 4 * used) == used
    assert make_room(tmp_path / "mine", 3 * used - 1) == used - 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "memory") == ["mine", "newer"]


def test_what_a_killed_run_left_in_memory_is_removed_by_the_next(run: Any, memory: Path) -> None:
    (memory / "interlace-features-999999999" / "tower").mkdir(parents=True)
    run(feature_cache="memory", num_train_epochs=1)
    assert not list(memory.iterdir())


def test_too_much_that_waits_is_left_out_and_the_next_epoch_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_WAITING_BYTES", 10 * 16)
    cache = FeatureCache(FeatureStore(tmp_path), 1 << 20, print)
    keys, tensor = [f"{i:04}" for i in range(600)], torch.zeros(1, 2, 2)
    cache.keep(keys, [tensor] * 600, [(1, 1)] * 600)
    cache.flush()
    kept = sum(cache.store.find(key) is not None for key in keys)
    assert kept == 600 - cache.num_dropped >= 10
    cache.keep(["last"], [tensor], [(1, 1)])
    cache.flush()
    assert cache.store.find("last") is not None


def test_a_device_that_fails_ends_the_writing_and_not_the_run(tmp_path: Path) -> None:
    class Broken:
        nbytes = 16

        def detach(self) -> "Broken":
            return self

        def to(self, device: str) -> torch.Tensor:
            raise RuntimeError("CUDA error")

    said: list[str] = []
    cache = FeatureCache(FeatureStore(tmp_path), 1 << 20, said.append)
    cache.keep(["a", "b"], [Broken(), Broken()], [(1, 1)] * 2)  # type: ignore[list-item]
    cache.flush()
    assert said == ["warning: the feature cache cannot be written: CUDA error; training goes on without what it lacks"]


def test_files_are_for_all_and_what_may_not_be_read_is_left_alone(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write("ab", torch.zeros(1, 2, 2), (1, 1))
    assert store.path("ab").stat().st_mode & 0o777 == 0o644
    store.path("cd").mkdir(parents=True)  # as unreadable as a file of somebody else's
    assert store.find("cd") is None and store.path("cd").exists()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_images_that_are_cut_into_tiles_come_back_whole(tmp_path: Path, family: str) -> None:
    """A batch with images that are known and images that are not."""
    (tmp_path / "model").mkdir()
    model_dir = make_model(family, tmp_path / "model")
    rows, processing = read_rows(tmp_path, model_dir, awkward_rows(tmp_path)), load_processing(str(model_dir))
    tuned = tune(load_model(str(model_dir), torch.float32), ["projector", "language_model"], None, None)
    assert tuned.tower is not None
    (tmp_path / "features").mkdir()
    store = FeatureStore(tmp_path / "features")
    tuned.tower.cache = FeatureCache(store, 1 << 30, print)
    collate = Collator(processing.process_images, processing.config.image_token_id, features=store)
    numbered = NumberedRows(rows)
    with torch.no_grad():
        first = model_inputs(collate.pack([numbered[0]]), tuned.tower)["image_features"]
        tuned.tower.cache.flush()
        some = collate.pack([numbered[6], numbered[4], numbered[5]])  # a, b and c: c is new
        assert some.is_cached == (True, True, False) and some.pixel_values is not None
        plain = Collator(processing.process_images, processing.config.image_token_id).pack([numbered[6], numbered[4], numbered[5]])
        found, expected = (tuned.packed(**model_inputs(batch, tuned.tower)).log_probs for batch in (some, plain))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        known = collate.pack([numbered[0]])
        assert known.pixel_values is None and torch.equal(model_inputs(known, tuned.tower)["image_features"], first)


# --- when it is on ---


def test_a_tower_that_learns_has_no_cache(make_arguments: Make, rows_file: Path) -> None:
    from interlace.arguments import SCHEMA_PATH, resolve

    config = {"model_name_or_path": "demo", "output_dir": "x", "dataset": {"train": [{"data_files": "demo"}]}}
    config |= {"feature_cache": "disk", "tunable_parts": "vision_tower,language_model"}
    _, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "test"))
    assert any("feature_cache: features change with every step while the vision tower learns" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "feature cache: on, in memory"),
        ({"num_train_epochs": 1}, "feature cache: off: every row is seen once"),
        ({"tunable_parts": "vision_tower,language_model"}, "feature cache: off: the vision tower learns"),
        ({"feature_cache_gib": 1e-6}, "feature cache: off: 8 images would need 0.0 GiB, and 0.0 GiB may be used"),
    ],
    ids=["pays", "one epoch", "tower learns", "no room"],
)
def test_auto_takes_it_where_it_pays(run: Any, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str) -> None:
    _, seen = run(feature_cache="auto", **changes)
    assert said in capsys.readouterr().out
    assert (sum(seen[len(seen) // 3 :]) == 0) == (not changes)


def test_a_folder_that_cannot_be_made_is_said(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").write_text("a file")
    with pytest.raises(InputError, match=r"feature_cache: disk: .*features.*choose another cache_dir, or feature_cache: off"):
        finetune(make_arguments(rows_file, lora=True, feature_cache="disk", cache_dir=str(tmp_path / "cache")))
    shutil.rmtree(tmp_path / "cache")
