"""The local engine: its processes, and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import yaml

from pairmill.engines import local
from pairmill.stage import WORKERS_ENV
from tests.steps import config, texts, write_urls

HERE = Path(__file__).resolve().parent.parent.parent


def test_each_process_knows_how_many_there_are():
    context = multiprocessing.get_context("spawn")
    arguments = (SimpleNamespace(groups=()), 3)
    with ProcessPoolExecutor(1, mp_context=context, initializer=local._initialize, initargs=arguments) as pool:
        assert pool.submit(os.getenv, WORKERS_ENV).result() == "3"
    assert WORKERS_ENV not in os.environ


def test_ctrl_c_waits_for_no_model_that_loads(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(20))
    options = {"until": str(tmp_path / "never"), "pause_s": 1.0}
    run = config(tmp_path, table, recipe="tests.engines.failing_steps:recipe_that_loads", options=options)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", by_alias=True)))
    command = [sys.executable, "-m", "pairmill", "run", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=HERE, text=True) as process:
        try:
            while not (tmp_path / "never-awaited").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
