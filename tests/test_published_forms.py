"""Prompts against what the models' own chat templates write, by strings written down by hand and by the tokenizers."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    PreTrainedTokenizerBase,
)

from interlace.data.formats import from_llava
from interlace.data.sample import BadRow, Image, Sample, Text, Turn
from interlace.data.template import ChatTemplate
from interlace.errors import InputError
from interlace.model.loading import load_processing
from interlace.model.processing import Processing
from interlace.model.prompts import PROMPT_FILE, difference, style_of
from interlace.model.saving import save_model, save_processing
from interlace.training.parts import processing_of
from tests import small_families
from tests.small_families import tokenizer_with
from tests.test_families import NEXT_GRID
from tests.test_template import write_llama_tokenizer

PARTS = (
    Turn("user", (Image("0.png"), Text("What?"))),
    Turn("assistant", (Text("A cat."),)),
    Turn("user", (Text("Why?"),)),
)


def messages_of(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    def content(turn: Turn) -> list[dict[str, str]]:
        return [{"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"} for part in turn.parts]

    return [{"role": turn.role, "content": content(turn)} for turn in turns]


def llava_turns(question: str) -> tuple[Turn, ...]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A cat."}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "x"}]
    return from_llava({"image": ["0.png"] * question.count("<image>"), "conversations": turns}).turns[:3]


# --- by a model's folder, without anything that Interlace saved ---

CHATML = "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
QWEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n" + CHATML
SMOL = "<|im_start|>User:<image>What?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\nUser: Why?<end_of_utterance>\nAssistant:"
GEMMA = "<bos><start_of_turn>user\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
PUBLISHED = {
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN,
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN,
    "qwen3_vl": QWEN,
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n" + CHATML,
    "smolvlm": SMOL,
    "idefics3": SMOL,
    "gemma3": GEMMA + "<start_of_turn>model\n",
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_model_that_interlace_did_not_save_is_asked_as_its_own_chat_template_asks(tmp_path: Path, family: str) -> None:
    small_families.make_model(family, tmp_path)
    for name in (PROMPT_FILE, "chat_template.jinja"):
        (tmp_path / name).unlink()
    processing, expected = load_processing(str(tmp_path)), PUBLISHED[family]
    template, tokenizer = processing.template, processing.tokenizer
    assert tokenizer.apply_chat_template(messages_of(PARTS), chat_template=template.jinja(), tokenize=False, add_generation_prompt=True) == expected
    image = str(tokenizer.convert_ids_to_tokens(template.image_token_id))
    around = {"<start_of_image>": f"\n\n{image}\n\n"}.get(processing.images.text, image)  # Gemma's processor writes its line breaks
    assert template.encode_prompt(PARTS) == tokenizer(expected.replace(processing.images.text, around), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "<image>What?", "<image>\n<image>\nWhat?", "Look: <image> and <image>", "<image>\n\nWhat?"])
def test_internvl_has_one_line_break_behind_every_image(qwen: PreTrainedTokenizerBase, question: str) -> None:
    """Its chat template puts one there; LLaVA's rows have it already."""
    image = qwen.convert_tokens_to_ids("<image>")
    template, turns = ChatTemplate(qwen, image, prompt_style="internvl"), llava_turns(question)
    written = question.replace("<image>\n", "<image>").replace("<image>", "<image>\n")
    expected = f"<|im_start|>user\n{written}<|im_end|>\n{CHATML}"
    assert template.encode_prompt(turns) == qwen(expected, add_special_tokens=False)["input_ids"]
    assert qwen.apply_chat_template(messages_of(turns), chat_template=template.jinja(), tokenize=False, add_generation_prompt=True) == expected


def test_styles_with_a_line_break_behind_images_want_no_second_one(qwen: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="newline_after_image does not go with prompt_style internvl"):
        ChatTemplate(qwen, qwen.convert_tokens_to_ids("<image>"), prompt_style="internvl", newline_after_image=True)


# --- LLaVA-1.6 on Mistral ---


@pytest.fixture(scope="module", params=[False, True], ids=["mistral", "mistral legacy"])
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(write_llama_tokenizer(tmp_path_factory.mktemp("mistral"), request.param))
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def mistral_form(turns: tuple[Turn, ...]) -> str:
    """What the chat template of llava-hf/llava-v1.6-mistral-7b-hf writes: images first, a line each."""
    forms = {"system": "<<SYS>>\n{}\n<</SYS>>\n\n", "user": "[INST] {} [/INST]", "assistant": " {}</s> "}
    return "".join(forms[turn.role].format("<image>\n" * len(turn.media) + turn.text) for turn in turns)


