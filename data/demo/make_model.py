"""Writes the demo's untrained model: a tiny LLaVA (SigLIP-style tower, projector, Qwen2) with a tokenizer learned from the demo's own words.

PYTHONPATH=train python data/demo/make_model.py data/demo/untrained
python train/supervised_finetune.py configs/demo/pretrain_argument.json
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, Qwen2TokenizerFast, SiglipImageProcessorPil, SiglipVisionConfig

from interlace.data import demo
from interlace.data.styles import ChatML
from interlace.data.template import ChatTemplate
from interlace.model.loading import Processing
from interlace.model.saving import save_model, save_processing

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
NEW_QUESTIONS = ["Which digit is the largest?", "How many images show an even digit?", "Read all images in reverse order.", "2 of 4"]
PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def make_tokenizer() -> Qwen2TokenizerFast:
    """A byte-level BPE with Qwen2's splitting rule, whose merges are the words of its pre-training and of the new tasks' questions."""
    rows = json.loads((demo.prepare() / "pretrain.json").read_text(encoding="utf-8"))
    texts = [turn["value"].replace("<image>", "") for row in rows for turn in row["conversations"]]
    texts += [text for text in ["system\n" + ChatML.default_system_prompt, "user\n", "assistant\n", *NEW_QUESTIONS] for _ in range(1000)]
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512 - len(SPECIAL), initial_alphabet=sorted(alphabet), min_frequency=100))
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
    )


def make_config(tokenizer: Qwen2TokenizerFast) -> LlavaConfig:
    """Two vision layers and three text layers: 4 tokens per image of 32 x 32 pixels."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    vision = SiglipVisionConfig(
        hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4, image_size=demo.IMAGE_SIZE, patch_size=16, vision_use_head=False
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        image_seq_length=4,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--learn-tokenizer", action="store_true", help="learn a new one; without it the embedded model's own, so that the recipe gives that model again"
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer() if options.learn_tokenizer else Qwen2TokenizerFast.from_pretrained(demo.MODEL)
    config = make_config(tokenizer)
    model = LlavaForConditionalGeneration(config)
    images = SiglipImageProcessorPil(size={"height": demo.IMAGE_SIZE, "width": demo.IMAGE_SIZE})
    template = ChatTemplate(tokenizer, config.image_token_id)
    options.output.mkdir(parents=True, exist_ok=True)
    save_model(model, options.output)
    save_processing(Processing(tokenizer, images, template, config), options.output)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokenizer)} tokens, in {options.output}")


if __name__ == "__main__":
    main()
