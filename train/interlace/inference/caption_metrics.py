"""Scores of many captions together: BLEU and CIDEr, by the libraries that the field reports."""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from interlace.errors import InputError

Pair = tuple[str, Sequence[str]]  # a prediction and its references, each with a word in it
CorpusMetric = Callable[[Sequence[Pair]], dict[str, Any]]  # -> `score`, and what else tells how it was found

_CHINESE = re.compile("[㐀-鿿豈-﫿]")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ll|ve))\b", re.IGNORECASE)
_PUNCTUATION = frozenset([*".?!,:;-'`\"(){}", "--", "...", "''", "``", *"。？！，：；、“”（）"])


def bleu(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Corpus BLEU by sacrebleu with its defaults, in 0..1, and sacrebleu's `signature`; Chinese references are cut into characters (its tokenizer `zh`).

    Raises:
        InputError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise _missing("bleu", "sacrebleu") from None
    if not pairs:
        return {"score": 0.0}
    is_chinese = any(_CHINESE.search(reference) for _, references in pairs for reference in references)
    metric = BLEU(tokenize="zh" if is_chinese else "13a")
    found = metric.corpus_score([prediction for prediction, _ in pairs], list(zip_longest(*(references for _, references in pairs))))
    return {"score": found.score / 100, "signature": str(metric.get_signature())}


def cider(pairs: Sequence[Pair]) -> dict[str, Any]:
    """CIDEr-D by pycocoevalcap, as it gives it: 0..10, and 1.0 is what tables write as 100. Words as `caption_words` has them.

    Words weigh by how few rows of the corpus have them: a single row scores 0 whatever it says.

    Raises:
        InputError: pycocoevalcap or sacrebleu is not installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
        from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh
    except ImportError:
        raise _missing("cider", "pycocoevalcap") from None
    if not pairs:
        return {"score": 0.0}
    tokenize = TokenizerZh()
    expected = {number: [caption_words(reference, tokenize) for reference in references] for number, (_, references) in enumerate(pairs)}
    score, _ = Cider().compute_score(expected, {number: [caption_words(prediction, tokenize)] for number, (prediction, _) in enumerate(pairs)})
    return {"score": float(score) / 10, "cider": float(score)}


def caption_words(text: str, tokenize: Callable[[str], str]) -> str:
    """The words of a caption between spaces, close to the official evaluation's, which needs Java (Stanford's Penn Treebank tokenizer): sacrebleu's cut,
    lower case, `'s` and `n't` words of their own, punctuation left out, each Chinese character a word."""
    words = tokenize(_CLITIC.sub(r" \1", text.replace("’", "'").lower())).split()
    return " ".join(word for word in words if word not in _PUNCTUATION)


def _missing(metric: str, package: str) -> InputError:
    return InputError(f'the metric {metric} needs {package}: pip install -e ".[evaluation]"')
