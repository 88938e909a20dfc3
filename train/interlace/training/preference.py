"""Preference tuning (DPO, arXiv 2305.18290, and its family), from checked arguments to a folder with the result."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from interlace.arguments import Arguments
from interlace.data.batch import PackedBatch
from interlace.data.dataset import Rows, default_cache_dir
from interlace.errors import InputError
from interlace.model.features import tower_hash
from interlace.model.forward import model_inputs
from interlace.model.loading import Processing, weights_fingerprint
from interlace.model.preference_loss import PreferenceLoss
from interlace.model.reference import AdapterOff, AsItBegan, FrozenCopy, Reference, Stored
from interlace.model.tuning import TunedModel
from interlace.training.outline import compute_dtype
from interlace.training.planned import PlannedRows
from interlace.training.precomputing import StoredLogProbs, folder_for, hash_of_file, media_hash
from interlace.training.preference_trainer import PreferenceTrainer
from interlace.training.run import Task, run
from interlace.training.tracking import say
from interlace.training.trainer import PackedTrainer
from interlace.training.views import BlankRows, Chosen, partners, sample, some_of


def finetune(arguments: Arguments) -> None:
    """Trains on pairs of answers and saves; see `run`."""
    run(arguments, "preference", _prepare)


def _prepare(
    tuned: TunedModel, processing: Processing, train: PlannedRows, evaluation: PlannedRows | None, arguments: Arguments, task: Task
) -> Callable[..., PackedTrainer]:
    """The loss, the reference, and what evaluation looks at besides; see `Prepare`.

    Raises:
        InputError: the reference cannot be had.
    """
    if arguments["disable_dropout"]:
        for module in tuned.packed.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    loss = PreferenceLoss(arguments)
    if arguments["eval_strategy"] == "no" and not arguments["eval_on_start"]:
        evaluation = None  # nobody will ask
    views = {} if evaluation is None else _views(evaluation, arguments["ablation_pairs"])
    if arguments["precompute_ref_log_probs"]:
        rows = {"train": train, **({} if evaluation is None else {"eval": evaluation}), **views}
        reference: Reference = _stored(tuned, processing, rows, arguments, task)
    else:
        reference = _live(tuned, arguments, task)
    if task.ranks.is_main:
        _describe(reference, tuned, arguments)
    return partial(PreferenceTrainer, loss=loss, reference=reference, views=views)


def _views(evaluation: PlannedRows, count: int) -> dict[str, PlannedRows]:
    """Some of the evaluation's pairs with blank images and with those of others; none for a count of 0."""
    assert isinstance(evaluation.rows, Rows)
    numbers = sample(evaluation.rows, count) if count else np.zeros(0, np.int64)
    views: dict[str, PlannedRows] = {}
    if len(numbers):
        blank = some_of(evaluation, numbers)
        views["blank"] = BlankRows(blank.rows, blank.plan)
        swapped, others = partners(evaluation.rows, numbers)
        if len(swapped):
            views["swapped"] = some_of(evaluation, swapped, others)
    return views


def _live(tuned: TunedModel, arguments: Arguments, task: Task) -> Reference:
    """A reference that is asked along with the policy; `preference_problems` refuses what cannot be."""
    if tuned.peft is not None:
        return AsItBegan(tuned.packed) if arguments["lora_path"] or tuned.first else AdapterOff(tuned.peft)
    return FrozenCopy(tuned.packed, compute_dtype(arguments), is_rounded=bool(task.args.deepspeed) and compute_dtype(arguments) is not torch.float32)


def _stored(tuned: TunedModel, processing: Processing, views: dict[str, PlannedRows], arguments: Arguments, task: Task) -> Stored:
    """The reference's log-probs of all rows from disk; what is not there yet is computed by the model as it is now."""
    cache_dir = Path(arguments["cache_dir"]) if arguments["cache_dir"] else default_cache_dir()
    of_all = task.ranks.on_main(partial(_settings, tuned, processing, views, arguments, task.path, cache_dir))
    starts, values = {}, {}
    for name, planned in views.items():
        assert isinstance(planned.rows, Rows | Chosen)
        settings = of_all[name]
        folder = Path(arguments["reference_dir"]) / name if arguments["reference_dir"] else folder_for(cache_dir, settings)
        store = StoredLogProbs(folder, settings, planned.rows.supervised)
        task.ranks.on_main(store.open)
        score = partial(_score, tuned, processing, planned, arguments["precompute_ref_batch_size"], task, compute_dtype(arguments))
        values[name] = store.fill(score, task.ranks, f"reference log-probs ({name})")
        starts[name] = torch.from_numpy(store.starts)
        say(f"reference: log-probs of {len(planned.rows):,} pairs ({name}) in {folder}")
    return Stored(starts, values)


