"""Models in their authors' layout, against transformers' models with the same weights: tiny, random, float32 on the CPU."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from interlace.data.formats import from_llava
from interlace.data.sample import Image, Text, Turn
from interlace.errors import InputError
from interlace.inference.generation import load_generator
from interlace.model import weight_files
from interlace.model.conversion import to_hub, to_original
from interlace.model.loading import load_config, load_for_inference, load_model, load_processing, weights_fingerprint
from interlace.model.merging import merge
from interlace.model.original import open_original
from interlace.model.tuning import PARTS, lora_targets, tune
from interlace.model.weight_files import stored_tensors
from interlace.training.supervised import finetune
from tests.conftest import DEMO_MODEL, write_rows
from tests.test_scripts import run
from tests.test_template import write_llama_tokenizer

VOCABULARY, ADDED = 1024, 64
PINPOINTS = [[56, 112], [112, 56]]
KINDS = ("interleave", "llava_v1_5", "llava_v1_6", "onevision")
Weights = dict[str, torch.Tensor]


def make_model(kind: str) -> PreTrainedModel:
    """What the hub port of an original of this kind is."""
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    is_qwen = kind in ("interleave", "onevision")
    text = (Qwen2Config if is_qwen else LlamaConfig)(vocab_size=VOCABULARY + ADDED, tie_word_embeddings=is_qwen, max_position_embeddings=512, **widths)
    tower = {"num_hidden_layers": 3, "num_attention_heads": 1, "image_size": 56, "patch_size": 14, "intermediate_size": 24}
    vision = SiglipVisionConfig(hidden_size=72, vision_use_head=False, **tower) if is_qwen else CLIPVisionConfig(hidden_size=64, **tower)
    tokens = AutoTokenizer.from_pretrained(DEMO_MODEL)
    common: dict[str, Any] = {"text_config": text, "vision_config": vision, "image_token_index": tokens.convert_tokens_to_ids("<image>")}
    common |= {
        "vision_feature_layer": -1 if is_qwen else -2,
        "vision_feature_select_strategy": "full" if is_qwen else "default",
        "tie_word_embeddings": is_qwen,
    }
    torch.manual_seed(KINDS.index(kind))
    if kind == "llava_v1_6":
        model: PreTrainedModel = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **common))
    elif kind == "onevision":
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_9", **common))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**common))
    for parameter in model.parameters():  # larger weights than the initialisation: differences must show
        parameter.data.mul_(3)
    return model.eval()


def original_weights(model: PreTrainedModel, kind: str) -> Weights:
    """The model's weights under the authors' names and with their vocabulary, written out by hand."""
    found: Weights = {}
    for name, tensor in model.state_dict().items():
        words = name.split(".")
        if words[:2] == ["model", "language_model"]:
            name = ".".join(["model", *words[2:]])
        elif words[:2] == ["model", "multi_modal_projector"]:
            name = f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[words[2]] }.{words[3]}"
        elif words[:2] == ["model", "vision_tower"]:
            name = ".".join(["model", "vision_tower", "vision_tower", "vision_model", *words[2:]])
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:VOCABULARY]
        found[name] = tensor.clone()
    if model.config.get_text_config().tie_word_embeddings:
        del found["lm_head.weight"]
    if kind == "interleave":  # trained with, and of no use
        found["model.image_newline"] = torch.arange(32.0)
    return found


def original_settings(kind: str) -> dict[str, Any]:
    is_qwen = kind in ("interleave", "onevision")
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "rope_theta": 10000.0, "torch_dtype": "float32", "tie_word_embeddings": is_qwen}
    settings |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_hidden_size": 72 if is_qwen else 64}
    settings |= {"rms_norm_eps": 1e-6, "architectures": ["LlavaQwenForCausalLM" if is_qwen else "LlavaLlamaForCausalLM"], "mm_vision_tower": "nowhere/tower"}
    settings |= {"model_type": "llava_qwen" if is_qwen else "llava"}
    aspect = {"interleave": "anyres", "llava_v1_5": "pad", "llava_v1_6": "anyres", "onevision": "anyres_max_9"}[kind]
    return settings | {"image_aspect_ratio": aspect, "image_grid_pinpoints": PINPOINTS}


def write_original(folder: Path, kind: str, weights: Weights, settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings or original_settings(kind)))
    for pattern in ("tokenizer*", "vocab*", "merges*"):
        for file in DEMO_MODEL.glob(pattern):
            shutil.copy(file, folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return make_model(kind)


@pytest.fixture
def weights(model: PreTrainedModel, kind: str) -> Weights:
    return original_weights(model, kind)


@pytest.fixture
def interleave(tmp_path: Path) -> tuple[Path, Weights]:
    weights = original_weights(make_model("interleave"), "interleave")
    return write_original(tmp_path / "original", "interleave", weights), weights


def assert_same_model(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same weights, but for the rows of the vocabulary that no text uses, and the same settings where the model is made from them."""
    theirs = expected.state_dict()
    assert set(found.state_dict()) == set(theirs)
    for name, tensor in found.state_dict().items():
        rows = VOCABULARY if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(tensor) if tensor.dim() else None
        assert torch.equal(tensor[:rows], theirs[name][:rows]), name
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits[..., :VOCABULARY], expected(input_ids=ids).logits[..., :VOCABULARY])
    for part in ("vision_config", "text_config"):
        ours, theirs_config = (getattr(config, part).to_dict() for config in (found.config, expected.config))
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "vocab_size",
            "rope_parameters",
        ):
            assert ours.get(name) == theirs_config.get(name), name
    for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_token_id", "model_type", "projector_hidden_act"):
        assert getattr(found.config, name) == getattr(expected.config, name), name


