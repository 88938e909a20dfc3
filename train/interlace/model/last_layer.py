"""The last decoder layer for the rows that are scored: all tokens give their keys and values, but only these rows ask, and pass the MLP.

Nothing behind that layer reads the other rows, so scores and gradients are those of the whole layer.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interlace.model.attention import Forest, window_of

# Pre-norm blocks without more arithmetic than `_block` does: others of the same parts multiply residuals, clip, drop or leave rotations out
BLOCKS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
BLOCKS |= {"Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer"}
ALL_TOKENS = {"k_proj", "v_proj"}  # the linear layers that every token still passes


def can_trim(layer: nn.Module) -> bool:
    """Whether a decoder layer is one of those that `trim` knows."""
    return type(layer).__name__ in BLOCKS


def trim(layer: nn.Module) -> None:
    """Makes a layer give only the rows that its `Forest` names, where that names any; else it stays what it was.

    It is the layer's own, so that engines that gather weights around a layer, activation checkpointing and copies of the model find it in its place.
    """
    layer.forward = partial(_forward, layer)


def _forward(layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """(1, T, width) -> (1, rows, width)."""
    forest: Forest | None = kwargs.get("segments")
    if forest is None or forest.rows is None:
        whole: torch.Tensor = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return whole
    block = partial(_block, layer, forest, kwargs["position_embeddings"])
    is_checkpointed = layer.gradient_checkpointing and layer.training  # transformers has this around the method that stands back here
    found: torch.Tensor = layer._gradient_checkpointing_func(block, hidden_states) if is_checkpointed else block(hidden_states)
    return found


def _block(layer: Any, forest: Forest, rotation: tuple[torch.Tensor, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = hidden_states[:, forest.rows] + _attend(layer.self_attn, layer.input_layernorm(hidden_states), forest, *rotation)
    return found + layer.mlp(layer.post_attention_layernorm(found))


def _attend(attention: Any, normed: torch.Tensor, forest: Forest, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(1, T, width) -> (1, rows, width). The other rows ask with zeros: kernels know whole segments, and their products are the smaller part of a layer."""
    rows = forest.rows
    query, key, value = (
        project(tokens).unflatten(-1, (-1, attention.head_dim))
        for project, tokens in ((attention.q_proj, normed[:, rows]), (attention.k_proj, normed), (attention.v_proj, normed))
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query = query.new_zeros(1, normed.shape[1], *query.shape[2:]).index_copy(1, rows, query)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # as the model's own attention calls it, Liger's where that is in its place
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    dropout = attention.attention_dropout if attention.training else 0.0
    how = {"scaling": attention.scaling, "dropout": dropout, "sliding_window": window_of(attention)}
    out, _ = attend(attention, query, key, value.transpose(1, 2), None, segments=forest, **how)
    projected: torch.Tensor = attention.o_proj(out[:, rows].flatten(2))
    return projected
