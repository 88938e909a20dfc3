"""The input side alone, from files to batches, against other tools: `python benchmarks/input_side.py` with `train/` on PYTHONPATH.

Every variant reads the same rows and images, one process per measurement, one thread; the clock starts when libraries and processor are loaded. Other tools
run in interpreters of their own, `--peer ms-swift=/path/to/python`, and are left out without one. First of all their rows are held against ours: the same
number of image tokens, or nothing else is reported of a variant.
"""

import argparse
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
from torch.utils.data import DataLoader

ROWS, ROWS_PER_BATCH, COMPARED = 200, 8, 8
QUESTION_TOKENS, ANSWER_TOKENS, MAX_LENGTH = 60, 50, 4096
SIDE, IMAGE, IMAGE_TOKENS = 384, 151646, 729
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> interpreter, function that makes it, its settings
    "Interlace": ("", "interlace", {}),
    "TRL, messages": ("", "trl", {"kind": "messages"}),
    "TRL, prompt and completion": ("", "trl", {"kind": "completion"}),
    "Hugging Face processor": ("", "hugging_face", {}),
    "TRL, messages, torchvision": ("torchvision", "trl", {"kind": "messages"}),
    "Hugging Face processor, torchvision": ("torchvision", "hugging_face", {}),
    "LLaMA-Factory": ("llamafactory", "llama_factory", {}),
    "LLaMA-Factory, images not shrunk": ("llamafactory", "llama_factory", {"image_max_pixels": 1024 * 768}),
    "ms-swift": ("ms-swift", "ms_swift", {}),
}
PACKAGES = ("torch", "torchvision", "transformers", "trl", "llamafactory", "ms-swift", "datasets", "pillow")
Loaders = Callable[[int], DataLoader[Any]]
Rows = Iterator[tuple[int, torch.Tensor, torch.Tensor]]  # number, ids without padding, pixel values


@dataclass(frozen=True)
class Variant:
    """A tool with its libraries and processor loaded.

    loader: number of workers -> an epoch's loader, with everything done that comes before it.
    processing: the class and the method that are called with images to process.
    rows: a batch and the number of its first row -> its rows.
    size: a batch -> its tokens, and the same with padding.
    """

    loader: Loaders
    processing: tuple[type, str]
    rows: Callable[[Any, int], Rows]
    size: Callable[[Any], tuple[int, int]]


# --- data ---


def make_data(folder: Path) -> None:
    """Images, rows as each tool wants them, and a model folder without weights."""
    tokenizer, randomness, pictures = make_model_folder(folder / "model"), random.Random(0), np.random.default_rng(0)
    words = [word for word in map(tokenizer.decode, range(1000, 60_000)) if word[0] == " " and word[1:].isascii() and word[1:].isalpha()]
    files: dict[str, list[Any]] = {"rows": [], "messages": [], "completion": [], "plain": []}
    for number in range(ROWS):
        images = [str(folder / "images" / f"{number}-{i}.jpg") for i in range(1 + number % 4)]
        for image in images:
            draw(Path(image), (1024, 768) if randomness.random() < 0.7 else (SIDE, SIDE), pictures)
        answer, question = ("".join(randomness.choices(words, k=count)).strip() for count in (ANSWER_TOKENS, QUESTION_TOKENS))
        flat = "".join(f"Image {i + 1}: <image>\n" for i in range(len(images))) + question
        texts = [{"type": "text", "text": text} for text in flat.split("<image>")]
        parts = [part for text in texts for part in (text, {"type": "image"})][:-1]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        files["rows"].append({"image": images, "conversations": [{"from": "human", "value": flat}, {"from": "gpt", "value": answer}]})
        files["messages"].append({"messages": turns, "images": images})
        files["completion"].append({"prompt": turns[:1], "completion": turns[1:], "images": images})
        files["plain"].append({"messages": [{"role": "user", "content": flat}, {"role": "assistant", "content": answer}], "images": images})
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"messages": "conversations", "images": "image"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": columns}}))