def test_an_original_folder_is_the_port_s_model(tmp_path: Path, kind: str, model: PreTrainedModel, weights: Weights) -> None:
    folder = write_original(tmp_path / "original", kind, weights)
    assert_same_model(load_model(str(folder), torch.float32).eval(), model)
    processing = load_processing(str(folder))
    assert processing.config.model_type == model.config.model_type
    assert bool(getattr(processing.image_processor, "do_pad", False)) == (kind in ("llava_v1_5", "llava_v1_6", "onevision"))


def test_there_and_back_is_bitwise(tmp_path: Path, kind: str, model: PreTrainedModel, weights: Weights) -> None:
    folder = write_original(tmp_path / "original", kind, weights)
    (folder / "LICENSE").write_text("for research")
    to_hub(str(folder), tmp_path / "hub")
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "hub").eval(), model)
    to_original(str(tmp_path / "hub"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == original_settings(kind)
    assert (tmp_path / "back" / "LICENSE").read_text() == (tmp_path / "hub" / "LICENSE").read_text() == "for research"
    to_hub(str(tmp_path / "back"), tmp_path / "again")
    files = [file for file in (tmp_path / "hub").rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "again" / file.relative_to(tmp_path / "hub")).read_bytes() == file.read_bytes(), file.name


def test_the_converted_folder_is_whole(tmp_path: Path, interleave: tuple[Path, Weights]) -> None:
    """Hub names, what older versions read, and a processor that counts the tokens of an image."""
    to_hub(str(interleave[0]), tmp_path / "hub")
    names = set(load_file(tmp_path / "hub" / "model.safetensors"))
    assert {"language_model.model.norm.weight", "vision_tower.vision_model.post_layernorm.bias", "multi_modal_projector.linear_1.weight"} <= names
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["text_config"]["rope_theta"] == 10000.0
    processor: Any = LlavaProcessor.from_pretrained(tmp_path / "hub")
    assert len(processor(text="<image>", images=np.zeros((3, 3, 3), np.uint8))["input_ids"][0]) == 16
    assert "<|im_start|>" in processor.tokenizer.chat_template
    assert torch.equal(load_file(tmp_path / "hub" / "llava_original" / "weights.safetensors")["model.image_newline"], torch.arange(32.0))


def write_index(folder: Path, stem: str, files: dict[str, Weights]) -> None:
    places = {name: file for file, part in files.items() for name in part}
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_every_kind_of_file(tmp_path: Path, interleave: tuple[Path, Weights], form: str) -> None:
    folder, weights = interleave
    (folder / "model.safetensors").unlink()
    suffix, stem = ("bin", "pytorch_model") if form.endswith("bin") else ("safetensors", "model")
    names = sorted(weights)
    halves = [names] if " " not in form else [names[:7], names[7:]]
    files = {f"{stem}-{i}.{suffix}" if len(halves) > 1 else f"{stem}.{suffix}": {name: weights[name] for name in half} for i, half in enumerate(halves)}
    for file, part in files.items():
        torch.save(part, folder / file) if suffix == "bin" else save_file(part, folder / file)
    if len(files) > 1:
        write_index(folder, f"{stem}.{suffix}", files)
    found = stored_tensors(folder)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in weights.items()
    }
    assert all(torch.equal(found[name].load(), value) for name, value in weights.items())
    assert_same_model(load_model(str(folder), torch.float32).eval(), make_model("interleave"))


PADDLE_CLIP = {  # of `_get_name_mappings` in PaddleMIX's paddlemix/models/llava/clip_model.py: transformers' names, those of its own CLIP
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding.weight",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
for _layer in range(3):
    for _part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
        PADDLE_CLIP |= {f"encoder.layers.{_layer}.{_part}.{end}": f"transformer.layers.{_layer}.{_part}.{end}" for end in ("weight", "bias")}
    for _part, _other in (("mlp.fc1", "linear1"), ("mlp.fc2", "linear2"), ("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
        PADDLE_CLIP |= {f"encoder.layers.{_layer}.{_part}.{end}": f"transformer.layers.{_layer}.{_other}.{end}" for end in ("weight", "bias")}


def paddle_form(weights: Weights, start: str) -> dict[str, Any]:
    """As Paddle stores them: linear layers transposed, bfloat16 as the numbers of its bits, the language model and a CLIP tower under their own names."""
    found: dict[str, Any] = {"StructuredToParameterName@@": {"a": "b"}}
    tower = "model.vision_tower.vision_tower.vision_model."
    for name, tensor in weights.items():
        if start == "llama" and name.startswith(tower):
            found[f"llama.vision_tower.vision_tower.vision_model.{PADDLE_CLIP[name.removeprefix(tower)]}"] = paddle_array(name, tensor)
        else:
            found[name.replace("model.", f"{start}.", 1) if name.startswith("model.") else name] = paddle_array(name, tensor)
    return found


def paddle_array(name: str, tensor: torch.Tensor) -> Any:
    if name.endswith("weight") and tensor.dim() == 2 and "embed_tokens" not in name and "position_embedding" not in name:
        tensor = tensor.T
    return tensor.contiguous().bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize("protocol", [2, 4])
def test_paddle_s_weights(tmp_path: Path, kind: str, model: PreTrainedModel, weights: Weights, protocol: int) -> None:
    folder = write_original(tmp_path / "original", kind, weights)
    (folder / "model.safetensors").unlink()
    start = "qwen2" if kind in ("interleave", "onevision") else "llama"
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(paddle_form(weights, start), protocol))
    large = [tensor for tensor in stored_tensors(folder).values() if tensor.nbytes >= 1 << 16]
    assert large
    assert load_model(str(folder), "auto").dtype == torch.float32  # as config.json says
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    assert_same_model(load_model(str(folder), torch.float32).eval(), model)


def test_paddle_s_weights_in_several_files(tmp_path: Path) -> None:
    model = make_model("llava_v1_6")
    folder = write_original(tmp_path / "original", "llava_v1_6", original_weights(model, "llava_v1_6"))
    content = paddle_form(load_file(folder / "model.safetensors"), "llama")
    (folder / "model.safetensors").unlink()
    names = sorted(set(content) - {"StructuredToParameterName@@"})
    files = {f"model_state-0000{number}-of-00002.pdparams": names[number - 1 :: 2] for number in (1, 2)}
    for file, part in files.items():
        (folder / file).write_bytes(pickle.dumps({name: content[name] for name in part}, 4))
    (folder / "model_state.pdparams.index.json").write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    assert_same_model(load_model(str(folder), torch.float32).eval(), model)


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model_state.pdparams"])
def test_code_in_weights_is_refused_and_not_run(tmp_path: Path, interleave: tuple[Path, Weights], file: str) -> None:
    folder, weights = interleave
    (folder / "model.safetensors").unlink()
    content = {**weights, "more": Planted(tmp_path / "ran")}
    torch.save(content, folder / file) if file.endswith("bin") else (folder / file).write_bytes(pickle.dumps(content, 4))
    with pytest.raises(InputError, match="wants code run"):
        load_model(str(folder), torch.float32)
    assert not (tmp_path / "ran").exists()


def rename(weights: Weights, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


NORM = "model.layers.0.input_layernorm.weight"
BROKEN: dict[str, tuple[Callable[[Weights, dict[str, Any]], Any], str]] = {
    "a shrunk vocabulary": (lambda w, s: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:1000]}), "1000 rows .* shrunk this vocabulary"),
    "shrunk, and the settings with it": (
        lambda w, s: (w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:1000]}), s.update(vocab_size=1000)),
        "shrunk this vocabulary",
    ),
    "a wrong shape": (lambda w, s: w.update({NORM: torch.ones(31)}), r"layers.0.input_layernorm.weight is \[31\], expected \[32\]"),
    "a missing weight": (lambda w, s: w.pop(NORM), "model.layers.0.input_layernorm.weight is missing"),
    "settings of another size": (lambda w, s: s.update(num_hidden_layers=3), "model.layers.2.* is missing"),
    "a weight too many": (lambda w, s: w.update({"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)}), "model.layers.7.mlp.up_proj.weight is too many"),
    "a weight nobody knows": (lambda w, s: w.update({"model.vision_resampler.query": torch.ones(3)}), "does not know, 'model.vision_resampler.query'"),
    "another projector": (lambda w, s: s.update(mm_projector_type="linear"), "mm_projector_type 'linear'; expected mlp2x_gelu"),
    "no head": (lambda w, s: s.update(tie_word_embeddings=False), "lm_head.weight is missing"),
    "a head of its own": (lambda w, s: w.update({"lm_head.weight": torch.ones(VOCABULARY, 32)}), "differs from model.embed_tokens.weight"),
    "no tower": (lambda w, s: [w.pop(name) for name in list(w) if "vision_tower" in name], "'nowhere/tower' cannot be had .*--vision-tower"),
    "no embeddings": (lambda w, s: w.pop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    weights, settings = original_weights(make_model("interleave"), "interleave"), original_settings("interleave")
    change(weights, settings)
    folder = write_original(tmp_path / "original", "interleave", weights, settings)
    with pytest.raises(InputError, match=message):
        to_hub(str(folder), tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


def test_a_half_downloaded_model(tmp_path: Path, interleave: tuple[Path, Weights]) -> None:
    folder, weights = interleave
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: .*half-downloaded"):
        open_original(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights in this folder"):
        open_original(folder)
    write_index(folder, "model.safetensors", {"model-1.safetensors": weights, "model-2.safetensors": {"more": torch.ones(1)}})
    save_file(weights, folder / "model-1.safetensors")
    with pytest.raises(InputError, match=r"1 of 2 files of weights are missing: model-2\.safetensors"):
        open_original(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(paddle_form(weights, "qwen2"), 4)[:-70_000])
    with pytest.raises(InputError, match="half-downloaded"):
        open_original(folder)


def test_a_tokenizer_that_is_not_there(tmp_path: Path, interleave: tuple[Path, Weights]) -> None:
    """transformers would make an empty one of whatever is missing."""
    folder, hub = interleave[0], tmp_path / "hub"
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    for files in ((), ("vocab.json",), ("merges.txt",)):
        for name in files:
            (folder / name).write_text("{}")
        with pytest.raises(InputError, match=r"expected tokenizer\.json; or tokenizer\.model; or sentencepiece\.bpe\.model; or vocab\.json with merges\.txt"):
            to_hub(str(folder), hub)
        for name in files:
            (folder / name).unlink()
    (folder / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"tokenizer cannot be loaded.*half-downloaded"):
        to_hub(str(folder), hub)
    (folder / "tokenizer.json").unlink()
    write_llama_tokenizer(folder, True)
    whole = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"tokenizer cannot be loaded.*half-downloaded"):
        to_hub(str(folder), hub)
    assert not hub.exists()


def test_a_tokenizer_of_another_model(tmp_path: Path, interleave: tuple[Path, Weights]) -> None:
    folder, size = interleave[0], len(AutoTokenizer.from_pretrained(DEMO_MODEL))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": size + i, "content": f"<|more_{i}|>"} for i in range(VOCABULARY)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"a tokenizer of {size + VOCABULARY} tokens, and a vocabulary of {VOCABULARY}"):
        load_config(str(folder))


def test_a_tower_from_elsewhere(tmp_path: Path, kind: str, model: PreTrainedModel, weights: Weights) -> None:
    """As the hub stores towers: SigLIP with a layer more than the originals use, and its pooling; text models beside them."""
    start = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(start): weights.pop(name) for name in list(weights) if name.startswith(start)}
    if kind in ("interleave", "onevision"):
        last = {name.replace("layers.2", "layers.3"): torch.zeros_like(tensor) for name, tensor in tower.items() if "layers.2" in name}
        tower |= last | {"vision_model.head.probe": torch.ones(1, 1, 72)}
    tower |= {"text_model.embeddings.weight": torch.ones(2, 2), "logit_scale": torch.ones(1)}
    (tmp_path / "tower").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tower.items()}, tmp_path / "tower" / "model.safetensors")
    folder = write_original(tmp_path / "original", kind, weights)
    to_hub(str(folder), tmp_path / "hub", vision_tower=str(tmp_path / "tower"))
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "hub").eval(), model)
    settings = original_settings(kind) | {"mm_vision_tower": str(tmp_path / "tower")}
    assert_same_model(load_model(str(write_original(tmp_path / "second", kind, weights, settings)), torch.float32).eval(), model)


