"""Converts a model between its authors' layout (lmms-lab, liuhaotian; PaddleMIX's too) and Hugging Face's."""

import argparse
from pathlib import Path

from tqdm import tqdm

from interlace.errors import InputError, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, metavar="SRC", help="a model's folder, or a hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DST", help="new or empty")
    parser.add_argument("--to", required=True, choices=("hf", "llava"), help="hf: what transformers, vLLM and SGLang read; llava: what the authors' code reads")
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="folder or hub id of the vision tower, where SRC holds none; for a language model alone, which gets a new projector to be pre-trained",
    )
    options = parser.parse_args()
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise InputError(f"{options.output} is not empty; choose a new folder")
    if options.vision_tower is not None and options.to == "llava":
        raise InputError("--vision-tower: Hugging Face's layout always holds its tower; leave this out with --to llava")
    from interlace.model.conversion import to_hub, to_original
    from interlace.model.loading import resolve_model_path

    source = resolve_model_path(options.input)
    if options.to == "hf":
        to_hub(source, options.output, options.vision_tower, lambda files: tqdm(files, desc="converting", unit="file"))
    else:
        to_original(source, options.output, lambda files: tqdm(files, desc="converting", unit="file"))
    print(f"converted model in {options.output}")


if __name__ == "__main__":
    run_script(main)
