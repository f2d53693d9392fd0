#!/usr/bin/env python3
"""Times, requests, bytes and memory of whole runs, side by side, on a real Orthanc that this script fills itself.

    python tests/benchmark.py [--quick] [--sections start,month,…] [--orthanc 'COMMAND'] > figures.md
    git show REVISION:store_study_info.py > /tmp/other.py && python tests/benchmark.py --against /tmp/other.py
    python tests/benchmark.py --scale [--orthanc 'COMMAND'] [--against FILE]

Compared are the program, with 4 jobs and with 1; the walk that pyorthanc's classes lead to; and the limit, which is
what the server itself needs to tell everything: one `tools/find` on a connection that is open already. With `--against`
another revision of the program does all that the program does, turn by turn, and each section ends with what the
program takes of the other's seconds, memory and requests: below 1 it is the better one.

How it is measured: whole processes, start-up included, one of each contender in turn, so that a busy moment meets all.
A time is the median of the rounds, a ratio the median of the ratios within each round. Without added latency nothing
stands between program and server. With latency a relay in a process of its own holds each request back once and
otherwise only passes bytes on; it counts them too, on the wire, headers included, both ways.

The sections:
    start     --help, --version and a usage error, against Python with argparse and sqlite3
    month     a month of studies with pixels and large private headers, and the same month again, all stored
    large     the same with more studies
    growth    10, 100 and 1000 studies of one small series each: time and memory a study must stay level
    database  storing and skipping, into an empty database and beside a million series
    fsync     a month of small studies on a slow disk: each fsync and fdatasync takes --fsync ms longer

With --scale, instead of the sections: on each server of ORTHANC_COMMANDS, what a month costs alone and among ten times
as many other studies, and what a day among them costs beside the walk. Two such servers run side by side, so that a
ratio is one of the same minute. Where the index is Orthanc's own SQLite file, the same again once SQLite has statistics
of it (`ANALYZE`, with Orthanc stopped), which Orthanc itself never makes.
"""
import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from orthanc import Orthanc

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE.parent / "store_study_info.py"
sys.path[:0] = [str(HERE), str(HERE.parent)]

# The months that the studies are put into, so that one server serves all sections.
MONTH, LARGE = "202404", "202405"
GROWTH = {10: "202406", 100: "202407", 1000: "202408"}
SYNCED = "202409"

