"""Preference tuning: pairs as a trunk with two leaves, TRL's losses on them, and the references, against separate sequences and TRL's own trainer."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer

from interlace.data.batch import Collator, NumberedRows, PackedBatch
from interlace.data.dataset import Rows, load_rows
from interlace.data.packing import Plan
from interlace.data.sources import read_entries
from interlace.data.splitting import split
from interlace.errors import InputError
from interlace.model.forward import FrozenTower, model_inputs
from interlace.model.loading import load_model, load_processing
from interlace.model.preference_loss import METRICS, PreferenceLoss
from interlace.model.reference import AdapterOff
from interlace.model.tuning import TunedModel
from interlace.preference_arguments import LOSS_TYPES
from interlace.training import planning, preference
from interlace.training.parts import load_tuned_model, row_reader, training_arguments
from interlace.training.preference import finetune
from tests.conftest import IMAGE_TOKENS, NEEDS_COMPILER, ROOT, fast_first
from tests.test_distributed import engine_arguments
from tests.test_equivalence import LORA, SETUPS, gradients, tuned_model
from tests.test_training import history, weights

Make = Callable[..., dict[str, Any]]
TRUE = {"learning_rate": 1e-2, "tunable_parts": "language_model", "lora": True, "lora_rank": 4, "lora_alpha": 8}


def write_pairs(folder: Path, count: int = 24, own_images: bool = False) -> Path:
    """Pairs of 0 to 3 images, some with an exchange before the question; with `own_images`, every fourth rejected answer speaks of other images."""
    randomness = random.Random("pairs")
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(8):
        PIL.Image.fromarray(np.random.RandomState(i).randint(0, 255, (20 + i, 24, 3), np.uint8)).save(folder / "pictures" / f"{i}.png")
    rows = []
    for number in range(count):
        images = randomness.sample([f"pictures/{i}.png" for i in range(8)], number % 4)
        places = "".join(f"Image {letter}: <image>\n" for letter, _ in zip("ABC", images, strict=False))
        prompt: Any = places + "Which digit is the largest?"
        if number % 3 == 0:
            before = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "digit 1"}]
            prompt = [*before, {"role": "user", "content": "And the image?"}]
        answers = [f"digit {randomness.randrange(5)}", f"image {randomness.choice('ABC')}: {randomness.randrange(5, 10)}" * (1 + number % 2)]
        randomness.shuffle(answers)
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1], **({"images": images} if images else {})})
        if own_images and images and number % 4 == 2:
            rows[-1]["rejected_images"] = images[::-1]
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs")


def read_pairs(model_dir: Path, path: Path, make_arguments: Make) -> Rows:
    arguments = make_arguments(path)
    return load_rows(read_entries([{"data_files": str(path)}], 0), row_reader(arguments, load_processing(str(model_dir)), "preference"), arguments, False)[0]


def pack(model_dir: Path, rows: Rows, numbers: list[int]) -> PackedBatch:
    processing = load_processing(str(model_dir))
    return Collator(processing.process_images, processing.config.image_token_id).pack([NumberedRows(rows)[number] for number in numbers])


def as_two_rows(model_dir: Path, path: Path, folder: Path, make_arguments: Make) -> Rows:
    """Each pair as two supervised rows, the chosen and the rejected answer, whose earlier answers are not supervised."""
    rows = []
    for pair in json.loads(path.read_text()):
        for side in ("chosen", "rejected"):
            prompt = pair["prompt"] if isinstance(pair["prompt"], list) else [{"role": "user", "content": pair["prompt"]}]
            images = pair.get("rejected_images", pair.get("images")) if side == "rejected" else pair.get("images")
            messages = [message | {"loss": False} if message["role"] == "assistant" else message for message in prompt]
            rows.append({"messages": [*messages, {"role": "assistant", "content": pair[side]}], **({"images": images} if images else {})})
    written = path.with_name("separate.json")
    written.write_text(json.dumps(rows))
    arguments = make_arguments(written)
    return load_rows(read_entries([{"data_files": str(written)}], 0), row_reader(arguments, load_processing(str(model_dir))), arguments, False)[0]


# --- the forest ---


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_pair_scores_and_learns_as_two_separate_sequences(tiny_dir: Path, tmp_path: Path, make_arguments: Make, setup: str) -> None:
    path = write_pairs(tmp_path / "pairs", own_images=True)
    rows, separate = read_pairs(tiny_dir, path, make_arguments), as_two_rows(tiny_dir, path, tmp_path, make_arguments)
    numbers = [5, 0, 6, 3, 2, 9, 10, 1]
    tuned = tuned_model(tiny_dir, **SETUPS[setup])
    batch = pack(tiny_dir, rows, numbers)
    assert batch.row_numbers == tuple(number for number in numbers for _ in range(2))
    slope = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(1))
    log_probs = tuned.packed(**model_inputs(batch, tuned.tower)).log_probs
    (log_probs * slope).sum().backward()
    together = gradients(tuned)
    tuned.packed.zero_grad()
    for place, number in enumerate(numbers):
        for side in range(2):
            alone = pack(tiny_dir, separate, [2 * number + side])
            of_side = batch.sequence_index == 2 * place + side
            expected = tuned.packed(**model_inputs(alone, tuned.tower)).log_probs
            torch.testing.assert_close(log_probs[of_side], expected, rtol=1e-5, atol=1e-5)
            (expected * slope[of_side]).sum().backward()
    apart = gradients(tuned)
    assert set(together) == set(apart)
    whole = torch.stack([gradient.norm() for gradient in apart.values()]).norm()
    for name, gradient in apart.items():
        assert (together[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


def test_tokens_of_a_pair_are_its_prompt_and_both_answers_once(tiny_dir: Path, tmp_path: Path, make_arguments: Make) -> None:
    path = write_pairs(tmp_path / "pairs", own_images=True)
    rows, separate = read_pairs(tiny_dir, path, make_arguments), as_two_rows(tiny_dir, path, tmp_path, make_arguments)
    for number, pair in enumerate(json.loads(path.read_text())):
        batch = pack(tiny_dir, rows, [number])
        ends = 2  # what follows the last answer, where it is a row: a line break, and its end
        sides = [separate[2 * number + side] for side in range(2)]
        answers = [side.supervised_tokens for side in sides]
        prompt = sides[0].length - answers[0] - (ends - 1)
        twice = 2 if "rejected_images" in pair else 1
        assert batch.num_tokens == rows.lengths[number] == prompt * twice + sum(answers)
        assert len(batch.targets) == sum(answers) == rows.supervised[number]
        assert len(batch.segments) == (2 if twice == 2 or prompt == 0 else 3)
        assert batch.num_images == len(pair.get("images", [])) * twice


def test_a_pair_is_never_split_between_its_answers(tiny_dir: Path, pairs_file: Path, make_arguments: Make) -> None:
    rows = read_pairs(tiny_dir, pairs_file, make_arguments)
    tuned = tuned_model(tiny_dir, lora=LORA)
    batch = pack(tiny_dir, rows, [3, 7, 2, 9, 4])
    waiting, parts = [batch], []
    while waiting:
        halves = split(waiting.pop())
        if halves is None:
            continue
        waiting += halves
        parts += [half for half in halves if split(half) is None]
    assert sorted(part.row_numbers for part in parts) == [(number, number) for number in (2, 3, 4, 7, 9)]
    with torch.no_grad():
        whole = tuned.packed(**model_inputs(batch, tuned.tower)).log_probs
        for part in parts:
            place = batch.row_numbers.index(part.row_numbers[0])
            expected = whole[(batch.sequence_index == place) | (batch.sequence_index == place + 1)]
            torch.testing.assert_close(tuned.packed(**model_inputs(part, tuned.tower)).log_probs, expected, rtol=1e-5, atol=1e-5)


# --- against TRL ---


def trl_rows(path: Path, model_dir: Path) -> list[dict[str, Any]]:
    """The pairs as TRL takes them so that nothing is moved: the prompt as our template renders it, images as a list."""
    tokenizer = load_processing(str(model_dir)).tokenizer
    rows = []
    for pair in json.loads(path.read_text()):
        prompt = pair["prompt"] if isinstance(pair["prompt"], list) else [{"role": "user", "content": pair["prompt"]}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        images = [PIL.Image.open(path.parent / name) for name in pair["images"]]
        rows.append({"prompt": text, "chosen": f"{pair['chosen']}<|im_end|>", "rejected": f"{pair['rejected']}<|im_end|>", "images": images})
    return rows


def with_images(path: Path) -> Path:
    """Only the pairs with images: TRL takes no mixture."""
    kept = [pair for pair in json.loads(path.read_text()) if pair.get("images")]
    other = path.with_name("with_images.json")
    other.write_text(json.dumps(kept))
    return other


def trl_trainer(model_dir: Path, path: Path, folder: Path, tuned: TunedModel, **settings: Any) -> DPOTrainer:
    """TRL's trainer with a new adapter whose weights are those of `tuned`."""
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=None,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **settings,
    )
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    trainer = DPOTrainer(
        model=load_model(str(model_dir), torch.float32),
        args=config,
        train_dataset=Dataset.from_list(trl_rows(path, model_dir)),
        processing_class=AutoProcessor.from_pretrained(str(model_dir), backend="pil"),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets),
    )
    ours = {name.removeprefix("model."): parameter for name, parameter in tuned.packed.named_parameters() if "lora_" in name}
    theirs = {name.removeprefix("base_model.model."): parameter for name, parameter in trainer.model.named_parameters() if "lora_" in name}
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].data)
    return trainer


