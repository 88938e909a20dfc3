"""Adapters of PEFT's own, as other tools leave them: onto their base, into it, and refused where they do not fit; tiny models, float32 on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model.loading import load_for_inference, load_model, load_processing
from interlace.model.merging import merge
from interlace.training.supervised import finetune
from tests.conftest import write_rows
from tests.test_conversion import make_model, original_weights, write_original
from tests.test_scripts import run

Make = Callable[..., dict[str, Any]]
LAYERS = r".*language_model.*\.(q_proj|down_proj)"


def peft_adapter(base: Path, folder: Path, **changes: Any) -> PeftModel:
    """What PEFT alone writes: two files, no tokenizer, nothing of ours."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, **changes}
    adapted: Any = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()  # type: ignore[no-any-return]


def inputs_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """A row of two images."""
    processing = load_processing(str(folder))
    torch.manual_seed(2)
    image = [processing.config.image_token_id] * 4
    ids = torch.tensor([[5, *image, 7, 9, *image, 11, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}


# --- onto the base ---


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter_of_peft_s_own_gives_peft_s_logits(tmp_path: Path, tiny_dir: Path, changes: dict[str, bool]) -> None:
    """On its base and merged into it; rank-stabilised, the same matrices weigh alpha / sqrt(rank) instead of alpha / rank."""
    theirs = peft_adapter(tiny_dir, tmp_path / "adapter", **changes)
    ours = load_for_inference(str(tmp_path / "adapter"), torch.float32)
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    inputs, base = inputs_of(tiny_dir), load_model(str(tiny_dir), torch.float32).eval()
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-4)
        assert (base(**inputs).logits - expected).abs().max() > 1e-1
    if changes.get("use_dora"):
        return
    name, tensors = "model.language_model.layers.1.self_attn.q_proj", load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first, second = (tensors[f"base_model.model.{name}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
    scale = 8 / 4**0.5 if changes else 8 / 4
    change = merged.state_dict()[f"{name}.weight"] - base.state_dict()[f"{name}.weight"]
    torch.testing.assert_close(change, scale * second @ first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["use_dora", "use_rslora"])
def test_what_a_run_saves_is_what_peft_computes(make_arguments: Make, rows_file: Path, tiny_dir: Path, key: str) -> None:
    """PEFT alone reads the folder: the same logits as ours, of the trained model; and DoRA, rank-stabilised LoRA are what was asked for."""
    arguments = make_arguments(rows_file, lora=True, lora_rank=4, lora_alpha=8, **{key: True})
    finetune(arguments)
    folder = Path(arguments["output_dir"])
    assert json.loads((folder / "adapter_config.json").read_text())[key] is True
    theirs: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_dir), folder).eval()
    scales = {module.scaling["default"] for module in theirs.modules() if hasattr(module, "lora_A")}
    assert scales == {8 / 4**0.5 if key == "use_rslora" else 2.0}
    assert any("lora_magnitude_vector" in name for name, _ in theirs.named_parameters()) == (key == "use_dora")
    inputs = inputs_of(tiny_dir)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(load_for_inference(str(folder), torch.float32)(**inputs).logits, expected, rtol=0, atol=1e-6)
        assert (load_model(str(tiny_dir), torch.float32).eval()(**inputs).logits - expected).abs().max() > 1e-2


def test_a_merged_model_says_which_type_its_weights_have(tmp_path: Path, tiny_dir: Path) -> None:
    """That of the base unless another is asked for: transformers and vLLM load what config.json says."""
    base, kept = tiny_dir, {}
    for name, dtype in (("one", None), ("two", "bfloat16"), ("three", None), ("four", "float16")):  # each on the one before
        peft_adapter(base, tmp_path / f"{name}_adapter")
        base = tmp_path / name
        merge(str(tmp_path / f"{name}_adapter"), base, dtype)
        settings = json.loads((base / "config.json").read_text())
        kept[name] = {settings["dtype"], settings["text_config"]["dtype"], settings["vision_config"]["dtype"]}
        kept[name] |= {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(base / "model.safetensors").values()}
    assert kept == {"one": {"float32"}, "two": {"bfloat16"}, "three": {"bfloat16"}, "four": {"float16"}}


# --- that do not fit ---


def misfit(kind: str, base: Path, folder: Path) -> Path:
    peft_adapter(base, folder)
    settings, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads(settings.read_text())
    if kind == "another width":
        save_file({name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in tensors.items()}, file)
    elif kind == "more layers":
        more = {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name}
        save_file(tensors | more, file)
    elif kind == "other names":
        save_file({name.replace("language_model", "decoder"): tensor for name, tensor in tensors.items()}, file)
    elif kind == "no such layers":
        settings.write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    elif kind == "half a file":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "no weights":
        file.unlink()
    elif kind == "learned prompt":
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, base_model_name_or_path=str(base)).save_pretrained(folder)
    elif kind == "broken settings":
        settings.write_text(settings.read_text()[:-20])
    return folder


