"""LLaVA-1.6's form on Mistral: `[INST] .. [/INST] ..</s>`, again and again."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from interlace.data.sample import BadRow, Turn
from interlace.data.styles import LINED_BODY, PARTS, LineBroken, Piece, TextIds, parts_ids, quoted, with_line_breaks
from interlace.data.vicuna import SentencePieceStyle

_MISTRAL = (
    """
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- '<<SYS>>\\n' + default_system_prompt + '\\n<</SYS>>\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
"""
    + PARTS
    + """{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- for part in parts -%}{{- ' ' + part['text'] if part['text'] else '' -}}{%- endfor -%}
{{- eos_token -}}
{% endgeneration %}
{%- elif message['role'] == 'system' -%}
{{- '<<SYS>>\\n' -}}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- '\\n<</SYS>>\\n\\n' -}}
{%- else -%}
{{- '[INST] ' if loop.first or loop.previtem['role'] == 'system' else ' [INST] ' -}}
"""
    + LINED_BODY
    + """{{- ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}
"""
)


class Mistral(LineBroken, SentencePieceStyle):
    """As the chat template of the hub port writes, images where they stand; the authors' own code has one space more before `</s>` and none behind it."""

    name = "mistral"
    default_system_prompt = ""
    num_supervised = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, newline_after_image: bool = False):
        super().__init__(tokenizer, image_token_id, newline_after_image)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token; prompt_style mistral ends answers with it")
        self._end = int(tokenizer.eos_token_id)
        self.puts_space_first = self._is_sentencepiece and self.begins_every_text  # before `[INST]` behind an answer, too: one, as transformers 5 reads it

    @property
    def end(self) -> int:
        return self._end

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`. The system's text and the first question are one text."""
        pieces: list[Piece] = []
        run, before, expected = "", self.beginning, "user"
        for number, turn in enumerate(turns):
            if turn.role == "system":
                if number or turn.media:
                    raise BadRow("bad_system_turn", "prompt_style mistral takes one system turn, the first, of text alone")
                run = f"<<SYS>>\n{turn.text}\n<</SYS>>\n\n"
                pieces.append(Piece([], [], []))
                continue
            if turn.role != expected:
                raise BadRow("bad_turn_order", f"turn {number + 1} is of {turn.role}: prompt_style mistral takes questions and answers by turns")
            if turn.role == "user":
                is_behind = bool(number) and turns[number - 1].role == "assistant"
                space = " " * (is_behind and not self.puts_space_first)
                ends = f"{run}{space}[INST] ", " [/INST]"
                body = parts_ids(with_line_breaks(turn), text_ids, self.image_token_id, [], *ends, partial(text_ids, is_behind=is_behind))
                pieces.append(Piece(before, body, []))
            else:
                pieces.append(Piece([], text_ids(turn.text), [self.end]))
            run, before, expected = "", [], "assistant" if turn.role == "user" else "user"
        return pieces

    def jinja(self, system_prompt: str, image_token: str) -> str:
        """See `Style`. Without bos, which processors add. Of tokenizers that are not `legacy` see `Vicuna`."""
        head = f"{{%- set default_system_prompt = {quoted(system_prompt)} -%}}{{%- set image_token = {quoted(image_token)} -%}}"
        return head + "".join(_MISTRAL.strip().split("\n"))
