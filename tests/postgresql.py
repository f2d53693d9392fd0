"""Throw-away PostgreSQL servers, for an Orthanc that keeps its index in one.

    python tests/postgresql.py ROOT COMMAND [ARGUMENT …]

Runs the command with `--option JSON` after its arguments: what an Orthanc in ROOT must have in its configuration to use
a PostgreSQL that lives as long as the command does, with an empty database. Ends with the command's status.
`sh tests/servers.sh trixie+postgresql` makes a ROOT; Orthanc's plugin and PostgreSQL are in it.
"""
import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

PLUGIN = "/usr/share/orthanc/plugins/libOrthancPostgreSQLIndex.so"
USER = "postgres"    # of Debian's package; PostgreSQL refuses to run as root
WAYS = "-c fsync=off -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c dynamic_shared_memory_type=mmap"


class Failed(RuntimeError):
    """A sentence that says why there is no PostgreSQL."""


class PostgreSQL:
    """One server with an empty database on a free loopback port, in a temporary folder inside root, as a context
    manager: nothing of it is left afterwards, also where it does not start. .configuration is for Orthanc."""

    configuration: dict
    folder: pathlib.Path
    process: subprocess.Popen

    def __init__(self, root: str | pathlib.Path = "/"):
        self.root = pathlib.Path(root)
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:    # an interrupt too leaves nothing running
            self.start(stack)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def start(self, stack: contextlib.ExitStack) -> None:
        programs = sorted(self.root.glob("usr/lib/postgresql/*/bin/postgres"))
        if not programs or not (self.root / PLUGIN.lstrip("/")).exists():
            raise Failed(f"There is no PostgreSQL with Orthanc's plugin for it in {self.root}: "
                         "sh tests/servers.sh trixie+postgresql makes a folder that has both.")
        self.programs = programs[-1].parent
        self.folder = folder = pathlib.Path(tempfile.mkdtemp(prefix="postgresql-", dir=self.root / "tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        password = secrets.token_hex()
        (folder / "password").write_text(password)
        for path in (folder, folder / "password"):
            os.chown(path, *self.owner())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        data = self.inside(folder / "data")
        with open(folder / "log", "wb") as log:
            made = subprocess.run(
                self.words("initdb", "-D", data, "-U", "orthanc", "--pwfile", self.inside(folder / "password"),
                           "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"),
                check=False, **self.streams(log))
            if made.returncode == 0:
                self.process = subprocess.Popen(self.words("postgres", "-D", data, "-p", str(port), *WAYS.split()),
                                                **self.streams(log))
                stack.callback(self.stop)
        if made.returncode or not self.ready(folder / "log"):
            raise Failed("PostgreSQL does not start: " + (["nothing is said"] + printed(folder / "log"))[-1])
        self.configuration = {"Plugins": [PLUGIN], "PostgreSQL": {
            "EnableIndex": True, "EnableStorage": False, "Host": "127.0.0.1", "Port": port, "Database": "postgres",
            "Username": "orthanc", "Password": password, "EnableSsl": False, "Lock": False}}

    def owner(self) -> tuple[int, int]:
        """The numbers that the user and his group have in root."""
        accounts = (self.root / "etc" / "passwd").read_text()
        found = re.search(rf"^{USER}:[^:]*:(\d+):(\d+):", accounts, re.MULTILINE)
        if not found:
            raise Failed(f"There is no user {USER} in {self.root}.")
        return int(found[1]), int(found[2])

    def inside(self, path: pathlib.Path) -> str:
        return "/" + str(path.relative_to(self.root))

    def words(self, name: str, *arguments: str) -> list[str]:
        user, group = self.owner()
        return ["chroot", f"--userspec={user}:{group}", "--groups=", str(self.root),
                self.inside(self.programs / name), *arguments]

    def streams(self, log) -> dict:
        return {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": os.environ | {"LC_ALL": "C"}}

    def ready(self, log: pathlib.Path) -> bool:
        for _ in range(1200):
            if any("ready to accept connections" in line for line in printed(log)):
                return True
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)    # at once; nothing of it is kept
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


def printed(log: pathlib.Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").split("\n") if line.strip()]


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    root, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with PostgreSQL(root) as server:
            return subprocess.run([*command, "--option", json.dumps(server.configuration)], check=False).returncode
    except Failed as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
