"""SmolVLM's form: `<|im_start|>` once, then `User: ..<end_of_utterance>`, `Assistant: ..<end_of_utterance>`, a line each."""

from collections.abc import Sequence

from interlace.data.sample import Image, Turn
from interlace.data.styles import ANSWER, BODY, PARTS, MarkedStyle, Piece, TextIds, parts_ids, trim_answer

_SMOLVLM = (
    """
{{- '<|im_start|>' -}}
{%- if messages[0]['role'] != 'system' and default_system_prompt -%}
{{- 'System: ' + default_system_prompt + '<end_of_utterance>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
"""
    + PARTS
    + """{{- message['role']|capitalize + ':' -}}
{%- if message['role'] == 'assistant' -%}
"""
    + ANSWER
    + """{% generation %}
{{- ' ' + (bare if '\\n' in lead or '\\r' in lead else answer.text) -}}
{{- '<end_of_utterance>' -}}
{% endgeneration %}
{%- else -%}
{{- '' if parts and parts[0]['type'] in ['image', 'image_url'] else ' ' -}}
"""
    + BODY
    + """{{- '<end_of_utterance>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""
)


class SmolVLM(MarkedStyle):
    """As its chat template writes; no space stands between `User:` and an image. An answer's text begins with the space before it."""

    name = "smolvlm"
    default_system_prompt = ""
    tokens = ("<|im_start|>", "<end_of_utterance>")
    template = _SMOLVLM

    def write(self, turns: Sequence[Turn], text_ids: TextIds) -> list[Piece]:
        """See `Style`."""
        return [self._piece(turn, [] if number else [self.start], text_ids) for number, turn in enumerate(turns)]

    def _piece(self, turn: Turn, before: list[int], text_ids: TextIds) -> Piece:
        tail = [self.end, *self.newline]
        if turn.role == "assistant":
            answer = trim_answer(turn.text) if self.trims_answers else turn.text
            return Piece([*before, *text_ids("Assistant:")], text_ids(f" {answer}"), tail)
        begins_with_image = bool(turn.parts) and isinstance(turn.parts[0], Image)
        name = f"{turn.role.capitalize()}:" + " " * (not begins_with_image)
        return Piece(before, parts_ids(turn, text_ids, self.image_token_id, self.newline * self.newline_after_image, name), tail)
