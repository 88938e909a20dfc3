"""README.md of a trained model: what it comes from, on which rows and how it was trained, how well it did, how it is used, whose licence holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interlace.arguments import SCHEMA_PATH
from interlace.model.adapters import read_adapter_config
from interlace.model.families import family_of
from interlace.model.loading import ADAPTER_CONFIG, original_of
from interlace.model.processing import Processing
from interlace.model.saving import LICENCE_FILES

# Arguments that say where something lies or how it is shown: of no interest to those who use the model
_LOCAL = ("output_dir", "dataset", "model_name_or_path", "lora_path", "cache_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm")
_FIGURES = {
    "loss": "training loss, last",
    "token_accuracy": "training token accuracy, last",
    "eval_loss": "evaluation loss",
    "eval_token_accuracy": "evaluation token accuracy",
    "eval_score": "evaluation score of answers",
    "eval_rewards/accuracies": "evaluation reward accuracy",
    "eval_rewards/margins": "evaluation reward margin",
    "eval_rewards/margins_blank": "evaluation reward margin with blank images",
}
_CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: image-text-to-text
license: other
tags: [interlace, {kind}, multi-image]
---

# {name}

{what} `{base}`, trained with Interlace: several images, each at its place in the text.

## Data

{sources}

{rows:,} rows: {trained:,} trained as they are, {shortened:,} shortened, {skipped:,} skipped (`ledger.json`).

## Training

{steps:,} optimizer steps on {machine}; {versions}. Arguments that differ from the defaults:

| argument | value |
|---|---|
{arguments}

| figure | value |
|---|---|
{figures}

## Use

{needs}```python
{use}
```

The chat template in this folder is the one the model was trained with. It asks so, each image at its place in the text:

```
{prompt}
```

## Licence

This model is made from `{base}`: what its licence allows and forbids holds here, too{licences}.
"""


def write_model_card(output_dir: Path, log_history: Sequence[Mapping[str, float]], steps: int, processing: Processing, path: str) -> None:
    """Writes the card beside a finished model, from what the run has written there. Folders are named by their last part: a card is made to be shown.

    Args:
        log_history: up to the step whose weights are the model's. steps: made in all. path: of the base model.
    """
    records = (json.loads((output_dir / f"{name}.json").read_text(encoding="utf-8")) for name in ("arguments", "ledger", "environment"))
    arguments, ledger, environment = records
    is_adapter, base = (output_dir / ADAPTER_CONFIG).is_file(), _shown(arguments["model_name_or_path"])
    licences = sorted(file.name for pattern in LICENCE_FILES for file in output_dir.glob(pattern))
    last = {name: value for entry in log_history for name, value in entry.items()}
    text = _CARD.format(
        base=base,
        library="peft" if is_adapter else "transformers",
        kind="lora" if is_adapter else "full-fine-tuning",
        name=output_dir.resolve().name,
        what="A LoRA adapter on" if is_adapter else "A fine-tuned",
        sources="\n".join(f"- {_source(entry)}" for entry in arguments["dataset"]["train"]),
        **{name: ledger[name] for name in ("rows", "trained", "shortened", "skipped")},
        steps=steps,
        machine=", ".join(environment["machine"]["gpus"]) or "a CPU",
        versions=", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "transformers", "peft")),
        arguments="\n".join(f"| `{name}` | `{json.dumps(value)}` |" for name, value in _chosen(arguments).items()),
        figures="\n".join(f"| {label} | {last[name]:.4f} |" for name, label in _figures(last).items()),
        needs=_needs_of_adapter(output_dir, family_of(processing.config).vision_tower, environment["packages"]) if is_adapter else "",
        use="\n".join([*(_loads_adapter(base, original_of(path) is not None) if is_adapter else _LOADS), *_ASKS]),
        prompt=_asked(processing),
        licences=f" ({', '.join(licences)})" if licences else "; look it up there",
    )
    (output_dir / "README.md").write_text(text, encoding="utf-8")


_IMPORTS = ["from PIL import Image", "from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
_LOADS = [
    *_IMPORTS,
    'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto")  # torch_dtype before transformers 4.56',
    'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
]
_QUESTION: Any = [{"type": "image"}, {"type": "text", "text": "\nWhat is in the image?"}]
_ASKS = [
    "",
    f"content = {json.dumps(_QUESTION)}",
    'text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
    'inputs = processor(text=text, images=[Image.open("picture.png")], return_tensors="pt").to(model.dtype)',
    'answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]',
    "print(processor.tokenizer.decode(answer, skip_special_tokens=True))",
]


def _loads_adapter(base: str, is_original: bool) -> list[str]:
    if is_original:
        return [
            f"# {base} is in its authors' layout, which transformers does not read. Merged with Interlace, adapter and base are one model that it does read:",
            "#   python train/merge_adapter.py --adapter-path THIS_FOLDER --output-dir MERGED",
            *(line.replace("THIS_FOLDER", "MERGED") for line in _LOADS),
        ]
    return [
        "from peft import PeftModel",
        *_IMPORTS,
        f'model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")  # torch_dtype before transformers 4.56',
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")',
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
    ]


def _needs_of_adapter(folder: Path, vision_tower: str, packages: Mapping[str, str]) -> str:
    """Which versions find the layers that the adapter is for: LLaVA's were renamed in 4.52, vision towers in 5."""
    adapter: Any = read_adapter_config(str(folder))
    has_tower = vision_tower in (adapter.modules_to_save or ()) or vision_tower in str(adapter.target_modules)
    made = f"made with {packages['peft']} and {packages['transformers']}"
    return (
        f"The adapter needs PEFT and transformers {'5' if has_tower else '4.52'} or newer ({made}): in older versions the layers that it is for have other "
        "names. What `merge_adapter.py` makes of adapter and base needs no PEFT.\n\n"
    )


def _asked(processing: Processing) -> str:
    """The prompt of `_QUESTION`."""
    template = processing.template.jinja()
    text: Any = processing.tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return str(text).rstrip("\n")


def _figures(last: Mapping[str, float]) -> dict[str, str]:
    """Name in the log -> label, of what was measured."""
    scores = {name: f"evaluation score of answers, {name.removeprefix('eval_score/')}" for name in last if name.startswith("eval_score/")}
    return {name: label for name, label in (_FIGURES | scores).items() if name in last}


def _shown(place: str) -> str:
    """A hub id as it is, a folder by its last part."""
    return Path(place).name if Path(place).exists() or place.startswith((".", "/", "~")) else place


def _source(entry: Mapping[str, Any]) -> str:
    files = entry["data_files"] if isinstance(entry["data_files"], list) else [entry["data_files"]]
    more = [f"{name} {entry[name]}" for name in ("split", "sampling_strategy", "weight") if entry.get(name) not in (None, "all", 1, 1.0)]
    return ", ".join([*(f"`{_shown(file)}`" for file in files), *more])


def _chosen(arguments: Mapping[str, Any]) -> dict[str, Any]:
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"]
    return {name: value for name, value in arguments.items() if name in schema and name not in _LOCAL and value != schema[name].get("default")}
