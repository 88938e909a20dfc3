"""Talks to a model or adapter about images: many rounds, images at their places, answers as they come."""

import argparse

from interlace.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help='model or adapter folder, hub id, or "demo"')
    parser.add_argument("--image-file", nargs="+", default=[], metavar="A", help="images for the first question")
    parser.add_argument("--query", help="ask this once and print the answer; <image> marks an image's place")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs the quantization extra")
    options = parser.parse_args()
    from interlace.inference.chat import Dialogue, run_terminal
    from interlace.inference.generation import load_generator

    dialogue = Dialogue(load_generator(options.model_path, options.dtype, options.load_in_4bit), options.max_new_tokens)
    dialogue.attach(options.image_file)
    if options.query is None:
        run_terminal(dialogue)
    else:
        print(dialogue.ask(options.query))


if __name__ == "__main__":
    run_script(main)
