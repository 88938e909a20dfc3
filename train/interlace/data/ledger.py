"""The account of every row: trained, shortened or skipped, with file, index and reason."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from interlace.redaction import readable

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
