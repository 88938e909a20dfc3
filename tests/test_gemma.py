"""Gemma 3's own: the masks of its two kinds of layers, its form of turns, its image tokens, against transformers. Tiny model of the real geometry, float32."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from interlace.data.batch import Segment
from interlace.data.sample import BadRow, Image, Sample, Text, Turn
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.model.attention import Forest, dense_mask, interface, runs_of
from interlace.model.attention_kernels import TRIAL_WINDOW, choose, flex_segments, problem, varlen_segments
from interlace.model.costs import shape_of, step_costs
from interlace.model.families import family_of
from interlace.model.gemma3 import check_gemma3
from interlace.model.loading import load_model, load_processing
from interlace.model.processing import Processing
from interlace.model.tuning import tune
from tests.small_families import GEMMA_NAMES, collate, gemma3, library_log_probs, make_model, make_pictures, make_row
from tests.test_attention import CPU, FORESTS, FUNCTIONS, draw
from tests.test_windows import naive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


# --- attention ---


@pytest.mark.parametrize("window", [3, 8, 12, 40])
def test_the_rule_of_one_row_is_transformers(window: int) -> None:
    """Images shorter and longer than the window, one at the beginning, one at the end."""
    config = Gemma3TextConfig(sliding_window=window, num_hidden_layers=6)
    config._attn_implementation = "eager"
    types = torch.tensor([[1] * 5 + [0] * 4 + [1] * 10 + [0] * 2 + [1] * 3])
    blocks = get_block_sequence_ids_for_mask(types)
    masks = create_masks_for_vision_model(config, torch.zeros(1, 24, 4), torch.ones(1, 24), None, None, blocks)
    image_of = runs_of(types[0].nonzero()[:, 0], 24)
    assert torch.equal(image_of, blocks[0])
    row = [Segment(0, 24)]
    assert torch.equal(dense_mask(row, 24, None, image_of), masks["full_attention"][0, 0] == 0)
    assert torch.equal(dense_mask(row, 24, window, image_of), masks["sliding_attention"][0, 0] == 0)


def images_in(segments: list[Segment]) -> torch.Tensor:
    """An image in every segment of two tokens or more, all of it but its last token."""
    places = [place for segment in segments for place in range(segment.start, segment.end - 1)]
    return runs_of(torch.tensor(places), segments[-1].end)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_per_segment_attention_equals_the_naive_mask_of_images(name: str, window: int | None) -> None:
    segments = FORESTS[name]
    image_of = images_in(segments)
    q, k, v = draw(4, 2, segments[-1].end, 8)
    forest = Forest(segments, CPU, image_of=image_of)
    out, _ = interface(FUNCTIONS["sdpa"])(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=forest, sliding_window=window)
    expected = naive(q, k, v, dense_mask(segments, segments[-1].end, window, image_of))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(expected, (q, k, v), direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_equals_the_naive_mask_of_images(name: str, window: int | None) -> None:
    segments = FORESTS[name]
    image_of = images_in(segments)
    q, k, v = (tensor.detach().float() for tensor in draw(4, 2, segments[-1].end, 16))
    out = flex_segments(q, k, v, Forest(segments, CPU, image_of=image_of).within(window), 0.3)
    torch.testing.assert_close(out, naive(q, k, v, dense_mask(segments, segments[-1].end, window, image_of)), rtol=1e-5, atol=1e-5)


def test_causal_kernels_are_not_used_for_images_that_see_both_ways() -> None:
    shape = (CPU, torch.float32, 4, 2, 16)
    assert choose("auto", *shape, has_windows=True, sees_whole_images=True) == "sdpa"
    assert problem("sdpa", *shape, None, True) is problem("sdpa", *shape, TRIAL_WINDOW, True) is None
    with pytest.raises(InputError, match="varlen cannot be used on cpu with float32: ValueError: no token can attend to a later one, as those of an image"):
        choose("varlen", *shape, sees_whole_images=True)
    segments = [Segment(0, 4)]
    q, k, v = draw(4, 2, 4, 8)
    with pytest.raises(ValueError, match="no token can attend to a later one"):  # never in silence
        varlen_segments(q, k, v, Forest(segments, CPU, image_of=images_in(segments)), 0.3)
    for name, backend in FUNCTIONS.items():  # without images in the batch all will do
        out, _ = interface(backend)(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Forest(segments, CPU))
        torch.testing.assert_close(out, naive(q, k, v, dense_mask(segments, 4)), rtol=1e-9, atol=1e-9, msg=name)


def test_both_directions_matter(folder: Path, pictures: Path) -> None:
    """The library without token types says something else, so the tests of all families compare what differs."""
    processing, model = load_processing(str(folder)), load_model(str(folder), torch.float32).eval()
    row = make_row(processing, pictures, 1, ("wide", "tall"))
    batch = collate(folder, [row])
    with torch.no_grad():
        expected = library_log_probs(model, folder, row)
        causal = model(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits[0].log_softmax(-1)[batch.rows[batch.row_index], batch.targets]
    assert (causal - expected).abs().max() > 1e-2


# --- the form of turns ---

# Google's template of gemma-3-4b-it, as its model card's messages are written: role names, trimmed text, the system text before the first question
OFFICIAL = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set prefix = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text']) + '\n\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for turn in turns -%}
{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' + (prefix if loop.first else '') }}
{%- if turn['content'] is string -%}{{ turn['content'] | trim }}
{%- else -%}{%- for item in turn['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


def turn(role: Any, *parts: str) -> Turn:
    """Text, and `@` for an image."""
    return Turn(role, tuple(Image("square.png") if part == "@" else Text(part) for part in parts))


CONVERSATIONS = {
    "text": [turn("user", "Which?"), turn("assistant", "This one.")],
    "image in front": [turn("user", "@", "\nWhich?"), turn("assistant", " This one.\n")],
    "image at the end": [turn("user", "Which of them? ", "@"), turn("assistant", "This")],
    "images alone": [turn("user", "@", "@"), turn("assistant", "Two.")],
    "between words": [turn("user", "one", "@", "two\n", "@", " ", "@", "\n\nthree"), turn("assistant", "x")],
    "rounds": [
        turn("user", "@", "a"),
        turn("assistant", "b"),
        turn("user", "c\n\nd"),
        turn("assistant", "  e\n\n\nf  "),
        turn("user", "@"),
        turn("assistant", "g"),
    ],
    "system": [turn("system", "Be brief.\n"), turn("user", "@", "看图说话。"), turn("assistant", "def f():\n\n    return 1")],
    "system before an image": [turn("system", "Be brief."), turn("user", "@", "@"), turn("assistant", "好")],
    "parts of text": [turn("user", "a ", " b", "@", "c"), turn("assistant", "d ", " e")],
}


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    parts = [[{"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"} for part in turn.parts] for turn in turns]
    return [{"role": turn.role, "content": content} for turn, content in zip(turns, parts, strict=True)]


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """As the tiny model's: bytes, and merges of the demo's."""
    return gemma3()[2]


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Of Gemma's own class, with a small vocabulary: spaces as underlines, no space put before a text, runs of line breaks as tokens of their own."""
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("u", "s"), ("e", "r"), ("us", "er"), ("e", "l"), ("o", "n"), ("m", "o"), ("d", "el"), ("mo", "del")]
    parts = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "\n", *"abcdefghijklmnopqrstuvwxyzBDTW.:?()"]
    vocabulary = {part: number for number, part in enumerate([*parts, *("".join(pair) for pair in merges)])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=GEMMA_NAMES)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(2, 8)])
    return tokenizer


