"""The forecast's arithmetic, the search for a configuration that fits, and `plan_run.py` as a user runs it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.data.packing import Plan
from interlace.errors import InputError
from interlace.model.costs import BatchShape, step_costs
from interlace.model.loading import load_config
from interlace.training.fitting import Search, config_of, resolved
from interlace.training.forecast import (
    MicroShape,
    Sharding,
    Sizes,
    Speed,
    disk_of,
    fits,
    memory_of,
    micro_shapes,
    sizes_of,
)
from interlace.training.outline import empty_model
from interlace.training.plan_text import bins_of, duration, histogram, size
from interlace.training.planning import Columns
from interlace.training.probe import Timing, fit_speed
from interlace.training.rehearsal import Rehearsal
from interlace.training.supervised import finetune
from tests.conftest import DEMO_MODEL, write_rows
from tests.test_scripts import config_file, run

MIB = 2**20
ROWS = Columns(np.array([40, 60, 90, 90, 120] * 20), np.array([0, 1, 2, 2, 3] * 20), np.array([4, 6, 9, 20, 12] * 20))
SIZES = Sizes(replica=400, frozen=800, trainable=160, optimizer=320)
REHEARSAL = Rehearsal(np.array([(1000, 0, 0), (600, 300, 0), (300, 0, 160)]))


def test_without_company_nothing_is_shared() -> None:
    alone = memory_of(SIZES, [REHEARSAL], Sharding())
    assert (alone.weights, alone.gradients, alone.optimizer, alone.activations) == (1360, 0, 320, 1000)
    for stage in (1, 2, 3):
        assert memory_of(SIZES, [REHEARSAL], Sharding(1, stage)) == alone


def test_each_stage_of_zero_shares_one_thing_more() -> None:
    """By hand, for 4 devices and gradients that stay over several micro-batches; the frozen tower (400) and activations are never shared."""
    stages = [memory_of(SIZES, [REHEARSAL], Sharding(4, stage), accumulation=2) for stage in range(4)]
    assert [memory.weights for memory in stages] == [1360, 1360, 1360, 400 + (800 + 160) // 4]
    assert [memory.gradients for memory in stages] == [160 + 160, 160, 40, 40]  # DDP: gradients and its buckets
    assert [memory.optimizer for memory in stages] == [320, 80, 80, 80]
    assert {memory.activations for memory in stages} == {1000}
    offloaded = memory_of(SIZES, [REHEARSAL], Sharding(4, 3, True, True), accumulation=2)
    assert (offloaded.weights, offloaded.optimizer, offloaded.host) == (400, 0, 240 + 80)


def test_what_trains_is_float32_and_adam_keeps_two_numbers(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path) -> None:
    config = load_config(str(tiny_dir))
    for changes, frozen_bytes in (({}, 4), ({"bf16": True, "lora": True}, 2), ({"lora": True}, 4)):
        arguments = make_arguments(rows_file, **changes)
        tuned = empty_model(config, arguments)
        table = tuned.part_table()
        sizes = sizes_of(tuned, arguments)
        learning = sum(trainable for _, _, trainable in table)
        assert (sizes.trainable, sizes.optimizer) == (4 * learning, 8 * learning)
        copied = sum(parameter.numel() for name, parameter in tuned.base.named_parameters() if "original_module" in name)
        assert sizes.replica + sizes.frozen == frozen_bytes * (sum(total for _, total, _ in table) - learning + copied)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_have_the_bytes_that_bitsandbytes_gives_them(
    key: str, make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path
) -> None:
    """Within 1%, on layers of the tiny model's widths times 8 (its own are smaller than a quantisation block)."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    config = load_config(str(tiny_dir))
    config.text_config.hidden_size, config.text_config.intermediate_size = 256, 384
    config.text_config.layer_types = config.text_config.layer_types[:2]
    arguments = make_arguments(rows_file, lora=True, bf16=True)
    plain, packed = (sizes_of(empty_model(config, values), values) for values in (arguments, {**arguments, key: True}))
    expected = 0
    for layer in empty_model(config, arguments).base.model.language_model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.dtype is torch.bfloat16:
                weight, kind = torch.randn(module.weight.shape), bitsandbytes.functional
                if key == "load_in_4bit":
                    stored, state = kind.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                    expected += stored.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes - module.weight.nbytes
                else:
                    stored, scales, _ = kind.int8_vectorwise_quant(weight.half())
                    expected += stored.nbytes + scales.nbytes - module.weight.nbytes
    assert packed.frozen - plain.frozen == pytest.approx(expected, rel=0.01)


