"""Trackers that fail, hang or cannot be reached, and secrets that must not leave the configuration."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from interlace.errors import InputError
from interlace.redaction import readable, tells_secrets, without_secrets
from interlace.training.supervised import finetune
from interlace.training.tracking import GuardedTracker, guarded_trackers
from tests.conftest import ROOT, fast_first

Make = Callable[..., dict[str, Any]]
KEY = "0123456789abcdef0123456789abcdef01234567"


def losses(output_dir: str | Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"] if "loss" in entry]


class Server(ThreadingHTTPServer):
    """A W&B server as far as a run needs one: it takes the run and its files. Keeps every body; from `hangs_after` requests on it accepts and never answers."""

    daemon_threads = True

    def __init__(self, hangs_after: int | None = None):
        super().__init__(("127.0.0.1", 0), Answers)
        self.bodies: list[str] = []
        self.hangs_after = hangs_after
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        self.server.bodies.append(f"{self.path} {body}")
        if self.server.hangs_after is not None and len(self.server.bodies) > self.server.hangs_after:
            self.server.stopped.wait(120)
            return
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "somebody"}}
        given = re.search(r'"name":"(\w{3,8})"', body)
        bucket = {"id": "b", "name": given[1] if given else "run", "displayName": "run", "config": "{}", "project": project, "historyLineCount": 0}
        answer = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}, "model": None}} if "graphql" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST  # noqa: N815 names of the library

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(hangs_after: int | None = None) -> Server:
        servers.append(Server(hangs_after))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.stopped.set()
        server.shutdown()
        server.server_close()


def settings(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a process whose W&B keeps its files and settings in `folder` and knows nothing of this process's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**inherited, "HOME": str(folder), "WANDB_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "train"), **changes}


def train(arguments: dict[str, Any], folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does, W&B's files and settings in `folder`."""
    folder.mkdir(exist_ok=True)
    plain = {name: value for name, value in json.loads(json.dumps(arguments)).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(plain))
    command = [sys.executable, str(ROOT / "train" / "supervised_finetune.py"), str(folder / "config.json"), *words]
    return subprocess.run(command, env=settings(folder, **environment), cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180)


def sync_folder(done: subprocess.CompletedProcess[str]) -> Path:
    """The folder that the printed command uploads."""
    (folder,) = re.findall(r"wandb sync (\S+)", done.stdout + done.stderr)
    return Path(folder)


# --- W&B that cannot be had ---


@pytest.mark.parametrize("case", fast_first(["dead", "hangs", "no key", "bad key", "folder is a file"], 1))
def test_a_run_goes_on_offline_with_the_same_losses(make_arguments: Make, rows_file: Path, tmp_path: Path, serve: Callable[..., Server], case: str) -> None:
    plain = make_arguments(rows_file, lora=True, output_dir=str(tmp_path / "plain"))
    finetune(plain)
    server = serve(hangs_after=0)
    url = server.url if case == "hangs" else "http://127.0.0.1:9"
    environment = {"WANDB_BASE_URL": url, **({} if case == "no key" else {"WANDB_API_KEY": "short" if case == "bad key" else KEY})}
    if case == "folder is a file":
        (tmp_path / "file").write_text("")
        environment |= {"WANDB_DIR": str(tmp_path / "file" / "inside"), "TMPDIR": str(tmp_path)}
    done = train({**plain, "output_dir": str(tmp_path / "tracked"), "report_to": "wandb"}, tmp_path / "home", **environment)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "tracked") == losses(tmp_path / "plain")
    assert (done.stdout + done.stderr).count("W&B") == 1  # one line
    assert list(sync_folder(done).glob("*.wandb"))


def test_a_silent_server_holds_a_run_up_for_seconds_only(serve: Callable[..., Server], tmp_path: Path) -> None:
    """The bound is the promise: seven seconds on a quiet machine, of which six are waited; W&B's own is 90, and three times ours leaves room for a busy one."""
    code = "import time; from interlace.training.weights_and_biases import open_wandb; start = time.time(); open_wandb('abc', None); print(time.time() - start)"
    environment = settings(tmp_path, WANDB_MODE="online", WANDB_BASE_URL=serve(0).url, WANDB_API_KEY=KEY)
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert float(done.stdout.splitlines()[-1]) < 30, done
    assert time.time() - start < 80  # nor does the end of the process wait for the server