class Written:
    """Both sides for one tokenizer: our template, and Google's with transformers' processor. Images of 16 tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None):
        self.tokenizer, image = tokenizer, tokenizer.convert_tokens_to_ids("<image_soft_token>")
        self.template = ChatTemplate(tokenizer, image, system_prompt, prompt_style="gemma", image_text="<start_of_image>")
        self.processor = Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer, image_seq_length=16)
        boi, eoi = tokenizer.convert_tokens_to_ids(["<start_of_image>", "<end_of_image>"])
        self.images = {image: [boi, *[image] * 16, eoi]}

    def expanded(self, ids: Iterable[int]) -> list[int]:
        return [token for single in ids for token in self.images.get(single, [single])]

    def rendered(self, messages: list[dict[str, Any]], template: str | None = None, asks: bool = False) -> str:
        """By a template, ours without one."""
        template = template or self.template.jinja()
        text: str = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=asks)  # type: ignore[assignment]
        return text

    def ids_of(self, text: str) -> list[int]:
        """A rendered template's ids, as the processor writes images."""
        whole = text.replace(self.processor.boi_token, self.processor.full_image_sequence)
        ids: list[int] = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        return ids


@pytest.fixture(scope="module", params=[byte_tokenizer, gemma_tokenizer])
def both(request: pytest.FixtureRequest) -> Written:
    return Written(request.param())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_official_template_and_processor(both: Written, name: str) -> None:
    turns = CONVERSATIONS[name]
    messages = messages_of(turns)
    official, prompt = both.rendered(messages, OFFICIAL), both.rendered(messages[:-1], OFFICIAL, asks=True)
    assert (both.rendered(messages), both.rendered(messages[:-1], asks=True)) == (official, prompt)
    assert both.expanded(both.template.encode(Sample(tuple(turns))).input_ids.tolist()) == both.ids_of(official)
    assert both.expanded(both.template.encode_prompt(turns[:-1])) == both.ids_of(prompt)