def test_shapes_of_planned_batches() -> None:
    """Fillers stand for their row; pairs and sums by a plain loop."""
    lengths, images, supervised = np.array([5, 3, 7]), np.array([1, 0, 2]), np.array([2, 1, 3])
    shapes = micro_shapes([[0, 2], [~1]], Columns(lengths, images, supervised))
    assert shapes == [MicroShape((5, 7), 3, 5), MicroShape((3,), 0, 1)]
    assert shapes[0].shape() == BatchShape(12, sum(range(1, 6)) + sum(range(1, 8)), 3, 5)


def test_the_speed_of_a_known_machine_is_found(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path) -> None:
    """Timings made by a rule give the rule back: 2 ms per batch, 3 ms per image, 1 GFLOP/s, 7 ms per step."""
    costs = step_costs(empty_model(load_config(str(tiny_dir)), make_arguments(rows_file)))
    rule = Speed(seconds_per_image=3e-3, flops_per_second=1e9, batch_seconds=2e-3, step_seconds=7e-3)
    shapes = [BatchShape(50 * n, 900 * n, n, 10 * n) for n in (1, 2, 4)]
    timings = [Timing(shape, shape.num_images * 3e-3, rule.seconds(costs, shape) - shape.num_images * 3e-3) for shape in shapes]
    found = fit_speed(timings, costs, 7e-3)
    large = BatchShape(5000, 200_000, 90, 800)
    assert found.seconds(costs, large) == pytest.approx(rule.seconds(costs, large), rel=1e-6)
    assert found.step(costs, large, 4, 0) == pytest.approx(4 * rule.seconds(costs, large) + 7e-3, rel=1e-6)
    slow_disk = replace(found, data_seconds=1.0)
    assert slow_disk.step(costs, large, 1, 2) == pytest.approx(90 / 2 + 7e-3)


def test_disk_counts_the_checkpoints_that_stay(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path) -> None:
    arguments = make_arguments(rows_file, lora=True, save_strategy="steps", save_steps=10)
    tuned = empty_model(load_config(str(tiny_dir)), arguments)
    sizes = sizes_of(tuned, arguments)
    one = sizes.trainable + sizes.optimizer
    assert disk_of(tuned, sizes, arguments, 35, 1.0).total == 4 * one + sizes.trainable
    assert disk_of(tuned, sizes, {**arguments, "save_total_limit": 1}, 35, 1.0).total == 2 * one + sizes.trainable
    assert disk_of(tuned, sizes, {**arguments, "save_strategy": "epoch"}, 35, 2.5).total == 3 * one + sizes.trainable
    assert disk_of(tuned, sizes, {**arguments, "save_strategy": "no"}, 35, 1.0).total == sizes.trainable


# --- --fit ---


def search(arguments: dict[str, Any], tiny_dir: Path, mib: float) -> Search:
    return Search(arguments, load_config(str(tiny_dir)), ROWS, None, 1, "cpu", int(mib * MIB))


