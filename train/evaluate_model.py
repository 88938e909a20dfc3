"""Greedy answers of a model or adapter on data with references, and their scores; under torchrun, several processes share the rows."""

import argparse
from pathlib import Path

from interlace.errors import InputError, run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help='model or adapter folder, hub id, or "demo"')
    parser.add_argument("--data-files", nargs="+", metavar="F", help='files in any training format, or "demo"')
    parser.add_argument("--split", choices=("train", "validation", "test"), help="which set of the demo, with --data-files demo")
    parser.add_argument("--image-folder", metavar="D", help="where image paths start; default: the data file's folder")
    parser.add_argument("--output-dir", required=True, type=Path, help="gets predictions.jsonl and metrics.json")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these predictions; needs no model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=32768, help="longest question with its answer, in tokens")
    parser.add_argument("--max-image-pixels", type=int, default=50_000_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs the quantization extra")
    parser.add_argument("--load-in-8bit", action="store_true", help="needs the quantization extra")
    options = parser.parse_args()
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise InputError("--batch-size and --max-new-tokens: expected at least 1")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise InputError(f"{options.output_dir} is a file; expected a folder")
    if options.load_in_4bit and options.load_in_8bit:
        raise InputError("--load-in-4bit and --load-in-8bit: expected one of them")
    if options.predictions is None and not (options.model_path and options.data_files):
        raise InputError("expected --model-path and --data-files, or --predictions FILE")
    from interlace.inference.evaluation import metrics_table, predict, read_predictions, read_questions, write_scores
    from interlace.inference.generation import load_generator
    from interlace.inference.partial import PartialPredictions, fingerprint_of
    from interlace.ranks import join

    if options.predictions is not None:
        print(metrics_table(write_scores(options.output_dir, read_predictions(options.predictions))))
    else:
        files = "demo" if options.data_files == ["demo"] else options.data_files
        entry = {"data_files": files, "image_folder": options.image_folder, "split": options.split}
        ranks = join()
        generator = load_generator(options.model_path, options.dtype, options.load_in_4bit, options.load_in_8bit)
        questions = read_questions(entry, generator, options.max_length, options.max_image_pixels, ranks)
        settings = {name: getattr(options, name) for name in ("max_new_tokens", "dtype", "load_in_4bit", "load_in_8bit")}
        partial = PartialPredictions(options.output_dir, fingerprint_of(options.model_path, questions, settings), ranks.rank)
        predictions = predict(generator, questions, options.batch_size, options.max_new_tokens, partial, ranks)
        if not ranks.is_main:
            return
        print(metrics_table(write_scores(options.output_dir, predictions)))
        partial.remove()
    print(f"\n{options.output_dir / 'predictions.jsonl'}\n{options.output_dir / 'metrics.json'}")


if __name__ == "__main__":
    run_script(main)
