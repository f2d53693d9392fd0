"""An Orthanc that does not start is a sentence, wherever one is started."""
import ast
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

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


# -- with PostgreSQL -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def with_postgresql() -> str:
    for command in orthanc.commands():
        if command.endswith(" +postgresql"):
            return command
    pytest.skip("ORTHANC_COMMANDS names none with PostgreSQL: `sh tests/servers.sh trixie+postgresql` makes one")


def processes(folder: str) -> list[str]:
    """Command lines of what runs on a folder: other tests may use the same root at the same time."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):    # it has just ended
            line = (process / "cmdline").read_text().replace("\0", " ")
            if pathlib.Path(folder).name in line:
                found.append(line)
    return found


def nothing_is_left(*folders) -> bool:
    """Before long: what was interrupted may still be ending."""
    for _ in range(200):
        if not any(os.path.exists(folder) or processes(str(folder)) for folder in folders):
            return True
        time.sleep(0.05)
    return False


def test_postgresql_holds_the_index_runs_as_another_user_and_leaves_nothing(with_postgresql):
    with orthanc.Orthanc(with_postgresql) as server:
        assert "PostgreSQL" in server.client.get("/system").json()["DatabaseBackendPlugin"]
        folders = server.folder, server.postgresql.folder
        assert all(len(processes(str(folder))) == 1 for folder in folders)
        assert os.stat(f"/proc/{server.postgresql.process.pid}").st_uid == folders[1].stat().st_uid != 0
        assert not (server.folder / "index").exists()
    assert nothing_is_left(*folders)


def test_an_orthanc_that_does_not_start_leaves_no_postgresql(with_postgresql, monkeypatch):
    folders: list[str] = []
    make = tempfile.mkdtemp

    def noted(**options):
        folders.append(make(**options))
        return folders[-1]
    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    with pytest.raises(orthanc.DidNotStart, match="ended at once"), orthanc.Orthanc(with_postgresql, HttpPort="none"):
        pass
    assert len(folders) >= 2 and nothing_is_left(*folders)


# Prints the folders as they are made, that PostgreSQL is being made ready, and that Orthanc answers.
STARTER = """
import signal, sys, tempfile, time
signal.signal(signal.SIGINT, signal.default_int_handler)    # which the tests' own parent may ignore
import orthanc
make, words = tempfile.mkdtemp, orthanc.postgresql.PostgreSQL.words
def saying(self, name, *arguments):
    print(name, flush=True)
    return words(self, name, *arguments)
orthanc.postgresql.PostgreSQL.words = saying
def told(**options):
    folder = make(**options)
    print(folder, flush=True)
    return folder
tempfile.mkdtemp = told
with orthanc.Orthanc(sys.argv[1]):
    print("it answers", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("when", ["initdb", "postgres", "it answers"])
def test_an_interrupt_leaves_no_postgresql(with_postgresql, when):
    process = subprocess.Popen([sys.executable, "-c", STARTER, with_postgresql], cwd=HERE, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told: list[str] = []
    assert process.stdout
    with process:
        for line in process.stdout:
            told.append(line.strip())
            if line.strip() == when:
                break
        os.killpg(process.pid, signal.SIGINT)    # as Ctrl-C does
        told += process.stdout.read().split("\n")
        process.wait(60)
    folders = [line for line in told if line.startswith("/")]
    assert len(folders) >= 2 and nothing_is_left(*folders)


def test_a_root_without_postgresql_is_a_sentence(tmp_path):
    (tmp_path / "tmp").mkdir()
    with pytest.raises(orthanc.DidNotStart, match="There is no PostgreSQL with Orthanc's plugin for it in "), \
            orthanc.Orthanc(f"chroot {tmp_path} Orthanc +postgresql"):
        pass


def test_a_command_is_run_with_the_option_for_a_fresh_database(with_postgresql):
    root = orthanc.Orthanc(with_postgresql).root
    told = [run("postgresql.py", root, sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)")
            for _ in range(2)]
    assert [ended.returncode for ended in told] == [7, 7]
    (option, first), (_, second) = (ast.literal_eval(ended.stdout) for ended in told)
    assert option == "--option" and json.loads(first)["PostgreSQL"]["EnableIndex"] is True
    assert first != second
