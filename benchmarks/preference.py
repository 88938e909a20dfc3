"""Preference tuning against TRL: `python benchmarks/preference.py` with `train/` on PYTHONPATH; `make bench` runs it too.

LoRA-DPO on one thread, each variant in a process of its own, through its own trainer, from the same awake adapter (so that the loss is not log 2) against
the model without it, on the same pairs in the same order. Parity comes first, as in `training.py`, whose model, images and meter these are.
"""

import functools
import json
import platform
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from training import LEARNING_RATE, TARGETS, Case, Meter, images_of, load_processor, make_folder, rows_of, settings
from transformers import AutoModelForImageTextToText

from interlace.arguments import SCHEMA_PATH, resolve
from interlace.model.forward import FrozenTower

CASES = {"dpo_1_2": Case((1, 2), True, 4), "dpo_4": Case((4,), True, 4)}
VARIANTS = ("trl_default", "trl_tuned", "interlace", "interlace_stored")
NAMES = {
    "trl_default": "TRL, default",
    "trl_tuned": "TRL, tuned",
    "interlace": "Interlace, first epoch",
    "interlace_cached": "Interlace, cached features",
    "interlace_stored": "Interlace, cached features, precomputed reference",
}


def pairs_of(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Prompt, two answers of as many tokens, images."""
    randomness, pairs = random.Random(1), []
    for row in rows_of(case, folder):
        question, answer = (turn["value"] for turn in row["conversations"])
        words = answer.split(" ")
        rejected = randomness.sample(words, len(words))
        pairs.append({"prompt": question, "chosen": answer, "rejected": " ".join(rejected), "images": images_of(row, folder)})
    return pairs


def interlace(case: Case, folder: Path, stores: bool) -> dict[str, Any]:
    """Two epochs through `finetune`: the first fills the cache of features, unless computing the reference has done so before."""
    from interlace.data.packing import Plan
    from interlace.training import planning, preference, run

    meter, pairs = Meter(case), pairs_of(case, folder)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    planning.Plan = functools.partial(Plan, shuffle=False)  # type: ignore[misc, assignment]
    config = settings(case, folder / "interlace") | {
        "model_name_or_path": str(folder / "model"),
        "dataset": {"train": [{"data_files": str(folder / "pairs.json"), "image_folder": str(folder)}]},
        **{"lora": True, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "tunable_parts": "language_model"},
        **{"packing": False, "gradient_checkpointing": False, "feature_cache": "memory", "num_train_epochs": 2, "max_length": 100_000},
        **{"cache_dir": str(folder / "cache"), "preprocessing_num_workers": 0, "overwrite_output_dir": True, "precompute_ref_log_probs": stores},
    }
    arguments, problems = resolve(config, json.loads(SCHEMA_PATH.read_text())["properties"], dict.fromkeys(config, "benchmark"), "preference")
    assert not problems, problems
    trackers, features, prepare = run.guarded_trackers, FrozenTower.features, preference._prepare

    def awake(tuned: Any, *values: Any) -> Any:
        made = prepare(tuned, *values)  # the reference is the model without the adapter
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(tuned.peft, stored)
        return made

    def counted(tower: FrozenTower, pixel_values: torch.Tensor, *more: Any) -> torch.Tensor:
        meter.images += len(pixel_values)
        return features(tower, pixel_values, *more)

    run.guarded_trackers = lambda *values: [*trackers(*values), meter]  # type: ignore[assignment]
    preference._prepare, FrozenTower.features = awake, counted  # type: ignore[assignment, method-assign]
    preference.finetune(arguments)
    steps = len(meter.seconds) // 2
    meter.per_step[0] = (min(meter.per_step[0][0], sum(case.images or ())), meter.per_step[0][1])  # without those of computing the reference
    first, second = (meter.result(slice(epoch * steps, (epoch + 1) * steps), len(pairs)) for epoch in (0, 1))
    return {"interlace_stored": second | {"first": first}} if stores else {"interlace": first, "interlace_cached": second}


def trl(case: Case, folder: Path, is_default: bool) -> dict[str, Any]:
    """`DPOTrainer`; by default it recomputes activations. Its fused head is told that it may leave rows out on CPUs, too."""
    import datasets
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[attr-defined]
    data = []
    for pair in pairs_of(case, folder):
        parts = [*({"type": "image"} for _ in pair["images"]), {"type": "text", "text": pair["prompt"].replace("<image>", "")}]
        sides = {side: [{"role": "assistant", "content": [{"type": "text", "text": pair[side]}]}] for side in ("chosen", "rejected")}
        data.append({"prompt": [{"role": "user", "content": parts}], **sides, "images": pair["images"]})
    dataset = datasets.Dataset.from_list(data).cast_column("images", datasets.List(datasets.Image()))
    meter = Meter(case)
    config = DPOConfig(
        **settings(case, folder / "trl"), gradient_checkpointing=is_default, max_length=None, num_train_epochs=1, train_sampling_strategy="sequential"
    )
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=dataset,
        processing_class=load_processor(folder),
        callbacks=[meter],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    peft.set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    trainer.train()
    return {"trl_default" if is_default else "trl_tuned": meter.result(slice(0, None), len(data))}


def measure(variant: str, case: Case, folder: Path) -> dict[str, Any]:
    return trl(case, folder, variant == "trl_default") if variant.startswith("trl") else interlace(case, folder, variant == "interlace_stored")


def lines_of(case: Case, results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of the table; a variant with another loss or gradient is not reported."""
    ours, lines = results["interlace"], []
    for variant, r in results.items():
        start = r.get("first", r) if variant != "interlace_cached" else ours
        loss, gradient = start["losses"][0], start["grad_norm"]
        if abs(loss - ours["losses"][0]) > 1e-5 or abs(gradient / ours["grad_norm"] - 1) > 1e-4:
            print(f"{variant}: loss {loss:.6f}, gradient {gradient:.6f}; ours {ours['losses'][0]:.6f}, {ours['grad_norm']:.6f}: not reported")
            continue
        best, median = min(r["seconds"]), sorted(r["seconds"])[len(r["seconds"]) // 2]
        ratios = [f"{min(results[peer]['seconds']) / best:.2f}x" for peer in ("trl_default", "trl_tuned")]
        counts = f"{r['images'] / len(r['seconds']):.0f} | {r['tokens'] / len(r['seconds']):,.0f}"
        figures = f"{best:.2f} | {median:.2f} | {r['mib']:.0f} | {counts} | {loss:.6f}"
        lines.append(f"| {list(case.images or ())} | {NAMES[variant]} | {figures} | {' | '.join(ratios)} |")
    return lines


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--measure":
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        print(json.dumps(measure(sys.argv[2], CASES[sys.argv[3]], Path(sys.argv[4]))))
        return
    import trl as trl_package

    head = [
        "model, images of the pairs of a step",
        "tool",
        "CPU-s per step, best",
        "median",
        "peak MiB",
        "images encoded per step",
        "tokens through the LM per step",
    ]
    head += ["first loss", "faster than TRL, default", "than TRL, tuned"]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl_package.__version__}, {platform.machine()}"
    lines = [
        f"# Preference tuning on one CPU thread, float32; {versions}",
        "",
        f"LoRA of rank 8, learning rate {LEARNING_RATE}; the model of `training.py`.",
        "",
    ]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    path = Path(__file__).parent / "results" / f"preference_cpu_{date.today()}.md"
    log = path.with_suffix(".log")
    log.write_text("")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_folder(case, Path(folder))
            results: dict[str, dict[str, Any]] = {}
            for variant in VARIANTS:
                done = subprocess.run([sys.executable, __file__, "--measure", variant, name, folder], capture_output=True, text=True, check=False)
                with log.open("a") as file:
                    file.write(f"### {name} {variant}\n{done.stdout}\n{done.stderr if done.returncode else ''}\n".replace(folder, "FOLDER"))
                if done.returncode:
                    raise SystemExit(f"{name}: {variant} failed, see {log}: {done.stderr.strip().splitlines()[-1]}")
                results |= json.loads(done.stdout.splitlines()[-1])
            lines += lines_of(case, results)
    path.write_text("\n".join([*lines, ""]))
    print("\n".join(lines), path, sep="\n")


if __name__ == "__main__":
    main()
