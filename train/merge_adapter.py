"""Merges a LoRA adapter into its base: a folder that transformers loads without PEFT, processor and chat template included."""

import argparse
from pathlib import Path

from interlace.errors import InputError, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter-path", required=True, help="a folder with adapter_config.json")
    parser.add_argument("--output-dir", required=True, type=Path, help="new or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights; default: the base model's own")
    options = parser.parse_args()
    if not (Path(options.adapter_path) / "adapter_config.json").is_file():
        raise InputError(f"{options.adapter_path}: no adapter_config.json in this folder; expected what LoRA training saved")
    if options.output_dir.exists() and (not options.output_dir.is_dir() or any(options.output_dir.iterdir())):
        raise InputError(f"{options.output_dir} is not empty; choose a new folder")
    from interlace.model.merging import merge

    for note in merge(options.adapter_path, options.output_dir, options.dtype):
        print(note)
    print(f"merged model in {options.output_dir}")


if __name__ == "__main__":
    run_script(main)
