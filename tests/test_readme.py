"""README.md and --help say what is true: what they show is run here and must come out as printed there.

    python tests/test_readme.py --update      runs everything and writes the outputs into README.md

How README.md marks what is run: a block `console` holds commands after `$ ` and all they print; all of them run in
order in one folder, before the demo's server. A block `sql` is a query, a block `python` a script on the demo's
database; the comments at the block's end are the answer, of a query its first rows. Commands in blocks `sh`, `cron` and
`ini` are only checked to be understood. Time stamps and the server's address are not compared; of the demo some
paragraphs are shown. `…` stands for what is left out.
"""
import configparser
import contextlib
import datetime
import fnmatch
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import httpx
import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
sys.path[:0] = [str(HERE), str(ROOT)]

import demo  # noqa: E402
import store_study_info as program  # noqa: E402

SHOWN_URL = "http://localhost:8042"
SHOWN_TIME = "2024-05-02 06:15:00"
DEMO = "sh tests/demo.sh"


class Block(NamedTuple):
    kind: str
    line: int
    text: str

    def __str__(self):
        return f"line {self.line}: {next(iter(self.text.splitlines()), '')[:50]}"


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = README.read_text(encoding="utf-8")
NOTES = (ROOT / "NOTES.md").read_text(encoding="utf-8")
BLOCKS = [Block(match[1], TEXT.count("\n", 0, match.start()) + 1, match[2]) for match in BLOCK.finditer(TEXT)]
SCHEMA = [block for block in BLOCKS if block.kind == "sql" and block.text.startswith("CREATE")]
QUERIES = [block for block in BLOCKS if block.kind == "sql" and block not in SCHEMA]
SCRIPTS = [block for block in BLOCKS if block.kind == "python"]
REMARK = {"sql": "-- ", "python": "# "}