def test_a_language_model_alone_gets_a_tower_and_a_new_projector(tmp_path: Path) -> None:
    model = make_model("llava_v1_5")
    weights, start = original_weights(model, "llava_v1_5"), "model.vision_tower.vision_tower."
    tower = {name.removeprefix(start): tensor.contiguous() for name, tensor in weights.items() if name.startswith(start)}
    (tmp_path / "tower").mkdir()
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    settings = {name: value for name, value in original_settings("llava_v1_5").items() if not name.startswith(("mm_", "image_"))}
    alone = {name: tensor for name, tensor in weights.items() if not name.startswith(("model.vision_tower", "model.mm_projector"))}
    folder = write_original(tmp_path / "vicuna", "llava_v1_5", alone, settings | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    to_hub(str(folder), tmp_path / "hub", vision_tower=str(tmp_path / "tower"))
    to_hub(str(folder), tmp_path / "again", vision_tower=str(tmp_path / "tower"))
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub").eval()
    projector = {name: tensor for name, tensor in found.state_dict().items() if "multi_modal_projector" in name}
    assert all(tensor.std() > 0 for tensor in projector.values())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "hub" / "model.safetensors").read_bytes()
    model.load_state_dict({**model.state_dict(), **projector})
    assert_same_model(found, model)
    with pytest.raises(InputError, match="A language model alone becomes a LLaVA with convert_checkpoint"):
        load_config(str(folder))


