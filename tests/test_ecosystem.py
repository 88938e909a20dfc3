"""Models as people hold them (hub ids, code of their own, other counts of tokens), and what transformers alone does with those we save."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, pipeline

from interlace.data.sample import Image, Text, Turn
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model.conversion import to_hub, to_original
from interlace.model.loading import load_model, load_processing
from interlace.model.merging import merge
from interlace.training.supervised import finetune
from tests.conftest import DEMO_MODEL, ROOT, write_rows
from tests.test_adapters import inputs_of
from tests.test_conversion import make_model, original_weights, write_original

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
TOWER_AND_PROJECTOR = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


# --- hub ids ---


def in_cache(cache: Path, name: str, folder: Path) -> None:
    """Puts a folder where the hub's client keeps what it has fetched."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))


@pytest.fixture
def hub_id(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As llava-hf's, with a licence, and trained with a system prompt."""
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    (base / "LICENSE.md").write_text("for research")
    settings = json.loads((base / "prompt.json").read_text())
    (base / "prompt.json").write_text(json.dumps(settings | {"system_prompt": "Look closely."}))
    in_cache(tmp_path / "home" / "hub", "llava-hf/tiny-hf", base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return "llava-hf/tiny-hf"


def test_a_hub_id_trains_answers_and_hands_its_licence_on(make_arguments: Make, tmp_path: Path, hub_id: str) -> None:
    rows = write_rows(tmp_path / "data", 8)
    for name, changes in (("full", {}), ("adapter", LORA)):
        finetune(make_arguments(rows, model_name_or_path=hub_id, **changes, max_steps=1, output_dir=str(tmp_path / name)))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == hub_id
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    for name in ("full", "adapter", "merged"):
        assert (tmp_path / name / "LICENSE.md").read_text() == "for research", name
    assert all(f'"{hub_id}"' in line for line in (tmp_path / "adapter" / "README.md").read_text().splitlines() if "from_pretrained(" in line and "base" in line)
    answers = []
    for path in (hub_id, str(tmp_path / "base"), str(tmp_path / "adapter")):
        generator = load_generator(path)
        assert generator.processing.template.system_prompt == "Look closely."
        prompt = generator.prompt([Turn("user", (Image(str(rows.parent / "pictures" / "0.png")), Text("\nHi")))])
        answers.append(generator.answer([prompt], 8))
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_the_scripts_take_hub_ids_from_the_cache(tmp_path: Path, hub_id: str) -> None:
    rows = write_rows(tmp_path / "data", 8)
    config = {"model_name_or_path": hub_id, "output_dir": str(tmp_path / "run"), "dataset": {"train": [{"data_files": str(rows)}]}, "lora": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_steps": 1, "use_cpu": True}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_CACHE", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for words in (
        ("supervised_finetune.py", str(tmp_path / "config.json")),
        ("predict_multiround.py", "--model-path", hub_id, "--query", "Hi", "--max-new-tokens", "4"),
        ("predict_multiround.py", "--model-path", str(tmp_path / "run"), "--query", "Hi", "--max-new-tokens", "4"),
    ):
        command = [sys.executable, f"train/{words[0]}", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


# --- code of their own ---

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class OwnConfig(PretrainedConfig):
    model_type = "own_vl"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, marker: Path, model_type: str | None) -> Path:
    """Names code in config.json and tokenizer_config.json; with a model type of its own, or the one that it has."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name, changes in (
        ("config.json", {"auto_map": {"AutoConfig": "own.OwnConfig"}, **({"model_type": model_type} if model_type else {})}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}),
    ):
        settings = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(settings | changes))
    return folder


def test_code_of_a_model_is_not_run_unless_the_user_says_so(make_arguments: Make, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is to be asked
    marker, rows = tmp_path / "was_run", write_rows(tmp_path / "data", 4)
    folder = with_code(shutil.copytree(tiny_dir, tmp_path / "own"), marker, "own_vl")
    for use in (
        lambda: finetune(make_arguments(rows, model_name_or_path=str(folder))),
        lambda: load_generator(str(folder)),
        lambda: to_original(str(folder), tmp_path / "converted"),
    ):
        with pytest.raises(InputError, match=rf"{folder}: .* contains custom code .*trust_remote_code=True"):
            use()
    with pytest.raises(InputError, match="in Hugging Face's layout already"):
        to_hub(str(folder), tmp_path / "converted")
    assert not marker.exists() and not (tmp_path / "converted").exists() and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="model_type 'own_vl' is not supported"):
        finetune(make_arguments(rows, model_name_or_path=str(folder), trust_remote_code=True))
    assert marker.exists()


def test_a_known_model_s_own_code_is_left_alone(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder in either layout whose config.json names code beside a model type that needs none: it is read without it, or refused."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "was_run"
    original = write_original(tmp_path / "original", "interleave", original_weights(make_model("interleave"), "interleave"))
    for folder in (with_code(original, marker, None), with_code(shutil.copytree(tiny_dir, tmp_path / "own"), marker, None)):
        try:
            load_generator(str(folder))
        except InputError as error:
            assert "custom code" in str(error)
        assert not marker.exists()


# --- another count of tokens ---


def test_a_processor_that_counts_one_token_less_is_named(make_arguments: Make, tmp_path: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As early files of the hub ports do: 728 for 729, here 3 for 4. Training and chat go by the model, and what is saved is right again."""
    base, rows = shutil.copytree(tiny_dir, tmp_path / "base"), write_rows(tmp_path / "data", 8)
    file = base / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_select_strategy": "default"}))
    note = f"{base}: processor_config.json counts 3 tokens per image, config.json 4; config.json is followed, as the model itself does"
    finetune(make_arguments(rows, model_name_or_path=str(base), max_steps=1))
    assert note in capsys.readouterr().out.splitlines()
    load_generator(str(base))
    assert note in capsys.readouterr().err.splitlines()
    assert load_processing(str(tmp_path / "run")).notes == ()
    assert load_processing(str(DEMO_MODEL)).notes == ()


# --- by transformers alone ---


@pytest.mark.parametrize("model", ["tiny", "demo", "merged"])
def test_a_pipeline_gives_our_answer(make_arguments: Make, tmp_path: Path, tiny_dir: Path, model: str) -> None:
    rows = write_rows(tmp_path / "data", 8)
    folder = {"tiny": tiny_dir, "demo": DEMO_MODEL, "merged": tmp_path / "merged"}[model]
    if model == "merged":
        finetune(make_arguments(rows, **LORA, max_steps=2))
        merge(str(tmp_path / "run"), folder)
    pictures = [rows.parent / "pictures" / f"{i}.png" for i in (1, 2)]
    generator = load_generator(str(folder))
    question = Turn("user", (Image(str(pictures[0])), Text("\nand "), Image(str(pictures[1])), Text("\nWhich digits?")))
    (ours,) = generator.answer([generator.prompt([question])], 12)
    content = [
        {"type": "image", "image": PIL.Image.open(pictures[0])},
        {"type": "text", "text": "\nand "},
        {"type": "image", "image": PIL.Image.open(pictures[1])},
        {"type": "text", "text": "\nWhich digits?"},
    ]
    ask: Any = pipeline("image-text-to-text", model=str(folder), dtype="float32", device="cpu")
    (found,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=12, generate_kwargs={"do_sample": False})
    assert found["generated_text"][-1]["content"].strip() == ours.strip() != ""


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_chosen_as_on_any_model(tiny_dir: Path, attention: str) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_dir, attn_implementation=attention).eval()
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == attention
    inputs, ours = inputs_of(tiny_dir), load_model(str(tiny_dir), torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, ours(**inputs).logits, rtol=0, atol=1e-5)


# --- 4 and 8 bits ---


def quantised_layers(model: nn.Module) -> set[str]:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def language_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".language_model." in f".{name}"}


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_answers_of_a_quantised_model(rows_file: Path, bits: str) -> None:
    """All linear layers of the language model and none of the tower, the projector and the head, which stay in 16 bits."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    generator, plain = load_generator("demo", **{bits: True}), load_model(str(DEMO_MODEL), torch.float32)  # wide enough for 4 bits on a CPU
    model: Any = generator.model
    assert quantised_layers(model) == language_layers(plain)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
        assert not quantised_layers(part)
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert torch.equal(parameter, plain.model.multi_modal_projector.get_parameter(name).bfloat16())
    prompt = generator.prompt([Turn("user", (Image(str(rows_file.parent / "pictures" / "0.png")), Text("\nHi")))])
    assert generator.answer([prompt], 8) == load_generator("demo").answer([prompt], 8)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantization_config_as_on_the_model_cards(bits: str) -> None:
    """Of transformers alone: what stays whole is named as in memory."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    config = BitsAndBytesConfig(**{bits: True}, llm_int8_skip_modules=TOWER_AND_PROJECTOR)
    model: Any = AutoModelForImageTextToText.from_pretrained(DEMO_MODEL, quantization_config=config, dtype=torch.bfloat16).eval()
    plain = load_model(str(DEMO_MODEL), torch.float32).eval()
    assert quantised_layers(model) == language_layers(plain)
    inputs = inputs_of(DEMO_MODEL)
    with torch.no_grad():
        found = model(**{name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}).logits.float()
        expected = plain(**inputs).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98  # rounded, not broken


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_trained_on_4_bits_merges_into_the_whole_base(
    make_arguments: Make, tmp_path: Path, rows_file: Path, tiny_dir: Path, dtype: str | None
) -> None:
    """W + alpha / rank B A with W as it is stored, not as 4 bits round it; the projector that was trained beside it."""
    pytest.importorskip("bitsandbytes", reason="needs the quantization extra")
    finetune(make_arguments(rows_file, **LORA, load_in_4bit=True, max_steps=4))
    merge(str(tmp_path / "run"), tmp_path / "merged", dtype)
    kept = torch.bfloat16 if dtype else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == kept
    assert not hasattr(model.config, "quantization_config")
    merged, base, adapter = model.state_dict(), load_model(str(tiny_dir), torch.float32).state_dict(), load_file(tmp_path / "run" / "adapter_model.safetensors")
    changed = set()
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            change = 2 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            assert change.abs().max() > 0
            changed.add(name)
            torch.testing.assert_close(merged[name].float(), (weight + change).to(kept).float(), rtol=2**-7 if dtype else 0, atol=1e-6)
        else:
            assert torch.equal(merged[name], adapter.get(f"base_model.model.{name}", weight).to(kept)), name
    assert len(changed) == 14
