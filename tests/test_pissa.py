"""PiSSA (arXiv 2404.02948): what an adapter begins with is PEFT's, and what is saved is a plain LoRA adapter on the untouched base."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from interlace.errors import InputError
from interlace.model import pissa
from interlace.model.loading import load_config, load_model, weights_fingerprint
from interlace.model.merging import merge
from interlace.model.tuning import Lora, TunedModel, tune
from interlace.ranks import Ranks
from interlace.training import run as running
from interlace.training.forecast import disk_of, sizes_of
from interlace.training.outline import empty_model
from interlace.training.supervised import finetune
from tests.conftest import NEEDS_COMPILER, ROOT
from tests.test_distributed import engine_arguments
from tests.test_training import losses, weights

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}
PISSA = {**LORA, "lora_init": "pissa"}
INITS = ["pissa", "pissa_niter_16"]
CPU = torch.device("cpu")
# In what an adapter may differ from the base that it was made on
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "magnitudes apart": {"use_dora": True},
    "with tower": {"tunable_parts": "vision_tower,projector,language_model"},
    "some layers": {"lora_target_modules": ["q_proj", "down_proj"], "freeze_include": ["*layers.0.*q_proj*"]},
}


def begun(folder: Path, init: str, lora: Lora, seed: int = 42) -> TunedModel:
    tuned = tune(load_model(str(folder), torch.float32), ["projector", "language_model"], lora, None)
    return pissa.begin(tuned, init, seed, Ranks(), CPU)


def adapted(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def effective(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> weight and adapter in one, for every adapted layer."""
    return {name: layer.get_base_layer().weight + layer.get_delta_weight("default") for name, layer in adapted(model).items()}


@pytest.fixture
def live_models(monkeypatch: pytest.MonkeyPatch) -> list[TunedModel]:
    """The models that runs train, as their trainers leave them."""
    seen, original = [], running.build_trainer

    def kept(make: Any, tuned: TunedModel, *others: Any) -> Any:
        seen.append(tuned)
        return original(make, tuned, *others)

    monkeypatch.setattr(running, "build_trainer", kept)
    return seen


# --- how it begins ---


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_begins_as_peft_s(tiny_dir: Path, use_rslora: bool) -> None:
    targets = ["q_proj", "down_proj"]
    ours = adapted(begun(tiny_dir, "pissa", Lora(4, 8, 0.0, targets, use_rslora=use_rslora)).base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)", use_rslora=use_rslora, init_lora_weights="pissa")
    theirs = adapted(get_peft_model(load_model(str(tiny_dir), torch.float32), config).base_model.model)
    assert set(ours) == set(theirs)
    for name, layer in ours.items():
        for part in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, part)["default"].weight, getattr(theirs[name], part)["default"].weight), name
        assert torch.equal(layer.get_base_layer().weight, theirs[name].get_base_layer().weight), name


@pytest.mark.parametrize("init", INITS)
def test_adapter_and_rest_are_the_weight_and_the_adapter_is_its_principal_part(tiny_dir: Path, init: str) -> None:
    """Against numpy's decomposition: no matrix of rank 4 is nearer to a weight than that of its four largest singular values (Eckart-Young)."""
    untouched, tuned = load_model(str(tiny_dir), torch.float32), begun(tiny_dir, init, Lora(4, 8, 0.0, None))
    for name, weight in effective(tuned.base).items():
        before = untouched.get_submodule(name).weight.detach()
        torch.testing.assert_close(weight, before, rtol=0, atol=1e-6)
        rest, values = adapted(tuned.base)[name].get_base_layer().weight.detach(), np.linalg.svd(before.numpy(), compute_uv=False)
        nearest = np.sqrt((values[4:].astype(float) ** 2).sum())
        assert float(torch.linalg.matrix_norm(rest)) == pytest.approx(nearest, rel=1e-5 if init == "pissa" else 0.02), name


