"""Arguments and printing that the verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG.yaml", help="the config; see docs/config.md, docs/training.md", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one key of the config; may be repeated"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, for programs")]
DatasetUrl = Annotated[str, typer.Argument(metavar="DATASET", help="a path, s3://... or gs://...", show_default=False)]
SnapshotId = Annotated[
    int | None,
    typer.Option("--snapshot", metavar="N", help="a snapshot by its number; the latest one without it"),
]
Wait = Annotated[
    float,
    typer.Option("--wait", min=0, metavar="SECONDS", help="how long to wait for another process that uses the dataset"),
]

RetryDeferred = Annotated[
    bool,
    typer.Option("--retry-deferred", help="try all deferred pairs again, not only those whose time has come"),
]
Debug = Annotated[bool, typer.Option("--debug", envvar="PAIRMILL_DEBUG", help="log more, and show tracebacks")]


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    import json

    typer.echo(json.dumps(value, indent=2, default=str))


def shown(text: str) -> str:
    """A text without secrets and control characters."""
    from pairmill.report.text import visible, without_secrets

    return visible(without_secrets(text))
