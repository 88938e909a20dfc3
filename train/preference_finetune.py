"""Preference tuning (DPO and its family) of an interleaved vision-language model, LoRA or full: one JSON file says everything."""

from interlace.arguments import read_command_line
from interlace.errors import run_script


def main() -> None:
    arguments, _ = read_command_line(__doc__ or "", kind="preference")
    from interlace.training.preference import finetune  # torch and transformers only after the arguments are right

    finetune(arguments)


if __name__ == "__main__":
    run_script(main)
