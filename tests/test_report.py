"""The report of an evaluation: asked of a headless Chromium, that it shows what was found, keeps to itself, and takes hostile text as text."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import evaluate_model
from interlace.data.reading import Outcome
from interlace.data.sample import Place
from interlace.inference.ablations import ablate
from interlace.inference.comparison import compare
from interlace.inference.diagnostics import diagnosis
from interlace.inference.evaluation import predict, read_questions
from interlace.inference.generation import load_generator
from interlace.inference.metrics import score
from interlace.inference.report import KINDS, Evaluation, _num_frames, chosen, report
from tests.conftest import DEMO_MODEL, write_rows
from tests.page_reader import Browser

HOSTILE = """</script><img src=x onerror="document.title='owned'"> <!-- <script>document.title='owned'</script> & 'q' "q" ${1} `x` \\u003c </p>"""
VISIBLE = "articles.flatMap((e) => (e.hidden ? [] : [e.dataset.id]))"
VOID = {"meta", "input", "img", "br", "hr", "link"}


class Outline(HTMLParser):
    """Whether every element is closed in order; the addresses that the page names, and its data."""

    def __init__(self, html: str):
        super().__init__()
        self.opened: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in VOID:
            self.opened.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The demo model on rows of 0 to 3 images; an earlier model that was right and wrong elsewhere; answers, names and questions that want to be HTML."""
    folder = tmp_path_factory.mktemp("report")
    records = json.loads(write_rows(folder, 24).read_text())
    records[0]["conversations"][-2]["value"] = HOSTILE
    records[1]["id"] = HOSTILE
    (folder / "rows.json").write_text(json.dumps(records))
    generator = load_generator(str(DEMO_MODEL))
    outcomes = read_questions({"data_files": str(folder / "rows.json")}, generator)
    predictions = predict(generator, outcomes, 32, 8)
    for number in (2, 5, 7, 11, 14):
        predictions[number]["prediction"] = predictions[number]["reference"]
    ablated = ablate(generator, outcomes, predictions, evaluate_model.ABLATIONS, 64, 8)
    earlier = [{**row, "prediction": row["reference"] if number in (3, 5) else HOSTILE} for number, row in enumerate(predictions)]
    comparison = compare(earlier, predictions)
    names = HOSTILE, "rows.json"
    return Evaluation(*names, predictions, score(predictions), outcomes, HOSTILE, earlier, comparison, ablated, diagnosis(ablated, predictions))


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    path.write_text(report(evaluation, 100), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.open(page)
    assert browser.errors == []
    return browser


def data_of(html: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Outline(html).scripts[0])
    return data


def test_the_page_is_well_formed_and_names_no_other_address(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    outline = Outline(html)
    assert outline.addresses == [] and len(outline.scripts) == 2
    without_data = html.replace(outline.scripts[0], "").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|__[A-Z]", without_data)
    assert re.search(r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[\w+/=]+'\"", html)
    assert all(uri.startswith("data:image/") for uri in data_of(html)["pictures"])


def test_hostile_text_is_text(opened: Browser, page: Path) -> None:
    assert opened.ask("document.title") == "What the model answers"
    assert opened.ask("[document.scripts.length, document.querySelectorAll('.sample script, .sample p img, [onerror]').length]") == [2, 0]
    assert HOSTILE in opened.ask("[...articles[0].querySelectorAll('.turn .text')].map((e) => e.textContent)")
    assert opened.ask("articles[1].querySelector('h3 span').textContent") == HOSTILE
    assert opened.ask("[...articles[4].querySelectorAll('.turn')].at(-1).textContent") == f"before{HOSTILE}"
    assert HOSTILE in opened.ask("byId('names').textContent") and HOSTILE in opened.ask("byId('comparison').textContent")
    assert [address for address in opened.requests if not address.startswith("data:")] == [page.as_uri()]


def test_nothing_is_fetched_and_no_other_script_runs(opened: Browser) -> None:
    violation = "new Promise((done) => {{ addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective), {{ once: true }}); {}; }})"
    assert opened.ask(violation.format("new Image().src = 'http://127.0.0.1:9/x.png'")) == "img-src"
    assert opened.ask(violation.format("fetch('http://127.0.0.1:9/x').catch(() => 0)")) == "connect-src"
    script = opened.ask(violation.format("document.body.append(make('button', { onclick: 'owned = 1' })); document.body.lastChild.click()"))
    assert script.startswith("script-src") and opened.ask("typeof owned") == "undefined"


def test_pictures_stand_at_their_place_in_the_text(opened: Browser, page: Path, evaluation: Evaluation) -> None:
    assert evaluation.outcomes is not None
    number = next(i for i, outcome in enumerate(evaluation.outcomes) if outcome.row is not None and len(outcome.row.images) == 3)
    row = evaluation.outcomes[number].row
    assert row is not None
    opened.open(page, f"#sample={number}")  # what is out of sight has no layout, and no innerText
    text = opened.ask(f"articles[{number}].querySelector('.turn .text').innerText")
    assert re.search(r"Image A: \s*image 1\s*Image B: \s*image 2\s*Image C: \s*image 3\s*Which digit", text), text
    sources = opened.ask(f"[...articles[{number}].querySelectorAll('.image img')].map((e) => e.src)")
    for place, source in zip(row.images, sources, strict=True):
        pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
        assert (pixels == np.asarray(PIL.Image.open(place.path))).all()
    assert opened.ask("data.pictures.length") <= 8  # each once, however many rows show it
    assert opened.ask("articles.reduce((sum, e) => sum + e.querySelectorAll('.image').length, 0)") == sum(i % 4 for i in range(24))


def test_the_figures_are_those_of_the_files(opened: Browser, evaluation: Evaluation) -> None:
    def cells(selector: str) -> list[list[str]]:
        rows: list[list[str]] = opened.ask(f"[...document.querySelectorAll('{selector} tbody tr')].map((e) => [...e.children].map((c) => c.textContent))")
        return [row for row in rows if len(row) > 3 and row[0]]

    assert evaluation.comparison is not None and evaluation.diagnosis is not None
    found = {row[0]: row for row in cells("#comparison")}
    for name, value in {"overall": evaluation.comparison["overall"], **evaluation.comparison["datasets"]}.items():
        assert float(found[name][2].replace("−", "-")) == pytest.approx(100 * value["difference"], abs=0.051)
        assert found[name][6:] == [str(value[kind]) for kind in ("gained", "lost", "both_right", "both_wrong")]
    opened.click("#groups [value=images]")
    titles = opened.ask("[...document.querySelectorAll('#panels h3')].map((e) => e.textContent)")
    assert titles == ["one blanked", "one dropped"]
    drops = [value["drop"] for name in ("blanked", "dropped") for value in evaluation.diagnosis["ablations"][name]["images"].values()]
    shown = [float(row[2].replace("−", "-")) for row in cells("#panels") if row[0].startswith("image")]
    assert shown == pytest.approx([-100 * drop for drop in drops], abs=0.051)
    scores = {row[0]: row[2] for row in cells("#scores")}
    assert scores["overall"] == f"{100 * evaluation.metrics['overall']['score']:.1f} %"


def test_an_interval_is_drawn_where_the_scale_says(browser: Browser, evaluation: Evaluation, tmp_path: Path) -> None:
    """Whisker and dot of the row, measured in pixels against the axis: x is linear in the value."""
    (tmp_path / "evaluation.html").write_text(report(evaluation, 0), encoding="utf-8")
    browser.open(tmp_path / "evaluation.html")
    ticks = browser.ask(
        "[...document.querySelectorAll('#comparison tr[aria-hidden] text')].map((e) => [parseFloat(e.textContent.replace('−', '-')), "
        "(e.getBoundingClientRect().left + e.getBoundingClientRect().right) / 2])"
    )
    slope, offset = np.polyfit([value for value, _ in ticks], [x for _, x in ticks], 1)
    box = "document.querySelector('#comparison tr.main {}').getBoundingClientRect()"
    line, dot = (browser.ask(f"[{box.format(name)}.left, {box.format(name)}.right]") for name in (".whisker", "circle"))
    assert evaluation.comparison is not None
    overall = evaluation.comparison["overall"]
    assert [line[0], line[1]] == pytest.approx([offset + slope * 100 * end for end in overall["interval"]], abs=2)
    assert sum(dot) / 2 == pytest.approx(offset + slope * 100 * overall["difference"], abs=2)
    assert browser.ask("[articles.length, byId('nothing').hidden]") == [0, False]


def test_filters_by_kind_data_set_images_and_text_live_in_the_address(opened: Browser, page: Path) -> None:
    rows = data_of(page.read_text(encoding="utf-8"))["rows"]
    kinds = {
        "right": lambda row: row["score"] == 1,
        "wrong": lambda row: row["score"] == 0,
        "gained": lambda row: row["before"] < row["score"],
        "lost": lambda row: row["before"] > row["score"],
    }
    for kind, passes in kinds.items():
        wanted = [row["id"] for row in rows if passes(row)]
        assert wanted
        opened.open(page, f"#kind={kind}")
        assert opened.ask(VISIBLE) == wanted
    opened.open(page)
    opened.click("#kinds [value=wrong]")
    opened.ask("(() => { const s = byId('num_images'); s.value = '2'; s.onchange({ target: s }); })()")
    wanted = [row["id"] for row in rows if row["score"] == 0 and row["num_images"] == "2"]
    assert opened.ask(VISIBLE) == wanted and opened.ask("location.hash") == "#kind=wrong&num_images=2"
    assert opened.ask("byId('shown').value") == f"{len(wanted)} of 24 rows"
    opened.press("f")
    for letter in "no such":
        opened.press(letter)
    assert opened.ask(VISIBLE) == [] and not opened.ask("byId('nothing').hidden")
    opened.open(page, "#dataset=images_3&kind=nonsense")
    assert opened.ask(VISIBLE) == [row["id"] for row in rows if row["dataset"] == "images_3"]


def test_the_keyboard_reaches_rows_pictures_and_answers(opened: Browser, page: Path) -> None:
    current = "[document.querySelector('[aria-current]')?.id, document.activeElement.id]"
    for key, number in (("j", 0), ("ArrowRight", 1), ("k", 0)):
        opened.press(key)
        assert opened.ask(current) == [f"sample-{number}"] * 2
    opened.open(page, "#sample=3")
    opened.ask("articles[3].querySelector('.image').focus()")
    opened.press("Enter")
    assert opened.ask("byId('large').open") and "image 1" in opened.ask("byId('large').textContent")
    opened.press("ArrowRight")
    assert "image 2" in opened.ask("byId('large').textContent")
    opened.press("Escape")
    assert not opened.ask("byId('large').open")
    opened.ask("articles[3].querySelector('summary').focus()")
    opened.press("Enter")
    answers = opened.ask("[...articles[3].querySelectorAll('details[open] tr')].map((e) => e.children[0].textContent)")
    assert [name for name in answers if name.startswith("one blanked")] == [f"one blanked: image {i}" for i in (1, 2, 3)]
    opened.press("d")
    assert opened.ask("document.documentElement.dataset.theme") == "dark"
    reachable = "[...document.querySelectorAll('button, select, input, summary')].every((e) => e.tabIndex >= 0)"
    assert opened.ask(reachable)
    unnamed = "[...document.querySelectorAll('button, select, input')].filter((e) => !(e.textContent.trim() || e.ariaLabel)).length"
    assert opened.ask(unnamed) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_both_schemes(opened: Browser, page: Path, scheme: str) -> None:
    opened.prefer(scheme)
    opened.resize(390, 844)
    opened.open(page)
    assert opened.ask("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    assert opened.ask("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0) / 3 > 128"
    assert opened.ask(light) == (scheme == "light")


def test_predictions_alone_make_rows_without_pictures(browser: Browser, evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.html"
    alone = Evaluation("predictions.jsonl", "", evaluation.predictions, evaluation.metrics)
    path.write_text(report(alone, 100), encoding="utf-8")
    browser.open(path)
    assert browser.errors == []
    assert browser.ask("[articles.length, document.querySelectorAll('.sample img').length]") == [24, 0]
    assert browser.ask("['comparison', 'diagnosis'].map((id) => byId(id).hidden)") == [True, True]
    assert browser.ask("[...articles[5].querySelectorAll('.turn > :first-child')].map((e) => e.textContent)") == ["reference", "answer"]


def test_rows_are_an_even_share_of_each_kind() -> None:
    kinds = ["wrong"] * 500 + ["right"] * 400 + ["lost"] * 3 + ["gained"] * 40
    numbers = chosen(kinds, 100)
    assert numbers == sorted(set(numbers))
    assert Counter(kinds[number] for number in numbers) == {"lost": 3, "gained": 32, "right": 32, "wrong": 33}
    assert max(np.diff([number for number in numbers if kinds[number] == "wrong"])) <= 16  # evenly spread
    assert chosen(kinds, 0) == [] and len(chosen(kinds, 5000)) == len(kinds)
    assert set(kinds) < set(KINDS)


def test_a_long_text_is_cut_and_says_so(evaluation: Evaluation) -> None:
    rows = [{**evaluation.predictions[0], "prediction": "word " * 2_000}]
    (row,) = data_of(report(Evaluation("m", "d", rows, score(rows)), 1))["rows"]
    assert len(row["answer"]) < 4_100 and row["answer"].endswith("... (10,000 letters)")


def test_frames_belong_to_their_video() -> None:
    frames = [Place("/a/clip.mp4", pts=i) for i in range(4)]
    assert _num_frames([*frames, Place("/a/other.mp4", pts=0)]) == 4
    assert _num_frames([Place("/a/clip/1.jpg"), Place("/a/clip/2.jpg"), Place("/a/3.jpg")]) == 2
    assert _num_frames(frames) == 4


def test_videos_and_images_come_in_their_order(tmp_path: Path) -> None:
    """A folder of frames between two images: each part of the question gets its own pictures."""
    write_rows(tmp_path, 1)
    (tmp_path / "frames").mkdir()
    for i in range(3):
        PIL.Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / "frames" / f"{i}.png")
    turns = [{"from": "human", "value": "One <image> clip <video> two <image> end"}, {"from": "gpt", "value": "a"}]
    record = {"image": ["pictures/0.png", "pictures/1.png"], "video": "frames", "conversations": turns}
    (tmp_path / "rows.json").write_text(json.dumps([record]))
    generator = load_generator(str(DEMO_MODEL))
    outcomes: list[Outcome] = read_questions({"data_files": str(tmp_path / "rows.json")}, generator)
    predictions = predict(generator, outcomes, 1, 4)
    (row,) = data_of(report(Evaluation("m", "d", predictions, score(predictions), outcomes), 1))["rows"]
    (turn,) = row["turns"]
    assert [part if isinstance(part, str) else part["name"] for part in turn["parts"]] == [
        *("One ", "0.png", " clip ", "0.png", "1.png", "2.png", " two ", "1.png", " end")
    ]
    assert [part["number"] for part in turn["parts"] if isinstance(part, dict)] == [1, 2, 3, 4, 5]