def draw(path: Path, size: tuple[int, int], randomness: np.random.Generator) -> None:
    """A JPEG of coarse shapes, finer texture and a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = randomness.normal(0, 5, (height, width, 3))
    for cells, strength in ((8, 60), (64, 15)):
        coarse = randomness.normal(0, 1, (cells * height // width, cells, 3)).astype(np.float32)
        layers = [PIL.Image.fromarray(coarse[..., channel]).resize(size, PIL.Image.Resampling.BICUBIC) for channel in range(3)]
        pixels += strength * np.stack([np.asarray(layer) for layer in layers], -1)
    PIL.Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def make_model_folder(folder: Path) -> Any:
    """LLaVA-NeXT-Interleave 0.5B without its weights: configuration, Qwen's tokenizer, SigLIP's image processor; returns the tokenizer."""
    import dashscope
    from transformers import LlavaConfig, Qwen2Config, Qwen2Tokenizer, SiglipImageProcessorPil, SiglipVisionConfig
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from interlace.data.template import ChatTemplate
    from interlace.model.loading import Processing
    from interlace.model.saving import save_processing

    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    vision = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=SIDE, patch_size=14)
    text = Qwen2Config(vocab_size=151_648, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full")
    config.architectures = ["LlavaForConditionalGeneration"]
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    save_processing(Processing(tokenizer, images, ChatTemplate(tokenizer, IMAGE), config), folder)
    config.save_pretrained(folder)
    return tokenizer


# --- the tools: imported where they are used, since each interpreter has its own ---


def interlace(folder: Path) -> Variant:
    """Rows checked and kept on disk, packed, images opened and processed by the collator: a training run's defaults."""
    from interlace.data.batch import Collator, NumberedRows, PackedBatch
    from interlace.data.dataset import load_rows
    from interlace.data.packing import Plan, PlanLoader, PlanSampler, token_budget
    from interlace.data.places import MediaFolder
    from interlace.data.reading import RowReader
    from interlace.data.sources import read_entries
    from interlace.model.loading import Processing, load_processing

    import_module("interlace.training.trainer")  # as in a run: it brings libraries that would otherwise load while the clock runs
    processing, cache = load_processing(str(folder / "model")), Path(os.environ["INTERLACE_CACHE"])
    settings = {"cache_dir": str(cache), "preprocessing_num_workers": None, "bad_rows": "error", "max_bad_rows": None}

    def loader(workers: int) -> DataLoader[Any]:
        kept = MediaFolder(cache / "media")
        reader = RowReader(processing.template, processing.row_image_tokens, processing.image_settings, MAX_LENGTH, "drop_turns", 50_000_000, kept)
        rows, _ = load_rows(read_entries([{"data_files": str(folder / "rows.jsonl")}], 0), reader, settings, False)
        lengths = rows.lengths.tolist()
        plan = Plan(lengths, lengths, token_budget(lengths, ROWS_PER_BATCH, None), None, 1, 0)
        collator = Collator(processing.process_images, IMAGE)
        return PlanLoader(NumberedRows(rows), batch_sampler=PlanSampler(plan, 0), collate_fn=collator, num_workers=workers)  # type: ignore[arg-type]

    def rows(batch: PackedBatch, first: int) -> Rows:
        ids = [batch.input_ids[0, segment.start : segment.end] for segment in batch.segments]
        assert batch.pixel_values is not None
        return zip(batch.row_numbers, ids, shares(batch.pixel_values[batch.image_index], ids), strict=True)

    return Variant(loader, (Processing, "process_images"), rows, lambda batch: (batch.num_tokens, batch.num_tokens))


