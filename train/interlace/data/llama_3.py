"""LLaVA-NeXT's form on Llama 3: `<|start_header_id|>role<|end_header_id|>`, two line breaks, the text, `<|eot_id|>`."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from interlace.data.sample import Turn
from interlace.data.styles import ANSWER, LINED_BODY, PARTS, LineBroken, MarkedStyle, Piece, TextIds, known_id, parts_ids, trim_answer, with_line_breaks

_LLAMA_3 = (
    """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + default_system_prompt + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
"""
    + PARTS
    + """{%- if message['role'] == 'assistant' -%}
"""
    + ANSWER
    + """{% generation %}
{{- bare if '\\n' in lead or '\\r' in lead else answer.text -}}
{{- '<|eot_id|>' -}}
{% endgeneration %}
{%- else -%}
"""
    + LINED_BODY
    + """{{- '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
)


class Llama3(LineBroken, MarkedStyle):
    """As the authors train and ask, system prompt included (LLaVA-NeXT's `conv_llava_llama_3`). The chat template of the hub port has no system prompt and puts
    a line break before every text, answers included."""

    name = "llama_3"
    default_system_prompt = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    default_system_prompt += "and assist the user with a variety of tasks using natural language."
    tokens = ("<|start_header_id|>", "<|eot_id|>")
    template = _LLAMA_3

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        end_of_header = known_id(tokenizer, "<|end_header_id|>")
        if end_of_header is None or tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no <|end_header_id|> or no bos_token; prompt_style llama_3 needs both")
        self.end_of_header, self.beginning = end_of_header, [int(tokenizer.bos_token_id)]

    def control(self) -> list[int]:
        return [self.end_of_header, *super().control()]

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`; the line breaks behind the header are one text with what follows, but for an answer."""
        return [self._piece(turn, [] if number else self.beginning, text_ids) for number, turn in enumerate(turns)]

    def _piece(self, turn: Turn, before: list[int], text_ids: TextIds) -> Piece:
        header = [*before, self.start, *text_ids(turn.role), self.end_of_header]
        if turn.role == "assistant":
            return Piece([*header, *text_ids("\n\n")], text_ids(trim_answer(turn.text)), [self.end])
        return Piece(header, parts_ids(with_line_breaks(turn), text_ids, self.image_token_id, [], "\n\n"), [self.end])