# What of the caller's environment the contenders would read.
OURS = ("STUDY_INFO_DB", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_COLOR")


# ------------------------------------------------------------------------------------------------------------------
# The contenders
# ------------------------------------------------------------------------------------------------------------------

# What one writes who follows pyorthanc's classes, storing the same rows. Nothing is asked twice: study values come
# from the files that are read anyway.
WALK = '''
import re, sqlite3, sys
from pyorthanc import Orthanc, find_studies

url, db, dates = sys.argv[1:]
client = Orthanc(url, timeout=60)
conn = sqlite3.connect(db)
conn.execute("CREATE TABLE studies (accession TEXT PRIMARY KEY, patient_id TEXT, age INTEGER, height REAL, weight REAL,"
             " sex TEXT, ethnic_group TEXT, body_part TEXT, manufacturer_model TEXT, study_date TEXT,"
             " study_description TEXT)")
conn.execute("CREATE TABLE series (series_uid TEXT PRIMARY KEY, accession TEXT NOT NULL REFERENCES studies(accession),"
             " sar REAL, duration INTEGER, series_number INTEGER, series_description TEXT, pulse_sequence_name TEXT,"
             " sequence_name TEXT)")

def get(ds, *tag):
    return str(ds[tag].value).strip() if tag in ds else None

def seconds(text):
    minutes, _, rest = text.removeprefix("TA").strip().rpartition(":")
    return round(int(minutes or 0) * 60 + float(rest))

for study in find_studies(client, {"AccessionNumber": "E*", "StudyDate": dates}):
    accession = study.accession_number
    rows = []
    for series in study.series:
        ds = series.instances[0].get_pydicom()
        if (0x0018, 0x1316) in ds and (0x0051, 0x100a) in ds:
            rows.append((series.uid, accession, float(ds[0x0018, 0x1316].value), seconds(get(ds, 0x0051, 0x100a)),
                         int(ds.SeriesNumber), get(ds, 0x0008, 0x103e), get(ds, 0x0018, 0x9005),
                         get(ds, 0x0018, 0x0024)))
    with conn:
        conn.execute("INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
            accession, get(ds, 0x0010, 0x0020), int(re.match(r"\\d+", ds.PatientAge)[0]), float(ds.PatientSize),
            float(ds.PatientWeight), ds.PatientSex, get(ds, 0x0010, 0x2160), get(ds, 0x0018, 0x0015),
            get(ds, 0x0008, 0x1090), ds.StudyDate, ds.StudyDescription))
        conn.executemany("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
'''

# Prints the seconds that the one request takes, its answer read and not looked at. The request before it opens the
# connection.
LIMIT = '''
import sys, time
import httpx

url, body = sys.argv[1:]
with httpx.Client(timeout=600, trust_env=False) as client:
    client.get(url + "/system").raise_for_status()
    began = time.perf_counter()
    client.post(url + "/tools/find", content=body).raise_for_status()
    print(time.perf_counter() - began)
'''

# What the program does before it can ask anything: compile itself (Python keeps no bytecode of a script) and import.
START = '''
import runpy, sys
program = runpy.run_path(sys.argv[1], run_name="not_main")
import httpcore, httpx
program["client_class"]()
'''

# Loaded before the C library (LD_PRELOAD): a disk that takes longer to say that it has written.
SLOW_DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int later(const char *name, int file) {
    usleep(atoi(getenv("FSYNC_MICROSECONDS")));
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(file);
}
int fsync(int file) { return later("fsync", file); }
int fdatasync(int file) { return later("fdatasync", file); }
"""


def limit_body(month: str) -> str:
    from store_study_info import SERIES_TAGS
    return json.dumps({
        "Level": "Series", "Query": {"AccessionNumber": "E*", "StudyDate": days_of(month)},
        "Since": 0, "Limit": 0, "Expand": True, "Short": True, "RequestedTags": SERIES_TAGS,
        "ResponseContent": ["RequestedTags", "Parent", "IsStable"]})


# ------------------------------------------------------------------------------------------------------------------
# The server and what is on it
# ------------------------------------------------------------------------------------------------------------------

def days_of(month: str) -> str:
    return f"{month}01-{month}31"


def study_date(month: str, index: int, count: int) -> str:
    """A day of the month; the studies are spread over it evenly."""
    return f"{month}{1 + index * 30 // count:02d}"


def headers_of(kilobytes: int, rows: int) -> Callable:
    """A change for dicom_files.instance: pixels, and the private headers that make up the rest of a Siemens file."""
    from dicom_files import pixels

    def change(ds) -> None:
        if rows:
            pixels(ds, rows)
        if kilobytes:
            ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
            ds.add_new(0x00291010, "OB", b"SV10" + bytes(kilobytes * 200 - 4))
            ds.add_new(0x00291020, "OB", b"SV10" + bytes(kilobytes * 800 - 4))
    return change


def month_files(month: str, studies: int, series: int, instances: int, change: Callable) -> Iterator[bytes]:
    import dicom_files
    for index in range(studies):
        name, date = f"E{month}{index:04d}", study_date(month, index, studies)
        for one in range(1, series + 1):
            for number in range(1, instances + 1):
                yield dicom_files.instance(name, series=one, number=number, StudyDate=date, change=change,
                                           ta=f"TA 0{one % 10}:{index % 60:02d}", sar=f"0.{one:02d}{index % 10}")


def upload(server: "Orthanc", files: Iterable[bytes], threads: int = 2) -> tuple[int, int]:
    """Files and bytes sent. Two at a time: pydicom makes the next while Orthanc writes the last."""
    count = size = 0
    with ThreadPoolExecutor(threads) as pool:
        pending = []
        for data in files:
            pending.append(pool.submit(server.upload, data))
            count, size = count + 1, size + len(data)
            if len(pending) > 8:
                pending.pop(0).result()
        for one in pending:
            one.result()
    return count, size


# ------------------------------------------------------------------------------------------------------------------
# The relay: latency, and what goes over the wire
# ------------------------------------------------------------------------------------------------------------------

class Relay:
    """Passes bytes between clients and a server on loopback, in a process of its own; each request is held back once.

    A request begins with the first bytes from the client since the server last said something: HTTP/1.1 as the
    contenders speak it has one request at a time on a connection.
    """

    def __init__(self, port: int):
        context = multiprocessing.get_context("spawn")
        self.latency = context.Value("d", 0.0)      # seconds
        self.counts = context.Array("Q", 2)         # requests, bytes
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=relay, args=(port, self.latency, self.counts, there), daemon=True)

    def __enter__(self):
        self._process.start()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}"
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.join()

    @contextlib.contextmanager
    def counting(self, latency: float) -> Iterator[Callable[[], tuple[int, int]]]:
        self.latency.value, self.counts[:] = latency, [0, 0]
        yield lambda: (self.counts[0], self.counts[1])


def relay(port: int, latency, counts, pipe) -> None:
    async def passing(reader, writer) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        silent = True    # nothing has come from the client since the last answer

        async def requests() -> None:
            nonlocal silent
            while data := await reader.read(1 << 16):
                if silent:
                    silent = False
                    counts[0] += 1
                    if latency.value:
                        await asyncio.sleep(latency.value)
                counts[1] += len(data)
                up_writer.write(data)
            up_writer.close()

        async def answers() -> None:
            nonlocal silent
            while data := await up_reader.read(1 << 16):
                silent = True
                counts[1] += len(data)
                writer.write(data)
                await writer.drain()
            writer.close()

        await asyncio.gather(requests(), answers(), return_exceptions=True)
        up_writer.close()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(passing, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


# ------------------------------------------------------------------------------------------------------------------
# Measuring processes
# ------------------------------------------------------------------------------------------------------------------

# A process starts with the memory of the one that starts it on its account (ru_maxrss survives fork and exec), so
# they are started by a small one, which measures nearest to them too.
RUNNER = '''
import json, os, sys, time
for line in sys.stdin:
    argv, environment, out, err = json.loads(line)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_OPEN, 1, out, flags, 0o600),
             (os.POSIX_SPAWN_OPEN, 2, err, flags, 0o600)]
    began = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=files)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]),
          flush=True)
'''


class Sample(NamedTuple):
    seconds: float
    cpu: float          # seconds, user and system
    peak: float         # MB
    out: str


class Runner:
    """Runs processes one after the other and tells what each took."""

    def __init__(self, folder: pathlib.Path, python: str):
        self.folder, self.python = folder, python
        kept = {name: value for name, value in os.environ.items() if name.upper() not in OURS}
        self.environment = kept | {"HOME": str(folder), "COLUMNS": "80"}

    def __enter__(self):
        self._process = subprocess.Popen([sys.executable, "-I", "-S", "-c", RUNNER], cwd=self.folder, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def __call__(self, *arguments, expected: int = 0) -> Sample:
        """Run the contenders' Python with these arguments."""
        out, err = self.folder / "out", self.folder / "err"
        command = [self.python, *map(str, arguments)]
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([command, self.environment, str(out), str(err)]) + "\n")
        self._process.stdin.flush()
        seconds, cpu, peak, status = json.loads(self._process.stdout.readline())
        if status != expected:
            raise SystemExit(f"{arguments} ended with {status}:\n{err.read_text()[-3000:]}")
        return Sample(seconds, cpu, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), out.read_text())


