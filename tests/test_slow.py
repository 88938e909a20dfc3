"""Minutes rather than seconds: the demo, the shipped configs, an older transformers reading what we save."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import AutoModelForImageTextToText

from interlace.data import demo
from interlace.data.sample import Image, Text, Turn
from interlace.inference.generation import load_generator
from interlace.model.conversion import to_hub
from interlace.model.merging import merge
from tests import small_families, test_families
from tests.conftest import ROOT, write_rows
from tests.test_adapters import inputs_of
from tests.test_conversion import assert_same_model, make_model, original_weights, write_original

pytestmark = pytest.mark.slow


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


def test_the_demo_reaches_its_targets(tmp_path: Path) -> None:
    done = run("data/demo/run_demo.py", "--output", tmp_path / "demo")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (json.loads((tmp_path / "demo" / name / "metrics.json").read_text())["datasets"] for name in ("before", "after"))

    def mean(scores: dict[str, dict[str, float]], *tasks: str) -> float:
        return sum(scores[task]["score"] for task in tasks) / len(tasks)

    base, new = ("name", "name_k", "read", "text"), ("largest", "even", "reverse")
    assert min(before[task]["score"] for task in base) >= 0.93
    assert mean(before, *new) < 0.10
    assert mean(after, *new) >= 0.80
    assert mean(after, *base) >= mean(before, *base) - 0.03
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    history = json.loads((tmp_path / "demo" / "lora_dpo" / "trainer_state.json").read_text())["log_history"]
    first, *_, last = [entry for entry in history if "eval_loss" in entry]
    assert first["eval_logps/accuracies"] <= 0.70  # the model that was fine-tuned cannot tell the pairs apart
    assert last["eval_logps/accuracies"] >= 0.90
    assert last["eval_rewards/accuracies"] >= 0.90
    assert last["eval_rewards/blank_gap"] > 0 < last["eval_rewards/swapped_gap"]
    scores = [json.loads((tmp_path / "demo" / name / "metrics.json").read_text())["overall"]["score"] for name in ("after", "after_dpo")]
    assert abs(scores[1] - scores[0]) <= 0.01
    adapter = tmp_path / "demo" / "lora_sft"
    assert run("train/merge_adapter.py", "--adapter-path", adapter, "--output-dir", tmp_path / "merged").returncode == 0
    words = ("--data-files", "demo", "--split", "validation", "--max-new-tokens", "32", "--batch-size", "100", "--output-dir")
    for name, model in (("adapter", adapter), ("merged", tmp_path / "merged")):
        assert run("train/evaluate_model.py", "--model-path", model, *words, tmp_path / name).returncode == 0
    same = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("adapter", "merged")]
    assert sum(one == two for one, two in zip(*same, strict=True)) >= len(same[0]) - 2  # a tie may fall the other way


def test_the_full_tuning_config_runs_as_it_is(tmp_path: Path) -> None:
    done = run("train/supervised_finetune.py", "configs/sft_argument.json", "--max_steps", "30", "--eval_strategy=no", "--output_dir", tmp_path / "sft")
    assert done.returncode == 0, done.stderr[-3000:]
    log = [entry["loss"] for entry in json.loads((tmp_path / "sft" / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert log
    assert (tmp_path / "sft" / "model.safetensors").is_file()


def make_environment(folder: Path, *installs: list[str], timeout_seconds: int = 900, variables: dict[str, str] | None = None) -> Path:
    """The interpreter of a new environment with these packages, or a skip where they cannot be installed; variables: of the environment they are built in."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for packages in installs:
        command, surroundings = [python, "-m", "pip", "install", "--quiet", *packages], {**os.environ, **(variables or {})}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False, env=surroundings)
        if done.returncode:
            pytest.skip(f"{', '.join(packages)} cannot be installed here: {done.stderr[-200:]}")
    return python


@pytest.fixture(scope="module")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("older"), ["torch==2.13.0"], ["transformers==4.51.3", "pillow", "num2words"])


