"""Rebuilding what can be rebuilt.

In this order, and each step is atomic, so a repair that was killed leaves the dataset no worse and the next one goes
on: logs; bytes that lie somewhere under another name; records; pairs (from the sources); then the damaged files of
stages and of the ledger are taken out of the latest versions, what depends on them first, and a refresh computes their
rows again.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.answers import ANSWERS_TABLE
from pairmill.errors import ConfigError, SourceError, StoreError
from pairmill.integrity import pairs
from pairmill.integrity.examine import Examination, holds_records, is_stage_table, walk
from pairmill.integrity.findings import Finding, Integrity, Kind, only_old
from pairmill.integrity.logs import LAST_CHECKPOINT, LOG, PUBLISH, LogProblem, Mender, set_aside
from pairmill.plan import Plan, compile_plan
from pairmill.report.progress import Reporter
from pairmill.run import load_config, load_recipe, refresh
from pairmill.seen import SEEN
from pairmill.store import (
    HISTORY_TABLE,
    LEDGER_TABLE,
    PAIRS_TABLE,
    REWRITES,
    REWRITES_TABLE,
    SNAPSHOTS_TABLE,
    DataFile,
    Dataset,
    checksum_of,
    open_delta,
    read_files,
    without_rows,
)
from pairmill.tombstones import TOMBSTONES_TABLE
from schemas import fields

if TYPE_CHECKING:
    from pairmill.run import RunReport
    from schemas.config import RunConfig

MAY_DIFFER = frozenset({fields.IMAGE.name, fields.CAPTIONS.name})
"""Columns that come out differently when they are made again: images are fetched anew, captioners may answer otherwise.
What was measured of them has to go with them."""


ROUNDS = 6
"""How often damage may come to light by mending other damage."""


@dataclass(frozen=True)
class Loss:
    """What cannot be rebuilt."""

    table: str
    shard: int | None
    path: str
    detail: str
    uids: tuple[str, ...] = ()
    """Pairs that the sources hold no more."""
    accepted: bool = False
    """Whether it was given up (``accept_loss``)."""


@dataclass
class Repair:
    """What a repair did."""

    before: Integrity
    after: Integrity
    done: list[str]
    """One line a step."""
    lost: list[Loss]
    run: RunReport | None = None
    """The refresh that computed what was lacking; null when none was needed, or none possible."""


def repair(
    dataset: Dataset,
    reporter: Reporter,
    *,
    accept_loss: bool = False,
    config: str | None = None,
    overrides: Sequence[str] = (),
    wait_s: float = 0.0,
) -> Repair:
    """Find damage and rebuild what can be rebuilt; say what cannot.

    Args:
        dataset: The dataset.
        reporter: Told how it goes.
        accept_loss: Give up rows and records that nothing can rebuild. Without it they are named and left as they are.
        config: Path of a config with which rows are computed again; that of the last snapshot without it.
        overrides: ``key.sub=value`` for that config.
        wait_s: How long to wait for other processes that use the dataset, seconds.

    Raises:
        ConfigError: there is no dataset, or the recorded config cannot be used any more; nothing is taken out then.
        DatasetLocked: another process uses the dataset.
        PairmillError: computing rows again failed; `pairmill run` or another repair goes on.
    """
    work = _Repair(dataset, reporter, accept_loss, config, tuple(overrides))
    with dataset.lock(wait_s), dataset.alone(wait_s):
        before = work.prepare()
    run = None
    if work.todo and work.plan is not None:
        run = refresh(work.plan.config, reporter, admit=False, wait_s=wait_s)
    after = before
    if before.damaged:
        with dataset.lock(wait_s), dataset.alone(wait_s):
            after = work.heal_old()
    left = [f.path for f in after.damage]
    lost = [loss for loss in work.lost if loss.accepted or any(path.startswith(loss.path) for path in left)]
    return Repair(before, after, work.done, lost, run)


@dataclass(frozen=True)
class _Recipe:
    config: RunConfig
    plan: Plan


@dataclass
class _Repair:
    dataset: Dataset
    reporter: Reporter
    accept_loss: bool
    config: str | None
    overrides: tuple[str, ...]
    done: list[str] = field(default_factory=list)
    lost: list[Loss] = field(default_factory=list)
    todo: bool = False
    """Whether rows have to be computed again."""
    plan: _Recipe | None = None
    whole: set[str] = field(default_factory=set)

    def prepare(self) -> Integrity:
        """All that needs the lock. Returns what was found at first."""
        examination, before = self._examine()
        if not before.damaged:
            return before
        examination, found = self._mend(examination, before)
        unreadable = {table for table in examination.logs if not examination.readable(table)}
        unreadable |= {loss.table for loss in self.lost if loss.path.endswith(LOG) and not loss.accepted}
        if unreadable:
            self._did(f"nothing is computed again while the log of {', '.join(sorted(unreadable))} cannot be read")
        elif any(f.current and f.version is None for f in found.damage):
            self._take_out(examination, found)
        else:
            self.todo = True  # a mended log may have lost rows; a repair that was killed may have taken some out
            self.plan = self._recorded(examination, required=False)
        return before

    def _mend(self, examination: Examination, found: Integrity) -> tuple[Examination, Integrity]:
        """Mend what needs no computing. One thing may hide another, such as the snapshots which versions they need."""
        for _ in range(ROUNDS):
            if not any(step(examination, found) for step in (self._mend_logs, self._heal, self._records)):
                break
            examination, found = self._examine()
        return examination, found

    def _examine(self) -> tuple[Examination, Integrity]:
        examination = Examination(self.dataset, self.reporter, whole=frozenset(self.whole))
        found = examination.run()
        self.whole |= found.whole
        return examination, found

    def _did(self, what: str) -> None:
        self.done.append(what)
        self.reporter.note(what)

    def _lose(self, loss: Loss) -> None:
        if loss in self.lost:
            return
        self.lost.append(loss)
        self.reporter.note(f"{loss.path}: {loss.detail}")

    # -- logs --

    def _mend_logs(self, examination: Examination, found: Integrity) -> bool:
        """Set torn records aside and write damaged ones anew; says whether anything was done."""
        flaws: dict[str, list[Finding]] = {}
        for finding in found.damage:
            if finding.version is not None and finding.version >= 0:
                flaws.setdefault(finding.table, []).append(finding)
        if SNAPSHOTS_TABLE in flaws:  # they say which versions of the others are needed
            flaws = {SNAPSHOTS_TABLE: flaws[SNAPSHOTS_TABLE]}
        before = len(self.done)
        for table, findings in flaws.items():
            self._mend_log(examination, table, findings)
        return len(self.done) > before

    def _mend_log(self, examination: Examination, table: str, findings: list[Finding]) -> None:
        log = examination.logs[table]
        for finding in findings:
            if finding.path.endswith(LAST_CHECKPOINT):
                self._drop_checkpoint(table, finding)
        bad = {f.version: f for f in findings if f.version is not None and not f.path.endswith(LAST_CHECKPOINT)}
        tail = log.last
        computed = table == LEDGER_TABLE or is_stage_table(table)  # of all others nothing may get lost
        while (torn := bad.get(tail)) and torn.kind is Kind.TORN_COMMIT and not torn.snapshots:
            if not computed and tail > 0:  # the first record says that there is a table, and names no file
                break
            set_aside(self.dataset, log.versions.pop(tail))
            self._did(f"{table}: the commit record {tail} is not whole, and no snapshot needs it: it was set aside")
            del bad[tail]
            tail -= 1
        gaps = {f.version for f in findings if f.kind is Kind.LOG_GAP and f.version}  # the first one names no file
        if any(version + 1 in gaps for version in gaps):
            self._lose_log(table)
            return
        mender = Mender(self.dataset, log)
        for version, finding in sorted(bad.items()):
            if ".checkpoint" in finding.path:
                self._drop_checkpoint(table, finding)
            else:
                try:
                    self._did(mender.record(version))
                except (LogProblem, OSError, pa.ArrowException) as problem:
                    self._lose(Loss(table, None, finding.path, f"the log cannot be mended: {problem}"))
                if table == PAIRS_TABLE:
                    self._read_sources_again()

    def _lose_log(self, table: str) -> None:
        """Several records in a row are gone: which file belongs to which version, nothing says."""
        path = posixpath.join(table, LOG)
        accepted = self.accept_loss and is_stage_table(table)
        what = "several commit records in a row are gone: bring them back from a backup"
        if is_stage_table(table):
            what += ", or have the table computed again as a whole (--accept-loss)"
        self._lose(Loss(table, None, path, what, (), accepted))
        if accepted:
            set_aside(self.dataset, self.dataset.path(path))
            self._did(f"{table}: its log was set aside; all its rows are work to do again, old snapshots read those")

    def _drop_checkpoint(self, table: str, finding: Finding) -> None:
        """Records say all that a checkpoint says, while they are there from the first one on."""
        folder = self.dataset.path(table, LOG)
        if not self.dataset.fs.exists(posixpath.join(folder, f"{0:020d}.json")):
            self._lose(Loss(table, None, finding.path, "the log before this checkpoint is gone"))
            return
        for path in (self.dataset.path(finding.path), posixpath.join(folder, LAST_CHECKPOINT)):
            set_aside(self.dataset, path)
        self._did(f"{finding.path} was set aside: the records say all that it said")

    # -- bytes that are there under another name --

    def _heal(self, _: Examination, found: Integrity) -> bool:
        """Put the right bytes in the place of damaged files, where a whole file of the table has them."""
        damaged = {f.path: f for f in found.damage if f.version is None}
        wanted: dict[tuple[str, str], list[str]] = {}
        for path, finding in damaged.items():
            checksum = DataFile(path, path, -1, 0, 0).checksum
            if checksum:
                wanted.setdefault((finding.table, checksum), []).append(path)
        healed = False
        for path, _size in walk(self.dataset) if wanted else ():
            here = wanted.get((path.partition("/")[0], DataFile(path, path, -1, 0, 0).checksum), [])
            full = self.dataset.path(path)
            if here and path not in damaged and has_its_checksum(self.dataset, full):
                for target in here:
                    _copy(self.dataset, full, self.dataset.path(target))
                    self._did(f"{target} was restored from {path}, which has the same bytes")
                    healed = True
                here.clear()
        return healed

    def heal_old(self) -> Integrity:
        """After all else: damaged files that only old snapshots need. Rows computed again may be theirs byte for byte;
        where they are not, and the loss is accepted, these snapshots read the new ones from now on. Returns what is
        found in the end."""
        examination, found = self._mend(*self._examine())
        if self.accept_loss:
            rows = [row for f in found.damage if only_old(f) and (row := self._instead(examination, f)) is not None]
            if rows:
                self.dataset.records(REWRITES_TABLE, REWRITES).append(rows)
                _, found = self._examine()
        return found

    def _instead(self, examination: Examination, finding: Finding) -> dict[str, object] | None:
        """A rewrite: the file that stands for a damaged one of old snapshots, if one was computed in its place."""
        if finding.version is not None or not (finding.table == PAIRS_TABLE or is_stage_table(finding.table)):
            return None
        lost = _need(examination, finding)
        new = [
            need.file
            for need in examination.needs[finding.table].values()
            if need.current and need.file.shard == lost.shard and not need.snapshots & set(finding.snapshots)
        ]
        if len(new) != 1 or new[0].path not in self.whole or new[0].rows > lost.rows:
            return None
        if finding.table != PAIRS_TABLE and new[0].rows != lost.rows:
            return None
        which = ", ".join(map(str, finding.snapshots))
        self._did(f"{finding.path} is lost: snapshots {which} read {new[0].relative} in its place")
        return {
            "table": finding.table,
            "old": lost.relative,
            "new": new[0].relative,
            "rows": new[0].rows,
            "size": new[0].size,
        }

    # -- records --

    def _records(self, examination: Examination, found: Integrity) -> bool:
        """Take damaged files of record tables out, if their loss is accepted."""
        bad: dict[str, list[Finding]] = {}
        for finding in found.damage:
            if finding.version is None and finding.current and holds_records(finding.table):
                bad.setdefault(finding.table, []).append(finding)
        for table, findings in bad.items():
            what = self._what_is_lost(examination, table, findings)
            for finding in findings:
                self._lose(Loss(table, finding.shard, finding.path, what, (), self.accept_loss))
            if self.accept_loss:
                schema = _schema(self.dataset, table)
                gone = [_need(examination, f) for f in findings]
                if any(f.shard >= 0 for f in gone):
                    self.dataset.table(table, schema).commit([], remove=gone)
                else:
                    records = self.dataset.records(table, schema)
                    guard = (PUBLISH, max((r.id for r in examination.records), default=0))
                    records.remove(gone, guard if table == SNAPSHOTS_TABLE else None)
                self._did(f"{table}: {len(gone)} damaged files were taken out; the other records stay")
        return bool(bad) and self.accept_loss

    def _what_is_lost(self, examination: Examination, table: str, findings: list[Finding]) -> str:
        rows = sum(_need(examination, f).rows for f in findings)
        if table == SNAPSHOTS_TABLE:
            log = examination.logs[table]
            said = (log.guards.get(log.added.get(_need(examination, f).relative, -1)) for f in findings)
            which = ", ".join(str(number or "unknown") for number in said)
            return f"the record of {rows} snapshots ({which}) is lost; the data they name and the other snapshots stay"
        if table == TOMBSTONES_TABLE:
            return (
                f"{rows} tombstones are lost: what they took down may come back; "
                "run `pairmill forget` again for it at once"
            )
        if table == ANSWERS_TABLE:
            return f"{rows} answers that were paid for are lost; their questions will be paid for again"
        return f"{rows} records of {table} are lost; nothing can compute them again"

    # -- pairs, stages, ledger --

    def _take_out(self, examination: Examination, found: Integrity) -> None:
        """Rebuild pairs, and take the damaged files of all other tables out of the latest versions."""
        damaged: dict[str, list[DataFile]] = {}
        for finding in found.damage:
            if finding.version is None and finding.current:
                damaged.setdefault(finding.table, []).append(_need(examination, finding))
        if any(holds_records(table) for table in damaged):
            self._did("nothing is computed again while records are damaged: add --accept-loss to go on without them")
            return
        self.plan = self._recorded(examination, required=True)
        if self.plan is None:
            return
        if PAIRS_TABLE in damaged and not self._rebuild_pairs(examination, damaged.pop(PAIRS_TABLE)):
            return
        self.todo = True
        plan = self.plan.plan
        stale = self._stale(examination, plan, damaged)
        order = [LEDGER_TABLE, *reversed(plan.tables)]
        tables = sorted({*damaged, *stale}, key=lambda t: (t in order, order.index(t) if t in order else 0, t))
        for table in tables:
            self._commit_without(examination, table, damaged.get(table, []), stale.get(table, {}))

    def _commit_without(
        self, examination: Examination, table: str, damaged: list[DataFile], keep: Mapping[int, pa.Array]
    ) -> None:
        """One commit that takes damaged files out, and of shards in `keep` all rows but these."""
        schema = _schema(self.dataset, table)
        old, new, rows = list(damaged), [], 0
        bad = {f.relative for f in damaged}
        for need in examination.needs[table].values():
            file = need.file
            if need.current and file.relative not in bad and file.shard in keep:
                staying = keep[file.shard]

                def drop(part: pa.Table, staying: pa.Array = staying) -> pa.Array:
                    return pc.invert(pc.is_in(part.column("uid"), value_set=staying))

                rest, gone = without_rows(self.dataset, table, file, schema, drop)
                if gone:
                    old.append(file)
                    new += [rest] if rest is not None else []
                    rows += gone
        if old:
            self.dataset.table(table, schema).commit(new, remove=old)
            more = f", and {rows} rows that depend on lost ones" if rows else ""
            self._did(f"{table}: {len(damaged)} damaged files{more} were taken out, to be computed again")

    def _stale(
        self, examination: Examination, plan: Plan, damaged: Mapping[str, list[DataFile]]
    ) -> dict[str, dict[int, pa.Array]]:
        """By table and shard, the uids whose rows may stay where a table is damaged that comes out differently."""
        stale: dict[str, dict[int, pa.Array]] = {}
        for planned in plan.steps:
            files = damaged.get(planned.table or "", [])
            if not files or planned.table is None or not MAY_DIFFER & _written(plan, planned.table):
                continue
            bad = {f.relative for f in files}
            shards = {f.shard for f in files}
            spared = {PAIRS_TABLE, LEDGER_TABLE, HISTORY_TABLE, planned.table}
            spared |= {t for t in plan.tables if t not in dependents(plan, planned.table)}
            for shard in shards:
                whole = [
                    need.file
                    for need in examination.needs[planned.table].values()
                    if need.current and need.file.shard == shard and need.file.relative not in bad
                ]
                uids = read_files(self.dataset, whole, pa.schema([fields.UID]), ["uid"]).column("uid")
                for table in examination.needs:
                    if table not in spared and is_stage_table(table):
                        kept = stale.setdefault(table, {})
                        both = uids.filter(pc.is_in(uids, value_set=kept[shard])) if shard in kept else uids
                        kept[shard] = both.combine_chunks()
        return stale

    def _rebuild_pairs(self, examination: Examination, files: list[DataFile]) -> bool:
        """Write the damaged files of pairs anew from the sources; says whether all could be."""
        assert self.plan is not None
        shards = pairs.damaged_shards(self.dataset, examination, files)
        try:
            pairs.look_up(self.plan.config, self.dataset, examination, shards, self.reporter)
        except SourceError as error:
            if not self.accept_loss:
                raise SourceError(
                    f"pairs are damaged and a source cannot be read to rebuild them: {error}; bring it back, or say "
                    "where it is now (--set source.0.path=...)"
                ) from error
            self._did(f"a source cannot be read: {error}")
        rebuilt = [self._rebuild(examination, shard) for shard in shards]
        return all(rebuilt)

    def _rebuild(self, examination: Examination, shard: pairs.DamagedShard) -> bool:
        """Write the pairs of one shard anew; says whether that was possible, or its loss accepted."""
        lost = shard.lost
        nameless = shard.unknown if shard.published else 0
        if lost or nameless:
            detail = f"the sources hold {len(lost) + nameless} of its {shard.file.rows} pairs no more"
            if nameless:
                detail += f", or {nameless} of them cannot be told apart: no other file names them"
            path = f"{PAIRS_TABLE}/{shard.file.relative}"
            self._lose(Loss(PAIRS_TABLE, shard.shard, path, detail, tuple(lost), self.accept_loss))
            if not self.accept_loss:
                return False
        if lost or shard.unknown:
            self._read_sources_again()
        new = None
        if shard.rows:
            new = pairs.write(self.dataset, shard, pairs.last_url(self.dataset, examination, shard.shard - 1))
        if new is None or new.relative != shard.file.relative:
            self.dataset.table(PAIRS_TABLE, fields.PAIRS).commit([new] if new else [], remove=[shard.file])
        self._tell_of(shard, new)
        if lost:
            self._give_up(examination, shard)
        return True

    def _tell_of(self, shard: pairs.DamagedShard, new: DataFile | None) -> None:
        same = new is not None and new.relative == shard.file.relative
        how = "byte for byte" if same else f"{len(shard.found)} of {shard.file.rows} pairs"
        told = f"pairs of shard {shard.shard} were rebuilt from the sources: {how}"
        if shard.unknown:
            told += f"; {shard.unknown} others are admitted anew by the next run, where the sources hold them"
        if not shard.sure:
            told += f"; that refresh {shard.refresh} admitted them is taken from a neighbouring shard"
        self._did(told)

    def _read_sources_again(self) -> None:
        """Make the next run read the sources, though their files are as they were."""
        with contextlib.suppress(FileNotFoundError):
            self.dataset.fs.rm(self.dataset.path(SEEN))

    def _give_up(self, examination: Examination, shard: pairs.DamagedShard) -> None:
        """Take the rows of lost pairs out of all other tables."""
        staying = pa.array(sorted(shard.found), pa.string())
        for table in examination.needs:
            if table == LEDGER_TABLE or is_stage_table(table):
                damaged = [
                    need.file
                    for need in examination.needs[table].values()
                    if need.current and need.file.shard == shard.shard and need.file.path not in self.whole
                ]
                self._commit_without(examination, table, damaged, {shard.shard: staying})

    # -- the config --

    def _recorded(self, examination: Examination, *, required: bool) -> _Recipe | None:
        """The config that was given, or that of the last snapshot, and its plan.

        Raises:
            ConfigError: it cannot be used any more; the message says why.
        """
        if self.config is None and not examination.records:
            self._did("no snapshot records a config with which rows could be computed again: give one (--config)")
            return None
        record = examination.records[-1] if examination.records else None
        with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:
            path, which = Path(folder, "config.yaml"), self.config
            if self.config is not None:
                path = Path(self.config)
            elif record is not None:
                which = f"the config of snapshot {record.id}"
                path.write_text(record.config, encoding="utf-8")
            try:
                config = load_config(str(path), [*self.overrides, f"dataset={json.dumps(self.dataset.url)}"])
                plan = compile_plan(load_recipe(config))
                self._check_same(plan, record.tables if record else {})
            except (ConfigError, ImportError) as error:
                if not required and self.config is None:
                    return None
                raise ConfigError(
                    f"rows have to be computed again, but {which} cannot be used: {error}\n"
                    "Mend it with --set KEY=VALUE, or give another one with --config; nothing was taken out"
                ) from error
        return _Recipe(config, plan)

    @staticmethod
    def _check_same(plan: Plan, recorded: Mapping[str, int]) -> None:
        """The stages must be those that the snapshot was made with, or all would be computed anew."""
        stages = {name.rpartition("-")[0]: name for name in recorded if is_stage_table(name)}
        for table in plan.tables:
            other = stages.get(table.rpartition("-")[0])
            if table not in recorded and other is not None:
                raise ConfigError(
                    f"the stage of the table {other} is another one now ({table}): its model, prompt or code changed"
                )


def dependents(plan: Plan, table: str) -> set[str]:
    """The tables of the stages that read a table's columns, directly or through other stages."""
    written = set(_written(plan, table))
    found = set()
    for planned in plan.steps:
        if planned.table is not None and written & set(planned.step.reads):
            found.add(planned.table)
            written |= _written(plan, planned.table)
    return found


def _written(plan: Plan, table: str) -> set[str]:
    return {column for column, owner in plan.columns.items() if owner == table}


def _need(examination: Examination, finding: Finding) -> DataFile:
    relative = finding.path.partition("/")[2]
    return examination.needs[finding.table][relative].file


def _schema(dataset: Dataset, table: str) -> pa.Schema:
    """The schema of a table's files, as its log says it."""
    delta = open_delta(dataset, table)
    if delta is None:
        raise StoreError(f"{dataset.url} has no table {table}")
    schema = pa.schema(delta.schema().to_arrow())
    place = schema.get_field_index("shard")
    return schema.remove(place) if place >= 0 else schema


def has_its_checksum(dataset: Dataset, path: str) -> bool:
    """Whether a file's bytes are those that its name says."""
    said = DataFile(path, path, -1, 0, 0).checksum
    try:
        return bool(said) and checksum_of(dataset, path) == said
    except OSError:
        return False


def _copy(dataset: Dataset, source: str, target: str) -> None:
    """Put a copy of a file in the place of another, all at once."""
    if not dataset.local:
        dataset.fs.cp_file(source, target)
        return
    temporary = f"{target}.{os.getpid()}.tmp"
    shutil.copyfile(source, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
