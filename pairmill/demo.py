"""The demo: the main job, offline, on a procedural web whose truth is known, with the shipped tiny models.

A loopback server plays the web; the ordinary recipe runs over its URL list; the result is exported; and only then is
the ledger compared with the ground truth that the server wrote beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from pairmill.demo_examples import Example, choose_examples, draw_examples
from pairmill.demo_instructions import (
    INSTRUCTIONS_SQL,
    InstructionScore,
    Talk,
    choose_talks,
    draw_talks,
    measure_instructions,
)
from pairmill.errors import ConfigError
from pairmill.export import export, export_webdataset
from pairmill.instructions import KINDS
from pairmill.procedural.captions import is_true
from pairmill.procedural.scene import Scene
from pairmill.procedural.web import Kind, ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Reporter
from pairmill.run import RunReport, load_config, refresh
from pairmill.store import Dataset, Snapshot
from pairmill.weights import tiny_clip_dir

EXAMPLES = 8
"""Images that are shown with their texts before and after."""

TALKS = 6
"""Conversations that are shown with their images."""

BROKEN_KINDS = frozenset(kind.value for kind in Kind if not kind.has_picture)
"""Rows behind which there is no usable picture: none of them may be kept."""


@dataclass(frozen=True)
class Score:
    """Precision and recall against the ground truth, with the counts they come from."""

    precision: float
    recall: float
    caught: int
    """Rightly dropped."""
    wrongly_dropped: int
    missed: int

    @classmethod
    def of(cls, caught: int, wrongly_dropped: int, missed: int) -> Score:
        """From counts; 1.0 where there is nothing to divide by."""
        precision = caught / (caught + wrongly_dropped) if caught + wrongly_dropped else 1.0
        recall = caught / (caught + missed) if caught + missed else 1.0
        return cls(round(precision, 4), round(recall, 4), caught, wrongly_dropped, missed)


@dataclass(frozen=True)
class CaptionScore:
    """What CapFilt did, against the ground truth; each share is of as many as stand beside it."""

    written: int
    true_written: float
    """Share of true captions among all that the captioner wrote."""
    kept: int
    true_kept: float
    """Share of true captions among those that the filter let pass."""
    images_with_false_text: int
    """Images that came to be captioned and whose alt text is false."""
    rescued: float
    """Share of those that have a true caption among their kept texts."""


@dataclass(frozen=True)
class DemoMetrics:
    """How the demo's run compares with the ground truth."""

    pairs: int
    kept: int
    reasons: dict[str, int]
    adds_up: bool
    """admitted = kept + each reason."""
    mismatched: Score
    """False alt texts among those that came to be judged by the filter."""
    duplicates: Score
    """Exact and near-duplicates among the pairs that came to be judged as duplicates."""
    true_texts_in: float
    """Share of true texts among all rows that show a picture."""
    true_texts_kept: float
    """Share of true texts among the texts of kept pairs, alt texts and captions."""
    texts_kept: int
    captions: CaptionScore
    broken_kept: int
    """Kept pairs behind which there is no usable picture."""
    instructions: InstructionScore
    exported: int
    seconds: float


@dataclass(frozen=True)
class DemoReport:
    """What `run_demo` did."""

    run: RunReport
    metrics: DemoMetrics
    out: Path
    examples: list[Example]
    """Some images with their texts before and after; `examples.png` shows them."""
    talks: list[Talk]
    """Some conversations; `instruct_examples.png` shows them with their images."""