def test_fit_finds_what_fits_and_the_argument_checker_accepts_it(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path) -> None:
    """Less and less memory: first smaller micro-batches, then checkpointing; each time the forecast fits, the checker agrees and a step keeps its rows."""
    arguments = make_arguments(rows_file, gradient_checkpointing=True, per_device_train_batch_size=20)
    known = search(arguments, tiny_dir, 1000)
    plain, checkpointed = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
    needs = [known.forecast(plain, Sharding(), known.wanted), known.forecast(plain, Sharding(), known.longest)]
    needs.append(known.forecast(checkpointed, Sharding(), known.longest))
    sizes = [memory.total / MIB for memory in needs]
    assert sizes == sorted(sizes, reverse=True)
    seen = []
    for mib in (sizes[0] * 1.11, (sizes[0] + sizes[1]) / 2 * 1.1, (sizes[1] + sizes[2]) / 2 * 1.1):
        fit = search(arguments, tiny_dir, mib).run()
        assert fits(fit.memory, int(mib * MIB))
        accepted, problems = resolved(arguments, fit.changes)
        assert not problems
        tokens = accepted["max_tokens_per_batch"] or known.wanted
        assert tokens >= ROWS.lengths.max()
        assert tokens * accepted["gradient_accumulation_steps"] >= known.wanted
        seen.append((accepted["gradient_checkpointing"], tokens))
    assert seen[0] == (False, known.wanted)
    assert not seen[1][0]
    assert seen[1][1] < known.wanted
    assert seen[2][0]


def test_fit_says_when_nothing_fits(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path) -> None:
    with pytest.raises(InputError, match=r"nothing that was tried fits 0\.01 GiB .* needs 0\.03 GiB .*max_length.*lora: true"):
        search(make_arguments(rows_file), tiny_dir, 10).run()


def test_a_written_configuration_reads_back_the_same(make_arguments: Callable[..., dict[str, Any]], rows_file: Path) -> None:
    arguments = make_arguments(rows_file, lora=True, bf16=True)
    config = config_of(arguments)
    again, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "file"))
    assert not problems
    assert again == arguments


# --- what is shown ---


def test_histograms_count_every_row() -> None:
    values = np.array([3, 3, 4, 9, 30, 31, 57])
    counts, edges = bins_of(values)
    assert counts.sum() == 7
    assert all(edges[i + 1] - edges[i] == edges[1] - edges[0] for i in range(len(counts)))
    lines = histogram("tokens per row", values)
    assert lines[0] == "tokens per row: 3 to 57, mean 19.6, 137 in all"
    assert [int(line.split()[-1]) for line in lines[1:]] == counts.tolist()
    assert lines[1].count("█") == 40
    assert len(histogram("images per row", np.zeros(4, np.int64))) == 2


def test_figures_in_words() -> None:
    assert [size(count) for count in (512, 45 * MIB, 3 * 2**29)] == ["0 KiB", "45 MiB", "1.50 GiB"]
    assert [duration(seconds) for seconds in (0.5, 186, 9000, 345_600)] == ["0.5 s", "3.1 min", "2.5 h", "4.0 days"]


# --- the script ---


