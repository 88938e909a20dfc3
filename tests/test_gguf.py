"""GGUF files: read back with llama.cpp's own reader, and run by llama.cpp itself (slow) against transformers.

LLAMA_CPP_PYTHON names an interpreter that has llama-cpp-python; without it one is built, for about ten minutes on two cores.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase, SiglipImageProcessorPil

from interlace.data.sample import Image, Text, Turn
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.model.conversion import to_hub
from interlace.model.llava import llava_features
from interlace.model.loading import load_model, load_processing
from interlace.model.processing import Processing
from interlace.model.saving import save_model, save_processing
from tests.conftest import ROOT, tiny_config
from tests.test_conversion import make_model, original_weights, write_original
from tests.test_scripts import run
from tests.test_slow import make_environment
from tests.test_template import CORPUS, pieces, write_llama_tokenizer

gguf = pytest.importorskip("gguf", reason='needs gguf: pip install -e ".[gguf]"')
from interlace.model.gguf_files import to_gguf  # noqa: E402
from interlace.model.gguf_vocabulary import read_vocabulary  # noqa: E402

KINDS = ("interleave", "llava_v1_5")
BLOCK = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
TEXT_BLOCK = {**BLOCK, "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TEXT_BLOCK |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
VISION_BLOCK = {**BLOCK, "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
TEXT = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
VISION = {"model.vision_tower.embeddings.class_embedding": "v.class_embd", "model.vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight"}
for end in ("weight", "bias"):
    VISION |= {f"model.vision_tower.embeddings.patch_embedding.{end}": f"v.patch_embd.{end}", f"model.vision_tower.pre_layrnorm.{end}": f"v.pre_ln.{end}"}
    VISION |= {f"model.multi_modal_projector.linear_{1 + number // 2}.{end}": f"mm.{number}.{end}" for number in (0, 2)}


def write_source(folder: Path, kind: str) -> Path:
    """A model in its authors' layout, with the tokenizer of its kind."""
    source = write_original(folder / kind, kind, original_weights(make_model(kind), kind))
    if kind == "llava_v1_5":
        for pattern in ("tokenizer*", "vocab*", "merges*"):
            for file in source.glob(pattern):
                file.unlink()
        write_llama_tokenizer(source, is_legacy=False)
    return source


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_source(tmp_path_factory.mktemp("source"), kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(sources: dict[str, Path], kind: str) -> Path:
    return sources[kind]


def values_of(tensor: Any) -> np.ndarray:
    """As stored; bfloat16 as float32."""
    if tensor.tensor_type != gguf.GGMLQuantizationType.BF16:
        return np.asarray(tensor.data)
    bits = np.asarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape([int(size) for size in reversed(tensor.shape)])


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and other fields of both files."""
    readers = [gguf.GGUFReader(folder / name) for name in ("model.gguf", "mmproj.gguf")]
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    assert len(tensors) == sum(len(reader.tensors) for reader in readers)
    return tensors, {f"{number} {name}": field.contents() for number, reader in enumerate(readers) for name, field in reader.fields.items()}


def neighbours(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head with its halves dealt out in turn, by a loop: pairs that are rotated together lie side by side."""
    size, rows = len(values) // heads, []
    for head in range(heads):
        for i in range(size // 2):
            rows += [values[head * size + i], values[head * size + size // 2 + i]]
    return torch.stack(rows)


def expected_tensors(model: PreTrainedModel, kind: str) -> dict[str, torch.Tensor]:
    """By llama.cpp's names, written out; blocks behind the feature layer, and norms that nothing reads, are left out."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        block = re.fullmatch(r"model\.(language_model|vision_tower)\.(?:encoder\.)?layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if block:
            part, number, inside, end = block.groups()
            if part == "vision_tower" and kind == "llava_v1_5" and number == "2":
                continue
            if kind == "llava_v1_5" and inside in ("self_attn.q_proj", "self_attn.k_proj") and part == "language_model":
                tensor = neighbours(tensor, 4 if "q_proj" in inside else 2)
            found[f"blk.{number}.{TEXT_BLOCK[inside]}.{end}" if part == "language_model" else f"v.blk.{number}.{VISION_BLOCK[inside]}.{end}"] = tensor
        elif not name.startswith("model.vision_tower.post_layernorm") and not (name == "lm_head.weight" and kind == "interleave"):
            found[(TEXT | VISION)[name]] = tensor
    return found


@pytest.mark.parametrize("layout", ["authors", "hub"])
def test_the_files_hold_the_model(tmp_path: Path, source: Path, kind: str, layout: str) -> None:
    if layout == "hub":
        to_hub(str(source), tmp_path / "hub")
        source = tmp_path / "hub"
    to_gguf(str(source), tmp_path / "out")
    tensors, fields = read(tmp_path / "out")
    expected = expected_tensors(load_model(str(source), torch.float32), kind)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert [int(size) for size in tensor.shape] == list(reversed(expected[name].shape)), name
        assert np.array_equal(values_of(tensor), expected[name].numpy()), name
    is_clip = kind == "llava_v1_5"
    text = "llama" if is_clip else "qwen2"
    mean = [0.48145466, 0.4578275, 0.40821073] if is_clip else [0.5, 0.5, 0.5]
    deviation = [0.26862954, 0.26130258, 0.27577711] if is_clip else [0.5, 0.5, 0.5]
    wanted = {
        **{"0 general.architecture": text, "0 general.type": "model", "0 general.file_type": 0, f"0 {text}.block_count": 2, f"0 {text}.context_length": 512},
        **{f"0 {text}.embedding_length": 32, f"0 {text}.feed_forward_length": 48, f"0 {text}.attention.head_count": 4, f"0 {text}.attention.head_count_kv": 2},
        **{f"0 {text}.attention.key_length": 8, f"0 {text}.attention.value_length": 8, f"0 {text}.rope.dimension_count": 8, f"0 {text}.vocab_size": 1088},
        **{f"0 {text}.rope.freq_base": 10000.0, f"0 {text}.attention.layer_norm_rms_epsilon": pytest.approx(1e-6, rel=1e-6)},
        **{"1 general.architecture": "clip", "1 general.type": "mmproj", "1 clip.has_vision_encoder": True, "1 clip.projector_type": "mlp"},
        **{"1 clip.vision.block_count": 2 if is_clip else 3, "1 clip.vision.feature_layer": [2 if is_clip else 3], "1 clip.use_gelu": not is_clip},
        **{"1 clip.vision.embedding_length": 64 if is_clip else 72, "1 clip.vision.feed_forward_length": 24, "1 clip.vision.attention.head_count": 1},
        **{"1 clip.vision.image_size": 56, "1 clip.vision.patch_size": 14, "1 clip.vision.projection_dim": 32},
        "1 clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5 if is_clip else 1e-6, rel=1e-6),
        **{"1 clip.vision.image_mean": pytest.approx(mean, rel=1e-6), "1 clip.vision.image_std": pytest.approx(deviation, rel=1e-6)},
    }
    assert {name: fields[name] for name in wanted} == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_in_16_bits_and_vectors_in_32(tmp_path: Path, source: Path, kind: str, dtype: str) -> None:
    kept = getattr(torch, dtype)
    to_gguf(str(source), tmp_path / "out", kept)
    tensors, fields = read(tmp_path / "out")
    assert fields["0 general.file_type"] == fields["1 general.file_type"] == {"float16": 1, "bfloat16": 32}[dtype]
    for name, values in expected_tensors(load_model(str(source), torch.float32), kind).items():
        wide = values.dim() == 1 or name == "v.position_embd.weight" or (name == "v.patch_embd.weight" and dtype == "bfloat16")
        assert tensors[name].tensor_type.name == ("F32" if wide else {"float16": "F16", "bfloat16": "BF16"}[dtype]), name
        assert np.array_equal(values_of(tensors[name]).astype(np.float32), values.to(torch.float32 if wide else kept).float().numpy()), name


def test_as_they_are_stored_and_what_does_not_fit(tmp_path: Path, source: Path, kind: str) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    to_gguf(str(folder), tmp_path / "stored")
    assert read(tmp_path / "stored")[0]["blk.1.ffn_up.weight"].tensor_type.name == "BF16"
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds values that are not finite in float16"):
        to_gguf(str(folder), tmp_path / "half", torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "stored"]


def test_qwen_s_vocabulary(qwen: PreTrainedTokenizerBase) -> None:
    vocabulary = read_vocabulary(qwen, 152000)
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(set(vocabulary.tokens)) == 152000
    assert vocabulary.tokens[: len(qwen)] == qwen.convert_ids_to_tokens(list(range(len(qwen))))
    assert [vocabulary.types[number].name for number in (0, 151642, 151643, 151645, 151646, 151647)] == ["NORMAL"] * 2 + ["CONTROL"] * 3 + ["UNUSED"]
    assert len(vocabulary.merges) == 151387
    assert vocabulary.merges[:2] == ["Ġ Ġ", "ĠĠ ĠĠ"]
    assert vocabulary.scores == []


def test_llama_s_vocabulary_has_sentencepiece_s_scores(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_llama_tokenizer(tmp_path, is_legacy=False))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model, vocabulary = pieces(tokenizer), read_vocabulary(tokenizer, 448)
    assert vocabulary.tokens[:420] == [model.IdToPiece(number) for number in range(420)]
    joined = [number for number in range(420) if vocabulary.types[number].name == "NORMAL" and vocabulary.scores[number] > -1e4]
    assert len(joined) > 50
    by_score = sorted(joined, key=lambda number: -vocabulary.scores[number])
    assert by_score == sorted(joined, key=lambda number: -model.GetScore(number))
    kinds = ["UNKNOWN", "CONTROL", "CONTROL", "BYTE", "BYTE", "CONTROL", "UNUSED"]
    assert [vocabulary.types[number].name for number in (0, 1, 2, 3, 258, 420, 421)] == kinds


def test_the_tokenizer_s_fields_and_the_trained_template(tmp_path: Path, source: Path, kind: str) -> None:
    to_gguf(str(source), tmp_path / "out")
    fields, processing = read(tmp_path / "out")[1], load_processing(str(source))
    tokenizer, is_llama = processing.tokenizer, kind == "llava_v1_5"
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} if is_llama else {"eos_token_id": 353}
    for name, number in ids.items():
        assert fields[f"0 tokenizer.ggml.{name}"] == number
    assert fields["0 tokenizer.ggml.model"] == ("llama" if is_llama else "gpt2")
    assert fields["0 tokenizer.ggml.pre"] == ("default" if is_llama else "qwen2")
    assert fields["0 tokenizer.ggml.add_bos_token"] is is_llama
    assert len(fields["0 tokenizer.ggml.tokens"]) == len(fields["0 tokenizer.ggml.token_type"]) == 1088
    assert ("0 tokenizer.ggml.merges" in fields, "0 tokenizer.ggml.scores" in fields) == (not is_llama, is_llama)
    messages = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "And now?"}]
    plain = jinja2.Environment().from_string(fields["0 tokenizer.chat_template"])  # which knows no {% generation %}
    tokenizer.chat_template = processing.template.jinja()
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert plain.render(messages=messages, add_generation_prompt=True, eos_token=tokenizer.eos_token) == expected


OLLAMA = {
    "interleave": (
        'FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\nSYSTEM """Look."""\nPARAMETER stop "<|im_end|>"\n'
    ),
    "llava_v1_5": (
        'FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }} {{ else if eq .Role "user" }}'
        'USER: {{ .Content }} {{ else }}ASSISTANT: {{ .Content }}</s>{{ end }}{{ end }}ASSISTANT:"""\nSYSTEM """Look."""\nPARAMETER stop "</s>"\n'
    ),
}


def test_ollama_s_file_has_the_trained_prompt(tmp_path: Path, source: Path, kind: str) -> None:
    to_hub(str(source), tmp_path / "hub")
    settings = json.loads((tmp_path / "hub" / "prompt.json").read_text())
    (tmp_path / "hub" / "prompt.json").write_text(json.dumps(settings | {"system_prompt": "Look."}))
    (tmp_path / "hub" / "LICENSE").write_text("for research")
    to_gguf(str(tmp_path / "hub"), tmp_path / "out")
    assert (tmp_path / "out" / "Modelfile").read_text() == OLLAMA[kind]
    assert (tmp_path / "out" / "LICENSE").read_text() == "for research"
    (tmp_path / "hub" / "prompt.json").write_text(json.dumps(settings | {"prompt_style": "plain"}))
    notes = to_gguf(str(tmp_path / "hub"), tmp_path / "captions")
    assert any("No Modelfile" in note for note in notes)
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == ["LICENSE", "mmproj.gguf", "model.gguf"]


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path, sources: dict[str, Path]) -> None:
    squashed, padded = (to_gguf(str(sources[kind]), tmp_path / kind) for kind in KINDS)
    assert [[word for word in ("pads images to squares", "issues/25814", "later rounds") if word in note] for note in squashed] == [["pads images to squares"]]
    assert [[word for word in ("pads images to squares", "issues/25814", "later rounds") if word in note] for note in padded] == [
        ["issues/25814"],
        ["later rounds"],
    ]


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            part, _, inside = name.partition("__")
            (settings[part] if inside else settings).update({inside or name: value})
        (folder / "config.json").write_text(json.dumps(settings))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return changed


def other_words(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}))


