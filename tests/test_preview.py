"""The preview: what the page marks, asked of a headless Chromium, is what training counts; and how it behaves under the keyboard and under hostile data."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from interlace.data.batch import Collator
from interlace.data.ledger import Ledger
from interlace.data.page import data_uri
from interlace.data.preview import Picture, Shown, Summary, Tokens, Viewer, characters, choose, page, preview_line, restored, token_bytes
from interlace.data.reading import Headers, Outcome, records_of
from interlace.data.sources import read_entries
from interlace.model.loading import Processing
from interlace.training.parts import processing_of, row_reader
from tests.conftest import IMAGE_TOKENS, write_rows
from tests.page_reader import Browser
from tests.test_scripts import config_file, run

HOSTILE = """</script><img src=x onerror="document.title='owned'"> <!-- <script>document.title='owned'</script> & 'q' "q" ${1} `x` \\u003c </p>"""
UNSEEN = "bell\x07 escape\x1b[31m zero\x00 override \u202egnp.exe\u202c isolate \u2066 separator \u2028 bom \ufeff"
WORLD = "图里有什么？ 😀 👨‍👩‍👧 𠮷 Ünïcödé é עברית"

# [id, has a background of its own, weight] of every token of an element that was not left out, in order
MARKS = """(part) => [...part.querySelectorAll('[data-ids]')].filter((e) => !e.closest('del')).flatMap((e) => {
  const marked = getComputedStyle(e).backgroundColor !== 'rgba(0, 0, 0, 0)';
  const ids = e.dataset.ids.split(' ').map(Number);
  return (e.dataset.count ? Array(Number(e.dataset.count)).fill(ids[0]) : ids).map((id) => [id, marked, Number(e.dataset.weight ?? 1)]);
})"""
VISIBLE = "[...document.querySelectorAll('.sample:not([hidden])')].map((e) => Number(e.dataset.index))"


def turns(*texts: str, **changes: Any) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)], **changes}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of 0 to 3 images, weighted, shortened, skipped and hostile ones."""
    path = write_rows(tmp_path / "data", 8)
    records = json.loads(path.read_text())
    weighted = turns("one", "not learned", "two", "half", "three", "twice")
    for turn, weight in zip(weighted["conversations"][1::2], (0, 0.5, 2), strict=True):
        turn["loss"] = weight
    long = turns("First? <image>", "kept", "Second? <image>", "left out " * 200, image=["pictures/0.png", "pictures/1.png"])
    records += [
        weighted,
        long,
        turns("<image> which?", "3", image="pictures/gone.png"),
        turns("<image>", "a", image=[]),
        turns(HOSTILE, UNSEEN),
        turns(WORLD, WORLD),
    ]
    path.write_text(json.dumps(records))
    return path


def read(arguments: dict[str, Any], kind: str = "supervised") -> tuple[Processing, list[Outcome], list[Shown]]:
    processing = processing_of(arguments["model_name_or_path"], arguments)
    reader, headers = row_reader(arguments, processing, kind), Headers()  # type: ignore[arg-type]
    outcomes = [reader.read(record, headers) for record in records_of(read_entries(arguments["dataset"]["train"], 0))]
    images: Any = processing.image_processor
    viewer = Viewer(processing.process_images, processing.images.picture, images.image_mean, images.image_std, processing.config.image_token_id)
    return processing, outcomes, [viewer.shown(outcome, headers) for outcome in outcomes]


def write_page(path: Path, tokenizer: PreTrainedTokenizerBase, shown: list[Shown], outcomes: list[Outcome] | None = None) -> Path:
    admitted = [outcome.row for outcome in outcomes or [] if outcome.row is not None]
    lengths, images, supervised = ([getattr(row, name) for row in admitted] for name in ("length", "image_tokens", "supervised_tokens"))
    ledger = Ledger.of([outcome.entry for outcome in outcomes or []])
    counts = np.array([len(tokens) for tokens in images], np.int64)
    summary = Summary("a.json", "demo", 300, ledger, np.array(lengths, np.int64), counts, np.array(supervised, np.int64))
    path.write_text(page(shown, summary, tokenizer), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, rows: Path, make_arguments: Callable[..., dict[str, Any]], tmp_path: Path) -> tuple[Browser, Path, list[Outcome], Processing]:
    """The page of `rows`, open."""
    processing, outcomes, shown = read(make_arguments(rows, max_length=400, system_prompt="", cache_dir=str(tmp_path / "cache")))
    path = write_page(tmp_path / "page.html", processing.tokenizer, shown, outcomes)
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.open(path)
    assert browser.errors == []
    return browser, path, outcomes, processing


