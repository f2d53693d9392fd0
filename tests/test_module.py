"""The shape of store_study_info.py: sections in the order in which they are understood, sizes, examples, linters.

Each rule is a function from source text to findings, so that it is tested on small sources that break it, too.
"""
import ast
import doctest
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from conftest import HERE, PROGRAM

import store_study_info as store

SOURCE = PROGRAM.read_text(encoding="utf-8")
SECTIONS = 10       # at least
COLUMNS = 120       # at most, as the next three
FUNCTION_LINES = 45
CLASS_LINES = 230
MODULE_LINES = 2600
EXAMPLES = 8       # at least, in the docstrings of parsers and tokens together
MYPY = ["--check-untyped-defs", "--warn-unreachable", "--ignore-missing-imports"]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# ------------------------------------------------------------------------------------------------------------------
# Sections and their banners
# ------------------------------------------------------------------------------------------------------------------

class Section(NamedTuple):
    line: int       # of its title; 0 for what stands above the first banner
    title: str


def sections(source: str) -> list[Section]:
    """The sections by their banners: a line of `# ` and hyphens only, the title, the same line again."""
    lines = source.splitlines()
    found = [Section(0, "the top")]
    for number in range(1, len(lines) - 1):
        rule = lines[number - 1]
        if re.fullmatch(r"# -{3,}", rule) and rule == lines[number + 1] and re.match(r"# [^-\s]", lines[number]):
            found.append(Section(number + 1, lines[number][2:]))
    return found


def section_of(line: int, among: list[Section]) -> Section:
    """The section that a line is in. The upper rule of its banner does not matter: nothing is defined there."""
    return [section for section in among if section.line <= line][-1]


def banner_findings(source: str, least: int = SECTIONS) -> list[str]:
    """Fewer sections than `least`, titles that stand twice, and lines of hyphens that belong to no banner."""
    among = sections(source)[1:]
    rules = {section.line + step for section in among for step in (-1, 1)}
    found = [f"line {number}: hyphens outside of a banner" for number, line in enumerate(source.splitlines(), 1)
             if re.fullmatch(r"\s*#?\s*-{3,}\s*#?\s*", line) and number not in rules]
    titles = [section.title for section in among]
    found += [f"the title {title!r} stands twice" for title in sorted(set(titles)) if titles.count(title) > 1]
    return found + [f"there are {len(among)} sections"] * (len(among) < least)


# ------------------------------------------------------------------------------------------------------------------
# Nothing is used above the section that defines it
# ------------------------------------------------------------------------------------------------------------------

def bound(nodes: list[ast.AST]) -> set[str]:
    """The names that these nodes bind in the scope that they stand in, save those that it declares global."""
    names: set[str] = set()
    outside: set[str] = set()
    for node in in_scope(nodes):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            outside.update(node.names)
    return names - outside


def in_scope(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """These nodes and all below them of the same scope; of a comprehension only what := binds outside it."""
    for node in nodes:
        if isinstance(node, COMPREHENSIONS):
            yield from (inner.target for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr))
            continue
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            yield from in_scope(list(ast.iter_child_nodes(node)))