def blocks(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


# -- running what README.md shows --------------------------------------------------------------------------------------

def plain(text: str, url: str = SHOWN_URL) -> str:
    """Without what differs from run to run: the server's address and version, times."""
    text = text.replace(url, SHOWN_URL)
    text = re.sub(r"^(Orthanc \d\S*|A stand-in .*?\)) answers at [^\s,]+", f"Orthanc 1.10.1 answers at {SHOWN_URL}",
                  text, flags=re.MULTILINE)
    text = re.sub(r"ORTHANC_URL=http://127\.0\.0\.1:\d+", f"ORTHANC_URL={SHOWN_URL}", text)
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", SHOWN_TIME + " ", text, flags=re.MULTILINE)


SHOWN_OF_DEMO = ("Orthanc ", "$ export ", "accession  study_description ")


def abridged(text: str) -> str:
    """Some paragraphs of what the demo prints, of long ones the beginning and the end."""
    def cut(paragraph: str) -> str:
        lines = paragraph.split("\n")
        return paragraph if len(lines) <= 8 else "\n".join([*lines[:5], "…", *lines[-1:]])
    paragraphs = [cut(one) if one.startswith(SHOWN_OF_DEMO) else "…" for one in text.strip("\n").split("\n\n")]
    return re.sub(r"(\n\n…)+", "\n\n…", "\n\n".join(paragraphs)).removesuffix("\n\n…") + "\n"


def first_rows(table: str) -> str:
    """The names and the first rows of a table."""
    names, _, *rows = table.splitlines()
    return "\n".join([names, *rows[:3]])


def divided(block: Block) -> tuple[str, str]:
    """A query or a script, and its answer, the comments at its end."""
    remark = re.escape(REMARK[block.kind])
    found = re.fullmatch(rf"(.*?\n)((?:{remark}.*\n)*)", block.text, re.DOTALL)
    assert found
    return found[1], re.sub(rf"^{remark}", "", found[2], flags=re.MULTILINE)


def demo_environment(folder: pathlib.Path) -> dict:
    """For running demo.py: everything that it leaves behind is found in the folder."""
    return os.environ | {"TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def places() -> Iterator[tuple["Place", "Place"]]:
    """Before one server with the demo's studies, a place for commands and another for queries.

    So the queries do not depend on what the commands stored.
    """
    with tempfile.TemporaryDirectory(prefix="readme-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        server = demo.running_server(stack, folder, guarded=False)[0]
        yield Place(folder / "commands", server.url), Place(folder / "queries", server.url)


class Place:
    """A folder like a clone, in which commands and queries of README.md run."""

    def __init__(self, folder: pathlib.Path, url: str):
        self.folder, self.url = folder, url
        self.shown: dict[Block, str] | None = None
        folder.mkdir()
        for file in ("store_study_info.py", "requirements.txt"):
            shutil.copy(ROOT / file, folder)
        self.path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        if shutil.which("sqlite3") is None:
            self.path += os.pathsep + str(stand_in_for_sqlite3(folder / ".bin"))

    def environment(self) -> dict:
        ours = ("STUDY_INFO_DB", "NETRC", "SSL_CERT_FILE", "NO_COLOR")
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        return inherited | {"ORTHANC_URL": self.url, "HOME": str(self.folder), "COLUMNS": "80", "PATH": self.path,
                            "PYTHONDONTWRITEBYTECODE": "1"}

    def shell(self, command: str) -> str:
        ended = subprocess.run(["sh", "-c", command], cwd=self.folder, env=self.environment(), check=False, timeout=120,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8")
        return plain(ended.stdout, self.url)

    def console(self, block: Block) -> str:
        """What the console blocks print; all of them run once, in the order of README.md."""
        if self.shown is None:
            self.shown = {one: self.run_commands(one) for one in blocks("console")}
        return self.shown[block]

    def run_commands(self, block: Block) -> str:
        commands = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
        commands = [DEMO] if commands[0] == DEMO else commands    # what the demo prints has such lines itself
        return "".join(f"$ {one}\n{self.demo() if one == DEMO else self.shell(one)}" for one in commands)

    def demo(self) -> str:
        """What the demo prints, cut as README.md shows it."""
        return abridged(plain(self.whole_demo))

    @functools.cached_property
    def whole_demo(self) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            ended = subprocess.run([sys.executable, HERE / "demo.py"], env=demo_environment(pathlib.Path(folder)),
                                   check=False, capture_output=True, encoding="utf-8", timeout=120)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    def database(self) -> pathlib.Path:
        """With the whole demo, March and April; beside it april.csv."""
        database = self.folder / "study_info.db"
        if not database.exists():
            self.shell("./store_study_info.py -q 202403 && ./store_study_info.py -q --csv april.csv 202404")
        return database

    def answer(self, block: Block) -> str:
        """What a query or a script says of the whole demo."""
        database = self.database()
        code, _ = divided(block)
        if block.kind == "sql":
            return first_rows(demo.ask(database, code))
        ended = subprocess.run([sys.executable, "-c", code], cwd=self.folder, check=False, timeout=120,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        return ended.stdout


def stand_in_for_sqlite3(folder: pathlib.Path) -> pathlib.Path:
    """A command `sqlite3 DATABASE QUERY` for machines that lack it; README.md's examples need no more of it."""
    folder.mkdir()
    script = ("import sqlite3, sys\n"
              "for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]):\n"
              "    print(*row, sep='|')\n")
    (folder / "sqlite3").write_text(f"#!{sys.executable}\n{script}")
    (folder / "sqlite3").chmod(0o755)
    return folder


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


@pytest.fixture(scope="module")
def ready():
    with places() as both:
        yield both


@pytest.fixture(scope="module")
def shown(ready):
    return ready[0]


@pytest.fixture(scope="module")
def answered(ready):
    return ready[1]


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_each_command_prints_what_is_shown(shown, block):
    assert lines(shown.console(block)) == lines(block.text)


@pytest.mark.parametrize("block", QUERIES + SCRIPTS, ids=str)
def test_each_query_gives_the_answer_shown(answered, block):
    shown = lines(divided(block)[1])
    assert shown
    assert lines(answered.answer(block)) == shown


def test_there_are_ten_queries():
    asked = [query for query in QUERIES if query.line > TEXT.partition("\n## Ten questions\n")[0].count("\n")]
    assert len(asked) == 10
    numbers = re.findall(r"^\*\*(\d+)\. .+\?\*\*", TEXT, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(asked) + 1)]


def test_every_block_is_held_by_a_test():
    """One of another kind would be passed over."""
    claimed = [*blocks("console", "sh", "cron", "ini", "text"), *SCHEMA, *QUERIES, *SCRIPTS]
    assert sorted(claimed, key=lambda block: block.line) == BLOCKS
    fences = re.findall(r"^ *(?:```|~~~).*$", TEXT, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS), "a block without a kind, or indented"


def test_the_statements_for_a_corrected_accession_let_its_series_be_stored_under_the_new_one(tmp_path):
    (block,) = blocks("text")
    study = dict.fromkeys(field.column for field in program.STUDY_FIELDS)
    series = dict.fromkeys(field.column for field in program.SERIES_FIELDS) | {"series_uid": "1.2"}
    with contextlib.closing(program.open_database(str(tmp_path / "corrected.db"))) as conn:
        program.store_study("E1", conn, study | {"accession": "E1"}, [series | {"accession": "E1"}])
        with pytest.raises(program.StudyError, match="One series under two accessions"):
            program.store_study("E2", conn, study | {"accession": "E2"}, [series | {"accession": "E2"}])
        conn.executescript(block.text)
        program.store_study("E2", conn, study | {"accession": "E2"}, [series | {"accession": "E2"}])
        assert conn.execute("SELECT accession FROM series").fetchall() == [("E2",)]


# -- figures that every release of SQLite rounds alike -----------------------------------------------------------------

def rounded_by(database: pathlib.Path | str, query: str) -> list[tuple[Fraction, int]]:
    """What a query rounds: each value as it was before, exactly, and to how many decimals."""
    seen = []

    def take_note(value, decimals=0):
        if value is not None:
            seen.append((Fraction(value), decimals))
        return value

    with contextlib.closing(sqlite3.connect(database)) as conn:
        for arguments in (1, 2):
            conn.create_function("round", arguments, take_note)
        conn.execute(query).fetchall()
    return seen


def from_a_tie(value: Fraction, decimals: int) -> Fraction:
    """How far a value is from where it would be rounded otherwise, in units of its last decimal."""
    return abs(value * 10**decimals % 1 - Fraction(1, 2))


def near_a_tie(figures: list[tuple[Fraction, int]]) -> list[tuple[float, int]]:
    return [(float(value), decimals) for value, decimals in figures if from_a_tie(value, decimals) < ENOUGH]


# Far more than sums of floating-point numbers differ by, from one release or machine to another.
ENOUGH = Fraction(1, 1000)


def test_a_figure_on_a_rounding_tie_would_be_seen():
    """SQLite rounds 711 / 60.0 to 11.8 or to 11.9, by its release."""
    ((value, decimals),) = rounded_by(":memory:", "SELECT round(711 / 60.0, 1)")
    assert decimals == 1
    assert from_a_tie(value, decimals) < ENOUGH


@pytest.mark.parametrize("query", [demo.SERIES_TABLE, demo.QUESTION, *(block.text for block in QUERIES)],
                         ids=["series", "question", *map(str, QUERIES)])
def test_no_figure_that_a_query_shows_is_near_a_rounding_tie(answered, query):
    figures = rounded_by(answered.database(), query)
    assert len(figures) >= query.count("round(")
    assert near_a_tie(figures) == []


ROUNDING = [block for block in SCRIPTS if ".round(" in block.text]


@pytest.mark.parametrize("block", ROUNDING, ids=str)
def test_no_figure_that_pandas_shows_is_near_a_rounding_tie(answered, block, monkeypatch):
    pandas = pytest.importorskip("pandas")
    figures: list[tuple[Fraction, int]] = []

    def take_note(table, decimals=0):
        figures.extend((Fraction(value), decimals) for name in table.columns for value in table[name])
        return table

    answered.database()
    monkeypatch.chdir(answered.folder)
    monkeypatch.setattr(pandas.DataFrame, "round", take_note)
    exec(compile(block.text, "README.md", "exec"), {})
    assert len(figures) >= 5
    assert near_a_tie(figures) == []


def test_there_are_scripts_that_round():
    assert ROUNDING


# -- commands, options, variables --------------------------------------------------------------------------------------

def commands_in(text: str) -> list[str]:
    """The arguments of each call of the program in a text, up to a pipe, a redirection or a comment."""
    text = re.sub(r"\$\(date [^)]*\)", "202404", text.replace("\\\n", " "))
    return [match.strip() for match in re.findall(r"^[^#\n]*?store_study_info\.py +([^\n|;>&#]*)", text, re.MULTILINE)]


CHECKED = [(block.line, call) for block in blocks("sh", "cron", "ini") for call in commands_in(block.text)]
HELP = program.build_parser().format_help()
EXAMPLES = commands_in(HELP.partition("examples:")[2].partition("environment:")[0])


@pytest.mark.parametrize("line, call", CHECKED, ids=str)
def test_each_command_that_is_not_run_would_be_understood(line, call):
    arguments = program.build_parser().parse_intermixed_args(shlex.split(call))
    for token in arguments.tokens:
        if not token.startswith(("@", "$")):
            program.parse_token(token, datetime.date(2024, 5, 2))


@pytest.mark.parametrize("call", EXAMPLES)
def test_each_example_of_help_works(shown, call):
    """On the demo's server, in a folder of its own; yesterday has no studies, which is no failure."""
    with tempfile.TemporaryDirectory(dir=shown.folder) as folder:
        ended = subprocess.run([sys.executable, ROOT / "store_study_info.py", *shlex.split(call)], cwd=folder,
                               env=shown.environment(), stdin=subprocess.DEVNULL, check=False, capture_output=True,
                               text=True, timeout=60)
        made = set(os.listdir(folder))
    assert ended.returncode == 0, ended.stderr
    database = "sar.db" if "sar.db" in call else "study_info.db"
    assert made == {database} | ({"april.csv"} if "april.csv" in call else set())


def test_there_are_commands_and_examples_to_check():
    assert len(CHECKED) >= 4
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_each_shell_block_is_one(block):
    subprocess.run(["sh", "-n"], input=block.text, text=True, check=True, timeout=60)
    scripts = re.findall(r"\bsh (tests/\w+\.sh)", block.text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("block", blocks("ini"), ids=str)
def test_each_unit_of_systemd_is_one(block):
    read = configparser.ConfigParser(interpolation=None)
    read.read_string(block.text)
    assert set(read.sections()) <= {"Unit", "Service", "Timer", "Install"}


@pytest.mark.parametrize("block", blocks("cron"), ids=str)
def test_each_line_of_a_crontab_is_one(block):
    for line in block.text.splitlines():
        assert re.fullmatch(r"[A-Z_]+=\S+|([\d*]+ +){5}[^%]+", line), line


def test_help_fits_in_80_columns():
    assert max(map(len, HELP.splitlines())) < 80


def test_readme_shows_the_help_as_it_is():
    (block,) = [block for block in blocks("console") if block.text.startswith("$ ./store_study_info.py --help\n")]
    assert lines(block.text)[1:] == lines(HELP)


def test_readme_names_no_option_that_does_not_exist():
    known = {option for action in program.build_parser()._actions for option in action.option_strings}
    of_tests = {"--keep", "--scale", "--serve", "--update", "--user"}    # of demo.sh, benchmark.py, this file, fresh.sh
    own = re.sub(r"`(?:systemctl|journalctl|loginctl) [^`]*`", "", TEXT)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) <= known | of_tests


def test_the_options_of_the_demo_exist():
    ended = subprocess.run([sys.executable, HERE / "demo.py", "--help"], capture_output=True, text=True, check=True,
                           timeout=60)
    assert {"--keep", "--serve"} <= set(re.findall(r"--[a-z]+", ended.stdout))


def test_readme_names_every_script_that_is_called_by_hand():
    sourced = {"setup.sh", "bare.sh"}
    scripts = {path.name for path in HERE.glob("*.sh")} - sourced
    assert {"demo.sh", "run.sh"} <= scripts
    assert [name for name in scripts if f"sh tests/{name}" not in TEXT] == []


@pytest.mark.parametrize("name", ["STUDY_INFO_DB", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE"])
def test_readme_and_help_explain_the_environment_variable(name):
    assert name in HELP.partition("environment:")[2]
    assert f"`{name}`" in TEXT


def test_every_environment_variable_that_is_read_is_explained():
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    read = set(re.findall(r"os\.environ(?:\.get\(|\[)\"(\w+)\"", source))
    assert read == {"STUDY_INFO_DB", "STUDY_INFO_PREFIX", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE"}


# -- schema, fields, reasons, messages ---------------------------------------------------------------------------------

def described(conn: sqlite3.Connection) -> dict:
    made = {(table, what): conn.execute(f"PRAGMA {what}({table})").fetchall()
            for table in ("studies", "series") for what in ("table_info", "foreign_key_list")}
    indexes = conn.execute("SELECT tbl_name, name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    return made | {"indexes": indexes.fetchall()}


def test_readme_shows_the_schema_as_it_is(tmp_path):
    (block,) = SCHEMA
    with contextlib.closing(sqlite3.connect(":memory:")) as shown, \
            contextlib.closing(program.open_database(str(tmp_path / "made.db"))) as made:
        shown.executescript(block.text)
        assert described(shown) == described(made)


def table_rows(text: str) -> list[list[str]]:
    """The cells of all Markdown tables in a text."""
    tables = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in tables]


def section(title: str) -> str:
    """What stands under a heading, up to the next of its kind."""
    text = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert text, title
    return text


def test_readme_names_the_tag_of_every_column():
    named: set[tuple[str, str]] = set()
    for columns, tags, *_ in table_rows(section("The database"))[2:]:
        named |= set(zip(re.findall(r"`(\w+)`", columns), re.findall(r"\(([0-9a-f]{4},[0-9a-f]{4})\)", tags),
                         strict=True))
    assert named == {(field.column, field.tag) for fields in program.TABLES.values() for field in fields}


@pytest.mark.parametrize("reason", program.REASONS)
def test_readme_explains_every_reason(reason):
    assert any(row[0] == f"`{reason}`" for row in table_rows(TEXT))


def test_the_parts_of_the_summary_that_readme_explains_are_those_there_are():
    tally = program.Tally(dict.fromkeys((program.NOT_REACHED, program.WITHOUT_MR, program.DOUBTFUL_DATES,
                                         *program.REASONS, *program.ORIGINS), 1))
    explained = [row[0] for row in table_rows(section("What was skipped, and why").partition("\nA series ")[0])[2:]]
    said = str(tally)
    for part in re.findall(r"[^…,]+", ",".join(explained)):
        assert part.strip() in said
        said = said.replace(part.strip(), "", 1)
    said = re.sub("|".join(map(re.escape, program.REASONS)), "", said)
    assert not re.findall(r"[a-z]+", said)


MESSAGES = [row[0].strip("`") for row in table_rows(section("When something is wrong"))[2:]]


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_that_readme_explains_exists(message):
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    assert all(part.strip() in source for part in message.split("…"))


def test_readme_explains_messages():
    assert len(MESSAGES) >= 8


# -- what belongs together ---------------------------------------------------------------------------------------------

def meaningful_lines(path: pathlib.Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def test_the_script_block_and_requirements_are_the_same():
    """PEP 723: what `uv run` installs is what pip installs."""
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source, re.MULTILINE)
    listed = re.findall(r'^#     "(.+)",$', block, re.MULTILINE)
    wanted = meaningful_lines(ROOT / "requirements.txt")
    assert sorted(listed) == sorted(wanted)
    assert '# requires-python = ">=3.10"' in block and "3.10" in TEXT


def test_the_top_level_holds_what_it_may():
    ignored = [line.rstrip("/") for line in meaningful_lines(ROOT / ".gitignore")]
    found = {name for name in os.listdir(ROOT) if not name.startswith(".")
             and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert found == {"store_study_info.py", "README.md", "NOTES.md", "tests", "requirements.txt"}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_of_contents_is_complete():
    headings = re.findall(r"^## (.+)$", re.sub(BLOCK, "", TEXT), re.MULTILINE)
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", TEXT.partition("\n## ")[0])
    assert links == [(heading, anchor(heading)) for heading in headings]


@pytest.mark.parametrize("text", [TEXT, NOTES], ids=["README", "NOTES"])
def test_links_and_files_named_exist(text):
    pages = {"": text, "README.md": TEXT, "NOTES.md": NOTES}
    anchors = {page: {anchor(heading) for heading in re.findall(r"^##+ (.+)$", BLOCK.sub("", whole), re.MULTILINE)}
               for page, whole in pages.items()}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    for target in targets:
        page, _, place = target.partition("#")
        assert (ROOT / page).exists(), target
        assert not place or place in anchors[page], target
    files = re.findall(r"`(?:tests/)?(\w+\.py)`", text)
    assert files
    assert [name for name in files if not (HERE / name).exists() and not (ROOT / name).exists()] == []


def test_no_file_depends_on_where_it_was_written():
    """No absolute path of somebody's machine in anything that is handed on."""
    own = "|".join(("root", "work", "home", "Users"))
    names = ("store_study_info.py", "README.md", "NOTES.md", "requirements.txt", ".gitignore", ".ruff.toml")
    files = [ROOT / name for name in names] + \
            [path for path in HERE.iterdir() if path.suffix in (".py", ".sh", ".txt", ".ini")]
    somewhere = re.compile(rf"(?<![\w.$}}/:*-])/(?:{own})/\w+")
    assert somewhere.search("in /" + "home/somebody")
    found = [f"{path.name}: {match}" for path in files for match in somewhere.findall(path.read_text(encoding="utf-8"))]
    assert not found


# -- the demo ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM"])
def test_an_interrupted_demo_leaves_nothing(tmp_path, end):
    before = set(os.listdir(ROOT))
    with subprocess.Popen([sys.executable, HERE / "demo.py"], env=demo_environment(tmp_path), encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.readline() if process.stdout else ""
        process.send_signal(signal.Signals[end])
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[end]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir(ROOT)) == before
    (url,) = re.findall(r"answers at (http\S+?),", first)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_the_demo_fits_a_terminal_of_100_columns(shown):
    tables = [line for line in plain(shown.whole_demo).splitlines() if not line.startswith(SHOWN_TIME)]
    assert len(tables) > 50
    assert max(map(len, tables)) <= 100


def test_the_demo_shows_both_tables_a_question_and_a_second_run(shown):
    paragraphs = plain(shown.whole_demo).strip("\n").split("\n\n")
    heads = ["".join(paragraph.splitlines()[:3]) for paragraph in paragraphs]
    for words in ("accession *id *age *height", "uid *accession *sar *duration", "SELECT accession",
                  "accession *study_description"):
        assert len([head for head in heads if re.search(words, head)]) == 1, words
    (again,) = [one for one in paragraphs if one.startswith("$ ./store_study_info.py 202403-202404")]
    assert "studies: 3 stored, 12 already stored, 0 failed" in again.splitlines()[-1]
    now, before = map(float, re.findall(r"(\d+\.\d+) kJ/kg now; before, it was (\d+\.\d+)", paragraphs[-1])[0])
    assert now > 4 * before > 0, "what --force --fallback changes in the energy of a study"
    for beginning in SHOWN_OF_DEMO:
        assert len([paragraph for paragraph in paragraphs if paragraph.startswith(beginning)]) == 1, beginning


def test_the_demo_keeps_its_database_where_it_is_told_to(tmp_path):
    kept = tmp_path / "kept.db"
    folder = tmp_path / "temporary"
    folder.mkdir()
    keep = [sys.executable, HERE / "demo.py", "--keep", kept]
    subprocess.run(keep, env=demo_environment(folder), stdout=subprocess.DEVNULL, check=True, timeout=120)
    assert list(folder.iterdir()) == []
    assert kept.stat().st_mode & 0o777 == 0o600
    again = subprocess.run(keep, check=False, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "exists already" in again.stderr


# -- writing the outputs -----------------------------------------------------------------------------------------------

def update() -> None:
    def remarks(block: Block, answer: str) -> str:
        return divided(block)[0] + "".join(f"{REMARK[block.kind]}{line}\n" for line in lines(answer))

    with places() as (commands, queries):
        text = {block: commands.run_commands(block) for block in blocks("console")}
        text |= {block: remarks(block, queries.answer(block)) for block in QUERIES + SCRIPTS}
    found = iter(BLOCKS)

    def renewed(match: re.Match) -> str:
        return f"```{match[1]}\n{text.get(next(found), match[2]).rstrip()}\n```"
    README.write_text(BLOCK.sub(renewed, TEXT), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()
