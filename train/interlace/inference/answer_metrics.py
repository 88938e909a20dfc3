"""How one answer is scored against one reference or several: exact match, VQA accuracy, ANLS, relaxed accuracy."""

import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from interlace.inference.interleave_bench import without_punctuation

Rule = Callable[[str, Sequence[str]], float | None]  # prediction, references -> 0..1, or None where a row does not count

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_NUMBERS["ten"] = "10"
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
    it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
"""
# with one apostrophe left out, whichever -> as it is written; one entry of the authors' table goes the other way
_APOSTROPHES = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"} | {
    "somebody'd": "somebodyd"
}
_ENOUGH = 3  # people who gave an answer make it right
_LEAST_SIMILARITY = 0.5
_LARGEST_DEVIATION = 0.05


def best_of(rule: Callable[[str, str], float | None]) -> Rule:
    """The rule for several references, of which any will do: the best score; None if none of them counts."""

    def best(prediction: str, references: Sequence[str]) -> float | None:
        return max((score for reference in references if (score := rule(prediction, reference)) is not None), default=None)

    return best


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text, white space around them aside; else 0."""
    return float(prediction.strip() == reference.strip())


def vqa_answer(text: str) -> str:
    """An answer as VQA's official evaluation compares it (https://visualqa.org/evaluation.html): no punctuation, articles or capitals, numbers up to ten in
    digits, apostrophes where contractions lack one."""
    words = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    digits = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_APOSTROPHES.get(word, word) for word in digits if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float | None:
    """VQA accuracy (arXiv 1505.00468): min(people who gave this answer / 3, 1), averaged over all ways to leave one of the people out.

    Of fewer than four people, all but the one left out have to agree; a single reference has to be met. Both sides are always processed; the authors' script
    leaves references alone where all of them are the same text.
    """
    answer, given = vqa_answer(prediction), [vqa_answer(reference) for reference in references]
    if not any(reference.strip() for reference in references):
        return None
    if len(given) == 1:
        return float(answer == given[0])
    agree, enough = given.count(answer), min(_ENOUGH, len(given) - 1)
    return sum(min((agree - (other == answer)) / enough, 1.0) for other in given) / len(given)


def anls(prediction: str, reference: str) -> float | None:
    """ANLS (arXiv 1907.00490) of a row: 1 - edit distance / length of the longer text, 0 where that is below 0.5; capitals and runs of white space aside.

    As in the Robust Reading Competition's script, lengths are those of the texts as they are, and 0.5 itself counts.
    """
    if not reference.strip():
        return None
    distance = Levenshtein.distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    similarity = 1 - distance / max(len(prediction.upper()), len(reference.upper()))
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def relaxed_accuracy(prediction: str, reference: str) -> float | None:
    """ChartQA's relaxed accuracy (arXiv 2203.10244): numbers within 5% of the reference are right, percentages being numbers; other texts have to be the
    same, capitals aside."""
    prediction, reference = prediction.strip(), reference.strip()
    if not reference:
        return None
    found, expected = _number(prediction), _number(reference)
    if found is None or not expected:  # what is within 5% of 0?
        return float(prediction.lower() == reference.lower())
    return float(abs(found - expected) / abs(expected) <= _LARGEST_DEVIATION)


def _number(text: str) -> float | None:
    """3, -0.5, 1e3 or 12%; None for any other text, thousands with commas among them."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?%?", text, re.ASCII | re.IGNORECASE):
        return None
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