class Uses(ast.NodeVisitor):
    """Collects (name, line) wherever a name of the module is read, whatever the scope that reads it.

    scopes: what the enclosing functions and comprehensions bind, and the class body where the reader stands in one.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []
        self.scopes: list[set[str]] = []

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self.scopes):
            self.found.append((node.id, node.lineno))

    def inside(self, names: set[str], nodes: list[ast.AST]) -> None:
        """Visit nodes in a scope of their own."""
        self.scopes.append(names)
        for node in nodes:
            self.visit(node)
        self.scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = node.args
        for outside in (*node.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(outside)
        for annotation in (*(one.annotation for one in every_argument(arguments)), node.returns):
            self.annotation(annotation)
        names = {one.arg for one in every_argument(arguments)}
        self.function_scope(names | bound([*node.body]), [*node.body])

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.function_scope({one.arg for one in every_argument(node.args)} | bound([node.body]), [node.body])

    def function_scope(self, names: set[str], nodes: list[ast.AST]) -> None:
        """A function does not see what the class body around it binds."""
        hidden, self.scopes = self.scopes, [scope for scope in self.scopes if not isinstance(scope, ClassBody)]
        self.inside(names, nodes)
        self.scopes = hidden

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outside in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outside)
        self.inside(ClassBody(bound([*node.body])), [*node.body])

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        """The first iterable is read outside; all else sees the targets."""
        first, *others = node.generators
        self.visit(first.iter)
        targets = {name.id for one in node.generators for name in ast.walk(one.target) if isinstance(name, ast.Name)}
        inner: list[ast.AST] = [part for one in node.generators for part in (one.target, *one.ifs)]
        inner += [one.iter for one in others]
        inner += [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.comprehension)]
        self.function_scope(targets, inner)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotation(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def annotation(self, node: ast.expr | None) -> None:
        """An annotation, in which a text is code as well, save in Literal."""
        if node is None:
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name in ast.walk(ast.parse(node.value.strip(), mode="eval")):
                if isinstance(name, ast.Name):
                    self.visit(ast.copy_location(ast.Name(name.id, ast.Load()), node))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).rpartition(".")[2] == "Literal":
            self.visit(node.value)
        elif isinstance(node, ast.Name):
            self.visit(node)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.annotation(child)


class ClassBody(set):
    """What a class body binds: seen there, and not by the functions in it."""


def every_argument(arguments: ast.arguments) -> list[ast.arg]:
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
            *filter(None, (arguments.vararg, arguments.kwarg))]


def definitions(tree: ast.Module) -> dict[str, int]:
    """{name: line of its first binding} of all that the module's own level binds."""
    lines: dict[str, int] = {}
    for statement in tree.body:
        for name in bound([statement]):
            lines.setdefault(name, statement.lineno)
    return lines


def order_findings(source: str) -> list[str]:
    """Names that a section uses and a later one defines: in code, defaults, decorators and annotations."""
    tree, among = ast.parse(source), sections(source)
    lines, uses = definitions(tree), Uses()
    uses.visit(tree)
    found = []
    for name, line in uses.found:
        if name in lines:
            home, reader = section_of(lines[name], among), section_of(line, among)
            if reader.line < home.line:
                found.append(f"line {line}: {name} is used in {reader.title!r}, above {home.title!r} that defines it")
    return found


# ------------------------------------------------------------------------------------------------------------------
# Sizes
# ------------------------------------------------------------------------------------------------------------------

def size_findings(source: str, columns: int = COLUMNS, function: int = FUNCTION_LINES, class_: int = CLASS_LINES,
                  module: int = MODULE_LINES) -> list[str]:
    """Lines that are too wide, and functions, classes and a module that are too long."""
    lines = source.splitlines()
    found = [f"line {number}: {len(line)} columns" for number, line in enumerate(lines, 1) if len(line) > columns]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > (class_ if isinstance(node, ast.ClassDef) else function):
                found.append(f"line {node.lineno}: {node.name} has {length} lines")
    return found + [f"the module has {len(lines)} lines"] * (len(lines) > module)


# ------------------------------------------------------------------------------------------------------------------
# Examples
# ------------------------------------------------------------------------------------------------------------------

def in_sections(source: str, word: str) -> list[ast.stmt]:
    """The statements of the module's level in the sections whose title has the word."""
    among = sections(source)
    return [node for node in ast.parse(source).body
            if re.search(rf"\b{word}\b", section_of(node.lineno, among).title, re.IGNORECASE)]


def examples(node: ast.AST) -> int:
    """How many examples the docstrings of a function, or of a class and its methods, show."""
    texts = [ast.get_docstring(one) for one in ast.walk(node) if isinstance(one, (*FUNCTIONS, ast.ClassDef))]
    return sum(len(doctest.DocTestParser().get_examples(text)) for text in texts if text)


