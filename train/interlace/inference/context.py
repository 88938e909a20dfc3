"""What a model has read of a conversation: the keys and values of its tokens, and the features of its images, so that only what is new is computed.

The model is run by its parts, as in training, and not by `generate`: that would encode every image of the conversation in each turn, it keeps where mRoPE
positions stand in the model itself, which several conversations may share, and it can be stopped from another thread only.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from interlace.data.lengths import media_tokens
from interlace.data.positions import grid_positions
from interlace.inference.attaching import Frame, open_frames
from interlace.inference.generation import Generator
from interlace.model.families import family_of

_IMAGES_AT_ONCE = 16
_MOST_OTHERS = 16  # images that no turn holds any more, but an /undo or another conversation may bring back
Picture = tuple[Frame, int]  # a frame as so many tokens
Token = tuple[int, Picture | None]  # an id, and the image that it is a part of


def can_go_on(config: PretrainedConfig) -> bool:
    """Whether the keys and values of the first tokens of a conversation stay right when others follow in place of those behind them.

    Not so where a layer keeps a state of all that it has read, which cannot be taken back, and where the angles of rotary positions depend on the length.
    """
    text: Any = config.get_text_config()
    rope = text.rope_parameters or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    return layers <= {"full_attention", "sliding_attention"} and not kinds & {"dynamic", "longrope"}


class Context:
    """A conversation in the memory of one model.

    Args:
        generator: the model. without_adapter: the model under the adapter.
    """

    def __init__(self, generator: Generator, without_adapter: bool = False):
        self.generator, self.without_adapter = generator, without_adapter
        model = generator.model
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
        self.config, self.family = self.model.config, family_of(self.model.config)
        self.can_go_on = can_go_on(self.config)
        self._features: dict[Picture, torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets everything, features of images included."""
        self._features.clear()
        self._forget()

    def forget_other_images(self) -> None:
        """Leaves the features of the images that are in the conversation as it was read last."""
        pictures = set(_pictures(self.tokens))
        self._features = {picture: features for picture, features in self._features.items() if picture in pictures}

    def _forget(self) -> None:
        # every layer keeps all it has read, those too that attend to a window: they can be cut then. Where cutting is no use they are what the model wants
        self._cache = DynamicCache() if self.can_go_on else DynamicCache(config=self.config.get_text_config())
        self.tokens: list[Token] = []  # what has been read
        self.num_kept = 0  # of the tokens read last, those that were there already
        self._next_position = 0

    def spelt(self, ids: Sequence[int], media: Sequence[tuple[Frame, ...]], are_videos: Sequence[bool]) -> list[Token]:
        """The tokens of a conversation whose `ids` hold one image token for each image, or frame of a video, in `media`.

        Raises:
            BadRow: an image that the model cannot take.
        """
        processing = self.generator.processing
        sizes = [[frame.size for frame in frames] for frames in media]
        counts = media_tokens(sizes, are_videos, processing.row_image_tokens, processing.video_tokens)
        pictures = iter([picture for frames, tokens in zip(media, counts, strict=True) for picture in zip(frames, tokens, strict=True)])
        tokens: list[Token] = []
        for token in ids:
            if token == processing.config.image_token_id:
                picture = next(pictures)
                tokens += [(part, picture) for part in processing.images.ids(picture[1])]
            else:
                tokens.append((token, None))
        return tokens

    @torch.no_grad()
    def read(self, tokens: Sequence[Token]) -> torch.Tensor:
        """(vocabulary,) float32 logits of what follows a conversation. Its beginning is not read again if the context has it, nor any image encoded twice.

        Raises:
            BadRow: an image that cannot be opened; the context is as it was.
        """
        start = self._common_start(tokens) if self.can_go_on else 0
        filled_ids = self.generator.processing.images.filled_ids
        is_filled = np.array([picture is not None and token in filled_ids for token, picture in tokens])
        try:
            logits = self._read(tokens, start, is_filled)
            self.tokens, self.num_kept = list(tokens), start
        finally:
            self._trim()
        return logits

    def _read(self, tokens: Sequence[Token], start: int, is_filled: np.ndarray) -> torch.Tensor:
        with self._adapter():
            rows = self._image_rows(tokens, start, int(is_filled[start:].sum()))
            self._cut(start)
            positions, self._next_position = self._positions(tokens, is_filled)
            ids = torch.tensor([[token for token, _ in tokens[start:]]], device=self.generator.device)
            embeddings = self.model.get_input_embeddings()(ids)
            deeper: dict[str, Any] = {}
            if rows is not None:
                mask = torch.from_numpy(is_filled[None, start:]).to(ids.device)
                first, *more = rows.split(embeddings.shape[-1], dim=-1)
                embeddings = embeddings.index_put((mask,), first.to(embeddings.dtype))
                deeper = {"visual_pos_masks": mask, "deepstack_visual_embeds": more} if more else {}
            return self._forward(embeddings, positions[..., start:], is_filled, **deeper)

    def _trim(self) -> None:
        """Keeps the features of the images in the conversation, and of those that left it last."""
        held = [picture for picture in dict.fromkeys(_pictures(self.tokens)) if picture in self._features]
        others = self._features.keys() - set(held)
        left_last = [picture for picture in self._features if picture in others][-_MOST_OTHERS:]
        self._features = {picture: self._features[picture] for picture in (*left_last, *held)}

    @torch.no_grad()
    def follow(self, token: int) -> torch.Tensor:
        """The same after one more token of text."""
        with self._adapter():
            embeddings = self.model.get_input_embeddings()(torch.tensor([[token]], device=self.generator.device))
            logits = self._forward(embeddings, self._shaped(np.array([self._next_position])))
        self.tokens.append((token, None))
        self._next_position += 1
        return logits

    def _common_start(self, tokens: Sequence[Token]) -> int:
        """How many tokens need not be read; never all of them, as the last one's logits are wanted."""
        most = min(len(self.tokens), len(tokens) - 1)
        return next((i for i in range(most) if self.tokens[i] != tokens[i]), most)

    def _cut(self, length: int) -> None:
        """Leaves the first tokens in the cache. A forward pass that was broken off may have left some layers longer than others."""
        if length == 0:
            self._forget()
            return
        self.tokens = self.tokens[:length]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]  # type: ignore[union-attr,index]

    def _adapter(self) -> AbstractContextManager[Any]:
        model = self.generator.model
        return model.disable_adapter() if self.without_adapter and isinstance(model, PeftModel) else nullcontext()

    def _forward(self, embeddings: torch.Tensor, positions: torch.Tensor, is_image: np.ndarray | None = None, **deeper: Any) -> torch.Tensor:
        """is_image: of all tokens, those read before included; None for one of text."""
        language_model = getattr(self.model.model, self.family.language_model)
        length = len(self.tokens) + embeddings.shape[1]
        # the mask says that nothing is packed, whatever positions look like
        mask: Any = torch.ones(1, length, dtype=torch.long, device=embeddings.device)
        if is_image is not None and self.family.sees_whole_images:
            model: Any = self.model
            types = torch.from_numpy(is_image[None]).long().to(mask.device)
            mask = model.create_masks_for_generate(self.config, embeddings, mask, self._cache, positions, token_type_ids=types)
        output = language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True, **deeper)
        logits: torch.Tensor = self.model.get_output_embeddings()(output.last_hidden_state[:, -1])
        return logits[0].float()

    def _positions(self, tokens: Sequence[Token], is_filled: np.ndarray) -> tuple[torch.Tensor, int]:
        """Of all tokens, and the one that follows."""
        images = self.generator.processing.images
        if not images.has_grids:
            return self._shaped(np.arange(len(tokens))), len(tokens)
        positions, following = grid_positions(is_filled, [images.grid(frame.size[::-1]) for frame, _ in _pictures(tokens)], 0)
        return self._shaped(positions), following

    def _shaped(self, positions: np.ndarray) -> torch.Tensor:
        """(T,) or (3, T) -> (1, T), or (3, 1, T) for models that see rows and columns."""
        if self.generator.processing.images.has_grids:
            positions = np.broadcast_to(positions, (3, positions.shape[-1]))
        return torch.tensor(positions, device=self.generator.device)[..., None, :]

    def _image_rows(self, tokens: Sequence[Token], start: int, num_rows: int) -> torch.Tensor | None:
        """(num_rows, text width or a multiple): what stands at the places of image tokens from `start` on."""
        if not num_rows:
            return None
        pictures = _pictures(tokens)
        before = len(_pictures(tokens[:start]))  # the last of them may go on behind `start`
        wanted = pictures[max(0, before - 1) :]
        new = [picture for picture in dict.fromkeys(wanted) if picture not in self._features]
        for first in range(0, len(new), _IMAGES_AT_ONCE):
            some = new[first : first + _IMAGES_AT_ONCE]
            rows = self.generator.encoded(open_frames([frame for frame, _ in some]), [count for _, count in some])
            self._features.update(zip(some, rows, strict=True))
        return torch.cat([self._features[picture] for picture in wanted])[-num_rows:]


def _pictures(tokens: Sequence[Token]) -> list[Picture]:
    """The images of some tokens, each as often as it stands there."""
    found: list[Picture] = []
    left = 0
    for _, picture in tokens:
        if picture is None:
            left = 0
        elif left == 0:
            found.append(picture)
            left = picture[1] - 1
        else:
            left -= 1
    return found
