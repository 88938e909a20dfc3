"""Greedy answers of a model or adapter on data with references, and their scores; under torchrun, several processes share the rows."""

import argparse
from pathlib import Path

from interlace.arguments import did_you_mean
from interlace.errors import InputError, run_script
from interlace.inference.metrics import METRICS
from interlace.inference.predictions import metrics_table, read_predictions, write_scores
from interlace.inference.sampling import check_frames

NAMES = ", ".join(METRICS)
ABLATIONS = ("shuffled", "references", "blanked", "dropped", "swapped")


def main() -> None:
    options = read_options()
    from interlace.inference.comparison import comparison_table, matched, read_earlier, write_comparison
    from interlace.inference.diagnostics import diagnosis_table, write_diagnosis
    from interlace.inference.references import read_expected, with_references
    from interlace.inference.report import Evaluation, write_report

    entry = {"data_files": options.data_files, "image_folder": options.image_folder, "split": options.split}
    earlier = None if options.compare_with is None else read_earlier(options.compare_with, options.output_dir)
    questions, ablated, partials = None, [], ()
    if options.predictions is not None:
        predictions = read_predictions(options.predictions, options.metric, needs_reference=not options.data_files)
        if options.data_files:
            predictions, others = with_references(predictions, read_expected(entry))
            print(f"{others:,} predictions named another reference; the data's count\n" * bool(others), end="")
    else:  # from here on it takes torch
        from interlace.inference.ablations import ablate
        from interlace.inference.choices import rank_choices
        from interlace.inference.evaluation import predict, prediction_of, read_questions
        from interlace.inference.generation import load_generator
        from interlace.inference.partial import kept_answers
        from interlace.ranks import join

        ranks, sizes = join(), (options.batch_size, options.max_new_tokens)
        generator = load_generator(options.model_path, options.dtype, options.load_in_4bit, options.load_in_8bit, options.fsdp)
        questions = read_questions(entry, generator, vars(options), options.metric, ranks)
        if earlier is not None:
            matched(earlier, [prediction_of(question, "") for question in questions])  # rather now than after hours
        if options.rank_choices:
            predictions = rank_choices(generator, questions, options.batch_size, ranks)
        else:
            partials = kept_answers(vars(options), questions, ranks.rank)
            predictions = predict(generator, questions, *sizes, partials[0], ranks)
    earlier, is_main = earlier and matched(earlier, predictions), options.predictions is not None or ranks.is_main
    if is_main:
        metrics = write_scores(options.output_dir, predictions)
        print(metrics_table(metrics))
    if options.diagnose is not None:
        ablated = ablate(generator, questions, predictions, options.diagnose, *sizes, options.diagnose_rows, options.seed, partials[1], ranks)
    if not is_main:
        return
    for partial in partials:
        partial.remove()
    comparison = diagnosis = None
    if earlier is not None:
        comparison = write_comparison(options.output_dir, earlier, predictions, options.seed)
        print(f"\n{comparison_table(comparison)}")
    if options.diagnose is not None:
        diagnosis = write_diagnosis(options.output_dir, ablated, predictions, options.seed)
        print(f"\n{diagnosis_table(diagnosis)}")
    names = str(options.model_path or options.predictions), " ".join(options.data_files or ())
    evaluation = Evaluation(*names, predictions, metrics, questions, str(options.compare_with), earlier, comparison, ablated, diagnosis)
    print("", *write_report(options.output_dir, evaluation, options.report_rows), sep="\n")


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
    parser.add_argument("--output-dir", required=True, type=Path, help="gets predictions.jsonl, metrics.json and evaluation.html")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="score these; needs no model. With --data-files, references come from there")
    parser.add_argument("--metric", metavar="NAME", help=f"of rows without metadata.metric or a known question_type: {NAMES}; default: exact_match")
    parser.add_argument("--rank-choices", action="store_true", help="the likeliest of metadata.choices is the answer; nothing is generated")
    parser.add_argument("--compare-with", type=Path, metavar="P", help="an earlier model's predictions.jsonl, or its output folder: which rows changed")
    parser.add_argument("--diagnose", nargs="*", choices=ABLATIONS, metavar="A", help=f"ask again with images changed: {', '.join(ABLATIONS)}; alone: all")
    parser.add_argument("--diagnose-rows", type=int, default=1000, metavar="N", help="how many rows are asked again, evenly from all; 0: all")
    parser.add_argument("--report-rows", type=int, default=100, metavar="N", help="how many rows evaluation.html shows")
    parser.add_argument("--seed", type=int, default=0, help="of --diagnose and of bootstrap intervals")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=32768, help="longest question with its answer, in tokens")
    parser.add_argument("--max-image-pixels", type=int, default=50_000_000)
    parser.add_argument("--num-frames", type=int, default=16, help="most frames of a video, as in training")
    parser.add_argument("--video-fps", type=float, help="frames per second of a video, as in training")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on an accelerator, else float32")
    for bits in ("4", "8"):
        parser.add_argument(f"--load-in-{bits}bit", action="store_true", help="needs the quantization extra")
    parser.add_argument("--fsdp", action="store_true", help="torchrun's processes share the weights: for a model that does not fit on one GPU")
    options = parser.parse_args()
    check_frames(options.num_frames, options.video_fps)
    options.diagnose = list(ABLATIONS) if options.diagnose == [] else options.diagnose
    problems = {
        f"--metric: no metric {options.metric!r}{did_you_mean(str(options.metric), METRICS)}; expected one of {NAMES}": options.metric not in (None, *METRICS),
        "--batch-size and --max-new-tokens: expected at least 1": min(options.batch_size, options.max_new_tokens) < 1,
        "--diagnose-rows, --report-rows and --seed: expected at least 0": min(options.diagnose_rows, options.report_rows, options.seed) < 0,
        f"{options.output_dir} is a file; expected a folder": options.output_dir.exists() and not options.output_dir.is_dir(),
        "--load-in-4bit, --load-in-8bit and --fsdp: expected one of them": options.load_in_4bit + options.load_in_8bit + options.fsdp > 1,
        "expected --model-path and --data-files, or --predictions FILE": not options.predictions and not (options.model_path and options.data_files),
        "--diagnose and --rank-choices do not go with --predictions": options.predictions and (options.diagnose is not None or options.rank_choices),
        "--rank-choices goes neither with --diagnose nor with --fsdp": options.rank_choices and (options.diagnose is not None or options.fsdp),
    }
    if any(problems.values()):
        raise InputError("\n  ".join(problem for problem, holds in problems.items() if holds))
    return options


if __name__ == "__main__":
    run_script(main)
