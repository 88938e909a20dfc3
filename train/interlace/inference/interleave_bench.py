"""LLaVA-Interleave Bench (arXiv 2407.07895) by its authors' rules, to the bit: what they normalise, how they score, which data sets make a category."""

import re
from collections.abc import Mapping

from rouge import Rouge

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LETTERS = frozenset("abcdefgh")
_LONGEST_ANSWER = 512  # characters of a prediction that are compared

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "spot_the_diff": ("Spot-the-Diff", "Birds-to-Words", "CLEVR-Change"),
    "image_edit": ("IEdit", "HQ-Edit", "MagicBrush"),
    "story": ("AESOP", "FlintstonesSV", "PororoSV", "VIST"),
    "visual_cloze": ("COMICS_Dialogue", "RecipeQA_VisualCloze"),
    "text_rich": ("WebQA", "TQA", "OCR-VQA", "DocVQA"),
    "multi_image_vqa": ("MIT-States_StateCoherence", "MIT-States_PropertyCoherence", "VISION", "RecipeQA_ImageCoherence"),
    "puzzle": ("RAVEN",),
    "nlvr2": ("NLVR2_Mantis",),
    "qbench": ("QBench",),
}
# LLaVA-NeXT-Interleave by its authors, in 0..1; `in_domain_average` is over their table's columns, which need not be these nine
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "0.5B": {"nlvr2": 0.678, "qbench": 0.520, "in_domain_average": 0.439},
    "7B": {"nlvr2": 0.888, "qbench": 0.742, "in_domain_average": 0.586},
    "14B": {"nlvr2": 0.911, "qbench": 0.767, "in_domain_average": 0.623},
}

_rouge = Rouge(metrics=["rouge-l"])


def without_punctuation(text: str) -> str:
    """As VQA's official evaluation leaves punctuation out, which these rules took over.

    A punctuation mark goes if it touches a space anywhere in the text, or if the text has a comma between digits; else a space takes its place. Periods go,
    the first 32 that stand before no digit.
    """
    found, has_thousands = text, re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        found = found.replace(mark, "" if has_thousands or mark + " " in text or " " + mark in text else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)


def normalised(text: str) -> str:
    """A prediction or reference as both are compared, for either kind of question."""
    found = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    return found.strip("'").strip('"').strip(")").strip("(").strip().lower()


def rouge_l(prediction: str, reference: str) -> float | None:
    """The score of an open-ended answer: F of ROUGE-L, 0..1, by the package `rouge`; None where the reference is empty, which the authors leave out."""
    prediction, reference = normalised(prediction), normalised(reference)
    if not reference.strip("."):
        return None
    prediction = prediction[:_LONGEST_ANSWER]
    return float(_rouge.get_scores(prediction, reference)[0]["rouge-l"]["f"]) if prediction.strip(".") else 0.0


def choice_accuracy(prediction: str, reference: str) -> float:
    """The score of a multiple-choice answer: 1 if both are the same; of a prediction with colons, the last letter that stands alone between them counts."""
    found = normalised(prediction)
    for part in found.split(":") if ":" in found else ():
        if part.strip() in _LETTERS:
            found = part.strip()
    return float(found == normalised(reference))


def lenient_choice_accuracy(prediction: str, reference: str) -> float:
    """As `choice_accuracy`, for what people mean by their answers, too: `A. yes`, `(A) yes`, `The answer is A`, `Answer: A because ..`."""
    expected = normalised(reference)
    if choice_accuracy(prediction, reference) or expected not in _LETTERS:
        return choice_accuracy(prediction, reference)
    text = prediction.strip()
    named = re.search(r"\b(?i:answer|option|choice)\b(?:\s+is)?\s*[:：]?\s*[\"'(\[*]*([A-H]\b(?!')|[a-h](?=[)\].,\"'*]|$))", text)
    first = re.match(r"[\"'(\[*]*([A-Ha-h])(?:[)\].:,、。*\"']|$)", text) or re.match(r"([B-H])\s", text)
    found = named or first
    return float(found is not None and found[1].lower() == expected)