Contenders = dict[str, Callable[[], Sample]]
Samples = dict[str, list[Sample]]
Wire = dict[str, tuple[int, int]]    # requests, bytes


def alternate(rounds: int, contenders: Contenders) -> Samples:
    """Each contender once a round, every other round in reverse; an unmeasured round first, for the caches."""
    samples: Samples = {name: [] for name in contenders}
    for count in range(rounds + 1):
        for name in list(contenders)[::1 if count % 2 else -1]:
            sample = contenders[name]()
            if count:
                samples[name].append(sample)
    return samples


def each(samples: list[Sample], field: str = "seconds") -> list[float]:
    return [getattr(sample, field) for sample in samples]


def median(samples: list[Sample], field: str = "seconds") -> float:
    return statistics.median(each(samples, field))


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    return statistics.median(a / b if b else math.inf for a, b in zip(above, below, strict=True))


def table(heads: list[str], rows: Iterable[Iterable]) -> str:
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def contents(db: pathlib.Path) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(db)) as conn:
        return [*conn.execute("SELECT accession, patient_id, age, height, weight, sex, study_date"
                              " FROM studies ORDER BY accession"),
                *conn.execute("SELECT * FROM series ORDER BY series_uid")]


# ------------------------------------------------------------------------------------------------------------------
# Against another revision
# ------------------------------------------------------------------------------------------------------------------

OTHER = "other: "    # before the name of what the other program does, and of the database that it does it in


def with_other(bench: "Bench", make: Callable[[pathlib.Path, str], Contenders]) -> Contenders:
    """make(program, '') and, each beside its like, make(other program, OTHER)."""
    contenders = make(PROGRAM, "")
    if not bench.arguments.against:
        return contenders
    others = make(bench.arguments.against, OTHER)
    return {name: run for like in contenders
            for name, run in ((like, contenders[like]), (OTHER + like, others[like]))}


def plain(samples: Samples) -> Samples:
    """What the program did, without the other."""
    return {name: found for name, found in samples.items() if not name.startswith(OTHER)}


def other_rows(samples: Samples, wire: Wire | None = None, after: str = "") -> list[tuple]:
    """A row for each run that the other program did as well: figures of both, ratios within each round."""
    rows = []
    for name, found in plain(samples).items():
        if OTHER + name not in samples:
            continue
        others = samples[OTHER + name]
        requests = []
        if wire and name in wire:
            mine, theirs = wire[name][0], wire[OTHER + name][0]
            requests = [mine, theirs, f"{ratio([mine], [theirs]):.2f}" if mine or theirs else "1.00"]
        rows.append((name + after, f"{median(found):.3f}", f"{median(others):.3f}",
                     *(f"{ratio(each(found, field), each(others, field)):.2f}" for field in Sample._fields[:3]),
                     *(requests or [""] * 3)))
    return rows