def run_demo(
    pairs: int,
    out: Path | str,
    reporter: Reporter,
    *,
    seed: int = 0,
    engine: str = "ray",
    overrides: tuple[str, ...] = (),
) -> DemoReport:
    """Run the main job on a procedural web of `pairs` rows and leave in `out`: dataset/, urls.parquet, truth.parquet,
    config.yaml, export/, export-llava/, examples.png, instruct_examples.png and metrics.json. Run again on the same
    folder it finds nothing new, or goes on.

    Raises:
        ConfigError: the folder holds a demo of other pairs or another seed.
    """
    out = Path(out)
    with _web(pairs, seed, out) as web:
        web.write(out)
        config_path = out / "config.yaml"
        config_path.write_text(yaml.safe_dump(demo_config(out, engine), sort_keys=False), encoding="utf-8")
        reporter.note(f"a procedural web of {pairs} pairs is served on {web.host}:{web.port}")
        report = refresh(load_config(str(config_path), overrides), reporter)
    snapshot = Dataset(str(out / "dataset")).snapshot()
    exported = export_webdataset(snapshot, str(out / "export"))
    export(snapshot, str(out / "export-llava"), "llava")
    pairs_, texts, talks = (query(snapshot, sql).to_pylist() for sql in (PAIRS_SQL, TEXTS_SQL, INSTRUCTIONS_SQL))
    metrics = measure(pairs_, texts, talks, out / "truth.parquet", exported.samples, report.seconds)
    (out / "metrics.json").write_text(json.dumps(asdict(metrics), indent=2) + "\n", encoding="utf-8")
    examples, shown = choose_examples(texts, EXAMPLES), choose_talks(talks, TALKS)
    images = _images(snapshot, [*(example.uid for example in examples), *(talk.uid for talk in shown)])
    draw_examples(examples, images, out / "examples.png")
    draw_talks(shown, images, out / "instruct_examples.png")
    return DemoReport(report, metrics, out, examples, shown)


PAIRS_SQL = """
    SELECT pairs.url, pairs.text, pairs.status, pairs.reason, senior.url AS duplicate_of_url
    FROM pairs LEFT JOIN pairs AS senior ON pairs.duplicate_of = senior.uid
"""
TEXTS_SQL = """
    SELECT texts.uid, pairs.url, pairs.text AS alt_text, pairs.status, texts.ordinal, texts.text, texts.source,
        texts.kept, texts.rank, texts.reason, texts.clip_score, texts.itm_score
    FROM texts JOIN pairs ON pairs.uid = texts.uid ORDER BY texts.uid, texts.ordinal
"""


def _images(snapshot: Snapshot, uids: list[str]) -> dict[str, bytes]:
    """Stored image files by uid."""
    wanted = ", ".join(f"'{uid}'" for uid in uids)
    rows = query(snapshot, f"SELECT uid, image FROM images WHERE uid IN ({wanted})") if uids else None  # noqa: S608
    return {} if rows is None else {row["uid"]: row["image"] for row in rows.to_pylist()}


def _web(pairs: int, seed: int, out: Path) -> ProceduralWeb:
    """The web of this folder: on the port of the first run, since the port is part of every URL."""
    note = out / "web.json"
    wanted = {"pairs": pairs, "seed": seed}
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        web = ProceduralWeb(pairs, seed)
        note.write_text(json.dumps({**wanted, "port": web.port}) + "\n", encoding="utf-8")
        return web
    found = json.loads(note.read_text(encoding="utf-8"))
    if {k: found[k] for k in wanted} != wanted:
        raise ConfigError(
            f"{out} holds a demo of {found['pairs']} pairs with seed {found['seed']}; give another --out, or delete it"
        )
    try:
        return ProceduralWeb(pairs, seed, port=found["port"])
    except OSError as error:
        raise ConfigError(
            f"port {found['port']}, which the URLs of {out} name, is taken; free it, or give another --out"
        ) from error


def demo_config(out: Path, engine: str) -> dict[str, Any]:
    """The demo's config: the ordinary recipe, with time-outs and thresholds for a loopback web and the tiny model."""
    tuned = json.loads((tiny_clip_dir() / "metrics.json").read_text(encoding="utf-8"))
    return {
        "dataset": str(out / "dataset"),
        "recipe": "capfilt",
        "source": [{"kind": "url_table", "path": str(out / "urls.parquet"), "boxes": "boxes"}],
        "shard_size": 200,
        "download": {"per_host": 64, "timeout_s": 3, "retries": 1, "allow_private_addresses": True},
        "models": {"clip": "tiny", "captioner": "tiny", "itm": "tiny"},
        "caption": {"count": 2, "max_length": 40},
        "mix": {"recipe": "capfilt"},
        "instruct": {"kinds": dict.fromkeys(KINDS, 1.0)},
        "keep": {"itm": ">= 0.5"},
        "dedup": {"semantic": tuned["dedup"]["threshold"], "max_colour_distance": 0.07, "floor": 0.9},
        "engine": {"kind": engine},
    }