def test_the_page_marks_what_the_loss_counts(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, _, outcomes, processing = opened
    assert [outcome.entry.status if outcome.entry else "trained" for outcome in outcomes] == ["trained"] * 9 + ["shortened"] + ["skipped"] * 2 + ["trained"] * 2
    shown = browser.ask(f"articles.map({MARKS})")
    assert browser.ask("articles.map((e) => e.dataset.status)") == [outcome.entry.status if outcome.entry else "trained" for outcome in outcomes]
    collate = Collator(processing.process_images, processing.config.image_token_id).pack
    for outcome, tokens in zip(outcomes, shown, strict=True):
        if outcome.row is None:
            assert tokens == []
            continue
        batch = collate([(0, outcome.row)])
        assert [token for token, _, _ in tokens] == batch.input_ids[0].tolist()
        labels = torch.full_like(batch.input_ids[0], -100)
        labels[batch.rows[batch.row_index] + 1] = batch.targets
        assert [token if marked else -100 for token, marked, _ in tokens] == labels.tolist()
        assert [weight for _, marked, weight in tokens if marked] == batch.weights.tolist()


def test_every_token_says_its_id_label_and_position(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, _, outcomes, processing = opened
    browser.point("#sample-0 mark")
    said = browser.ask(
        "new Promise((done) => { const look = () => (byId('tip').hidden ? requestAnimationFrame(look) : done(byId('tip').textContent)); look(); })"
    )
    assert re.fullmatch(r"id (\d+) · label \1 · weight 1 · position \d+", said)
    browser.ask("document.querySelectorAll('.run').forEach(split)")
    each = "[...article.querySelectorAll('.token')].filter((e) => !e.closest('del')).map((e) => [e.dataset.at, e.dataset.id, e.dataset.label])"
    for outcome, tokens in zip(outcomes, browser.ask(f"articles.map((article) => {each})"), strict=True):
        if outcome.row is not None:
            line = preview_line("", outcome.row, None, processing.config.image_token_id)
            at_position: dict[int, tuple[int, int]] = {}
            for at, ids, labels in tokens:  # a character of several tokens says them all
                at_position |= {int(at) + i: pair for i, pair in enumerate(zip(map(int, ids.split()), map(int, labels.split()), strict=True))}
            image = processing.config.image_token_id
            expected = {i: pair for i, pair in enumerate(zip(line["input_ids"], line["labels"], strict=True)) if pair[0] != image}
            assert at_position == expected


def test_what_was_left_out_is_struck_out(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, _, _, _ = opened
    assert browser.ask("document.querySelectorAll('del').length") == 1
    assert "left out left out" in browser.ask("articles[9].querySelector('del').textContent")
    style = "(e) => getComputedStyle(e).textDecorationLine"
    assert set(browser.ask(f"[...articles[9].querySelectorAll('del .run')].map({style})")) == {"line-through"}
    assert set(browser.ask(f"[...articles[9].querySelectorAll('.prompt > .block .run')].map({style})")) == {"none"}
    assert "dropped 1 of 2 exchanges" in browser.ask("articles[9].querySelector('.why').textContent")
    assert "gone.png does not exist" in browser.ask("articles[10].querySelector('.why').textContent")
    assert '"pictures/gone.png"' in browser.ask("articles[10].querySelector('details pre').textContent")


def test_images_stand_at_their_place_as_the_model_gets_them(opened: tuple[Browser, Path, list[Outcome], Processing], rows: Path) -> None:
    browser, _, outcomes, processing = opened
    assert browser.ask("[...articles[3].querySelectorAll('.image b')].map((e) => e.textContent)") == [f"image {n} × {IMAGE_TOKENS}" for n in (1, 2, 3)]
    text = browser.ask("articles[2].querySelector('.tokens').innerText")
    assert re.search(r"Image A: \n?image 1 × 4[\s\S]*Image B: \n?image 2 × 4[\s\S]*Which digit", text)
    row = outcomes[3].row
    assert row is not None
    sources = browser.ask("[...articles[3].querySelectorAll('.image img')].map((e) => e.src)")
    for place, source in zip(row.images, sources, strict=True):
        shown = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))), np.float32)
        values = processing.image_processor(images=PIL.Image.open(place.path), return_tensors="np")["pixel_values"][0]
        naive = np.stack([(values[c] * 0.5 + 0.5) * 255 for c in range(3)], axis=-1)
        assert source.startswith("data:image/png") and np.abs(shown - naive).max() <= 0.51  # rounded to whole numbers
        assert Path(place.path).is_relative_to(rows.parent.resolve())


