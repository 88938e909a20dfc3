"""Interlace's own argument keys, as plain dataclasses without heavy imports.

`argument_schema.json` is generated from these and from Hugging Face's `TrainingArguments`; `arguments.py` checks the user's JSON against that file.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help and JSON Schema limits (`minimum`, `exclusiveMinimum`, `maximum`)."""
    metadata = {"help": help, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DatasetEntry:
    """One entry of `dataset.train` or `dataset.eval`."""

    data_files: str | list[str] = key(
        "", 'A path, a list of paths, a glob, a brace list, a yaml mixture, a folder that `datasets` saved, a hub data set, or "demo".'
    )
    name: str | None = key(None, "A name for logs and metrics; PaddleMIX's `chatml_dataset` also sets the format.")
    format: Literal["llava", "chatml", "messages", "swift", "alpaca", "prompt_completion", "preference"] | None = key(
        None, "The record format; without it, each row's own keys tell."
    )
    chat_template: str | None = key(None, "A json file with the form of turns, as PaddleMIX has them; the same in all entries, in place of prompt_style.")
    image_folder: str | None = key(None, "Where image paths start; without it, the data file's folder.")
    video_folder: str | None = key(None, "Where video paths start; without it, image_folder.")
    media_roots: list[str] = key([], "Further folders that media paths may point into.")
    split: str | None = key(None, 'Which split of a hub data set, or of the demo: "pretrain", "train", "validation", "test".')
    subset: str | None = key(None, "Which configuration of a hub data set.")
    weight: float = key(1.0, "How often each row comes in an epoch; a fraction is that share of the rows, drawn anew each epoch.", exclusiveMinimum=0)
    sampling_strategy: str = key("all", "`all`, `first:N`, `end:N`, `random:N`; N may be a percentage such as `10%`.")
    exclude_rows: str | None = key(None, "A list of rows to leave out, as `row_drop.json` of an earlier run's output_dir is.")


@dataclass
class ModelFields:
    """Which model, and which of its parameters learn."""

    model_name_or_path: str = key("", 'Hub id, or a local directory, in Hugging Face layout or in that of the authors; "demo" for the embedded model.')
    trust_remote_code: bool = key(False, "Run code that ships with a model. Only you can open this door.")
    lora: bool = key(False, "Train a LoRA adapter on the language model instead of all its weights.")
    lora_rank: int = key(8, "Rank of the adapter.", minimum=1)
    lora_alpha: float = key(16, "Scale of the adapter: alpha / rank.", exclusiveMinimum=0)
    lora_dropout: float = key(0.05, "Dropout before the adapter.", minimum=0, exclusiveMaximum=1)
    lora_target_modules: str | list[str] | None = key(
        None, "Names of linear layers, or regular expressions that match whole module names; default: all linear layers of the language model."
    )
    lora_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "Type of the adapter's weights and of their optimizer state; bfloat16 saves memory and rounds small steps away."
    )
    lora_init: str | None = key(
        None,
        "What a new adapter begins with: by default nothing; `pissa` (PiSSA): the principal part of the weights, of which the base keeps the rest; "
        "`pissa_niter_N`: the same by a fast decomposition in N iterations, 16 being close. It is saved as a LoRA adapter of twice the rank on the whole base.",
    )
    lora_path: str | None = key(None, "An adapter to continue from; its rank, alpha and targets stay.")
    use_rslora: bool = key(False, "Rank-stabilised LoRA: scale by alpha / sqrt(rank).")
    use_dora: bool = key(False, "DoRA: learn magnitude and direction apart.")
    loraplus_lr_ratio: float | None = key(None, "LoRA+: the adapter's second matrices (B) learn this many times as fast; 16 is its authors' choice.", minimum=1)
    load_in_4bit: bool = key(False, "Keep the frozen language model in 4 bits (QLoRA); needs the `quantization` extra.")
    load_in_8bit: bool = key(False, "Keep the frozen language model in 8 bits; needs the `quantization` extra.")
    tunable_parts: str | list[str] = key(
        "projector,language_model", "Which of `vision_tower`, `projector`, `language_model` learn. Under LoRA the language model's part is the adapter."
    )
    freeze_include: str | list[str] = key([], "Globs on parameter names; what matches stays frozen.")
    freeze_exclude: str | list[str] = key([], "Globs on parameter names that `freeze_include` leaves alone.")
    projector_learning_rate: float | None = key(None, "Learning rate of the projector; default: learning_rate.", minimum=0)
    vision_tower_learning_rate: float | None = key(None, "Learning rate of the vision tower; default: learning_rate.", minimum=0)
    feature_cache: Literal["off", "memory", "disk", "auto"] = key(
        "off", "Keep what a frozen vision tower makes of each image, for later epochs: in memory, or below cache_dir for later runs too; `auto`: where it pays."
    )
    feature_cache_gib: float = key(32.0, "How much the feature cache may hold: on each host in memory, or in all on disk.", exclusiveMinimum=0)
    activation_offloading: bool = key(False, "Keep activations in the host's memory between forward and backward pass: slower, for longer rows; on GPUs.")
    vision_gradient_checkpointing: bool | None = key(None, "Recompute the vision tower's activations when it trains; default: as gradient_checkpointing.")
    attention: Literal["auto", "sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3"] = key(
        "auto", "Attention of the packed forward pass: per-segment SDPA on CPUs; on a GPU the first kernel that is there and gives the right result."
    )