def test_files_are_written_one_after_the_other(tmp_path: Path, interleave: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 100_000)
    to_hub(str(interleave[0]), tmp_path / "hub")
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files if len(load_file(file)) > 1)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "hub").eval(), make_model("interleave"))


def test_a_run_starts_from_an_original_folder(tmp_path: Path, interleave: tuple[Path, Weights], make_arguments: Callable[..., dict[str, Any]]) -> None:
    """LoRA and full runs, and what comes of them: adapters that name their base, merged models, the way back with what was kept aside."""
    folder, rows = str(interleave[0]), write_rows(tmp_path / "data", 8)
    common = {"model_name_or_path": folder, "max_steps": 2, "max_length": 512}
    finetune(make_arguments(rows, **common, lora=True, output_dir=str(tmp_path / "adapter")))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == folder
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    finetune(make_arguments(rows, **common, output_dir=str(tmp_path / "full")))
    base = load_model(folder, torch.float32).state_dict()
    for name in ("merged", "full"):
        to_original(str(tmp_path / name), tmp_path / f"{name}_original")
        ours, back = (AutoModelForImageTextToText.from_pretrained(tmp_path / name), load_model(str(tmp_path / f"{name}_original"), torch.float32))
        assert_same_model(back.eval(), ours.eval())
        assert not all(torch.equal(tensor, base[key]) for key, tensor in ours.state_dict().items())
        assert torch.equal(load_file(tmp_path / f"{name}_original" / "model.safetensors")["model.image_newline"], torch.arange(32.0))