def against(bench: "Bench", rows: list[tuple]) -> str:
    """The end of a section, where there is another program."""
    if not bench.arguments.against:
        return ""
    heads = ["run", "s", "other's s", "s, ratio", "CPU s, ratio", "peak MB, ratio", "requests", "other's", "ratio"]
    return f"\nBeside {bench.arguments.against}:\n\n" + table(heads, rows)


# ------------------------------------------------------------------------------------------------------------------
# The sections
# ------------------------------------------------------------------------------------------------------------------

class Bench(NamedTuple):
    arguments: argparse.Namespace
    server: "Orthanc"
    relay: Relay
    run: Runner
    folder: pathlib.Path

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def program(self, url: str, month: str, *more, db: str = "ours.db", anew: bool = True,
                script: pathlib.Path = PROGRAM) -> Sample:
        path = self.folder / db
        if anew:
            path.unlink(missing_ok=True)
        return self.run(script, "--url", url, "--db", path, *more, month)

    def walk(self, url: str, dates: str) -> Sample:
        path = self.folder / "walk.db"
        path.unlink(missing_ok=True)
        return self.run("-c", WALK, url, path, dates)

    def limit(self, url: str, month: str) -> Sample:
        return self.run("-c", LIMIT, url, limit_body(month))

    def start(self, script: pathlib.Path = PROGRAM) -> Sample:
        return self.run("-c", START, script)

    def wire(self, contenders: Contenders) -> Wire:
        """What each, made for the relay, has on the wire."""
        wire = {}
        for name, run in contenders.items():
            with self.relay.counting(0) as counts:
                run()
                wire[name] = counts()
        return wire


COMPILE = "import sys; compile(open(sys.argv[1]).read(), 'it', 'exec')"


def section_start(bench: Bench) -> str:
    def contenders(script: pathlib.Path, _: str) -> Contenders:
        return {"compiling the file, nothing else": lambda: bench.run("-c", COMPILE, script),
                "`--version`": lambda: bench.run(script, "--version"),
                "`--help`": lambda: bench.run(script, "--help"),
                "a usage error": lambda: bench.run(script, "E*", expected=2),
                "everything imported, nothing asked": lambda: bench.start(script)}

    bare = "`python -c 'import argparse, sqlite3'`"
    samples = alternate(3 * bench.arguments.rounds, {
        "`python -c pass`": lambda: bench.run("-c", "pass"),
        bare: lambda: bench.run("-c", "import argparse, sqlite3"),
        **with_other(bench, contenders)})
    rows = ((name, f"{1000 * median(found):.0f}", f"{1000 * median(found, 'cpu'):.0f}",
             f"{ratio(each(found), each(samples[bare])):.1f}", f"{median(found, 'peak'):.0f}")
            for name, found in plain(samples).items())
    return "### Start-up\n\n" + table(["process", "ms", "CPU ms", "× bare", "peak MB"], rows) \
        + against(bench, other_rows(samples))


def section_month(bench: Bench, month: str = MONTH, title: str = "A month") -> str:
    count = bench.arguments.studies if month == MONTH else bench.arguments.large
    size = f"{count} studies × {bench.arguments.series} series × {bench.arguments.instances} instances"
    check_contents(bench, month, count)

    def contenders(url: str) -> Contenders:
        def runs(script: pathlib.Path, prefix: str) -> Contenders:
            def run(*more, db: str, anew: bool = True) -> Callable[[], Sample]:
                return lambda: bench.program(url, month, *more, db=prefix + db, anew=anew, script=script)
            return {"`--jobs 4`": run("--jobs", 4, db="ours.db"), "`--jobs 1`": run("--jobs", 1, db="ours.db"),
                    "again, all stored": run(db="stored.db", anew=False)}
        return with_other(bench, runs) | {"walk": lambda: bench.walk(url, days_of(month)),
                                          "limit": lambda: bench.limit(url, month), "start": bench.start}

    for prefix in ("", OTHER):
        (bench.folder / f"{prefix}stored.db").unlink(missing_ok=True)
    for name, run in contenders(bench.server.url).items():
        if name.endswith("stored"):
            run()
    wire = bench.wire(contenders(bench.relay.url))
    rows, others = [], []
    for latency in bench.arguments.latency:
        bench.say(f"{title}: {size}, latency {latency:g} ms")
        with bench.relay.counting(latency / 1000):
            samples = alternate(bench.arguments.rounds, contenders(bench.relay.url if latency else bench.server.url))
        limits = [float(sample.out) for sample in samples["limit"]] if tells_values(bench, month) else []
        rows += month_rows(samples, wire, limits, latency)
        others += other_rows(samples, wire, f", {latency:g} ms")
    heads = ["run", "latency ms", "s", "CPU s", "faster than walk", "start-up taken off, × limit", "requests", "MB",
             "peak MB"]
    return f"### {title}: {size}\n\n" + table(heads, rows) + against(bench, others)


