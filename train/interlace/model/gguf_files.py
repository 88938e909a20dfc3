"""A LLaVA model as llama.cpp and Ollama read it: `model.gguf` (language model, tokenizer, chat template), `mmproj.gguf` (vision tower, projector).

llama.cpp's own package, gguf, names the weights and writes the files. What llama.cpp does beside them cannot be said in a file: it pads images to squares
(bicubic, in CLIP's mean colour), takes GELU by its tanh form, from a table in float16, and does not normalise text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from interlace.data.vicuna import SentencePieceStyle
from interlace.errors import InputError
from interlace.files import whole_or_not_at_all
from interlace.model.conversion import Progress, whole_model
from interlace.model.gguf_vocabulary import Vocabulary, read_vocabulary
from interlace.model.layouts import EMBEDDINGS, HEAD, VISION, hub_name
from interlace.model.loading import load_processing, original_of
from interlace.model.processing import Processing
from interlace.model.saving import LICENCE_FILES, copy_files
from interlace.model.weight_files import StoredTensor, stored_tensors

MODEL_FILE, PROJECTOR_FILE = "model.gguf", "mmproj.gguf"
_PAD_COLOUR = (122, 116, 104)  # llama.cpp's, whatever the tower (tools/mtmd/clip.cpp)
_ARCHITECTURES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
_UNUSED = (f"{VISION}head.", f"{VISION}post_layernorm.", "image_newline")  # nothing that reads an image as one square uses these
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
_PROJECTOR = {"multi_modal_projector.linear_1.": 0, "multi_modal_projector.linear_2.": 2}  # llama.cpp counts the activation between them
_GENERATION = re.compile(r"\{%-? *(?:end)?generation *-?%\}")  # transformers' mark of what is learned, which other Jinja stops at


def to_gguf(source: str, output_dir: Path, dtype: torch.dtype | None = None, progress: Progress = iter) -> list[str]:
    """Writes the two files, and a `Modelfile` for Ollama where the prompt has a form in it. Returns what is to be known about them, in sentences.

    Args:
        source: a folder or a hub id, in the hub's layout or its authors'. dtype: of matrices; None: as they are stored. Vectors are float32.
        progress: wraps the tensors of each file on their way.

    Raises:
        InputError: an adapter, a model that llama.cpp would compute otherwise than we do, weights that are missing or do not fit into `dtype`.
    """
    folder = whole_model(source)
    processing, original = load_processing(source), original_of(source)
    config = processing.config
    _check_model(source, config)
    vocabulary = read_vocabulary(processing.tokenizer, config.text_config.vocab_size)
    stored = original.tensors if original else {hub_name(name): tensor for name, tensor in stored_tensors(folder).items()}
    tensors = _checked(source, config, stored)
    kept = dtype or (tensors[EMBEDDINGS].dtype if tensors[EMBEDDINGS].dtype in _TYPES else torch.float32)
    with whole_or_not_at_all(output_dir) as scratch:
        writer = _text_writer(Path(source).name, processing, vocabulary)
        _write(writer, scratch / MODEL_FILE, dict(_text_tensors(config.text_config, tensors, kept)), kept, progress)
        writer = _vision_writer(Path(source).name, processing)
        _write(writer, scratch / PROJECTOR_FILE, dict(_vision_tensors(config, tensors, kept)), kept, progress)
        written = modelfile(processing)
        if written:
            (scratch / "Modelfile").write_text(written, encoding="utf-8")
        copy_files(original.folder if original else folder, scratch, LICENCE_FILES)
    return _notes(processing, bool(written))


def _check_model(source: str, config: PretrainedConfig) -> None:
    """Refuses what llama.cpp has no graph for, or another than ours."""
    if config.model_type != "llava":
        reason = "its images are cut into tiles, which llama.cpp puts together in another way" if config.model_type.startswith("llava_") else "unknown"
        raise InputError(f"{source}: model_type {config.model_type!r} has no exact form in GGUF ({reason}); expected llava, e.g. LLaVA-NeXT-Interleave or 1.5")
    text, vision = config.text_config, config.vision_config
    is_clip = vision.model_type == "clip_vision_model"
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "text_config.model_type": (text.model_type, tuple(_ARCHITECTURES)),
        "text_config.hidden_act": (text.hidden_act, ("silu",)),
        "text_config.rope_parameters.rope_type": (text.rope_parameters.get("rope_type", "default"), ("default",)),
        "text_config.use_sliding_window": (bool(getattr(text, "use_sliding_window", False)), (False,)),
        "vision_config.model_type": (vision.model_type, ("clip_vision_model", "siglip_vision_model")),
        "vision_config.hidden_act": (vision.hidden_act, ("quick_gelu", "gelu", "gelu_pytorch_tanh")),
        "vision_feature_layer": (type(config.vision_feature_layer), (int,)),
        "vision_feature_select_strategy": (config.vision_feature_select_strategy, ("default",) if is_clip else ("full",)),
        "projector_hidden_act": (config.projector_hidden_act, ("gelu",)),
        "multimodal_projector_bias": (config.multimodal_projector_bias, (True,)),
    }
    problems = [f"{name} is {found!r}, expected {' or '.join(map(repr, known))}" for name, (found, known) in wanted.items() if found not in known]
    if problems:
        raise InputError(f"{source} has no exact form in GGUF: {'; '.join(problems)}")


def _checked(source: str, config: PretrainedConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights of the model that `config` describes, in its order."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.get_text_config().tie_word_embeddings:
        del expected[HEAD]
        stored = {name: tensor for name, tensor in stored.items() if name != HEAD}
    expected = {name: shape for name, shape in expected.items() if not name.startswith(_UNUSED)}
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}" for name, shape in expected.items() if name in stored and stored[name].shape != shape
    ]
    problems += [f"{name} has no place in it" for name in stored if name not in expected and not name.startswith(_UNUSED) and not name.endswith(_BUFFERS)]
    if problems:
        raise InputError(f"{source}: {len(problems)} weights do not fit config.json: {'; '.join(problems[:4])}{'; ..' * (len(problems) > 4)}")
    return {name: stored[name] for name in expected}


def _num_blocks(config: PretrainedConfig) -> int:
    """How many blocks of the tower are run: its feature layer, counted from the first block's input, which is 0."""
    layer: int = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


