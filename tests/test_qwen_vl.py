"""What is Qwen-VL's own: images in their own shape, positions in time, rows and columns, towers that see whole images."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from interlace.data.batch import Segment
from interlace.data.positions import grid_positions
from interlace.data.sample import BadRow
from interlace.model.costs import BatchShape, shape_of, step_costs
from interlace.model.forward import model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.losses import supervised_loss
from interlace.model.qwen_vl import QwenImages
from interlace.model.tuning import tune
from interlace.training.rehearsal import rehearse
from tests.conftest import ROOT, fast_first
from tests.small_families import SIZES, collate, make_model, make_pictures, make_row
from tests.test_more_families import EVERYTHING, run_arguments

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROCESSORS = {  # as the published models come
    "Qwen2.5-VL": {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12_845_056},
    "Qwen3-VL": {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    "small": {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 256},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", PROCESSORS)
@example(width=1, height=1)
@example(width=200, height=1)
@example(width=13, height=2500)
@example(width=4000, height=3000)
@example(width=28, height=28)
@settings(max_examples=80, deadline=None)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_tokens_of_any_size_are_those_of_the_published_processors(name: str, width: int, height: int) -> None:
    processor = Qwen2VLImageProcessorPil(merge_size=2, **PROCESSORS[name])  # type: ignore[arg-type]
    images = QwenImages(Qwen2_5_VLConfig(), processor, None)  # type: ignore[arg-type]
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(BadRow, match=f"{width} x {height}"):
            images.row_tokens([(width, height)])
        return
    (tokens,) = images.row_tokens([(width, height)])
    assert tokens == processor.get_number_of_image_patches(height, width) // 4 + 2
    rows, columns = images.grid((height, width))
    assert tokens == rows * columns + 2 == len(images.ids(tokens))
    if rows * columns < 300:
        made = processor(images=[PIL.Image.new("RGB", (width, height))], return_tensors="np")
        assert made["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 6), st.integers(1, 6))), min_size=1, max_size=8))
def test_positions_are_those_of_the_library(parts: list[Any]) -> None:
    """Texts of some tokens and images of some rows and columns in any order, no two images without text between them."""
    parts = [part for pair in zip(parts, [1] * len(parts), strict=True) for part in pair]
    kinds = np.concatenate([np.zeros(part, bool) if isinstance(part, int) else np.ones(part[0] * part[1], bool) for part in parts])
    grids = [part for part in parts if isinstance(part, tuple)]
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config={"num_hidden_layers": 1, "hidden_size": 64}, vision_config={"depth": 1, "out_hidden_size": 64}))
    thw = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]) if grids else None
    expected, delta = model.get_rope_index(torch.zeros(1, len(kinds), dtype=torch.long), torch.from_numpy(kinds[None].astype(np.int32)), thw)
    found, end = grid_positions(kinds, grids, 0)
    assert np.array_equal(found, expected[:, 0].numpy())
    assert end == len(kinds) + delta.item()
    assert np.array_equal(grid_positions(kinds, grids, 7)[0], found + 7)


def test_leaves_go_on_where_their_trunk_ends(folder: Path, pictures: Path) -> None:
    processing = load_processing(str(folder))
    rows = [make_row(processing, pictures, number, ("wide", "tall")) for number in range(2)]
    alone = [collate(folder, [row]).position_ids for row in rows]
    together = collate(folder, rows, share_prefix=True)
    trunk, *leaves = together.segments
    for leaf, positions in zip(leaves, alone, strict=True):
        path = torch.cat([together.position_ids[..., trunk.start : trunk.end], together.position_ids[..., leaf.start : leaf.end]], dim=-1)
        assert torch.equal(path, positions)
    assert not torch.equal(alone[0][0], alone[0][1])


def test_an_image_that_the_processor_refuses_makes_a_bad_row(folder: Path) -> None:
    with pytest.raises(BadRow, match=r"1000 x 4 pixels.*200"):
        load_processing(str(folder)).row_image_tokens([(50, 50), (1000, 4)])


@pytest.mark.parametrize("parts", [("projector", "language_model"), EVERYTHING, ("vision_tower",)], ids="-".join)
def test_flops_are_what_torchs_counter_counts(folder: Path, pictures: Path, parts: tuple[str, ...]) -> None:
    """Within 2%; the counter sees the whole square of the one segment."""
    batch = collate(folder, [make_row(load_processing(str(folder)), pictures, 0, ("large", "square"))])
    tuned = tune(load_model(str(folder), torch.float32), parts, None, None)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        supervised_loss(tuned.packed(**model_inputs(batch, tuned.tower)).log_probs, batch.weights, 1.0).backward()
    shape = shape_of(batch)
    tiles = [count - 2 for count in load_processing(str(folder)).row_image_tokens([SIZES["large"], SIZES["square"]])]
    assert shape == BatchShape(batch.num_tokens, batch.num_tokens * (batch.num_tokens + 1) / 2, sum(tiles), len(batch.targets), 0, sum(n**2 for n in tiles))
    square = BatchShape(shape.num_tokens, shape.num_tokens**2, shape.num_images, shape.num_rows, 0, shape.num_tile_pairs)
    assert step_costs(tuned).total(square).required == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_step_is_rehearsed_without_memory(folder: Path) -> None:
    """Twice the tiles, about twice what a tower that learns keeps of them."""

    def peak(tiles: int) -> int:
        tuned = tune(load_model(str(folder), torch.float32), ("vision_tower",), None, None)
        return sum(rehearse(tuned, [Segment(0, 500)], tiles, 10, torch.float32).peak().values())

    first, second, third = peak(100), peak(200), peak(300)
    assert second - first == pytest.approx(third - second, rel=0.2)
    assert second > first


def test_older_versions_find_the_sections_of_positions_where_they_look(folder: Path) -> None:
    """transformers 4 reads rope_scaling, and stops without it; transformers 5 reads the same from both."""
    settings = json.loads((folder / "config.json").read_text())
    text = settings["text_config"] if AutoConfig.from_pretrained(folder).model_type == "qwen3_vl" else settings
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    assert AutoConfig.from_pretrained(folder).text_config.rope_parameters == text["rope_parameters"]


@pytest.mark.parametrize("script", fast_first(["plan_run", "preview_data"], 1))
def test_the_other_scripts_know_the_family(folder: Path, pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], script: str) -> None:
    data = run_arguments(folder, pictures, tmp_path, make_arguments)["dataset"]
    config = {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "run"), "dataset": data, "lora": True, "use_cpu": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outputs = {"preview_data": ["--output", str(tmp_path / "page.html"), "--json", str(tmp_path / "rows.jsonl")], "plan_run": []}
    command = [sys.executable, str(ROOT / "train" / f"{script}.py"), str(tmp_path / "config.json"), *outputs[script]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if script == "preview_data":
        lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        assert all(len(line["input_ids"]) == line["length"] for line in lines)
        processing = load_processing(str(folder))
        assert lines[1]["input_ids"].count(processing.config.image_token_id) == processing.row_image_tokens([SIZES["wide"]])[0] - 2


@pytest.mark.slow
def test_sharded_processes_train_as_one_does(pictures: Path, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    """Whose tower learns, with its merger called on its own and text-only micro-batches among the others: FSDP2 hangs where ranks call other modules."""
    folder = make_model("qwen3_vl", tmp_path)
    losses = []
    for processes in (1, 2):
        data = run_arguments(folder, pictures, tmp_path, make_arguments)["dataset"]
        config = {"model_name_or_path": str(folder), "output_dir": str(tmp_path / f"run{processes}"), "dataset": data, "use_cpu": True, "max_steps": 3}
        config |= {"tunable_parts": ",".join(EVERYTHING), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2 // processes}
        config |= {"logging_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 0, "save_strategy": "no", "max_length": 2000}
        (tmp_path / "argument.json").write_text(json.dumps(config | ({"fsdp": True} if processes > 1 else {})))
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if processes > 1 else []
        command = [sys.executable, *launcher, str(ROOT / "train" / "supervised_finetune.py"), str(tmp_path / "argument.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        history = json.loads((tmp_path / f"run{processes}" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
