"""The embedded demo: real digit scans composed into interleaved tasks, written as ordinary LLaVA json and PNG files.

The scans are the 1,797 handwritten digits (8x8, 16 grey levels) that ship with scikit-learn, from UCI's Optical Recognition of Handwritten Digits.
They are split by scan into training, validation and test; only training scans are rotated, shifted and scaled.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

from interlace.errors import InputError
from interlace.files import set_default_mode

FOLDER = Path(__file__).resolve().parents[3] / "data" / "demo"
MODEL = FOLDER / "model"
VERSION = "14"  # raise it when the recipe below changes: files are made anew
IMAGE_SIZE = 32
BASE_TASKS = ("name", "name_k", "read", "text")
NEW_TASKS = ("largest", "even", "reverse")
_COUNTS = {"train": 1297, "validation": 140, "test": 360}  # scans
_VARIANTS = {"pretrain": 16, "train": 16, "validation": 1, "test": 1}  # distorted copies of each scan
# rows of each task
_ROWS = {
    "pretrain": {"name": 16_000, "name_k": 22_000, "read": 24_000, "text": 6_000},
    "train": {"largest": 6_000, "even": 7_000, "reverse": 3_000, "name": 800, "name_k": 1_000, "read": 1_000, "text": 600},
    "validation": dict.fromkeys((*BASE_TASKS, *NEW_TASKS), 200),
    "test": dict.fromkeys((*BASE_TASKS, *NEW_TASKS), 300),
}
# pairs of a right answer and a near miss: those to learn from show one in five as negatives, which no other row does; those to test on, all
_PAIRS = {"preference": 7_500, "preference_validation": 300, "preference_test": 400}
_NEGATIVES = {"preference": 0.2, "preference_validation": 1.0, "preference_test": 1.0}
_SCANS_OF_PAIRS = {"preference": "train", "preference_validation": "validation", "preference_test": "test"}
_ALIKE = {0: (6, 8, 9), 1: (4, 7), 2: (3, 7), 3: (2, 5, 8, 9), 4: (1, 7, 9), 5: (3, 6, 9), 6: (0, 5, 8), 7: (1, 4, 9), 8: (1, 3, 9), 9: (3, 4, 7, 8)}
SPLITS = (*_ROWS, *_PAIRS)
LETTERS = "ABCD"
Scans = dict[int, list[int]]  # digit -> scan numbers


def prepare() -> Path:
    """The folder that holds a json file for each of `SPLITS`, and their images; made on first use.

    Raises:
        InputError: scikit-learn, which ships the scans, is not installed, or this is no clone of the repository.
    """
    folder = FOLDER / "files"
    if (folder / f"version-{VERSION}").is_file():
        return folder
    if not FOLDER.is_dir():
        raise InputError(f"{FOLDER}: no such folder; the demo lives in a clone of the repository")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError('the demo needs scikit-learn: pip install -e ".[demo]"') from None
    digits = load_digits()
    scratch = Path(tempfile.mkdtemp(prefix="files-", dir=FOLDER))
    write_files(scratch, digits.images, digits.target)
    (scratch / f"version-{VERSION}").touch()
    set_default_mode(scratch)
    if not (folder / f"version-{VERSION}").is_file():
        try:
            if folder.exists():
                folder.rename(scratch.with_name(scratch.name + "-old"))
            scratch.rename(folder)
        except OSError:  # another process was faster
            assert (folder / f"version-{VERSION}").is_file()
    for leftover in (scratch, scratch.with_name(scratch.name + "-old")):
        shutil.rmtree(leftover, ignore_errors=True)
    return folder


def write_files(folder: Path, images: np.ndarray, target: np.ndarray) -> None:
    """Writes all splits: images (scans, 8, 8) with values 0 to 16, target (scans,) digits."""
    order = random.Random("scans").sample(range(len(images)), len(images))
    start = 0
    (folder / "images").mkdir()
    for split, count in tqdm(_COUNTS.items(), desc="writing the demo's images and rows", leave=False):
        scans = order[start : start + count]
        start += count
        for scan in scans:
            randomness = random.Random(f"distort {scan}")
            for variant in range(_VARIANTS[split]):
                draw(images[scan], randomness if variant else None).save(folder / "images" / f"{scan:04d}-{variant}.png")
        by_digit = {digit: [scan for scan in scans if target[scan] == digit] for digit in range(10)}
        for name in [split, "pretrain"] if split == "train" else [split]:
            rows = list(compose(name, by_digit))
            random.Random(f"order {name}").shuffle(rows)
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        for name in (name for name, of in _SCANS_OF_PAIRS.items() if of == split):
            rows = list(compose_pairs(name, by_digit))
            for file in {file for row in rows for file in row.get("images", []) if "negative-" in file}:
                PIL.ImageOps.invert(PIL.Image.open(folder / file.replace("negative-", ""))).save(folder / file)
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")


def draw(scan: np.ndarray, randomness: random.Random | None) -> PIL.Image.Image:
    """A scan (8, 8) as an image; with `randomness` rotated by up to 12 degrees, scaled and shifted by up to 12%."""
    image = PIL.Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8)).resize((IMAGE_SIZE, IMAGE_SIZE), PIL.Image.Resampling.BICUBIC)
    if randomness is None:
        return image
    angle, scale = np.deg2rad(randomness.uniform(-12, 12)), randomness.uniform(0.88, 1.12)
    shift = [randomness.uniform(-0.12, 0.12) * IMAGE_SIZE for _ in range(2)]
    cosine, sine, middle = np.cos(angle) * scale, np.sin(angle) * scale, IMAGE_SIZE / 2
    across = (cosine, -sine, middle - cosine * middle + sine * middle + shift[0])
    down = (sine, cosine, middle - sine * middle - cosine * middle + shift[1])
    return image.transform(image.size, PIL.Image.Transform.AFFINE, (*across, *down), PIL.Image.Resampling.BILINEAR)


def compose(split: str, by_digit: Scans) -> Iterator[dict[str, Any]]:
    """The rows of a split as LLaVA records."""
    for task, count in _ROWS[split].items():
        randomness = random.Random(f"{split} {task}")
        for number in range(count):
            digits, question, answer = TASKS[task](randomness)
            files = _pictures(digits, by_digit, randomness, _VARIANTS[split])
            yield {
                "id": f"{split}-{task}-{number}",
                **({"image": [f"images/{file}" for file in files]} if files else {}),
                "conversations": [{"from": "human", "value": _with_places(question, len(files))}, {"from": "gpt", "value": answer}],
                "metadata": {"dataset": task, "split": split},
            }


def compose_pairs(split: str, by_digit: Scans) -> Iterator[dict[str, Any]]:
    """The rows of a split as pairs: the right answer, and the same with one digit for another that looks alike."""
    randomness = random.Random(split)
    for number in range(_PAIRS[split]):
        is_negative = randomness.random() < _NEGATIVES[split]
        task = randomness.choice(("name", "name_k", "read") if is_negative else (*BASE_TASKS, *NEW_TASKS, "largest", "even", "reverse"))  # those are lost first
        digits, question, answer = TASKS[task](randomness)
        near = {"yes": "no", "no": "yes"}.get(answer) or _with_another_digit(answer, randomness)
        files = _pictures(digits, by_digit, randomness, _VARIANTS[_SCANS_OF_PAIRS[split]])
        yield {
            "id": f"{split}-{number}",
            **({"images": [f"images/{'negative-' * is_negative}{file}" for file in files]} if files else {}),
            "prompt": _with_places(question, len(files)),
            "chosen": answer,
            "rejected": near,
            "metadata": {"dataset": task, "split": split},
        }


def _with_another_digit(answer: str, randomness: random.Random) -> str:
    """The answer with one of its digits replaced by one that looks alike."""
    place = randomness.choice([i for i, letter in enumerate(answer) if letter.isdigit()])
    return f"{answer[:place]}{randomness.choice(_ALIKE[int(answer[place])])}{answer[place + 1 :]}"


def _pictures(digits: list[int], by_digit: Scans, randomness: random.Random, variants: int) -> list[str]:
    return [f"{randomness.choice(by_digit[digit]):04d}-{randomness.randrange(variants)}.png" for digit in digits]


def _with_places(question: str, count: int) -> str:
    """The question behind a place for each image."""
    return "".join([f"Image {LETTERS[i]}: <image>\n" for i in range(count)] if count > 1 else ["<image>\n"] * count) + question


def _some_digits(randomness: random.Random, least: int) -> list[int]:
    return [randomness.randrange(10) for _ in range(randomness.randint(least, 4))]


def _name(randomness: random.Random) -> tuple[list[int], str, str]:
    digit = randomness.randrange(10)
    return [digit], "What digit is this?", str(digit)


def _name_k(randomness: random.Random) -> tuple[list[int], str, str]:
    digits = _some_digits(randomness, 2)
    place = randomness.randrange(len(digits))
    return digits, f"What digit is in image {LETTERS[place]}?", f"image {LETTERS[place]}: {digits[place]}"


def _read(randomness: random.Random) -> tuple[list[int], str, str]:
    digits = _some_digits(randomness, 1)
    return digits, "Read all images in order.", " ".join(map(str, digits))


def _text(randomness: random.Random) -> tuple[list[int], str, str]:
    """Text only: which digit stands at a place, or whether a digit is even."""
    digits = [randomness.randrange(10) for _ in range(randomness.randint(2, 4))]
    place = randomness.randrange(len(digits))
    if randomness.random() < 0.3:
        return [], f"Is the digit {digits[place]} even?", "no" if digits[place] % 2 else "yes"
    listed = "".join(f"Place {LETTERS[i]}: {digit}\n" for i, digit in enumerate(digits))
    return [], f"{listed}What digit is in place {LETTERS[place]}?", f"place {LETTERS[place]}: {digits[place]}"


def _largest(randomness: random.Random) -> tuple[list[int], str, str]:
    digits = _some_digits(randomness, 2)
    return digits, "Which digit is the largest?", f"digit {max(digits)}"


def _even(randomness: random.Random) -> tuple[list[int], str, str]:
    digits = _some_digits(randomness, 1)
    even = sum(digit % 2 == 0 for digit in digits)
    return digits, "How many images show an even digit?", f"{even} of {len(digits)}"


def _reverse(randomness: random.Random) -> tuple[list[int], str, str]:
    """Different digits, so that reading them in order is never right."""
    digits = randomness.sample(range(10), randomness.randint(2, 4))
    return digits, "Read all images in reverse order.", " ".join(map(str, reversed(digits)))


TASKS = {"name": _name, "name_k": _name_k, "read": _read, "text": _text, "largest": _largest, "even": _even, "reverse": _reverse}