def measure(
    pairs: list[dict[str, Any]],
    texts: list[dict[str, Any]],
    talks: list[dict[str, Any]],
    truth_path: Path,
    exported: int,
    seconds: float,
) -> DemoMetrics:
    """Compare a snapshot with the ground truth: its pairs, texts and conversations as `PAIRS_SQL`, `TEXTS_SQL` and
    `INSTRUCTIONS_SQL` give them."""
    truth = {(row["url"], row["text"]): row for row in pq.read_table(truth_path).to_pylist()}
    picture = {row["url"]: row["duplicate_of_url"] or row["url"] for row in truth.values()}
    rows = [{**pair, "truth": truth[pair["url"], pair["text"]]} for pair in pairs]
    reasons = Counter(r["reason"] for r in rows if r["reason"])
    kept = [r for r in rows if r["status"] == "kept"]
    shown = [r for r in rows if r["truth"]["text_is_true"] is not None]
    judged = _judged_texts(texts, truth)
    kept_texts = [t for t in judged if t["kept"]]
    return DemoMetrics(
        pairs=len(rows),
        kept=len(kept),
        reasons=dict(sorted(reasons.items())),
        adds_up=len(rows) == len(truth) == len(kept) + sum(reasons.values()),
        mismatched=_mismatched(judged),
        duplicates=_duplicates(rows, picture),
        true_texts_in=round(sum(r["truth"]["text_is_true"] for r in shown) / max(1, len(shown)), 4),
        true_texts_kept=_share_true(kept_texts),
        texts_kept=len(kept_texts),
        captions=_captions(judged),
        broken_kept=sum(r["truth"]["kind"] in BROKEN_KINDS for r in kept),
        instructions=measure_instructions(talks, truth),
        exported=exported,
        seconds=seconds,
    )


def _judged_texts(texts: list[dict[str, Any]], truth: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """The texts of pairs that came to be captioned, each with `true` (what the oracle says) and `passed` (what the
    mixing recipe says; the pair may still be dropped afterwards, as a duplicate)."""
    captioned = {text["uid"] for text in texts if text["source"] != "web"}
    found = []
    for text in texts:
        if text["uid"] not in captioned:
            continue
        known = truth[text["url"], text["alt_text"]]
        if text["source"] == "web":
            true = bool(known["text_is_true"])
        else:
            scene = known["scene"] and Scene.from_json(known["scene"])
            true = bool(scene and text["text"] and is_true(text["text"], scene))
        passed = text["kept"] or (text["reason"] or "").startswith("duplicate.")
        found.append({**text, "true": true, "passed": passed})
    return found


def _share_true(texts: list[dict[str, Any]]) -> float:
    return round(sum(text["true"] for text in texts) / max(1, len(texts)), 4)


def _mismatched(texts: list[dict[str, Any]]) -> Score:
    """False alt texts that the filter caught, of those that no rule over texts caught before."""
    asked = [t for t in texts if t["source"] == "web" and (t["passed"] or _by_filter(t))]
    counts = Counter((not text["true"], _by_filter(text)) for text in asked)
    return Score.of(counts[True, True], counts[False, True], counts[True, False])


def _by_filter(text: dict[str, Any]) -> bool:
    return (text["reason"] or "").startswith(("itm.", "clip."))


def _captions(texts: list[dict[str, Any]]) -> CaptionScore:
    written = [t for t in texts if t["source"] != "web" and t["text"]]
    passed = [t for t in written if t["passed"]]
    false_alt = {t["uid"] for t in texts if t["source"] == "web" and not t["true"]}
    rescued = false_alt & {t["uid"] for t in passed if t["true"]}
    return CaptionScore(
        written=len(written),
        true_written=_share_true(written),
        kept=len(passed),
        true_kept=_share_true(passed),
        images_with_false_text=len(false_alt),
        rescued=round(len(rescued) / max(1, len(false_alt)), 4),
    )


def _duplicates(rows: list[dict[str, Any]], picture: dict[str, str]) -> Score:
    """Of m judged pairs that show one picture, m - 1 are duplicates; which one stays is the recipe's choice."""
    judged = [r for r in rows if r["reason"] is None or r["reason"].startswith("duplicate.")]
    surplus = sum(n - 1 for n in Counter(picture[r["url"]] for r in judged).values())
    dropped = [r for r in judged if r["reason"]]
    right = sum(picture[r["url"]] == picture[r["duplicate_of_url"]] for r in dropped)
    return Score.of(right, len(dropped) - right, surplus - right)