@pytest.mark.parametrize("is_legacy", [False, True])
@pytest.mark.parametrize("kind", ["llava_v1_5", "llava_v1_6"])
def test_llava_1_5_and_1_6_train_in_vicuna_s_form(tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], kind: str, is_legacy: bool) -> None:
    """From the authors' layout with LLaMA's own tokenizer file to a merged model that is asked in the same form."""
    model = make_model(kind)
    folder = write_original(tmp_path / "original", kind, original_weights(model, kind))
    for file in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        file.unlink()
    write_llama_tokenizer(folder, is_legacy)
    rows, run_dir = write_rows(tmp_path / "data", 8), tmp_path / "run"
    config = {"model_name_or_path": str(folder), "max_steps": 2, "max_length": 2000, "lora": True, "output_dir": str(run_dir), "feature_cache": "memory"}
    finetune(make_arguments(rows, **config))
    assert json.loads((run_dir / "prompt.json").read_text())["prompt_style"] == "vicuna_v1"
    merge(str(run_dir), tmp_path / "merged")
    sample = from_llava({"image": ["a", "b"], "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Two."}] * 2})
    first, *others = [load_processing(str(place)).template.encode(sample).input_ids.tolist() for place in (folder, run_dir, tmp_path / "merged")]
    assert others == [first, first]
    generator = load_generator(str(tmp_path / "merged"))
    prompt = generator.prompt([Turn("user", (Image(str(rows.parent / "pictures" / "0.png")), Text("Hi")))])
    assert len(generator.answer([prompt], 3)) == 1


