"""Beam's options: the command lines of docs/beam.md are taken, others are refused before anything runs; what follows
from them for workers; the command."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pairmill.engines.beam import check_options
from pairmill.engines.beam.options import RUNNERS, chosen_runner
from pairmill.engines.beam.outbox import Outbox
from pairmill.engines.beam.transforms import units_pipeline
from pairmill.errors import ConfigError, EngineError
from pairmill.execute import Job
from pairmill.plan import Recipe, compile_plan
from pairmill.run import load_config
from pairmill.stage import Resources
from tests.steps import AtLeast, CountChars, CountWords, texts, write_urls
from tests.test_house import HEAVY, modules_after

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTED = re.findall(r"^python beam_runner.py config.yaml (.*)$", (ROOT / "docs/beam.md").read_text(), re.M)


def flags_of(line: str) -> list[str]:
    return [flag for flag in line.split() if flag != "--set" and not flag.startswith("engine.")]


def knows_dataflow() -> bool:
    try:
        return importlib.util.find_spec("google.cloud.dataflow") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_command_lines_are_taken(line: str):
    if "DataflowRunner" in line and not knows_dataflow():
        with pytest.raises(EngineError, match=r"DataflowRunner cannot be loaded: .*apache-beam\[gcp\]"):
            check_options(flags_of(line))  # but only after its options were found to be right
    else:
        check_options(flags_of(line))


def test_the_documented_command_lines_are_of_all_runners():
    named = {path.rpartition(".")[2] for path in RUNNERS.values()}
    assert {flags_of(line)[0].removeprefix("--runner=") for line in DOCUMENTED} == named - {"PortableRunner"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runer=DirectRunner"], r"no pipeline option --runer=DirectRunner \(did you mean --runner\?\)"),
        (["--runner=DirectRunner", "FnApiRunner"], "no pipeline option FnApiRunner"),
        (["--runner=Director"], "--runner=Director is none of DirectRunner, FnApiRunner, DaskRunner, PrismRunner"),
        (["--direct_num_workers=many"], "argument --direct_num_workers: invalid int value: 'many'"),
        (
            ["--runner=DataflowRunner", "--project=p"],
            "Missing GCS path option: temp_location.*Missing required option: reg",
        ),
        (["--direct_num_workers=-1"], "--direct_num_workers=-1: give 1 or more, or 0"),
        (["--s3_secret_access_key=hush"], "^--s3_secret_access_key: pipeline options become part of each snapshot"),
        (["--direct_running_mode=fast"], "argument --direct_running_mode: invalid choice: 'fast'"),
    ],
)
def test_wrong_options_are_named(flags: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        check_options(flags)


def test_a_runner_that_is_not_there_is_an_error_that_says_so():
    with pytest.raises(EngineError, match=r"runner Nothing cannot be loaded: .*no_such_module"):
        check_options(["--runner=no_such_module.Nothing"])


def test_a_dask_scheduler_that_does_not_answer_is_no_defect():
    flags = ["--runner=DaskRunner", "--dask_client_address=tcp://127.0.0.1:1", "--dask_connection_timeout=1"]
    with (
        pytest.raises(EngineError, match=r"the Dask scheduler tcp://127.0.0.1:1 cannot be reached: .* is it up"),
        chosen_runner(flags, None, True),
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "slots", "processes"),
    [
        ([], 1, 1),
        (["--direct_num_workers=3", "--direct_running_mode=multi_threading"], 3, 1),
        (["--runner=fnapi", "--direct_num_workers=3", "--direct_running_mode=multi_processing"], 3, 3),
        (["--runner=FlinkRunner", "--parallelism=16"], 16, 16),
        (["--runner=FlinkRunner"], 1, 1),
        (["--runner=SparkRunner"], 1, 1),
    ],
)
def test_how_many_workers_there_are_follows_from_the_options(flags: list[str], slots: int, processes: int):
    with chosen_runner(flags, None, True) as runner:
        assert (runner.slots, runner.processes) == (slots, processes)


def test_only_groups_that_want_a_gpu_are_told_to_have_one(tmp_path: Path):
    fetch = CountWords(resources=Resources(memory=2**31))
    model = CountChars(resources=Resources(gpu_if_any=True, actor=True))
    plan = compile_plan(Recipe("test", (fetch, AtLeast(3), model)))
    accelerator = "type:nvidia-l4;count:1;install-nvidia-driver"
    with chosen_runner([f"--gpu_accelerator={accelerator}"], None, True) as runner:
        job = Job(str(tmp_path), plan, 0, 0.0, 0)
        built = units_pipeline(runner, job, [], Outbox.make(job.dataset)).to_runner_api()
    hints = {}
    for transform in built.components.transforms.values():
        found = built.components.environments[transform.environment_id].resource_hints
        hints[transform.unique_name] = {urn.split(":")[-2]: value.decode() for urn, value in found.items()}
    assert hints["0 words"] == {"min_ram_bytes": str(2**31)}
    assert hints["1 chars"] == {"accelerator": accelerator}
    assert hints["units/Impulse"] == {}


def test_dataflow_cannot_reach_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pairmill.engines.beam.options.checked", lambda flags: ("DataflowRunner", list(flags)))
    with pytest.raises(ConfigError, match=r"Dataflow's workers cannot reach a disk of this machine; give gs://"):
        chosen_runner([], None, True).__enter__()


# -- the command --


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['beam_runner.py', '--help']\nimport beam_runner, pairmill.cli\n"
    code += "try: pairmill.cli.main(beam_runner.app, 'beam_runner.py')\nexcept SystemExit: pass"
    assert not modules_after(code) & {*HEAVY, "pyarrow", "numpy", "pydantic", "deltalake"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "beam_runner.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_the_command_ends_as_pairmill_run_does(tmp_path: Path):
    write_urls(tmp_path / "urls.parquet", texts(30))
    source = {"kind": "url_table", "path": str(tmp_path / "urls.parquet")}
    data = {"dataset": str(tmp_path / "dataset"), "recipe": "tests.steps:recipe", "source": source}
    data |= {"engine": {"pipeline_options": ["--runner=FnApiRunner"]}}
    (tmp_path / "config.yaml").write_text(json.dumps(data))
    path = str(tmp_path / "config.yaml")

    wrong = command(path, "--runner=DirectRunner", "--direct_workers=2")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: Beam knows no pipeline option --direct_workers=2")
    assert not (tmp_path / "dataset").exists(), "nothing was done"

    turned = command("--runner=DirectRunner", path)
    assert turned.returncode == 2
    assert (
        turned.stderr == "error: --runner=DirectRunner stands where the config is expected: CONFIG.yaml comes first\n"
    )

    failed = command(
        path, "--direct_num_workers=2", "--set", 'options={"log": "/no/such/folder/log"}', "--set", "errors.min_rows=0"
    )
    assert failed.returncode == 1 and "error: stage 'words': " in failed.stderr
    assert "engine: beam (FnApiRunner)" in failed.stderr.splitlines(), "one option more, and the config's hold"

    done = command(path, "--runner=DirectRunner", "--set", "options.words=4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["published"] and report["computed"]["words"] == 30
    engine = yaml.safe_load(report["snapshot"]["config"])["engine"]
    assert engine["kind"] == "beam" and engine["pipeline_options"] == ["--runner=FnApiRunner", "--runner=DirectRunner"]
    assert "engine: beam (DirectRunner)" in done.stderr.splitlines()


def test_the_example_is_a_config_and_all_that_the_image_copies_is_there():
    assert load_config(str(ROOT / "examples/beam/config.yaml")).engine.kind == "beam"
    lines = (ROOT / "examples/beam/Dockerfile").read_text().splitlines()
    copied = [
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    ]
    assert copied and all((ROOT / name).exists() for name in copied)
    import apache_beam

    assert f":{apache_beam.__version__}" in next(line for line in lines if line.startswith("ARG SDK"))
