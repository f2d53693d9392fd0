"""Throw-away Orthanc servers for tests, demo and benchmark."""
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import tempfile
import time

import httpx

HERE = pathlib.Path(__file__).resolve().parent


def commands() -> list[str]:
    """Ways to start Orthanc: those of ORTHANC_COMMANDS, separated by semicolons; `Orthanc` alone, the default, is the installed one."""
    named = [command.strip() for command in os.environ.get("ORTHANC_COMMANDS", "").split(";") if command.strip()]
    return [found for command in named or ["Orthanc"] for found in (installed() if command == "Orthanc" else [command])]


def installed() -> list[str]:
    """The machine's own Orthanc, or the one that setup.sh unpacked."""
    places = [shutil.which("Orthanc"), "/usr/sbin/Orthanc", "/usr/local/sbin/Orthanc", HERE / ".orthanc" / "usr" / "sbin" / "Orthanc"]
    return [shlex.quote(str(place)) for place in places if place and os.access(place, os.X_OK)][:1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Orthanc:
    """One server in a temporary folder on a free loopback port, as a context manager; .url is where it answers.

    command: how to start it; one that begins with `chroot DIR` gets its folder inside of DIR. options go into its configuration.
    """

    def __init__(self, command: str, **options):
        self.words, self.options = shlex.split(command), options
        self.folder = self.process = self.client = None
        self.root = pathlib.Path(self.words[1] if self.words[0] == "chroot" else "/")

    def __enter__(self):
        for attempt in range(3):    # somebody else can take a free port before Orthanc does
            try:
                return self.start()
            except BaseException as error:    # an interrupt too leaves nothing running
                self.__exit__()
                if attempt == 2 or not isinstance(error, RuntimeError):
                    raise

    def start(self):
        base = self.root / "tmp" if self.root != pathlib.Path("/") else pathlib.Path(tempfile.gettempdir())
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="orthanc-", dir=base))
        inside = "/" + str(self.folder.relative_to(self.root))
        port = free_port()
        configuration = {"StorageDirectory": inside, "IndexDirectory": inside, "HttpPort": port, "DicomServerEnabled": False,
                         "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "StableAge": 1, "Plugins": [], "SyncStorageArea": False, **self.options}
        (self.folder / "orthanc.json").write_text(json.dumps(configuration))
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen([*self.words, inside + "/orthanc.json"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{port}"
        auth = next(iter(configuration.get("RegisteredUsers", {}).items()), None)
        self.client = httpx.Client(base_url=self.url, timeout=60, auth=auth, trust_env=False, limits=httpx.Limits(keepalive_expiry=0.5))
        for _ in range(600):
            try:
                self.version = self.client.get("/system").raise_for_status().json()["Version"]
                return self
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise RuntimeError("Orthanc did not start: " + (self.folder / "log").read_text(errors="replace")[-2000:])
                time.sleep(0.05)
        raise RuntimeError("Orthanc did not answer within 30 s")

    def __exit__(self, *_):
        if self.client:
            self.client.close()
        if self.process:
            self.process.kill()    # nothing of it is kept, and an orderly end takes it two seconds
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def extended(self) -> bool:
        return self.client.get("/system").json().get("Capabilities", {}).get("HasExtendedFind", False)

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
    print(*commands(), sep="\n")
