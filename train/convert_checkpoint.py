"""Converts a model between its authors' layout (lmms-lab, liuhaotian; PaddleMIX's too) and Hugging Face's, or to llama.cpp's files."""

import argparse
from pathlib import Path

from tqdm import tqdm

from interlace.errors import InputError, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, metavar="SRC", help="a model's folder, or a hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DST", help="new or empty")
    targets = "hf: what transformers, vLLM and SGLang read; llava: what the authors' code reads; gguf: what llama.cpp and Ollama read"
    parser.add_argument("--to", required=True, choices=("hf", "llava", "gguf"), help=targets)
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="folder or hub id of the vision tower, where SRC holds none; for a language model alone, which gets a new projector to be pre-trained",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights in GGUF files; default: as they are stored")
    options = parser.parse_args()
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise InputError(f"{options.output} is not empty; choose a new folder")
    if options.vision_tower is not None and options.to != "hf":
        raise InputError(
            f"--vision-tower goes with --to hf only: convert to Hugging Face's layout, which always holds its tower; leave this out with --to {options.to}"
        )
    if options.dtype is not None and options.to != "gguf":
        raise InputError(f"--dtype goes with --to gguf only: --to {options.to} keeps weights as they are")
    from interlace.model.conversion import to_hub, to_original
    from interlace.model.loading import resolve_model_path

    source = resolve_model_path(options.input)
    if options.to == "hf":
        to_hub(source, options.output, options.vision_tower, lambda files: tqdm(files, desc="converting", unit="file"))
    elif options.to == "llava":
        for note in to_original(source, options.output, lambda files: tqdm(files, desc="converting", unit="file")):
            print(note)
    else:
        write_gguf(source, options.output, options.dtype)
    print(f"converted model in {options.output}")


def write_gguf(source: str, output: Path, dtype: str | None) -> None:
    """Says what is to be known about the files."""
    import torch

    try:
        from interlace.model.gguf_files import to_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise InputError('--to gguf needs the package gguf: pip install -e ".[gguf]"') from None
    for note in to_gguf(source, output, getattr(torch, dtype) if dtype else None, lambda tensors: tqdm(tensors, desc="converting", unit="tensor")):
        print(note)


if __name__ == "__main__":
    run_script(main)
