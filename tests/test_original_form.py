"""What the authors' code finds in a folder that we write for it: its tokenizer's files, its settings, the weights of its tower."""

import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from interlace.model import original_settings as authors
from interlace.model.conversion import to_hub, to_original
from interlace.model.loading import load_config, load_model, load_processing
from interlace.model.saving import copy_beside, save_model, save_processing
from interlace.training.publishing import PUBLISHED
from tests.test_conversion import KINDS, VOCABULARY, assert_same_model, make_model, original_settings, original_weights, paddle_form, write_original
from tests.test_template import write_llama_tokenizer

TEXTS = ("What is in the image?", "Two  cats,\n\nthree dogs: 你好 <|im_start|>user\n", "def f(x):\n    return x")
LLAVA_GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}


def llama_original(folder: Path) -> Path:
    """LLaVA-1.5 as it lies on the hub: with SentencePiece's file alone."""
    write_original(folder, "llava_v1_5", original_weights(make_model("llava_v1_5"), "llava_v1_5"))
    (folder / "tokenizer.json").unlink()
    write_llama_tokenizer(folder, True)
    (folder / "tokenizer.vocab").unlink()
    (folder / "special_tokens_map.json").write_text('{"unk_token":  "<unk>"}')
    (folder / "generation_config.json").write_text(json.dumps(LLAVA_GENERATION))
    return folder


def qwen_original(folder: Path) -> Path:
    """LLaVA-NeXT-Interleave as it lies on the hub: with every form of the tokenizer."""
    write_original(folder, "interleave", original_weights(make_model("interleave"), "interleave"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], indent=3))
    (folder / "merges.txt").write_text("#version: 0.2 \n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "added_tokens.json").write_text('{"<|im_end|>":\n 353}')
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 20, "eos_token_id": [353, 354]}')
    return folder