NORM = "language_model.model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two feature layers": (change_config(vision_feature_layer=[-2, -1]), r"vision_feature_layer is <class 'list'>, expected <class 'int'>"),
    "another activation": (change_config(projector_hidden_act="relu"), "projector_hidden_act is 'relu', expected 'gelu'"),
    "a window": (change_config(text_config__use_sliding_window=True), "text_config.use_sliding_window is True, expected False"),
    "a missing weight": (change_weights(lambda weights: weights.pop(NORM)), f"{NORM} is missing"),
    "a wrong shape": (change_weights(lambda weights: weights.update({NORM: torch.ones(31)})), rf"{NORM} is \[31\], expected \[32\]"),
    "a weight too many": (change_weights(lambda weights: weights.update({"lora.weight": torch.ones(3)})), "lora.weight has no place"),
    "another tokenizer": (other_words, "would cut text into other tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_form_is_refused(tmp_path: Path, sources: dict[str, Path], case: str) -> None:
    change, message = REFUSED[case]
    to_hub(str(sources["interleave"]), tmp_path / "hub")
    change(tmp_path / "hub")
    with pytest.raises(InputError, match=message):
        to_gguf(str(tmp_path / "hub"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


@pytest.mark.parametrize("kind", ["llava_v1_6", "onevision"])
def test_models_that_cut_images_are_refused(tmp_path: Path, kind: str) -> None:
    folder = write_original(tmp_path / "original", kind, original_weights(make_model(kind), kind))
    with pytest.raises(InputError, match="its images are cut into tiles"):
        to_gguf(str(folder), tmp_path / "out")


def test_more_tokens_than_rows(qwen: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="a token of id 151646, and the embeddings have 151646 rows"):
        read_vocabulary(qwen, 151646)


def test_the_script(tmp_path: Path, sources: dict[str, Path]) -> None:
    source = str(sources["interleave"])
    done = run("convert_checkpoint.py", "--input", source, "--output", str(tmp_path / "out"), "--to", "gguf", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp pads images to squares" in done.stdout
    assert read(tmp_path / "out")[0]["token_embd.weight"].tensor_type.name == "F16"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for words, message in (
        (("--input", source, "--to", "hf", "--dtype", "float16"), "--dtype goes with --to gguf only"),
        (("--input", source, "--to", "gguf", "--vision-tower", "x"), "--vision-tower goes with --to hf only"),
        (("--input", str(tmp_path / "adapter"), "--to", "gguf"), "merge it first: python train/merge_adapter.py --adapter-path"),
    ):
        done = run("convert_checkpoint.py", *words, "--output", str(tmp_path / "other"))
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert not (tmp_path / "other").exists()


def test_without_the_package(tmp_path: Path, sources: dict[str, Path]) -> None:
    code = "import runpy, sys; sys.modules['gguf'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = ["convert_checkpoint.py", "--input", sources["interleave"], "--output", tmp_path / "out", "--to", "gguf"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT / "train", capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert 'pip install -e ".[gguf]"' in done.stderr


# --- llama.cpp itself ---


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has llama-cpp-python."""
    if "LLAMA_CPP_PYTHON" in os.environ:
        return os.environ["LLAMA_CPP_PYTHON"]
    build = {
        "CMAKE_ARGS": "-DGGML_OPENMP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1",
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
    }
    return str(make_environment(tmp_path_factory.mktemp("llama_cpp"), ["numpy", "llama-cpp-python==0.3.36"], timeout_seconds=3600, variables=build))


def ask(interpreter: str, folder: Path, **request: Any) -> dict[str, np.ndarray]:
    """See `llama_cpp_reader`."""
    np.savez(folder / "request.npz", **request)
    command = [interpreter, ROOT / "tests" / "llama_cpp_reader.py", folder, folder / "request.npz", folder / "answer.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "answer.npz"))


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it on CPUs: the tanh form, or CLIP's quick one, looked up by float16 and kept as float16."""

    def __init__(self, quick: bool):
        super().__init__()
        self.quick = quick

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        half = values.half().float()
        if self.quick:
            return (half * torch.sigmoid(1.702 * half)).half().float()
        found = F.gelu(half, approximate="tanh").half().float()
        return torch.where(values <= -10, torch.zeros_like(values), torch.where(values >= 10, values, found))


def with_llama_cpp_s_arithmetic(model: Any, class_behind: bool) -> Any:
    """The same model with llama.cpp's GELU, its first convolution in float16, and, where its defect is to be shown, CLIP's class token behind the patches."""
    tower, is_clip = model.model.vision_tower, model.config.vision_config.model_type == "clip_vision_model"
    for module in tower.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = TableGelu(is_clip)
    model.model.multi_modal_projector.act = TableGelu(quick=False)
    embeddings = tower.embeddings
    convolution = embeddings.patch_embedding
    convolution.weight.data = convolution.weight.data.half().float()
    convolution.register_forward_pre_hook(lambda _, inputs: (inputs[0].half().float(),))

    def embed(pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        patches = convolution(pixels).flatten(2).transpose(1, 2)
        last = embeddings.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, last], 1) + embeddings.position_embedding.weight

    if class_behind:
        embeddings.forward = embed
    return model


def image_embeddings(model: Any, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.model.multi_modal_projector(llava_features(model.config, model.model.vision_tower, pixels, ())).numpy()


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def expanded(ids: list[int], image_token: int, count: int) -> list[int]:
    return [other for token in ids for other in ([-1] * count if token == image_token else [token])]


@pytest.mark.slow
def test_llama_cpp_computes_the_same(tmp_path: Path, source: Path, kind: str, llama_cpp: str) -> None:
    """Ids and logits of text; ids, embeddings and logits of a prompt with two images, rendered from the template in the file. Float32; see the tolerances."""
    to_gguf(str(source), tmp_path / "out")
    processing, model = load_processing(str(source)), load_model(str(source), torch.float32).eval()
    image_token = processing.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    pictures = [np.random.default_rng(number).integers(0, 255, (56, 56, 3), np.uint8) for number in range(2)]
    turns = [Turn("user", (Text("Which? "), Image("a"), Text("\nor "), Image("b"), Text(" is Two cats? 33 你好")))]
    plain = jinja2.Environment().from_string(read(tmp_path / "out")[1]["0 tokenizer.chat_template"])
    content = [{"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text} for part in turns[0].parts]
    prompt = plain.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True).replace(image_token, "<__media__>")
    ids = np.array(processing.template.text_ids("What is in the image? Two cats."))
    found = ask(llama_cpp, tmp_path / "out", ids=ids, prompt_0=prompt, image_0_0=pictures[0], image_0_1=pictures[1])
    assert found["prompt_0"].tolist() == expanded(processing.template.encode_prompt(turns), model.config.image_token_id, 16)
    full = torch.tensor([[model.config.image_token_id if token == -1 else token for token in found["prompt_0"].tolist()]])
    pixels = processing.process_images([PIL.Image.fromarray(picture) for picture in pictures])
    with torch.no_grad():
        assert gap(found["logits"], model(input_ids=torch.tensor(ids)[None]).logits[0].numpy()) < 1e-5
    embeddings = np.stack([found["image_0_0"], found["image_0_1"]])
    exact = image_embeddings(model, pixels)
    gaps = []
    for class_behind in (False, True) if kind == "llava_v1_5" else (False,):  # releases differ in this, see github.com/ggml-org/llama.cpp/issues/25814
        same = with_llama_cpp_s_arithmetic(load_model(str(source), torch.float32).eval(), class_behind)
        with torch.no_grad():
            logits = same(input_ids=full, pixel_values=pixels).logits[0, -1].numpy()
        gaps.append((gap(embeddings, image_embeddings(same, pixels)), gap(found["logits_0"], logits), class_behind))
    nearest = min(gaps)
    assert nearest[0] < 3e-4
    assert nearest[1] < 1e-4
    if not nearest[2]:
        assert gap(embeddings, exact) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_cpp_reads_16_bits(tmp_path: Path, sources: dict[str, Path], llama_cpp: str, dtype: str) -> None:
    source, kept = str(sources["interleave"]), getattr(torch, dtype)
    to_gguf(source, tmp_path / "out", kept)
    model = load_model(source, torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kept).float()
    picture = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
    found = ask(llama_cpp, tmp_path / "out", ids=np.arange(20), prompt_0="<__media__>?", image_0_0=picture)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(20)[None]).logits[0].numpy()
    assert gap(found["logits"], logits) < 2e-2  # llama.cpp rounds what meets a matrix to the matrix's type
    pixels = load_processing(source).process_images([PIL.Image.fromarray(picture)])
    assert gap(found["image_0_0"], image_embeddings(model, pixels)[0]) < 5e-2


@pytest.mark.slow
def test_llama_cpp_reads_the_real_qwen_tokenizer(tmp_path: Path, qwen: PreTrainedTokenizerBase, llama_cpp: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(qwen)
    config.text_config.vocab_size = 152000
    model = LlavaForConditionalGeneration(config).eval()
    (tmp_path / "hub").mkdir()
    save_model(model, tmp_path / "hub")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    save_processing(Processing(qwen, images, ChatTemplate(qwen, config.image_token_id), config), tmp_path / "hub")
    to_gguf(str(tmp_path / "hub"), tmp_path / "out")
    texts = {f"text_{number}": text for number, text in enumerate((*CORPUS.split("\n"), "I'VE  3333 \n\n\t x=[1,2]\r\n 图片和文字。Ünï🚀 <|im_start|>user\n"))}
    ids = np.array(qwen(texts["text_0"]).input_ids)
    found = ask(llama_cpp, tmp_path / "out", **texts, ids=ids)
    assert {name: found[name].tolist() for name in texts} == {name: qwen(text).input_ids for name, text in texts.items()}
    with torch.no_grad():
        assert gap(found["logits"], model(input_ids=torch.tensor(ids)[None]).logits[0].numpy()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("is_legacy", [True, False])
def test_llama_cpp_reads_a_second_round_as_legacy_tokenizers_do(tmp_path: Path, sources: dict[str, Path], llama_cpp: str, is_legacy: bool) -> None:
    turns = [Turn("user", (Text("What is this?"),)), Turn("assistant", (Text("Two cats"),)), Turn("user", (Text("USER dogs"),))]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    source = shutil.copytree(sources["llava_v1_5"], tmp_path / "source")
    write_llama_tokenizer(source, is_legacy)
    notes = to_gguf(str(source), tmp_path / "out")
    plain = jinja2.Environment().from_string(read(tmp_path / "out")[1]["0 tokenizer.chat_template"])
    found = ask(llama_cpp, tmp_path / "out", text_0=plain.render(messages=messages, add_generation_prompt=True, eos_token="</s>"))["text_0"].tolist()
    ours = load_processing(str(source)).template.encode_prompt(turns)
    assert (found == ours) is is_legacy
    assert any("later rounds" in note for note in notes) is not is_legacy
    first = ours.index(2) + 1
    assert found[:first] == ours[:first]


@pytest.mark.slow
def test_llama_cpp_s_images(tmp_path: Path, sources: dict[str, Path], llama_cpp: str) -> None:
    """Squares are what this model has seen, resized beforehand or not; what is not square gets borders, which it has not seen."""
    source = str(sources["interleave"])
    to_gguf(source, tmp_path / "out")
    processing, model = load_processing(source), with_llama_cpp_s_arithmetic(load_model(source, torch.float32).eval(), class_behind=False)
    small = np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)
    wide = PIL.Image.fromarray(small).resize((128, 64), PIL.Image.Resampling.BICUBIC)
    square = wide.resize((100, 100), PIL.Image.Resampling.BICUBIC)
    ready = wide.resize((56, 56), PIL.Image.Resampling.BICUBIC)
    pictures = {"0": wide, "1": square, "2": ready}
    prompts = {f"prompt_{name}": "<__media__>?" for name in pictures}
    found = ask(llama_cpp, tmp_path / "out", **prompts, **{f"image_{name}_0": np.asarray(picture) for name, picture in pictures.items()})
    ours = {name: image_embeddings(model, processing.process_images([picture]))[0] for name, picture in pictures.items()}
    assert gap(found["image_1_0"], ours["1"]) < 3e-4
    assert gap(found["image_2_0"], ours["0"]) < 3e-4  # squashed beforehand: the pixels that the model was trained on
    bordered = PIL.Image.new("RGB", (56, 56), (122, 116, 104))
    bordered.paste(wide.resize((56, 28), PIL.Image.Resampling.BICUBIC), (0, 14))
    assert gap(found["image_0_0"], image_embeddings(model, processing.process_images([bordered]))[0]) < 3e-4
    assert gap(found["image_0_0"], ours["0"]) > 0.1
