"""Gemma 3's form: `<bos>`, then `<start_of_turn>user`, a newline, the text, `<end_of_turn>`, a newline; answers are a `model`'s."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Text, Turn
from interlace.data.styles import PARTS, MarkedStyle, Piece, TextIds

_GEMMA = (
    """
{{- bos_token -}}
{%- set before = namespace(text='') -%}
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{%- set before.text = default_system_prompt + '\\n\\n' -%}
{%- endif -%}
{%- for message in messages -%}
"""
    + PARTS
    + """{%- if message['role'] == 'system' -%}
{%- for part in parts -%}{%- set before.text = before.text + part['text'] -%}{%- endfor -%}
{%- set before.text = before.text + '\\n\\n' -%}
{%- else -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + before.text -}}
{%- set before.text = '' -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- for part in parts -%}{{- part['text']|trim -}}{%- endfor -%}
{{- '<end_of_turn>' -}}
{% endgeneration %}
{%- else -%}
{%- for part in parts -%}
{{- image_token if part['type'] in ['image', 'image_url'] else part['text']|trim -}}
{%- endfor -%}
{{- '<end_of_turn>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
)


class Gemma(MarkedStyle):
    """As its chat template and its processor write: the system text stands before the first question, white space around each piece of text is left out, and
    two line breaks stand on either side of an image, which are one text with what is beside them."""

    name = "gemma"
    default_system_prompt = ""
    tokens = ("<start_of_turn>", "<end_of_turn>")
    template = _GEMMA

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no bos_token; prompt_style gemma begins rows with it")
        if newline_after_image:
            raise ValueError("newline_after_image does not go with prompt_style gemma: it has line breaks around images already")

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`."""
        pieces: list[Piece] = []
        before, system = [int(self.tokenizer.bos_token_id)], ""
        for number, turn in enumerate(turns):
            if turn.role == "system":
                if number or turn.media or [following.role for following in turns[1:2]] != ["user"]:
                    raise BadRow("bad_system_turn", "prompt_style gemma takes one system turn, the first, of text alone, and a question behind it")
                system = f"{turn.text}\n\n"
                pieces.append(Piece([], [], []))
                continue
            tail = [self.end, *self.newline]
            if turn.role == "assistant":
                answer = "".join(part.text.strip() for part in turn.parts if isinstance(part, Text))
                pieces.append(Piece([*before, self.start, *text_ids("model\n")], text_ids(answer), tail))
            else:
                pieces.append(Piece([*before, self.start], self._question(turn, f"user\n{system}", text_ids), tail))
            before, system = [], ""
        return pieces

    def _question(self, turn: Turn, start: str, text_ids: TextIds) -> list[int]:
        ids: list[int] = []
        run = start
        for part in turn.parts:
            if isinstance(part, Text):
                run += part.text.strip()
            else:
                ids, run = [*ids, *text_ids(f"{run}\n\n"), self.image_token_id], "\n\n"
        return ids + text_ids(run)