def shares(pixels: torch.Tensor, ids: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each row's pixel values, where the images of all rows lie one after another."""
    return pixels.split([int((row == IMAGE).sum()) // IMAGE_TOKENS for row in ids])


def padded(loader: Loaders, processor: Any) -> Variant:
    """A variant whose batches are padded and whose images go through a Hugging Face image processor."""

    def rows(batch: Any, first: int) -> Rows:
        ids = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        return zip(range(first, first + len(ids)), ids, shares(batch["pixel_values"], ids), strict=True)

    kind = type(processor.image_processor)
    return Variant(loader, (kind, "preprocess"), rows, lambda batch: (int(batch["attention_mask"].sum()), batch["input_ids"].numel()))


def trl(folder: Path, kind: str) -> Variant:
    """TRL's collator on `messages`, or on `prompt` and `completion`, where it supervises answers alone, as we do; images open when a row is read."""
    from datasets import Image, List, load_dataset
    from transformers import AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = AutoProcessor.from_pretrained(folder / "model")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=kind == "completion")

    def loader(workers: int) -> DataLoader[Any]:
        rows = load_dataset("json", data_files=str(folder / f"{kind}.jsonl"), split="train").cast_column("images", List(Image()))
        return DataLoader(rows, ROWS_PER_BATCH, collate_fn=collator, num_workers=workers)

    return padded(loader, processor)


def hugging_face(folder: Path) -> Variant:
    """The least that can be done with a processor: text rendered and tokenized, images opened and processed batch by batch; no checks, no labels."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "model")

    def collate(rows: list[dict[str, Any]]) -> Any:
        texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        images = [[PIL.Image.open(path) for path in row["images"]] for row in rows]
        return processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")

    def loader(workers: int) -> DataLoader[Any]:
        rows: Any = [json.loads(line) for line in (folder / "messages.jsonl").read_text().splitlines()]
        return DataLoader(rows, ROWS_PER_BATCH, collate_fn=collate, num_workers=workers)

    return padded(loader, processor)


def llama_factory(folder: Path, **changes: Any) -> Variant:
    """LLaMA-Factory's `get_dataset` and SFT collator: its LLaVA plugin under ChatML (its own `llava` template speaks Vicuna)."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    register_template(
        name="llava_chatml",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>\n"]),
        format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        default_system="You are a helpful assistant.",
        mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
    )
    places = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "dataset": "rows", "output_dir": os.environ["HF_HOME"]}
    settings = {"stage": "sft", "do_train": True, "template": "llava_chatml", "cutoff_len": MAX_LENGTH, "report_to": "none", "use_cpu": True}
    model, data, training, *_ = get_train_args({**places, **settings, **changes})
    tools = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tools["tokenizer"], data)
    collator = SFTDataCollatorWith4DAttentionMask(template=template, pad_to_multiple_of=8, label_pad_token_id=-100, **tools)

    def loader(workers: int) -> DataLoader[Any]:
        rows = get_dataset(template, model, data, training, stage="sft", **tools)["train_dataset"]
        return DataLoader(rows, ROWS_PER_BATCH, collate_fn=collator, num_workers=workers)

    return padded(loader, tools["processor"])


def ms_swift(folder: Path) -> Variant:
    """ms-swift's `load_dataset`, encoding when a row is read (its default with images) and collator: its LLaVA template under ChatML."""
    from swift.dataset import LazyLLMDataset, load_dataset
    from swift.model import get_processor
    from swift.template import get_template, register_template
    from swift.template.templates.llava import LlavaHfTemplate
    from swift.template.templates.utils import ChatmlTemplateMeta

    register_template(ChatmlTemplateMeta("llava_chatml", template_cls=LlavaHfTemplate, default_system="You are a helpful assistant."))
    processor = get_processor(str(folder / "model"), model_type="llava1_5_hf")
    template = get_template(processor, template_type="llava_chatml", max_length=MAX_LENGTH)
    template.set_mode("train")

    def loader(workers: int) -> DataLoader[Any]:
        rows: Any = LazyLLMDataset(load_dataset(str(folder / "plain.jsonl"))[0], template.encode, strict=True)
        return DataLoader(rows, ROWS_PER_BATCH, collate_fn=template.data_collator, num_workers=workers)

    return padded(loader, processor)


# --- measurements, each in a process of its own ---


def cpu_seconds() -> float:
    """Process time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def status_mib(name: str) -> float:
    """A figure of /proc/self/status."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1]) / 1024


