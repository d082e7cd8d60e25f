"""`pairmill verify`: is a dataset whole, and mend it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairmill.commands.common import AsJson, DatasetUrl, Overrides, Wait, print_json, shown

if TYPE_CHECKING:
    from pairmill.integrity import Finding, Integrity, Loss, Repair

LINES = 50
"""Findings that are printed; ``--json`` has them all."""


def verify(
    dataset: DatasetUrl,
    quick: Annotated[bool, typer.Option("--quick", help="only presence and sizes: reads no data file")] = False,
    mend: Annotated[bool, typer.Option("--repair", help="rebuild what can be rebuilt")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="with --repair: give up what nothing can rebuild")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="CONFIG.yaml", help="with --repair: this config, not that of the last snapshot"
        ),
    ] = None,
    overrides: Overrides = None,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Find flipped, truncated, missing and stray files, and damaged logs; with --repair mend them.

    Exit code 0: all is whole. 1: something is damaged (after a repair: still damaged).

    \b
    Examples:
      pairmill verify out/my-dataset
      pairmill verify out/my-dataset --quick
      pairmill verify out/my-dataset --repair
      pairmill verify out/my-dataset --repair --set engine.kind=local --set source.0.path=moved/urls.parquet
    """
    from pairmill.errors import ConfigError
    from pairmill.integrity import examine, repair
    from pairmill.report.progress import reporter_for
    from pairmill.store import Dataset

    opened = Dataset(dataset)
    if not opened.tables():
        raise ConfigError(f"{opened.url} is no pairmill dataset; `pairmill run CONFIG.yaml` makes one")
    if mend and quick:
        raise ConfigError("--repair looks at every byte: leave out --quick")
    if not mend and (accept_loss or config or overrides):
        raise ConfigError("--accept-loss, --config and --set belong to --repair: add it, or leave them out")
    with reporter_for(sys.stderr) as reporter:
        if mend:
            done = repair(
                opened, reporter, accept_loss=accept_loss, config=config, overrides=overrides or [], wait_s=wait
            )
            after = done.after
        else:
            done, after = None, examine(opened, reporter, quick=quick)
    if as_json:
        print_json(_json(after, done))
    else:
        _print(dataset, after, done)
    if after.damaged:
        raise typer.Exit(1)


def _json(after: Integrity, done: Repair | None) -> dict[str, Any]:
    from dataclasses import asdict

    def plain(integrity: Integrity) -> dict[str, Any]:
        found = {k: v for k, v in asdict(integrity).items() if k != "whole"}
        found["findings"] = [{**asdict(f), "kind": f.kind.value} for f in integrity.findings]
        return {"damaged": integrity.damaged, "counts": integrity.counts, **found}

    if done is None:
        return plain(after)
    return {
        **plain(after),
        "before": plain(done.before),
        "done": done.done,
        "lost": [asdict(loss) for loss in done.lost],
        "computed": done.run.computed if done.run else {},
        "published": done.run.snapshot.id if done.run and done.run.published and done.run.snapshot else None,
    }


def _print(dataset: str, after: Integrity, done: Repair | None) -> None:
    if done is not None and done.before.damaged:
        typer.echo("Found:")
        _print_findings(done.before.damage)
        typer.echo("Done:")
        for line in done.done or ["nothing"]:
            typer.echo(f"  {shown(line)}")
        if done.run is not None:
            computed = ", ".join(f"{stage} {rows:,}" for stage, rows in done.run.computed.items()) or "no rows"
            typer.echo(f"  computed again: {computed}")
        for loss in done.lost:
            typer.echo(f"  {_loss(loss)}")
        typer.echo("")
    what = "presence and sizes" if after.quick else "every byte"
    typer.echo(
        f"{shown(dataset)}: {after.files:,} files ({after.bytes / 1e6:,.1f} MB) of {after.tables} tables, needed by "
        f"the latest versions and {len(after.snapshots)} snapshots; looked at {what} in {after.seconds:,.1f} s"
    )
    if after.unnamed:
        typer.echo(f"  {after.unnamed:,} files have no checksum in their name: only that they can be read is known")
    _print_harmless(after)
    if not after.damaged:
        typer.echo("All is whole.")
        return
    typer.echo("Damaged:" if done is None else "Still damaged:")
    _print_findings(after.damage)
    typer.echo(_next(dataset, after, done))


def _print_findings(findings: tuple[Finding, ...]) -> None:
    for finding in findings[:LINES]:
        needed = [f"snapshots {', '.join(map(str, finding.snapshots))}"] if finding.snapshots else []
        needed = (["the latest version"] if finding.current else []) + needed
        by = f"; needed by {' and '.join(needed)}" if needed else ""
        typer.echo(f"  {finding.kind.value:11} {shown(finding.path)}: {shown(finding.detail)}{by}")
    if len(findings) > LINES:
        typer.echo(f"  ... and {len(findings) - LINES:,} more; --json lists them all")


def _print_harmless(after: Integrity) -> None:
    from pairmill.integrity import Kind

    for kind, what in ((Kind.ORPHAN, "files that no version names"), (Kind.LEFTOVER, "leftovers of interrupted work")):
        if count := after.counts.get(kind.value, 0):
            size = f"{after.total(kind) / 1e6:,.1f} MB"
            typer.echo(f"  {count:,} {what} ({size}): harmless; `pairmill vacuum` removes them")


def _loss(loss: Loss) -> str:
    first = ", ".join(uid[:12] for uid in loss.uids[:3]) + (" ..." if len(loss.uids) > 3 else "")
    uids = f" ({first})" if loss.uids else ""
    end = "given up" if loss.accepted else "kept as it is"
    return f"lost: {shown(loss.path)}: {shown(loss.detail)}{uids}; {end}"


def _next(dataset: str, after: Integrity, done: Repair | None) -> str:
    command = f"pairmill verify {shown(dataset)} --repair"
    if done is None:
        return f"Next: `{command}` rebuilds what can be rebuilt."
    if any(not loss.accepted for loss in done.lost):
        return f"Next: bring back what was lost (a backup, a source), or `{command} --accept-loss` goes on without it."
    if all(not f.current for f in after.damage):
        old = sorted({i for f in after.damage for i in f.snapshots})
        return (
            f"Only old snapshots are concerned ({', '.join(map(str, old))}); the latest versions are whole. Next: "
            f"`{command} --accept-loss` lets them read what was computed anew, or let go of them: "
            f"`pairmill vacuum {shown(dataset)} --keep N`."
        )
    return f"Next: the same command again, or `pairmill run CONFIG.yaml`, or restore the files from a backup: {command}"