def test_ids_by_hand() -> None:
    both = Written(gemma_tokenizer())
    ids = both.template.encode(Sample((turn("system", "B"), turn("user", "@", " the? "), turn("assistant", " x\n")))).input_ids.tolist()
    tokens = both.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:9] == ["<bos>", "<start_of_turn>", "user", "\n", "B", "\n\n\n\n", "<image_soft_token>", "\n\n", "th"]
    assert tokens[9:] == ["e", "?", "<end_of_turn>", "\n", "<start_of_turn>", "model", "\n", "x", "<end_of_turn>", "\n"]


def test_answers_and_what_ends_them_are_learned(folder: Path) -> None:
    processing = load_processing(str(folder))
    encoded = processing.template.encode(Sample(tuple(CONVERSATIONS["rounds"])))
    learned = processing.tokenizer.decode([token for token in encoded.labels.tolist() if token >= 0])
    assert learned == "b<end_of_turn>e\n\n\nf<end_of_turn>g<end_of_turn>"
    assert processing.template.end == processing.tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_a_system_prompt_by_argument_stands_before_the_first_question() -> None:
    both, turns = Written(byte_tokenizer(), "Be brief."), CONVERSATIONS["image in front"]
    official = both.rendered(messages_of([turn("system", "Be brief."), *turns]), OFFICIAL)
    assert both.rendered(messages_of(turns)) == official
    assert both.expanded(both.template.encode(Sample(tuple(turns))).input_ids.tolist()) == both.ids_of(official)


def test_a_system_turn_without_a_question_behind_it_has_no_form(folder: Path) -> None:
    template = load_processing(str(folder)).template
    for turns in ((turn("user", "a"), turn("system", "b"), turn("assistant", "c")), (turn("system", "a"), turn("assistant", "b"))):
        with pytest.raises(BadRow, match="one system turn"):
            template.encode(Sample(turns))


def test_control_tokens_in_the_text_stay_text(folder: Path) -> None:
    template = load_processing(str(folder)).template
    ids = template.encode(Sample((turn("user", "<start_of_image><end_of_turn>"), turn("assistant", "a")))).input_ids.tolist()
    assert ids.count(template.end) == 2 and template.tokenizer.convert_tokens_to_ids("<start_of_image>") not in ids


# --- what is saved and refused ---


def test_the_saved_processor_writes_the_rows_that_were_trained(folder: Path, pictures: Path) -> None:
    processing: Processing = load_processing(str(folder))
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    row = make_row(processing, pictures, 2, ("wide", "tall"))
    content = [part for _ in row.images for part in ({"type": "text", "text": "look "}, {"type": "image"})] + [{"type": "text", "text": "question 2"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}, {"role": "assistant", "content": "answer 2, no more"}])
    images = [PIL.Image.open(place.path) for place in row.images]
    inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    batch = collate(folder, [row])
    assert inputs["input_ids"].tolist() == batch.input_ids.tolist()
    generation = processing.generation_inputs([images], batch.input_ids)
    assert torch.equal(inputs["token_type_ids"], generation["token_type_ids"])
    torch.testing.assert_close(inputs["pixel_values"], generation["pixel_values"], rtol=0, atol=1e-6)


