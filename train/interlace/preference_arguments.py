"""What the arguments of preference tuning have to themselves: TRL's loss family, defaults, contradictions; no heavy imports."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from interlace.sharding_arguments import slices_weights

LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
)
# Losses of the difference of rewards, which alone have a form for other divergences (trl.DPOTrainer)
_WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
DEFAULTS = {"learning_rate": 1e-6}  # trl.DPOConfig's: what a preference teaches is little, and a fully tuned model forgets quickly
BEST_METRICS = ("rewards/accuracies", "rewards/margins")


def loss_types(value: str | list[str]) -> list[str]:
    """The losses, in a list however they are given."""
    return [value] if isinstance(value, str) else list(value)


def preference_problems(a: Mapping[str, Any], did_you_mean: Callable[[str, Iterable[str]], str]) -> list[str]:
    """Combinations of values that TRL's losses refuse, or cannot be meant.

    Args:
        a: all arguments.
        did_you_mean: a hint for a name that is not known.
    """
    kinds, weights = loss_types(a["loss_type"]), a["loss_weights"]
    unknown = [kind for kind in kinds if kind not in LOSS_TYPES]
    expected = ", ".join(LOSS_TYPES)
    pairs = [
        (not kinds, f"loss_type: an empty list; expected some of {expected}"),
        (len(set(kinds)) < len(kinds), "loss_type: a loss stands there twice; give it one weight"),
        (weights is not None and len(weights) != len(kinds), f"loss_weights: {len(weights or [])} weights for {len(kinds)} of loss_type"),
        (weights is not None and not any(weights), "loss_weights: all are 0: nothing is learned"),
        (a["f_divergence_type"] != "reverse_kl" and not set(kinds) <= set(_WITH_DIVERGENCE), f"f_divergence_type goes with {', '.join(_WITH_DIVERGENCE)} only"),
        (a["use_weighting"] and bool({"aot", "aot_unpaired"} & set(kinds)), "use_weighting: aot and aot_unpaired sort the pairs, so no pair keeps its weight"),
        (a["use_weighting"] and "sft" in kinds, "use_weighting: sft is a mean over tokens, in which no pair has a weight"),
        ("robust" in kinds and a["label_smoothing"] >= 0.5, "label_smoothing: expected less than 0.5 with loss_type robust: half of the pairs would be wrong"),
        ("exo_pair" in kinds and not 0 < a["label_smoothing"] < 1, "label_smoothing: expected between 0 and 1 with loss_type exo_pair, 1e-3 by its authors"),
        (
            a["label_smoothing"] > 0 and not {*_SMOOTHED} & set(kinds),
            f"label_smoothing: does nothing with loss_type {', '.join(kinds)}; it goes with {', '.join(_SMOOTHED)} (robust: DPO with flipped pairs)",
        ),
        (a["reference_dir"] is not None and not a["precompute_ref_log_probs"], "reference_dir needs precompute_ref_log_probs: true"),
        (a["precompute_ref_batch_size"] is not None and not a["precompute_ref_log_probs"], "precompute_ref_batch_size needs precompute_ref_log_probs: true"),
        (
            bool(a["lora_path"] or a["lora_init"]) and not a["precompute_ref_log_probs"] and slices_weights(a),
            f"{'lora_path' if a['lora_path'] else 'lora_init'}: the reference is this adapter as it was, which fsdp and ZeRO-3 cannot keep in slices beside "
            "the one that learns; set precompute_ref_log_probs: true, or use deepspeed: zero2",
        ),
        (
            bool(a["fsdp"]) and not a["lora"] and not a["precompute_ref_log_probs"],
            "fsdp: the reference of a fully tuned model is a second one; set precompute_ref_log_probs: true, or use deepspeed: zero3",
        ),
        (a["row_report"] == "images", "row_report: images is for supervised rows; evaluation scores pairs with blank images (ablation_pairs)"),
        (a["share_prefix"], "share_prefix: both answers of a pair share their prompt always; the key is for supervised rows"),
        (a["label_policy"] != "assistant", "label_policy: a preference is about the last answer alone; leave the key out"),
        (a["prompt_style"] == "plain", "prompt_style: plain leaves questions out, so that nothing can be preferred; choose another one"),
    ]
    problems = [f"loss_type: {kind!r} is not known{did_you_mean(kind, LOSS_TYPES)}; expected some of {expected}" for kind in unknown]
    return problems + [message for holds, message in pairs if holds]
