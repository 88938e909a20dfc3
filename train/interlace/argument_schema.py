"""Generates `argument_schema.json` from the dataclasses: `python -m interlace.argument_schema` (from `train/`), or `make schema`.

Imports transformers, which takes seconds; readers of arguments use the file instead.
"""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from interlace.argument_fields import FIELD_GROUPS, DatasetEntry
from interlace.argument_help import HUGGING_FACE_KEYS, SCHEDULES

SCHEMA_PATH = Path(__file__).with_name("argument_schema.json")
REQUIRED = ["model_name_or_path", "output_dir", "dataset"]
# Where Interlace's default differs from Hugging Face's; the README explains each.
DEFAULTS: dict[str, Any] = {
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "remove_unused_columns": False,
    "project": "interlace",
    "ddp_find_unused_parameters": False,
}
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array", type(None): "null"}


def type_schema(hint: Any) -> dict[str, Any]:
    """JSON Schema of a type annotation; an enumeration beside `str` lists its values."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [type_schema(part) for part in inner if not (part is str and any(_is_enum(other) for other in inner))]
        merged: dict[str, Any] = {"type": sorted({name for part in parts for name in _names(part)})}
        for part in parts:
            merged.update({name: value for name, value in part.items() if name != "type"})
        if "enum" in merged and "null" in merged["type"]:
            merged["enum"] = [*merged["enum"], None]
        return merged if len(merged["type"]) > 1 else {**merged, "type": merged["type"][0]}
    if origin is typing.Literal:
        return {"type": JSON_TYPES[type(inner[0])], "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": type_schema(inner[0])}
    if origin is dict:
        return {"type": "object"}
    if _is_enum(hint):
        return {"type": "string", "enum": [member.value for member in hint]}
    return {"type": JSON_TYPES.get(hint, "object")}


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _names(schema: dict[str, Any]) -> list[str]:
    return schema["type"] if isinstance(schema["type"], list) else [schema["type"]]


def dataclass_properties(owner: type) -> dict[str, Any]:
    """JSON Schema properties of our own dataclass, with default, help and limits from its metadata."""
    hints, properties = typing.get_type_hints(owner), {}
    for item in dataclasses.fields(owner):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc, operator]
        limits = {name: value for name, value in item.metadata.items() if name != "help"}
        properties[item.name] = {**type_schema(hints[item.name]), "default": default, "description": item.metadata["help"], **limits}
    return properties


def training_properties() -> dict[str, Any]:
    """JSON Schema properties of every `transformers.TrainingArguments` key, with our help, limits and defaults."""
    from transformers import TrainingArguments

    hints, properties = typing.get_type_hints(TrainingArguments), {}
    for item in dataclasses.fields(TrainingArguments):
        if not item.init:
            continue
        help_text, limits = HUGGING_FACE_KEYS[item.name]
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc, operator]
        default = DEFAULTS.get(item.name, default.value if isinstance(default, enum.Enum) else default)
        choices = item.metadata.get("choices")
        schema = type_schema(hints[item.name])
        if choices:
            schema["enum"] = [*choices, *([None] if "null" in _names(schema) else [])]
        properties[item.name] = {**schema, "default": default, "description": help_text, **limits}
    for name in ("eval_strategy", "logging_strategy"):
        properties[name]["enum"] = list(SCHEDULES)
    properties["resume_from_checkpoint"]["type"] = ["boolean", "null", "string"]
    properties["output_dir"]["type"] = "string"
    properties["deepspeed"]["type"] = ["null", "string"]
    properties["fsdp"]["type"] = ["boolean", "null", "string"]
    return properties


def build_schema() -> dict[str, Any]:
    """The whole schema: our keys first, then Hugging Face's."""
    entry = {"type": "object", "additionalProperties": False, "required": ["data_files"], "properties": dataclass_properties(DatasetEntry)}
    entries = {"type": "array", "items": entry}
    properties: dict[str, Any] = {"$schema": {"type": "string", "description": "Lets an editor check this file."}}
    for name, groups in FIELD_GROUPS.items():
        for group in groups:
            properties.update({key: {**schema, "group": name} for key, schema in dataclass_properties(group).items()})
    dataset = properties["dataset"]
    dataset.update(additionalProperties=False, required=["train"], properties={"train": {**entries, "minItems": 1}, "eval": entries})
    properties.update({name: {**schema, "group": "Hugging Face"} for name, schema in training_properties().items()})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Arguments of Interlace's training scripts",
        "type": "object",
        "additionalProperties": False,
        "required": REQUIRED,
        "properties": properties,
    }


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
