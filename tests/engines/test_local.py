"""The local engine's processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

from pairmill.engines import local
from pairmill.stage import WORKERS_ENV


def test_each_process_knows_how_many_there_are():
    context = multiprocessing.get_context("spawn")
    arguments = (SimpleNamespace(groups=()), 3)
    with ProcessPoolExecutor(1, mp_context=context, initializer=local._initialize, initargs=arguments) as pool:
        assert pool.submit(os.getenv, WORKERS_ENV).result() == "3"
    assert WORKERS_ENV not in os.environ
