"""Pre-flight of a run: checks every row and file, forecasts steps, memory, time and disk, says what to change where it would not fit. Trains nothing."""

import json
import re
import sys
from pathlib import Path

from interlace.arguments import read_command_line, split_words
from interlace.errors import InputError, run_script
from interlace.redaction import without_secrets

OPTIONS = {
    "json": "Write the forecast as JSON to this file.",
    "plot": "Draw the histograms of tokens and images to this picture (PNG, SVG or PDF).",
    "devices": "How many devices the run is to have; 1 unless said otherwise.",
    "probe": "Seconds to spend on measuring the speed of this machine; 30 unless said otherwise; 0 for none, then no time is forecast.",
    "fit": "A device's memory (24GiB; a GPU's, unless use_cpu is true), or `machine`: find a configuration that fits it, and write it.",
    "output": "Where the configuration of --fit goes; NAME_fit.json beside CONFIG.json unless said otherwise.",
}
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def main() -> None:
    arguments, options = read_command_line(__doc__ or "", OPTIONS)
    fit_bytes, devices, probe_seconds = check_options(options)
    from interlace.model.costs import step_costs
    from interlace.model.loading import resolve_model_path
    from interlace.training import plan_text, preflight
    from interlace.training.fitting import config_of
    from interlace.training.forecast import machine_of
    from interlace.training.outline import empty_model
    from interlace.training.parts import processing_of, training_arguments
    from interlace.training.planning import training_plan

    args = training_arguments({**arguments, "deepspeed": None, "fsdp": None})  # one process speaks for all
    path = resolve_model_path(arguments["model_name_or_path"])
    processing = processing_of(path, arguments)
    checked, problems = preflight.check_data(arguments, path, processing)
    rows, machine = checked["training"].rows, machine_of(args.use_cpu)
    plan_text.show(*(plan_text.describe_rows(name, part, arguments["max_length"]) for name, part in checked.items()))
    if not len(rows):
        raise InputError("\n  ".join(problems))
    plan_text.show(plan_text.histogram("tokens per row", rows.lengths), plan_text.histogram("images per row", rows.num_images))
    plan = training_plan(rows, processing.config, step_costs(empty_model(processing.config, arguments)), arguments, args)
    if options["plot"]:
        plan_text.draw_histograms(options["plot"], rows, arguments["max_length"])
    forecast = preflight.forecast_run(rows, plan, arguments, args, processing.config, devices)
    plan_text.show(plan_text.describe_steps(forecast), plan_text.describe_memory(forecast, machine))
    speed = preflight.measure_speed(path, rows, forecast, arguments, args, processing, probe_seconds) if probe_seconds and forecast.fits(machine) else None
    plan_text.show(plan_text.describe_time(forecast, speed), plan_text.describe_disk(forecast.disk, Path(arguments["output_dir"])))
    result = plan_text.as_json(checked["training"], forecast, machine, speed)
    if options["fit"] or not forecast.fits(machine):
        target = machine_of(arguments["use_cpu"], fit_bytes) if fit_bytes else machine
        source = Path(split_words(sys.argv[1:])[0][0])
        output = Path(options["output"] or source.with_name(f"{source.stem}_fit.json")) if options["fit"] else None
        try:
            fit = preflight.search_fit(arguments, processing.config, rows, devices, target)
        except InputError as error:
            problems.append(str(error))
        else:
            plan_text.show(plan_text.describe_fit(fit, arguments, target, output))
            result["fit"] = {"changes": fit.changes, "memory_bytes": fit.memory.total}
            if output is not None:
                config = config_of(without_secrets({**arguments, **fit.changes}))
                output.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if problems:
        raise InputError("\n  ".join(problems))


def check_options(options: dict[str, str | None]) -> tuple[int | None, int, float]:
    """(bytes of --fit, or None for this machine; devices; seconds of the probe).

    Raises:
        InputError: what cannot be read, or a file whose folder does not exist.
    """
    problems = []
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MIB|GIB)", (options["fit"] or "").upper())
    if options["fit"] not in (None, "machine") and size is None:
        problems.append(f"--fit: expected a size such as 24GiB, or machine; got {options['fit']!r}")
    devices, seconds = options["devices"] or "1", options["probe"] or "30"
    if not devices.isdecimal() or not int(devices):
        problems.append(f"--devices: expected a number above 0, got {devices!r}")
    if not re.fullmatch(r"\d+(\.\d+)?", seconds):
        problems.append(f"--probe: expected seconds, got {seconds!r}")
    if options["output"] and not options["fit"]:
        problems.append("--output goes with --fit")
    for name in ("json", "plot", "output"):
        path = options[name]
        if path and (not Path(path).resolve().parent.is_dir() or Path(path).is_dir()):
            problems.append(f"--{name} {path}: expected a file in a folder that exists")
    if options["plot"] and Path(options["plot"]).suffix not in (".png", ".svg", ".pdf"):
        problems.append(f"--plot {options['plot']}: expected .png, .svg or .pdf")
    if problems:
        raise InputError("\n  ".join(problems))
    return (round(float(size[1]) * UNITS[size[2]]) if size else None), int(devices), float(seconds)


if __name__ == "__main__":
    run_script(main)
