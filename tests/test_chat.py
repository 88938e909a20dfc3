"""The chat in the terminal: media, commands, what is saved, what is seen."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console

from interlace.data.formats import FORMATS
from interlace.data.media import open_images
from interlace.data.sample import Image, Sample, Text, Video, media_of
from interlace.errors import InputError
from interlace.inference.attaching import Attachments, open_frames
from interlace.inference.chat import load_compared, run_terminal
from interlace.inference.completion import completions
from interlace.inference.dialogue import Dialogue, save
from interlace.inference.evaluation import prediction_of, question_of, read_questions
from interlace.inference.generation import Generator, load_generator
from interlace.inference.sampling import Sampling
from interlace.inference.screen import Screen
from tests.conftest import DEMO_MODEL
from tests.test_scripts import run
from tests.test_video import number_of, write_video

Talk = Callable[..., str]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator(str(DEMO_MODEL), "float32")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "my scans"
    folder.mkdir()
    for number in range(4):
        PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (32, 32, 3), np.uint8)).save(folder / f"scan {number}.png")
    return folder


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types lines into the terminal, and gives back what it shows."""

    def type_lines(lines: list[str], *dialogues: Dialogue, **names: list[str]) -> str:
        typed = iter([*lines, ""])
        monkeypatch.setattr("builtins.input", lambda _: next(typed))
        run_terminal(*dialogues, **names)
        return capsys.readouterr().out

    return type_lines


def test_paths_with_spaces_patterns_and_several_media_at_any_turn(generator: Generator, pictures: Path, tmp_path: Path, talk: Talk) -> None:
    dialogue = Dialogue(generator, 4, Attachments(3))
    film = write_video(tmp_path / "a film.mp4")
    lines = [
        f"/image '{pictures}/scan 0.png' {pictures / 'scan 1.png'!s}".replace("my scans/scan 1", r"my\ scans/scan\ 1"),
        "First <image>, then <image>",
        f"/image '{pictures}/scan [23].png'",
        f"/video '{film}'",
        "<image>a<video>b<image>c<image>",
        "<image>a<video>b<image>c",
        f"/video '{pictures}'",
        "Which?",
        "/image",
        "/image 'open",
        "/vidio x",
    ]
    shown = talk(lines, dialogue)
    assert "2 images waiting" in shown
    assert "2 images and 1 video waiting" in shown
    assert "3 <image> in the question, 2 images attached" in shown
    assert "/image: expected PATH .." in shown
    assert "/image: No closing quotation" in shown
    assert "unknown command /vidio; did you mean /video?" in shown
    scans = [str(pictures / f"scan {number}.png") for number in range(4)]
    assert media_of(dialogue.turns) == [Image(scans[0]), Image(scans[1]), Image(scans[2]), Video(str(film)), Image(scans[3]), Video(str(pictures))]
    assert [len(frames) for frames in dialogue.frames] == [1, 1, 1, 3, 1, 3]
    assert dialogue.turns[2].parts == (Image(scans[2]), Text("a"), Video(str(film)), Text("b"), Image(scans[3]), Text("c"))
    assert [number_of(image) for image in open_frames(dialogue.frames[3])] == [0, 29, 59]  # first to last, evenly
    assert [Path(frame.place.path).name for frame in dialogue.frames[5]] == ["scan 0.png", "scan 1.png", "scan 3.png"]


def test_a_saved_dialogue_is_read_back_as_what_the_model_was_asked(generator: Generator, pictures: Path, tmp_path: Path, talk: Talk) -> None:
    dialogue, file = Dialogue(generator, 4), tmp_path / "talk.json"
    film = write_video(tmp_path / "film.mp4")
    dialogue.attachments = Attachments()
    shown = talk(
        [
            "/save x.json",
            "/system Answer in digits.",
            f"/image '{pictures}/scan 0.png'",
            f"/video {film}",
            "This <image> and this: <video>",
            f"/image '{pictures}/scan 1.png'",
            "And?",
            f"/save '{file}'",
            f"/save '{file}'",
            "/history",
        ],
        dialogue,
    )
    assert "nothing has been asked yet" in shown
    assert f"{file} is there already" in shown
    assert f"image_folder {tmp_path}" in shown
    assert not Path("x.json").exists()
    assert f"system: Answer in digits.\nyou: This [{pictures}/scan 0.png] and this: [{film}]\nmodel: " in shown
    (record,) = json.loads(file.read_text())
    sample = FORMATS["llava"](record)
    assert isinstance(sample, Sample)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [(turn.text, turn.media) for turn in sample.turns[1:]] == [(turn.text, turn.media) for turn in dialogue.turns]
    (outcome,) = read_questions({"data_files": str(file), "image_folder": str(tmp_path)}, generator)
    prompt = question_of(outcome, generator)
    assert prediction_of(outcome, "")["reference"] == dialogue.turns[-1].text
    assert prompt.images == tuple(frame.place for frames in dialogue.frames for frame in frames)
    assert prompt.input_ids == [token for token, _ in dialogue._tokens(dialogue.turns[:-1], dialogue.frames)]


