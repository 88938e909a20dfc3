"""README.md of a trained model: what it comes from, on which rows and how it was trained, how well it did, how it is used, whose licence holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interlace.arguments import SCHEMA_PATH
from interlace.model.loading import ADAPTER_CONFIG
from interlace.model.saving import LICENCE_FILES

# Arguments that say where something lies or how it is shown: of no interest to those who use the model
_LOCAL = ("output_dir", "dataset", "model_name_or_path", "lora_path", "cache_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm")
_FIGURES = {
    "loss": "training loss, last",
    "token_accuracy": "training token accuracy, last",
    "eval_loss": "evaluation loss",
    "eval_token_accuracy": "evaluation token accuracy",
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

```
{use}
```

The chat template in this folder is the one the model was trained with.

## Licence

This model is made from `{base}`: what its licence allows and forbids holds here, too{licences}.
"""


def write_model_card(output_dir: Path, log_history: Sequence[Mapping[str, float]], steps: int) -> None:
    """Writes the card beside a finished model, from what the run has written there. Folders are named by their last part: a card is made to be shown."""
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
        figures="\n".join(f"| {label} | {last[name]:.4f} |" for name, label in _FIGURES.items() if name in last),
        use="\n".join(_use_of_adapter(base) if is_adapter else _USE),
        licences=f" ({', '.join(licences)})" if licences else "; look it up there",
    )
    (output_dir / "README.md").write_text(text, encoding="utf-8")


_USE = [
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "",
    'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto")',
    'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
]


def _use_of_adapter(base: str) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto"), "THIS_FOLDER")',
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER")',
    ]


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