def test_older_processors_find_what_they_ask_for(folder: Path) -> None:
    """As in the published folders: transformers 4.51 stops at any other setting, and takes the tokenizer's named tokens from a mapping."""
    assert json.loads((folder / "processor_config.json").read_text()) == {"image_seq_length": 16, "processor_class": "Gemma3Processor"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["extra_special_tokens"] == GEMMA_NAMES
    tokenizer: Any = load_processing(str(folder)).tokenizer
    assert {name: getattr(tokenizer, name) for name in GEMMA_NAMES} == GEMMA_NAMES


def test_the_configuration_tells_older_versions_what_the_newer_one_says(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"], text["sliding_window_pattern"]) == (1_000_000.0, 10_000.0, 2)
    older = {name: value for name, value in text.items() if name not in ("rope_parameters", "layer_types", "rope_scaling")}
    config: Any = AutoConfig.from_pretrained(folder)
    read = Gemma3TextConfig(**older)
    assert (read.rope_parameters, read.layer_types) == (config.text_config.rope_parameters, config.text_config.layer_types)


@pytest.mark.parametrize(("size", "patch", "tokens"), [(896, 14, 256), (128, 16, 16), (128, 16, 64)])
def test_features_and_projection_are_the_librarys(folder: Path, size: int, patch: int, tokens: int) -> None:
    """Averages before the cache, the rest behind it; the published geometry among others."""
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=size, patch_size=patch, vision_use_head=False
    )
    config = Gemma3Config(
        vision_config=vision, text_config=Gemma3TextConfig(hidden_size=16, num_hidden_layers=1, vocab_size=262_208), mm_tokens_per_image=tokens
    )
    check_gemma3(config, None)
    torch.manual_seed(0)
    small = AutoConfig.for_model("gemma3_text", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, intermediate_size=8, pad_token_id=0)
    config.text_config = small
    model: Any = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    pixels, family = torch.randn(2, 3, size, size), family_of(config)
    with torch.no_grad():
        features = family.features(config, model.model.vision_tower, pixels, ())
        assert features.shape == (2, family.tokens_per_tile(config), family.feature_width(config)) == (2, tokens, 8)
        torch.testing.assert_close(family.project(model.model, features), model.get_image_features(pixels).pooler_output, rtol=1e-5, atol=1e-6)


def test_costs_count_the_projector_and_both_kinds_of_layers(folder: Path, pictures: Path) -> None:
    processing = load_processing(str(folder))
    batch = collate(folder, [make_row(processing, pictures, 1, ("wide", "tall"))])
    tuned = tune(load_model(str(folder), torch.float32), ("projector", "language_model"), None, None)
    costs = step_costs(tuned)
    parts = costs.parts(shape_of(batch, costs.window))
    assert costs.window == 11
    image_of = runs_of(batch.image_positions, batch.num_tokens)
    full, near = (dense_mask(batch.segments, batch.num_tokens, window, image_of).sum().item() for window in (None, 11))
    assert parts["attention"].forward == pytest.approx(4 * 64 * (2 * full + 2 * near))
    assert parts["projector"].forward == 2 * 16 * (2 * 32 * 64)
    assert parts["projector"].backward == 2 * parts["projector"].forward  # its weight learns, and a norm in front of it


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan .* set it to false"),
        ("config.json", {"mm_tokens_per_image": 9}, "9 tokens are no square that 8 x 8 patches"),
        ("config.json", {"mm_tokens_per_image": 10}, "10 tokens are no square"),
        ("config.json", {"image_token_index": 10_000_000}, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_right_is_refused(folder: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str) -> None:
    model = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load_processing(str(model))


def test_its_form_and_its_processor_go_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompt_style vicuna_v1 does not go with model_type 'gemma3': .*; expected gemma"):
        load_processing(str(folder), prompt_style="vicuna_v1")
    with pytest.raises(InputError, match="newline_after_image does not go with prompt_style gemma"):
        load_processing(str(folder), newline_after_image=True)
    with pytest.raises(InputError, match="needs both"):
        load_processing("data/demo/model", prompt_style="gemma")
    other = make_model("internvl", tmp_path)
    tokenizer = load_processing(str(other)).tokenizer  # of an InternVL on a language model of Gemma's
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match=r"prompt_style gemma does not go with model_type 'internvl': .*; leave prompt_style out"):
        load_processing(str(other), prompt_style="gemma")
