"""The doctor: each check on a machine that is well and on one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairmill import doctor
from pairmill.doctor import Finding, Level


def test_pythons_without_pins_fail():
    assert doctor.check_python((3, 12)).level is Level.OK
    for version in ((3, 9), (3, 13)):
        finding = doctor.check_python(version)
        assert finding.level is Level.FAIL
        assert finding.fix


def test_packages_that_are_missing_or_old_are_named_with_the_command_to_run():
    found = doctor.check_packages(["pytest>=1", "pydantic>=9999", "no-such-package>=1", 'tomli; python_version < "3"'])
    assert [(f.check, f.level) for f in found] == [
        ("package pydantic", Level.FAIL),
        ("package no-such-package", Level.FAIL),
    ]
    assert "needs >=9999" in found[0].message
    assert 'pip install "no-such-package>=1"' in (found[1].fix or "")


def test_packages_that_fit_are_one_line():
    assert doctor.check_packages(["pytest>=1"]) == [Finding("packages", Level.OK, "all 1 there, in versions that fit")]


def test_a_temporary_folder_that_is_not_there_fails(tmp_path: Path):
    assert doctor.check_temp(str(tmp_path)).level in (Level.OK, Level.WARN)
    finding = doctor.check_temp(str(tmp_path / "none"))
    assert finding.level is Level.FAIL
    assert "TMPDIR" in (finding.fix or "")


def test_descriptors_are_held_against_the_concurrency():
    assert doctor.check_descriptors(1024, 256).level is Level.OK
    assert doctor.check_descriptors(300, 256).level is Level.WARN
    few = doctor.check_descriptors(256, 256)
    assert few.level is Level.FAIL
    assert few.fix == "ulimit -n 1024, or a smaller download.concurrency"


def test_a_system_without_shared_memory_is_well(tmp_path: Path):
    assert doctor.check_shared_memory(str(tmp_path / "none")).level is Level.OK


def test_a_probe_that_fails_says_why():
    assert doctor._probe("import no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor._probe("import os; os._exit(7)") == "the process ended with code 7"
    assert doctor._probe("print('noise'); print('FOUND {\"a\": 1}')") == {"a": 1}


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    assert doctor._probe("import time; time.sleep(60)") == "no answer within 0.5 s"


def test_the_shipped_model_and_faiss_load_here():
    for finding in (doctor.check_model(), doctor.check_faiss()):
        assert finding.level is not Level.FAIL, finding.message


def test_what_bf16_gains_here_is_measured_and_told(monkeypatch: pytest.MonkeyPatch):
    finding = doctor.check_processor()
    assert finding.level is Level.OK, finding.message
    assert ("bf16 pays" in finding.message) != ("keep models.precision at fp32" in finding.message)
    for gain, told in ((2.0, "take 50% of the time of fp32: models.precision bf16 pays"), (0.5, "take 200%")):
        monkeypatch.setattr(doctor, "_probe", lambda *_, gain=gain: {"kind": "AVX2", "gain": gain})
        assert told in doctor.check_processor().message
