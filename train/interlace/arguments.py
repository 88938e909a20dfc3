"""Strict arguments: one flat JSON file plus `--key value` overrides, checked against `argument_schema.json` before any heavy import."""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from interlace.argument_help import REFUSED
from interlace.errors import InputError
from interlace.foreign_arguments import INSTEAD, RENAMED, WITHOUT_EFFECT, translate
from interlace.preference_arguments import BEST_METRICS, DEFAULTS, preference_problems
from interlace.redaction import SECRET_NAME
from interlace.sharding_arguments import sharding_problems

SCHEMA_PATH = Path(__file__).with_name("argument_schema.json")
Arguments = dict[str, Any]
Kind = Literal["supervised", "preference", None]


def read_command_line(description: str, options: Mapping[str, str] | None = None, kind: Kind = None) -> tuple[Arguments, dict[str, str | None]]:
    """Reads `CONFIG.json [--key value | --key=value ...]` from the command line; answers `--help` and exits.

    Args:
        description: the script's docstring, for `--help`.
        options: the script's own `--name VALUE` options and their help; they are no argument keys.
        kind: what the script tunes by; None if it takes the arguments of both.

    Returns:
        Every argument key with its resolved value, and the script's own options (None where absent).

    Raises:
        InputError: with all problems at once.
    """
    schema, options = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))["properties"], dict(options or {})
    words = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    if "--help" in words or "-h" in words:
        print(help_text(description, schema, options, kind))
        sys.exit(0)
    paths, overrides, problems = split_words(words)
    if len(paths) != 1:
        raise InputError(f"expected one CONFIG.json, got {len(paths)}: {paths}; see --help")
    chosen: dict[str, str | None] = {name: overrides.pop(f"--{name}", None) for name in options}
    config = read_json(Path(paths[0]), problems)
    if not isinstance(config, dict):
        raise InputError(f"{paths[0]}: expected an object of keys and values, got {json_type(config)}")
    where = dict.fromkeys(config, paths[0])
    for word, text in overrides.items():
        name = RENAMED.get(word.removeprefix("--"), word.removeprefix("--"))
        config = {other: value for other, value in config.items() if RENAMED.get(other) != name}
        config[name] = override_value(schema.get(name, {}), text)
        where[name] = "command line"
    arguments, found = resolve(config, schema, where, kind)
    problems += found
    if problems:
        raise InputError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} with the arguments\n  " + "\n  ".join(problems))
    return arguments, chosen


def split_words(words: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Command line words -> (paths, {"--key": value text}, problems)."""
    paths: list[str] = []
    overrides: dict[str, str] = {}
    problems: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            paths.append(word)
            continue
        name, equals, text = word.partition("=")
        value = text if equals else next(rest, None)
        if value is None:
            problems.append(f"command line: {name} has no value; write `{name} VALUE` or `{name}=VALUE`")
        elif name in overrides:
            problems.append(f"command line: {name} is given twice")
        else:
            overrides[name] = value
    return paths, overrides, problems


def override_value(spec: Mapping[str, Any], text: str) -> Any:
    """A command line value: as it stands for a string key, else read as JSON, else (where a string is allowed too) as it stands."""
    types = spec.get("type", [])
    if types == "string":
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if "string" in types and json_type(value) not in types else value


def read_json(path: Path, problems: list[str]) -> Any:
    """Parses a JSON file strictly; duplicate keys and NaN or Infinity are added to `problems`.

    Raises:
        InputError: names the file, and the line where the JSON ends or breaks.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [name for name, _ in pairs]
        twice = sorted({name for name in keys if keys.count(name) > 1})
        if twice:
            problems.append(f"{path}: duplicate key{'s' if len(twice) > 1 else ''} {', '.join(map(repr, twice))}; keep one of each")
        return dict(pairs)

    def refuse(constant: str) -> None:
        problems.append(f"{path}: {constant} is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; the file is no complete JSON") from None


def resolve(config: Mapping[str, Any], schema: Mapping[str, Any], where: Mapping[str, str], kind: Kind = None) -> tuple[Arguments, list[str]]:
    """Checks keys, types, ranges and contradictions; fills in the defaults, of `kind` where it has its own. Returns the arguments and all problems."""
    given: dict[str, Any] = {}
    config, lines, problems = translate(config, where, schema)
    if is_main_process():
        print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr)
    for name, value in config.items():
        place, known = where.get(name, "dpo_alpha, gamma"), RENAMED.get(name, name)
        if known != name and is_main_process():
            print(f"{place}: {name} is read as {known}", file=sys.stderr)
        if known in given:
            problems.append(f"{place}: {name} and {known} are the same key; keep one")
        elif known not in schema:
            problems.append(f"{place}: {name}: unknown key{did_you_mean(name, [*schema, *RENAMED, *WITHOUT_EFFECT, *INSTEAD])}")
        else:
            problems += [f"{place}: {problem}" for problem in check_value(known, value, schema[known])]
            given[known] = value
            if kind == "supervised" and schema[known].get("group") == "Preference tuning" and value != schema[known]["default"]:
                problems.append(f"{place}: {known}: of preference tuning: train with preference_finetune.py, or remove the key")
    for name in ("model_name_or_path", "output_dir", "dataset"):
        if given.get(name) in (None, "", {}):
            problems.append(f"{name}: missing; it is required")
    arguments = {name: given.get(name, spec.get("default")) for name, spec in schema.items() if name != "$schema"}
    if kind == "preference":
        arguments |= {name: value for name, value in DEFAULTS.items() if name not in given}
    if not problems:
        problems += contradictions(arguments, given, kind)
        problems += preference_problems(arguments, did_you_mean) if kind == "preference" else []
    return arguments, problems


