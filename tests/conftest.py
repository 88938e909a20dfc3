"""Shared fixtures: the real Qwen tokenizer, a tiny random LLaVA, a small data set with images."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", INTERLACE_CACHE=tempfile.mkdtemp(prefix="interlace-tests-"))

import dashscope
import numpy as np
import PIL.Image
import pytest
import torch
import wandb
from tiktoken.load import load_tiktoken_bpe
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2TokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.data.template import ChatTemplate
from interlace.model.loading import Processing
from interlace.model.saving import save_model, save_processing
from tests.page_reader import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "data" / "demo" / "model"
IMAGE_TOKENS = 4
NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs g++: DeepSpeed compiles its code for CPUs")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["INTERLACE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def qwen() -> PreTrainedTokenizerBase:
    """Qwen1.5's tokenizer from the published ranks, with `<image>` as 151646 like the Hugging Face ports."""
    ranks = load_tiktoken_bpe(str(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"))
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    def parts(token: bytes) -> tuple[bytes, bytes]:
        """The last merge that makes a token: byte pair encoding with lower ranks only."""
        pieces = [bytes([byte]) for byte in token]
        while len(pieces) > 2:
            i = min(range(len(pieces) - 1), key=lambda k: ranks.get(pieces[k] + pieces[k + 1], 1 << 30))
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces[0], pieces[1]

    merges = [tuple(map(spell, parts(token))) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=merges)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    assert tokenizer.convert_tokens_to_ids(specials) == [151643, 151644, 151645, 151646]
    return tokenizer


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """Two layers everywhere, grouped queries, 4 tokens per 32 x 32 image."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>", "<image>")}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16, vision_use_head=False
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def fast_first(values: Iterable[Any], count: int, ids: Iterable[str] | None = None) -> list[Any]:
    """Parameters of which the first `count` are for `make test` and the others, which prove the same of more cases, for `make test-slow`."""
    names = itertools.repeat(None) if ids is None else ids
    found = []
    for number, (value, name) in enumerate(zip(values, names, strict=False)):
        whole = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*whole, id=name, marks=pytest.mark.slow if number >= count else ()))
    return found


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, demo_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random tiny LLaVA in float32, saved as Interlace saves models."""
    torch.manual_seed(0)
    config = tiny_config(demo_tokenizer)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # larger weights than the initialisation: differences must show
        parameter.data.mul_(3)
    folder = tmp_path_factory.mktemp("tiny_llava")
    save_model(model, folder)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    save_processing(Processing(demo_tokenizer, images, ChatTemplate(demo_tokenizer, config.image_token_id), config), folder)
    return folder


def write_rows(folder: Path, count: int, seed: int = 0) -> Path:
    """A LLaVA json with `count` rows of 0 to 3 images, one or two exchanges; returns its path."""
    randomness = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(8):
        pixels = np.random.RandomState(i).randint(0, 255, (20 + i, 24, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    rows = []
    for number in range(count):
        images = [f"pictures/{randomness.randrange(8)}.png" for _ in range(number % 4)]
        question = "".join(f"Image {letter}: <image>\n" for letter, _ in zip("ABC", images, strict=False)) + "Which digit is the largest?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"digit {randomness.randrange(10)}"}]
        if number % 3 == 0:
            turns += [{"from": "human", "value": "And the image?"}, {"from": "gpt", "value": f"image {randomness.choice('ABC')}" * (1 + number % 2)}]
        rows.append({"id": str(number), **({"image": images} if images else {}), "conversations": turns, "metadata": {"dataset": f"images_{len(images)}"}})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: neither chromium, chromium-browser nor google-chrome")
    with Browser() as opened:
        yield opened


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where W&B writes offline. Its service outlives a run, its address in the environment that child processes inherit: ended on both sides."""
    folder = tmp_path / "tracked"
    folder.mkdir()
    wandb.teardown()
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    yield folder
    wandb.teardown()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data", 24)


@pytest.fixture
def make_arguments(tiny_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Resolved arguments of a short run on the tiny model, with changes."""

    def make(data: Path, **changes: Any) -> dict[str, Any]:
        config = {
            "model_name_or_path": str(tiny_dir),
            "output_dir": str(tmp_path / "run"),
            "dataset": {"train": [{"data_files": str(data)}]},
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_strategy": "no",
            "logging_steps": 1,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            **({} if "lora_path" in changes else {"lora_dropout": 0.0}),
            **changes,
        }
        arguments, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "test"))
        assert not problems
        return arguments

    return make


@pytest.fixture(autouse=True)
def no_signal_is_left_ignored() -> Iterator[None]:
    """A script that runs in the process of the tests leaves signals ignored at its end, and so they would be in every process that a later test starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture(autouse=True)
def no_forecast_on_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run ends with a page that rehearses its costliest step once more: a second each in hundreds of tests, of which one file asks for it."""
    if request.module.__name__.rpartition(".")[2] != "test_story" and "interlace.training.story" in sys.modules:
        from interlace.training.report import Peak

        monkeypatch.setattr("interlace.training.story.forecast_peak", lambda trainer, *_: Peak(trainer.args.device.type, 1, None, "not asked for"))