def test_an_image_that_needs_no_resizing_comes_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    values = (pixels.transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    back = PIL.Image.open(io.BytesIO(base64.b64decode(data_uri(restored(values.astype(np.float32), mean, std)).partition(",")[2])))
    assert (np.asarray(back) == pixels).all()


def test_hostile_data_is_text(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, path, _, _ = opened
    assert browser.ask("document.title") == "What the model will see"
    assert browser.ask("[document.scripts.length, document.querySelectorAll('.sample script, .sample p img, [onerror]').length]") == [2, 0]
    assert HOSTILE in browser.ask("articles[12].querySelector('.tokens').textContent")
    shown = browser.ask("[...articles[12].querySelectorAll('.sign')].map((e) => e.dataset.sign)")
    assert [sign for sign in shown if sign.startswith("U+")] == ["U+0007", "U+001B", "U+0000", "U+202E", "U+202C", "U+2066", "U+2028", "U+FEFF"]
    assert not set("\x00\x07\x1b\u202e\u2066\ufeff") & set(browser.ask("articles[12].textContent"))
    assert browser.ask("articles[13].querySelector('mark').textContent") == WORLD
    assert [address for address in browser.requests if not address.startswith("data:")] == [path.as_uri()]


def test_hostile_names_and_reasons_are_text(browser: Browser, demo_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    uri = data_uri(PIL.Image.new("RGB", (8, 8)))
    bad_name = f"half \udce4 {HOSTILE}"
    picture = Picture(demo_tokenizer.get_vocab()["<image>"], 4, uri, (8, 8), (9, 9), bad_name, 1.5)
    shown = [Shown(bad_name, 0, "trained", HOSTILE, 4, (picture,)), Shown("b", 1, "skipped", HOSTILE, record=HOSTILE)]
    browser.open(write_page(tmp_path / "page.html", demo_tokenizer, shown))
    assert browser.errors == [] and browser.ask("document.title") == "What the model will see"
    assert browser.ask("articles.map((e) => e.querySelector('.why').textContent)") == [HOSTILE, HOSTILE]
    assert browser.ask("[articles[0].querySelector('img').alt, articles[1].querySelector('pre').textContent]") == [bad_name, HOSTILE]
    assert "at 1.50 s" in browser.ask("articles[0].querySelector('.image').textContent")


def test_nothing_is_fetched_and_no_other_script_runs(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, path, _, _ = opened
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href|action|url\()\s*=?\s*["']?\s*(?:https?:)?//|@import|<link|<iframe""", html)
    violation = "new Promise((done) => {{ addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective), {{ once: true }}); {}; }})"
    assert browser.ask(violation.format("new Image().src = 'http://127.0.0.1:9/x.png'")) == "img-src"
    assert browser.ask(violation.format("fetch('http://127.0.0.1:9/x').catch(() => 0)")) == "connect-src"
    assert browser.ask(violation.format("document.body.append(make('button', { onclick: 'owned = 1' })); document.body.lastChild.click()")).startswith(
        "script-src"
    )
    assert browser.ask("typeof owned") == "undefined"


def test_filters_by_status_source_and_text_live_in_the_address(opened: tuple[Browser, Path, list[Outcome], Processing], rows: Path) -> None:
    browser, path, outcomes, processing = opened
    status = [outcome.entry.status if outcome.entry else "trained" for outcome in outcomes]
    for wanted in ("skipped", "shortened", "trained"):
        browser.open(path, f"#status={wanted}")
        assert browser.ask(VISIBLE) == [i for i, value in enumerate(status) if value == wanted]
    browser.click("#statuses [value=skipped]")
    assert browser.ask("location.hash") == "#status=skipped"
    assert browser.ask(VISIBLE) == [10, 11]
    assert browser.ask("byId('shown').value") == "2 of 14 samples"
    browser.press("f")
    for letter in "gone":
        browser.press(letter)
    assert browser.ask(VISIBLE) == [10]
    assert browser.ask("location.hash") == "#status=skipped&find=gone"
    browser.press("Escape")
    browser.click("#statuses [value='']")
    assert browser.ask(VISIBLE) == [10]  # the word still holds
    # another source
    other = [Shown("other.json", 70, "trained", None, 1, (Tokens([5], [5], [1.0]),)), Shown(str(rows), 71, "skipped", "x: y")]
    browser.open(write_page(path.with_name("two.html"), processing.tokenizer, other), "#source=other.json")
    assert browser.ask(VISIBLE) == [70]
    assert browser.ask("[...byId('source').options].map((e) => e.value)") == ["", "other.json", str(rows)]


def test_the_keyboard_reaches_everything(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, path, _, _ = opened
    current = "[document.querySelector('[aria-current]')?.dataset.index, document.activeElement.dataset.index, location.hash]"
    for key, index in (("j", 0), ("ArrowRight", 1), ("j", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
        browser.press(key)
        assert browser.ask(current) == [str(index), str(index), f"#sample={index}"]
    browser.press("l")
    browser.press("l")
    wait = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    second = browser.ask("articles[0].querySelectorAll('.token')[1].dataset.id")
    assert browser.ask("byId('tip').textContent").startswith(f"id {second} · label -100 · position 1")
    browser.press("t")
    assert browser.ask(f"{wait}.then(() => [document.body.className, byId('edges').getAttribute('aria-pressed')])") == ["edges", "true"]
    browser.press("?")
    assert browser.ask("byId('help').open")
    browser.press("Escape")
    assert not browser.ask("byId('help').open")
    browser.open(path)
    reached = []
    for _ in range(11):
        browser.press("Tab")
        reached.append(
            browser.ask("document.activeElement.id || document.activeElement.value || document.activeElement.className || document.activeElement.tagName")
        )
    assert reached[:3] == ["edges", "theme", "ask"] and {"trained", "shortened", "skipped", "source", "find"} <= set(reached)
    assert reached[-1] in ("image", "SUMMARY")


def test_an_image_grows_under_enter(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, _, _, _ = opened
    browser.ask("articles[3].querySelector('.image').focus()")
    browser.press("Enter")
    assert browser.ask("byId('large').open")
    caption = "document.querySelector('#large p').textContent"
    first = browser.ask(caption)
    assert re.fullmatch(r"image 1 × 4 tokens · 32 × 32 after processing, 24 × 2\d in the file · pictures/\d\.png", first)
    browser.press("ArrowRight")
    assert browser.ask(caption).startswith("image 2")
    browser.press("ArrowLeft")
    assert browser.ask(caption) == first
    browser.press("Escape")
    assert browser.ask("[byId('large').open, document.activeElement === articles[3].querySelector('.image')]") == [False, True]


def test_light_and_dark_are_readable(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, path, _, _ = opened

    def luminance(colour: str) -> float:  # WCAG 2.2, relative luminance
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        return float(np.dot([0.2126, 0.7152, 0.0722], [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]))

    def contrast(one: str, two: str) -> float:
        low, high = sorted((luminance(one), luminance(two)))
        return (high + 0.05) / (low + 0.05)

    style = "((e) => {{ const s = getComputedStyle(e); return [s.color, s.backgroundColor, s.borderBottomColor]; }})(document.querySelector({!r}))"
    papers = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.open(path)
        papers[scheme] = paper = browser.ask(style.format("body"))[1]
        ink, ground, edge = browser.ask(style.format(".sample mark:not(.special)"))
        assert contrast(ink, ground) >= 7 and contrast(edge, paper) >= 3  # text; what marks it, for those who do not see the hue
        for text in ("body", ".numbers", ".special:not(mark)", ".status.trained", ".status.shortened", ".status.skipped", "del .run", ".axis"):
            assert contrast(browser.ask(style.format(text))[0], paper) >= 4.5, (scheme, text)
    assert luminance(papers["light"]) > 0.8 and luminance(papers["dark"]) < 0.05
    browser.press("d")
    assert browser.ask(style.format("body"))[1] == papers["light"] and browser.ask("location.hash") == "#theme=light"
    browser.press("d")
    browser.prefer("light")
    assert browser.ask(style.format("body"))[1] == papers["dark"]


def test_nothing_overflows_a_narrow_window(opened: tuple[Browser, Path, list[Outcome], Processing]) -> None:
    browser, path, _, _ = opened
    for width in (360, 700, 1600):
        browser.resize(width, 700)
        browser.open(path)
        assert browser.ask("document.documentElement.scrollWidth") <= width


def test_a_pair_shows_one_prompt_and_both_answers(browser: Browser, tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    write_rows(tmp_path / "data", 1)
    record = {"prompt": "A <image> or B <image>?", "chosen": "The first one.", "rejected": "None", "image": ["pictures/0.png", "pictures/1.png"]}
    own = {**record, "rejected_image": ["pictures/2.png", "pictures/3.png"]}
    (tmp_path / "data" / "rows.json").write_text(json.dumps([record, own]))
    processing, outcomes, shown = read(make_arguments(tmp_path / "data" / "rows.json", cache_dir=str(tmp_path / "cache")), "preference")
    browser.open(write_page(tmp_path / "page.html", processing.tokenizer, shown, outcomes))
    parts = browser.ask(f"articles.map((e) => ['.prompt', '[data-name=chosen]', '[data-name=rejected]'].map((part) => ({MARKS})(e.querySelector(part))))")
    encode, end = processing.template.encode_prompt, processing.template.end
    for outcome, said in zip(outcomes, parts, strict=True):
        assert outcome.row is not None and outcome.sample is not None
        line = preview_line("", outcome.row, None, processing.config.image_token_id)
        assert [[token for token, _, _ in part] for part in said] == [line["prompt_ids"], line["chosen_ids"], line["rejected_ids"]]
        answers = [[token for token, marked, _ in part if marked] for part in said]
        assert answers == [[], *([*processing.template.text_ids(text), end] for text in ("The first one.", "None"))]
        prompt = encode(outcomes[0].sample.prompt)  # type: ignore[union-attr]
        widths = [IMAGE_TOKENS if token == processing.config.image_token_id else 1 for token in prompt]
        expanded = [token for token, width in zip(prompt, widths, strict=True) for _ in range(width)]
        trunk, leaf = (line["prompt_ids"], []) if outcome.record.index == 0 else ([], expanded)
        assert trunk in ([], expanded) and line["rejected_ids"] == [*leaf, *answers[2]]
    assert browser.ask("articles[1].querySelectorAll('.answer img').length") == 4
    assert len(set(browser.ask("[...articles[1].querySelectorAll('.answer img')].map((e) => e.src)"))) == 4


def test_a_frame_of_a_video_says_its_time(tmp_path: Path, make_arguments: Callable[..., dict[str, Any]]) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for number in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 25 * number, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "rows.json").write_text(json.dumps([turns("<video> what?", "grey", video="clip.mp4")]))
    _, _, (shown,) = read(make_arguments(tmp_path / "rows.json", num_frames=3, cache_dir=str(tmp_path / "cache")))
    pictures = [piece for piece in shown.pieces if isinstance(piece, Picture)]
    assert [(picture.name, picture.seconds) for picture in pictures] == [("clip.mp4", 0.0), ("clip.mp4", 1.0), ("clip.mp4", 2.0)]
    shades = [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))).mean() for picture in pictures]
    assert np.allclose(shades, [0, 100, 200], atol=4)  # lossy video


def test_the_script_writes_page_and_lines_of_the_same_rows(browser: Browser, rows: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, dataset={"train": [{"data_files": str(rows)}]}, max_length=400, cache_dir=str(tmp_path / "cache"))
    words: list[str | Path] = ["--json", tmp_path / "rows.jsonl", "--output", tmp_path / "page.html", "--samples", "12"]
    done = run("preview_data.py", config, *words)
    assert done.returncode == 0, done.stderr
    assert "14 rows: 11 trained, 1 shortened, 2 skipped" in done.stdout
    assert not (tmp_path / "run").exists()
    lines = {line["index"]: line for line in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert list(lines) == list(range(14))
    browser.open(tmp_path / "page.html")
    shown = browser.ask(f"articles.map((e) => [Number(e.dataset.index), e.dataset.status, ({MARKS})(e)])")
    assert len(shown) == 12 and {"trained", "shortened", "skipped"} == {status for _, status, _ in shown}
    for index, status, tokens in shown:
        line = lines[index]
        assert line["status"] == status
        assert [token for token, _, _ in tokens] == line.get("input_ids", [])
        assert [token if marked else -100 for token, marked, _ in tokens] == line.get("labels", [])
    tokens, supervised = (sum(map(count, (line["labels"] for line in lines.values() if "labels" in line))) for count in (len, lambda x: len(x) - x.count(-100)))
    figures = browser.ask("[data.counts.rows, data.num_tokens, data.num_supervised, data.num_images]")
    assert figures == [14, tokens, supervised, sum(line["num_images"] or 0 for line in lines.values())]
    assert sum(count for _, count in browser.ask("data.lengths.bars")) == sum(count for _, count in browser.ask("data.images")) == 12


@pytest.mark.parametrize("words", [["--samples", "0"], ["--samples", "many"], ["--output", "gone/page.html"], ["--json", "gone/rows.jsonl", "--output", "."]])
def test_wrong_options_end_with_two(rows: Path, tmp_path: Path, words: list[str]) -> None:
    done = run("preview_data.py", config_file(tmp_path, dataset={"train": [{"data_files": str(rows)}]}), *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words[::2])


def test_the_chosen_rows_are_of_every_kind() -> None:
    randomness = np.random.default_rng(0)
    status, file, images = (randomness.choice(n, 5000, p=p) for n, p in ((3, [0.998, 0.001, 0.001]), (4, [0.97, 0.01, 0.01, 0.01]), (9, [0.992] + [0.001] * 8)))
    traits = [status, file, images]
    chosen = choose(traits, 30)
    assert chosen == choose(traits, 30) == sorted(set(chosen)) and len(chosen) == 30
    for trait in traits:
        assert {trait[i] for i in chosen} == set(trait.tolist())
    assert max(chosen) > 4000  # evenly, not from the front
    assert {status[i] for i in choose(traits, 3)} == {0, 1, 2}
    assert choose([np.zeros(5, int)], 50) == [0, 1, 2, 3, 4]
    assert choose([np.zeros(0, int)], 50) == []


def test_bytes_of_tokens_join_to_the_text(qwen: PreTrainedTokenizerBase, demo_tokenizer: PreTrainedTokenizerBase) -> None:
    for tokenizer in (qwen, demo_tokenizer):
        for text in (WORLD, HOSTILE, UNSEEN, "a\r\n\tb  c", "<|im_start|>user\n"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            spelled = token_bytes(tokenizer, ids)
            assert b"".join(spelled[token] for token in ids) == text.encode()
            groups = characters(ids, spelled)
            assert [token for group in groups for token in (group[1:] if isinstance(group, list) else [group])] == ids
            texts = [group[0] if isinstance(group, list) else spelled[group].decode() for group in groups]  # every group is whole characters
            assert "".join(texts) == text


def test_bytes_of_sentence_piece_tokens() -> None:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    model = BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    ids = tokenizer("ab é图 b", add_special_tokens=False)["input_ids"]
    spelled = token_bytes(tokenizer, ids)
    assert b"".join(spelled[token] for token in ids).decode() == tokenizer.decode(ids) == " ab é图 b"


def test_half_a_character_is_shown_as_its_bytes(browser: Browser, qwen: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ids = qwen("𓀀", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    halves = [*ids[1:], *qwen("a", add_special_tokens=False)["input_ids"], *ids[:-1]]
    spelled = token_bytes(qwen, halves)
    assert all(isinstance(group, int) for group in characters(halves, spelled))
    shown = [Shown("a.json", 0, "trained", None, len(halves), (Tokens(halves, halves, [1.0] * len(halves)),))]
    browser.open(write_page(tmp_path / "page.html", qwen, shown))
    expected = [f"{byte:02X}" for token in halves for byte in spelled[token] if byte >= 0x80]
    assert browser.ask("[...document.querySelectorAll('mark .sign')].map((e) => e.dataset.sign)") == expected
    assert browser.ask("document.querySelector('.sample mark').textContent") == "a"
