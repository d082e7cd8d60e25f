"""What `pairmill verify` can find."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Kind(str, Enum):
    """What is wrong with a file."""

    FLIPPED = "flipped"
    """Its bytes are not those that the checksum in its name stands for."""
    TRUNCATED = "truncated"
    """It is shorter than the log says."""
    MISSING = "missing"
    UNREADABLE = "unreadable"
    """It is no Parquet file, no checkpoint, or no log, whatever its size."""
    TORN_COMMIT = "torn_commit"
    """A commit record that is not whole."""
    LOG_GAP = "log_gap"
    """A commit record, or a whole log, that is not there."""
    MISMATCH = "mismatch"
    """The log says of a whole file what is not so: a flipped byte in the log."""
    ORPHAN = "orphan"
    """A data file that no version names: harmless, a run that was killed may leave some."""
    LEFTOVER = "leftover"
    """An unfinished file, a mark, or a record that was set aside: harmless."""

    __str__ = str.__str__


HARMLESS = frozenset({Kind.ORPHAN, Kind.LEFTOVER})
"""What is no damage."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: Kind
    table: str
    """Empty for what belongs to no table."""
    shard: int | None
    """Null for what belongs to no shard."""
    path: str
    """Below the dataset's folder."""
    current: bool
    """Whether the latest version of the table needs it."""
    snapshots: tuple[int, ...]
    """Published snapshots that need it."""
    detail: str
    size: int = 0
    """Bytes of what is there; 0 when nothing is."""
    version: int | None = None
    """The version whose commit record, or checkpoint, is at fault; null where it is a data file."""

    @property
    def damage(self) -> bool:
        """Whether it is damage, or harmless."""
        return self.kind not in HARMLESS


@dataclass(frozen=True)
class Integrity:
    """What an examination found."""

    findings: tuple[Finding, ...]
    """Damage first, then what is harmless."""
    tables: int
    snapshots: tuple[int, ...]
    files: int
    """Data files that versions name, looked at."""
    bytes: int
    """Their size by the log."""
    unnamed: int
    """Among them: files without a checksum in their name. Only that they can be read is known of them."""
    quick: bool
    """Whether presence and size were all that was looked at."""
    seconds: float = 0.0
    whole: frozenset[str] = field(default=frozenset(), repr=False)
    """Paths of the files whose bytes were found whole."""

    @property
    def damage(self) -> tuple[Finding, ...]:
        """The findings that are damage."""
        return tuple(f for f in self.findings if f.damage)

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong."""
        return any(f.damage for f in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Findings by kind."""
        return dict(sorted(Counter(f.kind.value for f in self.findings).items()))

    def total(self, kind: Kind) -> int:
        """Bytes of the findings of one kind."""
        return sum(f.size for f in self.findings if f.kind is kind)


def only_old(finding: Finding) -> bool:
    """Whether only published snapshots need it, and the latest versions do not."""
    return not finding.current and bool(finding.snapshots)
