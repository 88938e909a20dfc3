"""Shows what the model will see of every row: a page with images at their place and supervised tokens marked; lengths, counts, reasons. Trains nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.arguments import read_command_line, split_words
from interlace.errors import InputError, run_script

if TYPE_CHECKING:  # slow to import: only once the arguments are right
    from interlace.data.ledger import Ledger
    from interlace.data.reading import Record
    from interlace.data.sources import Source
    from interlace.data.store import Store
    from interlace.model.processing import Processing

OPTIONS = {
    "output": "Where the HTML page goes; preview.html, unless only --json is asked for.",
    "samples": "How many rows the page shows, of every status, file and number of images; 50 unless said otherwise.",
    "json": "Write one line per row: file, index, status, reason, length, num_images, input_ids, labels (or prompt_ids, chosen_ids, rejected_ids).",
}


def main() -> None:
    arguments, options = read_command_line(__doc__ or "", OPTIONS)
    output = options["output"] or (None if options["json"] else "preview.html")
    num_samples = check_options(output, options["json"], options["samples"] or "50")
    from tqdm import tqdm

    from interlace.data.dataset import describe_formats, open_rows
    from interlace.data.preview import Summary, Viewer, page
    from interlace.data.reading import Headers, wanted_kind
    from interlace.data.sources import read_entries
    from interlace.model.loading import resolve_model_path
    from interlace.training.parts import processing_of, row_reader

    processing = processing_of(resolve_model_path(arguments["model_name_or_path"]), arguments)
    sources = read_entries(arguments["dataset"]["train"], arguments["seed"])
    reader = row_reader(arguments, processing, wanted_kind(sources))
    rows, ledger = open_rows(sources, reader, arguments, show_progress=True)
    print("\n".join(describe_formats(rows.stores)))
    print("\n".join(filter(None, (ledger.summary(), ledger.too_long_warning(arguments["max_length"])))))
    if len(rows):
        lengths, share = rows.lengths, rows.supervised.sum() / rows.lengths.sum()
        print(f"lengths in tokens: shortest {lengths.min()}, mean {lengths.mean():.0f}, longest {lengths.max()}; {share:.1%} of all tokens are supervised")
    for _, entry in zip(range(20), ledger.entries, strict=False):
        print(f"  {entry.status}: {entry.file}: row {entry.index}: {entry.reason}: {entry.detail}")
    if options["json"]:
        write_lines(rows.stores, Path(options["json"]), processing)
    if output:
        headers = Headers()
        images: Any = processing.image_processor
        mean, std = (images.image_mean, images.image_std) if images.do_normalize else ([0.0] * 3, [1.0] * 3)
        viewer = Viewer(processing.process_images, processing.images.picture, mean, std, processing.config.image_token_id, processing.images.ids)
        records = tqdm(chosen_records(sources, rows.stores, ledger, num_samples), desc="drawing rows", unit="row", leave=False)
        shown = [viewer.shown(reader.read(record, headers), headers) for record in records]
        model, config = str(arguments["model_name_or_path"]), split_words(sys.argv[1:])[0][0]
        summary = Summary(config, model, arguments["max_length"], ledger, rows.lengths, rows.num_images, rows.supervised)
        Path(output).write_text(page(shown, summary, processing.tokenizer), encoding="utf-8")
        print(f"{len(shown)} of {ledger.rows:,} rows in {output}", file=sys.stderr)


def check_options(output: str | None, lines: str | None, samples: str) -> int:
    """The number of samples.

    Raises:
        InputError: no number, or a folder that does not exist.
    """
    problems = [] if samples.isdecimal() and int(samples) else [f"--samples: expected a number above 0, got {samples!r}"]
    for name, path in (("output", output), ("json", lines)):
        if path and not Path(path).resolve().parent.is_dir():
            problems.append(f"--{name} {path}: no such folder")
        elif path and Path(path).is_dir():
            problems.append(f"--{name} {path}: is a folder; expected a file")
    if problems:
        raise InputError("\n  ".join(problems))
    return int(samples)


def write_lines(stores: list["Store"], path: Path, processing: "Processing") -> None:
    """Writes one line for every row of the stores, in order."""
    from interlace.data.preview import preview_line
    from interlace.data.store import SKIPPED, TRAINED

    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a file name may hold bytes that are no text
        for store in stores:
            entries = store.entries()
            for position, status in enumerate(store.column("status").tolist()):
                row, entry = None if status == SKIPPED else store.row(position), None if status == TRAINED else next(entries)
                line = preview_line(store.file, row, entry, processing.config.image_token_id, processing.images.ids)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{sum(map(len, stores)):,} rows in {path}", file=sys.stderr)


def chosen_records(sources: list["Source"], stores: list["Store"], ledger: "Ledger", most: int) -> list["Record"]:
    """The records of the rows to show, read anew from their files."""
    import numpy as np

    from interlace.data.preview import choose
    from interlace.data.reading import records_of
    from interlace.data.store import TRAINED

    status, index, num_images = (np.concatenate([store.column(name) for store in stores]) for name in ("status", "index", "num_images"))
    number = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
    reason = np.full(len(status), "", object)
    reason[status != TRAINED] = [entry.reason for entry in ledger.entries]
    chosen = np.array(choose([status, number, num_images, reason], most))
    return list(records_of([replace(source, taken=index[chosen[number[chosen] == i]]) for i, source in enumerate(sources)]))


if __name__ == "__main__":
    run_script(main)
