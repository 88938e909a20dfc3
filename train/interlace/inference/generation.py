"""Answers from a model: batched, left-padded, images at their places; what all questions of a batch begin with is computed once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from interlace.data.media import check_image, open_images
from interlace.data.sample import Image, Place, Turn, media_of
from interlace.errors import InputError
from interlace.model.families import family_of
from interlace.model.loading import Processing, load_for_inference, load_processing, quantization, resolve_model_path

MOST_PIXELS = 178_000_000  # of an image in a dialogue


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none."""
    device, count = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    if device is None or count < 2:
        return device or torch.device("cpu")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % count)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to where an answer begins: expanded ids, and the images whose tokens are in them, in order.

    `trunk_length` and `trunk_images` count the first ids and images, those that other questions may begin with, too; 0 for none.
    """

    input_ids: list[int]
    images: tuple[Place, ...]
    trunk_length: int = 0
    trunk_images: int = 0

    @property
    def trunk(self) -> tuple[list[int], tuple[Place, ...]]:
        return self.input_ids[: self.trunk_length], self.images[: self.trunk_images]


@dataclass(frozen=True)
class Generator:
    """A model with its processing, ready to answer.

    in_step: processes share the model's weights, so that all have to call it equally often.
    """

    model: PreTrainedModel | PeftModel
    processing: Processing
    device: torch.device
    in_step: bool = False

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

        Args:
            prompts: where all have the same trunk, it is computed once for all of them.

        Raises:
            BadRow: an image that cannot be opened.
        """
        tokenizer = self.processing.tokenizer
        pad, end = tokenizer.pad_token_id, self.processing.template.end
        end = tokenizer.eos_token_id if end is None else end
        pad = end if pad is None else pad
        trunk, trunk_images = self._common_trunk(prompts)
        longest = max(len(prompt.input_ids) for prompt in prompts)
        padding = [longest - len(prompt.input_ids) for prompt in prompts]
        ids = torch.tensor([[*trunk, *[pad] * more, *prompt.input_ids[len(trunk) :]] for more, prompt in zip(padding, prompts, strict=True)])
        mask = torch.ones_like(ids)
        for row, more in enumerate(padding):
            mask[row, len(trunk) : len(trunk) + more] = 0
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        settings, model.generation_config = model.generation_config, GenerationConfig()  # greedy, whatever comes with the model
        try:
            output: torch.Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                past_key_values=self._prefilled(trunk, trunk_images, len(prompts)) if trunk else None,
                **self._vision([prompt.images[len(trunk_images) :] for prompt in prompts], ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
                streamer=streamer,
                synced_gpus=self.in_step,
            )
        finally:
            model.generation_config = settings
        return [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]

    def free_memory(self) -> None:
        """Gives back what the accelerator keeps of a batch that did not fit."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def _common_trunk(self, prompts: Sequence[Prompt]) -> tuple[list[int], tuple[Place, ...]]:
        """The trunk of all prompts; nothing for one prompt, for different trunks, for models whose positions tell rows and columns: `generate` computes
        those from whole prompts; and for sliding windows: `generate` would count the padding behind the trunk."""
        first = prompts[0].trunk
        has_windows = getattr(self.processing.config.get_text_config(), "sliding_window", None) is not None
        can_share = len(prompts) > 1 and not self.in_step and not self.processing.images.has_grids and not has_windows
        return first if can_share and all(prompt.trunk == first for prompt in prompts[1:]) else ([], ())

    def _prefilled(self, trunk: Sequence[int], images: Sequence[Place], rows: int) -> DynamicCache:
        """Keys and values of a trunk, for each of some rows."""
        cache, ids = DynamicCache(config=self.model.config.get_text_config()), torch.tensor([trunk])
        self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **self._vision([images], ids))
        cache.batch_repeat_interleave(rows)
        return cache

    def _vision(self, rows: Sequence[Sequence[Place]], ids: torch.Tensor) -> dict[str, Any]:
        """What the model takes of the images of some rows."""
        images = iter(open_images([place for row in rows for place in row]))
        vision = self.processing.generation_inputs([[next(images) for _ in row] for row in rows], ids)
        return {name: values.to(self.device, self.model.dtype if name == "pixel_values" else None) for name, values in vision.items()}


def load_generator(path: str, dtype: str | None = None, load_in_4bit: bool = False, load_in_8bit: bool = False, fsdp: bool = False) -> Generator:
    """Loads a model or adapter directory for answering.

    Args:
        dtype: float32, bfloat16 or float16; None takes bfloat16 on an accelerator and float32 on a CPU.
        fsdp: the processes, which have joined, keep a slice of the weights each.

    Raises:
        InputError: the model cannot be had.
    """
    device = default_device()
    chosen = getattr(torch, dtype) if dtype else torch.float32 if device.type == "cpu" else torch.bfloat16
    processing = load_processing(resolve_model_path(path))
    is_quantized = load_in_4bit or load_in_8bit
    if fsdp and (is_quantized or not torch.distributed.is_initialized()):
        raise InputError("--fsdp shares 16 or 32 bit weights between processes: torchrun --nproc-per-node 8 train/evaluate_model.py ..., and no --load-in-..")
    if is_quantized and device.type == "cpu":
        chosen = torch.bfloat16
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)  # where quantized weights go
    model = load_for_inference(path, chosen, quantization(load_in_4bit, load_in_8bit, chosen))
    if fsdp:
        _slice(model, chosen, device)
    elif not is_quantized:
        model = model.to(device)  # type: ignore[arg-type]
    return Generator(model, processing, device, in_step=fsdp)


def _slice(model: PreTrainedModel | PeftModel, dtype: torch.dtype, device: torch.device) -> None:
    """FSDP2: every layer of the language model goes to the device and is sliced there before the next one comes; its slices meet while it is computed. The
    rest is whole on every device: `generate` calls the tower and the embeddings by themselves."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    language_model = getattr(base.model, family_of(model.config).language_model)
    language_model.to(dtype)  # of an adapter, too: a layer's weights travel together
    for layer in language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(language_model, mesh=mesh)
    base.to(device)
    language_model.unshard()
