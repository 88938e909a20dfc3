"""Greedy answers of a model or adapter on data with references, and their scores; under torchrun, several processes share the rows."""

import argparse
from pathlib import Path

from interlace.arguments import did_you_mean
from interlace.errors import InputError, run_script
from interlace.inference.metrics import METRICS
from interlace.inference.predictions import metrics_table, read_predictions, write_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help='model or adapter folder, hub id, or "demo"')
    parser.add_argument("--data-files", nargs="+", metavar="F", help='files in any training format, or "demo"')
    parser.add_argument("--split", choices=("train", "validation", "test"), help="which set of the demo, with --data-files demo")
    parser.add_argument("--image-folder", metavar="D", help="where image paths start; default: the data file's folder")
    parser.add_argument("--output-dir", required=True, type=Path, help="gets predictions.jsonl and metrics.json")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="score these predictions; needs no model. With --data-files, references come from there"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help=f"of rows without metadata.metric or a known question_type: {', '.join(METRICS)}; default: exact_match"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=32768, help="longest question with its answer, in tokens")
    parser.add_argument("--max-image-pixels", type=int, default=50_000_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs the quantization extra")
    parser.add_argument("--load-in-8bit", action="store_true", help="needs the quantization extra")
    options = parser.parse_args()
    if options.metric not in (None, *METRICS):
        raise InputError(f"--metric: no metric {options.metric!r}{did_you_mean(options.metric, METRICS)}; expected one of {', '.join(METRICS)}")
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise InputError("--batch-size and --max-new-tokens: expected at least 1")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise InputError(f"{options.output_dir} is a file; expected a folder")
    if options.load_in_4bit and options.load_in_8bit:
        raise InputError("--load-in-4bit and --load-in-8bit: expected one of them")
    if options.predictions is None and not (options.model_path and options.data_files):
        raise InputError("expected --model-path and --data-files, or --predictions FILE")
    files = "demo" if options.data_files == ["demo"] else options.data_files
    entry = {"data_files": files, "image_folder": options.image_folder, "split": options.split}
    if options.predictions is None:
        from interlace.inference.evaluation import check_metrics, predict, read_questions
        from interlace.inference.generation import load_generator
        from interlace.inference.partial import PartialPredictions, fingerprint_of
        from interlace.ranks import join

        ranks = join()
        generator = load_generator(options.model_path, options.dtype, options.load_in_4bit, options.load_in_8bit)
        questions = read_questions(entry, generator, options.max_length, options.max_image_pixels, ranks)
        check_metrics(questions, options.metric)
        settings = {name: getattr(options, name) for name in ("max_new_tokens", "dtype", "load_in_4bit", "load_in_8bit")}
        partial = PartialPredictions(options.output_dir, fingerprint_of(options.model_path, questions, settings), ranks.rank)
        predictions = predict(generator, questions, options.batch_size, options.max_new_tokens, partial, ranks)
        if not ranks.is_main:
            return
    else:
        predictions = read_predictions(options.predictions, options.metric, needs_reference=not files)
        if files:
            from interlace.inference.references import read_expected, with_references

            predictions, others = with_references(predictions, read_expected(entry), options.metric)
            print(f"{others:,} predictions named another reference; the data's count\n" * bool(others), end="")
    print(metrics_table(write_scores(options.output_dir, predictions, options.metric)))
    print(f"\n{options.output_dir / 'predictions.jsonl'}\n{options.output_dir / 'metrics.json'}")


if __name__ == "__main__":
    run_script(main)
