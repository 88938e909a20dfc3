"""Saved models as vLLM names their weights; without vLLM, whose names were read in its sources, version 0.32: vllm/model_executor/models/
{llava,siglip,clip,qwen2,llama}.py."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from interlace.model.conversion import to_hub
from interlace.model.loading import load_model
from interlace.model.saving import copy_beside, save_model
from tests.test_conversion import make_model, original_weights, write_original

RENAMED = (  # `hf_to_vllm_mapper` of its LlavaForConditionalGeneration: how newer transformers save by themselves
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def vllm_name(name: str) -> str:
    name = next((new + name.removeprefix(old) for old, new in RENAMED if name.startswith(old)), name)
    return ".".join(STACKED.get(word, word) for word in name.split("."))


def vllm_parameters(kind: str) -> set[str]:
    """Of the tiny model of this kind, with as many blocks of the tower as its feature layer needs, and no norm behind them."""
    is_clip, tower = kind == "llava_v1_5", "vision_tower.vision_model."
    linear = ["embeddings.patch_embedding"] if not is_clip else ["pre_layrnorm"]
    for number in range(2 if is_clip else 3):
        linear += [
            f"encoder.layers.{number}.{part}" for part in ("self_attn.qkv_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        ]
    found = {f"{tower}{name}.{end}" for name in linear for end in ("weight", "bias")} | {f"{tower}embeddings.position_embedding.weight"}
    if is_clip:
        found |= {f"{tower}embeddings.class_embedding", f"{tower}embeddings.patch_embedding.weight"}
    found |= {f"multi_modal_projector.linear_{number}.{end}" for number in (1, 2) for end in ("weight", "bias")}
    for number in range(2):
        block = f"language_model.model.layers.{number}."
        parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
        found |= {f"{block}{part}.weight" for part in parts} | (set() if is_clip else {f"{block}self_attn.qkv_proj.bias"})
    found |= {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}
    return found | ({"language_model.lm_head.weight"} if is_clip else set())


@pytest.mark.parametrize("how", ["converted", "saved after training"])
@pytest.mark.parametrize("kind", ["interleave", "llava_v1_5"])
def test_vllm_finds_every_weight_by_its_name(tmp_path: Path, kind: str, how: str) -> None:
    original = write_original(tmp_path / "original", kind, original_weights(make_model(kind), kind))
    if how == "converted":
        to_hub(str(original), tmp_path / "hub")
    else:
        (tmp_path / "hub").mkdir()
        save_model(load_model(str(original), "auto"), tmp_path / "hub")
        copy_beside(str(original), tmp_path / "hub")
    files = list((tmp_path / "hub").glob("*.safetensors"))  # all that lie beside the model, as vLLM and SGLang look
    names = {vllm_name(name) for file in files for name in load_file(file)}
    behind = r"vision_tower\.vision_model\.post_layernorm\..*" + (r"|vision_tower\.vision_model\.encoder\.layers\.2\..*" if kind == "llava_v1_5" else "")
    assert {name for name in names if not re.fullmatch(behind, name)} == vllm_parameters(kind)
