"""Answers from a model: batched, left-padded, images at their places."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from interlace.data.media import check_image, open_images
from interlace.data.sample import Image, Place, Turn, media_of
from interlace.model.loading import Processing, load_for_inference, load_processing, quantization, resolve_model_path

MOST_PIXELS = 178_000_000  # of an image in a dialogue


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where an answer begins: expanded ids, and the images whose tokens are in them, in order."""

    input_ids: list[int]
    images: tuple[Place, ...]


@dataclass(frozen=True)
class Generator:
    """A model with its processing, ready to answer."""

    model: PreTrainedModel | PeftModel
    processing: Processing
    device: torch.device

    def prompt(self, turns: Sequence[Turn]) -> Prompt:
        """A conversation whose images are files, up to where the next answer begins.

        Raises:
            BadRow: a control token in the text, or an image that cannot be read.
        """
        places = tuple(Place(item.path) for item in media_of(turns) if isinstance(item, Image))
        tokens = self.processing.row_image_tokens([check_image(place, MOST_PIXELS) for place in places])
        return Prompt(self.expanded(self.processing.template.encode_prompt(turns), tokens), places)

    def expanded(self, ids: Sequence[int], image_tokens: Sequence[int]) -> list[int]:
        """Ids with each image as all of its tokens, `image_tokens` of each."""
        image, counts = self.processing.config.image_token_id, iter(image_tokens)
        return [token for single in ids for token in (self.processing.images.ids(next(counts)) if single == image else [single])]

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, streamer: BaseStreamer | None = None) -> list[str]:
        """Greedy answers.

        Raises:
            BadRow: an image that cannot be opened.
        """
        longest = max(len(prompt.input_ids) for prompt in prompts)
        tokenizer = self.processing.tokenizer
        pad, end = tokenizer.pad_token_id, self.processing.template.end
        end = tokenizer.eos_token_id if end is None else end
        pad = end if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(prompt.input_ids)) + prompt.input_ids for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt.input_ids)) + [1] * len(prompt.input_ids) for prompt in prompts], device=self.device)
        images = iter(open_images([place for prompt in prompts for place in prompt.images]))
        vision = self.processing.generation_inputs([[next(images) for _ in prompt.images] for prompt in prompts], ids.cpu())
        if vision:
            vision = {name: values.to(self.device) for name, values in vision.items()}
            vision["pixel_values"] = vision["pixel_values"].to(self.model.dtype)
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