READ = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval(), AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": "\\nWhat digit is this?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=text, images=[Image.open(sys.argv[2])], return_tensors="pt")
with torch.no_grad():
    torch.save({"ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "logits": model(**inputs).logits}, sys.argv[3])
"""


PADDLE = """
import json, sys
import numpy, paddle
weights = {}
for name, values in numpy.load(sys.argv[1]).items():
    is_linear = values.ndim == 2 and name.endswith("weight") and "embed" not in name
    own = name.replace("model.", "qwen2.", 1) if name.startswith("model.") else name
    if is_linear:  # a layer of Paddle's, so that its own form of the weight is stored
        layer = paddle.nn.Linear(values.shape[1], values.shape[0])
        layer.weight.set_value(values.T)
        weights[own] = layer.weight.astype("bfloat16")
    else:
        weights[own] = paddle.to_tensor(values).astype("bfloat16")
paddle.save(weights, sys.argv[2])
"""


def test_files_that_paddle_wrote(tmp_path: Path) -> None:
    model = make_model("interleave")
    weights = original_weights(model, "interleave")
    python = make_environment(tmp_path / "paddle", ["paddlepaddle==3.3.1"])
    folder = write_original(tmp_path / "original", "interleave", weights)
    (folder / "model.safetensors").unlink()
    np.savez(tmp_path / "weights.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    done = subprocess.run([python, "-c", PADDLE, tmp_path / "weights.npz", folder / "model_state.pdparams"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("train/convert_checkpoint.py", "--input", folder, "--output", tmp_path / "hub", "--to", "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "hub", dtype="float32").eval(), model)


@pytest.mark.parametrize("source", ["an adapter, merged", "the authors' layout", "Gemma 3"])
def test_transformers_4_51_reads_what_we_save_with_equal_logits(older_python: Path, tmp_path: Path, tiny_dir: Path, source: str) -> None:
    import torch

    write_rows(tmp_path, 4)
    if source == "the authors' layout":
        to_hub(str(write_original(tmp_path / "original", "interleave", original_weights(make_model("interleave"), "interleave"))), tmp_path / "hub")
        tiny_dir = tmp_path / "hub"
    if source == "Gemma 3":
        (tmp_path / "gemma").mkdir()
        tiny_dir = small_families.make_model("gemma3", tmp_path / "gemma")
    config = {"model_name_or_path": str(tiny_dir), "output_dir": str(tmp_path / "run"), "dataset": {"train": [{"data_files": str(tmp_path / "rows.json")}]}}
    config |= {"lora": True, "max_steps": 2, "use_cpu": True, "learning_rate": 0.01}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("train/supervised_finetune.py", tmp_path / "config.json")
    assert done.returncode == 0, done.stderr[-2000:]
    merge(str(tmp_path / "run"), tmp_path / "merged")
    found = []
    for name, python in (("new", sys.executable), ("old", str(older_python))):
        command = [python, "-c", READ, str(tmp_path / "merged"), str(tmp_path / "pictures" / "0.png"), str(tmp_path / name)]
        read = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
        assert read.returncode == 0, read.stderr[-3000:]
        found.append(torch.load(tmp_path / name))
    assert torch.equal(found[0]["ids"], found[1]["ids"])
    torch.testing.assert_close(found[0]["pixels"], found[1]["pixels"], rtol=0, atol=0.05)
    torch.testing.assert_close(found[0]["logits"], found[1]["logits"], rtol=1e-3, atol=1e-3)


READ_ADAPTER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
inputs = torch.load(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
with torch.no_grad():
    torch.save(PeftModel.from_pretrained(model, sys.argv[2]).eval()(**inputs).logits, sys.argv[4])
"""


@pytest.mark.parametrize(
    ("version", "has_tower", "is_read"), [("4.51.3", False, False), ("4.52.4", False, True), ("4.57.3", False, True), ("4.57.3", True, False)]
)
def test_an_adapter_is_read_from_the_version_on_that_its_card_names(tmp_path: Path, tiny_dir: Path, version: str, has_tower: bool, is_read: bool) -> None:
    import torch

    folder = tmp_path / "older"
    packages = [f"transformers=={version}", "huggingface_hub==0.36.0", f"tokenizers=={'0.22.1' if version.startswith('4.57') else '0.21.4'}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"{', '.join(packages)} cannot be installed here: {done.stderr[-200:]}")
    config = {"model_name_or_path": str(tiny_dir), "output_dir": str(tmp_path / "run"), "lora": True, "max_steps": 2, "use_cpu": True, "learning_rate": 0.01}
    config |= {"dataset": {"train": [{"data_files": str(write_rows(tmp_path, 4))}]}, "tunable_parts": "projector,language_model" + ",vision_tower" * has_tower}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("train/supervised_finetune.py", tmp_path / "config.json").returncode == 0
    torch.save(inputs_of(tiny_dir), tmp_path / "inputs")
    read = []
    for name, path in (("new", ""), ("old", str(folder))):
        words = [sys.executable, "-c", READ_ADAPTER, str(tiny_dir), str(tmp_path / "run"), str(tmp_path / "inputs"), str(tmp_path / name)]
        read.append(subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, check=False))
    assert read[0].returncode == 0, read[0].stderr[-2000:]
    assert (read[1].returncode == 0) == is_read, read[1].stderr[-2000:]
    if is_read:
        torch.testing.assert_close(torch.load(tmp_path / "old"), torch.load(tmp_path / "new"), rtol=0, atol=1e-5)
    named = "needs PEFT and transformers 5 or newer" if has_tower else "needs PEFT and transformers 4.52 or newer"
    assert named in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3"])
def test_transformers_4_51_reads_every_family_it_knows_with_equal_ids_pixels_and_logits(older_python: Path, tmp_path: Path, family: str) -> None:
    """Against the library of today, whose `AutoProcessor` would need torchvision for most of them: its image processor and its model."""
    import torch

    write_rows(tmp_path, 4)
    (tmp_path / "base").mkdir()
    folder = (small_families if family in small_families.SMALL else test_families).make_model(family, tmp_path / "base")
    config = {"model_name_or_path": str(folder), "output_dir": str(tmp_path / "run"), "dataset": {"train": [{"data_files": str(tmp_path / "rows.json")}]}}
    config |= {"lora": True, "max_steps": 2, "use_cpu": True, "learning_rate": 0.01}
    if family == "llava_onevision":
        config["image_aspect_ratio"] = "anyres_max_9"  # the only number that the processor of that time knows
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("train/supervised_finetune.py", tmp_path / "config.json")
    assert done.returncode == 0, done.stderr[-2000:]
    merge(str(tmp_path / "run"), tmp_path / "merged")
    picture = tmp_path / "picture.png"  # of a shape that tiles take without padding: of an odd one, that time lost a row
    PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 128, 3), np.uint8)).save(picture)
    command = [older_python, "-c", READ, str(tmp_path / "merged"), str(picture), str(tmp_path / "old")]
    read = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert read.returncode == 0, read.stderr[-3000:]
    old, generator = torch.load(tmp_path / "old"), load_generator(str(tmp_path / "merged"))
    prompt = generator.prompt([Turn("user", (Image(str(picture)), Text("\nWhat digit is this?")))])
    ids = torch.tensor([prompt.input_ids])
    assert torch.equal(ids, old["ids"])
    inputs = generator.processing.generation_inputs([[PIL.Image.open(picture).convert("RGB")]], ids)
    torch.testing.assert_close(inputs["pixel_values"].flatten(), old["pixels"].flatten(), rtol=0, atol=0.05)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    inputs["pixel_values"] = old["pixels"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    torch.testing.assert_close(logits, old["logits"], rtol=1e-3, atol=1e-3)


def test_only_a_model_trained_with_images_in_place_tells_them_apart(tmp_path: Path) -> None:
    """Rows whose answer only an image's place decides, once as they are and once with the images in another order."""
    rows = [row for row in json.loads((demo.prepare() / "train.json").read_text()) if row["metadata"]["dataset"] == "name_k"]
    randomness = random.Random(0)
    scrambled = [{**row, "image": randomness.sample(row["image"], len(row["image"]))} for row in rows]
    scores = {}
    for name, data in (("right", rows), ("scrambled", scrambled)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        dataset = {"train": [{"data_files": str(tmp_path / f"{name}.json"), "image_folder": str(demo.prepare())}]}
        words = ["--dataset", json.dumps(dataset), "--eval_strategy=no", "--num_train_epochs", "8", "--output_dir", tmp_path / name]
        done = run("train/supervised_finetune.py", "configs/lora_sft_argument.json", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        words = ["--data-files", "demo", "--split", "validation", "--max-new-tokens", "16", "--diagnose", "shuffled", "--output-dir", tmp_path / f"{name}_out"]
        assert run("train/evaluate_model.py", "--model-path", tmp_path / name, *words).returncode == 0
        metrics, found = (json.loads((tmp_path / f"{name}_out" / file).read_text()) for file in ("metrics.json", "diagnostics.json"))
        scores[name] = metrics["datasets"]["name_k"]["score"], found["ablations"]["shuffled"]["datasets"]["name_k"]["drop"]
    assert scores["right"][0] > 0.95 and scores["right"][1] > 0.5
    assert scores["scrambled"][0] < 0.7 and scores["scrambled"][1] < scores["right"][1] - 0.3
