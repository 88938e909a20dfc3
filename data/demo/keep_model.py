"""Keeps a freshly trained model as the repository's embedded demo model: `python data/demo/keep_model.py outputs/demo_pretrain`."""

import argparse
import shutil
from pathlib import Path

from interlace.data import demo

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "prompt.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    source = parser.parse_args().trained
    shutil.rmtree(demo.MODEL, ignore_errors=True)
    demo.MODEL.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(source / name, demo.MODEL / name)
    print(f"{sum(path.stat().st_size for path in demo.MODEL.iterdir()) / 1e6:.1f} MB in {demo.MODEL}")


if __name__ == "__main__":
    main()