@dataclass
class DataFields:
    """Which rows, and what becomes of them."""

    dataset: dict[str, Any] = key({}, "`train`: a list of entries; `eval`: a list of entries.")
    max_length: int = key(4096, "Longest row in tokens, an image counted as all of its tokens.", minimum=2)
    too_long: Literal["drop_turns", "drop_row", "error", "fewer_frames"] = key(
        "drop_turns", "What to do with a longer row: drop whole turns from its end, skip it, stop, or first take fewer frames of its videos."
    )
    bad_rows: Literal["error", "skip"] = key(
        "error", "What to do with a bad row (missing or broken file, wrong placeholders, nothing to learn): stop, or leave it out and list it."
    )
    max_bad_rows: int | None = key(None, "With bad_rows `skip`: stop all the same above this number.", minimum=0)
    max_image_pixels: int = key(50_000_000, "Images with more pixels are bad: their header alone is read.", minimum=1, maximum=178_956_970)
    num_frames: int = key(16, "Frames of a video, evenly spread; each counts as an image.", minimum=1)
    video_fps: float | None = key(None, "Frames per second of a video instead, num_frames at most.", exclusiveMinimum=0)
    image_aspect_ratio: str | None = key(
        None,
        "How images become the model's size: `squash` or `pad` (to a square, with the mean colour); for models that cut them into tiles "
        "`anyres` or `anyres_max_N`; default: the model's own.",
    )
    min_pixels: int | None = key(None, "Qwen-VL: an image with fewer pixels grows to so many; default: the model's own bound.", minimum=1)
    max_pixels: int | None = key(
        None, "Qwen-VL: an image with more pixels shrinks to so many, which bounds its tokens; default: the model's own bound.", minimum=1
    )
    allow_urls: bool = key(False, "Download images and videos that the data names by URL, into cache_dir. Only you can open this door.")
    allowed_url_hosts: list[str] = key([], "The only hosts to download from, private ones included; none: every host with a public address.")
    cache_dir: str | None = key(None, "Where checked rows, embedded media and downloads are kept; default: $INTERLACE_CACHE, else ~/.cache/interlace.")
    preprocessing_num_workers: int | None = key(None, "Processes that check rows before training; default: one per core, 16 at most.", minimum=0)
    prompt_style: Literal["chatml", "vicuna_v1", "mistral", "llama_3", "internvl", "smolvlm", "gemma", "plain", None] = key(
        None,
        "How turns are written; `plain` learns captions and leaves questions out (projector pre-training); default: the model's own, by its tokenizer and the "
        "chat template that comes with it.",
    )
    system_prompt: str | None = key(None, 'System prompt of rows that have none; default: the model\'s own, else that of prompt_style; "" for none.')
    image_placement: Literal["interleaved", "in_front", "mixed", "llava_next", None] = key(
        None,
        "Where the images of a turn stand: where the data has them, before its text, some rows so and some so, or by LLaVA-NeXT's rule; "
        "default: the model's own, else interleaved.",
    )
    image_placement_ratio: float | None = key(None, "With image_placement mixed: share of rows with images in front; default 0.5.", minimum=0, maximum=1)
    newline_after_image: bool | None = key(None, "A line break, a token of its own, behind every image; default: the model's own, else false.")
    label_policy: Literal["assistant", "llava_next", "last_turn"] = key(
        "assistant", "Which tokens are supervised: every answer, LLaVA-NeXT's rule, or the last answer."
    )
    packing: bool = key(True, "Fill micro-batches up to max_tokens_per_batch; without it, per_device_train_batch_size rows each.")
    max_tokens_per_batch: int | None = key(
        None, "Tokens per micro-batch, the longest row at least; default: per_device_train_batch_size times the mean length.", minimum=1
    )
    share_prefix: bool = key(
        False, "Rows of a micro-batch that begin with the same images and text compute them once: many questions about one video, scene or page."
    )
    max_rows_per_prefix: int = key(8, "With share_prefix: how many such rows may come together; the more, the faster and the more alike a batch.", minimum=2)
    eval_generate: bool = key(
        False, "At every evaluation also answer some of dataset.eval's rows, and score the answers as evaluate_model.py does: eval_score."
    )
    eval_generate_rows: int = key(200, "With eval_generate: how many rows, evenly spread over dataset.eval.", minimum=1)
    eval_generate_max_new_tokens: int = key(128, "With eval_generate: longest answer, in tokens.", minimum=1)
    row_report: Literal["off", "losses", "images"] = key(
        "losses",
        "What supervised training says of single rows at its end: the loss of each in every epoch, duplicates, likely mislabels; with `images` also, for some "
        "rows, how much they lose with blank images, which costs forward passes.",
    )
    row_report_images: int = key(512, "How many rows with images row_report `images` looks at.", minimum=1)
    overwrite_output_dir: bool = key(False, "Start over in an output_dir that already holds a run.")