def test_an_adapter_stays_with_its_base(
    tmp_path: Path, interleave: tuple[Path, Weights], make_arguments: Callable[..., dict[str, Any]], tiny_dir: Path
) -> None:
    """In whichever layout the base lies; one changed weight is told."""
    folder, rows = interleave[0], write_rows(tmp_path / "data", 8)
    adapter, common = tmp_path / "adapter", {"max_steps": 1, "max_length": 512, "lora": True}
    finetune(make_arguments(rows, **common, model_name_or_path=str(folder), output_dir=str(adapter)))
    to_hub(str(folder), tmp_path / "hub")
    assert weights_fingerprint(str(folder)) == weights_fingerprint(str(tmp_path / "hub")) != weights_fingerprint(str(tiny_dir))
    again = {"lora_path": str(adapter), "output_dir": str(tmp_path / "again")}
    finetune(make_arguments(rows, **common, **again, model_name_or_path=str(tmp_path / "hub")))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    open_original.cache_clear()
    for use in (
        lambda: merge(str(adapter), tmp_path / "merged"),
        lambda: load_for_inference(str(adapter), torch.float32),
        lambda: finetune(make_arguments(rows, **common, **again, model_name_or_path=str(folder), overwrite_output_dir=True)),
    ):
        with pytest.raises(InputError, match="was trained on other weights than"):
            use()
    assert not (tmp_path / "merged").exists()


def test_a_model_that_leaves_a_patch_out(tmp_path: Path, tiny_dir: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "port")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vision_feature_select_strategy": "default"}))
    with pytest.raises(InputError, match='3 tokens per image, as in early files of the hub ports; set it to "full"'):
        load_processing(str(folder))