KINDS = {
    "another width": "does not fit .*size mismatch",
    "more layers": "does not fit .*it holds 12 matrices, and the model has a place for 8",
    "other names": "does not fit .*Found missing adapter keys",
    "no such layers": "does not fit .*c_attn",
    "half a file": "does not fit ",
    "no weights": "does not fit ",
    "learned prompt": "an adapter of kind PROMPT_TUNING puts tokens before every prompt; expected LoRA",
    "broken settings": "adapter_config.json cannot be read",
}


@pytest.mark.parametrize(("kind", "expected"), KINDS.items(), ids=list(KINDS))
def test_an_adapter_that_does_not_fit_is_refused_everywhere(
    tmp_path: Path, tiny_dir: Path, make_arguments: Make, rows_file: Path, kind: str, expected: str
) -> None:
    folder = misfit(kind, tiny_dir, tmp_path / "adapter")
    uses: dict[str, Callable[[], Any]] = {
        "merge": lambda: merge(str(folder), tmp_path / "merged"),
        "chat": lambda: load_generator(str(folder)),
        "train": lambda: finetune(make_arguments(rows_file, lora=True, lora_path=str(folder), tunable_parts="language_model")),
    }
    for name, use in uses.items():
        is_known_before = name == "train" and kind == "no such layers"  # without the weights
        with pytest.raises(InputError, match="'c_attn' matches no linear layer" if is_known_before else expected) as caught:
            use()
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("merge_adapter.py", "--output-dir", "MERGED", "--adapter-path"),
        pytest.param(("predict_multiround.py", "--query", "Hi", "--model-path"), marks=pytest.mark.slow),
    ],
    ids=["merge", "predict"],
)
def test_the_scripts_say_so_in_one_line(tmp_path: Path, tiny_dir: Path, words: tuple[str, ...]) -> None:
    folder = misfit("another width", tiny_dir, tmp_path / "adapter")
    done = run(*(str(tmp_path / "merged") if word == "MERGED" else word for word in words), folder)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert f"{folder}: this adapter does not fit {tiny_dir}" in done.stderr
    assert not (tmp_path / "merged").exists()


# --- without a tokenizer of their own ---


@pytest.mark.parametrize("layout", ["hub", "authors"])
def test_what_an_adapter_s_folder_lacks_comes_from_its_base(tmp_path: Path, tiny_dir: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_dir
    if layout == "authors":  # whose adapters PEFT alone cannot make: ours, without what lies beside it
        base = write_original(tmp_path / "original", "interleave", original_weights(make_model("interleave"), "interleave"))
        adapted: Any = get_peft_model(load_model(str(base), torch.float32), LoraConfig(r=4, target_modules=LAYERS))
        adapted.save_pretrained(tmp_path / "adapter")
    else:
        peft_adapter(base, tmp_path / "adapter")
    (note,) = merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert note == f"{tmp_path / 'adapter'} has no tokenizer and no image processor of its own; taken from its base, {base}"
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.tokenizer.get_vocab() == load_processing(str(base)).tokenizer.get_vocab()
    load_generator(str(tmp_path / "adapter"))
    assert note in capsys.readouterr().err.splitlines()
    processor.tokenizer.save_pretrained(tmp_path / "adapter")  # as trainers for text do
    assert load_processing(str(tmp_path / "adapter")).notes == (note.replace("no tokenizer and ", ""),)


def test_a_base_without_a_tokenizer_leaves_nothing_behind(tmp_path: Path, tiny_dir: Path) -> None:
    base = shutil.copytree(tiny_dir, tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter")
    for file in [*base.glob("tokenizer*"), *base.glob("chat_template*")]:
        file.unlink()
    with pytest.raises(InputError, match="tokenizer or image processor cannot be loaded"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for file in [*tiny_dir.glob("tokenizer*"), *tiny_dir.glob("chat_template*")]:
        shutil.copy(file, base)
    merge(str(tmp_path / "adapter"), tmp_path / "merged")  # again, into the same folder
    assert not list(tmp_path.glob(".merged*"))


def test_only_lora_is_continued(tmp_path: Path, tiny_dir: Path, make_arguments: Make, rows_file: Path) -> None:
    adapted: Any = get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny_dir), IA3Config(target_modules=LAYERS, feedforward_modules=[]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter of kind IA3; expected LoRA"):
        finetune(make_arguments(rows_file, lora=True, lora_path=str(tmp_path / "adapter"), tunable_parts="language_model"))
    merge(str(tmp_path / "adapter"), tmp_path / "merged")


def test_an_adapter_in_torch_s_own_file_is_continued(tmp_path: Path, tiny_dir: Path, make_arguments: Make) -> None:
    """Older versions of PEFT write `adapter_model.bin`."""
    peft_adapter(tiny_dir, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    before = load_file(file)
    torch.save(before, file.with_suffix(".bin"))
    file.unlink()
    rows = write_rows(tmp_path / "data", 8)
    changes = {"lora": True, "lora_path": str(tmp_path / "adapter"), "tunable_parts": "language_model", "learning_rate": 0.0}
    finetune(make_arguments(rows, **changes, max_steps=1))
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
