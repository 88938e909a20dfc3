"""The account of every row: trained, shortened or skipped, with file, index and reason."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["trained", "shortened", "skipped"]


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
    """Counts of rows by what became of them; `rows = trained + shortened + skipped`."""

    rows: int = 0
    trained: int = 0
    shortened: int = 0
    skipped: int = 0
    entries: list[Entry] = field(default_factory=list)

    def count(self, entry: Entry | None) -> None:
        """Counts one row: trained as it is (None), or shortened or skipped as its entry says."""
        self.rows += 1
        if entry is None:
            self.trained += 1
            return
        self.entries.append(entry)
        if entry.status == "shortened":
            self.shortened += 1
        else:
            self.skipped += 1

    def summary(self) -> str:
        """One line: totals, and the reasons with their counts."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(entry.reason for entry in self.entries).most_common())
        return f"{self.rows} rows: {self.trained} trained, {self.shortened} shortened, {self.skipped} skipped" + (f" ({reasons})" if reasons else "")

    def write(self, path: Path) -> None:
        """Writes `ledger.json`; its counts must reconcile."""
        assert self.rows == self.trained + self.shortened + self.skipped
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