def test_a_hub_id_in_the_authors_layout(tmp_path: Path, interleave: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub_cache"
    snapshot = cache / "models--lmms-lab--tiny" / "snapshots" / ("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot.parent.mkdir(parents=True)
    interleave[0].rename(snapshot)
    (cache / "models--lmms-lab--tiny" / "refs").mkdir()
    (cache / "models--lmms-lab--tiny" / "refs" / "main").write_text("0" * 40)
    assert load_config("lmms-lab/tiny").model_type == "llava"
    model = load_model("lmms-lab/tiny", torch.float32)
    assert model.name_or_path == "lmms-lab/tiny"
    assert_same_model(model.eval(), make_model("interleave"))


@pytest.mark.parametrize("kind", ["llava_v1_5", "interleave"])
def test_patterns_in_every_layout_s_spelling(kind: str) -> None:
    model, paddle = make_model(kind), {"llava_v1_5": "llama", "interleave": "qwen2"}[kind]
    expected = [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    for pattern in ("q_proj", f"{paddle}.layer.*q_proj.*", r"language_model\.model\.layers.*q_proj", r"model\.layers.*q_proj", "model.language_model.*q_proj"):
        assert lora_targets(model, [pattern]) == expected
    assert lora_targets(model, [f"{paddle}.mm_projector.*"]) == ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]
    with pytest.raises(InputError, match="matches no linear layer"):
        lora_targets(model, ["baichuan.layer.*q_proj.*"])
    tuned = tune(model, PARTS, None, None, freeze_include=[f"*{paddle}*"], freeze_exclude=["*mm_projector*"])
    learns = {name for name, parameter in tuned.base.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in learns} <= {"multi_modal_projector", "weight"}  # and a head of its own
    assert "model.multi_modal_projector.linear_1.weight" in learns


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model_state.pdparams", "model.safetensors"])
def test_a_file_that_is_no_weights_at_all(interleave: tuple[Path, Weights], file: str) -> None:
    folder = interleave[0]
    (folder / "model.safetensors").unlink()
    (folder / file).write_text(LFS_POINTER)
    with pytest.raises(InputError, match=f"{file} is a git-LFS pointer"):
        open_original(folder)
    (folder / file).write_text("<html>404: not found</html>")
    with pytest.raises(InputError, match=f"{file} cannot be read: .*half-downloaded"):
        open_original(folder)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_half_of_paddle_s_weights(interleave: tuple[Path, Weights], protocol: int, part: float) -> None:
    folder, weights = interleave
    (folder / "model.safetensors").unlink()
    content = pickle.dumps(paddle_form(weights, "qwen2"), protocol)
    (folder / "model_state.pdparams").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError, match="half-downloaded"):
        open_original(folder)


SETTINGS: dict[str, tuple[Any, str]] = {
    "a part of one": ('{"architectures": ["LlavaQwenFor', r"config\.json cannot be read: .*half-downloaded"),
    "a list": ("[1, 2]", r"config\.json is no model's configuration: .* got a JSON list"),
    "a number in quotes": ({"hidden_size": "32"}, "hidden_size.*expected int, got str"),
    "a type that is none": ({"torch_dtype": "auto"}, "torch_dtype 'auto'; expected float32, bfloat16, float16"),
    "pinpoints of words": ({"image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": 3}, "image_grid_pinpoints"),
    "another class of the authors'": (
        {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"},
        "is a LlavaMptForCausalLM, which Interlace does not",
    ),
    "a class of one's own": ({"architectures": "MyModel", "model_type": "mine"}, "is a mine, which Interlace does not know"),
    "a language model": ({"architectures": ["Qwen2ForCausalLM"]}, "is a language model alone, which becomes a LLaVA with --vision-tower"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_right_are_named(tmp_path: Path, interleave: tuple[Path, Weights], case: str) -> None:
    content, message = SETTINGS[case]
    text = content if isinstance(content, str) else json.dumps(original_settings("interleave") | content)
    (interleave[0] / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        to_hub(str(interleave[0]), tmp_path / "hub")


def test_a_port_s_settings_that_are_not_right_are_named(tmp_path: Path, tiny_dir: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "port")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["hidden_size"] = str(settings["text_config"]["hidden_size"])
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"hidden_size(.|\n)*expected int, got str"):
        to_original(str(folder), tmp_path / "back")


def test_the_script(tmp_path: Path, interleave: tuple[Path, Weights]) -> None:
    source, hub = str(interleave[0]), tmp_path / "hub"
    assert run("convert_checkpoint.py", "--input", source, "--output", str(hub), "--to", "hf").returncode == 0
    for words, message in (
        (("--input", source, "--output", str(hub), "--to", "hf"), "is not empty"),
        (("--input", source, "--output", str(tmp_path / "a"), "--to", "llava"), "in its authors' layout already"),
        (("--input", str(hub), "--output", str(tmp_path / "a"), "--to", "hf"), "in Hugging Face's layout already"),
        (("--input", "nobody/nothing", "--output", str(tmp_path / "a"), "--to", "hf"), "nobody/nothing is no folder here, and cannot be had from the hub"),
        (("--input", str(tmp_path), "--output", str(tmp_path / "a"), "--to", "hf"), "config.json"),
        (("--input", str(hub), "--output", str(tmp_path / "a"), "--to", "llava", "--vision-tower", "x"), "leave this out"),
    ):
        done = run("convert_checkpoint.py", *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert not (tmp_path / "a").exists()