def test_plan_run_plans_what_training_would_do(tmp_path: Path) -> None:
    """Steps as an independent plan gives them; histograms and totals as the rows are; nothing in output_dir."""
    write_rows(tmp_path, 60)
    config = config_file(tmp_path, per_device_train_batch_size=8, num_train_epochs=3, cache_dir=str(tmp_path / "cache"))
    done = run("plan_run.py", config, "--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png", "--probe", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["rows"], plan["trained"], plan["num_images"]["sum"]) == (60, 60, sum(number % 4 for number in range(60)))
    preview = run("preview_data.py", config, "--json", tmp_path / "rows.jsonl")
    lengths = [json.loads(line)["length"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert preview.returncode == 0
    assert (plan["lengths"]["min"], plan["lengths"]["max"], plan["lengths"]["sum"]) == (min(lengths), max(lengths), sum(lengths))
    independent = Plan(lengths, lengths, plan["tokens_per_batch"], None, 3, 42)
    assert plan["steps_per_epoch"] == independent.steps_per_epoch
    assert plan["total_steps"] == 3 * independent.steps_per_epoch
    assert plan["fits"]
    assert plan["sharded_bytes"]["DDP"]["1"] == plan["memory_bytes"]["total"]
    assert plan["sharded_bytes"]["ZeRO 3"]["8"] < plan["sharded_bytes"]["ZeRO 3"]["2"] < plan["sharded_bytes"]["DDP"]["2"]
    assert plan["step_seconds"] > 0
    assert plan["memory_bytes"]["weights"] == 4 * sum(tensor.numel() for tensor in load_file(DEMO_MODEL / "model.safetensors").values())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for word in ("tokens per row", "images per row", "ZeRO 3", "per step", "disk:", "fits"):
        assert word in done.stdout
    assert not (tmp_path / "run").exists()


def test_plan_run_and_training_warn_of_many_rows_that_are_too_long(
    tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "data", 24)
    finetune(make_arguments(rows, max_length=60, max_steps=1))
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert "rows are too long for max_length 60" in warning
    done = run("plan_run.py", config_file(tmp_path / "data", max_length=45), "--probe", "0")
    assert any(line.startswith("WARNING: ") and "rows are too long for max_length 45" in line for line in done.stdout.splitlines())


def test_plan_run_lists_bad_rows_and_says_that_training_would_refuse(tmp_path: Path) -> None:
    rows = json.loads(write_rows(tmp_path, 12).read_text())
    rows[5]["image"] = ["pictures/gone.png"]
    rows[7]["conversations"] = []
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = config_file(tmp_path, cache_dir=str(tmp_path / "cache"))
    done = run("plan_run.py", config, "--probe", "0")
    assert done.returncode == 2
    assert "12 rows: 10 trained, 0 shortened, 2 skipped" in done.stdout
    assert "row 5: missing_image" in done.stdout
    assert "plan:" in done.stdout
    assert "training would refuse to start: 2 of 12 rows cannot be used" in done.stderr
    assert "bad_rows: skip" in done.stderr
    assert done.stderr.count("error:") == 1
    done = run("plan_run.py", config, "--probe", "0", "--bad_rows", "skip", "--fit", "0.01GiB")
    assert done.returncode == 2  # now only because nothing fits
    assert "refuse" not in done.stderr
    assert "nothing that was tried fits 0.01 GiB" in done.stderr
    assert not (tmp_path / "config_fit.json").exists()


@pytest.mark.slow
def test_plan_run_writes_a_configuration_that_fits(tmp_path: Path) -> None:
    """It is accepted, and its own plan says that it fits."""
    write_rows(tmp_path, 60)
    config = config_file(tmp_path, per_device_train_batch_size=32, use_cpu=True, cache_dir=str(tmp_path / "cache"))
    done = run("plan_run.py", config, "--probe", "0", "--fit", "0.55GiB", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr[-2000:]
    written = tmp_path / "config_fit.json"
    config = json.loads(written.read_text())
    resolved_values, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "file"))
    assert not problems
    changes = json.loads((tmp_path / "plan.json").read_text())["fit"]["changes"]
    assert changes
    assert {name: resolved_values[name] for name in changes} == changes
    again = run("plan_run.py", written, "--probe", "0", "--json", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "again.json").read_text())["memory_bytes"]["total"] * 1.1 <= 0.55 * 2**30


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fit", "24"], "--fit: expected a size"),
        (["--devices", "0"], "--devices"),
        (["--probe", "long"], "--probe"),
        (["--output", "x.json"], "--output goes with --fit"),
        (["--plot", "x.doc"], "--plot"),
        (["--json", "no/such/folder/x.json"], "--json"),
    ],
)
def test_plan_run_refuses_wrong_options(tmp_path: Path, words: list[str], expected: str) -> None:
    write_rows(tmp_path, 4)
    done = run("plan_run.py", config_file(tmp_path), *words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "torch" not in done.stderr


@pytest.mark.slow
def test_the_disk_forecast_of_the_demo_is_close_to_its_files(tmp_path: Path) -> None:
    """Checkpoint bytes within 5% of the files that training writes; they have headers too, which weigh more in so small a model."""
    config = ["configs/lora_sft_argument.json", "--output_dir", tmp_path / "run", "--max_steps", "3", "--eval_strategy", "no", "--save_strategy", "steps"]
    done = run("plan_run.py", *config, "--probe", "0", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert run("supervised_finetune.py", *config).returncode == 0
    folder = tmp_path / "run" / "checkpoint-3"
    written = sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer-00000-of-00001.safetensors"))
    assert json.loads((tmp_path / "plan.json").read_text())["disk_bytes"]["checkpoint"] == pytest.approx(written, rel=0.05)