def test_what_has_no_form_in_a_row_is_not_saved(generator: Generator, pictures: Path, tmp_path: Path) -> None:
    for parts, message in (
        ([Text("what does <image> mean?")], "a question holds the text"),
        ([Image("picture", (pictures / "scan 0.png").read_bytes()), Text("?")], "handed over as bytes"),
    ):
        dialogue = Dialogue(generator, 2)
        dialogue.ask(parts)
        with pytest.raises(InputError, match=message):
            save([dialogue], tmp_path / "never.json")
    assert not (tmp_path / "never.json").exists()
    dialogue = Dialogue(generator, 2)
    dialogue.ask("What?")
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        save([dialogue], tmp_path / "gone" / "never.json")


def test_commands_take_back_set_and_forget(generator: Generator, pictures: Path, talk: Talk) -> None:
    dialogue = Dialogue(generator, 4)
    lines = [
        "/undo",
        "/retry",
        f"/image '{pictures}/scan 0.png'",
        "/undo",
        "One?",
        "/retry",
        "Two?",
        "/undo",
        "/drop 5",
        "Three?",
        "/drop",
        "/set max_new_tokens 2",
        "/set temperature hot",
        "/set temprature 1",
        "/set temperature -1",
        "/set seed none",
        "/system see <image>",
        "/help",
    ]
    shown = talk(lines, dialogue)
    assert shown.count("nothing has been asked yet") == 2
    assert "nothing is attached any more" in shown
    assert "taken back: Two?" in shown
    assert "expected a number from 1 to 1, of questions to forget; got 5" in shown
    assert "/set temperature: expected a number, got 'hot'" in shown
    assert "no setting 'temprature'; did you mean temperature?" in shown
    assert "temperature: expected at least 0, got -1" in shown
    assert "the system prompt holds a placeholder" in shown
    assert "/compare" not in shown and "forget the oldest question" in shown
    assert [turn.text for turn in dialogue.turns[::2]] == ["Three?"]
    assert (dialogue.sampling, dialogue.system) == (Sampling(2), "")
    talk(["/clear"], dialogue)
    assert dialogue.turns == []


def test_settings_are_taken_in_pairs_and_those_without_effect_are_named(generator: Generator, talk: Talk) -> None:
    dialogue = Dialogue(generator, 4)
    shown = talk(["/set temperature 0.7 top_p 0.5"], dialogue)
    assert dialogue.sampling == Sampling(4, temperature=0.7, top_p=0.5) and "no effect" not in shown
    shown = talk(["/set temperature 0.8 top_p", "/set temperature 0.9 topp 1", "/drop x", "/help", "/exit now", "never read"], dialogue)
    assert "/set top_p: expected a number, got ''" in shown
    assert "no setting 'topp'" in shown
    assert "/drop: expected a whole number of questions, got 'x'" in shown
    assert "another answer needs a temperature above 0" in shown
    assert (dialogue.sampling, dialogue.turns) == (Sampling(4, temperature=0.7, top_p=0.5), [])  # a mistake changes nothing
    assert "no effect at temperature 0: top_p, top_k;" in talk(["/set temperature 0 top_k 5"], dialogue)
    assert "no effect" not in talk(["/set temperature 1"], dialogue)


