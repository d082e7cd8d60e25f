"""Writing snapshots in the formats that trainers read, checking what was written, and taking pairs out of it.

**How a format plugs in.** A format is a `pairmill.export.format.Format`, in a module of `pairmill.export.formats`, and
named in its `FORMATS`. It says

- what it writes for a *group* of pairs (some 10,000): a main file that is named by the group's number (``00000.jsonl``,
  ``.tar`` or ``.parquet``) and says of each pair its uid, and whatever stands beside it;
- which *whole files* are made of all groups' main files, in the form and under the name that trainers read
  (``llava.json``);
- which *options* it takes, with their defaults: where images stand, which kinds of conversations, how boxes are
  written.

Formats of annotations about images, one or more records a pair, need a function from a pair to its records and are
made by `pairmill.export.formats.annotations.annotation_format`: that writes ``00000.jsonl``, ``00000.parquet`` with the
pairs' metadata, and the images as files, tars or not at all (`pairmill.export.images`).

All else is shared: a group is written anew when the digest over its metadata and conversations changes, and only then
(`pairmill.export.run`); nothing counts as an export without its manifest (`pairmill.export.manifest`); ``--verify``
reads every file, images by the list of their group; a takedown writes the files of a group anew without a pair, removes
its image, and makes the whole files again.
"""

from pairmill.export.format import Format, Options, Whole
from pairmill.export.formats import FORMATS
from pairmill.export.registry import KnownExport, known_exports, register
from pairmill.export.run import ExportReport, export, export_parquet, export_webdataset
from pairmill.export.takedown import Held, Reach, Removal, holds_pairs, remove_from_exports, remove_pairs
from pairmill.export.verify import Problem, VerifyReport, Wrong, verify_export

__all__ = [
    "FORMATS",
    "ExportReport",
    "Format",
    "Held",
    "KnownExport",
    "Options",
    "Problem",
    "Reach",
    "Removal",
    "VerifyReport",
    "Whole",
    "Wrong",
    "export",
    "export_parquet",
    "export_webdataset",
    "holds_pairs",
    "known_exports",
    "register",
    "remove_from_exports",
    "remove_pairs",
    "verify_export",
]