@pytest.fixture(scope="module")
def module_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_images(write_pairs(tmp_path_factory.mktemp("pairs"), 32))


WEIGHTED = {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.2, 1.5]}
FAMILY = {kind: {"loss_type": [kind]} for kind in ("sigmoid", "ipo", "hinge", "robust")} | {"weighted": WEIGHTED}


@pytest.mark.parametrize("name", FAMILY)
def test_ten_steps_are_those_of_trl(
    tiny_dir: Path, module_pairs: Path, make_arguments: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = {"label_smoothing": 0.1 if name == "robust" else 0.0, "beta": 0.3, **FAMILY[name]}
    arguments = make_arguments(module_pairs, max_steps=10, packing=False, **TRUE, **settings)
    tuned = load_tuned_model(str(tiny_dir), arguments, training_arguments(arguments))
    trainer = trl_trainer(tiny_dir, module_pairs, tmp_path / "trl", tuned, max_steps=10, **settings)
    trainer.train()
    monkeypatch.setattr(planning, "Plan", functools.partial(Plan, shuffle=False))
    finetune(arguments)
    ours = [entry for entry in history(arguments["output_dir"]) if "loss" in entry]
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 10
    assert abs(ours[-1]["rewards/margins"]) > 0.1  # the adapter has learned: rewards are not zero
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(their["loss"]), rel=1e-5, abs=1e-5)
        for metric in METRICS:
            if metric != "entropy" or "entropy" in their:
                assert mine[metric] == pytest.approx(float(their[metric]), rel=1e-4, abs=1e-5), metric