def test_a_url_that_is_typed_is_fetched_once_and_never_from_inside_the_network(
    generator: Generator, pictures: Path, monkeypatch: pytest.MonkeyPatch, talk: Talk
) -> None:
    dialogue, asked = Dialogue(generator, 2), []
    assert "127.0.0.1, which is no public address" in talk(["/image http://127.0.0.1:1/a.png"], dialogue)

    def download(url: str, policy: object) -> bytes:
        asked.append(url)
        return (pictures / "scan 0.png").read_bytes()

    monkeypatch.setattr("interlace.data.places.download", download)
    url = "https://example.org/a.png"
    shown = talk([f"/image {url}", "What?", f"/image {url}", "And?"], dialogue)
    assert "1 image waiting" in shown
    assert asked == [url]
    assert dialogue.record()["image"] == [url, url]
    assert open_images([dialogue.frames[0][0].place])[0].size == (32, 32)


def test_two_models_are_asked_the_same_and_stay_together(generator: Generator, pictures: Path, tmp_path: Path, talk: Talk) -> None:
    adapted = get_peft_model(load_generator(str(DEMO_MODEL), "float32").model, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj"))
    adapted.peft_config["default"].base_model_name_or_path = str(DEMO_MODEL)
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "adapter" / name).write_bytes((DEMO_MODEL / name).read_bytes())
    first = load_generator(str(tmp_path / "adapter"), "float32")
    for other in ("base", str(DEMO_MODEL)):
        second, is_base = load_compared(first, str(tmp_path / "adapter"), other)
        assert is_base and second.model is first.model
    with pytest.raises(InputError, match="is no adapter"):
        load_compared(generator, "demo", "base")
    dialogues = [Dialogue(first, 4), Dialogue(second, Sampling(4), without_adapter=True)]
    file = tmp_path / "both.json"
    shown = talk([f"/image '{pictures}/scan 0.png'", "What?", "/retry", "And?", "/undo", f"/save '{file}'", "/history"], *dialogues, names=["mine", "base"])
    assert dialogues[0].turns == dialogues[1].turns  # an adapter that has not learned changes nothing
    assert len(dialogues[0].turns) == 2
    answer = dialogues[0].turns[1].text
    assert shown.count(f"mine: {answer}\nbase: {answer}\n") >= 3  # asked, asked again, told
    assert len(json.loads(file.read_text())) == 2
    dialogues[1].sampling = Sampling(2048)  # no room: one of them cannot answer
    assert "the context is full" in talk(["Room?"], *dialogues, names=["mine", "base"])
    assert [len(dialogue.turns) for dialogue in dialogues] == [2, 2]


def pieces(*texts: str, error: type[BaseException] | None = None) -> Iterator[str]:
    yield from texts
    if error:
        raise error


def test_a_terminal_shows_formatted_text_and_columns() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=60, height=12, color_system=None)
    Screen(["model"], console).answer([pieces("# He", "ading\none\ntwo **bo", "ld**\x1b[2J")])  # type: ignore[list-item]
    last = output.getvalue().rsplit("model:", 1)[1]
    assert "\x1b[2J" not in last and "**" not in last and "bold" in last
    assert [line.strip() for line in last.splitlines() if line.strip() in ("one", "two bold[2J")] == ["one", "two bold[2J"]
    output.truncate(0)
    with pytest.raises(KeyboardInterrupt):
        Screen(["left", "right"], console).answer([pieces("a" * 50), pieces("b", "c", error=KeyboardInterrupt)])  # type: ignore[list-item]
    rows = output.getvalue().rsplit("left", 1)[1].splitlines()
    assert any("a" * 20 in row and "bc" in row and len(row) == 60 for row in rows)  # what was said stays


NESTED = "src/**/*.py, (**p)**2, 2**3 and 4**2, f(**a), `x **y** z`"
TOLD = (
    "<div>hello</div>",
    "<p>first</p>",
    "what follows",
    "2*3*4 = 24",
    "a List<int> and a Dict<str, List[_T]>",
    "<ref>the dog</ref><box>(12,30),(45,60)</box>",
    r"so \(x_1\) and \[y\], C:\temp\_a_",
    "__init__ and _this_ *that* ~~not~~",
    NESTED,
    "&lt; &amp; [a](b) ![c](d) [/red] [bold]",
    "[ref]: http://example.org 'title'",
    "    four spaces",
    "> said",
    "***",
    "===",
    "# of <apples>",
    "7. seven",
    "1986. A year",
    "- one",
    "+ two __x__",
    "```python title=\n<a> = __b__ * 2*3*4 # " + "long " * 20 + "\n```",
    "```\n```",
    "| a | <b> |\n|---|:-:|\n| 2*3*4 | \\(x\\) | too many | __d__ |\n| few |\n",
    "| a | b | c | d | e | f | g | h |\n|-|-|-|-|-|-|-|-|\n| " + " | ".join("一二*_" for _ in range(8)) + " |\n",
    "```unended\n| a |\n|---|",
)