def measure_first_run(variant: Variant, epochs: int) -> dict[str, Any]:
    """CPU seconds until the first batch is there, with nothing kept from before, and of each epoch's batches; tokens; peak memory, and its growth."""
    before, start = status_mib("VmRSS"), cpu_seconds()
    loader, ready, seconds, sizes = variant.loader(0), 0.0, [], []
    for _ in range(epochs):
        epoch = cpu_seconds()
        for batch in loader:
            ready = ready or cpu_seconds() - start
            sizes.append(variant.size(batch))
        seconds.append(cpu_seconds() - epoch)
    tokens, places = (total // epochs for total in map(sum, zip(*sizes, strict=True)))
    peak = status_mib("VmHWM")
    return {"ready": ready, "epochs": seconds, "tokens": tokens, "places": places, "mib": peak, "growth": peak - before}


def measure_later_run(variant: Variant, workers: int) -> dict[str, float]:
    """CPU seconds until the first batch is there once more, and seconds on the clock of an epoch with workers, their start counted."""
    start = cpu_seconds()
    next(iter(variant.loader(0)))
    later, loader = cpu_seconds() - start, variant.loader(workers)
    clock = time.perf_counter()
    for _ in loader:
        pass
    return {"later": later, "clock": time.perf_counter() - clock}


def count_and_write(variant: Variant, path: Path) -> dict[str, Any]:
    """How many images are opened, decoded and processed from nothing to the end of the first epoch, and the versions of what did so; first rows into `path`."""
    counts = Counter({"opened": 0, "decoded": 0, "processed": 0})

    def count(owner: Any, method: str, name: str, number: Callable[[Any], int]) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += number(args)
            return original(*args, **kwargs)

        setattr(owner, method, counted)

    count(PIL.Image, "open", "opened", lambda args: 1)
    count(PIL.ImageFile.ImageFile, "load", "decoded", lambda args: bool(args[0].tile))  # no tile is left once the pixels are there
    count(*variant.processing, "processed", lambda args: sum(len(item) if isinstance(item, list | tuple) else 1 for item in args[1]))
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    first = 0
    for batch in variant.loader(0):
        rows = list(variant.rows(batch, first))
        found |= {number: (ids, pixels.clone()) for number, ids, pixels in rows if number < COMPARED}
        first += len(rows)
    torch.save(found, path)
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"versions": versions, **counts}


