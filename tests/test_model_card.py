"""README.md of a trained model: its code is run, its figures are those of the run."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from interlace.data.sample import Image, Text, Turn
from interlace.inference.generation import load_generator
from interlace.model.merging import merge
from interlace.training.supervised import finetune
from tests.conftest import write_rows
from tests.test_conversion import make_model, original_weights, write_original

Make = Callable[..., dict[str, Any]]


def blocks(card: str) -> tuple[str, str]:
    """The code that it gives, and the prompt that it shows."""
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    (prompt,) = re.findall(r"```\n(<\|im_start\|>.*?)\n```", card, re.DOTALL)
    return code, prompt


@pytest.mark.parametrize("kind", ["adapter", "whole", "adapter on the authors' layout"])
def test_the_card_s_code_gives_the_model_s_answer(
    make_arguments: Make, tmp_path: Path, tiny_dir: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_original, is_adapter = "authors" in kind, kind != "whole"
    if is_original:
        base = write_original(tmp_path / "base", "interleave", original_weights(make_model("interleave"), "interleave"))
    else:
        base = shutil.copytree(tiny_dir, tmp_path / "base")
    rows = write_rows(tmp_path / "data", 8)
    changes = {"model_name_or_path": str(base), "lora": is_adapter, "max_steps": 2, "max_length": 512, "system_prompt": "Look closely."}
    finetune(make_arguments(rows, **changes))
    card = (tmp_path / "run" / "README.md").read_text()
    code, prompt = blocks(card)
    assert str(tmp_path) not in card

    generator, picture = load_generator(str(tmp_path / "run")), tmp_path / "data" / "pictures" / "1.png"
    asked = generator.prompt([Turn("user", (Image(str(picture)), Text("\nWhat is in the image?")))])
    (expected,) = generator.answer([asked], 128)
    assert expected.strip()
    ids = generator.processing.tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"]
    image = generator.processing.config.image_token_id
    assert [token for token in asked.input_ids if token != image] == [token for token in ids if token != image]
    assert ids.count(image) == 1

    shutil.copy(picture, tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^# +python train/merge_adapter.py (.*)$", code, re.MULTILINE)
    assert len(commands) == int(is_original)
    for command in commands:
        words = shlex.split(command.replace("THIS_FOLDER", "run"))
        merge(words[words.index("--adapter-path") + 1], Path(words[words.index("--output-dir") + 1]))
    capsys.readouterr()
    exec(compile(code.replace("THIS_FOLDER", "run"), "README.md", "exec"), {})  # from this folder, where the base is "base"
    assert capsys.readouterr().out.strip() == expected.strip()
    assert ("needs PEFT and transformers 4.52 or newer" in card) == is_adapter


def test_an_adapter_with_a_tower_needs_a_newer_transformers(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    """Version 5 leaves `vision_model` out of its names, so that older ones find none of the tower's weights in the file."""
    finetune(make_arguments(rows_file, lora=True, tunable_parts="vision_tower,projector,language_model", max_steps=1))
    names = set(load_file(tmp_path / "run" / "adapter_model.safetensors"))
    assert any(".vision_tower." in name for name in names) and not any("vision_model" in name for name in names)
    assert "needs PEFT and transformers 5 or newer" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("chooses_best", [False, True])
def test_the_card_s_figures_are_those_of_its_weights(make_arguments: Make, rows_file: Path, tmp_path: Path, chooses_best: bool) -> None:
    """Loss and accuracy of training and evaluation, and the score of answers, overall and by data set: of the step that was kept."""
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    asks = {"eval_generate": True, "eval_generate_rows": 8, "eval_generate_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "eval_loss", "save_strategy": "steps", "save_steps": 2}
    finetune(make_arguments(rows_file, dataset=dataset, lora=True, max_steps=6, learning_rate=1e-3, **asks, **(best if chooses_best else {})))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    step = state["best_global_step"] if chooses_best else 6
    assert (step < 6) == chooses_best  # the worst loss, so that it is an early one
    logged = {name: value for entry in state["log_history"] if entry["step"] == step for name, value in entry.items()}
    figures = dict(re.findall(r"^\| (.+) \| (-?[\d.]+) \|$", (tmp_path / "run" / "README.md").read_text(), re.MULTILINE))
    expected = {"training loss, last": "loss", "evaluation loss": "eval_loss", "evaluation token accuracy": "eval_token_accuracy"}
    expected |= {"evaluation score of answers": "eval_score", "evaluation score of answers, images_1": "eval_score/images_1"}
    assert {label: figures[label] for label in expected} == {label: f"{logged[name]:.4f}" for label, name in expected.items()}
