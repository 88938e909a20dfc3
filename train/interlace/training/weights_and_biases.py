"""W&B under a run that neither waits for it nor fails with it."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import wandb
from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from interlace.data.media import open_images
from interlace.redaction import readable, tells_secrets
from interlace.training.answering import Example
from interlace.training.checkpoint import REPORT_FILE

STRIP_HEIGHT = 224
RUN_ID_FILE = "wandb_run_id.txt"
INIT_SECONDS, FINISH_SECONDS = 6, 60


class WandbTracker(WandbCallback):
    """W&B that never makes a run wait: what cannot be had online within seconds is written to disk, and a line says how to upload it.

    Logging only hands values to W&B's own process, which writes them to disk and uploads them behind the run's back. A run that resumes goes on with the same
    W&B run: its id is kept in the output folder (`WANDB_RUN_ID` comes first).

    Args:
        record: the resolved arguments without secrets.
        examples: answers of the latest evaluation; filled by the trainer.
    """

    def __init__(self, record: Mapping[str, Any], examples: Sequence[Example] = ()):
        super().__init__()
        self.record, self.examples = dict(record), examples

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **more: Any) -> None:
        """Opens the run, if none is open, and records the configuration."""
        if state.is_world_process_zero and wandb.run is None:
            path = Path(str(args.output_dir)) / RUN_ID_FILE
            kept = path.read_text().strip() if state.global_step and path.is_file() else None
            run_id = os.environ.get("WANDB_RUN_ID") or kept or secrets.token_hex(4)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(run_id + "\n")
            open_wandb(run_id, args.run_name)
        super().setup(args, state, model, **more)
        if state.is_world_process_zero:
            wandb.config.update({"interlace": self.record}, allow_val_change=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:  # type: ignore[override]
        """Shows questions with their images and answers."""
        if state.is_world_process_zero and wandb.run is not None and self.examples:
            table = wandb.Table(columns=["step", "id", "images", "question", "answer", "reference"])
            for example in self.examples:
                images = wandb.Image(side_by_side(open_images(example.images)))  # a column that begins without one would show none
                table.add_data(state.global_step, example.identifier, images, example.question, example.prediction, example.reference)
            wandb.log({"eval/answers": table}, commit=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:  # type: ignore[override]
        """Hands the run's report over, if there is one, and closes the run; what W&B has not taken within a minute stays on disk."""
        super().on_train_end(args, state, control, **more)
        if wandb.run is not None:
            page = None if args is None else Path(str(args.output_dir)) / REPORT_FILE
            if page is not None and page.is_file():
                wandb.run.log({"report": wandb.Html(str(page), inject=False)})
            folder = wandb.run.settings.sync_dir
            try:
                wandb.run.finish()
            except TimeoutError:
                tqdm.write(f"W&B did not take everything within {FINISH_SECONDS} seconds; upload the rest with: wandb sync {folder}")


def side_by_side(images: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Images in order in one strip, each at most `STRIP_HEIGHT` pixels high; a white dot for none."""
    small = [image.resize((max(1, image.width * min(STRIP_HEIGHT, image.height) // image.height), min(STRIP_HEIGHT, image.height))) for image in images]
    strip = PIL.Image.new("RGB", (max(sum(image.width + 4 for image in small) - 4, 1), max((image.height for image in small), default=1)), "white")
    place = 0
    for image in small:
        strip.paste(image, (place, 0))
        place += image.width + 4
    return strip


def open_wandb(run_id: str, name: str | None) -> None:
    """Opens the W&B run `run_id` within ten seconds: online, or offline where it has no key or the server does not answer."""
    # W&B's own crash reports hold up the end of every run by ten seconds where there is no way out of the network, and could hold anything
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    settings = wandb.Settings(
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        silent=True,
        x_disable_meta=tells_secrets(sys.argv),  # W&B's record of the command line can only be left out as a whole
    )
    project, reason = os.environ.get("WANDB_PROJECT", "huggingface"), ""
    try:
        if wandb.setup(wandb.Settings(silent=True)).settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.Error("no API key; `wandb login` keeps one")
        run = wandb.init(project=project, id=run_id, name=name, resume="allow", settings=settings)
    except (wandb.Error, OSError) as error:
        reason = f" ({readable(str(error).splitlines()[0])})"
        wandb.teardown()  # W&B's process still holds the id for the run that it could not open
        run = wandb.init(project=project, id=run_id, name=name, mode="offline", settings=settings)
    if run.offline:
        tqdm.write(f"W&B is offline{reason}; upload later with: wandb sync {run.settings.sync_dir}")
    elif run.url:
        tqdm.write(f"W&B: {run.url}")
