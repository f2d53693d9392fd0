"""Throw-away Orthanc servers for tests, demo and benchmark."""
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import httpx

import postgresql

HERE = pathlib.Path(__file__).resolve().parent


class DidNotStart(RuntimeError):
    """A sentence that says which command it was and why: the last error that it printed, else its last line."""


def commands() -> list[str]:
    """Ways to start Orthanc: those of ORTHANC_COMMANDS, separated by semicolons.

    `Orthanc` alone, the default, is the installed one; `stand-in` is none at all.
    """
    wanted = [command for command in named() if command != "stand-in"]
    return [found for command in wanted for found in (installed() if command == "Orthanc" else [command])]


def named() -> list[str]:
    words = os.environ.get("ORTHANC_COMMANDS", "").split(";")
    return [word.strip() for word in words if word.strip()] or ["Orthanc"]


def installed() -> list[str]:
    """The machine's own Orthanc, or the one that setup.sh unpacked: the first that starts.

    Where none does it is the first that there is: starting it tells why.
    """
    unpacked = [folder / ".orthanc" / "usr" / "sbin" / "Orthanc" for folder in (HERE, pathlib.Path(sys.prefix).parent)]
    places = [shutil.which("Orthanc"), "/usr/sbin/Orthanc", "/usr/local/sbin/Orthanc", *unpacked]
    found = [str(place) for place in places if place and os.access(place, os.X_OK)]
    return [shlex.quote(place) for place in ([*filter(starts, found)] or found)[:1]]


def starts(place: str) -> bool:
    """Whether it can be run at all: a library that it needs may be missing."""
    try:
        return subprocess.run([place, "--version"], check=False, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Orthanc:
    """One server in a temporary folder on a free loopback port, as a context manager; .url is where it answers.

    command: how to start it; one that begins with `chroot DIR` gets its folder inside of DIR, and one that ends in
    `+postgresql` has its index in a PostgreSQL of its own. options go into its configuration.
    """

    url: str
    version: str
    client: httpx.Client
    process: subprocess.Popen
    folder: pathlib.Path
    inside: str    # the folder, as the server sees it
    postgresql: postgresql.PostgreSQL

    def __init__(self, command: str, **options):
        self.command, self.words, self.options = command, shlex.split(command), options
        self.with_postgresql = self.words[-1:] == ["+postgresql"]
        if self.with_postgresql:
            self.words.pop()
        self.root = pathlib.Path(self.words[1] if self.words[0] == "chroot" and self.words[1:] else "/")
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        for _ in range(2):    # somebody else can take a free port before Orthanc does
            with contextlib.suppress(DidNotStart):
                return self.start()
        return self.start()

    def start(self):
        with contextlib.ExitStack() as stack:    # an interrupt too leaves nothing running
            port = free_port()
            try:
                self.launch(port, stack)
            except postgresql.Failed as error:
                raise DidNotStart(f"{self.command} cannot be started: {error}") from None
            except OSError as error:    # no such command, no such folder
                raise DidNotStart(f"{self.command} cannot be started: {error.strerror}.") from None
            self.url = f"http://127.0.0.1:{port}"
            auth = next(iter(self.options.get("RegisteredUsers", {}).items()), None)
            self.client = stack.enter_context(httpx.Client(
                base_url=self.url, timeout=60, auth=auth, trust_env=False, limits=httpx.Limits(keepalive_expiry=0.5)))
            self.version = self.first_answer()["Version"]
            self.stack = stack.pop_all()
        return self

    def launch(self, port: int, stack: contextlib.ExitStack) -> None:
        base = self.root / "tmp" if self.root != pathlib.Path("/") else pathlib.Path(tempfile.gettempdir())
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="orthanc-", dir=base))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.inside = "/" + str(self.folder.relative_to(self.root))
        index = {}
        if self.with_postgresql:
            self.postgresql = stack.enter_context(postgresql.PostgreSQL(self.root))
            index = self.postgresql.configuration
        configuration = {
            "StorageDirectory": self.inside, "IndexDirectory": self.inside, "HttpPort": port,
            "DicomServerEnabled": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "StableAge": 1,
            "Plugins": [], "SyncStorageArea": False, **index, **self.options}
        (self.folder / "orthanc.json").write_text(json.dumps(configuration))
        self.run()
        stack.callback(self.end)

    def run(self) -> None:
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen([*self.words, self.inside + "/orthanc.json"], stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)

    def end(self) -> None:
        self.process.kill()    # nothing of it is kept, and an orderly end takes it two seconds
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self):
        """While it is stopped in good order; then it answers at the same address again, with what it held."""
        self.process.terminate()
        self.process.wait(60)
        try:
            yield
        finally:
            self.run()
            self.first_answer()

    def first_answer(self) -> dict:
        for _ in range(600):
            try:
                return self.client.get("/system").raise_for_status().json()
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise DidNotStart(f"{self.command} ended at once: {self.last_words()}") from None
                time.sleep(0.05)
        raise DidNotStart(f"{self.command} did not answer within 30 s.")

    def last_words(self) -> str:
        """Its last error, for whatever the reason Orthanc says at last that it has stopped; else the last line."""
        lines = (self.folder / "log").read_text(errors="replace").split("\n")
        printed = [line for line in lines if line.strip()] or [f"it printed nothing, status {self.process.returncode}"]
        return [*printed, *(line for line in printed if re.match(r"E\d{4} ", line))][-1]

    def __exit__(self, *_):
        self.stack.close()

    @property
    def extended(self) -> bool:
        return self.client.get("/system").json().get("Capabilities", {}).get("HasExtendedFind", False)

    @property
    def own_index(self) -> bool:
        """Whether the index is Orthanc's own, which keeps the order of reception."""
        return self.client.get("/system").json().get("DatabaseBackendPlugin") is None

    @property
    def answers_tags(self) -> bool:
        """Whether RequestedTags are answered: 1.11 and newer."""
        return tuple(map(int, self.version.split(".")[:2])) >= (1, 11)

    def upload(self, *files: bytes) -> list[dict]:
        """Store DICOM files, in this order."""
        return [self.client.post("/instances", content=data).raise_for_status().json() for data in files]

    def settle(self, limit: float = 30):
        """Wait until every study and series is stable."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            answers = [one for level in ("studies", "series") for one in self.client.get(f"/{level}?expand").json()]
            if all(one["IsStable"] for one in answers):
                return self
            time.sleep(0.1)
        raise RuntimeError(f"studies are not stable after {limit} s")

    def find_id(self, level: str, **query) -> str:
        (one,) = self.client.post("/tools/find", json={"Level": level, "Query": query}).json()
        return one


if __name__ == "__main__":
    if sys.argv[1:] == ["--lacking"]:    # whether an installed one is asked for, and there is none that starts
        sys.exit(0 if "Orthanc" in named() and not any(starts(*shlex.split(place)) for place in installed()) else 1)
    print(*commands(), sep="\n")
