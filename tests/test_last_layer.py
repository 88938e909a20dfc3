"""The last layer for the scored rows only, against the whole layer: every kind of decoder, tiny models, float32 on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from interlace.data.batch import Segment
from interlace.data.reading import Row
from interlace.model.attention import Forest, register, sdpa_segments
from interlace.model.forward import model_inputs
from interlace.model.last_layer import can_trim, trim
from tests.test_equivalence import LORA, collate, rows, score, tuned_model  # noqa: F401

SEGMENTS = (Segment(0, 20), Segment(20, 27, 0), Segment(27, 40, 0), Segment(40, 47), Segment(47, 50, 3))
ROWS = torch.tensor([0, 19, 21, 26, 33, 46, 48])  # an end of a trunk among them
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


def decoder(kind: str, **changes: Any) -> Any:
    config: PretrainedConfig = CONFIG_MAPPING[kind](**SIZES, pad_token_id=0, **changes)
    config._attn_implementation = register("sdpa", sdpa_segments)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():  # norms start at one, biases at zero: what is the same everywhere proves nothing
        nn.init.normal_(parameter, std=0.2, mean=1.0 if "norm" in name else 0.0)
    return model


def run(model: Any, asked: torch.Tensor | None, checkpointing: bool = False) -> tuple[torch.Tensor, ...]:
    """The scored rows of the last hidden state, and the gradients of a function of them, of every weight and the embeddings."""
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 50, 32, generator=generator).requires_grad_()
    positions = torch.cat([torch.arange(20), torch.arange(20, 27), torch.arange(20, 33), torch.arange(7), torch.arange(7, 10)])[None]
    out = model(inputs_embeds=inputs, position_ids=positions, use_cache=False, segments=Forest(SEGMENTS, inputs.device, asked)).last_hidden_state[0]
    scored = out[ROWS] if asked is None else out
    parameters = [parameter for parameter in model.parameters() if parameter is not model.get_input_embeddings().weight]
    return scored, *torch.autograd.grad((scored * torch.randn(scored.shape, generator=generator)).sum(), (inputs, *parameters))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_scored_rows_and_all_gradients_are_those_of_the_whole_layer(kind: str, checkpointing: bool) -> None:
    model = decoder(kind)
    whole = run(model, None)
    assert can_trim(model.layers[-1])
    trim(model.layers[-1])
    for found, expected in zip(run(model, ROWS, checkpointing), whole, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_attention_without_a_place_for_its_own_head_size_and_dropout() -> None:
    """Heads wider than the model's width divides into, and a share of probabilities that is dropped while training only."""
    model = decoder("qwen3", head_dim=24, attention_dropout=0.5)
    whole = run(model, None)
    trim(model.layers[-1])
    torch.testing.assert_close(run(model, ROWS)[0], whole[0], rtol=1e-5, atol=1e-6)
    model.train()
    torch.manual_seed(0)
    assert (run(model, ROWS)[0] - whole[0]).norm() > 1e-2 * whole[0].norm()


@pytest.mark.parametrize("kind", ["granite", "smollm3", "gemma2", "phi3", "gpt2"])
def test_other_blocks_stay_whole(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**SIZES, pad_token_id=0) if kind != "gpt2" else CONFIG_MAPPING[kind](n_embd=32, n_layer=1, n_head=4)
    model = AutoModel.from_config(config)
    assert not can_trim((model.h if kind == "gpt2" else model.layers)[-1])


@pytest.mark.parametrize("setup", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_only_scored_rows_pass_the_last_mlp_and_all_tokens_give_keys(tiny_dir: Path, rows: list[Row], setup: dict[str, Any]) -> None:  # noqa: F811
    tuned, batch = tuned_model(tiny_dir, **setup), collate(tiny_dir, rows)
    *_, before, last = tuned.base.model.language_model.layers
    passed: dict[str, int] = {}
    for part, layer in (("before", before), ("last", last)):
        for name in ("mlp", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            layer.get_submodule(name).register_forward_hook(lambda _, inputs, __, key=f"{part} {name}": passed.update({key: inputs[0].shape[1]}))
    score(tuned, batch)
    scored, tokens = len(batch.rows), batch.num_tokens
    assert scored < tokens / 2
    assert {passed[key] for key in passed if key.startswith("before") or "k_proj" in key or "v_proj" in key} == {tokens}
    assert {passed[f"last {name}"] for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj")} == {scored}


def test_the_model_itself_and_its_copies_keep_their_layers(tiny_dir: Path, rows: list[Row]) -> None:  # noqa: F811
    """Generation calls the model without segments; a frozen reference is a copy that must not run the policy's layer."""
    tuned, batch = tuned_model(tiny_dir), collate(tiny_dir, rows[:1])
    fresh, ids = tuned_model(tiny_dir), torch.arange(5, 15)[None]
    whole = type(fresh.base.model.language_model.layers[-1])
    del fresh.base.model.language_model.layers[-1].forward
    assert fresh.base.model.language_model.layers[-1].forward.__func__ is whole.forward
    for one in (tuned, fresh):
        one.base.config.text_config._attn_implementation = "eager"
    with torch.no_grad():
        assert torch.equal(tuned.base(input_ids=ids).logits, fresh.base(input_ids=ids).logits)
    tuned.packed.use_attention("sdpa")
    kept = copy.deepcopy(tuned.packed)
    before = score(tuned, batch).log_probs
    with torch.no_grad():
        for parameter in tuned.base.model.language_model.layers[-1].parameters():
            parameter.add_(0.5)
    assert torch.equal(kept(**model_inputs(batch, tuned.tower)).log_probs, before)
    assert not torch.equal(score(tuned, batch).log_probs, before)
