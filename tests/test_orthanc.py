"""An Orthanc that does not start is a sentence, wherever one is started."""
import os
import pathlib
import subprocess
import sys

import orthanc
import pytest

HERE = pathlib.Path(__file__).resolve().parent
SCRIPTS = {    # what it does instead of starting, and what is said of it
    "echo starting >&2; echo './Orthanc: cannot open shared object file: libx.so' >&2; exit 127":
        "{} ended at once: ./Orthanc: cannot open shared object file: libx.so",
    "echo 'W0101 Starting'; echo 'E0101 The port is in use'; echo 'W0101 Stopped'; exit 255":
        "{} ended at once: E0101 The port is in use",
    "exit 3": "{} ended at once: it printed nothing, status 3",
}


def executable(path: pathlib.Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def broken(tmp_path) -> tuple[str, str]:
    """A command that ends at once, and the sentence about it."""
    script, sentence = next(iter(SCRIPTS.items()))
    command = executable(tmp_path / "broken" / "Orthanc", script)
    return command, sentence.format(command)


def run(*arguments, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], check=False, cwd=HERE, env=os.environ | environment,
                          capture_output=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("script", SCRIPTS, ids=["library", "port", "silent"])
def test_the_sentence_names_the_command_and_its_last_error(tmp_path, script):
    command = executable(tmp_path / "Orthanc", script)
    with pytest.raises(orthanc.DidNotStart) as raised, orthanc.Orthanc(command):
        pass
    assert str(raised.value) == SCRIPTS[script].format(command)


@pytest.mark.parametrize("command", ["nowhere/Orthanc", "chroot nowhere Orthanc"])
def test_a_command_that_does_not_exist(command):
    with pytest.raises(orthanc.DidNotStart, match=f"^{command} cannot be started: No such file or directory.$"), \
            orthanc.Orthanc(command):
        pass


def test_an_installed_one_that_starts_is_preferred_to_one_that_does_not(tmp_path, monkeypatch):
    broken, good = (executable(tmp_path / name / ".orthanc" / "usr" / "sbin" / "Orthanc", f"exit {status}")
                    for name, status in (("broken", 127), ("unpacked", 0)))
    visible = [broken]
    monkeypatch.setattr(orthanc.shutil, "which", lambda name: broken)
    monkeypatch.setattr(orthanc.os, "access", lambda path, mode: str(path) in visible)    # not this machine's own
    monkeypatch.setattr(orthanc, "HERE", tmp_path / "unpacked")
    assert orthanc.installed() == [broken]
    visible.append(good)
    assert orthanc.installed() == [good]


def test_the_demo_goes_on_with_the_stand_in(broken):
    command, sentence = broken
    ended = run(HERE / "demo.py", ORTHANC_COMMANDS=command)
    assert ended.returncode == 0
    assert ended.stdout.startswith("A stand-in (Orthanc did not start) answers at ")
    assert ended.stderr == sentence + "\nA small stand-in takes its place.\n"


def test_the_benchmark_ends_in_the_sentence(broken):
    command, sentence = broken
    ended = run(HERE / "benchmark.py", "--quick", ORTHANC_COMMANDS=command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", sentence + "\n")


@pytest.mark.parametrize("required", ["0", "1"])
def test_the_tests_go_on_with_the_stand_in_unless_orthanc_is_required(broken, monkeypatch, required):
    command, sentence = broken
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    ended = run("-m", "pytest", "-c", "pytest.ini", "-p", "no:xdist", "test_stand_in.py", "-k", "statistics",
                ORTHANC_COMMANDS=command, REQUIRE_ORTHANC=required)
    assert sentence in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.returncode == int(required), ended.stdout