def measure(kind: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of one variant in this process."""
    torch.set_num_threads(1)
    _, function, settings = VARIANTS[name]
    tools: dict[str, Callable[..., Variant]] = {tool.__name__: tool for tool in (interlace, trl, hugging_face, llama_factory, ms_swift)}
    variant = tools[function](options.data, **settings)
    match kind:
        case "count":
            return count_and_write(variant, options.output)
        case "first":
            return measure_first_run(variant, options.epochs)
    return measure_later_run(variant, options.workers)


# --- the run ---


def run(kind: str, name: str, python: str, options: argparse.Namespace, cache: Path, output: Path) -> dict[str, Any]:
    """One measurement in a process of its own, with one thread and its caches in `cache`."""
    places = {"INTERLACE_CACHE": "rows", "HF_HOME": "hf", "HF_DATASETS_CACHE": "hf/datasets", "MODELSCOPE_CACHE": "modelscope"}
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "USE_HF": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables = {**os.environ, **fixed, **{variable: str(cache / folder) for variable, folder in places.items()}}
    if python != sys.executable:
        variables.pop("PYTHONPATH", None)
    settings = {"--data": options.data, "--output": output, "--epochs": options.epochs, "--workers": options.workers}
    words = [str(word) for pair in settings.items() for word in pair]
    done = subprocess.run([python, __file__, "--measure", kind, name, *words], capture_output=True, text=True, env=variables)
    if done.returncode:
        raise SystemExit(f"{name}, {kind}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}, {kind}: {found}", file=sys.stderr, flush=True)
    return found


def compare(ours: Path, other: Path) -> tuple[bool, str]:
    """Whether two files of rows hold the same image tokens; how they, ids and pixels compare, as cells of a table."""
    left, right = torch.load(ours), torch.load(other)
    assert left.keys() == right.keys()
    if any(left[row][1].shape != right[row][1].shape or (left[row][0] == IMAGE).sum() != (right[row][0] == IMAGE).sum() for row in left):
        return False, "not the same: nothing is reported | | | "
    same = sum(torch.equal(left[row][0], right[row][0]) for row in left)
    differences = torch.cat([(left[row][1] - right[row][1]).abs().flatten() for row in left])
    return True, f"same | {same} of {len(left)} | {differences.max():.1g} | {differences.mean():.1g}"


def cells_of(figures: dict[str, Any]) -> list[str]:
    """A variant's figures as cells of the table of speeds: of the fastest epoch, of the median one in brackets."""
    images = sum(1 + number % 4 for number in range(ROWS))
    seconds, tokens = (min(figures["epochs"]), statistics.median(figures["epochs"])), figures["tokens"]
    return [
        "{:.1f} ({:.1f})".format(*(images / second for second in seconds)),
        "{:,.0f} ({:,.0f})".format(*(tokens / second for second in seconds)),
        f"{figures['ready']:.2f}",
        f"{figures['later']:.2f}",
        ", ".join(f"{figures[name] / images:.1f}" for name in ("opened", "decoded", "processed")),
        f"{1 - tokens / figures['places']:.0%}",
        f"{figures['mib']:.0f} ({figures['growth']:.0f})",
        f"{images / figures['clock']:.0f}",
    ]


def benchmark(options: argparse.Namespace) -> str:
    """The tables of equality and of speed."""
    pythons = {"": sys.executable, **dict(item.split("=", 1) for item in options.peer)}
    heads = ["images/s", "tokens/s", "CPU s to the first batch", "later run", "opened, decoded, processed", "padding", "peak MiB (growth)"]
    speed = [f"| variant | {' | '.join(heads)} | images/s by the clock, {options.workers} workers |", "|---" * (len(heads) + 2) + "|"]
    equality = ["| variant | image tokens | same ids | largest pixel difference | mean |", "|---|---|---|---|---|"]
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (peer, _, _)) in enumerate(VARIANTS.items()):
            if peer not in pythons:
                speed.append(f"| {name} | no interpreter given" + " |" * (len(heads) + 1))
                continue
            once = functools.partial(run, name=name, python=pythons[peer], options=options, output=Path(scratch) / f"{number}.pt")
            found = once("count", cache=Path(scratch) / f"{number} count")
            versions[peer or "Interlace, TRL, Hugging Face"] = found["versions"]
            same, cells = compare(Path(scratch) / "0.pt", Path(scratch) / f"{number}.pt")
            equality.append(f"| {name} | {cells} |")
            if same:
                found |= once("first", cache=Path(scratch) / str(number)) | once("later", cache=Path(scratch) / str(number))
                speed.append(f"| {name} | {' | '.join(cells_of(found))} |")
    used = [f"- {peer}: " + ", ".join(f"{package} {number}" for package, number in found.items()) for peer, found in versions.items()]
    return "\n".join([*speed, "", *equality, "", *used, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="torchvision, llamafactory or ms-swift, and its interpreter")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "interlace_input_side", help="made on first use")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("count|first|later", "VARIANT"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.measure:
        kind, name = options.measure
        print(json.dumps(measure(kind, name, options)))
        return
    if not (options.data / "dataset_info.json").is_file():  # written last
        make_data(options.data)
    title = f"# The input side alone: {ROWS} rows of 1 to 4 images, CPU seconds, 1 thread, {options.epochs} epochs; {platform.machine()}"
    path = Path(__file__).parent / "results" / f"input_side_cpu_{date.today()}.md"
    path.write_text(f"{title}\n\n{benchmark(options)}")
    print(f"{path.read_text()}\n{path}")


if __name__ == "__main__":
    main()
