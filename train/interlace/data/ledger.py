"""The account of every row: trained, shortened or skipped, with file, index and reason."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from interlace.errors import InputError
from interlace.redaction import readable

Status = Literal["trained", "shortened", "skipped"]
EXCLUDED = "excluded_by_list"  # the reason of rows that the user leaves out
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A row that was not simply trained. `index` counts from 0 in `file`; `reason` is a short word, `detail` a sentence."""

    file: str
    index: int
    status: Status
    reason: str
    detail: str


@dataclass
class Ledger:
    """Counts of rows by what became of them, `rows = trained + shortened + skipped`; `entries` may be iterated again and again."""

    rows: int = 0
    trained: int = 0
    shortened: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    entries: Iterable[Entry] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry | None]) -> "Ledger":
        """The ledger of rows that were trained as they are (None), shortened or skipped as their entries say."""
        known = list(entries)
        changed = [entry for entry in known if entry is not None]
        status = Counter(entry.status for entry in changed)
        reasons = Counter(entry.reason for entry in changed)
        return cls(len(known), len(known) - len(changed), status["shortened"], status["skipped"], reasons, changed)

    def summary(self) -> str:
        """One line: totals, and the reasons with their counts."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        return f"{self.rows:,} rows: {self.trained:,} trained, {self.shortened:,} shortened, {self.skipped:,} skipped" + (f" ({reasons})" if reasons else "")

    def too_long_warning(self, max_length: int) -> str:
        """One line where more than a tenth of the rows is too long: how many, the longest, and what to set; "" where not."""
        count = self.reasons["too_long"]
        if count <= self.rows / 10:
            return ""
        found = (re.search(r"(\d+) tokens", entry.detail) for entry in self.entries if entry.reason == "too_long")
        longest = max(int(match[1]) for match in found if match)
        return (
            f"WARNING: {count:,} of {self.rows:,} rows are too long for max_length {max_length:,} and were shortened or left out; the longest has {longest:,} "
            f"tokens: set max_length to {longest} to keep all of them (as far as the model's context goes), or give images fewer tokens (image_aspect_ratio, "
            "max_pixels, num_frames)"
        )

    def write(self, path: Path) -> None:
        """Writes `ledger.json`, whole or not at all; its counts must reconcile."""
        assert self.rows == self.trained + self.shortened + self.skipped
        scratch = path.with_name(f".{path.name}")
        counts = {name: getattr(self, name) for name in ("rows", "trained", "shortened", "skipped")}
        with scratch.open("w", encoding="utf-8") as file:
            file.write("{" + "".join(f"\n {json.dumps(name)}: {count}," for name, count in counts.items()) + '\n "entries": [')
            for number, entry in enumerate(self.entries):
                text = json.dumps(asdict(entry), ensure_ascii=False)
                file.write(f"{',' if number else ''}\n  {readable(text) if '://' in text else text}")
            file.write("\n ]\n}\n")
        scratch.replace(path)


def check_ledger(ledger: Ledger, too_long: str, bad_rows: Literal["error", "skip"], max_bad_rows: int | None) -> None:
    """Holds the ledger against the policy; over-long rows are no bad rows, nor are those that a list leaves out.

    Raises:
        InputError: bad rows (or over-long ones) that the policy does not allow, listed with file and index; or no row is left.
    """
    skipped = Counter(entry.reason for entry in ledger.entries if entry.status == "skipped")
    too_long_rows, _ = skipped.pop("too_long", 0), skipped.pop(EXCLUDED, 0)
    bad, long = skipped.total(), too_long_rows if too_long == "error" else 0
    allowed = 0 if bad_rows == "error" else bad if max_bad_rows is None else max_bad_rows
    if bad > allowed or long:
        fatal = [
            e
            for e in ledger.entries
            if e.status == "skipped" and ((e.reason == "too_long" and long) or (e.reason not in ("too_long", EXCLUDED) and bad > allowed))
        ]
        lines = [f"{entry.file}: row {entry.index}: {entry.reason}: {entry.detail}" for entry in fatal[:_SHOWN]]
        more = f"\n  and {len(fatal) - _SHOWN:,} more" if len(fatal) > _SHOWN else ""
        remedy = "mend them, or set bad_rows: skip to leave them out and list them" if bad_rows == "error" else f"max_bad_rows is {max_bad_rows}"
        raise InputError(f"{len(fatal):,} of {ledger.rows:,} rows cannot be used; {remedy}\n  " + "\n  ".join(lines) + more)
    if ledger.rows == ledger.skipped:
        raise InputError(f"no row is left to use: {ledger.summary()}")
