"""The endpoint, asked by OpenAI's own client, and the page, in a real browser; both against the dialogue that they stand on."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import PIL.Image
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.data.formats import FORMATS
from interlace.data.sample import Image, Sample, Text, Video, media_of
from interlace.errors import InputError
from interlace.inference.conversations import Conversations, Uploads
from interlace.inference.dialogue import Dialogue
from interlace.inference.doors import listen
from interlace.inference.endpoint import Held
from interlace.inference.generation import Generator, load_generator
from interlace.inference.sampling import Sampling
from interlace.inference.serving import Endpoint, Service
from tests.conftest import DEMO_MODEL, ROOT
from tests.page_reader import Browser
from tests.test_scripts import run
from tests.test_video import write_video

HOSTILE = """</script><img src=x onerror="document.title='owned'"><b>bold</b> & <|im_end|> <image> \u202e"""


def encoded(number: int, kind: str = "PNG", size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def part(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    of = f"{kind.split('/')[0]}_url"
    return {"type": of, of: {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


@dataclass
class Server:
    """One that runs in a thread of this process, and its parts."""

    port: int
    endpoint: Endpoint

    @property
    def conversations(self) -> Conversations:
        return self.endpoint.conversations

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=60)

    def ask(self, *messages: Any, **more: Any) -> Any:
        return self.client.chat.completions.create(model="demo", messages=list(messages), **more)

    def send(self, body: bytes | dict[str, Any], method: str = "POST", path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of a request that no client would make."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content.startswith(b"{") else content.decode(), dict(answer.getheaders())

    def ids(self) -> list[int]:
        """What the conversation used last has read."""
        return [token for token, _ in self.conversations._idle[-1].dialogue.context.tokens]


@contextmanager
def serving(generator: Generator, **more: Any) -> Iterator[Server]:
    door = listen("127.0.0.1", 0)
    endpoint = Endpoint(Conversations(generator, Uploads(3)), Service("demo", Sampling(8), **{"with_page": True, **more}))
    server = uvicorn.Server(uvicorn.Config(endpoint.app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([door],))
    thread.start()
    try:
        yield Server(door.getsockname()[1], endpoint)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator(str(DEMO_MODEL), "float32")


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Server]:
    with serving(generator) as server:
        yield server


@pytest.fixture
def endless(generator: Generator) -> Iterator[Callable[[], int]]:
    """The model never ends an answer, and takes its time; how many tokens it has made."""
    head, end, made = generator.model.get_output_embeddings(), generator.processing.template.end, 0

    def forbid_end(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        time.sleep(0.01)
        logits[..., end] = -torch.inf
        return logits

    hook = head.register_forward_hook(forbid_end)
    yield lambda: made
    hook.remove()


def wait_until(is_so: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


# --- answers ---


def test_answers_are_those_of_the_dialogue_whole_and_streamed_over_turns(server: Server, generator: Generator) -> None:
    dialogue = Dialogue(generator, 8)
    dialogue.set_system("Be short.")
    first, second = encoded(1), encoded(2, "JPEG")
    messages: list[Any] = [{"role": "system", "content": "Be short."}]
    questions = [
        (
            [text("Left "), part(first), text("right "), part(second, "image/jpeg"), text("?")],
            [Text("Left "), Image("a", first), Text("right "), Image("b", second), Text("?")],
        ),
        ([text("And?")], [Text("And?")]),
        ([part(encoded(3)), text("This?")], [Image("c", encoded(3)), Text("This?")]),
    ]
    for content, parts in questions:
        messages.append(user(*content))
        answer = server.ask(*messages)
        expected = dialogue.ask(parts)
        assert answer.choices[0].message.content == expected
        assert server.ids() == [token for token, _ in dialogue.context.tokens]
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (
            dialogue.usage.prompt,
            dialogue.usage.answer,
            dialogue.usage.kept,
        )
        assert answer.choices[0].finish_reason == ("length" if dialogue.usage.is_cut else "stop")
        *chunks, last = server.ask(*messages, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == answer.choices[0].finish_reason
        assert last.usage.prompt_tokens == usage.prompt_tokens and last.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
        messages.append({"role": "assistant", "content": expected})
    assert [model.id for model in server.client.models.list()] == ["demo"]
    assert server.client.models.retrieve("demo").id == "demo"


def test_a_later_turn_costs_the_new_turn_only_also_between_other_conversations(server: Server, generator: Generator) -> None:
    language_model, tower = generator.model.model.language_model, generator.model.model.vision_tower
    counted: list[int] = []
    hooks = [
        language_model.register_forward_pre_hook(lambda _, __, named: counted.append(named["inputs_embeds"].shape[1]), with_kwargs=True),
        tower.register_forward_pre_hook(lambda *_: counted.append(-1)),
    ]
    talks: list[list[Any]] = [[user(part(encoded(10)), text(f"Question {name}"))] for name in "abc"]
    lengths = [0, 0, 0]
    for turn in range(5):
        for number, talk in enumerate(talks):
            counted.clear()
            answer = server.ask(*talk)
            assert counted.count(-1) == (1 if turn == 0 else 0)  # the image is encoded once
            assert sum(counted) <= answer.usage.prompt_tokens - lengths[number] + answer.usage.completion_tokens + 4
            lengths[number] = answer.usage.prompt_tokens
            talk += [{"role": "assistant", "content": answer.choices[0].message.content}, user(f"More {turn}?")]
    for hook in hooks:
        hook.remove()
    assert min(lengths) > 60


def test_a_video_is_its_frames_and_lmms_eval_s_form_is_taken(server: Server, generator: Generator, tmp_path: Path) -> None:
    film = write_video(tmp_path / "film.mp4").read_bytes()
    dialogue = Dialogue(generator, 8, Uploads(3))
    server.ask(user(text("See "), part(film, "video/mp4"), text("?")))
    dialogue.ask([Text("See "), Video("film", film), Text("?")])
    assert server.ids() == [token for token, _ in dialogue.context.tokens]
    assert server.ids().count(generator.processing.config.image_token_id) == 3 * 4
    # the payload of lmms-eval's `openai` model
    payload = {
        "messages": [{"role": "user", "content": [part(encoded(4, "JPEG"), "image/jpeg"), text("What is shown?\nAnswer briefly.")]}],
        "model": "demo",
        "max_tokens": 1024,
        "temperature": 0,
    }
    answer = server.client.chat.completions.create(**payload)
    assert answer.choices[0].message.content == Dialogue(generator, 1024).ask([Image("x", encoded(4, "JPEG")), Text("What is shown?\nAnswer briefly.")])


def test_sampling_stop_and_length_are_honoured(server: Server, generator: Generator, endless: Callable[[], int]) -> None:
    def drawn(**more: Any) -> Any:
        return server.ask(user("Say"), max_tokens=12, **more).choices[0]

    seeded = drawn(temperature=3, seed=5)
    assert seeded.message.content == Dialogue(generator, Sampling(12, 3, seed=5)).ask("Say")
    assert seeded.message.content == drawn(temperature=3, seed=5).message.content != drawn(temperature=3, seed=6).message.content
    assert seeded.finish_reason == "length"
    assert drawn(temperature=3, top_p=1e-9, seed=1).message.content == drawn().message.content == Dialogue(generator, 12).ask("Say")
    whole = seeded.message.content
    stop = whole[3:5]
    for stream in (False, True):
        answer = server.ask(user("Say"), max_tokens=12, temperature=3, seed=5, stop=["never to be found", stop], stream=stream)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else answer.choices[0].message.content
        assert said == whole[: whole.index(stop)]
    assert drawn(temperature=3, seed=5, stop=stop).finish_reason == "stop"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_what_is_held_back_is_what_may_begin_a_stop(pieces: list[str], stops: list[str]) -> None:
    held, out, whole = Held(tuple(stops)), "", "".join(pieces)
    for piece in pieces:
        if not held.is_over:
            out += held.take(piece)
    places = [whole.index(stop) for stop in stops if stop in whole]
    assert held.is_over == bool(places)
    if places:
        ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
        assert out == whole[: len(out)] and len(out) <= max(places) and not any(stop in out for stop in stops) and len(out) < min(ends)
    else:
        assert out + held.text == whole and any(stop.startswith(held.text) for stop in stops) | (held.text == "")


def test_two_clients_at_once_and_one_that_leaves(server: Server, generator: Generator, endless: Callable[[], int]) -> None:
    expected = {word: Dialogue(generator, 30).ask(word) for word in ("One", "Two")}
    order: list[str] = []
    said: dict[str, str] = {}

    def ask(word: str) -> None:
        said[word] = ""
        for chunk in server.ask(user(word), max_tokens=30, stream=True):
            said[word] += chunk.choices[0].delta.content or "" if chunk.choices else ""
            order.append(word)

    threads = [threading.Thread(target=ask, args=(word,)) for word in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == expected
    assert sum(a != b for a, b in pairwise(order)) > 5  # neither waits for the other's end
    for stream in (True, False):
        before = endless()
        if stream:
            answer = server.ask(user("Go on"), max_tokens=1500, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                server.client.with_options(timeout=0.5).chat.completions.create(model="demo", messages=[user("Go on")], max_tokens=1500)
        wait_until(lambda: not server.conversations._busy)
        assert endless() - before < 300
    assert server.endpoint._waiting == 0


def test_what_is_remembered_is_bounded_and_files_go(generator: Generator) -> None:
    with serving(generator) as server:
        server.conversations.most_kept = 2
        folder = Path(server.conversations.uploads._folder.name)
        for number in range(5):
            server.ask(user(part(encoded(number)), text("?")))
            wait_until(lambda: not server.conversations._busy)
            assert len([file for file in folder.glob("*/*") if file.is_file()]) == len(server.conversations._idle) == min(number + 1, 2)
        with pytest.raises(openai.BadRequestError):
            server.ask(user(part(b"no image"), text("?")))
        assert len([file for file in folder.glob("*/*") if file.is_file()]) == 2
        begun = [user("Same"), {"role": "assistant", "content": "yes"}]
        for number in range(10, 13):  # another image in place of the one before
            server.ask(*begun, user(part(encoded(number)), text("?")))
            wait_until(lambda: not server.conversations._busy)
        assert len(server.conversations._idle[-1].dialogue.context._features) == 1
        long = "word " * 300  # two of them are more than the model takes in one
        for name in "ab":
            server.ask(user(f"{name} {long}"))
        wait_until(lambda: not server.conversations._busy)
        most = generator.model.config.get_text_config().max_position_embeddings
        assert sum(len(kept.dialogue.context.tokens) for kept in server.conversations._idle) <= most


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found", "'gpt-4o' is not served here; this is 'demo'"),
        ({"n": 2}, 400, "unsupported_parameter", "n: '2' is not supported; expected 1"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
        ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
        ({"frequency_penalty": 0.5}, 400, "unsupported_parameter", "frequency_penalty"),
        ({"max_token": 5}, 400, "unknown_parameter", "did you mean max_tokens?"),
        ({"temperature": "1"}, 400, None, "temperature: expected a number, got '1'"),
        ({"temperature": -1}, 400, None, "temperature: expected at least 0"),
        ({"temperature": 10**400}, 400, None, "temperature: expected a number"),
        ({"max_tokens": True}, 400, None, "max_tokens: expected a whole number"),
        ({"max_tokens": 0}, 400, None, "at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 400, None, "differ"),
        ({"max_tokens": 10_000}, 400, "context_length_exceeded", "this model takes 2048 tokens"),
        ({"stop": [""]}, 400, None, "none empty"),
        ({"messages": []}, 400, None, "at least one"),
        ({"messages": [user("a"), user("b")]}, 400, None, "by turns"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, 400, None, "the user's last"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, None, "got 'tool'"),
        ({"messages": [{"role": "system", "content": [part(b"x")]}, user("a")]}, 400, None, "messages[0]: images and videos belong into the user's messages"),
        ({"messages": [user("half \ud800")]}, 400, None, "half a character"),
        ({"messages": [user(part(b"nothing of the kind"))]}, 400, None, "messages[0].content[0] is no image that can be read"),
        ({"messages": [user(text("a"), part(encoded(0)[:-40]))]}, 400, None, "messages[0].content[1]"),
        ({"messages": [user(part(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"))]}, 400, None, "is no image that can be read"),
        ({"messages": [user(part(encoded(0), "video/mp4"))]}, 400, None, "messages[0].content[0]"),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}})]}, 400, None, "no base64"),
        ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, 400, None, "got 'input_audio'"),
        ({"messages": [user(*[part(b"x")] * 129)]}, 400, None, "129 images and videos"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_openai_s_form(server: Server, change: dict[str, Any], status: int, code: str | None, message: str) -> None:
    got, answer, _ = server.send({"model": "demo", "messages": [user("a")], **change})
    assert (got, answer["error"]["code"]) == (status, code), answer
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["type"] == "invalid_request_error"
    assert "/tmp" not in json.dumps(answer) and "interlace-dialogue" not in json.dumps(answer)
    assert server.ask(user("Still there?")).choices


@pytest.mark.parametrize(
    "make", [str, "file://{}".format, "file:{}".format, "../../../../../..{}".format, "http://127.0.0.1:1{}".format, "https://example.org{}".format]
)
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_no_file_is_opened_and_no_address_fetched(
    server: Server, make: Callable[[str], str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "private.png"
    private.write_bytes(encoded(5))
    monkeypatch.setattr("interlace.data.places.download", lambda *_: pytest.fail("fetched"))
    for value in ({"url": make(str(private))}, make(str(private))):
        status, answer, _ = server.send({"messages": [user({"type": kind, kind: value}, text("?"))]})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "no address is fetched and no file is opened" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd", "/v1/files", "/web.html"])
def test_nothing_but_the_endpoint_and_the_page_is_there(server: Server, path: str) -> None:
    status, answer, _ = server.send(b"", "GET", path)
    assert status == 404 and "error" in answer
    assert server.send(b"", "GET", "/v1/chat/completions")[0] == 405


def test_other_sites_other_names_and_strange_bodies_are_refused(server: Server) -> None:
    body = {"messages": [user("a")]}
    own = f"127.0.0.1:{server.port}"
    for headers, expected in (
        ({"Host": own, "Origin": f"http://{own}"}, 200),
        ({"Host": "localhost:9"}, 200),
        ({"Host": "[::1]:9"}, 200),
        ({"Host": f"evil.example:{server.port}"}, 403),  # a name that leads here: DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1@evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a foreign form can send without being asked
    ):
        status, answer, given = server.send(body, **headers)
        assert status == expected, (headers, answer)
        assert not [name for name in given if name.lower().startswith("access-control")]
    for data in (b"", b"{", b"[]", b'{"messages": NaN}', b"[" * 100_000, b"\xff\xfe"):
        assert server.send(data)[0] == 400
    assert server.send(b"", "OPTIONS", Origin="https://evil.example")[0] == 403


def test_a_large_request_is_told_so_and_a_key_is_asked_for(generator: Generator) -> None:
    with serving(generator, max_upload_mb=1, api_key="a key of ours") as server:
        client = server.client.with_options(api_key="a key of ours")
        with pytest.raises(openai.APIStatusError, match="larger than 1 MB") as caught:
            client.chat.completions.create(model="demo", messages=[user(part(bytes(3_000_000)))])
        assert caught.value.status_code == 413
        assert client.chat.completions.create(model="demo", messages=[user("a")]).choices
        for key in ("any", "", "a key of ourz"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                server.client.with_options(api_key=key or "-").chat.completions.create(model="demo", messages=[user(part(bytes(700_000)))])
        assert server.send(b"", "GET", "/")[0] == 200 and "a key of ours" not in server.send(b"", "GET", "/")[1]
        assert server.endpoint._waiting == 0
        server.endpoint._waiting = 4_000_000
        status, answer, headers = server.send({"messages": [user("a")]}, Authorization="Bearer a key of ours")
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "server_busy", "2")


# --- the script ---


def test_wrong_options_and_a_port_in_use_are_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for words, message in (
            (["--serve", "--port", port], f"127.0.0.1 port {port} cannot be opened: Address already in use"),
            (["--web", "--port", "70000"], "expected 0 to 65535"),
            (["--web", "--query", "x", "--image-file", "a.png"], "--query, --image-file: not with --web or --serve"),
            (["--web", "--max-upload-mb", "0"], "--max-upload-mb: expected at least 1"),
            (["--port", "8000"], "--port: only with --web or --serve"),
            (["--serve", "--host", "203.0.113.1"], "cannot be opened"),
        ):
            began = time.monotonic()
            done = run("predict_multiround.py", "--model-path", "no such model", *words)
            assert (done.returncode, message in done.stderr) == (2, True), done.stderr
            assert time.monotonic() - began < 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_what_is_not_installed_is_named_with_the_command(package: str) -> None:
    script = f"import sys; sys.path.insert(0, 'train'); sys.modules['{package}'] = None; sys.argv = ['x', '--model-path', 'demo', '--web']; "
    script += "from interlace.errors import run_script; from predict_multiround import main; run_script(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, 'error: --web and --serve need Starlette and uvicorn: pip install -e ".[serve]"\n')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_script_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERLACE_API_KEY": "not to be shown", "TMPDIR": str(tmp_path)}
    words = [sys.executable, "train/predict_multiround.py", "--model-path", "demo", "--web", "--port", "0", "--max-new-tokens", "4"]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        page = process.stdout.readline()
        address = re.fullmatch(r"page: (http://127\.0\.0\.1:\d+/)\n", page)
        assert address, (page, process.stderr.read())
        assert f"{address[1]}v1, model demo" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"{address[1]}v1", api_key="not to be shown", max_retries=0)
        assert client.chat.completions.create(model="demo", messages=[user(part(encoded(1)), text("?"))]).usage.completion_tokens <= 4
        assert list(tmp_path.glob("interlace-dialogue-*/*/*"))
        growing = iter(client.chat.completions.create(model="demo", messages=[user("a")], temperature=1000, seed=3, max_tokens=1900, stream=True))
        next(growing)
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="the server is being stopped"):
            list(growing)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in error and "not to be shown" not in error
    assert not list(tmp_path.glob("interlace-dialogue-*"))


def test_a_host_name_that_is_none_is_told() -> None:
    with pytest.raises(InputError, match="cannot be opened: no name of a machine"):
        listen("a" * 70 + ".x", 0)


# --- the page ---

DROP = """(async (items, x, y) => {
  const transfer = new DataTransfer();
  for (const [name, type, data] of items) transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
  document.elementFromPoint(x, y).dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, clientX: x, clientY: y, bubbles: true, cancelable: true }));
})"""
PASTE = DROP.replace(
    'document.elementFromPoint(x, y).dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, clientX: x, clientY: y, bubbles: true, cancelable: true }))',
    'composer.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }))',
)


@dataclass
class Page:
    """The page in a browser, as a person uses it."""

    browser: Browser

    def drop(self, *files: tuple[str, str, bytes], at: tuple[float, float] | None = None, how: str = DROP) -> None:
        chips = self.browser.ask("composer.querySelectorAll('.medium').length")
        x, y = at or self.browser.point("#composer")
        self.browser.ask(f"{how}({json.dumps([(name, kind, base64.b64encode(data).decode()) for name, kind, data in files])}, {x}, {y})")
        wait_until(lambda: self.browser.ask("composer.querySelectorAll('.medium').length") == chips + len(files))

    def type(self, words: str) -> None:
        self.browser.send("Input.insertText", text=words)

    def send(self) -> None:
        self.browser.press("Enter")
        self.wait()

    def wait(self) -> None:
        wait_until(lambda: not self.browser.ask("Boolean(running)"))

    @property
    def asked(self) -> Any:
        return self.browser.ask("turns.map((t) => (t.role === 'user' ? t.content.map((p) => p.text ?? p.type) : t.content))")

    @property
    def written(self) -> list[str]:
        return self.browser.ask("written().map((p) => p.text ?? p.type)")


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    browser.open(f"http://127.0.0.1:{server.port}/")
    yield Page(browser)
    assert browser.errors == []
    own = f"http://127.0.0.1:{server.port}/"
    assert {address for address in browser.requests if not address.startswith("data:")} <= {own, f"{own}v1/chat/completions"}


def test_media_stand_where_they_are_put_and_the_answer_is_the_dialogue_s(page: Page, server: Server, generator: Generator) -> None:
    first, second, third = encoded(1), encoded(2, "JPEG"), encoded(3)
    page.drop(("a.png", "image/png", first), ("b.jpg", "image/jpeg", second))
    page.type("Compare  with ")
    x, y = page.browser.ask("(() => { const r = getSelection().getRangeAt(0).getBoundingClientRect(); return [r.x, r.y + r.height / 2]; })()")
    page.type("and say.")
    page.drop(("c.png", "image/png", third), at=(x, y))
    assert page.written == ["image_url", "\n", "image_url", "\nCompare  with ", "image_url", "and say."]
    page.send()
    parts = [Image("a", first), Text("\n"), Image("b", second), Text("\nCompare  with "), Image("c", third), Text("and say.")]
    dialogue = Dialogue(generator, 8)
    expected = dialogue.ask(parts)
    assert page.asked[1] == expected == page.browser.ask("document.querySelector('.turn.assistant .text').textContent")
    assert server.ids() == [token for token, _ in dialogue.context.tokens]
    page.type("And now?")
    page.send()
    assert page.asked[3] == dialogue.ask([Text("And now?")])
    assert server.ids() == [token for token, _ in dialogue.context.tokens]
    assert f"{dialogue.usage.prompt - dialogue.usage.kept} new token" in page.browser.ask("document.querySelector('.actions output').textContent")


def test_questions_are_taken_back_changed_and_answered_again(page: Page) -> None:
    page.browser.ask("composer.focus()")
    page.type("First")
    page.drop(("a.png", "image/png", encoded(1)), how=PASTE)
    page.type(" line")
    page.browser.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=8, text="\r")
    page.type("two")
    assert page.written == ["First", "image_url", " line\ntwo"]
    page.send()
    before = page.asked
    page.browser.click('[data-action="retry"]')
    page.wait()
    assert page.asked == before and before[0] == ["First", "image_url", " line\ntwo"]
    page.browser.click('[data-action="edit"]')
    assert (page.asked, page.written) == ([], before[0])
    page.type(" more")
    page.send()
    assert page.asked[0] == ["First", "image_url", " line\ntwo more"]
    page.browser.press("Tab")
    page.browser.click('[data-action="undo"]')
    assert page.asked == [] and page.browser.ask("byId('turns').children.length") == 0
    page.drop(("a.png", "image/png", encoded(1)))
    page.browser.click(".remove")
    page.drop(("a.png", "image/png", encoded(1)), how=PASTE)
    for _ in range(2):  # the line that it has of its own, and the image
        page.browser.send("Input.dispatchKeyEvent", type="keyDown", key="Backspace", code="Backspace", windowsVirtualKeyCode=8)
    assert page.written == [] and page.browser.ask("byId('send').disabled")


def test_videos_are_chosen_and_sent_whole(page: Page, server: Server, generator: Generator, tmp_path: Path) -> None:
    film, picture = write_video(tmp_path / "film.mp4"), tmp_path / "a.png"
    picture.write_bytes(encoded(1))
    page.browser.ask("composer.focus()")
    page.type("See ")
    document = page.browser.send("DOM.getDocument")["root"]["nodeId"]
    field = page.browser.send("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    page.browser.send("DOM.setFileInputFiles", nodeId=field, files=[str(film), str(picture)])
    wait_until(lambda: page.written == ["See ", "video_url", "image_url"])
    page.send()
    dialogue = Dialogue(generator, 8, Uploads(3))
    assert page.asked == [["See ", "video_url", "image_url"], dialogue.ask([Text("See "), Video("film", film.read_bytes()), Image("a", encoded(1))])]
    assert server.ids() == [token for token, _ in dialogue.context.tokens]
    page.browser.click(".medium.video .open")
    assert page.browser.ask("document.querySelectorAll('#large video[controls]').length") == 1
    page.browser.press("Escape")


def test_an_answer_is_stopped_and_what_was_said_is_kept(page: Page, server: Server, endless: Callable[[], int]) -> None:
    page.browser.ask("(byId('max_tokens').value = 1500, composer.focus())")
    page.type("Go on")
    page.browser.press("Enter")
    wait_until(lambda: page.browser.ask("turns.length === 2 && turns[1].content.length > 3"))
    assert page.browser.ask("byId('send').textContent") == "Stop"
    page.browser.press("Escape")
    page.wait()
    wait_until(lambda: not server.conversations._busy)
    made, said = endless(), page.asked[1]
    assert 3 < len(said) < 1500 and made < 1000
    time.sleep(0.2)
    assert endless() == made
    page.browser.ask("byId('max_tokens').value = 4")
    page.type("More")
    page.send()
    assert page.asked[1] == said and len(page.asked) == 4
    assert "cut at the longest answer" in page.browser.ask("document.querySelector('.actions output').textContent")


def test_hostile_text_is_text_and_what_fails_goes_back_into_the_composer(page: Page) -> None:
    page.browser.ask("composer.focus()")
    page.type(HOSTILE)
    page.send()
    assert page.asked[0] == [HOSTILE]
    page.browser.ask(f"(turns[1].content = {json.dumps(HOSTILE)}, show())")
    assert page.browser.ask("[...document.querySelectorAll('.turn .text')].map((e) => e.textContent)") == [HOSTILE, HOSTILE]
    assert page.browser.ask("document.querySelectorAll('.turn img, .turn b').length") == 0
    assert page.browser.ask("document.title") == "demo · chat"
    assert page.browser.ask("fetch('https://example.org/').then(() => 'fetched', () => 'refused')") == "refused"
    page.browser.requests[:] = [address for address in page.browser.requests if "example.org" not in address]
    page.drop(("a.png", "image/png", b"no image at all"))
    page.type("What?")
    page.send()
    assert "messages[2].content[0] is no image that can be read" in page.browser.ask("byId('trouble').textContent")
    assert (len(page.asked), page.written) == (2, ["image_url", "\nWhat?"])
    page.browser.ask(f"{DROP}([['a.txt', 'text/plain', '']], 300, 300)")
    wait_until(lambda: "a.txt is neither an image nor a video" in page.browser.ask("byId('trouble').textContent"))


def test_a_saved_conversation_is_a_row_and_comes_back(page: Page) -> None:
    page.browser.ask("(byId('system').value = 'Be short.', composer.focus())")
    page.drop(("a.png", "image/png", encoded(1)))
    page.type("What?")
    page.send()
    before = page.asked
    page.browser.ask("(URL.createObjectURL = (blob) => (saved = blob, 'data:,'), saved = null, HTMLAnchorElement.prototype.click = () => {}, save())")
    (row,) = json.loads(page.browser.ask("saved.text()"))
    sample = FORMATS["messages"](row)
    assert isinstance(sample, Sample)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"] and sample.turns[0].text == "Be short."
    assert [item.data for item in media_of(sample.turns)] == [encoded(1)]
    page.browser.click("#clear")
    page.browser.ask("byId('system').value = ''")
    page.browser.ask("load(new File([saved], 'a.json'))")
    assert page.asked == before and page.browser.ask("byId('system').value") == "Be short."
    foreign = {"type": "image_url", "image_url": {"url": "http://evil.example/a.png"}}
    for wrong in ("[]", "{", json.dumps([{"messages": [user(foreign), {"role": "assistant", "content": ""}]}])):
        page.browser.ask(f"load(new File([{json.dumps(wrong)}], 'b.json'))")
        assert page.browser.ask("byId('trouble').textContent").startswith("b.json is no conversation")
        assert page.asked == before


def test_the_page_fits_a_phone_and_has_two_schemes(page: Page) -> None:
    page.browser.ask("composer.focus()")
    page.type("A" * 300)
    page.drop(("a.png", "image/png", encoded(1, size=(900, 40))))
    page.send()
    page.browser.resize(360, 640)
    assert page.browser.ask("document.documentElement.scrollWidth") == 360
    assert page.browser.ask("byId('send').getBoundingClientRect().right") <= 360
    assert page.browser.ask("byId('send').getBoundingClientRect().bottom") <= 640
    page.browser.resize(1280, 900)
    page.browser.prefer("dark")
    dark = page.browser.ask("getComputedStyle(document.body).backgroundColor")
    page.browser.click("#theme")
    assert page.browser.ask("getComputedStyle(document.body).backgroundColor") != dark == "rgb(19, 20, 22)"
    page.browser.prefer("light")
