"""README.md and --help say what is true: what they show is run here and must come out as printed there.

    python tests/test_readme.py --update      runs everything and writes the outputs into README.md

How README.md marks what is run: a block `console` holds commands after `$ ` and all they print; all of them run in order
in one folder, before the demo's server. A block `sql` is a query, a block `python` a script on the demo's database; the
block `text` that follows is the answer. Commands in blocks `sh`, `cron` and `ini` are only checked to be understood.
Time stamps and the server's address are not compared; a long paragraph of the demo is cut with `…`.
"""
import configparser
import contextlib
import datetime
import fnmatch
import os
import pathlib
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

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
ANSWERED = [(block, BLOCKS[place + 1]) for place, block in enumerate(BLOCKS[:-1]) if block.kind in ("sql", "python") and BLOCKS[place + 1].kind == "text"]


QUERIES = [block for block in BLOCKS if block.kind == "sql" and not block.text.startswith("CREATE")]
SCHEMA = [block for block in BLOCKS if block.kind == "sql" and block.text.startswith("CREATE")]


def blocks(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


# -- running what README.md shows --------------------------------------------------------------------------------------

def plain(text: str, url: str = SHOWN_URL) -> str:
    """Without what differs from run to run: the server's address and version, times."""
    text = text.replace(url, SHOWN_URL)
    text = re.sub(r"^(Orthanc \d\S*|A stand-in .*?\)) answers at [^\s,]+", f"Orthanc 1.10.1 answers at {SHOWN_URL}", text, flags=re.MULTILINE)
    text = re.sub(r"ORTHANC_URL=http://127\.0\.0\.1:\d+", f"ORTHANC_URL={SHOWN_URL}", text)
    return re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", SHOWN_TIME + " ", text, flags=re.MULTILINE)


def abridged(text: str) -> str:
    """The beginning and the end of each long paragraph."""
    def cut(paragraph: str) -> str:
        lines = paragraph.split("\n")
        return paragraph if len(lines) <= 16 else "\n".join([*lines[:8], "…", *lines[-3:]])
    return "\n\n".join(map(cut, text.strip("\n").split("\n\n"))) + "\n"


def demo_environment(folder: pathlib.Path) -> dict:
    """For running demo.py: everything that it leaves behind is found in the folder."""
    return os.environ | {"TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def places() -> Iterator[tuple["Place", "Place"]]:
    """Before one server with the demo's studies, a place for commands and another for queries, which do not depend on the commands."""
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
        return inherited | {"ORTHANC_URL": self.url, "HOME": str(self.folder), "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1", "PATH": self.path}

    def shell(self, command: str) -> str:
        ended = subprocess.run(["sh", "-c", command], cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=120)
        return plain(ended.stdout, self.url)

    def console(self, block: Block) -> str:
        """What the console blocks print; all of them run once, in the order of README.md."""
        if self.shown is None:
            self.shown = {one: self.run_commands(one) for one in blocks("console")}
        return self.shown[block]

    def run_commands(self, block: Block) -> str:
        commands = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
        commands = [DEMO] if commands[0] == DEMO else commands    # what the demo prints has such lines itself
        return "".join(f"$ {command}\n{self.demo() if command == DEMO else self.shell(command)}" for command in commands)

    def demo(self) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            ended = subprocess.run([sys.executable, HERE / "demo.py"], env=demo_environment(pathlib.Path(folder)), capture_output=True, encoding="utf-8", timeout=120)
            assert (ended.returncode, ended.stderr) == (0, "")
        return abridged(plain(ended.stdout))

    def database(self) -> pathlib.Path:
        """With the whole demo, March and April; beside it april.csv."""
        database = self.folder / "study_info.db"
        if not database.exists():
            self.shell("./store_study_info.py -q 202403 && ./store_study_info.py -q --csv april.csv 202404")
        return database

    def answer(self, block: Block) -> str:
        """What a query or a script says of the whole demo."""
        database = self.database()
        if block.kind == "sql":
            return demo.ask(database, block.text) + "\n"
        ended = subprocess.run([sys.executable, "-c", block.text], cwd=self.folder, capture_output=True, encoding="utf-8", timeout=120)
        missing = re.search(r"No module named '(\w+)'|(Failed to download extension)", ended.stderr)
        if missing:
            pytest.skip(f"{missing[1] or 'an extension of duckdb'} is not installed here")
        return ended.stdout + ended.stderr


def stand_in_for_sqlite3(folder: pathlib.Path) -> pathlib.Path:
    """A command `sqlite3 DATABASE QUERY` for machines that lack it; README.md's examples need no more of it."""
    folder.mkdir()
    script = "import sqlite3, sys\nfor row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]):\n    print(*row, sep='|')\n"
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


@pytest.mark.parametrize("block, answer", ANSWERED, ids=str)
def test_each_query_gives_the_answer_shown(answered, block, answer):
    assert lines(answered.answer(block)) == lines(answer.text)


def test_there_are_ten_queries():
    assert len(QUERIES) >= 10


def test_every_block_is_held_by_a_test():
    """One of another kind, a query without its answer or an answer without its query would be passed over."""
    claimed = [*blocks("console", "sh", "cron", "ini"), *SCHEMA, *(block for pair in ANSWERED for block in pair)]
    assert sorted(claimed, key=lambda block: block.line) == BLOCKS
    fences = re.findall(r"^ *(?:```|~~~).*$", TEXT, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS), "a block without a kind, or indented"


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
    assert [] == [(float(value), decimals) for value, decimals in figures if from_a_tie(value, decimals) < ENOUGH]


@pytest.mark.parametrize("block", [block for block, _ in ANSWERED if ".round(" in block.text], ids=str)
def test_no_figure_that_pandas_shows_is_near_a_rounding_tie(answered, block, monkeypatch):
    pandas = pytest.importorskip("pandas")
    figures = []

    def take_note(table, decimals=0):
        figures.extend((Fraction(value), decimals) for name in table.columns for value in table[name])
        return table

    answered.database()
    monkeypatch.chdir(answered.folder)
    monkeypatch.setattr(pandas.DataFrame, "round", take_note)
    exec(compile(block.text, "README.md", "exec"), {})
    assert len(figures) >= 5
    assert [] == [(float(value), decimals) for value, decimals in figures if from_a_tie(value, decimals) < ENOUGH]


def test_the_figures_that_pandas_rounds_are_looked_at():
    assert [block for block, _ in ANSWERED if ".round(" in block.text]


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
        ended = subprocess.run([sys.executable, ROOT / "store_study_info.py", *shlex.split(call)], cwd=folder, env=shown.environment(),
                               stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        made = set(os.listdir(folder))
    assert ended.returncode == 0, ended.stderr
    assert made == {"sar.db" if "sar.db" in call else "study_info.db"} | ({"april.csv"} if "april.csv" in call else set())


def test_there_are_commands_and_examples_to_check():
    assert len(CHECKED) >= 5
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_each_shell_block_is_one(block):
    subprocess.run(["sh", "-n"], input=block.text, text=True, check=True, timeout=60)
    scripts = re.findall(r"\bsh (tests/\w+\.sh)", block.text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.parametrize("block", blocks("ini"), ids=str)
def test_each_unit_of_systemd_is_one(block):
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str
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


def test_readme_names_no_option_that_is_none():
    known = {option for action in program.build_parser()._actions for option in action.option_strings} | {"--keep", "--serve", "--update"}
    own = "\n".join(line for line in TEXT.splitlines() if not re.search(r"pip |systemctl|journalctl|datasette|sqlite3 |git ", line))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) <= known


@pytest.mark.parametrize("name", ["STUDY_INFO_DB", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE"])
def test_readme_and_help_explain_the_environment_variable(name):
    assert name in HELP.partition("environment:")[2]
    assert f"`{name}`" in TEXT


def test_every_environment_variable_that_is_read_is_explained():
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    assert set(re.findall(r"os\.environ(?:\.get\(|\[)\"(\w+)\"", source)) == {"STUDY_INFO_DB", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE"}


# -- schema, fields, reasons, messages ---------------------------------------------------------------------------------

def described(conn: sqlite3.Connection) -> dict:
    return {table: [list(conn.execute(f"PRAGMA {what}({table})")) for what in ("table_info", "foreign_key_list")] for table in ("studies", "series")} \
        | {"index": list(conn.execute("SELECT tbl_name, name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"))}


def test_readme_shows_the_schema_as_it_is():
    (block,) = SCHEMA
    with contextlib.closing(sqlite3.connect(":memory:")) as shown, contextlib.closing(sqlite3.connect(":memory:")) as made:
        shown.executescript(block.text)
        program.create_tables(made)
        assert described(shown) == described(made)


def table_rows(text: str) -> list[list[str]]:
    """The cells of all Markdown tables in a text."""
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_readme_names_the_tag_of_every_column():
    rows = [row for row in table_rows(TEXT.partition("## The database")[2].partition("\n## ")[0])[2:]]
    named = {pair for row in rows for pair in zip(re.findall(r"`(\w+)`", row[0]), re.findall(r"\(([0-9a-f]{4},[0-9a-f]{4})\)", row[1]), strict=True)}
    assert named == {(field.column, field.tag) for fields in program.TABLES.values() for field in fields}


@pytest.mark.parametrize("reason", program.REASONS)
def test_readme_explains_every_reason(reason):
    assert any(row[0] == f"`{reason}`" for row in table_rows(TEXT))


def test_the_parts_of_the_summary_that_readme_explains_are_those_there_are():
    tally = program.Tally()
    tally.stored = tally.already = tally.failed = tally.left = tally.without_images = tally.series = tally.short = tally.doubtful = 1
    tally.skipped = Counter(program.REASONS)
    explained = [row[0] for row in table_rows(TEXT.partition("## Reading the summary")[2].partition("| exit status")[0])[2:]]
    said = str(tally)
    for part in re.findall(r"[^…,]+", ",".join(explained)):
        assert part.strip() in said
        said = said.replace(part.strip(), "", 1)
    said = re.sub("|".join(map(re.escape, program.REASONS)), "", said)
    assert not re.findall(r"[a-z]+", said)


MESSAGES = [row[0].strip("`") for row in table_rows(TEXT.partition("## When something is wrong")[2].partition("\n## ")[0])[2:]]


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_that_readme_explains_exists(message):
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    assert all(part.strip() in source for part in message.split("…"))


def test_readme_explains_messages():
    assert len(MESSAGES) >= 8


# -- what belongs together ---------------------------------------------------------------------------------------------

def test_the_script_block_and_requirements_are_the_same():
    """PEP 723: what `uv run` installs is what pip installs."""
    source = (ROOT / "store_study_info.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source, re.MULTILINE)
    listed = re.findall(r'^#     "(.+)",$', block, re.MULTILINE)
    wanted = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert sorted(listed) == sorted(wanted)
    assert '# requires-python = ">=3.10"' in block and "3.10" in TEXT


def test_the_top_level_holds_what_it_may():
    ignored = [line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip() and not line.startswith("#")]
    found = {name for name in os.listdir(ROOT) if not name.startswith(".") and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert found == {"store_study_info.py", "README.md", "NOTES.md", "tests", "requirements.txt"}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_of_contents_is_complete():
    headings = re.findall(r"^## (.+)$", re.sub(BLOCK, "", TEXT), re.MULTILINE)
    links = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", TEXT.partition("\n## ")[0])
    assert links == [(heading, anchor(heading)) for heading in headings]


@pytest.mark.parametrize("text", [TEXT, NOTES], ids=["README", "NOTES"])
def test_links_and_files_named_exist(text):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    tests = re.findall(r"`(?:tests/)?((?:test_\w+|benchmark|demo|stand_in|conftest|endpoint|orthanc|dicom_files)\.py)`", text)
    missing = [target for target in targets if not (ROOT / target).exists()] + [name for name in tests if not (HERE / name).exists()]
    assert not missing


def test_no_file_depends_on_where_it_was_written():
    """No absolute path of somebody's machine in anything that is handed on."""
    own = "|".join(("root", "work", "home", "Users"))
    files = [ROOT / name for name in ("store_study_info.py", "README.md", "NOTES.md", "requirements.txt", ".gitignore")] + \
            [path for path in HERE.iterdir() if path.suffix in (".py", ".sh", ".txt", ".ini")]
    found = [f"{path.name}: {match}" for path in files for match in re.findall(rf"(?<![\w.$}}/:*-])/(?:{own})/\w+", path.read_text(encoding="utf-8"))]
    assert not found


# -- the demo ----------------------------------------------------------------------------------------------------------

def files_of(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if ".git" not in path.parts and "__pycache__" not in path.parts}


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM"])
def test_an_interrupted_demo_leaves_nothing(tmp_path, end):
    import signal

    import httpx
    before = set(os.listdir(ROOT))
    with subprocess.Popen([sys.executable, HERE / "demo.py"], env=demo_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        url = re.search(r"answers at (http\S+?),", process.stdout.readline())[1]
        process.send_signal(signal.Signals[end])
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[end]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir(ROOT)) == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_the_demo_fits_a_terminal_of_100_columns(shown):
    (block,) = [block for block in blocks("console") if block.text.startswith(f"$ {DEMO}\n")]
    tables = [line for line in shown.console(block).splitlines() if not line.startswith(SHOWN_TIME)]
    assert max(map(len, tables)) <= 100


def test_the_demo_keeps_its_database_where_it_is_told_to(tmp_path):
    kept = tmp_path / "kept.db"
    folder = tmp_path / "temporary"
    folder.mkdir()
    subprocess.run([sys.executable, HERE / "demo.py", "--keep", kept], env=demo_environment(folder), stdout=subprocess.DEVNULL, check=True, timeout=120)
    assert list(folder.iterdir()) == []
    assert kept.stat().st_mode & 0o777 == 0o600
    again = subprocess.run([sys.executable, HERE / "demo.py", "--keep", kept], capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "exists already" in again.stderr


# -- writing the outputs -----------------------------------------------------------------------------------------------

def update() -> None:
    with places() as (commands, queries):
        text = {block: commands.run_commands(block) for block in blocks("console")}
        for block, answer in ANSWERED:
            try:
                text[answer] = queries.answer(block)
            except pytest.skip.Exception as skipped:
                print(f"{block} is left as it is: {skipped}")
    found = iter(BLOCKS)
    README.write_text(BLOCK.sub(lambda match: f"```{match[1]}\n{text.get(next(found), match[2]).rstrip()}\n```", TEXT), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()
