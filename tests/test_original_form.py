"""What the authors' code finds in a folder that we write for it: its tokenizer's files, its settings, the weights of its tower."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2Tokenizer

from interlace.model import original_settings as authors
from interlace.model.conversion import to_hub, to_original
from interlace.model.loading import load_config, load_model, load_processing
from interlace.model.saving import copy_beside, save_model, save_processing
from interlace.training.publishing import PUBLISHED
from tests.test_conversion import VOCABULARY, make_model, original_settings, original_weights, write_original
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