@dataclass
class PreferenceFields:
    """Preference tuning alone; names and meanings of all but the last two are those of `trl.DPOConfig`."""

    beta: float = key(0.1, "How closely the policy is held to the reference; the larger, the closer.", exclusiveMinimum=0)
    loss_type: str | list[str] = key(
        ["sigmoid"], "A loss, or several that are added up: DPO's `sigmoid`, `ipo`, `hinge`, `robust`, .., `sft` for a plain term."
    )
    loss_weights: list[float] | None = key(None, "Weights of the losses of loss_type; default: 1 each.")
    label_smoothing: float = key(0.0, "Share of pairs taken to be the wrong way round (`robust`), or epsilon of `exo_pair`.", minimum=0, maximum=1)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = key(
        "reverse_kl", "What keeps the policy at the reference (f-DPO)."
    )
    f_alpha_divergence_coef: float = key(0.5, "alpha of `alpha_divergence`.")
    ld_alpha: float | None = key(None, "LD-DPO: weight of the tokens by which one answer is longer than the other.", minimum=0, maximum=1)
    use_weighting: bool = key(False, "WPO: weigh pairs by how likely the policy is to say them.")
    discopop_tau: float = key(0.05, "Temperature of loss_type `discopop`.", exclusiveMinimum=0)
    disable_dropout: bool = key(True, "No dropout in policy and reference: it would make rewards of what is no preference.")
    precompute_ref_log_probs: bool = key(False, "Compute the reference's log-probs once before training, and keep them for later runs.")
    precompute_ref_batch_size: int | None = key(None, "Pairs per micro-batch then, on average; default: as in training.", minimum=1)
    reference_dir: str | None = key(None, "Where precomputed log-probs are kept; default: below cache_dir, named by all that they rest on.")
    ablation_pairs: int = key(128, "How many evaluation pairs are scored with blank images, and with those of another pair, too; 0 for none.", minimum=0)


@dataclass
class SurvivalFields:
    """What happens when something goes wrong; each of the doors is opened by the user alone."""

    on_save_error: Literal["stop", "continue"] = key("stop", "When a checkpoint cannot be written (disk full): end the run, or go on without it.")
    on_non_finite: Literal["stop", "skip"] = key("stop", "When loss or gradient is not finite: end the run with the rows' names, or leave the step out.")
    accept_data_change: bool = key(False, "Resume though the rows or their order are not those that the run began with.")
    allow_partial_resume: bool = key(False, "Resume from a checkpoint that lacks files: optimizer or schedule start afresh then.")
    trust_checkpoint: bool = key(False, "Resume from a checkpoint whose files are not what its manifest says, or that has none.")


FIELD_GROUPS = {"Interlace": (ModelFields, DataFields, SurvivalFields), "Preference tuning": (PreferenceFields,)}