def unexplained(source: str, word: str) -> list[str]:
    """Functions in the sections of that word that read by a regular expression and show no example."""
    expressions = {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
                   and ast.unparse(node.value).startswith("re.compile(")
                   for target in node.targets if isinstance(target, ast.Name)} | {"re"}
    return [f"line {node.lineno}: {node.name} shows no example" for node in in_sections(source, word)
            if isinstance(node, FUNCTIONS) and not examples(node)
            and any(isinstance(name, ast.Name) and name.id in expressions
                    for statement in node.body for name in ast.walk(statement))]


# ------------------------------------------------------------------------------------------------------------------
# The program holds the rules
# ------------------------------------------------------------------------------------------------------------------

def test_the_banners_are_a_table_of_contents():
    assert banner_findings(SOURCE) == []


def test_nothing_is_used_above_the_section_that_defines_it():
    assert order_findings(SOURCE) == []


def test_lines_functions_classes_and_the_module_are_of_a_size_to_be_read():
    assert size_findings(SOURCE) == []


@pytest.mark.parametrize("word", ["parsers", "tokens"])
def test_what_is_read_by_a_regular_expression_is_shown_by_an_example(word):
    assert sum(examples(node) for node in in_sections(SOURCE, word)) > 0
    assert unexplained(SOURCE, word) == []


def test_the_examples_of_the_docstrings_are_true():
    shown = sum(examples(node) for node in ast.parse(SOURCE).body)
    ran = doctest.testmod(store)
    assert ran.failed == 0
    assert ran.attempted >= max(shown, EXAMPLES), "an example that a decorator hides is none that runs"


def python_files() -> list[str]:
    return [str(PROGRAM), *sorted(map(str, HERE.glob("*.py")))]


