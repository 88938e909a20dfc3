"""Whole runs on the tiny model: what is left behind, resuming, two processes, merging, bad input."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from interlace.data.media import open_image
from interlace.data.sample import Place
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model.loading import load_for_inference
from interlace.model.merging import merge
from interlace.training.parts import load_tuned_model, training_arguments
from interlace.training.supervised import finetune
from tests.conftest import ROOT, write_rows
from tests.test_families import FAMILIES, make_model

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
ALL_PARTS = "vision_tower,projector,language_model"


def history(output_dir: str | Path) -> list[dict[str, Any]]:
    return json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]


def losses(output_dir: str | Path) -> list[float]:
    return [entry["loss"] for entry in history(output_dir) if "loss" in entry]


def weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    (path,) = [*Path(output_dir).glob("adapter_model.safetensors"), *Path(output_dir).glob("model.safetensors")]
    return load_file(path)


# --- what a run leaves behind ---


@pytest.mark.parametrize("changes", [LORA, {}], ids=["lora", "full"])
def test_a_run_learns_and_leaves_everything_that_was_promised(make_arguments: Make, rows_file: Path, changes: dict[str, Any]) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file), "sampling_strategy": "first:6"}]}
    arguments = make_arguments(
        rows_file, **changes, dataset=dataset, max_steps=12, eval_strategy="epoch", save_strategy="steps", save_steps=6, hub_token="hf_secret"
    )
    finetune(arguments)
    folder = Path(arguments["output_dir"])
    names = {path.name for path in folder.iterdir()}
    expected = {
        "arguments.json",
        "environment.json",
        "ledger.json",
        "trainer_state.json",
        "train_results.json",
        "training_curves.png",
        "chat_template.jinja",
        "README.md",
    }
    expected |= {"tokenizer.json", "preprocessor_config.json", "checkpoint-6", "checkpoint-12"}
    expected |= {"adapter_config.json", "adapter_model.safetensors"} if changes else {"config.json", "model.safetensors"}
    assert expected <= names
    assert not any("hf_secret" in path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
    logs = [entry for entry in history(folder) if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert {"token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "images_per_second", "supervised_tokens"} <= set(logs[0])
    assert any("eval_loss" in entry and "eval_token_accuracy" in entry for entry in history(folder))
    assert json.loads((folder / "ledger.json").read_text())["trained"] == 24
    assert json.loads((folder / "arguments.json").read_text())["learning_rate"] == 1e-2


def test_logged_loss_is_the_mean_over_the_steps_supervised_tokens(make_arguments: Make, rows_file: Path) -> None:
    whole = make_arguments(rows_file, per_device_train_batch_size=24, max_steps=1)
    finetune(whole)
    parts = make_arguments(rows_file, per_device_train_batch_size=4, gradient_accumulation_steps=8, max_steps=1, output_dir=whole["output_dir"] + "_parts")
    finetune(parts)
    first, second = (next(entry for entry in history(a["output_dir"]) if "loss" in entry) for a in (whole, parts))
    assert first["supervised_tokens"] == second["supervised_tokens"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_parts_learn_at_their_own_rates_and_frozen_parts_stay(make_arguments: Make, rows_file: Path, tiny_dir: Path, packing: bool) -> None:
    arguments = make_arguments(
        rows_file, packing=packing, tunable_parts=ALL_PARTS, vision_tower_learning_rate=0, freeze_include=["*layers.0.mlp*"], freeze_exclude=["*down_proj*"]
    )
    finetune(arguments)
    before, after = weights(tiny_dir), weights(arguments["output_dir"])
    assert set(before) == set(after)
    for name in before:
        still = name.startswith("vision_tower") or ("layers.0.mlp" in name and "down_proj" not in name)
        assert torch.equal(before[name], after[name]) == still, name


def test_bfloat16_keeps_what_trains_in_float32(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, bf16=True)
    finetune(arguments)
    assert {tensor.dtype for tensor in weights(arguments["output_dir"]).values()} == {torch.float32}
    assert losses(arguments["output_dir"])[-1] < losses(arguments["output_dir"])[0]


def test_golden_trace_of_twenty_steps(make_arguments: Make, tmp_path: Path) -> None:
    """Made by `tests/golden_trace.py`: a change of these losses is a change of what is trained."""
    golden = json.loads((ROOT / "tests" / "golden_trace.json").read_text())
    for name, changes in golden["runs"].items():
        data = write_rows(tmp_path / f"data_{name}", 24)
        arguments = make_arguments(data, **changes, max_steps=20, output_dir=str(tmp_path / name))
        finetune(arguments)
        assert losses(arguments["output_dir"]) == pytest.approx(golden["losses"][name], rel=2e-4), name


# --- resuming ---


@pytest.mark.parametrize("changes", [LORA, {}, {"tunable_parts": ALL_PARTS}], ids=["lora", "full", "full with tower"])
def test_resumed_equals_uninterrupted_bitwise(make_arguments: Make, rows_file: Path, changes: dict[str, Any]) -> None:
    assert_resumed_equals_uninterrupted(make_arguments, rows_file, changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resumes_with_all_of_its_weights(make_arguments: Make, rows_file: Path, tmp_path: Path, family: str) -> None:
    """Whole models, tower and all: their published names of weights are not those inside."""
    assert_resumed_equals_uninterrupted(make_arguments, rows_file, {"model_name_or_path": str(make_model(family, tmp_path)), "tunable_parts": ALL_PARTS})


def assert_resumed_equals_uninterrupted(make_arguments: Make, rows_file: Path, changes: dict[str, Any]) -> None:
    common = {**changes, "max_steps": 9, "save_strategy": "steps", "save_steps": 6, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}
    straight = make_arguments(rows_file, **common)
    finetune(straight)
    cut = make_arguments(rows_file, **common, output_dir=straight["output_dir"] + "_cut", resume_from_checkpoint=True)
    finetune(cut)  # nothing to resume yet: starts afresh
    folder = Path(cut["output_dir"])
    shutil.rmtree(folder / "checkpoint-9")
    assert json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["epoch"] % 1 > 0, "the checkpoint stands inside an epoch"
    (folder / "trainer_state.json").unlink()
    torch.manual_seed(12345)
    finetune(cut)
    assert losses(straight["output_dir"])[6:] == losses(cut["output_dir"])[6:]
    first, second = weights(straight["output_dir"]), weights(cut["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_left_alone(make_arguments: Make, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = make_arguments(rows_file, **LORA, save_strategy="steps", save_steps=2, resume_from_checkpoint=True)
    finetune(arguments)
    assert "starting afresh" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in Path(arguments["output_dir"]).rglob("*")}
    finetune(arguments)
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(arguments["output_dir"]).rglob("*")} == before


def test_the_best_checkpoint_comes_back_at_the_end(make_arguments: Make, rows_file: Path) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    arguments = make_arguments(rows_file, dataset=dataset, max_steps=6, greater_is_better=True, metric_for_best_model="eval_loss", **changes)
    finetune(arguments)  # the worst loss is the first: `best` is not `last`
    first, last = (weights(Path(arguments["output_dir"]) / f"checkpoint-{step}") for step in (2, 6))
    final = weights(arguments["output_dir"])
    assert all(torch.equal(first[name], final[name]) for name in final)
    assert not all(torch.equal(last[name], final[name]) for name in final)


def test_an_adapter_is_continued(make_arguments: Make, rows_file: Path) -> None:
    first = make_arguments(rows_file, **LORA)
    finetune(first)
    second = make_arguments(rows_file, lora=True, lora_path=first["output_dir"], learning_rate=0.0, output_dir=first["output_dir"] + "_more")
    finetune(second)
    before, after = weights(first["output_dir"]), weights(second["output_dir"])
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(second["output_dir"])[0] < losses(first["output_dir"])[0]


# --- two processes ---


@pytest.mark.parametrize("changes", [LORA, {"tunable_parts": ALL_PARTS}], ids=["lora", "full with tower"])
def test_two_processes_equal_one(make_arguments: Make, rows_file: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    """Plain SGD, so that weights differ as gradients do: Adam would blow rounding up where a gradient is zero by theory (biases of keys)."""
    one = make_arguments(rows_file, **changes, gradient_accumulation_steps=4, max_steps=6, learning_rate=0.05, optim="sgd")
    rows = json.loads(rows_file.read_text())
    rows[5]["conversations"][0]["value"] += "<image>"  # a bad row, left out by both
    rows_file.write_text(json.dumps(rows))
    one |= {"bad_rows": "skip", "preprocessing_num_workers": 0}
    finetune(one)
    names = ("model_name_or_path", "per_device_train_batch_size", "max_steps", "learning_rate", "lora_dropout", "save_strategy", "use_cpu", "optim", "bad_rows")
    config = {name: one[name] for name in names} | {"cache_dir": str(tmp_path / "another cache")}
    config |= {**changes, "dataset": one["dataset"], "logging_steps": 1, "gradient_checkpointing": False, "dataloader_num_workers": 0}
    config |= {"output_dir": one["output_dir"] + "_two", "gradient_accumulation_steps": 2, "ddp_timeout": 120}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "train/supervised_finetune.py", str(tmp_path / "config.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(config["output_dir"]) == pytest.approx(losses(one["output_dir"]), rel=1e-5)
    ledgers = [(Path(run["output_dir"]) / "ledger.json").read_text() for run in (one, config)]
    assert ledgers[0] == ledgers[1] and json.loads(ledgers[0])["skipped"] == 1
    first, second = weights(one["output_dir"]), weights(config["output_dir"])
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# --- using the result ---


def test_merged_equals_adapter_and_loads_with_plain_auto_classes(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, lora_target_modules=["q_proj", "down_proj"])
    finetune(arguments)
    merge(arguments["output_dir"], tmp_path / "merged")
    merged, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval(), AutoProcessor.from_pretrained(tmp_path / "merged")
    adapted = load_for_inference(arguments["output_dir"], torch.float32)
    pictures = [open_image(Place(str(rows_file.parent / "pictures" / f"{i}.png"))) for i in (1, 2)]
    content = [{"type": "image"}, {"type": "text", "text": "\nand "}, {"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    with torch.no_grad():
        one, two = merged(**inputs).logits, adapted(**inputs).logits
        base = load_for_inference(arguments["model_name_or_path"], torch.float32)(**inputs).logits
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert (one - base).abs().max() > 1e-2
    assert (inputs["input_ids"] == merged.config.image_token_id).sum() == 8


def test_the_saved_processor_gives_the_trained_ids(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, system_prompt="Look closely.")
    finetune(arguments)
    generator, processor = load_generator(arguments["output_dir"]), AutoProcessor.from_pretrained(arguments["output_dir"])
    assert generator.processing.template.system_prompt == "Look closely."
    from interlace.data.sample import Image, Text, Turn

    picture = rows_file.parent / "pictures" / "3.png"
    ours = generator.prompt([Turn("user", (Text("See "), Image(str(picture)), Text("\nWhat?")))]).input_ids
    content = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = processor(text=text, images=[open_image(Place(str(picture)))], return_tensors="pt")["input_ids"][0].tolist()
    assert ours == theirs


def test_lora_targets_and_freezing_stay_in_the_language_model(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, max_steps=1)
    finetune(arguments)
    names = set(weights(arguments["output_dir"]))
    assert any("q_proj.lora_A" in name for name in names)
    assert not any("vision" in name for name in names)
    assert any("multi_modal_projector.linear_1" in name for name in names)


# --- tracking ---


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in a log of 32 KiB blocks, as LevelDB writes them, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_an_offline_wandb_run_holds_metrics_and_arguments(make_arguments: Make, rows_file: Path, wandb_folder: Path) -> None:
    finetune(make_arguments(rows_file, **LORA, report_to="wandb", hub_token="hf_secret"))
    wandb.teardown()  # the file is whole once the service behind it has ended
    (path,) = wandb_folder.rglob("*.wandb")
    keys, config = set(), {}
    for record in wandb_records(path):
        keys |= {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or "/".join(item.nested_key)] = item.value_json
    assert {"train/loss", "train/token_accuracy", "train/tokens_per_second", "train/images_per_second", "train/learning_rate", "train/grad_norm"} <= keys
    assert "train/data_wait_share" in keys
    assert json.loads(config["interlace"])["lora_rank"] == 4
    assert b"hf_secret" not in path.read_bytes()


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_name_or_path": "./nowhere"}, "no such model folder"),
        ({"model_name_or_path": "nobody/nothing"}, "cannot be loaded"),
        ({"dataset": {"train": [{"data_files": "nowhere.json"}]}}, "no such file"),
        ({"tunable_parts": "head"}, "tunable_parts"),
        ({"freeze_include": ["*nothing*"]}, "matches no parameter"),
        ({"freeze_include": ["*"]}, "nothing is left to train"),
        ({"lora": True, "lora_target_modules": ["x_proj"]}, "matches no linear layer"),
        ({"lora": True, "lora_target_modules": [".*vision_tower.*q_proj"]}, "the vision tower is frozen"),
        ({"lora": True, "lora_path": "nowhere"}, "adapter_config.json"),
        ({"resume_from_checkpoint": "nowhere"}, "no complete checkpoint"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"max_length": 5}, "no row is left"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(make_arguments: Make, rows_file: Path, changes: dict[str, Any], expected: str) -> None:
    arguments = make_arguments(rows_file, **changes)
    with pytest.raises(InputError, match=expected):
        finetune(arguments)
    assert not Path(arguments["output_dir"]).exists()


def test_an_output_dir_with_another_run_is_refused_or_cleared(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, save_strategy="steps", save_steps=2)
    finetune(arguments)
    folder = Path(arguments["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match="already holds a run"):
        finetune(arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finetune({**arguments, "overwrite_output_dir": True, "save_strategy": "no"})
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_learns_on_a_quantised_base(make_arguments: Make, rows_file: Path, bits: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    arguments = make_arguments(rows_file, **LORA, max_steps=6, **{bits: True})
    tuned = load_tuned_model(arguments["model_name_or_path"], arguments, training_arguments(arguments))
    quantised = {name for name, module in tuned.base.named_modules() if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))}
    assert quantised
    assert all("language_model" in name for name in quantised), "vision tower, projector and head stay whole"
    finetune(arguments)
    assert losses(arguments["output_dir"])[-1] < losses(arguments["output_dir"])[0]


def test_resuming_with_other_settings_is_refused_and_nothing_changes(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, **LORA, save_strategy="steps", save_steps=2)
    finetune(arguments)
    folder = Path(arguments["output_dir"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = {**arguments, "resume_from_checkpoint": True, "max_steps": 8, "lora_rank": 8, "seed": 7}
    with pytest.raises(InputError, match=r"lora_rank: was 4, is 8(.|\n)*seed: was 42, is 7"):
        finetune(changed)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_holds_the_model_is_never_an_output_dir(make_arguments: Make, rows_file: Path, tiny_dir: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(InputError, match="what this run starts from"):
            finetune(make_arguments(rows_file, output_dir=str(tiny_dir), overwrite_output_dir=overwrite))


@pytest.mark.parametrize("changes", [{"report_to": "wandbb"}, {"lr_scheduler_type": "cosine_with_min_lr"}, {"optim": "ademamix", "optim_args": "beta1=high"}])
def test_what_transformers_refuses_is_refused_before_anything_is_written(make_arguments: Make, rows_file: Path, changes: dict[str, Any]) -> None:
    arguments = make_arguments(rows_file, **changes)
    with pytest.raises(InputError, match="cannot be had"):
        finetune(arguments)
    assert not list(Path(arguments["output_dir"]).glob("*"))


def test_overwriting_leaves_nothing_of_the_run_before(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, **LORA)
    finetune(arguments)
    finetune(make_arguments(rows_file, overwrite_output_dir=True))
    names = {path.name for path in Path(arguments["output_dir"]).iterdir()}
    assert "model.safetensors" in names
    assert not any(name.startswith("adapter") for name in names)


def test_a_frozen_weight_freezes_its_adapter_and_unused_tower_layers_never_train(make_arguments: Make, rows_file: Path) -> None:
    changes = {"tunable_parts": ALL_PARTS, "freeze_include": ["*language_model.layers.0.*"]}
    arguments = make_arguments(rows_file, **LORA, **changes)
    tuned = load_tuned_model(arguments["model_name_or_path"], arguments, training_arguments(arguments))
    learns = {name for name, parameter in tuned.base.named_parameters() if parameter.requires_grad}
    assert any("layers.1" in name and "lora_A" in name for name in learns)
    assert not any("language_model.layers.0" in name for name in learns)
    assert any("vision_tower" in name for name in learns)
    assert not any("post_layernorm" in name for name in learns)


def test_a_fully_tuned_model_keeps_frozen_weights_as_they_were_stored(make_arguments: Make, rows_file: Path, tiny_dir: Path) -> None:
    arguments = make_arguments(rows_file, bf16=True, tunable_parts="projector")
    finetune(arguments)
    before, after = weights(tiny_dir), weights(arguments["output_dir"])
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "projector" not in name}


def test_the_model_card_says_where_the_model_comes_from(make_arguments: Callable[..., dict[str, Any]], rows_file: Path, tiny_dir: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    (base / "LICENSE").write_text("for research")
    changes = {"model_name_or_path": str(base), "lora": True, "lora_rank": 4, "dataset": {"train": [{"data_files": str(rows_file), "weight": 0.5}]}}
    finetune(make_arguments(rows_file, **changes, max_steps=2))
    card = (tmp_path / "run" / "README.md").read_text()
    front, body = card.split("---\n")[1:]
    assert yaml.safe_load(front)["base_model"] == "base"
    assert yaml.safe_load(front)["library_name"] == "peft"
    for line in (
        "- `rows.json`, weight 0.5",
        "24 rows: 24 trained as they are, 0 shortened, 0 skipped (`ledger.json`)",
        "2 optimizer steps on a CPU",
        "| `lora_rank` | `4` |",
    ):
        assert line in body
    assert "(LICENSE)" in body
    assert "evaluation loss" not in body
    assert str(tmp_path) not in card
    finetune(make_arguments(rows_file, output_dir=str(tmp_path / "full"), max_steps=1))
    assert "library_name: transformers" in (tmp_path / "full" / "README.md").read_text()


def test_only_the_model_is_uploaded_and_only_when_the_user_asks(
    make_arguments: Callable[..., dict[str, Any]], rows_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, name, **settings: calls.append((name, settings)) or RepoUrl(f"https://huggingface.co/me/{name.removeprefix('me/')}")
    )

    def upload(self: HfApi, **settings: Any) -> None:
        names = (str(path.relative_to(settings["folder_path"])) for path in Path(settings["folder_path"]).rglob("*") if path.is_file())
        calls.append((self.token, list(filter_repo_objects(names, allow_patterns=settings["allow_patterns"], ignore_patterns=settings["ignore_patterns"]))))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    finetune(make_arguments(rows_file, max_steps=1))
    assert not calls
    run_dir, common = tmp_path / "published", {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "lora": True, "push_to_hub": True}
    finetune(make_arguments(rows_file, **common, output_dir=str(run_dir), hub_private_repo=True, hub_token="hf_secret"))
    assert calls[0] == ("published", {"private": True, "exist_ok": True})
    token, names = calls[1]
    assert token == "hf_secret"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer_config.json", "preprocessor_config.json", "prompt.json"} <= set(names)
    assert not [name for name in names if "/" in name or name in ("arguments.json", "environment.json", "ledger.json", "trainer_state.json")]
    assert "uploaded to" in capsys.readouterr().out

    def refuse(self: HfApi, **_: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    finetune(make_arguments(rows_file, **common, output_dir=str(tmp_path / "later"), hub_model_id="me/mine"))
    assert "could not be uploaded to me/mine: no route to the hub; later: hf upload me/mine" in capsys.readouterr().out
    assert (tmp_path / "later" / "adapter_model.safetensors").is_file()
