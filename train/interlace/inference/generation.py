"""Answers from a model: batched, left-padded, images at their places; what all questions of a batch begin with is computed once."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from peft import PeftModel
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from interlace.data.media import check_image, open_images
from interlace.data.sample import Image, Place, Turn, media_of
from interlace.errors import InputError
from interlace.model.families import family_of
from interlace.model.forward import active_module
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
    """A conversation up to where an answer begins: expanded ids, and the images whose tokens are in them, in order, with the number of tokens of each.

    `trunk_length` and `trunk_images` count the first ids and images, those that other questions may begin with, too; 0 for none.
    """

    input_ids: list[int]
    images: tuple[Place, ...]
    image_tokens: tuple[int, ...]
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
        return Prompt(self.expanded(self.processing.template.encode_prompt(turns), tokens), places, tuple(tokens))

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
        trunk, num_images = self._common_trunk(prompts)
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
                past_key_values=self._prefilled(trunk, prompts[0], num_images, len(prompts)) if trunk else None,
                **self._vision([prompt.images[num_images:] for prompt in prompts], ids, [n for prompt in prompts for n in prompt.image_tokens[num_images:]]),
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

    def _common_trunk(self, prompts: Sequence[Prompt]) -> tuple[list[int], int]:
        """The ids of the trunk of all prompts, and how many images are in it; nothing for one prompt, for different trunks, for models whose positions tell
        rows and columns: `generate` computes those from whole prompts; and for sliding windows: `generate` would count the padding behind the trunk."""
        first = prompts[0].trunk
        has_windows = getattr(self.processing.config.get_text_config(), "sliding_window", None) is not None
        can_share = len(prompts) > 1 and not self.in_step and not self.processing.images.has_grids and not has_windows
        return (first[0], len(first[1])) if can_share and all(prompt.trunk == first for prompt in prompts[1:]) else ([], 0)

    def _prefilled(self, trunk: Sequence[int], prompt: Prompt, num_images: int, rows: int) -> DynamicCache:
        """Keys and values of a trunk with the first images of a prompt, for each of some rows."""
        cache, ids = DynamicCache(config=self.model.config.get_text_config()), torch.tensor([trunk])
        vision = self._vision([prompt.images[:num_images]], ids, prompt.image_tokens[:num_images])
        self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1, **vision)
        cache.batch_repeat_interleave(rows)
        return cache

    def _vision(self, rows: Sequence[Sequence[Place]], ids: torch.Tensor, image_tokens: Sequence[int] = ()) -> dict[str, Any]:
        """What the model takes of the images of some rows; image_tokens: of each of them, for models that see a video as one medium."""
        opened = open_images([place for row in rows for place in row])
        if self.processing.images.video_token_id is not None and opened:
            return {"mm_encoder_outputs": self._encoder_outputs(opened, image_tokens)}
        images = iter(opened)
        vision = self.processing.generation_inputs([[next(images) for _ in row] for row in rows], ids)
        return {name: values.to(self.device, self.model.dtype if name == "pixel_values" else None) for name, values in vision.items()}

    def _encoder_outputs(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int]) -> dict[str, BaseModelOutputWithPooling]:
        """Features of images and videos in the place of pixels: of those `generate` takes videos of one length only, and it counts the images of a trunk apart
        from those behind it."""
        rows: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
        for tokens, row in zip(image_tokens, self.encoded(images, image_tokens), strict=True):
            rows["image" if self.processing.images.ids(tokens)[0] == self.processing.config.image_token_id else "video"].append(row)
        of_image: Any = rows["image"]  # a list, of videos one tensor (1, tokens, text width)
        outputs = {"image": BaseModelOutputWithPooling(pooler_output=of_image)} if rows["image"] else {}
        return outputs | ({"video": BaseModelOutputWithPooling(pooler_output=torch.cat(rows["video"])[None])} if rows["video"] else {})

    @torch.no_grad()
    def encoded(self, images: Sequence[PIL.Image.Image], image_tokens: Sequence[int]) -> list[torch.Tensor]:
        """Images through tower and projector, as in `PackedModel`: (tokens that features fill, text width or a multiple) of each.

        Args:
            image_tokens: number of tokens of each.
        """
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        family, of_images = family_of(model.config), self.processing.images
        sizes = [(image.height, image.width) for image in images]
        filled = [sum(map(list(of_images.ids(tokens)).count, of_images.filled_ids)) for tokens in image_tokens]
        grids = [of_images.grid(size) for size in sizes] if of_images.has_grids else []
        tower = active_module(getattr(model.model, family.vision_tower))
        pixels = self.processing.process_images(images, image_tokens).to(self.device, _dtype(tower))
        features = family.features(model.config, tower, pixels, grids)
        projected = family.project(model.model, features.to(_dtype(model.model.get_submodule(family.projector[0]))))
        tiles = projected.split([family.num_tiles(model.config, *image) for image in zip(sizes, filled, strict=True)])
        rows = [image.flatten(0, 1) for image in tiles] if family.tiling is None else family.tiling.assemble(model.model, tiles, sizes, filled)
        assert [len(image) for image in rows] == filled
        return rows


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point)


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
    if processing.prompt_note:
        print(processing.prompt_note, file=sys.stderr)
    is_quantized = load_in_4bit or load_in_8bit
    if fsdp and not torch.distributed.is_initialized():
        raise InputError("--fsdp shares the weights between processes: torchrun --nproc-per-node 8 train/evaluate_model.py ...")
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
