"""The command: exit codes, messages without tracebacks, output for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import pairmill.cli
from pairmill import __version__
from pairmill.doctor import Finding, Level
from pairmill.errors import ConfigError, StageFailed
from tests.steps import texts, write_urls

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("run", "plan", "status", "snapshots", "sql", "export", "train clip", "doctor", "demo")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command in this process, as its entry point does."""
    monkeypatch.delenv("PAIRMILL_DEBUG", raising=False)
    root = logging.getLogger()
    before = signal.getsignal(signal.SIGTERM), root.handlers[:], root.level

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["pairmill", *arguments])
        with pytest.raises(SystemExit) as end:
            pairmill.cli.main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before[0])
    root.handlers, root.level = before[1:]
    logging.captureWarnings(False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config over 200 URLs whose steps measure texts only."""
    write_urls(tmp_path / "urls.parquet", texts(200))
    path = tmp_path / "config.yaml"
    data = {
        "dataset": str(tmp_path / "dataset"),
        "recipe": "tests.steps:recipe",
        "source": {"kind": "url_table", "path": str(tmp_path / "urls.parquet")},
        "engine": {"kind": "local"},
        "shard_size": 100,
    }
    path.write_text(yaml.safe_dump(data))
    return path


def dataset(config: Path) -> str:
    return str(config.parent / "dataset")


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_and_version(command: Command):
    shown = command("--help")
    assert shown.code == 0
    assert all(verb.split()[0] in shown.out for verb in VERBS)
    assert command("--version").out == f"pairmill {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_examples_that_name_it(command: Command, verb: str):
    shown = command(*verb.split(), "--help")
    assert shown.code == 0
    examples = shown.out.partition("Examples:")[2].partition("Options:")[0]
    assert f"\n    pairmill {verb} " in examples or f"\n    pairmill {verb}\n" in examples


def test_help_comes_at_once():
    """Best of three, so that a busy machine does not decide."""

    def seconds() -> float:
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "pairmill", "--help"], cwd=ROOT, capture_output=True, check=True)
        return time.monotonic() - begin

    assert min(seconds() for _ in range(3)) < 1


# -- run and look -----------------------------------------------------------------------------------------------------


def test_run_says_what_happened_and_the_second_run_that_nothing_did(command: Command, config: Path):
    first = command("run", str(config))
    assert first.code == 0
    assert "200 admitted = 140 kept (70.0%) + 60 dropped + 0 deferred" in first.out
    assert "published snapshot 1" in first.out
    assert "200 rows read: 200 new pairs" in first.err
    second = command("run", str(config))
    assert second.code == 0
    assert "nothing new: still snapshot 1" in second.out
    assert "0 new pairs, 200 known" in second.out


def test_json_is_all_there_is_on_stdout(command: Command, config: Path):
    ran = json.loads(command("run", str(config), "--json").out)
    assert (ran["published"], ran["admitted_new"], ran["computed"]["words"]) == (True, 200, 200)
    assert ran["snapshot"]["admitted"] == 200 == ran["snapshot"]["kept"] + sum(ran["snapshot"]["reasons"].values())
    planned = json.loads(command("plan", str(config), "--json").out)
    assert planned["new_rows"] == 0
    assert all(not step["rows_todo"] for step in planned["steps"])
    assert json.loads(command("status", dataset(config), "--json").out) == ran["snapshot"]
    assert json.loads(command("snapshots", dataset(config), "--json").out) == [ran["snapshot"]]


def test_plan_changes_nothing(command: Command, config: Path):
    planned = command("plan", str(config))
    assert planned.code == 0
    assert "200 new pairs would be admitted" in planned.out
    assert not Path(dataset(config)).exists()


def test_plan_and_run_say_where_a_shipped_model_judges(command: Command, config: Path):
    said = "by the tiny models that pairmill ships, which know coloured shapes and nothing else"
    assert f"clip, captions, caption_clip, itm: {said}" in command("plan", str(config), "--set", "recipe=capfilt").err
    own = ["--set", "recipe=clip_filter", "--set", "models.clip={name: ViT-L-14, pretrained: openai}"]
    assert said not in command("plan", str(config), *own).err
    published = command("plan", str(config), "--set", "recipe=datacomp_clip_b32_25")  # has a model of its own
    assert (published.code, said in published.err) == (0, False)
    write_urls(config.parent / "urls.parquet", [])
    assert said in command("run", str(config), "--set", "recipe=clip_filter").err


def test_a_changed_threshold_makes_a_snapshot_and_old_ones_stay(command: Command, config: Path):
    command("run", str(config))
    changed = command("run", str(config), "--set", "options.words=5")
    assert "published snapshot 2" in changed.out
    assert "rows computed: nothing" in changed.out
    listed = command("snapshots", dataset(config)).out.splitlines()
    assert [line.split()[0] for line in listed] == ["id", "1", "2"]
    counts = [
        json.loads(command("sql", dataset(config), "--format", "json", "--snapshot", number, sql).out)[0]["n"]
        for number in "12"
        for sql in ["SELECT count(*) AS n FROM pairs WHERE status = 'kept'"]
    ]
    assert counts == [140, 100]


def test_sql_prints_tables_json_and_csv(command: Command, config: Path):
    command("run", str(config))
    sql = "SELECT reason, count(*) AS pairs FROM pairs GROUP BY 1 ORDER BY 2"
    table = command("sql", dataset(config), sql).out.splitlines()
    assert [line.split() for line in table] == [["reason", "pairs"], ["text.too_few_words", "60"], ["140"]]
    as_csv = command("sql", dataset(config), sql, "--format", "csv").out
    assert list(csv.reader(io.StringIO(as_csv))) == [["reason", "pairs"], ["text.too_few_words", "60"], ["", "140"]]
    as_json = command("sql", dataset(config), sql, "--format", "json").out
    assert json.loads(as_json)[1] == {"reason": None, "pairs": 140}


def test_a_reader_that_leaves_early_is_no_error(config: Path):
    subprocess.run([sys.executable, "-m", "pairmill", "run", str(config)], cwd=ROOT, capture_output=True, check=True)
    sql = f"{sys.executable} -m pairmill sql {dataset(config)} --format csv 'SELECT * FROM range(100000)' | head -2"
    done = subprocess.run(["bash", "-c", sql], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "range\n0\n"
    assert done.stderr == ""


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["run"], "CONFIG.yaml"),
        (["run", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["status", "nowhere"], "nowhere is no pairmill dataset; `pairmill run CONFIG.yaml` makes one"),
        (["snapshots", "nowhere"], "is no pairmill dataset"),
        (["sql", "nowhere", "SELECT 1"], "is no pairmill dataset"),
        (["export", "nowhere", "--format", "tar", "--out", "x"], "'webdataset', 'parquet'"),
        (["train", "clip", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["demo", "--pairs", "0"], "--pairs"),
    ],
)
def test_wrong_arguments_are_2_with_a_message_and_no_traceback(command: Command, arguments: list[str], message: str):
    result = command(*arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_wrong_config_keys_are_2_one_line_each(command: Command, config: Path):
    result = command("run", str(config), "--set", "dedup.semantc=1", "--set", "download.timeout_s=soon")
    assert result.code == 2
    first, timeout, side = result.err.splitlines()
    assert first == f"error: {config} is wrong:"
    assert timeout.startswith("  download.timeout_s: expected a valid number")
    assert side.startswith("  dedup.semantc: unknown key; did you mean 'semantic'?")


def test_wrong_sql_is_2_and_names_the_views(command: Command, config: Path):
    command("run", str(config))
    for sql in ("SELECT nope FROM pairs", "DROP TABLE pairs"):
        result = command("sql", dataset(config), sql)
        assert result.code == 2
        assert result.out == ""
        assert "Traceback" not in result.err
    missing = command("sql", dataset(config), "--snapshot", "7", "SELECT 1")
    assert missing.code == 2
    assert "has no snapshot 7; it has 1" in missing.err


@pytest.mark.parametrize("verb", [("run",), ("vacuum",), ("vacuum", "--dry-run"), ("rollback", "1")], ids=" ".join)
def test_a_dataset_that_cannot_be_written_is_1_and_no_defect(command: Command, config: Path, verb: tuple[str, ...]):
    assert command("run", str(config)).code == 0
    lock = Path(dataset(config), ".lock")
    lock.unlink()
    lock.mkdir()  # which stops root, too
    name, *more = verb
    result = command(name, str(config) if name == "run" else dataset(config), *more)
    assert result.code == 1
    assert f"error: cannot write to {dataset(config)}: " in result.err
    assert "Traceback" not in result.err


def test_a_file_in_the_place_of_the_dataset_is_2(command: Command, config: Path):
    for place in (config, config / "below"):
        result = command("run", str(config), "--set", f"dataset={place}")
        assert result.code == 2
        assert f"error: {place} cannot be a dataset: a file is in its way" in result.err


def test_an_address_where_nobody_answers_is_2(command: Command, config: Path):
    for key in ("dataset", "source.path"):
        result = command("plan", str(config), "--set", f"{key}=ftp://127.0.0.1:1/x.csv")
        assert result.code == 2
        assert "Connection refused" in result.err
        assert "Traceback" not in result.err


def test_a_failed_run_is_1_and_shows_the_first_cause(command: Command, config: Path):
    write_urls(config.parent / "urls.parquet", [f"poison {i} words here" for i in range(100)])
    result = command("run", str(config))
    assert result.code == StageFailed.exit_code == 1
    assert "more than the error budget allows" in result.err
    assert "ValueError: a poisoned text" in result.err  # of the row, as the budget's message quotes it
    assert "cli.py" not in result.err


def test_an_unexpected_error_is_called_a_defect_with_its_traceback(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("https://u:canary@host/?k=canary \x1b[31m")

    monkeypatch.setattr("pairmill.run.refresh", broken)
    result = command("run", str(config))
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "This is a defect of pairmill" in result.err
    assert "canary" not in result.err
    assert "\x1b" not in result.err


def test_a_recipe_of_ones_own_that_fails_is_no_defect_of_ours(command: Command, config: Path):
    result = command("plan", str(config), "--set", "recipe=os:getcwd")  # which takes no config
    assert result.code == 2
    assert "error: recipe: 'os:getcwd' failed: TypeError: " in result.err
    assert "Traceback" not in result.err
    assert "in load_recipe" in command("--debug", "plan", str(config), "--set", "recipe=os:getcwd").err


def test_a_demo_or_training_that_cannot_write_is_told_in_a_line(command: Command, config: Path):
    train = ["train", "captioner", "pairmill/weights/captioner-tiny/train.yaml", "--set", "data.scenes=8"]
    for verb in (["demo", "--pairs", "10", "--out", f"{config}"], [*train, "--set", f"out={config}/model"]):
        result = command(*verb)
        assert result.code == 1
        assert str(config) in result.err.splitlines()[-1]
        assert result.err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in result.err
        assert "defect" not in result.err


def test_debug_shows_the_traceback_of_a_known_error(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PAIRMILL_DEBUG", "1")
    result = command("status", "nowhere")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: ")


def test_the_doctor_is_1_when_a_check_fails(command: Command, monkeypatch: pytest.MonkeyPatch):
    findings = [Finding("python", Level.OK, "3.11"), Finding("ray", Level.FAIL, "broken", "mend it")]
    monkeypatch.setattr("pairmill.doctor.examine", lambda: findings)
    shown = command("doctor")
    assert shown.code == 1
    assert shown.out.splitlines() == ["ok    python: 3.11", "fail  ray: broken", "      mend it"]
    as_json = command("doctor", "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["findings"][1] == {
        "check": "ray",
        "level": "fail",
        "message": "broken",
        "fix": "mend it",
    }
    monkeypatch.setattr("pairmill.doctor.examine", lambda: findings[:1])
    assert command("doctor").code == 0


def test_packages_of_another_checkout_are_refused(tmp_path: Path):
    (tmp_path / "filters").mkdir()
    (tmp_path / "filters" / "__init__.py").write_text("")
    code = f"import sys; import pairmill; sys.path.insert(0, {str(tmp_path)!r}); from pairmill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"the package 'filters' is imported from {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_code_of_that_name_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data_of_mine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="'data_of_mine' is imported from"):
        pairmill.cli.check_checkout(["data_of_mine"])
    with pytest.raises(ConfigError, match="'no_such_package' is missing"):
        pairmill.cli.check_checkout(["no_such_package"])
    pairmill.cli.check_checkout()


# -- interrupted ------------------------------------------------------------------------------------------------------


SLOW_RECIPE = """
import time
from dataclasses import dataclass, field
from pairmill.plan import Recipe
from tests.steps import CountWords

@dataclass(frozen=True)
class SlowWords(CountWords):
    pause: float = field(default=0.0, compare=False, metadata={"identity": False})

    def open(self):
        count = super().open()

        def slowly(batch):
            time.sleep(self.pause)
            return count(batch)

        return slowly

def recipe(config):
    return Recipe("slow", (SlowWords(log="computed", pause=config.options["pause"]),))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_is_130_and_the_same_command_goes_on(config: Path, sent: signal.Signals):
    folder = config.parent
    write_urls(folder / "urls.parquet", texts(1000))
    (folder / "slow_recipe.py").write_text(SLOW_RECIPE)  # a recipe of the current folder is found
    log = folder / "computed"
    run = [sys.executable, "-c", "from pairmill.cli import main; main()", "run", str(config)]
    run += ["--set", "recipe=slow_recipe:recipe", "--set", "shard_size=50", "--json"]
    place = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    first = subprocess.Popen(
        [*run, "--set", "options.pause=0.2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place
    )
    deadline = time.monotonic() + 60
    while len(log.read_text().splitlines() if log.exists() else ()) < 150 and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(sent)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in err
    second = subprocess.run([*run, "--set", "options.pause=0"], capture_output=True, timeout=120, check=False, **place)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert report["snapshot"]["admitted"] == 1000
    assert 0 < report["computed"]["words"] <= 900  # what was finished before was kept