def on_screen(*texts: str, width: int = 40) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=12, color_system=None)
    console.print(Screen(["\u2500"] * len(texts), console).shown(texts))
    return output.getvalue()


def assert_whole(shown: str, text: str) -> None:
    for character in set(text):
        if character.isalnum() or character in "<>_*\\()#&[]":
            assert shown.count(character) == text.count(character), (character, text, shown)


def test_no_character_of_an_answer_vanishes_from_the_screen() -> None:
    for width in (12, 40, 100):
        for text in TOLD:
            assert_whole(on_screen(text, width=width), text)
    random = np.random.RandomState(0)
    for _ in range(60):
        chosen = [TOLD[place] for place in random.permutation(len(TOLD) - 1)[:6]]
        text = "\n".join(chosen)
        assert_whole(on_screen(text, width=random.randint(20, 90)), text)
        assert_whole(on_screen(*chosen[:2], width=random.randint(20, 90)), "\n".join(chosen[:2]))
    everything = random.choice(list("ab*_<>`|-#\\()[]~:. \n"), (300, 40))
    for row in everything:
        text = "".join(row)
        shown = on_screen(text)
        for character in "ab_<>\\()[]#":
            assert shown.count(character) == text.count(character), (character, text, shown)


def test_bold_words_code_and_tables_are_formatted() -> None:
    for text, words in (
        ("**Two words:** and (**one**).", "Two words: and (one)."),
        ("\u8fd9\u662f**\u91cd\u70b9**\u5185\u5bb9", "\u8fd9\u662f\u91cd\u70b9\u5185\u5bb9"),
        (NESTED, NESTED),
    ):
        assert on_screen(text, width=100).splitlines()[-1] == words
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=60, color_system="standard")
    console.print(Screen(["m"], console).shown(["```python\nreturn 1\n```\nreturn 1"]))
    code, line = (part for part in output.getvalue().splitlines() if "return" in part)
    assert "\x1b[" in code and line == "return 1"
    lines = on_screen("a | b\n-|-\nlong word | c").splitlines()
    assert len({line.index(letter) for line in lines for letter in "bc" if f" {letter} " in line}) == 1


def test_tab_completes_commands_settings_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my scans").mkdir()
    for name in ("my scans/it's one.PNG", "my scans/two.mp4", "other.txt", ".hidden.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    commands, settings = ["/image", "/video"], ["top_p", "top_k"]
    assert completions("/im", commands, settings) == ["/image "]
    assert completions("/", commands, settings) == ["/image ", "/video "]
    assert completions("wh", commands, settings) == []
    assert completions("/set top", commands, settings) == ["top_p ", "top_k "]
    assert completions("/image ", commands, settings) == [r"my\ scans/"]
    assert completions(r"/image a.png my\ scans/", commands, settings) == [r"my\ scans/it\'s\ one.PNG "]
    assert completions(r"/video my\ sc", commands, settings) == [r"my\ scans/"]
    assert completions(r"/video my\ scans/t", commands, settings) == [r"my\ scans/two.mp4 "]
    assert completions("/image gone/", commands, settings) == []


def test_options_are_checked_before_a_model_is_loaded(pictures: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--top-p", "2", "--seed", "-1"], "top_p: expected above 0 and at most 1, got 2.0; seed"),
        (["--top-p", "0.5"], "have no effect at --temperature 0"),
        (["--num-frames", "0", "--video-fps", "nan"], "num_frames: expected at least 1, got 0; video_fps: expected above 0, got nan"),
    ):
        done = run("predict_multiround.py", "--model-path", "demo", "--query", "x", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    with pytest.raises(InputError, match=r"gone\.mp4: no such video"):
        Attachments().videos(["gone.mp4"])
    film = write_video(tmp_path / "film.mp4")
    words = ["--image-file", pictures / "scan 0.png", "--video-file", film, "--num-frames", "2", "--system", "Be short.", "--compare-with", "demo"]
    done = run("predict_multiround.py", "--model-path", "demo", *words, text="<video> or <image>?\n/history\n")
    assert done.returncode == 0, done.stderr
    assert f"you: [{film}] or [{pictures}/scan 0.png]?" in done.stdout
    assert done.stdout.count("demo: ") == 4
