"""Shows what the model will see of every row: status, length, ids and labels. Trains nothing, writes nothing into output_dir."""

import json
import sys
from pathlib import Path

from interlace.arguments import read_command_line
from interlace.errors import InputError, run_script

OPTIONS = {"json": "Write one line per row: file, index, status, reason, length, num_images, input_ids, labels."}


def main() -> None:
    arguments, options = read_command_line(__doc__ or "", OPTIONS)
    from interlace.data.ledger import Ledger
    from interlace.data.preview import preview_line
    from interlace.data.sources import read_entries
    from interlace.model.loading import load_processing, resolve_model_path
    from interlace.training.supervised import row_reader

    if options["json"] and not Path(options["json"]).resolve().parent.is_dir():
        raise InputError(f"--json {options['json']}: no such folder")
    path = resolve_model_path(arguments["model_name_or_path"])
    processing = load_processing(path, arguments["system_prompt"], arguments["label_policy"], arguments["trust_remote_code"])
    records = read_entries(arguments["dataset"]["train"], arguments["seed"])
    ledger, lengths, lines = Ledger(), [], []
    for outcome in row_reader(arguments, processing).read_all(records, show_progress=True):
        ledger.count(outcome.entry)
        lengths += [] if outcome.row is None else [outcome.row.length]
        if options["json"]:
            lines.append(json.dumps(preview_line(outcome, processing.config.image_token_id), ensure_ascii=False))
    print(ledger.summary())
    if lengths:
        print(f"lengths in tokens: shortest {min(lengths)}, mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}")
    for entry in ledger.entries[:20]:
        print(f"  {entry.status}: {entry.file}: row {entry.index}: {entry.reason}: {entry.detail}")
    if options["json"]:
        Path(options["json"]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} rows in {options['json']}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