def check(module: str, *arguments: str) -> None:
    """Run a linter on module and tests: it prints nothing but that all is well, and leaves nothing behind."""
    ended = subprocess.run([sys.executable, "-m", module, *arguments, *python_files()], cwd=HERE, text=True,
                           capture_output=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_ruff_finds_nothing():
    check("ruff", "check", "--quiet", "--no-cache", "--output-format", "concise")


def test_mypy_finds_nothing():
    check("mypy", *MYPY, "--config-file=", "--cache-dir", os.devnull, "--no-error-summary")


# ------------------------------------------------------------------------------------------------------------------
# And each rule can be broken
# ------------------------------------------------------------------------------------------------------------------

RULE = "# " + "-" * 20


def made(*parts: str) -> str:
    """A module of sections A, B, …, each with that code."""
    return "".join(f"{RULE}\n# {chr(ord('A') + count)}\n{RULE}\n{textwrap.dedent(part)}\n"
                   for count, part in enumerate(parts))


def test_banners_are_read_as_they_are_written():
    assert sections("import os\n" + made("x = 1", "y = 2")) == [(0, "the top"), (3, "A"), (7, "B")]
    assert banner_findings("import os\n" + made("x = 1", "y = 2"), 2) == []


@pytest.mark.parametrize("source, finding", [
    (made("x = 1"), "there are 1 sections"),
    (made("x = 1", f"{RULE}\ny = 2"), "line 8: hyphens outside of a banner"),
    (made("x = 1", f"class C:\n    {RULE}\n    y = 2"), "line 9: hyphens outside of a banner"),
    (made("x = 1", "def f():\n    #" + "-" * 20), "line 9: hyphens outside of a banner"),
    (made("x = 1", f"{RULE}\n# C\n{RULE}---"), "line 8: hyphens outside of a banner"),      # rules of two lengths
    (made("x = 1", f"{RULE}\n# C\n\n{RULE}"), "line 8: hyphens outside of a banner"),       # no title between two
    (made("x = 1", f"{RULE}\n#\n{RULE}"), "line 8: hyphens outside of a banner"),
    (made("x = 1", "y = 2").replace("# B", "# A"), "the title 'A' stands twice"),
])
def test_a_banner_of_another_form_is_found(source, finding):
    assert finding in banner_findings(source, 2)


LATER = "def later(): ...\nclass Later: ...\nLATER = 1\nlater_too: int = 2\n(one, *others), three = [1], 3"


@pytest.mark.parametrize("use", [
    "def f():\n    later()", "async def f():\n    later()",
    "def f():\n    def g():\n        return LATER\n    return g",
    "x = lambda: later()", "def f(x=LATER): ...", "def f(*, x=LATER): ...", "x = lambda y=LATER: y",
    "@later\ndef f(): ...", "@later\nclass C: ...", "class C(Later): ...", "class C(metaclass=Later): ...",
    "def f(x: Later): ...", "def f(*x: Later): ...", "def f(**x: Later): ...", "def f(x, /): x: Later = 1",
    "def f() -> Later: ...", "def f() -> list[Later | None]: ...", "def f() -> 'Later': ...",
    "def f(x: list['Later']): ...", "def f(x: 'list[Later]'): ...", "x: Later", "class C:\n    x: Later",
    "class C:\n    x: 'Later | None' = None", "class C:\n    x = LATER",
    "class C:\n    def f(self):\n        return LATER", "def f():\n    LATER.x = 1", "def f():\n    LATER[0] = 1",
    "def f():\n    return [x for x in LATER]", "def f():\n    return {x: LATER for x in ()}",
    "def f():\n    return [x for x in () if LATER]", "def f():\n    return [x for y in () for x in LATER]",
    "def f():\n    try: ...\n    except Later: ...", "def f():\n    match 1:\n        case Later(): ...",
    "def f():\n    match 1:\n        case x if LATER: ...", "def f():\n    return f'{LATER}'",
    "def f():\n    return later_too", "def f():\n    return one, others", "def f():\n    return three",
    "def f():\n    global LATER\n    LATER = LATER + 1", "def f():\n    with later() as x: ...",
    "def f(x): x(later=LATER)",
    # what shadows elsewhere does not shadow here
    "def g(later): ...\ndef f():\n    later()", "class C:\n    LATER = 2\n    def f(self):\n        return LATER",
    "class C:\n    def later(self):\n        return later()",
    "class C:\n    LATER = 2\n    x = [LATER for y in ()]",
    "def f():\n    x = [LATER for LATER in ()]\n    return LATER", "def f(LATER=LATER): ...",
    "def f():\n    return [LATER for LATER in LATER]",
])
def test_a_use_above_the_definition_is_found(use):
    assert [line for line in order_findings(made(use, LATER)) if "is used in 'A', above 'B' that defines it" in line]
    assert order_findings(made(LATER, use)) == []
    assert order_findings(made(use + "\n" + LATER)) == [], "within one section any order will do"
    assert order_findings(textwrap.dedent(use) + "\n" + made(LATER)), "above the first banner"


@pytest.mark.parametrize("use", [
    "def f(later):\n    later()", "def f(*later):\n    later()", "def f(**later):\n    later()",
    "def f(*, later):\n    later()", "def f(later, /):\n    later()", "x = lambda later: later",
    "def f():\n    later = 1\n    return later", "def f(later):\n    def g():\n        return later\n    return g",
    "def f():\n    for later in ():\n        later()", "def f():\n    with x() as later:\n        later()",
    "def f():\n    with x() as (later, y):\n        later()", "def f():\n    (later, *LATER), y = x\n    later(LATER)",
    "def f():\n    try: ...\n    except OSError as later:\n        later()", "def f():\n    import later\n    later.x",
    "def f():\n    import later.x\n    later.x", "def f():\n    from x import y as later\n    later()",
    "def f():\n    def later(): ...\n    later()", "def f():\n    class Later: ...\n    Later()",
    "def f():\n    if (later := 1):\n        later()",
    "def f():\n    if any((later := x) for x in ()):\n        later()",
    "def f():\n    return [later for later in ()]", "def f():\n    return {later: y for later, y in () if later}",
    "def f():\n    return [y for later in () for y in later]", "def f():\n    later: int\n    return later",
    "def f():\n    match 1:\n        case [later, *LATER]:\n            later(LATER)",
    "def f():\n    match 1:\n        case {'x': _, **later}:\n            later()",
    "def f():\n    later = 1\n    def g():\n        nonlocal later\n        later = 2\n    return g",
    "class C:\n    LATER = 1\n    x = LATER", "class C:\n    def f(self):\n        return self.LATER",
    "class C:\n    class Later: ...\n    x: Later", "x.later()", "x(later=1)", "'LATER'", "# LATER",
    "def f(x='LATER'): ...",
    "x: Literal['LATER'] = 'LATER'", "def f(x: typing.Literal['LATER']): ...",
])
def test_a_name_of_a_scope_s_own_is_no_use_of_the_module_s(use):
    assert order_findings(made(use, LATER)) == []


@pytest.mark.parametrize("later", [
    "if x:\n    LATER = 1", "for LATER in (): ...", "import x as LATER", "import LATER.x", "with x() as LATER: ...",
    "try:\n    from x import LATER\nexcept ImportError: ...", "if (LATER := 1): ...", "x = [(LATER := y) for y in ()]",
])
def test_whatever_binds_a_name_at_the_module_s_level_defines_it(later):
    assert len(order_findings(made("def f(): LATER", later))) == 1


def test_a_name_that_is_bound_again_later_was_defined_before():
    assert order_findings(made("x = 1", "def f(): return x", "x = 2")) == []


@pytest.mark.parametrize("source, finding", [
    ("x = 1" + " " * 6 + "# ä", []), ("x = 1" + " " * 7 + "# ä", ["line 1: 15 columns"]),
    ("def f():\n    1\n    2", []), ("def f():\n    1\n    2\n    3", ["line 1: f has 4 lines"]),
    ("def f():\n    def g():\n        1\n        2\n        3", ["line 1: f has 5 lines", "line 2: g has 4 lines"]),
    ("class C:\n  def f(s):\n    1\n    2\n  x = 1\n", []),
    ("class C:\n  def f(s):\n    1\n    2\n  x = 1\n  y = 1\n", ["line 1: C has 6 lines"]),
    ("1\n" * 8, []), ("1\n" * 9, ["the module has 9 lines"]),
])
def test_what_is_too_large_is_found(source, finding):
    assert size_findings(source, 14, 3, 5, 8) == finding


EXAMPLE = 'def f(x):\n    """What.\n\n    >>> f("1")\n    1\n    """\n    return '


@pytest.mark.parametrize("code, finding", [
    (EXAMPLE + "_X.match(x)", []), (EXAMPLE + "re.match('x', x)", []), ("def f(x):\n    return int(x)", []),
    ("def f(x):\n    return _X.match(x)", ["f"]), ("def f(x):\n    '''What.'''\n    return re.match('x', x)", ["f"]),
    ("def f(x):\n    return [y for y in x if _X.match(y)]", ["f"]),
])
def test_a_parser_by_a_regular_expression_without_an_example_is_found(code, finding):
    source = made("_X = re.compile('x')", code).replace("# B\n", "# Parsers: text in\n")
    assert [line.split()[2] for line in unexplained(source, "parsers")] == finding
    assert unexplained(source, "tokens") == []


def test_examples_are_counted_in_functions_and_classes():
    (function,) = ast.parse(EXAMPLE + "x").body
    (class_,) = ast.parse("class C:\n" + textwrap.indent(EXAMPLE + "x", "    ")).body
    assert [examples(function), examples(class_), examples(ast.parse("def f(): ...").body[0])] == [1, 1, 0]


@pytest.mark.parametrize("module, arguments, source", [
    ("ruff", ["check", "--no-cache"], "import os\n"),
    ("mypy", [*MYPY, "--config-file=", "--cache-dir", os.devnull], "def f():\n    return 1 + ''\n"),
])
def test_the_linters_can_find_something(module, arguments, source, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(source)
    monkeypatch.setattr(sys.modules[__name__], "python_files", lambda: [str(tmp_path / "bad.py")])
    with pytest.raises(AssertionError, match=r"bad\.py:\d"):
        check(module, *arguments)