def test_a_fast_decomposition_is_the_same_for_the_same_seed(tiny_dir: Path) -> None:
    one, two, other = (begun(tiny_dir, "pissa_niter_1", Lora(4, 8, 0.0, None), seed).first for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_first_loss_is_that_of_the_untouched_base(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    """A LoRA adapter that begins at zero is the base."""
    found = []
    for name, changes in {"lora": LORA, "pissa": PISSA, "fast": {**PISSA, "lora_init": "pissa_niter_4", "use_rslora": True, "use_dora": True}}.items():
        arguments = make_arguments(rows_file, **changes, output_dir=str(tmp_path / name))
        finetune(arguments)
        found.append(losses(arguments["output_dir"]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[2][0] == pytest.approx(found[0][0], rel=1e-5)
    assert abs(found[1][-1] - found[0][-1]) > 1e-3, "it learns on another path"
    assert found[1][-1] < found[1][0]


# --- what is saved ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_on_the_untouched_base_is_the_trained_model(
    make_arguments: Make, rows_file: Path, tiny_dir: Path, tmp_path: Path, live_models: list[TunedModel], kind: str
) -> None:
    arguments = make_arguments(rows_file, **{**PISSA, **KINDS[kind]})
    finetune(arguments)
    folder, (live,) = Path(arguments["output_dir"]), live_models
    settings = json.loads((folder / "adapter_config.json").read_text())
    expected = {"r": 8, "lora_alpha": pytest.approx(8 * 2**0.5) if kind == "rank-stabilised" else 16, "init_lora_weights": True}
    assert {name: settings[name] for name in expected} == expected
    assert json.loads((folder / "base_model.json").read_text())["weights_fingerprint"] == weights_fingerprint(str(tiny_dir))
    plain = PeftModel.from_pretrained(load_model(str(tiny_dir), torch.float32), folder)  # as anybody would load it
    if live.tower is not None:
        live.tower.attach_to(live.base)
    trained = live.peft.merge_and_unload().state_dict()  # type: ignore[union-attr, operator]
    found = plain.merge_and_unload().state_dict()  # type: ignore[operator]
    assert set(found) == set(trained)
    for name, weight in trained.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    untouched = load_model(str(tiny_dir), torch.float32).state_dict()
    moved = {name for name in trained if (trained[name] - untouched[name]).abs().max() > 1e-3}
    for part in ("q_proj", "multi_modal_projector", *(("vision_tower",) if kind == "with tower" else ())):
        assert any(part in name for name in moved), part
    assert ("model.language_model.layers.0.self_attn.q_proj.weight" in moved) == (kind != "some layers")
    merge(str(folder), tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), torch.float32).state_dict()
    assert all(torch.allclose(merged[name], trained[name], rtol=0, atol=1e-5) for name in trained)


def test_a_saved_adapter_is_continued_as_any_other(make_arguments: Make, rows_file: Path) -> None:
    first = make_arguments(rows_file, **PISSA)
    finetune(first)
    changes = {"lora": True, "lora_path": first["output_dir"], "output_dir": first["output_dir"] + "_more"}
    finetune(make_arguments(rows_file, **changes, learning_rate=0.0))
    before, after = weights(first["output_dir"]), weights(changes["output_dir"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(changes["output_dir"])[0] < losses(first["output_dir"])[0]
    finetune(make_arguments(rows_file, **changes, max_steps=20, overwrite_output_dir=True))
    assert losses(changes["output_dir"])[-1] < losses(changes["output_dir"])[0]


def test_the_best_checkpoint_is_the_result_with_what_it_began_with(make_arguments: Make, rows_file: Path) -> None:
    dataset = {"train": [{"data_files": str(rows_file)}], "eval": [{"data_files": str(rows_file)}]}
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    arguments = make_arguments(rows_file, dataset=dataset, greater_is_better=True, metric_for_best_model="eval_loss", **changes, **PISSA)
    finetune(arguments)  # the worst loss is the first
    first, final = weights(Path(arguments["output_dir"]) / "checkpoint-2"), weights(arguments["output_dir"])
    assert all(torch.equal(first[name], final[name]) for name in final)
    assert {tensor.shape[0] for name, tensor in final.items() if "lora_A" in name} == {8}


def test_in_bfloat16_only_the_rounding_of_the_rest_is_lost(make_arguments: Make, rows_file: Path, tiny_dir: Path, live_models: list[TunedModel]) -> None:
    """A rest that is kept in 16 bits is rounded once, by at most one part in 2**8; what is saved speaks of the whole one."""
    arguments = make_arguments(rows_file, **PISSA, bf16=True)
    finetune(arguments)
    stored = load_model(str(tiny_dir), torch.bfloat16).float()
    found = effective(PeftModel.from_pretrained(stored, arguments["output_dir"]).base_model.model)
    trained, layers = {}, adapted(live_models[0].base)
    for name, layer in layers.items():
        trained[name] = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
        most = layer.get_base_layer().weight.float().abs() * 2**-8 + 1e-5
        assert ((found[name] - trained[name]).abs() <= most).all(), name
    assert {tensor.dtype for tensor in weights(arguments["output_dir"]).values()} == {torch.float32}


# --- going on ---


@pytest.mark.parametrize(
    "changes", [{}, {"lora_init": "pissa_niter_1", "use_rslora": True, "use_dora": True}, {"bf16": True}], ids=["exact", "fast", "bfloat16"]
)
def test_resumed_equals_uninterrupted_bitwise_and_nothing_is_decomposed_again(
    make_arguments: Make, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    common = {**PISSA, **changes, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = make_arguments(rows_file, **common, output_dir=str(tmp_path / "whole"))
    finetune(whole)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    monkeypatch.setattr(LoraLayer, "pissa_init", None)  # another machine's would round otherwise
    finetune(make_arguments(rows_file, **common, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=True))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_adapter_is_refused(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    common = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": True}
    finetune(make_arguments(rows_file, **common, **LORA))
    longer = make_arguments(rows_file, **common, **PISSA, max_steps=6)
    with pytest.raises(InputError, match="lora_init: was None, is 'pissa'"):
        finetune(longer)
    for folder in (tmp_path / "run").glob("checkpoint-?"):  # as a version has left it that did not know the key
        settings = json.loads((folder / "arguments.json").read_text())
        del settings["lora_init"]
        (folder / "arguments.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="its adapter did not begin as lora_init says at lora_rank 4"):
        finetune(longer | {"trust_checkpoint": True})


def test_a_rank_above_that_of_a_weight_is_refused(make_arguments: Make, rows_file: Path, tmp_path: Path) -> None:
    arguments = make_arguments(rows_file, **{**PISSA, "lora_rank": 500})
    with pytest.raises(InputError, match=r"lora_rank: 500 with lora_init: .* has no more than"):
        finetune(arguments)
    assert not Path(arguments["output_dir"]).exists()


# --- the rest of the package ---


def test_a_model_without_weights_is_planned_without_a_decomposition(make_arguments: Make, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraLayer, "pissa_init", None)
    config = load_config(make_arguments(rows_file)["model_name_or_path"])
    sizes, disks = [], []
    for changes in (LORA, PISSA):
        arguments = make_arguments(rows_file, **changes, save_strategy="steps", save_steps=2)
        tuned = empty_model(config, arguments)
        sizes.append([sizes_of(tuned, arguments, kind) for kind in ("supervised", "preference")])
        disks.append(disk_of(tuned, sizes[-1][0], arguments, 4, 1).model)
    assert sizes[0][0] == sizes[1][0]
    assert (sizes[0][1].reference, sizes[1][1].reference) == (0, sizes[1][0].trainable)  # what learns, as it began
    adapter = sum(parameter.nbytes for name, parameter in tuned.packed.named_parameters() if "lora_" in name)
    assert disks[1] - disks[0] == adapter


def run_on_two(config: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += ["train/supervised_finetune.py", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=NEEDS_COMPILER), pytest.param("zero3", marks=NEEDS_COMPILER), "fsdp2"])
def test_two_processes_equal_one(make_arguments: Make, rows_file: Path, tmp_path: Path, engine: str) -> None:
    """They share the decomposition, and go on from their checkpoint as one would. Plain gradient descent: Adam would blow up rounding."""
    changes = {**PISSA, "lora_init": "pissa_niter_2", "max_steps": 4, "learning_rate": 0.05, "optim": "sgd", "save_strategy": "steps", "save_steps": 2}
    one = make_arguments(rows_file, **changes, gradient_accumulation_steps=4, output_dir=str(tmp_path / "one"))
    finetune(one)
    names = ("model_name_or_path", "per_device_train_batch_size", "dataset", "logging_steps", "gradient_checkpointing", "dataloader_num_workers", "use_cpu")
    config = {**{name: one[name] for name in names}, **changes, **engine_arguments(engine, tmp_path), "lora_dropout": 0.0, "ddp_timeout": 120}
    config |= {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 2}
    run_on_two(config, tmp_path / "config.json")
    again = [] if engine == "ddp" else ["again"]  # ddp goes on as one process does
    for name in again:
        shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / name / "checkpoint-2")
        run_on_two({**config, "output_dir": str(tmp_path / name), "resume_from_checkpoint": True}, tmp_path / "config.json")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    first, *others = (weights(tmp_path / name) for name in ("one", "two", *again))
    for other in others:
        for name in first:
            torch.testing.assert_close(other[name], first[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
