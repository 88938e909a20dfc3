"""Answers from a model: batched, left-padded, images at their places."""

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from interlace.data.media import open_image
from interlace.data.sample import Turn
from interlace.model.loading import Processing, load_for_inference, load_processing, quantization, resolve_model_path


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True)
class Generator:
    """A model with its processing, ready to answer."""

    model: PreTrainedModel | PeftModel
    processing: Processing
    device: torch.device

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The expanded ids of a conversation up to where the next answer begins."""
        image = self.processing.config.image_token_id
        ids = self.processing.template.encode_prompt(turns)
        return [token for single in ids for token in [single] * (self.processing.tokens_per_image if single == image else 1)]

    @torch.no_grad()
    def answer(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int, streamer: BaseStreamer | None = None) -> list[str]:
        """Greedy answers to conversations whose images are files; the paths in their turns are opened as they are.

        Raises:
            BadRow: a control token in the text.
            OSError: an image that cannot be opened.
        """
        prompts = [self.prompt_ids(turns) for turns in conversations]
        longest = max(map(len, prompts))
        tokenizer = self.processing.tokenizer
        pad, end = tokenizer.pad_token_id, self.processing.template.end
        pad = end if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        images: list[PIL.Image.Image] = [open_image(image.path) for turns in conversations for turn in turns for image in turn.images]
        vision = {"pixel_values": self.processing.process_images(images).to(self.device, self.model.dtype)} if images else {}
        output = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            **vision,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            streamer=streamer,
        )
        return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def load_generator(path: str, dtype: str | None = None, load_in_4bit: bool = False) -> Generator:
    """Loads a model or adapter directory for answering.

    Args:
        dtype: float32, bfloat16 or float16; None takes bfloat16 on an accelerator and float32 on a CPU.

    Raises:
        InputError: the model cannot be had.
    """
    device = default_device()
    chosen = getattr(torch, dtype) if dtype else torch.float32 if device.type == "cpu" else torch.bfloat16
    processing = load_processing(resolve_model_path(path))
    if load_in_4bit and device.type == "cpu":
        chosen = torch.bfloat16
    model = load_for_inference(path, chosen, quantization(load_in_4bit, False, chosen))
    if not load_in_4bit:
        model = model.to(device)  # type: ignore[arg-type]
    return Generator(model, processing, device)