def test_a_server_that_dies_during_the_run_does_not_hold_up_its_end(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    code = """
import os, wandb
from types import SimpleNamespace
from interlace.training import weights_and_biases
weights_and_biases.FINISH_SECONDS = 3
weights_and_biases.open_wandb('abc', None)
assert not wandb.run.offline
print('open', flush=True)
input()
tracker = weights_and_biases.WandbTracker({})
wandb.log({'loss': 1.0})
tracker.on_train_end(None, SimpleNamespace(is_world_process_zero=True), None)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=settings(tmp_path, WANDB_MODE="online", WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "open\n":
            break
    server.hangs_after = len(server.bodies)
    rest, _ = process.communicate("\n", timeout=60)  # the bound is the promise: W&B's own default waits for ever
    assert process.returncode == 0, rest
    assert "did not take everything within 3 seconds" in rest
    assert re.search(r"wandb sync \S+run-\S+-abc", rest)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_wandb_run(make_arguments: Make, rows_file: Path, tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve()
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    arguments = make_arguments(rows_file, lora=True, report_to="wandb", save_strategy="steps", save_steps=2, max_steps=2)
    first = train(arguments, tmp_path / "home", **online)
    assert first.returncode == 0, first.stderr
    run_id = (tmp_path / "run" / "wandb_run_id.txt").read_text().strip()
    assert any("UpsertBucket" in body and f'"{run_id}"' in body for body in server.bodies)
    # the first run was two steps of four
    (tmp_path / "run" / "trainer_state.json").unlink()
    server.bodies.clear()
    second = train({**arguments, "max_steps": 4, "resume_from_checkpoint": True}, tmp_path / "home", **online)
    assert second.returncode == 0, second.stderr
    assert any("UpsertBucket" in body and f'"{run_id}"' in body for body in server.bodies)
    offline = train({**arguments, "max_steps": 4, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}, tmp_path / "home", WANDB_MODE="offline")
    assert offline.returncode == 0, offline.stderr
    assert sync_folder(offline).name.endswith(f"-{run_id}")
    fresh = train({**arguments, "output_dir": str(tmp_path / "other")}, tmp_path / "home", WANDB_MODE="offline")
    assert not sync_folder(fresh).name.endswith(run_id)


# --- trackers that raise ---


class Broken(TrainerCallback):
    """Raises in one event; counts those that reach it."""

    def __init__(self, event: str):
        self.calls: list[str] = []
        for name in ("on_train_begin", "on_log", "on_save", "on_evaluate", "on_train_end"):
            setattr(self, name, self._event(name, name == event))

    def _event(self, name: str, raises: bool) -> Callable[..., None]:
        def event(*args: Any, **more: Any) -> None:
            self.calls.append(name)
            if raises:
                raise RuntimeError(f"no room for hf_{'x' * 30} at https://me:pass@host/")

        return event


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_save", "on_evaluate", "on_train_end"])
def test_a_tracker_that_raises_is_left_out_and_the_losses_stay(
    make_arguments: Make, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], event: str
) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file), "sampling_strategy": "first:6"}]}
    changes = {"dataset": dataset, "lora": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    finetune(make_arguments(rows_file, **changes, output_dir=str(tmp_path / "plain")))
    broken = Broken(event)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", lambda: broken)
    finetune(make_arguments(rows_file, **changes, report_to="tensorboard"))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert broken.calls.count(event) == 1
    assert broken.calls[-1] == event
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "Broken failed" in line]
    assert len(lines) == 1
    assert "hf_x" not in lines[0]
    assert "pass" not in lines[0]


def test_every_event_that_a_tracker_listens_to_is_passed_on() -> None:
    ours = {name for name in vars(GuardedTracker) if name.startswith("on_")}
    for kind in INTEGRATION_TO_CALLBACK.values():
        theirs = {name for parent in kind.__mro__ if parent not in (TrainerCallback, object) for name in vars(parent) if name.startswith("on_")}
        assert theirs <= ours, f"{kind.__name__}: {theirs - ours}"


def test_a_tracker_that_is_not_known_or_not_installed_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> TrainerCallback:
        raise RuntimeError("TensorBoardCallback requires tensorboard to be installed")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", absent)
    for name, expected in (("tensorboard", "to be installed"), ("wandbb", "not supported")):
        with pytest.raises(InputError, match=expected):
            guarded_trackers(TrainingArguments(output_dir=str(tmp_path), report_to=name, use_cpu=True), {})


# --- secrets ---


def test_secrets_are_left_out_at_any_depth_and_counts_of_tokens_are_kept() -> None:
    arguments = {
        "hub_token": "hf_a",
        "max_tokens_per_batch": 4096,
        "include_num_input_tokens_seen": "no",
        "deepspeed": {"wandb": {"enabled": True, "api_key": "b"}, "list": [{"Secret_Access_Key": "c", "seed": 1}]},
        "dataset": {"train": [{"data_files": ["https://user:d@host/rows.json?token=e&part=3", "rows.json"]}]},
    }
    kept = {
        "max_tokens_per_batch": 4096,
        "include_num_input_tokens_seen": "no",
        "deepspeed": {"wandb": {"enabled": True}, "list": [{"seed": 1}]},
        "dataset": {"train": [{"data_files": ["https://***@host/rows.json?token=***&part=3", "rows.json"]}]},
    }
    assert without_secrets(arguments) == kept


def test_a_text_is_made_readable_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    signed = "https://bucket.host/i.png?X-Amz-Credential=A%2FB&X-Amz-Expires=9&X-Amz-Signature=cd"
    assert readable(signed) == "https://bucket.host/i.png?X-Amz-Credential=***&X-Amz-Expires=9&X-Amz-Signature=***"
    assert readable(f"401 for {KEY}, hf_{'q' * 34}") == "401 for ***, ***"
    plain = "https://host/a@b.json?page=2 and me@example.com, step 3/4"
    assert readable(plain) == plain
    assert json.loads(readable(json.dumps({"detail": 'http://u:p@h/?token=x"y\\'}))) == {"detail": 'http://***@h/?token=***"y\\'}


def test_a_command_line_with_a_secret_is_noticed() -> None:
    assert tells_secrets(["--hub_token", "x"])
    assert tells_secrets(["--hub_token=x"])
    assert tells_secrets(["--run_name", "https://me:x@host/"])
    assert not tells_secrets(["config.json", "--max_tokens_per_batch", "4096", "--seed=1"])


def test_no_planted_secret_is_written_anywhere(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    """hub_token in the file and on the command line, an API key deep in the arguments, logins in URLs of data and of media, and the environment."""
    rows = json.loads(rows_file.read_text())
    rows[1]["image"] = ["https://reader:PLANTED1@127.0.0.1:9/a.png?token=PLANTED2&size=3"]
    rows_file.write_text(json.dumps(rows))
    arguments = make_arguments(rows_file, lora=True, report_to=["wandb", "tensorboard"], save_strategy="steps", save_steps=2, bad_rows="skip")
    arguments |= {"allow_urls": True, "allowed_url_hosts": ["127.0.0.1"], "cache_dir": str(tmp_path / "cache")}
    arguments |= {"hub_token": "hf_PLANTED3", "lr_scheduler_kwargs": {}, "accelerator_config": {"split_batches": False}}
    arguments |= {"trackio_space_id": "https://me:PLANTED4@host/space", "hub_model_id": "me/model?token=PLANTED5"}
    environment = {"WANDB_API_KEY": "PLANTED6" * 5, "HF_TOKEN": "hf_PLANTED7" * 4, "WANDB_MODE": "offline"}
    done = train(arguments, tmp_path / "home", "--hub_token", "hf_PLANTED8", **environment)
    assert done.returncode == 0, done.stderr
    output, home = tmp_path / "run", tmp_path / "home"
    (home / "config.json").unlink()  # the user's own file
    written = [path for folder in (output, home) for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in written} | {path.name.split(".")[0] for path in written}
    assert {".wandb", "events", "arguments", "ledger", ".safetensors"} <= kinds
    assert json.loads((output / "ledger.json").read_text())["skipped"] == 1
    found = {path.name for path in written if b"PLANTED" in path.read_bytes()}
    assert not found
    assert "PLANTED" not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [["--hub_token", "5", "--hub_model_id", "PLANTED"], ["--hub_tokn", "PLANTED"]])
def test_a_message_about_the_arguments_does_not_repeat_a_secret(make_arguments: Make, rows_file: Path, tmp_path: Path, words: list[str]) -> None:
    arguments = {**make_arguments(rows_file), "hub_token": ["PLANTED"] if "--hub_tokn" in words else "PLANTED", "seed": "x"}
    done = train(arguments, tmp_path / "home", *words)
    assert done.returncode == 2
    assert "PLANTED" not in done.stdout + done.stderr


def test_a_traceback_does_not_repeat_a_secret(tmp_path: Path) -> None:
    code = "from interlace.errors import run_script\ndef main(): raise RuntimeError('401 for https://me:PLANTED@host/')\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", code], env=settings(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: 401 for https://***@host/" in done.stderr
    assert "PLANTED" not in done.stderr


def test_tensorboard_is_written(make_arguments: Make, rows_file: Path) -> None:
    arguments = make_arguments(rows_file, lora=True, report_to="tensorboard")
    finetune(arguments)
    (tracker,) = guarded_trackers(TrainingArguments(output_dir=arguments["output_dir"], report_to="tensorboard", use_cpu=True), {})
    assert isinstance(tracker, GuardedTracker)
    assert isinstance(tracker.tracker, TensorBoardCallback)
    assert list(Path(arguments["output_dir"]).rglob("events.out.tfevents.*"))