def month_rows(samples: Samples, wire: Wire, limits: list[float], latency: float) -> list[tuple]:
    """The rows of one latency. limits: seconds of the limit in each round, none where the server has no such limit."""
    rows: list[tuple] = []
    starts = each(samples["start"])
    for name, found in plain(samples).items():
        if name in ("limit", "start"):
            continue
        beyond = [time - start for time, start in zip(each(found), starts, strict=True)]
        requests, size = wire[name]
        rows.append((name, f"{latency:g}", f"{median(found):.2f}", f"{median(found, 'cpu'):.2f}",
                     f"{ratio(each(samples['walk']), each(found)):.1f}",
                     f"{ratio(beyond, limits):.1f}" if limits else "",
                     requests, f"{size / 1e6:.2f}", f"{median(found, 'peak'):.0f}"))
    if limits:
        rows.append(("limit, on an open connection", f"{latency:g}", f"{statistics.median(limits):.2f}", "", "", "1.0",
                     1, f"{wire['limit'][1] / 1e6:.2f}", ""))
    rows.append(("interpreter and imports alone", f"{latency:g}", f"{median(samples['start']):.2f}",
                 f"{median(samples['start'], 'cpu'):.2f}", "", "", 0, "0.00",
                 f"{median(samples['start'], 'peak'):.0f}"))
    return rows


def check_contents(bench: Bench, month: str, count: int) -> None:
    """End where the contenders do not store the same: then there is nothing to compare."""
    bench.walk(bench.server.url, days_of(month))
    walked = contents(bench.folder / "walk.db")
    for script in filter(None, (PROGRAM, bench.arguments.against)):
        bench.program(bench.server.url, month, script=script)
        stored = contents(bench.folder / "ours.db")
        if stored != walked or len(stored) != count * (bench.arguments.series + 1):
            raise SystemExit(f"{script} stored {len(stored)} rows, the walk {len(walked)}, and they are not the same")


def tells_values(bench: Bench, month: str) -> bool:
    """Whether the server answers with the values at all.

    Older ones ignore RequestedTags, and one request is no limit of theirs.
    """
    return '"0018,1316"' in bench.server.client.post("/tools/find", content=limit_body(month)).text


def section_large(bench: Bench) -> str:
    return section_month(bench, LARGE, "A large month")


def section_growth(bench: Bench) -> str:
    counts = growth_counts(bench.arguments)
    bench.say("growth")

    def contenders(url: str) -> Contenders:
        def runs(script: pathlib.Path, prefix: str) -> Contenders:
            def run(month: str) -> Callable[[], Sample]:
                return lambda: bench.program(url, month, db=prefix + "ours.db", script=script)
            return {str(count): run(GROWTH[count]) for count in counts}
        return with_other(bench, runs)

    wire = bench.wire(contenders(bench.relay.url))
    samples = alternate(bench.arguments.rounds, contenders(bench.server.url) | {"start": bench.start})
    starts, base = each(samples["start"]), median(samples["start"], "peak")
    rows = []
    for count in counts:
        found = samples[str(count)]
        a_study = statistics.median(1000 * (seconds - start) / count
                                    for seconds, start in zip(each(found), starts, strict=True))
        requests, size = wire[str(count)]
        peak = median(found, "peak")
        rows.append((count, f"{median(found):.2f}", f"{a_study:.1f}", f"{requests / count:.2f}", f"{size / count:.0f}",
                     f"{peak:.1f}", f"{peak - base:.1f}"))
    heads = ["studies", "s", "ms a study, start-up taken off", "requests a study", "bytes a study", "peak MB",
             "above imports alone, MB"]
    return "### Growth: studies of one small series each\n\n" + table(heads, rows) \
        + against(bench, other_rows(samples, wire, " studies"))


def growth_counts(arguments: argparse.Namespace) -> list[int]:
    return [count for count in GROWTH if count <= arguments.growth]


