"""A tokenizer as the authors' code reads it: with the files from before tokenizer.json, which the versions of transformers that it pins ask for."""

import json
from pathlib import Path
from typing import Any

from interlace.model.kept import KEPT, copy_text_files, has_original


def write_tokenizer(source: Path, folder: Path) -> list[str]:
    """Writes the tokenizer of a model in hub layout, and how it generates: the original's files to the bit, else what can be made of the hub's.

    Returns:
        What is missing then, in a line each.
    """
    if has_original(source):
        copy_text_files(source / KEPT, folder)
        return []
    copy_text_files(source, folder)
    copy_text_files(source / KEPT, folder)
    path = folder / "tokenizer.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"type": "none"}}
    if content["model"]["type"] != "BPE":
        return []
    is_sentencepiece = content["model"].get("byte_fallback", False)
    _write_older_form(content, folder, is_sentencepiece)
    if is_sentencepiece and not (folder / "tokenizer.model").is_file():
        return [f"tokenizer.model is missing: {source} has none, and the authors' code asks for it; copy it from the model that this one was made of"]
    return []


def _write_older_form(content: dict[str, Any], folder: Path, is_sentencepiece: bool) -> None:
    """Each merge as one text, as tokenizers before 0.20 read them; added tokens, vocabulary and merges in files of their own, as slow tokenizers do."""
    model = content["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] not in model["vocab"]}
    files = {"tokenizer.json": json.dumps(content, ensure_ascii=False, indent=2), "added_tokens.json": json.dumps(added, ensure_ascii=False, indent=2)}
    if not is_sentencepiece:
        files["vocab.json"] = json.dumps(model["vocab"], ensure_ascii=False)
        files["merges.txt"] = "\n".join(["#version: 0.2", *model["merges"]])
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
