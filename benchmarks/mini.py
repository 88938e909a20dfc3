"""A mini model whose vision : language cost per image resembles the 0.5B's."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

IMAGE, VOCABULARY = 7, 32_000


def make_model() -> LlavaForConditionalGeneration:
    """The model, float32, random weights."""
    vision = SiglipVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, image_size=224, patch_size=16, vision_use_head=False
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True
    )
    return LlavaForConditionalGeneration(config)
