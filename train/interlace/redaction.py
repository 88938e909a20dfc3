"""What must not be written down: tokens, keys and passwords, by the name they go by, by where they stand in a URL, or by their value."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Counts of tokens and tokenizers are no secrets: max_tokens_per_batch, include_num_input_tokens_seen, tokenizer_name
SECRET_NAME = re.compile(r"token(?!s_|i[sz])|secret|passw|credential|signature|api[_-]?key|access[_-]?key|private[_-]?key", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^\s/?#@\"'\\]*@")
_QUERY_VALUE = re.compile(rf"([?&;][^\s=&;#]*(?:{SECRET_NAME.pattern}|sig|key|auth)[^\s=&;#]*=)[^\s&;#\"'\\]+", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SHORTEST = 8  # a shorter value may be an ordinary word


def without_secrets(value: Any) -> Any:
    """A copy of arguments as they may be written down, at any depth: secrets are left out of objects, and made unreadable in strings.

    A number or a truth value is no secret, whatever it is called.
    """
    if isinstance(value, Mapping):
        return {name: without_secrets(item) for name, item in value.items() if isinstance(item, bool | int | float) or not SECRET_NAME.search(str(name))}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return readable(value) if isinstance(value, str) else value


def readable(text: str) -> str:
    """The text with `***` for logins and keys in URLs, tokens of the Hugging Face hub, and the values of environment variables that are named like secrets."""
    text = _QUERY_VALUE.sub(r"\1***", _LOGIN_IN_URL.sub("***@", text))
    text = _HUB_TOKEN.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and SECRET_NAME.search(name) and not value.startswith(("/", ".")):  # a path to a key is no key
            text = text.replace(value, "***")
    return text


def tells_secrets(words: list[str]) -> bool:
    """Whether a command line holds a secret: `--hub_token VALUE`, `--hub_token=VALUE`, or one inside a value."""
    return any(readable(word) != word or (word.startswith("--") and SECRET_NAME.search(word.partition("=")[0])) for word in words)
