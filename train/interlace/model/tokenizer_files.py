"""The files of a tokenizer as the authors' folders hold them, and PaddleMIX's."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, LlamaTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from interlace.errors import InputError
from interlace.files import write_json
from interlace.model.layouts import ROWS_ADDED

_PADDLE = "sentencepiece.bpe.model"  # PaddleNLP's name for tokenizer.model
_ANY_OF = (("tokenizer.json",), ("tokenizer.model",), (_PADDLE,), ("vocab.json", "merges.txt", "tokenizer_config.json"))  # each a whole tokenizer
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_MOST_ROWS_UNUSED = 1024  # of a vocabulary; Qwen's leave 290 and 418


def load_tokenizer(folder: Path, text: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with `<image>`, and something to pad with.

    Args:
        text: the language model's configuration.

    Raises:
        InputError: files are missing or broken, or are another model's.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _ANY_OF):  # without them transformers makes an empty one
        expected = "; or ".join(" with ".join(names) for names in _ANY_OF)
        raise InputError(f"{folder}: no tokenizer in this folder, or half of one; expected {expected}; fetch the model once more")
    with tempfile.TemporaryDirectory() as name:
        copy_tokenizer(folder, Path(name))
        # of SentencePiece's file AutoTokenizer makes one that cuts otherwise, where the settings name no class, or PaddleMIX's
        kind: Any = AutoTokenizer if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")) else LlamaTokenizer
        try:
            tokenizer = kind.from_pretrained(name, config=text, trust_remote_code=False) if kind is AutoTokenizer else kind.from_pretrained(name)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: the tokenizer cannot be loaded: {error!r}; it may be half-downloaded: fetch it once more") from error
    tokenizer.name_or_path = str(folder)
    if not text.vocab_size - _MOST_ROWS_UNUSED < len(tokenizer) < text.vocab_size + ROWS_ADDED:
        raise InputError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens, and a vocabulary of {text.vocab_size} in config.json; fetch the model's own tokenizer"
        )
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer  # type: ignore[no-any-return]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files as they are; PaddleMIX's by the names that transformers reads."""
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _PADDLE).is_file() and not (source / "tokenizer.model").is_file():
        shutil.copyfile(source / _PADDLE, folder / "tokenizer.model")
        settings = folder / "tokenizer_config.json"
        if settings.is_file():
            renamed = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "LlamaTokenizer"}
            write_json(settings, renamed)
