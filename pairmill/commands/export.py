"""`pairmill export`: write a snapshot as files to train from, or check such files."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated, Any

import typer

from pairmill.commands.common import AsJson, SnapshotId, print_json, shown
from pairmill.errors import ConfigError


class ExportFormat(str, Enum):
    """What `pairmill export` writes: `pairmill.export.FORMATS`, whose import takes long."""

    WEBDATASET = "webdataset"
    PARQUET = "parquet"
    HF = "hf"
    LLAVA = "llava"
    SHAREGPT = "sharegpt"
    QWEN_VL = "qwen-vl"
    MINIGPT4 = "minigpt4"
    INSTRUCTBLIP = "instructblip"
    COCO = "coco"
    BLIP = "blip"


class ImagePlace(str, Enum):
    """Where images stand."""

    FILES = "files"
    SHARDS = "shards"
    NONE = "none"


def export(
    out: Annotated[
        str,
        typer.Option("--out", metavar="DIR", help="folder to write to, or the export to update", show_default=False),
    ],
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="DATASET", help="a path, s3://... or gs://...; with --verify it may be left out"),
    ] = None,
    output: Annotated[
        ExportFormat | None, typer.Option("--format", help="what to write; with --verify it may be left out")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help="a condition over the columns of the view pairs"),
    ] = None,
    pairs_per_shard: Annotated[
        int | None,
        typer.Option("--pairs-per-shard", min=1, metavar="N", help="admitted pairs a file, at most; 10000 without it"),
    ] = None,
    images: Annotated[
        ImagePlace | None,
        typer.Option("--images", help="of annotation formats: images as files, in tar shards, or not at all"),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(
            "--kinds",
            metavar="KIND,KIND",
            help="which conversations: conversation, detail, complex, grounding; pairs without any are left out",
        ),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            "--boxes",
            metavar="DIALECT",
            help="how boxes are written, where not as the format's trainer does: llava, shikra, qwen_vl, qwen2_vl, "
            "minigpt_v2, kosmos2, plain",
        ),
    ] = None,
    snapshot: SnapshotId = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="write nothing: check each file of the export in DIR; exit 1 if one is wrong"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the kept pairs of a snapshot as files to train from, or bring an export to a newer snapshot.

    An export that is there already is updated in place: only files whose content changed are written.
    docs/exports.md says what each format is, what reads it, and what is in the folder.

    \b
    Examples:
      pairmill export out/my-dataset --format webdataset --out shards
      pairmill export out/my-dataset --format parquet --out table --where "clip_score > 0.3 AND width >= 512"
      pairmill export out/my-dataset --format llava --out llava --kinds conversation,detail
      pairmill export out/my-dataset --format llava --out shikra --boxes shikra --images shards
      pairmill export --verify --out shards
    """
    from dataclasses import asdict

    from pairmill.report.progress import reporter_for
    from pairmill.store import Dataset

    chosen = {
        "images": images.value if images else None,
        "kinds": tuple(kinds.replace(" ", "").split(",")) if kinds else None,
        "boxes": boxes,
    }
    if verify:
        options = {name: list(value) if name == "kinds" and value else value for name, value in chosen.items()}
        _verify(
            out,
            as_json,
            {
                "dataset": dataset,
                "format": output.value if output else None,
                "where": where,
                "pairs_per_shard": pairs_per_shard,
                "snapshot": snapshot,
                **options,
            },
        )
        return
    missing = " and ".join(name for name, given in (("DATASET", dataset), ("--format", output)) if given is None)
    if dataset is None or output is None:
        raise ConfigError(
            f"missing: {missing}; `pairmill export DATASET --format webdataset --out DIR` writes an export, "
            "`pairmill export --verify --out DIR` checks one"
        )
    from pairmill.export import Options
    from pairmill.export import export as write

    opened = Dataset(dataset).snapshot(snapshot)
    with reporter_for(sys.stderr) as reporter:
        report = write(
            opened,
            out,
            output.value,
            where=where,
            pairs_per_shard=pairs_per_shard or 10_000,
            options=Options(**chosen),  # type: ignore[arg-type] # checked where they are used
            progress=reporter,
        )
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(shown(report.note))


def _verify(out: str, as_json: bool, expected: dict[str, Any]) -> None:
    from dataclasses import asdict

    from pairmill.export import verify_export
    from pairmill.report.progress import reporter_for
    from pairmill.report.text import without_secrets
    from pairmill.store import Dataset

    if expected["dataset"]:
        expected = {**expected, "dataset": without_secrets(Dataset(expected["dataset"]).url)}
    given = {name: value for name, value in expected.items() if value is not None}
    with reporter_for(sys.stderr) as reporter:
        report = verify_export(out, given, progress=reporter)
    if as_json:
        print_json({"ok": report.ok, **asdict(report)})
    else:
        for problem in report.problems:
            typer.echo(shown(f"{problem.file}: {problem.detail}"))
        if report.ok:
            typer.echo(
                shown(
                    f"{report.out} is whole: {report.pairs:,} pairs of snapshot {report.snapshot} as {report.format}, "
                    f"{report.files:,} files, {report.bytes:,} bytes"
                )
            )
        elif report.files:
            typer.echo(
                "To mend it, remove the files that are wrong and run the same `pairmill export` again: it writes what "
                "is missing."
            )
    if not report.ok:
        raise typer.Exit(1)