def write_port(original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model in hub layout as if it never had an original, with a tower and a vocabulary that the authors' code knows."""
    port = original.with_name("port")
    to_hub(str(original), port)
    shutil.rmtree(port / "llava_original")
    vision: Any = load_config(str(port)).vision_config
    geometry = (vision.model_type, vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    monkeypatch.setitem(authors._TOWERS, geometry, "openai/clip-tiny")
    monkeypatch.setattr(authors, "VOCABULARIES", (VOCABULARY,))
    return port


OWN_FILES = {llama_original: {"tokenizer.model", "special_tokens_map.json"}, qwen_original: {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"}}


@pytest.mark.parametrize("write", OWN_FILES)
def test_the_original_s_own_files_come_back(tmp_path: Path, write: Any) -> None:
    """To the bit, from a converted folder and from what was made of the original and of the converted one by training."""
    source = write(tmp_path / "original")
    to_hub(str(source), tmp_path / "hub")
    made = []
    for base in (source, tmp_path / "hub"):
        made.append(tmp_path / f"trained_{base.name}")
        made[-1].mkdir()
        save_model(load_model(str(base), torch.float32), made[-1])
        save_processing(load_processing(str(base)), made[-1])
        copy_beside(str(base), made[-1])
    for folder in (tmp_path / "hub", *made):
        assert to_original(str(folder), tmp_path / "back") == []
        names = {file.name for file in source.iterdir()} - {"model.safetensors", "config.json"}
        assert names >= OWN_FILES[write] | {"tokenizer_config.json", "generation_config.json"}
        assert {file.name for file in (tmp_path / "back").iterdir()} == names | {"model.safetensors", "config.json"}
        for name in names:
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
        assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        shutil.rmtree(tmp_path / "back")


@pytest.mark.parametrize(
    ("write", "expected"), [(llama_original, {"eos_token_id": 2, "max_length": 4096}), (qwen_original, {"eos_token_id": [353, 354], "top_k": 20})]
)
def test_how_a_model_generates_reaches_the_hub_s_layout(tmp_path: Path, write: Any, expected: dict[str, Any]) -> None:
    """LLaVA-1.5's file asks for a temperature without sampling, which transformers reads and then refuses to write."""
    source = write(tmp_path / "original")
    to_hub(str(source), tmp_path / "hub")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub").generation_config
    found.save_pretrained(tmp_path / "again")
    shutil.copy(source / "generation_config.json", tmp_path / "hub")  # as a port may have it
    for settings in (found, load_model(str(source), torch.float32).generation_config, load_model(str(tmp_path / "hub"), torch.float32).generation_config):
        assert {name: getattr(settings, name) for name in expected} == expected
        settings.save_pretrained(tmp_path / "again")


def test_what_is_kept_is_published_with_the_model(tmp_path: Path) -> None:
    to_hub(str(qwen_original(tmp_path / "original")), tmp_path / "hub")
    kept = [str(file.relative_to(tmp_path / "hub")) for file in (tmp_path / "hub" / "llava_original").iterdir()]
    assert len(kept) == 9
    assert list(filter_repo_objects(kept, allow_patterns=list(PUBLISHED))) == kept


def test_a_port_s_tokenizer_in_its_older_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = write_port(qwen_original(tmp_path / "first"), monkeypatch)
    expected = AutoTokenizer.from_pretrained(port)
    assert to_original(str(port), tmp_path / "back") == []
    merges = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > 50
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    assert [AutoTokenizer.from_pretrained(tmp_path / "back")(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]
    (tmp_path / "back" / "tokenizer.json").unlink()  # what is left is what a slow tokenizer reads
    assert (tmp_path / "back" / "merges.txt").read_text().split("\n")[0] == "#version: 0.2"
    added = json.loads((tmp_path / "back" / "added_tokens.json").read_text())
    assert added == {token: expected.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<image>")}
    slow = Qwen2Tokenizer(vocab=str(tmp_path / "back" / "vocab.json"), merges=str(tmp_path / "back" / "merges.txt"))
    for text in (TEXTS[0], TEXTS[2]):
        assert slow.convert_ids_to_tokens(slow(text)["input_ids"]) == expected.convert_ids_to_tokens(expected(text)["input_ids"])


@pytest.mark.parametrize("has_file", [True, False])
def test_a_port_with_sentencepiece_s_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_file: bool) -> None:
    """Its file is handed on to what is trained from it; nothing else can stand in for it."""
    original = llama_original(tmp_path / "first")
    port, content = write_port(original, monkeypatch), (original / "tokenizer.model").read_bytes()
    if has_file:
        shutil.copy(original / "tokenizer.model", port)
    (tmp_path / "trained").mkdir()
    save_model(load_model(str(port), torch.float32), tmp_path / "trained")
    save_processing(load_processing(str(port)), tmp_path / "trained")
    copy_beside(str(port), tmp_path / "trained")
    notes = to_original(str(tmp_path / "trained"), tmp_path / "back")
    if has_file:
        assert notes == []
        assert (tmp_path / "back" / "tokenizer.model").read_bytes() == content
    else:
        assert len(notes) == 1
        assert notes[0].startswith("tokenizer.model is missing: ")
    assert not (tmp_path / "back" / "merges.txt").exists()


@pytest.mark.parametrize("kind", ["interleave", "llava_v1_5"])
def test_a_tuned_tower_is_not_dropped(tmp_path: Path, kind: str) -> None:
    """The authors' towers keep their published weights unless the settings say that the file has others."""
    source = write_original(tmp_path / "original", kind, original_weights(make_model(kind), kind))
    to_hub(str(source), tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    weights["language_model.model.norm.weight"] += 1
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    to_original(str(tmp_path / "hub"), tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == original_settings(kind)
    weights["vision_tower.vision_model.encoder.layers.1.layer_norm1.bias"] += 1
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    to_original(str(tmp_path / "hub"), tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text()) == {**original_settings(kind), "unfreeze_mm_vision_tower": True}


CLIP = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model", "num_attention_heads": 16}
CLIP |= {"num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}
SIGLIP = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16}
SIGLIP |= {"num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False}
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * height, 384 * width] for height in range(1, 7) for width in range(1, 7)]
VICUNA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064}
QWEN1_5 = {"hidden_size": 1024, "intermediate_size": 2816, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 16, "num_hidden_layers": 24}
QWEN1_5 |= {"num_key_value_heads": 16, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 152000}
QWEN2 = {"bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24, "model_type": "qwen2"}
QWEN2 |= {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0, "tie_word_embeddings": True}
QWEN2 |= {"vocab_size": 152000, "use_sliding_window": False, "sliding_window": 32768}
LLAMA3 = {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_key_value_heads": 8}
LLAMA3 |= {"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128320}
YI = {"hidden_size": 7168, "intermediate_size": 20480, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 56}
YI |= {"num_hidden_layers": 60, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "vocab_size": 64064}
MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05}
MISTRAL |= {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064}
TO_DEFAULT, TO_FULL = ({"vision_feature_layer": layer, "vision_feature_select_strategy": name} for layer, name in ((-2, "default"), (-1, "full")))
NEXT = {"model_type": "llava_next", "image_grid_pinpoints": NEXT_PINPOINTS, "vision_config": CLIP, "torch_dtype": "float16", **TO_DEFAULT}
ONEVISION = {"model_type": "llava_onevision", "image_grid_pinpoints": ONEVISION_PINPOINTS, "vision_aspect_ratio": "anyres_max_9", "tie_word_embeddings": True}
FROM_CLIP = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
FROM_SIGLIP = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": 1152, "mm_vision_select_layer": -2}
TILED = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": NEXT_PINPOINTS}
ALWAYS = {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "unfreeze_mm_vision_tower": True}
# name -> the port's config.json (of it what says how the model is built), and what the release's own has that its authors' code reads
PORTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava-1.5-7b": (
        {"model_type": "llava", "text_config": VICUNA, "vision_config": CLIP, "torch_dtype": "float16", **TO_DEFAULT},
        {"architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 32, "rms_norm_eps": 1e-05, "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "float16", **FROM_CLIP}
        | {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
    ),
    "llava-v1.6-vicuna-7b": (
        {**NEXT, "text_config": VICUNA},
        {"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 32000, "rope_theta": 10000.0, **FROM_CLIP, **TILED},
    ),
    "llava-v1.6-mistral-7b": (
        {**NEXT, "text_config": MISTRAL},
        {"architectures": ["LlavaMistralForCausalLM"], "vocab_size": 32000, "sliding_window": None, "rope_theta": 1000000.0, **FROM_CLIP, **TILED},
    ),
    "llava-v1.6-34b": ({**NEXT, "text_config": YI}, {"vocab_size": 64000, "hidden_size": 7168, "rope_theta": 5000000.0, **FROM_CLIP, **TILED}),
    "llama3-llava-next-8b": ({**NEXT, "text_config": LLAMA3}, {"vocab_size": 128256, "rope_theta": 500000.0, **FROM_CLIP, **TILED}),
    "llava-interleave-qwen-0.5b": (
        {"model_type": "llava", "text_config": QWEN1_5, "vision_config": SIGLIP, "torch_dtype": "float16", "tie_word_embeddings": True, **TO_FULL},
        {"architectures": ["LlavaQwenForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "num_key_value_heads": 16, "rope_theta": 1000000.0}
        | {"tie_word_embeddings": True, "max_position_embeddings": 32768, "mm_patch_merge_type": "flat", **FROM_SIGLIP},
    ),
    "llava-onevision-qwen2-0.5b-ov": (
        {**ONEVISION, "text_config": QWEN2, "vision_config": SIGLIP, "torch_dtype": "float16", **TO_FULL},
        {"architectures": ["LlavaQwenForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "num_key_value_heads": 2, "tie_word_embeddings": True}
        | {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": ONEVISION_PINPOINTS}
        | {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token", **FROM_SIGLIP},
    ),
}


@pytest.mark.parametrize("name", PORTS)
def test_the_settings_of_a_port_are_those_of_the_release(tmp_path: Path, name: str) -> None:
    config, expected = PORTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = authors.port_settings(load_config(str(tmp_path)), tmp_path, pads_images=name == "llava-1.5-7b")
    json.dumps(settings)
    assert {key: settings.get(key, "missing") for key in expected | ALWAYS} == expected | ALWAYS
    assert "rope_scaling" not in settings


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),  # vicuna-7b-v1.5-16k, as transformers before 4.43 checks it
        ({"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, {"rope_type": "yarn", "factor": 4.0}),
    ],
)
def test_long_contexts_go_there_and_back(tmp_path: Path, rope: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NEXT, "text_config": VICUNA | {"rope_scaling": rope}}))
    config = load_config(str(tmp_path))
    settings = authors.port_settings(config, tmp_path, pads_images=False)
    assert settings["rope_scaling"].items() >= expected.items()
    again = LlamaConfig(**{key: settings[key] for key in ("rope_theta", "rope_scaling", "max_position_embeddings")})
    for found in (again.rope_parameters, config.text_config.rope_parameters):
        found.pop("type", None)  # which transformers keeps beside "rope_type"
    assert again.rope_parameters == config.text_config.rope_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_becomes_an_original_and_again_the_same_port(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything that was kept of an original, and without the rows that the ports add."""
    model = make_model(kind)
    weights = original_weights(model, kind)
    port = write_port(write_original(tmp_path / "first", kind, weights), monkeypatch)
    to_original(str(port), tmp_path / "back")
    weights.pop("model.image_newline" if kind == "interleave" else "", None)  # which the port does not have
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    to_hub(str(tmp_path / "back"), tmp_path / "again")
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval(), model)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((port / name).read_text()), name


def test_a_mistral_without_a_window_keeps_none(tmp_path: Path) -> None:
    settings = original_settings("llava_v1_6") | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "sliding_window": None}
    folder = write_original(tmp_path / "original", "llava_v1_6", original_weights(make_model("llava_v1_6"), "llava_v1_6"), settings)
    text: Any = load_config(str(folder)).text_config
    assert (text.model_type, text.sliding_window) == ("mistral", None)


@pytest.mark.parametrize("is_published", [True, False])
def test_a_language_model_with_a_tower_is_what_the_authors_code_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_published: bool) -> None:
    """What its projector and tower are made from, and no path of this machine."""
    weights, start = original_weights(make_model("llava_v1_5"), "llava_v1_5"), "model.vision_tower.vision_tower."
    (tmp_path / "my_tower").mkdir()
    save_file({name.removeprefix(start): tensor.contiguous() for name, tensor in weights.items() if start in name}, tmp_path / "my_tower" / "model.safetensors")
    settings = {name: value for name, value in original_settings("llava_v1_5").items() if not name.startswith(("mm_", "image_"))}
    alone = {name: tensor for name, tensor in weights.items() if not name.startswith(("model.vision_tower", "model.mm_projector"))}
    folder = write_original(tmp_path / "vicuna", "llava_v1_5", alone, settings | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    if is_published:
        monkeypatch.setitem(authors._TOWERS, ("clip_vision_model", 64, 3, 56, 14), "openai/clip-tiny")
    to_hub(str(folder), tmp_path / "hub", vision_tower=str(tmp_path / "my_tower"))
    to_original(str(tmp_path / "hub"), tmp_path / "back")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = {"mm_hidden_size": 64, "mm_vision_tower": "openai/clip-tiny" if is_published else "my_tower", "model_type": "llava_llama", **ALWAYS}
    assert {name: found.get(name) for name in expected} == expected
    assert not [file for file in tmp_path.glob("[hb]*/**/*.json") if str(tmp_path) in file.read_text()]


QWEN_TILES: dict[str, tuple[type, dict[str, Any]]] = {
    "llava_next": (CLIPVisionConfig, {"hidden_size": 64}),  # llava-next-72b and -110b
    "llava": (SiglipVisionConfig, {"hidden_size": 72, "vision_use_head": False}),  # LLaVA-NeXT-Interleave
}


@pytest.mark.parametrize("model_type", QWEN_TILES)
def test_the_tower_says_whether_a_qwen_takes_tiles(tmp_path: Path, model_type: str) -> None:
    """Settings of tiles go with CLIP towers, LLaVA-NeXT; of the same settings on SigLIP the ports made plain LLaVA."""
    kind, shape = QWEN_TILES[model_type]
    tower = kind(**shape, num_hidden_layers=3, num_attention_heads=1, image_size=56, patch_size=14, intermediate_size=24)
    model = make_model("interleave")
    weights = {name: tensor for name, tensor in original_weights(model, "interleave").items() if "vision_tower" not in name}
    for name, tensor in AutoModel.from_config(tower).state_dict().items():
        weights[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    weights["model.mm_projector.0.weight"] = torch.randn(32, shape["hidden_size"])
    settings = original_settings("interleave") | {"mm_patch_merge_type": "spatial_unpad", "mm_hidden_size": shape["hidden_size"]}
    folder = write_original(tmp_path / "original", "interleave", weights, settings)
    to_hub(str(folder), tmp_path / "hub")
    found: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "hub")
    assert (found.config.model_type, found.config.text_config.model_type) == (model_type, "qwen2")
    if model_type == "llava_next":
        assert torch.equal(found.model.image_newline, torch.arange(32.0))
        assert found.config.image_grid_pinpoints == settings["image_grid_pinpoints"]
    to_original(str(tmp_path / "hub"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights) - {name for name in weights if "position_ids" in name}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.items())


def paddle_folder(folder: Path) -> Path:
    """LLaVA-1.5 with the names of files in PaddleMIX's published folder, whose tower lies elsewhere; its LlamaTokenizer calls tokenizer.model otherwise."""
    llama_original(folder)
    (folder / "tokenizer.model").rename(folder / "sentencepiece.bpe.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LLavaTokenizer"}))
    content = paddle_form(load_file(folder / "model.safetensors"), "llama")
    (folder / "model.safetensors").unlink()
    (folder / "tower").mkdir()
    tower = {name.partition("vision_tower.vision_tower.")[2]: content.pop(name) for name in list(content) if "vision_tower" in name}
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(content, 4))
    (folder / "tower" / "model_state.pdparams").write_bytes(pickle.dumps(tower, 4))
    return folder


def test_a_folder_of_paddlemix_has_its_tokenizer_and_a_tower_of_its_own(tmp_path: Path) -> None:
    """And goes to the authors' code with the names that transformers reads."""
    folder = paddle_folder(tmp_path / "paddle")
    pieces = SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    to_hub(str(folder), tmp_path / "hub", vision_tower=str(folder / "tower"))
    model: Any = make_model("llava_v1_5")
    model.config.image_token_index = model.config.image_token_id = len(pieces)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    assert_same_model(load_model(str(tmp_path / "hub"), torch.float32).eval(), model)
    to_original(str(tmp_path / "hub"), tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (folder / "sentencepiece.bpe.model").read_bytes()
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert not [file for file in tmp_path.glob("[hb]*/**/*.json") if tempfile.gettempdir() in file.read_text()]
    for found in (AutoTokenizer.from_pretrained(tmp_path / "hub"), LlamaTokenizer.from_pretrained(tmp_path / "back")):
        assert [found(text)["input_ids"] for text in TEXTS] == [[1, *pieces.encode(text)] for text in TEXTS]
