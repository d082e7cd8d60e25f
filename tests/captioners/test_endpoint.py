"""Captions from an endpoint: faults 8 and 9 of the hostile web against a real server, and keys that appear nowhere."""

from __future__ import annotations

import email.utils
import io
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioners import endpoint
from captioners.endpoint import EndpointCaptions, caption_text, refusal_or_residue, request_seed
from pairmill.errors import ConfigError, PairmillError, StageFailed
from pairmill.plan import Recipe
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.sources import download_stage
from pairmill.stage import Batch, ErrorBudget, apply, output_schema
from pairmill.store import Dataset, read_files
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason, retry_after_s
from tests.hostile.endpoint_server import (
    Answer,
    Asked,
    EndpointServer,
    InTurn,
    completion,
    endless,
    error,
    good,
    raw,
    reset,
    says,
    silent,
    trickle,
)

KEY = "sk-canary-5f1c0ffee-never-to-be-seen"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, a key, and a proxy that nothing may go through."""
    monkeypatch.setattr(endpoint, "_BACKOFF_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def jpeg(seed: int, width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def settings(base_url: str, count: int = 1, seed: int = 0, prompt: str | None = None, **knobs: Any) -> RunConfig:
    knobs = {"timeout_s": 5, "retries": 2, "max_retry_wait_s": 2, **knobs}
    return parse_config(
        {
            "dataset": "unused",
            "source": {"kind": "url_table", "path": "unused"},
            "models": {"captioner": {"name": "some/model", "base_url": base_url}},
            "caption": {"count": count, "prompt": prompt, "endpoint": knobs},
            "seed": seed,
        }
    )


def run(stage: EndpointCaptions, images: list[bytes | None]) -> list[dict[str, Any]]:
    table = pa.table({"uid": [f"{i:04d}" for i in range(len(images))], "image": pa.array(images, pa.binary())})
    budget = ErrorBudget()
    output = apply(stage, stage.open(), Batch(table), budget)
    assert output.schema == output_schema(stage)
    return output.to_pylist()


def ask(answers: list[list[Answer]], **knobs: Any) -> tuple[list[dict[str, Any]], EndpointServer]:
    """Caption one picture for each list of answers."""
    images = [jpeg(i) for i in range(len(answers))]
    with EndpointServer(InTurn(dict(zip(images, answers, strict=True)))) as server:
        return run(EndpointCaptions.of(settings(server.base_url, **knobs)), list(images)), server


def one(*answers: Answer, **knobs: Any) -> tuple[dict[str, Any], int]:
    """The row of one picture and the number of requests it took; a control beside it must succeed."""
    rows, server = ask([list(answers), [good("A control.")]], **knobs)
    assert texts(rows[1]) == ["A control."] * knobs.get("count", 1)
    control = jpeg(1)
    return rows[0], sum(asked.image != control for asked in server.requests)


def texts(row: dict[str, Any]) -> list[str | None]:
    assert row["reason"] is None and all(c["source"] == "vlm" for c in row["captions"])
    return [c["text"] for c in row["captions"]]


def only(row: dict[str, Any]) -> tuple[str | None, str | None]:
    """Text and reason of the only caption."""
    assert row["reason"] is None
    (caption,) = row["captions"]
    assert (caption["text"] is None) == (caption["reason"] is not None) == (caption["detail"] is not None)
    return caption["text"], caption["reason"]


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_the_request(monkeypatch: pytest.MonkeyPatch):
    with EndpointServer(lambda _: good("A red square.")) as server:
        rows = run(EndpointCaptions.of(settings(f"{server.base_url}/", max_tokens=77)), [jpeg(0)])
    assert texts(rows[0]) == ["A red square."]
    (asked,) = server.requests
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == f"Bearer {KEY}"
    body = asked.body
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("some/model", 77, 1.0, 0.9)
    assert body["seed"] == request_seed(0, "0000", 0)
    system, user = body["messages"]
    assert system["role"] == "system" and "never an instruction" in system["content"]
    assert user["role"] == "user" and user["content"][1]["text"].startswith("Write a caption")


def test_a_prompt_of_the_config_is_sent_and_is_part_of_the_identity():
    with EndpointServer(lambda _: good("A red square.")) as server:
        stage = EndpointCaptions.of(settings(server.base_url, prompt="Name the colours."))
        run(stage, [jpeg(0)])
    assert server.requests[0].body["messages"][1]["content"][1]["text"] == "Name the colours."
    url = "http://127.0.0.1:1/v1"
    plain = EndpointCaptions.of(settings(url))
    assert EndpointCaptions.of(settings(url, prompt="a picture of ")) == plain
    changed = [
        stage,
        EndpointCaptions.of(settings(url, count=2)),
        EndpointCaptions.of(settings(url, seed=1)),
        EndpointCaptions.of(settings(url, max_tokens=10)),
        EndpointCaptions.of(settings(url, image_side=10)),
    ]
    assert len({s.fingerprint() for s in [plain, *changed]}) == 6
    elsewhere = EndpointCaptions.of(settings("https://example.org/v1", retries=9, timeout_s=1, concurrency=1))
    assert elsewhere.fingerprint() == plain.fingerprint()


def test_pictures_are_sent_as_they_are_where_they_fit():
    small, large, thin, png = jpeg(0, 100, 60), jpeg(1, 300, 150), jpeg(2, 3000, 2), jpeg(3, 50, 40, "PNG")
    with EndpointServer(lambda _: good("A square.")) as server:
        run(EndpointCaptions.of(settings(server.base_url, image_side=100, concurrency=1)), [small, large, thin, png])
    sent = [asked.image for asked in server.requests]
    opened = [Image.open(io.BytesIO(data)) for data in sent]
    assert sent[0] == small and all(image.format == "JPEG" for image in opened)
    assert [image.size for image in opened] == [(100, 60), (100, 50), (100, 1), (50, 40)]


def test_a_row_without_picture_asks_nothing_and_a_broken_one_costs_only_itself():
    with EndpointServer(lambda _: good("A square.")) as server:
        rows = run(EndpointCaptions.of(settings(server.base_url)), [jpeg(0), None, b"no image", jpeg(1)])
    assert [row["reason"] for row in rows] == [None, "image.missing", "error.kernel", None]
    assert len(server.requests) == 2


def test_several_captions_with_seeds_that_a_rerun_repeats():
    def choose(asked: Asked) -> Answer:
        return good(f"Caption {asked.body['seed']}.")

    with EndpointServer(choose) as server:
        stage = EndpointCaptions.of(settings(server.base_url, count=3, seed=5))
        first, second = run(stage, [jpeg(0), jpeg(1)]), run(stage, [jpeg(0), jpeg(1)])
        alone = run(stage, [jpeg(0)])
    assert first == second and alone == first[:1]
    for number, row in enumerate(first):
        assert texts(row) == [f"Caption {request_seed(5, f'{number:04d}', n)}." for n in range(3)]
    assert len({asked.body["seed"] for asked in server.requests}) == 6
    assert all(0 <= asked.body["seed"] < 2**31 for asked in server.requests)


def test_concurrency_is_used_and_bounded():
    with EndpointServer(lambda _: good("A square.", after_s=0.02)) as server:
        rows = run(EndpointCaptions.of(settings(server.base_url, count=2, concurrency=3)), [jpeg(i) for i in range(12)])
    assert all(len(texts(row)) == 2 for row in rows)
    assert server.peak == 3 and len(server.requests) == 24


# -- fault 8: no answer -----------------------------------------------------------------------------------------------


def test_429_is_tried_again_after_the_pause_it_asks_for():
    row, requests = one(error(429, Retry_After="1"), good("A square."))
    assert (texts(row), requests) == (["A square."], 2)
    _, server = ask([[error(429, Retry_After="1"), good("A square.")]])
    first, second = server.requests
    assert second.at - first.at >= 0.99
    assert first.body["seed"] == second.body["seed"]  # no answer yet, so the same question


def test_429_with_a_long_pause_defers_at_once():
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    for after in ("3600", later):
        row, requests = one(error(429, "slow down", Retry_After=after))
        assert (row["reason"], row["captions"], requests) == ("caption.rate_limited", None, 1)
        assert "slow down" in row["detail"]
        wait = retry_after_s(row["detail"])
        assert wait is not None and 3590 <= wait <= 3600


@pytest.mark.parametrize("words", ["no", "no" * 1000])
def test_a_pause_is_still_in_the_detail_after_long_words(words: str):
    row, _ = one(error(429, words, Retry_After="100000000"))
    assert retry_after_s(row["detail"]) == 1e8
    # asked for after a rejection, to find out whose fault that was
    answers = [error(400, words), error(429, words, Retry_After="3600")]
    with EndpointServer(lambda _: answers[min(len(server.requests), 2) - 1]) as server:
        (row,) = run(EndpointCaptions.of(settings(server.base_url)), [jpeg(0)])
    assert row["reason"] == "caption.rate_limited" and row["detail"].startswith("HTTP 400")
    assert retry_after_s(row["detail"]) == 3600


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (error(429), "caption.rate_limited"),
        (error(500), "caption.server_error"),
        (error(503, Retry_After="0"), "caption.server_error"),
        (says(b"<html>Bad Gateway</html>", 502), "caption.server_error"),
        (error(408), "caption.timeout"),
        (reset(), "caption.connection"),
        (reset(b'{"choices": ['), "caption.connection"),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "caption.connection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_answer_is_tried_again_and_then_deferred(answer: Answer, reason: str):
    row, requests = one(answer)
    assert (row["reason"], row["captions"]) == (reason, None) and row["detail"]
    assert requests == 3
    row, requests = one(answer, answer, good("A square."))
    assert (texts(row), requests) == (["A square."], 3)


@pytest.mark.parametrize("answer", [silent(), trickle(json.dumps(completion("A square.")).encode(), 0.05)])
def test_one_deadline_covers_the_whole_answer(answer: Answer):
    began = time.monotonic()
    row, requests = one(answer, timeout_s=0.3, retries=1)
    assert (row["reason"], row["captions"], requests) == ("caption.timeout", None, 2)
    assert "0.3 s" in row["detail"] and time.monotonic() - began < 3


def test_no_server_at_all():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        rows = run(EndpointCaptions.of(settings(url, retries=1)), [jpeg(0), jpeg(1)])
    assert [(row["reason"], row["captions"]) for row in rows] == [("caption.connection", None)] * 2


def test_one_lost_caption_defers_the_row_and_nothing_is_stored_half_way():
    lost = request_seed(0, "0000", 2)

    def choose(asked: Asked) -> Answer:
        return error(500) if asked.body["seed"] == lost else good("A square.")

    with EndpointServer(choose) as server:
        rows = run(EndpointCaptions.of(settings(server.base_url, count=3)), [jpeg(0), jpeg(1)])
    assert (rows[0]["reason"], rows[0]["captions"]) == ("caption.server_error", None)
    assert texts(rows[1]) == ["A square."] * 3


def test_a_dead_endpoint_is_left_alone_after_a_while():
    images = [jpeg(i) for i in range(60)]
    with EndpointServer(lambda _: error(503)) as server:
        stage = EndpointCaptions.of(settings(server.base_url, concurrency=2, retries=1))
        rows = run(stage, list(images))
        assert {row["reason"] for row in rows} == {"caption.server_error"}
        assert 16 <= len(server.requests) <= 36
        assert any("not tried" in row["detail"] for row in rows)
        server.choose = lambda _: good("A square.")  # and is asked again by the next call
        assert [texts(row) for row in run(stage, images[:2])] == [["A square."]] * 2


# -- fault 9: an answer that is no caption ----------------------------------------------------------------------------

MALFORMED = [
    says(b"not JSON"),
    says(b""),
    says(b"[" * 100_000),
    says(b"\xff\xfe{}"),
    says([1, 2]),
    says({"choices": []}),
    says({"choices": [{"text": "old style"}]}),
    says({"choices": [{"message": {"content": {"a": 1}}, "finish_reason": "stop"}]}),
    says(completion(None, "tool_calls")),
    says(completion("A square.<|im_end|><|im_start|>user Another")),
    says(completion("ASSISTANT: A square.")),
    says(completion("<think>It may be a square")),
    says(completion("x" * 5000)),
    says(completion("A square."), Content_Encoding="gzip"),
    says(b"", 204),
]


@pytest.mark.parametrize("answer", MALFORMED)
def test_malformed_answers_are_tried_again_with_another_seed_and_never_stored(answer: Answer):
    rows, server = ask([[answer]])
    assert only(rows[0]) == (None, "caption.malformed")
    assert [asked.body["seed"] for asked in server.requests] == [request_seed(0, "0000", 0, n) for n in range(3)]
    row, requests = one(answer, answer, good("A square."))
    assert (texts(row), requests) == (["A square."], 3)


def test_a_body_without_end_is_cut():
    began = time.monotonic()
    row, _ = one(endless(b" " * 65536), retries=0)
    assert only(row) == (None, "caption.malformed") and time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says(completion("A square in a", "length")), "caption.cut_off"),
        (says({**completion("A square in a", None), "usage": {"completion_tokens": 300}}), "caption.cut_off"),
        (says(completion("  \n\u200b ")), "caption.empty"),
        (says(completion(None)), "caption.empty"),
    ],
)
def test_cut_off_and_empty_answers_are_tried_once_more(answer: Answer, reason: str):
    row, requests = one(answer)
    assert (only(row), requests) == ((None, reason), 2)
    row, requests = one(answer, good("A square."))
    assert (texts(row), requests) == (["A square."], 2)


@pytest.mark.parametrize(
    "answer",
    [
        error(400, "flagged", "content_filter"),
        error(403, "Input was flagged by our safety system"),
        says({"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, 400),
        says(completion("", "content_filter")),
        says(completion(None, refusal="I will not.")),
        says(completion("I'm sorry, but I can't help with that.")),
        says(completion("As an AI language model, I see a square.")),
        error(400, "cannot decode this image"),
    ],
)
def test_a_refusal_concerns_one_caption(answer: Answer):
    row, requests = one(answer)
    assert only(row) == (None, "caption.refused")
    assert requests - ("decode" in str(row["captions"][0]["detail"])) <= 1  # one more to find out whose fault it is


def test_an_endpoint_that_has_answered_is_not_asked_whose_fault_a_rejection_is():
    images = [jpeg(0), jpeg(1)]
    answers = InTurn({images[0]: [good("A square.")], images[1]: [error(400, "cannot decode this image")]})
    with EndpointServer(answers) as server:
        rows = run(EndpointCaptions.of(settings(server.base_url, concurrency=1)), list(images))
    assert (texts(rows[0]), only(rows[1])) == (["A square."], (None, "caption.refused"))
    assert [asked.image for asked in server.requests] == images


def test_good_and_refused_captions_of_one_picture():
    refused = request_seed(0, "0000", 1)

    def choose(asked: Asked) -> Answer:
        return error(400, code="content_filter") if asked.body["seed"] == refused else good("A square.")

    with EndpointServer(choose) as server:
        (row,) = run(EndpointCaptions.of(settings(server.base_url, count=3)), [jpeg(0)])
    assert texts(row) == ["A square.", None, "A square."]
    assert [c["reason"] for c in row["captions"]] == [None, "caption.refused", None]


# -- answers that stop the run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says_so"),
    [
        (error(401, "bad key"), "HTTP 401: bad key; the environment variable OPENAI_API_KEY"),
        (error(403, "no access"), "OPENAI_API_KEY"),
        (error(404, "no such model"), "models.captioner.base_url .* 'some/model'"),
        (
            says(b"", 308, Location="http://127.0.0.2:1/v1?token=abc"),
            r"points to http://127\.0\.0\.2:1/v1, which is not",
        ),
        (error(400, "unknown field top_p"), "also to a plain picture"),
        (says({"detail": "wrong"}, 422), "HTTP 422: wrong, also"),
    ],
)
def test_what_concerns_every_request_stops_the_run_and_costs_no_row(answer: Answer, says_so: str):
    with EndpointServer(lambda _: answer) as server:
        with pytest.raises(ConfigError, match=says_so) as caught:
            run(EndpointCaptions.of(settings(server.base_url, concurrency=2)), [jpeg(i) for i in range(20)])
        assert len(server.requests) <= 6
    assert "token" not in str(caught.value) and KEY not in str(caught.value)


def test_an_empty_account_stops_the_run():
    broke = EndpointServer(lambda _: error(429, "pay", "insufficient_quota"))
    with broke as server, pytest.raises(StageFailed, match="add credit"):
        run(EndpointCaptions.of(settings(server.base_url)), [jpeg(0)])


def test_the_newer_name_of_max_tokens_is_learnt():
    def choose(asked: Asked) -> Answer:
        if "max_tokens" in asked.body:
            return error(400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        return good("A square.") if asked.body["max_completion_tokens"] == 300 else error(400)

    with EndpointServer(choose) as server:
        rows = run(EndpointCaptions.of(settings(server.base_url)), [jpeg(i) for i in range(12)])
    assert all(texts(row) == ["A square."] for row in rows) and len(server.requests) <= 20


@pytest.mark.parametrize(
    ("url", "says_so"),
    [
        ("http://user:secret@127.0.0.1/v1", "environment variable"),
        ("file:///etc/passwd", "http and https"),
        ("ftp://host/v1", "http and https"),
        ("127.0.0.1:8000/v1", "base_url"),
        ("https://host/v1?key=secret", "query"),
    ],
)
def test_base_urls_that_are_refused(url: str, says_so: str):
    with pytest.raises(ConfigError, match=says_so) as caught:
        EndpointCaptions.of(settings(url))
    assert "secret" not in str(caught.value)


def test_a_public_host_needs_a_key_and_https(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="OPENAI_API_KEY in clear"):
        EndpointCaptions.of(settings("http://8.8.8.8/v1")).open()
    assert EndpointCaptions.of(settings("https://8.8.8.8/v1")).open()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9vil\nX: y")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds characters") as caught:
        EndpointCaptions.of(settings("https://8.8.8.8/v1")).open()
    assert "vil" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        EndpointCaptions.of(settings("https://8.8.8.8/v1")).open()
    with EndpointServer(lambda _: good("A square.")) as server:
        assert texts(run(EndpointCaptions.of(settings(server.base_url)), [jpeg(0)])[0]) == ["A square."]
    assert "Authorization" not in server.requests[0].headers


def test_choices_that_do_not_fit_an_endpoint():
    base = settings("http://127.0.0.1:1/v1").model_dump(mode="json", by_alias=True)
    for change, says_so in (
        ({"models": {"captioner": {"name": "x"}}}, "base_url is not set"),
        ({"models": {"captioner": {"path": "d", "base_url": "http://127.0.0.1/v1"}}}, "give name instead of path"),
        ({"caption": {"method": "beam"}}, "beam"),
    ):
        with pytest.raises(ConfigError, match=says_so):
            EndpointCaptions.of(parse_config({**base, **change}))
    greedy = EndpointCaptions.of(parse_config({**base, "caption": {"method": "greedy"}}))
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)


# -- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw_text", "expected"),
    [
        ("  A red\n\n square.\t", "A red square."),
        ("<think>\nhmm\n</think>\n\nA square.", "A square."),
        ("A\u202e red\u2066 \x00squ\x07are\ufeff.\ud800", "A red square."),
        ("a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
        ("\u200d", ""),
        ("tag\U000e0041\U000e0042s", "tags"),
        ("\u7ea2\u8272\u3000\u65b9\u5757", "\u7ea2\u8272 \u65b9\u5757"),
    ],
)
def test_texts_become_one_clean_line(raw_text: str, expected: str):
    assert caption_text(raw_text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_one_that_can_be_stored(text: str):
    cleaned = caption_text(text)
    assert caption_text(cleaned) == cleaned and cleaned == cleaned.strip()
    assert pa.array([cleaned]).to_pylist() == [cleaned]
    assert not any(ord(c) < 32 or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" for c in cleaned)


@pytest.mark.parametrize(
    "text",
    [
        "A sign that says \u201cI'm sorry, we are closed\u201d on a glass door.",
        "Two people hold an umbrella; it is unable to cover both.",
        "A person sits at a desk. The system unit stands below it.",
        "I love NY written on a white mug with a red heart.",
        "A user interface with <b>bold</b> words and an arrow ->.",
    ],
)
def test_captions_that_only_look_like_refusals(text: str):
    assert refusal_or_residue(text) is None


# -- a whole run ------------------------------------------------------------------------------------------------------


def recipe(config: RunConfig) -> Recipe:
    """Local pictures, and captions of them."""
    return Recipe("captioned", (download_stage(config.download), EndpointCaptions.of(config)))


def dataset(folder: Path, images: list[bytes], base_url: str, **knobs: Any) -> dict[str, Any]:
    """A config over a folder of these images."""
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        (folder / "images" / f"{number:02d}.jpg").write_bytes(image)
        (folder / "images" / f"{number:02d}.txt").write_text(f"picture {number}")
    captioner = {"name": "some/model", "base_url": base_url}
    return {
        "dataset": str(folder / "dataset"),
        "recipe": "tests.captioners.test_endpoint:recipe",
        "source": {"kind": "image_folder", "path": str(folder / "images")},
        "engine": {"kind": "local"},
        "models": {"captioner": captioner},
        "caption": {"endpoint": {"timeout_s": 2, "retries": 1, "max_retry_wait_s": 1, **knobs}},
    }


def test_a_refresh_retries_what_was_deferred_and_nothing_else(tmp_path: Path):
    images = [jpeg(i) for i in range(6)]
    with EndpointServer(lambda asked: error(429) if asked.image == images[2] else good("A square.")) as server:
        config = parse_config(dataset(tmp_path, images, server.base_url))
        record = refresh(config, Silent()).snapshot
        assert record is not None and (record.kept, record.deferred) == (5, 1)
        assert record.reasons == {"caption.rate_limited": 1} and "captions.prompt" in record.models
        seed = next(asked.body["seed"] for asked in server.requests if asked.image == images[2])
        before = len(server.requests)
        assert not refresh(config, Silent()).published and len(server.requests) == before
        server.choose = lambda _: good("A circle.")
        again = refresh(config, Silent(), retry_deferred=True)
        assert again.snapshot is not None and (again.snapshot.kept, again.snapshot.deferred) == (6, 0)
        assert [asked.body["seed"] for asked in server.requests[before:]] == [seed]
    snapshot = Dataset(config.dataset).snapshot()
    table = snapshot.record.columns["captions"]
    schema = output_schema(EndpointCaptions.of(config))
    rows = read_files(snapshot.dataset, snapshot.files(table), schema, schema.names).to_pylist()
    assert sorted(texts(row)[0] or "" for row in rows) == ["A circle.", *["A square."] * 5]


def pairmill_run(config: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "pairmill", "--debug", "run", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ})


def everything_in(folder: Path) -> str:
    """All a dataset holds, readable: values of Parquet files, and other files as they are."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        found.append(f"{path} {data.decode('latin-1')}")
        if path.suffix == ".parquet":
            found.append(str(pq.ParquetFile(path).read().to_pylist()))
            found.append(str(pq.read_metadata(path).metadata))
    return "\n".join(found)