def _text_tensors(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) in llama.cpp's spelling and order of rows."""
    names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in tensors.items():
        if not name.startswith("language_model."):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None and config.model_type == "llama":
            tensor = tensor.changed(tensor.shape, lambda values, heads=heads: _interleaved(values, heads))  # type: ignore[misc]
        yield _named(names, name.removeprefix("language_model.")), _as(tensor, dtype)


def _interleaved(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a head in the order of llama.cpp's rotary embedding for this architecture: neighbours are rotated, not the halves of a head."""
    return values.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _vision_tensors(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of the blocks that are run, and of the projector."""
    num_blocks = _num_blocks(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_blocks)
    for name, tensor in tensors.items():
        if name.startswith(f"{VISION}encoder.layers.") and int(name.removeprefix(f"{VISION}encoder.layers.").split(".")[0]) >= num_blocks:
            continue
        if name.startswith(VISION):
            is_convolution, is_table = len(tensor.shape) == 4, ".position_embedding." in name
            # Convolutions know no bfloat16, and few devices look rows of it up
            kind = torch.float32 if is_table or (is_convolution and dtype == torch.bfloat16) else dtype
            yield _named(names, name), _as(tensor, kind)
        for start, number in _PROJECTOR.items():
            if name.startswith(start):
                yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ].format(bid=number)}.{name.removeprefix(start)}", _as(tensor, dtype)


def _named(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def _as(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """In `dtype` if it is a matrix, else in float32, as llama.cpp wants vectors."""
    kind = dtype if len(tensor.shape) > 1 else torch.float32
    return replace(tensor, dtype=kind, load=lambda: tensor.load().to(kind).contiguous(), load_first=None)


def _write(writer: Any, path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, progress: Progress) -> None:
    """Header first, then one tensor after the other."""
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, _TYPES[tensor.dtype])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in progress(list(tensors.items())):
        values = tensor.load()
        if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
            raise InputError(f"{name} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}; choose --dtype bfloat16 or float32")
        writer.write_tensor_data(values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy())
    writer.close()


def _text_writer(name: str, processing: Processing, vocabulary: Vocabulary) -> Any:
    """With everything that is no tensor."""
    config, tokenizer, template = processing.config.text_config, processing.tokenizer, processing.template
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary.write(writer)
    ids: dict[Any, int | None] = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id if template.end is None else template.end,  # what ends an answer, as it was trained
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
    }
    for add, token in ids.items():
        if token is not None:
            add(token)
    writer.add_chat_template(_GENERATION.sub("", template.jinja()))
    return writer


def _vision_writer(name: str, processing: Processing) -> Any:
    """With everything that is no tensor."""
    config, vision = processing.config, processing.config.vision_config
    images: Any = processing.image_processor
    num_blocks = _num_blocks(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(num_blocks)
    writer.add_array("clip.vision.feature_layer", [num_blocks])  # without it, the last block is left out
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    writer.add_vision_image_mean(list(images.image_mean))
    writer.add_vision_image_std(list(images.image_std))
    return writer


def modelfile(processing: Processing) -> str | None:
    """Ollama's `Modelfile` with the prompt that was trained; None where the prompt's form is neither ChatML nor Vicuna's."""
    template = processing.template
    if template.style.name == "chatml":
        form = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    elif template.style.name == "vicuna_v1":
        end = processing.tokenizer.eos_token
        turns = '{{ if eq .Role "system" }}{{ .Content }} {{ else if eq .Role "user" }}USER: {{ .Content }} {{ else }}ASSISTANT: {{ .Content }}' + str(end)
        form = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}ASSISTANT:"
    else:
        return None
    system = f'SYSTEM """{template.system_prompt}"""\n' if template.system_prompt else ""
    stop = processing.tokenizer.convert_ids_to_tokens(template.end or 0)
    return f'FROM ./{MODEL_FILE}\nFROM ./{PROJECTOR_FILE}\nTEMPLATE """{form}"""\n{system}PARAMETER stop "{stop}"\n'


def _notes(processing: Processing, has_modelfile: bool) -> list[str]:
    """What the files cannot say."""
    images: Any = processing.image_processor
    notes = []
    if processing.config.vision_config.model_type == "clip_vision_model":
        notes.append(
            "llama.cpp reads CLIP towers wrongly since May 2025: patches get their neighbours' positions, and the class token stands for a patch "
            "(github.com/ggml-org/llama.cpp/issues/25814); until it is mended there, build it with the one line of pull request 25844."
        )
    colour = tuple(int(255 * mean) for mean in images.image_mean)
    if not getattr(images, "do_pad", False):
        notes.append("llama.cpp pads images to squares, and this model has seen them without borders: give it square images (resized to squares beforehand).")
    elif colour != _PAD_COLOUR:
        notes.append(f"llama.cpp pads images in the colour {_PAD_COLOUR}, and this model has seen {colour}: pad images to squares beforehand.")
    style = processing.template.style
    if isinstance(style, SentencePieceStyle) and style.beginning and not style.begins_every_text:
        notes.append("llama.cpp puts a space before the text behind an answer, and this tokenizer does not: a chat's later rounds differ by that.")
    if not has_modelfile:
        notes.append(f"No Modelfile for Ollama: the prompt's form ({processing.template.style.name}) is none that it can write.")
    return notes
