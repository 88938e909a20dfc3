"""A tokenizer as GGUF holds it, from the very tokenizer that trains: byte pairs as Qwen's, SentencePiece's as LLaMA's."""

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from interlace.errors import InputError

_QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # llama.cpp's "qwen2"
_NO_SCORE = -1e4  # of tokens that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """tokens, types: one per row of the embeddings. merges: of byte pairs, "left right"; scores: SentencePiece's; one of the two is empty."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]

    def write(self, writer: Any) -> None:
        """Adds it to a `GGUFWriter`, with what llama.cpp puts around a text: LLaMA's begin with bos and a space, Qwen's with nothing."""
        is_llama = bool(self.scores)
        writer.add_tokenizer_model("llama" if is_llama else "gpt2")
        writer.add_tokenizer_pre("default" if is_llama else "qwen2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_add_bos_token(is_llama)
        writer.add_add_eos_token(False)
        if is_llama:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(True)
        else:
            writer.add_token_merges(self.merges)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> Vocabulary:
    """A tokenizer's tokens, rows of the embeddings without one filled up.

    Raises:
        InputError: it is of another kind, or has tokens that the embeddings have no row for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model, added = backend["model"], {entry["id"]: entry for entry in backend["added_tokens"]}
    is_llama = model["type"] == "BPE" and model.get("byte_fallback", False)
    if not is_llama and _QWEN_WORDS not in _strings(backend["pre_tokenizer"]):
        raise InputError(
            f"{tokenizer.name_or_path}: llama.cpp would cut text into other tokens than this tokenizer; expected one of Qwen's or LLaMA's (SentencePiece)"
        )
    by_id = {**{number: token for token, number in model["vocab"].items()}, **{number: entry["content"] for number, entry in added.items()}}
    if max(by_id) >= num_rows:
        raise InputError(f"{tokenizer.name_or_path}: a token of id {max(by_id)}, and the embeddings have {num_rows} rows")
    types = [TokenType.UNUSED] * num_rows
    for number, token in by_id.items():
        if is_llama and token == tokenizer.unk_token:
            types[number] = TokenType.UNKNOWN
        elif number in added:
            types[number] = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif is_llama and len(token) == 6 and token.startswith("<0x"):
            types[number] = TokenType.BYTE
        else:
            types[number] = TokenType.NORMAL
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(num_rows)]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if not is_llama:
        return Vocabulary(tokens, types, [" ".join(pair) for pair in merges], [])
    # llama.cpp joins the two neighbours whose token has the highest score; in a tokenizer made from SentencePiece's, merges are sorted by it
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return Vocabulary(tokens, types, [], [-float(ranks[token]) if token in ranks else _NO_SCORE for token in tokens])


def _strings(value: Any) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _strings(part)]
    return [value] if isinstance(value, str) else []