def _settings(
    tuned: TunedModel, processing: Processing, views: dict[str, PlannedRows], arguments: Arguments, path: str, cache_dir: Path
) -> dict[str, dict[str, str]]:
    """view -> all that its log-probs rest on, by the names of `precomputing`; weights and images are read once for all."""
    files = ("adapter_model.safetensors", "adapter_config.json") if arguments["lora_path"] else ()
    precision = [compute_dtype(arguments), *(arguments[name] for name in ("load_in_4bit", "load_in_8bit", "lora")), bool(arguments["deepspeed"])]
    precision += [arguments["lora_init"]] if tuned.first else []  # the same weights, but in two parts
    found: dict[str, dict[str, str]] = {}
    media: dict[tuple[Path, ...], str] = {}
    try:
        model = {
            "weights": f"{weights_fingerprint(path) or tower_hash(tuned.packed, '')} {processing.config.to_json_string()}",
            "adapter": " ".join(hash_of_file(Path(arguments["lora_path"]) / name) for name in files),
            "prompt": processing.template.fingerprint,
            "images": f"{processing.image_processor.to_json_string()} {processing.image_settings}",
            "precision": " ".join(map(str, precision)),
        }
        for name, planned in views.items():
            assert isinstance(planned.rows, Rows | Chosen)
            stores = planned.rows.stores
            key = tuple(store.folder for store in stores)
            media[key] = media[key] if key in media else media_hash(stores, cache_dir / "reference" / "media.json")
            found[name] = model | {"rows": f"{planned.rows.fingerprint} {type(planned).__name__}", "media": media[key]}
    except OSError as error:
        raise InputError(f"reference_dir: {error.filename}: {error.strerror}") from error
    return found


def _score(
    tuned: TunedModel, processing: Processing, planned: PlannedRows, rows_per_batch: int | None, task: Task, dtype: torch.dtype, numbers: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """See `ScoreRows`."""
    some, device = some_of(planned, numbers, rows_per_batch=rows_per_batch), task.args.device
    packed = tuned.packed.to(device).eval()
    for found in some.loader(some.collator(processing, tuned.tower), task.args, pin=False):
        batch: PackedBatch = found.to(device)  # type: ignore[attr-defined]
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            log_probs = packed(**model_inputs(batch, tuned.tower)).log_probs.cpu().numpy()
        pairs = batch.sequence_index.cpu().numpy() // 2
        for place, row in enumerate(batch.row_numbers[::2]):
            if row < 0:  # a filler
                continue
            if not np.isfinite(log_probs[pairs == place]).all():
                named = some.rows[row]
                raise InputError(f"{named.file}: row {named.index}: log-probs of the reference are not finite; look at its weights, or leave fp16 out")
            yield int(numbers[row]), log_probs[pairs == place]
    packed.train()


def _describe(reference: Reference, tuned: TunedModel, arguments: Arguments) -> None:
    """Says what the reference is, and which savings cannot be had."""
    began = "the adapter in lora_path" if arguments["lora_path"] else f"the model as it began (without its adapter, {arguments['lora_init']} leaves a rest)"
    kinds = {AdapterOff: "the model without its adapter", AsItBegan: began, FrozenCopy: "a frozen copy of the model"}
    if type(reference) in kinds:
        say(f"reference: {kinds[type(reference)]}; precompute_ref_log_probs: true computes its log-probs once, for all epochs and later runs")
    if tuned.tower is None and not isinstance(reference, Stored):
        say("           the vision tower learns: policy and reference encode every image for themselves")
    dropout = [module.p for module in tuned.packed.modules() if isinstance(module, nn.Dropout)]
    if any(dropout):
        say("           disable_dropout: false: both answers of a pair share the dropout of their prompt, which is computed once")
    elif arguments["lora"] and arguments["lora_dropout"]:
        say(f"           lora_dropout {arguments['lora_dropout']} is not applied: dropout makes rewards of what is no preference (disable_dropout)")
