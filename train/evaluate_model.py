"""Greedy answers of a model or adapter on data with references, and their scores."""

import argparse
from pathlib import Path

from interlace.errors import InputError, run_script

ABLATIONS = ("shuffled", "references", "blanked", "dropped", "swapped")


def main() -> None:
    options = read_options()
    from interlace.inference.comparison import comparison_table, expected, matched, read_earlier, write_comparison
    from interlace.inference.diagnostics import ablate, diagnosis_table, write_diagnosis
    from interlace.inference.evaluation import metrics_table, predict, read_predictions, read_questions, write_scores
    from interlace.inference.generation import load_generator
    from interlace.inference.report import Evaluation, report

    earlier = None if options.compare_with is None else read_earlier(options.compare_with, options.output_dir)
    generator, questions = None, None
    if options.predictions is not None:
        predictions = read_predictions(options.predictions)
    else:
        files = "demo" if options.data_files == ["demo"] else options.data_files
        entry = {"data_files": files, "image_folder": options.image_folder, "split": options.split}
        generator = load_generator(options.model_path, options.dtype, options.load_in_4bit)
        questions = read_questions(entry, generator, options.max_length, options.max_image_pixels)
        if earlier is not None:
            matched(earlier, [expected(question) for question in questions])  # rather now than after hours
        predictions = predict(generator, questions, options.batch_size, options.max_new_tokens)
    earlier = None if earlier is None else matched(earlier, predictions)
    metrics = write_scores(options.output_dir, predictions)
    print(metrics_table(metrics))
    comparison = diagnosis = None
    ablated = []
    if earlier is not None:
        comparison = write_comparison(options.output_dir, earlier, predictions, options.seed)
        print(f"\n{comparison_table(comparison)}")
    if generator is not None and questions is not None and options.diagnose is not None:
        sizes = options.batch_size, options.max_new_tokens, options.diagnose_rows
        ablated = ablate(generator, questions, predictions, options.diagnose or ABLATIONS, *sizes, options.seed)
        diagnosis = write_diagnosis(options.output_dir, ablated, predictions, options.seed)
        print(f"\n{diagnosis_table(diagnosis)}")
    names = str(options.model_path or options.predictions), " ".join(options.data_files or ())
    evaluation = Evaluation(*names, predictions, metrics, questions, str(options.compare_with), earlier, comparison, ablated, diagnosis)
    (options.output_dir / "report.html").write_text(report(evaluation, options.report_rows), encoding="utf-8")
    written = {"predictions.jsonl": True, "metrics.json": True, "comparison.json": comparison, "diagnostics.json": diagnosis, "report.html": True}
    print("\n" + "\n".join(str(options.output_dir / name) for name, there in written.items() if there))


def read_options() -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: options that do not go together, or out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", help='model or adapter folder, hub id, or "demo"')
    parser.add_argument("--data-files", nargs="+", metavar="F", help='files in any training format, or "demo"')
    parser.add_argument("--split", choices=("train", "validation", "test"), help="which set of the demo, with --data-files demo")
    parser.add_argument("--image-folder", metavar="D", help="where image paths start; default: the data file's folder")
    parser.add_argument("--output-dir", required=True, type=Path, help="gets predictions.jsonl, metrics.json and report.html")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these predictions; needs no model")
    parser.add_argument("--compare-with", type=Path, metavar="P", help="an earlier model's predictions.jsonl, or its output folder: which rows changed")
    parser.add_argument("--diagnose", nargs="*", choices=ABLATIONS, metavar="A", help=f"ask again with images changed: {', '.join(ABLATIONS)}; alone: all")
    parser.add_argument("--diagnose-rows", type=int, default=1000, metavar="N", help="how many rows are asked again, evenly from all; 0: all")
    parser.add_argument("--report-rows", type=int, default=100, metavar="N", help="how many rows report.html shows")
    parser.add_argument("--seed", type=int, default=0, help="of --diagnose and of bootstrap intervals")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=32768, help="longest question with its answer, in tokens")
    parser.add_argument("--max-image-pixels", type=int, default=50_000_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    parser.add_argument("--load-in-4bit", action="store_true", help="needs the quantization extra")
    options = parser.parse_args()
    if options.batch_size < 1 or options.max_new_tokens < 1:
        raise InputError("--batch-size and --max-new-tokens: expected at least 1")
    if min(options.diagnose_rows, options.report_rows, options.seed) < 0:
        raise InputError("--diagnose-rows, --report-rows and --seed: expected at least 0")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise InputError(f"{options.output_dir} is a file; expected a folder")
    if options.predictions is None and not (options.model_path and options.data_files):
        raise InputError("expected --model-path and --data-files, or --predictions FILE")
    if options.predictions is not None and options.diagnose is not None:
        raise InputError("--diagnose asks the model; it does not go with --predictions: expected --model-path and --data-files")
    return options


if __name__ == "__main__":
    run_script(main)