@pytest.fixture(scope="module")
def at_one_step(tiny_dir: Path, module_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL's trainer and our model with the same awake adapter, and six pairs for each."""
    tuned = tuned_model(tiny_dir, parts=("language_model",), lora=LORA)
    for name, parameter in tuned.packed.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.3)  # some losses have an exponential of what was gained, in which rounding shows
    trainer = trl_trainer(tiny_dir, module_pairs, tmp_path_factory.mktemp("trl"), tuned, use_weighting=True)
    inputs = trainer._prepare_inputs(trainer.data_collator(trl_rows(module_pairs, tiny_dir)[:6]))
    return tuned, trainer, inputs


VARIANTS: dict[str, dict[str, Any]] = {kind: {"loss_type": [kind]} for kind in LOSS_TYPES}
VARIANTS |= {f"divergence {name}": {"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")}
VARIANTS |= {"ld_alpha": {"ld_alpha": 0.3}, "weighting": {"use_weighting": True}, "weighted": WEIGHTED}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loss_is_that_of_trl(at_one_step: Any, tiny_dir: Path, module_pairs: Path, make_arguments: Make, variant: str) -> None:
    tuned, trainer, inputs = at_one_step
    settings = VARIANTS[variant] | ({"label_smoothing": 0.1} if variant in ("robust", "exo_pair", "aot") else {})
    arguments = make_arguments(module_pairs, **settings)
    kinds = arguments["loss_type"]
    trainer.loss_types, trainer.loss_weights = kinds, arguments["loss_weights"] or [1.0] * len(kinds)
    for name in ("label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting"):
        setattr(trainer, name, arguments[name])
    expected = trainer._compute_loss(trainer.model, dict(inputs), return_outputs=False)
    parameters = {name.removeprefix("base_model.model."): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    theirs = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    rows = read_pairs(tiny_dir, module_pairs, make_arguments)
    batch = pack(tiny_dir, rows, list(range(6)))
    values, loss = model_inputs(batch, tuned.tower), PreferenceLoss(arguments)
    reference = AdapterOff(tuned.peft).log_probs(tuned.packed, values, batch, "train")
    scored = loss(tuned.packed(**values, with_statistics=True), reference, batch)
    total = scored.of_pairs / scored.num_pairs + scored.of_tokens / scored.num_chosen
    assert total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    tuned.packed.zero_grad()
    total.backward()
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in gradients(tuned).items():
        expected = theirs[name.removeprefix("model.")]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * whole, name


# --- micro-batches, fillers ---


@pytest.mark.parametrize("kinds", [["sigmoid"], ["sigmoid", "sft"], ["ipo"]], ids=str)
def test_the_loss_does_not_depend_on_how_a_step_is_cut(tiny_dir: Path, pairs_file: Path, make_arguments: Make, kinds: list[str]) -> None:
    rows, loss = read_pairs(tiny_dir, pairs_file, make_arguments), PreferenceLoss(make_arguments(pairs_file, loss_type=kinds))
    tuned = tuned_model(tiny_dir, lora=LORA)
    assert tuned.peft is not None
    found = []
    for cut in ([[0, 1, 2, 3, 5]], [[0], [3, 1], [~2, 2, 5]], [[0, 1, 2, 3, 5], [~0]]):
        tuned.packed.zero_grad()
        scored = []
        for numbers in cut:
            batch = pack(tiny_dir, rows, numbers)
            values = model_inputs(batch, tuned.tower)
            reference = AdapterOff(tuned.peft).log_probs(tuned.packed, values, batch, "train")
            scored.append(loss(tuned.packed(**values, with_statistics=True), reference, batch))
        pairs, chosen = sum(part.num_pairs for part in scored), sum(part.num_chosen for part in scored)
        assert pairs == 5
        total = sum(part.of_pairs / pairs + part.of_tokens / chosen for part in scored)
        total.backward()
        found.append((total.item(), gradients(tuned)))
    for value, learned in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        whole = torch.stack([gradient.norm() for gradient in found[0][1].values()]).norm()
        for name, gradient in found[0][1].items():
            assert (learned[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * whole, name


# --- runs ---


ENGINES: dict[str, dict[str, Any]] = {
    "adapter": TRUE,
    "adapter and projector": {**TRUE, "tunable_parts": "projector,language_model"},
    "full": {"learning_rate": 1e-3},
    "with tower": {"learning_rate": 1e-3, "tunable_parts": "vision_tower,projector,language_model"},
    "adapter and tower": {**TRUE, "tunable_parts": "vision_tower,language_model"},
    "PiSSA": {**TRUE, "tunable_parts": "projector,language_model", "lora_init": "pissa_niter_4"},
}


def logged(output_dir: str, names: tuple[str, ...] = ("loss", *METRICS)) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in history(output_dir) if "loss" in entry]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_reference_is_the_model_before_its_first_step(tiny_dir: Path, pairs_file: Path, make_arguments: Make, engine: str) -> None:
    """Against a second model, loaded apart: rewards of the last step are beta times what the policy's log-probs have gained over it."""
    arguments = make_arguments(pairs_file, max_steps=5, beta=0.5, per_device_train_batch_size=24, **ENGINES[engine])
    finetune(arguments)
    entries = [entry for entry in history(arguments["output_dir"]) if "loss" in entry]
    assert entries[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    rows = read_pairs(tiny_dir, pairs_file, make_arguments)
    untouched = tuned_model(tiny_dir)
    sums = torch.zeros(2)
    with torch.no_grad():
        for number in range(24):
            batch = pack(tiny_dir, rows, [number])
            log_probs = untouched.packed(**model_inputs(batch, untouched.tower)).log_probs
            sums.index_add_(0, batch.sequence_index, log_probs)
    for entry in entries:
        for side, of_reference in zip(("chosen", "rejected"), (sums / 24).tolist(), strict=True):
            assert entry[f"rewards/{side}"] == pytest.approx(0.5 * (entry[f"logps/{side}"] - of_reference), rel=1e-3, abs=2e-4)
    assert abs(entries[-1]["rewards/margins"]) > 0.01


@pytest.mark.parametrize("engine", fast_first(ENGINES, 2))
def test_precomputed_equals_online(pairs_file: Path, make_arguments: Make, tmp_path: Path, engine: str) -> None:
    evaluation = {"dataset": {"train": [{"data_files": str(pairs_file)}], "eval": [{"data_files": str(pairs_file)}]}, "eval_strategy": "epoch"}
    # plain gradient descent in small steps: Adam's first ones are as large for what is rounding as for what is a gradient, and large ones multiply it
    changes = {"max_steps": 6, **ENGINES[engine], **evaluation, "optim": "sgd", "learning_rate": 0.01}
    online = make_arguments(pairs_file, output_dir=str(tmp_path / "online"), **changes)
    stored = make_arguments(pairs_file, output_dir=str(tmp_path / "stored"), precompute_ref_log_probs=True, **changes)
    finetune(online)
    finetune(stored)
    names = tuple(name for name in ("loss", *METRICS) if name != "rewards/accuracies")  # at the first step rewards are zero but for rounding
    np.testing.assert_allclose(logged(stored["output_dir"], names), logged(online["output_dir"], names), rtol=1e-4, atol=2e-5)
    evaluated = [next(entry for entry in history(arguments["output_dir"]) if "eval_loss" in entry) for arguments in (online, stored)]
    assert {name for name in evaluated[0] if "swapped" in name or "blank" in name} == {
        f"eval_rewards/{name}" for name in ("margins_blank", "blank_gap", "margins_swapped", "swapped_gap")
    }
    for name, value in evaluated[0].items():
        if "rewards" in name or name == "eval_loss":
            assert evaluated[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_images_are_encoded_once_for_policy_and_reference(tiny_dir: Path, tmp_path: Path, make_arguments: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pairs(tmp_path / "pairs", 4)
    pair = json.loads(path.read_text())[3] | {"images": [f"pictures/{i}.png" for i in range(4)], "prompt": "<image><image>\n<image><image> Which?"}
    path.write_text(json.dumps([pair]))
    encoded, passes = [], []
    original, forward = FrozenTower.features, torch.nn.Module.__call__

    def counted(tower: FrozenTower, pixel_values: torch.Tensor, grids: Any) -> torch.Tensor:
        encoded.append(len(pixel_values))
        return original(tower, pixel_values, grids)

    def seen(module: torch.nn.Module, *values: Any, **named: Any) -> Any:
        if type(module).__name__ == "PackedModel":
            passes.append(named["input_ids"].shape[1])
        return forward(module, *values, **named)

    monkeypatch.setattr(FrozenTower, "features", counted)
    monkeypatch.setattr(torch.nn.Module, "__call__", seen)
    length = int(read_pairs(tiny_dir, path, make_arguments).lengths[0])
    finetune(make_arguments(path, max_steps=1, per_device_train_batch_size=1, **TRUE))
    assert (encoded, passes) == ([4], [length, length])
    encoded.clear()
    passes.clear()
    stored = {"precompute_ref_log_probs": True, "reference_dir": str(tmp_path / "store"), **TRUE}
    finetune(make_arguments(path, output_dir=str(tmp_path / "first"), max_steps=1, per_device_train_batch_size=1, **stored))
    finetune(make_arguments(path, output_dir=str(tmp_path / "second"), max_steps=3, per_device_train_batch_size=1, **stored))
    assert (encoded, passes) == ([4] * 5, [length] * 5)  # once for the store, then once per step


def test_a_continued_adapter_is_its_own_reference(pairs_file: Path, rows_file: Path, make_arguments: Make, tmp_path: Path) -> None:
    from interlace.training.supervised import finetune as finetune_supervised

    taught = make_arguments(rows_file, output_dir=str(tmp_path / "sft"), **TRUE)
    finetune_supervised(taught)
    changes = {"lora": True, "lora_path": taught["output_dir"], "tunable_parts": "language_model", "learning_rate": 1e-2, "max_steps": 4}
    online = make_arguments(pairs_file, output_dir=str(tmp_path / "online"), **changes)
    stored = make_arguments(pairs_file, output_dir=str(tmp_path / "stored"), precompute_ref_log_probs=True, **changes)
    finetune(online)
    finetune(stored)
    assert logged(online["output_dir"])[0][0] == pytest.approx(np.log(2), abs=1e-6)
    names = ("loss", "rewards/margins", "logps/chosen")
    np.testing.assert_allclose(logged(stored["output_dir"], names), logged(online["output_dir"], names), rtol=1e-4, atol=2e-5)
    before, after = weights(taught["output_dir"]), weights(online["output_dir"])
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("engine", ["adapter", "full", "PiSSA"])
def test_resumed_equals_uninterrupted(pairs_file: Path, make_arguments: Make, tmp_path: Path, engine: str, stored: bool) -> None:
    changes = {**ENGINES[engine], "precompute_ref_log_probs": stored, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "max_steps": 6}
    whole = make_arguments(pairs_file, output_dir=str(tmp_path / "whole"), **changes)
    finetune(whole)
    parts = tmp_path / "parts"
    shutil.copytree(Path(whole["output_dir"]) / "checkpoint-3", parts / "checkpoint-3")
    resumed = make_arguments(pairs_file, output_dir=str(parts), resume_from_checkpoint=True, **changes)
    finetune(resumed)
    assert logged(resumed["output_dir"]) == logged(whole["output_dir"])
    first, second = weights(whole["output_dir"]), weights(resumed["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"packing": False}, {"packing": False, "gradient_accumulation_steps": 2}])
def test_checkpointing_packing_and_accumulation_change_nothing(pairs_file: Path, make_arguments: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = make_arguments(pairs_file, output_dir=str(tmp_path / "plain"), per_device_train_batch_size=24, max_steps=3, **TRUE)
    other = {"per_device_train_batch_size": 24, **changes}
    if "gradient_accumulation_steps" in changes:
        other |= {"per_device_train_batch_size": 12}
    changed = make_arguments(pairs_file, output_dir=str(tmp_path / "changed"), max_steps=3, **{**TRUE, **other})
    finetune(plain)
    finetune(changed)
    names = ("loss", "rewards/margins", "logps/chosen")
    np.testing.assert_allclose(logged(changed["output_dir"], names), logged(plain["output_dir"], names), rtol=1e-4, atol=1e-5)


def test_precomputing_is_taken_up_half_way_and_refused_after_a_change(pairs_file: Path, make_arguments: Make, tmp_path: Path, tiny_dir: Path) -> None:
    folder = tmp_path / "store"
    changes = {"precompute_ref_log_probs": True, "reference_dir": str(folder), "max_steps": 2, "overwrite_output_dir": True, **TRUE}
    original, scored = preference._score, []

    def limited(*values: Any) -> Iterator[tuple[int, np.ndarray]]:
        for number, found in original(*values):
            scored.append(number)
            if len(scored) == 10:
                raise InputError("interrupted")
            yield number, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "_score", limited)
        patch.setattr("interlace.training.precomputing._SECONDS_PER_PART", 0)
        with pytest.raises(InputError, match="interrupted"):
            finetune(make_arguments(pairs_file, **changes))
        done = len(scored) - 1
        finetune(make_arguments(pairs_file, **changes))
    assert sorted(scored[:done] + scored[done + 1 :]) == list(range(24))
    first = logged(str(tmp_path / "run"))
    part = next(iter((folder / "train").glob("part-*.npz")))
    part.write_bytes(part.read_bytes()[:20])  # damaged: computed again
    finetune(make_arguments(pairs_file, **changes))
    assert logged(str(tmp_path / "run")) == first
    picture = pairs_file.parent / "pictures" / "3.png"
    before = picture.read_bytes()
    picture.touch()  # another time, the same content
    finetune(make_arguments(pairs_file, **changes))
    PIL.Image.new("RGB", PIL.Image.open(picture).size).save(picture)
    with pytest.raises(InputError, match="the content of images or videos"):
        finetune(make_arguments(pairs_file, **changes))
    picture.write_bytes(before)
    with pytest.raises(InputError, match="tokenizer or prompt"):
        finetune(make_arguments(pairs_file, system_prompt="Be brief.", **changes))
    other = tmp_path / "other"
    shutil.copytree(tiny_dir, other)
    from safetensors.torch import load_file, save_file

    stored = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.001 for name, tensor in stored.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="the model's weights"):
        finetune(make_arguments(pairs_file, model_name_or_path=str(other), **changes))
    (tmp_path / "store2").mkdir()
    (tmp_path / "store2" / "train").mkdir()
    (tmp_path / "store2" / "train" / "mine.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        finetune(make_arguments(pairs_file, **(changes | {"reference_dir": str(tmp_path / "store2")})))


def test_evaluation_speaks_of_sources_images_and_lengths(pairs_file: Path, make_arguments: Make, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "others", 8)
    other = other.rename(other.with_name("others.json"))
    dataset = {"train": [{"data_files": str(pairs_file)}], "eval": [{"data_files": str(pairs_file)}, {"data_files": str(other)}]}
    arguments = make_arguments(pairs_file, dataset=dataset, eval_strategy="steps", eval_steps=4, metric_for_best_model="eval_rewards/margins", **TRUE)
    finetune(arguments)
    (found,) = [entry for entry in history(arguments["output_dir"]) if "eval_loss" in entry]
    groups = [f"{count}_images" for count in range(4)], ["pairs.json", "others.json"]
    for names, weights_of in zip(groups, ([8, 8, 8, 8], [24, 8]), strict=True):
        for metric in ("accuracies", "margins"):
            values = [found[f"eval_rewards/{metric}/{name}"] for name in names]
            assert np.average(values, weights=weights_of) == pytest.approx(found[f"eval_rewards/{metric}"], abs=1e-6)
    assert -1 <= found["eval_rewards/length_correlation"] <= 1
    assert found["eval_logps/chosen_drift"] != 0
    assert found["eval_runtime"] > 0


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": "digit 1", "chosen": "digit 1"}, "equal_answers"),
        ({"rejected": "digit 1", "chosen": "digit 1", "rejected_images": ["pictures/1.png"]}, "equal_answers"),
        ({"chosen": "  "}, "empty_answer"),
        ({"rejected": None}, "missing_answer"),
        ({"chosen": None}, "missing_answer"),
        ({"chosen": [{"role": "user", "content": "Another question"}, {"role": "assistant", "content": "digit 1"}]}, "different_prompts"),
        ({"images": ["pictures/1.png", "pictures/2.png"]}, "placeholder_mismatch"),
    ],
)
def test_bad_pairs_are_named(pairs_file: Path, make_arguments: Make, changes: dict[str, Any], reason: str) -> None:
    rows = json.loads(pairs_file.read_text())
    rows[1] = {"prompt": "<image>\nWhich digit?", "chosen": "digit 1", "rejected": "digit 2", "images": ["pictures/1.png"]} | changes
    pairs_file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rf"row 1: {reason}"):
        finetune(make_arguments(pairs_file, **TRUE))
    arguments = make_arguments(pairs_file, bad_rows="skip", max_steps=1, **TRUE)
    finetune(arguments)
    ledger = json.loads((Path(arguments["output_dir"]) / "ledger.json").read_text())
    assert (ledger["trained"], ledger["skipped"], ledger["entries"][0]["index"]) == (23, 1, 1)


def test_the_same_answer_on_other_images_is_a_preference(tiny_dir: Path, pairs_file: Path, make_arguments: Make) -> None:
    rows = json.loads(pairs_file.read_text())
    rows[1] |= {"rejected": rows[1]["chosen"], "rejected_images": ["pictures/7.png"], "images": ["pictures/1.png"]}
    pairs_file.write_text(json.dumps(rows))
    batch = pack(tiny_dir, read_pairs(tiny_dir, pairs_file, make_arguments), [1])
    assert batch.num_images == 2
    assert batch.pixel_values is not None
    assert len(batch.pixel_values) == 2
    assert int((batch.input_ids == batch.input_ids[0, batch.image_positions[0]]).sum()) == 2 * IMAGE_TOKENS


def test_length_is_that_of_the_prompt_with_the_longer_answer(tiny_dir: Path, pairs_file: Path, make_arguments: Make) -> None:
    rows = read_pairs(tiny_dir, pairs_file, make_arguments)
    longest = 0
    for number in range(len(rows)):
        batch = pack(tiny_dir, rows, [number])
        longest = max(longest, int(batch.position_ids.max()) + 1)
    finetune(make_arguments(pairs_file, max_length=longest, too_long="error", max_steps=1, **TRUE))
    with pytest.raises(InputError, match="too_long"):
        finetune(make_arguments(pairs_file, max_length=longest - 1, too_long="error", overwrite_output_dir=True, **TRUE))


# --- several processes ---


RUNS: dict[str, dict[str, Any]] = {
    "DDP, adapter": TRUE,
    "DDP, adapter and projector, stored": {**TRUE, "tunable_parts": "projector,language_model", "precompute_ref_log_probs": True},
    "DDP, full": {"learning_rate": 0.05},
    "ZeRO-2, adapter": {**TRUE, "deepspeed": 2},
    "ZeRO-2, full": {"learning_rate": 0.05, "deepspeed": 2},
    "ZeRO-3, adapter": {**TRUE, "deepspeed": 3},
    "ZeRO-3, full": {"learning_rate": 0.05, "deepspeed": 3},
    "FSDP2, adapter": {**TRUE, "fsdp": True},
    "FSDP2, full, stored": {"learning_rate": 0.05, "fsdp": True, "precompute_ref_log_probs": True},
}


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(pairs_file: Path, make_arguments: Make, tmp_path: Path, name: str) -> None:
    """Losses, rewards, and evaluation with its other images; plain gradient descent, as Adam blows up what is rounding."""
    changes = {**RUNS[name], "optim": "sgd", "learning_rate": RUNS[name]["learning_rate"], "eval_strategy": "steps", "eval_steps": 4}
    changes |= {"dataset": {"train": [{"data_files": str(pairs_file)}], "eval": [{"data_files": str(pairs_file)}]}, "per_device_eval_batch_size": 3}
    engine = changes.pop("deepspeed", None)
    one = make_arguments(pairs_file, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=4, **{**changes, "fsdp": None})
    finetune(one)
    keys = (
        "model_name_or_path",
        "per_device_train_batch_size",
        "max_steps",
        "save_strategy",
        "use_cpu",
        "logging_steps",
        "gradient_checkpointing",
        "lora_dropout",
    )
    config = {key: one[key] for key in (*keys, "dataloader_num_workers")} | changes | {"cache_dir": str(tmp_path / "cache"), "ddp_timeout": 120}
    config |= {"output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 2} | ({} if engine is None else engine_arguments(f"zero{engine}", tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command += ["train/preference_finetune.py", str(tmp_path / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = tuple(metric for metric in ("loss", *METRICS) if metric != "rewards/accuracies")
    np.testing.assert_allclose(logged(config["output_dir"], names), logged(one["output_dir"], names), rtol=2e-4, atol=2e-5)
    first, second = (next(entry for entry in history(folder) if "eval_loss" in entry) for folder in (one["output_dir"], config["output_dir"]))
    for metric, value in first.items():
        if metric == "eval_loss" or "margins" in metric or "gap" in metric:
            assert second[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric
