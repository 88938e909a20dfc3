"""Keys that people bring along from PaddleMIX's and LLaVA-NeXT's configurations: read as ours, left out, or refused with the reason."""

import os
from collections.abc import Mapping
from typing import Any

# Names whose value means the same: theirs -> ours
RENAMED = {
    # PaddleMIX
    "evaluation_strategy": "eval_strategy",
    "recompute": "gradient_checkpointing",
    "warmup_ratio": "warmup_steps",
    "mm_projector_lr": "projector_learning_rate",
    "sharding": "deepspeed",
    "mixtoken": "packing",
    # LLaVA-NeXT
    "model_max_length": "max_length",
    "max_seq_length": "max_length",
    "dataset_num_proc": "preprocessing_num_workers",
    "mm_tunable_parts": "tunable_parts",
    "mm_vision_tower_lr": "vision_tower_learning_rate",
    "version": "prompt_style",
    "frames_upbound": "num_frames",
    "attn_implementation": "attention",
    "lora_enable": "lora",
    "lora_r": "lora_rank",
    # PEFT
    "init_lora_weights": "lora_init",
}
# Values under those names: our key -> theirs -> ours
VALUES: dict[str, dict[Any, Any]] = {
    "tunable_parts": {"mm_vision_tower": "vision_tower", "mm_mlp_adapter": "projector", "mm_language_model": "language_model"},
    "prompt_style": {
        **{"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "qwen_1_5": "chatml", "qwen_2": "chatml"},
        **{"mistral_instruct": "mistral", "llava_llama_3": "llama_3", "plain": "plain", "pretrain": "plain"},
    },
}
_IN_THE_MODEL = "the model's own configuration decides"
# Names that nothing here needs: theirs -> (values that change nothing, or () for all; why)
WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    # PaddleMIX
    "fp16_opt_level": (("O0", "O1"), "bf16 and fp16 say what is computed in 16 bits; weights that learn stay in float32"),
    "amp_master_grad": ((), "gradients are added up in float32"),
    "group_by_modality_length": ((), "the plan fills and balances micro-batches"),
    "group_by_length": ((), "the plan fills and balances micro-batches"),
    "tensor_parallel_degree": ((-1, 1), "layers are not split between processes; deepspeed: zero3 shares the weights"),
    "pipeline_parallel_degree": ((-1, 1), "layers are not dealt to processes; deepspeed: zero3 shares the weights"),
    "sep_parallel_degree": ((-1, 1), "a row is not split between processes"),
    "sharding_parallel_degree": ((), "optimizer state, gradients and weights are shared by all processes"),
    "eval_with_do_generation": ((False,), "evaluate_model.py generates answers and scores them"),
    "benchmark": ((), "every log says tokens per second and where the time went"),
    "use_flash_attention": ((), "attention: auto takes the fastest backend that the device has"),
    # TRL
    "padding_free": ((False,), "nothing is ever padded"),
    "pad_to_multiple_of": ((), "nothing is ever padded"),
    "pad_token": ((None,), "nothing is ever padded"),
    "truncation_mode": (("keep_start",), "a pair is never cut: one that is too long is left out and listed"),
    "model_init_kwargs": ((None, {}), "the keys of this file say how the model is loaded"),
    "router_aux_loss_coef": ((None, 0, 0.0), "no model here has experts"),
    "sync_ref_model": ((False,), "checkpoints hold no reference that moves, so that a resumed run would go on with another one"),
    "ref_model_mixup_alpha": ((), "sync_ref_model is off"),
    "ref_model_sync_steps": ((), "sync_ref_model is off"),
    "generate_during_eval": ((False,), "evaluate_model.py generates answers"),
    # LLaVA-NeXT
    "mm_vision_select_layer": ((), _IN_THE_MODEL),
    "mm_vision_select_feature": ((), _IN_THE_MODEL),
    "mm_projector_type": ((), _IN_THE_MODEL),
    "mm_patch_merge_type": ((), _IN_THE_MODEL),
    "image_grid_pinpoints": ((), _IN_THE_MODEL),
    "vision_tower": ((), _IN_THE_MODEL),
    "mm_use_im_start_end": ((False,), "images are not put between tokens"),
    "mm_use_im_patch_token": ((False,), "images have one token, `<image>`"),
    "mm_newline_position": ((), _IN_THE_MODEL),
    "lazy_preprocess": ((), "images are always opened when their batch comes"),
    "add_time_instruction": ((False,), "write the times of frames into the questions"),
    "verbose_logging": ((), "logging_steps and report_to say what is logged"),
}
# Names whose meaning has another form here: theirs -> what to write
INSTEAD = {
    "data_path": 'dataset: {"train": [{"data_files": ..}]}',
    "image_folder": 'image_folder in the entries of dataset: {"train": [{"data_files": .., "image_folder": ..}]}',
    "video_folder": 'video_folder in the entries of dataset: {"train": [{"data_files": .., "video_folder": ..}]}',
    "tune_mm_mlp_adapter": "tunable_parts: projector",
    "freeze_backbone": "tunable_parts without language_model",
    "freeze_mm_mlp_adapter": "tunable_parts without projector",
    "unfreeze_mm_vision_tower": "tunable_parts with vision_tower",
    "pretrain_mm_mlp_adapter": "the model's own projector: convert_checkpoint.py makes a model of it",
    "bits": "load_in_4bit or load_in_8bit: true",
    "lora_weight_path": "lora_path",
    "pissa": "lora_init: pissa",
}


def translate(config: Mapping[str, Any], where: Mapping[str, str], schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Their keys and values as ours.

    Args:
        where: each key's place, for messages.

    Returns:
        the keys that remain, by the names they came with; a line for each that was left out; problems.
    """
    kept: dict[str, Any] = {}
    lines, problems = [], []
    config = dict(config)
    weights = {name: config.pop(name) for name in ("dpo_alpha", "gamma") if name in config}
    if weights:
        place = where[next(iter(weights))]
        if "loss_type" in config or "loss_weights" in config or not all(isinstance(value, int | float) for value in weights.values()):
            problems.append(f"{place}: {' and '.join(weights)}: expected numbers, and neither loss_type nor loss_weights beside them")
        else:
            kept |= _weighted_losses(weights.get("dpo_alpha", 1.0), weights.get("gamma", 0.0))
            lines.append(f"{place}: {' and '.join(weights)}: read as {', '.join(f'{name} {value}' for name, value in kept.items())}")
    for name, value in config.items():
        if name in schema or name in RENAMED:
            kept[name] = our_value(RENAMED.get(name, name), value)
        elif name in WITHOUT_EFFECT:
            accepted, why = WITHOUT_EFFECT[name]
            if accepted and value not in accepted:
                problems.append(f"{where[name]}: {name}: {value!r} cannot be honoured: {why}")
            else:
                lines.append(f"{where[name]}: {name} is left out: {why}")
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            if name == "sharding_parallel_degree" and isinstance(value, int) and value > processes:
                lines.append(f"warning: {where[name]}: {name} is {value}, and this run has {processes} process{'es' * (processes > 1)}")
        elif name in INSTEAD:
            problems.append(f"{where[name]}: {name}: write {INSTEAD[name]}")
        else:
            kept[name] = value
    return kept, lines, problems


def _weighted_losses(dpo_alpha: float, gamma: float) -> dict[str, Any]:
    """LLaVA-NeXT's weights of the DPO loss and of a supervised term on the chosen answer (train_dpo.py) as TRL's keys."""
    return {"loss_type": ["sigmoid", "sft"], "loss_weights": [dpo_alpha, gamma]} if gamma else {"loss_type": ["sigmoid"], "loss_weights": [dpo_alpha]}


def our_value(key: str, value: Any) -> Any:
    """A value of one of our keys, or what other tools call it."""
    values = VALUES.get(key, {})
    if key != "tunable_parts":
        return values.get(value, value) if isinstance(value, str) else value
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not any(isinstance(word, str) and word.strip() in values for word in words):
        return value
    return [values.get(word.strip(), word) if isinstance(word, str) else word for word in words]