def check_value(name: str, value: Any, spec: Mapping[str, Any]) -> list[str]:
    """All problems of one value with its JSON Schema (the subset that `argument_schema.py` writes)."""
    types = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    actual = json_type(value)
    if actual not in types and not (actual == "integer" and "number" in types):
        hint = f"; write {value} without quotes" if actual == "string" and _reads_as(value, types) else ""
        shown = "" if SECRET_NAME.search(name) else f" {json.dumps(value, ensure_ascii=False)}{hint}"
        return [f"{name}: expected {' or '.join(types)}, got {actual}{shown}"]
    if "enum" in spec and value not in spec["enum"] and not (actual == "string" and "string" not in types):
        choices = [choice for choice in spec["enum"] if choice is not None]
        return [f"{name}: expected one of {', '.join(map(str, choices))}; got {value!r}{did_you_mean(str(value), map(str, choices))}"]
    if actual in ("integer", "number"):
        return _check_range(name, value, spec)
    if actual == "array":
        problems = [f"{name}: expected at least {spec['minItems']} entry, got none"] if len(value) < spec.get("minItems", 0) else []
        return problems + [
            problem for i, item in enumerate(value) for problem in check_value(f"{name}[{i}]", item, spec.get("items", {"type": [json_type(item)]}))
        ]
    if actual == "object" and "properties" in spec:
        problems = [f"{name}.{missing}: missing; it is required" for missing in spec.get("required", []) if missing not in value]
        for inner, item in value.items():
            if inner in spec["properties"]:
                problems += check_value(f"{name}.{inner}", item, spec["properties"][inner])
            else:
                problems.append(f"{name}.{inner}: unknown key{did_you_mean(inner, spec['properties'])}")
        return problems
    return []


def _check_range(name: str, value: float, spec: Mapping[str, Any]) -> list[str]:
    if not math.isfinite(value):
        return [f"{name}: expected a finite number, got {value}"]
    for limit, holds, words in (
        ("minimum", lambda bound: value >= bound, "at least"),
        ("exclusiveMinimum", lambda bound: value > bound, "more than"),
        ("maximum", lambda bound: value <= bound, "at most"),
        ("exclusiveMaximum", lambda bound: value < bound, "less than"),
    ):
        if limit in spec and not holds(spec[limit]):
            return [f"{name}: expected {words} {spec[limit]}, got {value}"]
    return []


def _reads_as(text: str, types: Iterable[str]) -> bool:
    try:
        actual = json_type(json.loads(text))
    except json.JSONDecodeError:
        return False
    return actual in types or (actual == "integer" and "number" in types)