def without_spaces_behind_images(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """LLaVA's own code begins every text between images with a space, which a tokenizer that is not `legacy` does not."""
    space, image = (tokenizer.convert_tokens_to_ids(token) for token in ("▁", "<image>"))
    return ids if tokenizer.legacy else [token for i, token in enumerate(ids) if not (token == space and ids[i - 1] == image)]


@pytest.mark.parametrize("system", [(), (Turn("system", (Text("Look closely."),)),)], ids=["", "system"])
def test_mistral_is_written_as_the_hub_port_s_chat_template_does(mistral: PreTrainedTokenizerBase, system: tuple[Turn, ...]) -> None:
    template = ChatTemplate(mistral, mistral.convert_tokens_to_ids("<image>"), prompt_style="mistral")
    rows = [(*system, *PARTS), (*system, *llava_turns("<image>\nWhat is in the image?")), (*system, *llava_turns("Hi"))]
    for turns in rows:
        published = mistral_form(tuple(Turn(turn.role, (*turn.media, Text(turn.text.lstrip("\n")))) for turn in turns))
        expected = mistral(published)["input_ids"]
        assert expected[0] == mistral.bos_token_id
        assert without_spaces_behind_images(mistral, template.encode_prompt(turns)) == expected
        rendered = mistral.apply_chat_template(messages_of(turns), chat_template=template.jinja(), tokenize=False, add_generation_prompt=True)
        assert rendered == published
        whole = template.encode(Sample((*turns, Turn("assistant", (Text("Two dogs."),)))))
        assert without_spaces_behind_images(mistral, whole.input_ids.tolist()) == mistral(f"{published} Two dogs.</s>")["input_ids"]
        learned = [token for answer in ("A cat.", "Two dogs.") for token in [*mistral(answer, add_special_tokens=False)["input_ids"], mistral.eos_token_id]]
        assert whole.labels[whole.labels >= 0].tolist() == learned
    assert template.end == mistral.eos_token_id


def test_mistral_takes_questions_and_answers_by_turns(mistral: PreTrainedTokenizerBase) -> None:
    template = ChatTemplate(mistral, mistral.convert_tokens_to_ids("<image>"), prompt_style="mistral")
    with pytest.raises(BadRow, match="bad_turn_order"):
        template.encode(Sample((Turn("user", (Text("a"),)), Turn("user", (Text("b"),)), Turn("assistant", (Text("c"),)))))
    with pytest.raises(BadRow, match="bad_system_turn"):
        template.encode(Sample((Turn("user", (Text("a"),)), Turn("system", (Text("b"),)), Turn("assistant", (Text("c"),)))))


# --- LLaVA-NeXT on Llama 3 ---

SYSTEM = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
SYSTEM += "and assist the user with a variety of tasks using natural language."


@pytest.fixture(scope="module")
def llama_3(qwen: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Qwen's byte pairs, which break text as Llama 3's do, with its control tokens."""
    tokenizer = copy.deepcopy(qwen)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"bos_token": names[0], "additional_special_tokens": ["<image>", *names[1:]]})
    return tokenizer


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


@pytest.mark.parametrize("turns", [PARTS, llava_turns("<image>\nWhat?")], ids=["messages", "LLaVA"])
def test_llama_3_is_written_as_the_authors_do(llama_3: PreTrainedTokenizerBase, turns: tuple[Turn, ...]) -> None:
    image = llama_3.convert_tokens_to_ids("<image>")
    template = ChatTemplate(llama_3, image, prompt_style="llama_3")
    expected = f"{header('system')}{SYSTEM}<|eot_id|>{header('user')}<image>\nWhat?<|eot_id|>{header('assistant')}A cat.<|eot_id|>"
    expected += f"{header('user')}Why?<|eot_id|>{header('assistant')}"
    ids = llama_3(f"<|begin_of_text|>{expected}", add_special_tokens=False)["input_ids"]
    assert template.encode_prompt(turns) == ids
    start, end, eot, bos = (llama_3.convert_tokens_to_ids(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id", "begin_of_text"))
    assert ids[:4] == [bos, start, *llama_3("system")["input_ids"], end]
    question = [start, 872, end, 271, image, 198, *llama_3("What?")["input_ids"], eot, start, 77091, end, 271]
    assert any(ids[i : i + len(question)] == question for i in range(len(ids)))
    assert llama_3.apply_chat_template(messages_of(turns), chat_template=template.jinja(), tokenize=False, add_generation_prompt=True) == expected
    whole = template.encode(Sample((*turns, Turn("assistant", (Text("\n\nBecause."),)))))
    assert whole.labels[whole.labels >= 0].tolist() == [token for text in ("A cat.", "Because.") for token in [*llama_3(text)["input_ids"], eot]]
    assert whole.input_ids.tolist()[: len(ids)] == ids


# --- which style a model is for ---

USER = (
    "{% for m in messages %}{{ m.role | upper + ': ' }}{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text + ' ' }}{% endfor %}{% endfor %}"
)
INSTRUCT = """{% for m in messages %}{% set text = (m.content | selectattr('type', 'equalto', 'text') | first).text %}{% if m.role == 'user' %}{{ '[INST] ' }}
{%- for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}{{ text + ' [/INST]' }}{% else %}{{ ' ' + text + '</s> ' }}{% endif %}{% endfor %}"""


def test_the_style_is_that_of_the_tokenizer_and_its_chat_template(llama_3: PreTrainedTokenizerBase, mistral: PreTrainedTokenizerBase) -> None:
    on_mistral = {"text_config": MistralConfig(), "vision_config": CLIPVisionConfig()}
    next_config, llava_config = LlavaNextConfig(**on_mistral), LlavaConfig(**on_mistral)
    assert style_of(mistral, next_config, INSTRUCT) == style_of(mistral, next_config, None) == style_of(mistral, llava_config, INSTRUCT) == "mistral"
    assert style_of(mistral, llava_config, USER) == style_of(mistral, llava_config, None) == "vicuna_v1"  # BakLLaVA
    assert style_of(mistral, LlavaNextConfig(), None) == style_of(mistral, LlavaNextConfig(), USER) == "vicuna_v1"
    assert style_of(tokenizer_with()[0], next_config, INSTRUCT) == "chatml"
    plain, _ = tokenizer_with("<|start_header_id|>")
    assert style_of(plain, next_config, None) == "chatml"  # it has <|im_start|>
    without = AutoTokenizer.from_pretrained(Path(str(mistral.vocab_file)).parent)
    without.add_tokens(["<|start_header_id|>"], special_tokens=True)
    assert style_of(without, next_config, INSTRUCT) == "llama_3"


def test_what_a_published_template_writes_in_another_way_is_said(mistral: PreTrainedTokenizerBase) -> None:
    image = mistral.convert_tokens_to_ids("<image>")
    written = ChatTemplate(mistral, image, prompt_style="mistral")
    assert difference(written, INSTRUCT) == difference(written, None) == ""
    assert difference(written, "{{ raise_exception('text alone') }}") == ""
    vicuna = difference(ChatTemplate(mistral, image, prompt_style="vicuna_v1"), INSTRUCT)
    assert vicuna.startswith("prompt_style vicuna_v1 was chosen") and "A chat between" in vicuna and "[INST] <image>" in vicuna and "\n" not in vicuna
    assert "You are" in difference(ChatTemplate(mistral, image, prompt_style="mistral", system_prompt="You are."), INSTRUCT)


def test_a_llava_1_6_on_mistral_is_asked_in_its_own_form_and_another_is_said(
    tmp_path: Path, make_arguments: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_llama_tokenizer(tmp_path, is_legacy=True))
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**{**widths, "hidden_size": 16, "num_hidden_layers": 2}, image_size=32, patch_size=8)
    text = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **widths)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=image, image_grid_pinpoints=NEXT_GRID)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=NEXT_GRID)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(LlavaNextForConditionalGeneration(config), folder)
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, image, prompt_style="mistral"), config), folder)
    assert load_processing(str(folder)).template.style.name == "mistral"
    (folder / PROMPT_FILE).unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": INSTRUCT}))  # as older transformers kept a processor's
    processing = load_processing(str(folder))
    assert (processing.template.style.name, processing.notes) == ("mistral", ())
    assert processing.tokenizer.decode(processing.template.encode_prompt(PARTS[:1])).replace(" ", "") == "<s>[INST]<image>\nWhat?[/INST]"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": USER}))
    guessed, chosen = load_processing(str(folder)), load_processing(str(folder), prompt_style="mistral")
    assert (guessed.template.style.name, chosen.template.style.name, chosen.notes) == ("vicuna_v1", "mistral", ())
    (note,) = guessed.notes
    assert "A chat between" in note and "USER: <image>" in note
    processing_of(str(folder), make_arguments(tmp_path / "rows.json", prompt_style="mistral"))
    assert capsys.readouterr().out == ""
    processing_of(str(folder), make_arguments(tmp_path / "rows.json"))
    assert capsys.readouterr().out == f"{note}\n"
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_processing(str(folder))