def fill_database(path: pathlib.Path, count: int) -> None:
    """Add `count` series in studies of ten each, all under other accessions than those of the server."""
    studies = ((f"EB{one:07d}", f"P{one}", one % 90, 1.75, 70.5, "F", "W", "HEAD", "Prisma",
                f"2014{1 + one % 12:02d}{1 + one % 28:02d}", "Head") for one in range(count // 10))
    # Keys in no order, as the UIDs of a scanner's series are in none.
    series = ((f"1.3.12.2.1107.5.2.{one * 2654435761 % 4294967296:010d}.{one}", f"EB{one // 10:07d}", 0.1, 60, one % 10,
               "series", "tfl", "*tfl3d1") for one in range(count // 10 * 10))
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA journal_mode = OFF")
        conn.execute("PRAGMA synchronous = OFF")
        conn.executemany("INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", studies)
        conn.executemany("INSERT INTO series VALUES (?, ?, ?, ?, ?, ?, ?, ?)", series)
        conn.commit()


def section_database(bench: Bench) -> str:
    few, many = growth_counts(bench.arguments)[-2:]
    bench.say(f"database: {bench.arguments.stored} series")
    full = bench.folder / "full.db"
    bench.program(bench.server.url, "190001", db="full.db")    # a month without studies makes an empty database
    fill_database(full, bench.arguments.stored)
    shutil.copyfile(full, bench.folder / (OTHER + "full.db"))

    def contenders(url: str) -> Contenders:
        def runs(script: pathlib.Path, prefix: str) -> Contenders:
            def program(db: str, count: int) -> Sample:
                return bench.program(url, GROWTH[count], db=prefix + db, anew=False, script=script)

            def storing(db: str) -> Callable[[], Sample]:
                def run() -> Sample:
                    forget(bench.folder / (prefix + db), f"E{GROWTH[few]}")
                    return program(db, few)
                return run

            def skipping(db: str) -> Callable[[], Sample]:
                program(db, many)
                return lambda: program(db, many)

            return {f"{what}, {db}": make(db) for what, make in (("skip", skipping), ("store", storing))
                    for db in ("empty.db", "full.db")}
        return with_other(bench, runs)

    wire = bench.wire(contenders(bench.relay.url))
    samples = alternate(2 * bench.arguments.rounds, contenders(bench.server.url))
    size = full.stat().st_size / 1e6
    rows = []
    for what, text in (("store", f"storing {few} studies"), ("skip", f"skipping {many} stored studies")):
        small, large = samples[f"{what}, empty.db"], samples[f"{what}, full.db"]
        rows.append((text, f"{median(small):.2f}", f"{median(large):.2f}", f"{ratio(each(large), each(small)):.2f}",
                     f"{median(small, 'peak'):.0f}", f"{median(large, 'peak'):.0f}"))
    heads = ["run", f"s, {many} studies stored", f"s, {bench.arguments.stored} series more", "ratio", "peak MB",
             "peak MB, full"]
    return f"### Database: beside {bench.arguments.stored} stored series ({size:.0f} MB)\n\n" + table(heads, rows) \
        + against(bench, other_rows(samples, wire))


def forget(db: pathlib.Path, prefix: str) -> None:
    """Take the accessions that begin so out of a database."""
    with contextlib.closing(sqlite3.connect(db)) as conn:
        for one in ("series", "studies"):
            conn.execute(f"DELETE FROM {one} WHERE accession BETWEEN ? AND ?", (prefix, prefix + "~"))
        conn.commit()


def section_fsync(bench: Bench) -> str:
    title = f"### A slow disk: {bench.arguments.synced} studies, {bench.arguments.fsync:g} ms more for each fsync\n\n"
    compiler, library = shutil.which("cc"), bench.folder / "slow_disk.so"
    if not compiler or sys.platform != "linux":
        return title + "Not measured: it takes Linux and a C compiler (cc).\n"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"], input=SLOW_DISK, text=True,
                   check=True)
    bench.say(f"fsync: {bench.arguments.synced} studies")
    delays = {"as it is": 0.0, "slow": bench.arguments.fsync}

    def contenders(script: pathlib.Path, prefix: str) -> Contenders:
        def run(name: str) -> Sample:
            environment = bench.run.environment
            slow = {"LD_PRELOAD": str(library), "FSYNC_MICROSECONDS": str(round(1000 * delays[name]))}
            try:
                bench.run.environment = environment | slow
                return bench.program(bench.server.url, SYNCED, db=prefix + "ours.db", script=script)
            finally:
                bench.run.environment = environment
        return {name: lambda name=name: run(name) for name in delays}    # type: ignore[misc]

    samples = alternate(bench.arguments.rounds, with_other(bench, contenders))
    rows = [(prefix + "the month", f"{median(samples[prefix + 'as it is']):.2f}",
             f"{median(samples[prefix + 'slow']):.2f}",
             f"{ratio(each(samples[prefix + 'slow']), each(samples[prefix + 'as it is'])):.2f}")
            for prefix in ("", OTHER) if prefix + "slow" in samples]
    return title + table(["run", "s, disk as it is", "s, slow disk", "ratio"], rows)


# ------------------------------------------------------------------------------------------------------------------
# Scale: what other studies on the server cost
# ------------------------------------------------------------------------------------------------------------------

DAY = f"{MONTH}15"
SERIES = 3    # of each study, of one image
ALONE, AMONG, ONE_DAY, DAY_WALK = "month alone", "month among others", "day among others", "walk of that day"


def other_files(count: int) -> Iterator[bytes]:
    """Studies of earlier months, of the size of those that are measured."""
    for number, first in enumerate(range(0, count, 300)):
        yield from month_files(f"{2023 - number // 12}{1 + number % 12:02d}", min(300, count - first), SERIES, 1,
                               headers_of(0, 0))


def scale_contenders(small: Bench, large: Bench, relayed: bool) -> Contenders:
    alone, among = ((one.relay if relayed else one.server).url for one in (small, large))

    def runs(script: pathlib.Path, prefix: str) -> Contenders:
        return {ALONE: lambda: small.program(alone, MONTH, db=prefix + "alone.db", script=script),
                AMONG: lambda: large.program(among, MONTH, db=prefix + "among.db", script=script),
                ONE_DAY: lambda: large.program(among, DAY, db=prefix + "day.db", script=script)}
    return with_other(small, runs) | {DAY_WALK: lambda: large.walk(among, DAY)}


def scale_tables(bench: Bench, measured: dict[str, Samples], wire: Wire) -> str:
    """measured: samples by what had been done to the index of the larger server."""
    month, day, others = [], [], []
    for after, samples in measured.items():
        for prefix, who in (("", "this program"), (OTHER, "the other")):
            if prefix + ALONE not in samples:
                continue
            alone, among, a_day = (samples[prefix + name] for name in (ALONE, AMONG, ONE_DAY))
            month.append((who + after, f"{median(alone):.2f}", f"{median(among):.2f}",
                          f"{ratio(each(among), each(alone)):.2f}", wire[prefix + ALONE][0], wire[prefix + AMONG][0]))
            day.append((who + after, f"{median(a_day):.2f}", f"{median(samples[DAY_WALK]):.2f}",
                        f"{ratio(each(samples[DAY_WALK]), each(a_day)):.1f}", wire[prefix + ONE_DAY][0],
                        wire[DAY_WALK][0]))
        others += other_rows(samples, wire, after)
    heads = ["s alone", "s among others", "ratio", "requests alone", "requests among others"]
    return table(["month", *heads], month) + "\n" \
        + table(["day among others", "s", "walk's s", "faster than walk", "requests", "walk's requests"], day) \
        + against(bench, others)


def analyze(server: "Orthanc") -> float:
    """Give SQLite the statistics of the index; the seconds that it takes."""
    with server.stopped(), contextlib.closing(sqlite3.connect(server.folder / "index")) as conn:
        began = time.perf_counter()
        conn.execute("ANALYZE")
        return time.perf_counter() - began


def in_plugin(server: "Orthanc") -> bool:
    """Whether the index is in PostgreSQL or the like, not in Orthanc's own SQLite file."""
    return bool(server.client.get("/system").json().get("DatabaseBackendPlugin"))


def scale(small: Bench, large: Bench) -> str:
    count, others = small.arguments.beside, small.arguments.others
    for bench in (small, large):
        upload(bench.server, month_files(MONTH, count, SERIES, 1, headers_of(0, 0)), threads=4)
    large.say(f"{large.server.command}: {count} studies alone and among {others} others")
    upload(large.server, other_files(others), threads=4)
    large.say("all sent")
    for bench in (small, large):
        bench.server.settle(120)
    wire = scale_wire(small, large)
    check_scale(small, count)
    measured = {"": alternate(small.arguments.rounds, scale_contenders(small, large, relayed=False))}
    if not in_plugin(large.server) and large.server.answers_tags:
        large.say(f"ANALYZE took {analyze(large.server):.2f} s")
        measured[", after ANALYZE"] = alternate(small.arguments.rounds, scale_contenders(small, large, relayed=False))
    return f"### {count} studies of a month, of {SERIES} small series, alone and among {others} others\n\n" \
        + scale_tables(small, measured, wire)


def scale_wire(small: Bench, large: Bench) -> Wire:
    """What each has on the wire."""
    return {name: (large if name.endswith(("others", "day")) else small).wire({name: run})[name]
            for name, run in scale_contenders(small, large, relayed=True).items()}


def check_scale(bench: Bench, count: int) -> None:
    """End where a month among others is not what it is alone, or the walk's day not the program's."""
    prefixes = ["", OTHER] if bench.arguments.against else [""]
    walked = contents(bench.folder / "walk.db")
    for prefix in prefixes:
        alone, among, day = (contents(bench.folder / f"{prefix}{name}.db") for name in ("alone", "among", "day"))
        if alone != among or len(alone) != (1 + SERIES) * count or day != walked or not day:
            raise SystemExit(f"{prefix}what is stored differs: {len(alone)} rows of the month alone, {len(among)} "
                             f"among others, {len(day)} of the day, {len(walked)} by the walk")


SECTIONS = {"start": section_start, "month": section_month, "large": section_large, "growth": section_growth,
            "database": section_database, "fsync": section_fsync}


# ------------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------------

VERSIONS = '''
import platform, sys
from importlib import metadata
print(platform.python_version(), *(f"{name} {metadata.version(name)}" for name in sys.argv[1:]), sep=", ")
'''


def machine(bench: Bench) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    python = bench.run("-c", VERSIONS, "pyorthanc", "pydicom", "httpx").out.strip()
    with contextlib.suppress(metadata.PackageNotFoundError):
        python += f", numpy {metadata.version('numpy')}" if bench.run.python == sys.executable else ""
    index = ", its index in PostgreSQL" if in_plugin(bench.server) else ""
    return (f"Orthanc {bench.server.version}{index}; Python {python}; {cores} cores, {memory:.0f} GB memory, "
            f"{platform.system()} {platform.machine()}, load {os.getloadavg()[0]:.1f}; "
            f"medians of {bench.arguments.rounds} rounds\n")


def fill(bench: Bench, section: str) -> None:
    """Send what a section asks for just before it: the server holds no more than that and what earlier ones used."""
    arguments = bench.arguments

    def send(what: str, files: Iterable[bytes]) -> None:
        count, size = upload(bench.server, files)
        bench.say(f"{count} files, {size} bytes for {what}")

    if section in ("month", "large"):
        month, count = (MONTH, arguments.studies) if section == "month" else (LARGE, arguments.large)
        send(f"the section {section}", month_files(month, count, arguments.series, arguments.instances,
                                                   headers_of(arguments.header, arguments.rows)))
    elif section == "fsync":
        send("the section fsync", month_files(SYNCED, arguments.synced, 3, 1, headers_of(0, 0)))
    elif section == "growth" or section == "database" and "growth" not in arguments.sections:
        for count in growth_counts(arguments):
            send(f"{count} small studies", month_files(GROWTH[count], count, 1, 1, headers_of(0, 0)))
    bench.server.settle(120)


SIZES = {    # options: default, with --quick at most, what it counts
    "studies": (30, 6, "studies of the month"),
    "large": (120, 12, "studies of the large month"),
    "series": (10, 10, "series of a study"),
    "instances": (3, 3, "instances of a series"),
    "rows": (192, 192, "rows and columns of an image, 0 for none"),
    "header": (100, 100, "kB of private headers in a file"),
    "growth": (1000, 100, "studies of the last step of growth"),
    "stored": (1_000_000, 20_000, "series stored beforehand"),
    "synced": (120, 12, "studies of the section fsync"),
    "beside": (300, 30, "small studies of the month of --scale"),
    "others": (3000, 60, "small studies that --scale puts beside them"),
    "rounds": (5, 1, "measured rounds"),
}


def options(argv=None) -> argparse.Namespace:
    from orthanc import commands
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orthanc", metavar="COMMAND", help="how to start Orthanc (default: the first of "
                        "ORTHANC_COMMANDS, with --scale each of them)")
    parser.add_argument("--scale", action="store_true", help="a month alone and among many others, nothing else")
    parser.add_argument("--against", metavar="FILE", type=lambda name: pathlib.Path(name).resolve(),
                        help="another revision of the program, measured beside this one")
    parser.add_argument("--python", default=sys.executable,
                        help="the interpreter of the measured processes (default: this one)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which of %(default)s")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes: to see that it works")
    for name, (default, _, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"{what} (default {default})")
    parser.add_argument("--fsync", type=float, metavar="MS", default=10.0,
                        help="added to each fsync in the section fsync, ms (default %(default)s)")
    parser.add_argument("--latency", default="0,5",
                        help="added to each request, ms; 0 is without the relay (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        for name, (_, small, _) in SIZES.items():
            setattr(arguments, name, min(getattr(arguments, name), small))
    arguments.sections = [name for name in SECTIONS if name in arguments.sections.split(",")]
    arguments.latency = [float(text) for text in arguments.latency.split(",")]
    arguments.commands = [arguments.orthanc] if arguments.orthanc else commands()[:None if arguments.scale else 1]
    if not arguments.commands:
        parser.error("no Orthanc was found: install one, or name one with --orthanc")
    if not arguments.sections:
        parser.error(f"--sections takes {', '.join(SECTIONS)}")
    if arguments.against and not arguments.against.is_file():
        parser.error(f"--against: there is no file {arguments.against}")
    return arguments


@contextlib.contextmanager
def benches(arguments: argparse.Namespace, command: str, count: int) -> Iterator[list[Bench]]:
    """So many new servers of one kind, each with what measures it; a sentence ends all where one does not start."""
    from orthanc import DidNotStart, Orthanc
    with contextlib.ExitStack() as stack:
        try:
            servers = [stack.enter_context(Orthanc(command)) for _ in range(count)]
        except DidNotStart as error:
            sys.exit(str(error))
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        run = stack.enter_context(Runner(folder, arguments.python))
        relays = [stack.enter_context(Relay(int(server.url.rpartition(":")[2]))) for server in servers]
        yield [Bench(arguments, server, relay, run, folder) for server, relay in zip(servers, relays, strict=True)]


def main(argv=None) -> None:
    arguments = options(argv)
    for command in arguments.commands:
        with benches(arguments, command, 2 if arguments.scale else 1) as made:
            print(machine(made[0]), flush=True)
            if arguments.scale:
                print(scale(*made), flush=True)
                continue
            for section in arguments.sections:
                fill(made[0], section)
                print(SECTIONS[section](made[0]), flush=True)


if __name__ == "__main__":
    main()