def json_type(value: Any) -> str:
    """The JSON name of a Python value's type."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array", type(None): "null"}
    return names[type(value)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def contradictions(arguments: Arguments, given: Mapping[str, Any], kind: Kind = None) -> list[str]:
    """Combinations that cannot be meant, and values that cannot be honoured."""
    a, evaluates = arguments, bool(arguments["dataset"].get("eval"))
    metrics = ("loss", "token_accuracy", *(("score",) if a["eval_generate"] else ()), *(() if kind == "supervised" else BEST_METRICS))
    best = (a["metric_for_best_model"] or "loss").removeprefix("eval_")
    pairs = [
        (a["bf16"] and a["fp16"], "bf16 and fp16: choose one"),
        (a["load_in_4bit"] and a["load_in_8bit"], "load_in_4bit and load_in_8bit: choose one"),
        ((a["load_in_4bit"] or a["load_in_8bit"]) and not a["lora"], "load_in_4bit and load_in_8bit need lora: quantised weights do not train"),
        (not a["lora"] and a["lora_path"], "lora_path needs lora: true"),
        (not a["lora"] and a["lora_dtype"] != "float32", "lora_dtype needs lora: true"),
        (a["lora_dtype"] != "float32" and (a["deepspeed"] or a["fsdp"]), "lora_dtype: DeepSpeed and FSDP2 keep what learns in float32; leave it out"),
        (not a["lora"] and (a["use_dora"] or a["use_rslora"]), "use_dora and use_rslora need lora: true"),
        (not a["lora"] and a["loraplus_lr_ratio"] is not None, "loraplus_lr_ratio needs lora: true"),
        (a["eval_strategy"] != "no" and not evaluates, "eval_strategy needs dataset.eval"),
        (a["eval_on_start"] and not evaluates, "eval_on_start needs dataset.eval"),
        (a["eval_generate"] and a["eval_strategy"] == "no" and not a["eval_on_start"], "eval_generate needs eval_strategy"),
        (
            a["eval_generate"] and kind == "preference",
            "eval_generate scores answers against references, which pairs do not have; give evaluate_model.py the model and data with references",
        ),
        (a["load_best_model_at_end"] and a["eval_strategy"] == "no", "load_best_model_at_end needs eval_strategy"),
        (a["save_strategy"] == "best" and a["eval_strategy"] == "no", "save_strategy best needs eval_strategy"),
        (
            best not in metrics and not (a["eval_generate"] and best.startswith("score/")),
            f"metric_for_best_model: expected eval_{' or eval_'.join(metrics)}; got {a['metric_for_best_model']!r}",
        ),
        (a["max_bad_rows"] is not None and a["bad_rows"] != "skip", "max_bad_rows needs bad_rows: skip"),
        (bool(a["resume_from_checkpoint"]) and a["overwrite_output_dir"], "resume_from_checkpoint and overwrite_output_dir: choose one"),
        (a["max_tokens_per_batch"] is not None and not a["packing"], "max_tokens_per_batch needs packing"),
        (a["allowed_url_hosts"] and not a["allow_urls"], "allowed_url_hosts needs allow_urls: true"),
        (
            a["feature_cache"] in ("memory", "disk") and "vision_tower" in list_value(a["tunable_parts"]),
            "feature_cache: features change with every step while the vision tower learns; take vision_tower out of tunable_parts, or leave the cache off",
        ),
        (a["dataloader_num_workers"] == 0 and a["dataloader_prefetch_factor"] is not None, "dataloader_prefetch_factor needs dataloader_num_workers"),
    ]
    problems = [message for holds, message in pairs if holds]
    if a["lora_path"]:
        fixed = [name for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora", "lora_init") if name in given]
        problems += [f"{name}: the adapter in lora_path already decides it; remove the key" for name in fixed]
    for name, (accepted, reason) in REFUSED.items():
        if a[name] not in accepted:
            problems.append(f"{name}: {a[name]!r} cannot be honoured: {reason}")
    return problems + _lora_init_problems(a) + sharding_problems(a, lambda path: read_json(path, problems))


def _lora_init_problems(a: Arguments) -> list[str]:
    if a["lora_init"] is None:
        return []
    if not re.fullmatch(r"pissa(_niter_[1-9]\d*)?", a["lora_init"]):
        return [f"lora_init: expected pissa, or pissa_niter_N with a number of iterations (pissa_niter_16); got {a['lora_init']!r}"]
    pairs = [
        (not a["lora"], "lora_init needs lora: true"),
        (
            a["load_in_4bit"] or a["load_in_8bit"],
            "lora_init: what the adapter takes over is taken out of the weights, and quantised ones do not change; leave out lora_init, or the quantisation",
        ),
        (a["lora_dropout"] > 0, "lora_init: dropout would leave out the principal part of the weights, which the adapter holds; set lora_dropout: 0"),
        (
            a["lora_dtype"] != "float32",
            f"lora_dtype: an adapter that begins with lora_init is large from the start, and {a['lora_dtype']} would round its steps away; leave it out",
        ),
    ]
    return [message for holds, message in pairs if holds]


def list_value(value: str | list[str]) -> list[str]:
    """A list, or a comma-separated string, as a list."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else list(value)


def is_main_process() -> bool:
    """Whether this process speaks for all: global rank 0, or no launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def help_text(description: str, schema: Mapping[str, Any], options: Mapping[str, str], kind: Kind = None) -> str:
    """The text of `--help`: usage, the script's options, every key with type, default and help."""
    defaults = DEFAULTS if kind == "preference" else {}
    lines = [description.strip(), "", "usage: CONFIG.json [--key value | --key=value ...]", ""]
    lines += [f"  --{name} VALUE: {text}" for name, text in options.items()] + ([""] if options else [])
    for group in ("Interlace", *(() if kind == "supervised" else ("Preference tuning",)), "Hugging Face"):
        lines.append(f"{group} keys")
        for name, spec in schema.items():
            if spec.get("group") == group:
                types = "|".join(spec["type"]) if isinstance(spec["type"], list) else spec["type"]
                choices = f" {{{', '.join(str(choice) for choice in spec['enum'] if choice is not None)}}}" if len(spec.get("enum", [])) in range(1, 9) else ""
                default = (
                    "required" if name in ("model_name_or_path", "output_dir", "dataset") else f"default {json.dumps(defaults.get(name, spec['default']))}"
                )
                lines.append(f"  --{name} ({types}{choices}; {default})\n      {spec['description']}")
        lines.append("")
    entry = schema["dataset"]["properties"]["train"]["items"]["properties"]
    lines.append("keys of a dataset entry")
    lines += [f"  {name} (default {json.dumps(spec['default'])})\n      {spec['description']}" for name, spec in entry.items()]
    return "\n".join(lines)