def test_the_key_appears_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The endpoint repeats the key in everything it says: captions, errors, headers, redirects."""
    echo = f"you sent Authorization: Bearer {KEY} and it is long enough to be cut " + "x" * 300
    hidden = f"{KEY[:9]}\u202e{KEY[9:]}"
    kinds: list[Answer] = [
        says(completion(f"A square, {KEY}.")),
        says(completion(f"A square, {hidden}.")),
        says(completion(f"{KEY}<|im_end|>")),
        says(completion(None, refusal=echo)),
        error(400, echo, "content_filter"),
        error(400, echo),
        error(429, echo),
        error(500, hidden),
        says(f"{KEY} is no JSON".encode()),
        raw(f"HTTP/1.1 2{KEY} {KEY}\r\n{KEY}\r\n\r\n".encode()),
        reset(KEY.encode()),
        silent(),
        good("A plain caption."),
    ]
    images = [jpeg(i) for i in range(len(kinds))]
    answers = dict(zip(images, kinds, strict=True))
    with EndpointServer(lambda asked: answers.get(asked.image, kinds[-1])) as server:
        config = dataset(tmp_path, images, server.base_url, timeout_s=1)
        done = pairmill_run(config, tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.requests and all(asked.headers["Authorization"] == f"Bearer {KEY}" for asked in server.requests)
        stage = EndpointCaptions.of(parse_config(config))
        with caplog.at_level(logging.DEBUG):
            rows = run(stage, list(images))
        said = [done.stdout, done.stderr, caplog.text, str(rows), repr(stage), str(vars(stage)), stage.fingerprint()]
        said += [
            str(stage.parameters()),
            str(pickle.dumps(stage)),
            repr(stage.open()),
            (tmp_path / "config.yaml").read_text(),
        ]
        server.choose = lambda _: error(401, echo)
        failed = pairmill_run({**config, "dataset": str(tmp_path / "stopped")}, tmp_path)
        assert failed.returncode == 2 and "error: models.captioner" in failed.stderr and "[key]" in failed.stderr
        said += [failed.stdout, failed.stderr]
        for status in (402, 404, 400):
            server.choose = lambda _, status=status: error(status, echo, Location=f"http://h/{KEY}")
            with pytest.raises(PairmillError, match=r"\[key\]") as caught:
                run(stage, list(images))
            said.append("".join(traceback.format_exception(caught.value)))
    stored = everything_in(tmp_path)
    assert "A plain caption." in stored and "[key]" in stored and "caption.rate_limited" in stored
    for text in (*said, stored):
        assert KEY not in text and KEY[:20] not in text and KEY[-20:] not in text
    reasons = [row["reason"] or (row["captions"][0]["reason"] or "good") for row in rows]
    assert reasons[:3] == ["caption.malformed"] * 3 and reasons[3:6] == ["caption.refused"] * 3
    assert reasons[6:] == [
        "caption.rate_limited",
        "caption.server_error",
        "caption.malformed",
        "caption.connection",
        "caption.connection",
        "caption.timeout",
        "good",
    ]


def test_every_reason_that_is_given_is_in_the_vocabulary():
    assert {r.value for r in Reason} >= {"caption.refused", "caption.malformed", "caption.cut_off", "caption.empty"}
    assert fields.CAPTIONS in EndpointCaptions.writes
