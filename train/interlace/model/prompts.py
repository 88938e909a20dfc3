"""Which form of prompts a model was made for, where nothing that Interlace saved says it; and how that differs from the chat template that comes with it."""

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from interlace.data.styles import StyleName, known_id
from interlace.data.template import ChatTemplate
from interlace.model.families import Family
from interlace.model.hub import file_of

PROMPT_FILE = "prompt.json"  # what the saved model was trained with: system prompt
_PROCESSOR_TEMPLATE = "chat_template.json"  # where transformers 4 kept the template of a processor
_SHOWN = 60  # characters


def published_template(path: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template that comes with a model: its processor's, else its tokenizer's; None if there is none.

    Args:
        path: a folder or a hub id.
    """
    file = file_of(path, _PROCESSOR_TEMPLATE)
    found = None if file is None else json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return found or tokenizer.chat_template


def style_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, published: Any) -> StyleName:
    """The style of a LLaVA or Qwen-VL, by its tokenizer's control tokens; where these say nothing, by its chat template, and without one by the model: the
    authors' LLaVA-1.6 on Mistral has none."""
    if known_id(tokenizer, "<|im_start|>") is not None:
        return "chatml"
    if known_id(tokenizer, "<|start_header_id|>") is not None:
        return "llama_3"
    is_mistral = "[INST]" in str(published) if published else config.model_type == "llava_next" and config.get_text_config().model_type == "mistral"
    return "mistral" if is_mistral else "vicuna_v1"


def prompt_settings(path: str, chosen: dict[str, Any], family: Family, style: StyleName) -> tuple[dict[str, Any], bool]:
    """What was chosen, else what the model of this folder or hub id was trained with, else what its family or tokenizer was made for; and whether nobody said
    how turns are written."""
    chosen = {name: value for name, value in chosen.items() if value is not None}
    file = file_of(path, PROMPT_FILE)
    kept = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    if "form" in chosen or ("prompt_style" in chosen and chosen["prompt_style"] != kept.get("prompt_style")):
        kept = {name: value for name, value in kept.items() if name not in ("prompt_style", "system_prompt", "form")}  # each style has its own
    own = {} if family.system_prompt is None or "form" in chosen else {"system_prompt": family.system_prompt}
    is_guessed = not {"prompt_style", "form"} & {*kept, *chosen}
    return {"prompt_style": family.prompt_style or style, **own, **kept, **chosen}, is_guessed


def difference(template: ChatTemplate, published: Any) -> str:
    """One line where a published chat template writes a simple conversation in another way than ours; "" where it does not, or cannot write it."""
    tokenizer, question = template.tokenizer, "What is this?"
    theirs = _written(tokenizer, published, question)
    ours = [_written(tokenizer, template.jinja(), text) for text in (question, f"\n{question}")]  # the data may hold the line break
    if not published or theirs is None or theirs in ours:
        return ""
    own = ours[1] or ""
    start = next((i for i, (one, other) in enumerate(zip(own, theirs, strict=False)) if one != other), min(len(own), len(theirs)))
    shown = [repr(text[max(start - 20, 0) : start + _SHOWN]) for text in (own, theirs)]
    return (
        f"prompt_style {template.style.name} was chosen by the tokenizer; the chat template that comes with the model differs: {shown[0]} is {shown[1]} there. "
        "prompt_style, system_prompt or an entry's chat_template choose another form"
    )


def _written(tokenizer: PreTrainedTokenizerBase, published: Any, question: str) -> str | None:
    """Two turns as a template writes them, without bos, which some templates have and some leave to the tokenizer; None if it cannot."""
    first = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [("user", first), ("assistant", [{"type": "text", "text": "A cat."}]), ("user", [{"type": "text", "text": "Why?"}])]
    messages: Any = [{"role": role, "content": content} for role, content in turns]
    try:
        template = published if isinstance(published, str) else None  # None: the tokenizer's own default of several
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # made for text alone, or not there
        return None
    return text.removeprefix(tokenizer.bos_token or "")
