"""The house rules that a machine can check, read off the source with `ast`.

Each rule is a function of one parsed file that returns its complaints; every complaint says what to do instead.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# One-way imports: a room may import rooms of its own level and below.
LEVELS = (
    ("errors", "hints", "instead", "origin", "progress", "reading", "shipped", "writing", ""),  # "": `engine` itself
    ("kernels",),
    ("schedules",),
    ("config",),
    ("distributed",),
    ("launching", "model"),
    ("precision",),
    ("parallel",),
    ("data", "optim"),
    ("align", "checkpoint", "metrics", "reliability"),
    ("generate", "report", "train"),
    ("rl", "plan", "bench", "corpus_tools"),
    ("checkpoints_tools",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

PACKAGES = ("engine", "checkpoints_tools", "corpus_tools")
OPTIONAL = {"amp_C", "apex", "fasttext", "flash_attn", "fsspec", "gigatoken", "huggingface_hub", "kenlm", "lm_eval",
            "matplotlib", "megatron", "pyarrow", "rensa", "shtab", "tensorboard", "tokenizers", "trafilatura",
            "transformer_engine",
            "transformers", "triton", "wandb", "zstandard"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

# Lines of code that a rank of a training run imports, by room; comments and docstrings, which teach, are free.  (They
# are four lines of ten: a limit on all lines would be met by explaining less.)  Each ceiling is a tenth above what is
# there, or, where the comment says so, has room for what the design still wants in that room.
RANK_CEILINGS = {
    "": 350,              # errors, reading, writing, hints, progress
    "align": 600,         # objectives besides pretraining
    "checkpoint": 1_700,  # formats 1 and 2, resuming, adapters apart, copies on the nodes
    "config": 2_020,      # and the sections of alignment, reliability, roles with their placement, FP8; keys are most
    "data": 2_130,        # corpora, conversations and comparisons, tokenizers of four kinds
    "distributed": 1_000,     # and moving live weights between roles
    "kernels": 1_110,     # and implementations for a GPU of each operation, scores within a cap, rounding by chance
    "metrics": 520,       # and where the time of a run went, over all its starts
    "model": 980,         # and kinds of layers and norms, of all families that convert, copied key-value heads
    "optim": 260,         # and learning-rate shapes, optimizers besides AdamW
    "parallel": 1_650,    # and the loss without the logits, memory on the host, copied heads, weights gathered in FP8
    "precision": 250,     # the products of a layer, FP8
    "reliability": 490,   # and the watchdog, what to do about a bad step, who is slow
    "schedules": 430,
    "train": 1_670,       # and going back before spikes, what a reference says, what all runs share, their account
}
RANK_CEILING = 14_250     # lower than the sum: who needs the whole of a room makes another smaller

Function = ast.FunctionDef | ast.AsyncFunctionDef
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Source:
    """A parsed file under the name it is imported by."""

    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """`engine.data.mixture` -> `data`."""
        parts = self.module.split(".")
        return parts[0] if parts[0] != "engine" else (parts[1] if len(parts) > 1 else "")


@dataclass(frozen=True)
class Import:
    """One imported name and the line it stands on."""

    name: str
    line: int


def _imports(tree: ast.AST) -> Iterator[Import]:
    """Everything imported anywhere below `tree`; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module and not node.level else "." * node.level
            yield from (Import(prefix + alias.name, node.lineno) for alias in node.names)


def _functions(source: Source) -> Iterator[Function]:
    return (node for node in ast.walk(source.tree) if isinstance(node, Function))


def _statements_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Top-level statements that always run: not `if TYPE_CHECKING:`, not `try: … except ImportError:`."""
    return (node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


def needs_optional(source: Source) -> bool:
    """Whether importing the module fails without an optional package."""
    return any(found.name.partition(".")[0] in OPTIONAL
               for statement in _statements_at_import(source.tree) for found in _imports(statement))


def imports_go_one_way(source: Source) -> Iterator[str]:
    for found in _imports(source.tree):
        if found.name.startswith("."):
            yield f"line {found.line}: relative import; write it from `engine.` on"
            continue
        root, _, rest = found.name.partition(".")
        if root == "kernels":
            yield f"line {found.line}: import engine.kernels, never top-level `kernels` (Hugging Face's package)"
        if root not in PACKAGES:
            continue
        room = root if root != "engine" else rest.partition(".")[0]
        room = room if room in LEVEL else ""                  # `from engine import __version__`
        if LEVEL[room] > LEVEL[source.room]:
            yield (f"line {found.line}: `{source.room}` (level {LEVEL[source.room]}) imports `{room}` (level "
                   f"{LEVEL[room]}): move what is needed down, or pass it in as an argument")


def imports_stand_at_the_top(source: Source) -> Iterator[str]:
    if source.module == "engine.cli":
        return
    for function in _functions(source):
        for found in _imports(function):
            root = found.name.partition(".")[0]
            if root not in OPTIONAL and not _leads_to_optional(found.name):
                yield (f"line {found.line}: import of `{found.name}` inside {function.name}(): move it to the top "
                       "(only optional packages may be imported late)")


def _leads_to_optional(name: str) -> bool:
    """Whether `name` is (in) a module of ours that needs an optional package, or torch's tensorboard writer."""
    if name.startswith("torch.utils.tensorboard"):
        return True
    return any(module in SOURCES and needs_optional(SOURCES[module]) for module in (name, name.rpartition(".")[0]))


def core_needs_no_extras(source: Source) -> Iterator[str]:
    for statement in _statements_at_import(source.tree):
        for found in _imports(statement):
            if found.name.partition(".")[0] in PACKAGES and _leads_to_optional(found.name) \
                    and not needs_optional(source):
                yield (f"line {found.line}: `{found.name}` needs an optional package: import it in the function that "
                       "uses it")


def no_globals(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: `global {', '.join(node.names)}`: keep state in an object and pass it"


def environment_is_read_in_one_place(source: Source) -> Iterator[str]:
    if source.room == "distributed":
        return
    for node in ast.walk(source.tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        from_os = isinstance(node, ast.ImportFrom) and node.module == "os" and \
            any(alias.name in ("environ", "getenv") for alias in node.names)
        if name in ("os.environ", "os.getenv", "os.putenv") or from_os:
            line = getattr(node, "lineno", 0)
            yield f"line {line}: reads the environment: do it in engine/distributed/environment.py"


def everything_is_annotated(source: Source) -> Iterator[str]:
    tree = source.tree
    methods = {id(item) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body
               if isinstance(item, Function)
               and not any(ast.unparse(decorator) == "staticmethod" for decorator in item.decorator_list)}
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        a = function.args
        positional = [*a.posonlyargs, *a.args][id(function) in methods:]
        missing = [arg.arg for arg in (*positional, *a.kwonlyargs, a.vararg, a.kwarg) if arg and arg.annotation is None]
        if missing or function.returns is None:
            what = ", ".join([*missing, *(["the result"] if function.returns is None else [])])
            yield f"line {function.lineno}: annotate {what} of {function.name}()"


def sizes_stay_readable(source: Source) -> Iterator[str]:
    if (lines := source.text.count("\n")) > MAX_FILE_LINES:
        yield f"{lines} lines (at most {MAX_FILE_LINES}): split the file by what its parts teach"
    for function in _functions(source):
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES:
            yield (f"line {function.lineno}: {function.name}() has {length} lines (at most {MAX_FUNCTION_LINES}): name "
                   "its steps and make them functions")


def nothing_private_of_torch_at_import(source: Source) -> Iterator[str]:
    """An operator or a private name that is bound at import fails every command on a torch without it."""
    bound = list(source.tree.body)
    while bound:
        node = bound.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        bound += ast.iter_child_nodes(node)
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        names = [found.name for found in _imports(node)] if isinstance(node, ast.Import | ast.ImportFrom) else [name]
        for each in names:
            if re.match(r"(torch|dist)\b.*\._[a-z]|torch\.ops\b", each):
                yield f"line {node.lineno}: binds `{each}` at import: look it up in a probe (kernels/operation.py)"


def errors_have_a_section(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | Function) else None
        if found := re.search(r"\bRaises\s+([A-Z]\w+)", text or ""):
            yield f"line {node.body[0].lineno}: give {found[1]} a line of a `Raises:` section"


RULES: tuple[Callable[[Source], Iterator[str]], ...] = (
    imports_go_one_way, imports_stand_at_the_top, core_needs_no_extras, no_globals, environment_is_read_in_one_place,
    everything_is_annotated, sizes_stay_readable, nothing_private_of_torch_at_import, errors_have_a_section)


def _sources() -> dict[str, Source]:
    """Every product file by module name; `kernels/x.py` is `engine.kernels.x`."""
    found = {}
    for folder, prefix in (*((package, "") for package in PACKAGES), ("kernels", "engine.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[module] = Source(module, path.read_text(encoding="utf-8"))
    return found


SOURCES = _sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    complaints = [f"{source.module}, {complaint}" for source in SOURCES.values() for complaint in rule(source)]
    assert not complaints, "\n" + "\n".join(complaints)


def lines_of_code(source: Source) -> int:
    """Lines with something to execute or declare on them: no comments, docstrings and empty lines."""
    taught = {number for node in ast.walk(source.tree)
              if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None
              for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    written = {number for token in tokens if token.type not in NO_CODE
               for number in range(token.start[0], token.end[0] + 1)}
    return len(written - taught)


def _arrows(source: Source) -> set[str]:
    """Modules of ours that a module imports, and the packages that they lie in."""
    named = {module for found in _imports(source.tree) for module in (found.name, found.name.rpartition(".")[0])}
    return {module for name in named if name in SOURCES
            for module in (".".join(name.split(".")[:depth + 1]) for depth in range(name.count(".") + 1))
            if module in SOURCES}


def imported_by(module: str) -> set[str]:
    """All modules of ours that importing `module` brings in."""
    found, to_see = {module}, [module]
    while to_see:
        new = _arrows(SOURCES[to_see.pop()]) - found
        found |= new
        to_see += new
    return found


def test_what_a_rank_imports_stays_small() -> None:
    """Whoever reads how a step works reads these files."""
    sizes: Counter[str] = Counter()
    for module in imported_by("engine.train.rank"):
        room = SOURCES[module].room
        sizes[room if LEVEL[room] else ""] += lines_of_code(SOURCES[module])
    over = {room: (size, RANK_CEILINGS.get(room, 0)) for room, size in sizes.items()
            if size > RANK_CEILINGS.get(room, 0)}
    assert not over, f"(lines of code, ceiling) of rooms: {over}.  Does a rank need all of it?  Can it be said in less?"
    assert sizes.total() <= RANK_CEILING, f"{sizes.total():,} lines of code, at most {RANK_CEILING:,}: {sizes}"


def test_lines_of_code_are_counted_without_what_teaches() -> None:
    text = ('"""Two\nlines."""\n\n# why\nA = (1,\n     2)   # both\n\n\n'
            'def f() -> str:\n    """One."""\n    return """x\ny"""\n')
    assert lines_of_code(Source("engine.model.x", text)) == 5


def test_the_walk_over_imports_goes_all_the_way() -> None:
    found = imported_by("engine.train.rank")
    assert {"engine.distributed.ledger", "engine.kernels.rope", "engine.kernels", "engine", "engine.errors"} <= found
    assert not {"engine.cli", "engine.generate.evaluate", "corpus_tools.prepare"} & found


def test_every_room_has_a_level() -> None:
    rooms = {source.room for source in SOURCES.values()}
    assert rooms <= LEVEL.keys(), f"give these rooms a level in LEVELS: {sorted(rooms - LEVEL.keys())}"


def test_rooms_of_one_level_do_not_import_each_other_in_circles() -> None:
    arrows = {(source.room, found.name.split(".")[1]) for source in SOURCES.values() for found in _imports(source.tree)
              if found.name.startswith("engine.")}
    circles = sorted((a, b) for a, b in arrows if a < b and (b, a) in arrows)
    assert not circles, f"these rooms import each other: {circles}; move what both need down"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Names that only a type checker reads count as well: a circle hidden from the interpreter is one."""
    arrows = {name: {module for found in _imports(source.tree) for module in (found.name, found.name.rpartition(".")[0])
                     if module in SOURCES and module != name} for name, source in SOURCES.items()}
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"import circle {' -> '.join(error.args[1])}: move what both ends need into a module below them")


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_imports_lead_somewhere(folder: str) -> None:
    """What no other check looks into: a file that moved must not leave a test or a benchmark behind."""
    written = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / folder).rglob("*.py"))}
    complaints = [f"{path.relative_to(ROOT)}, line {found.line}: there is no {found.name}"
                  for path, tree in written.items() for found in _imports(tree) if not _exists(found.name)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_tests_stay_readable() -> None:
    sizes = {path.relative_to(ROOT): path.read_text(encoding="utf-8").count("\n")
             for path in (ROOT / "tests").rglob("*.py")}
    long = {str(path): lines for path, lines in sizes.items() if lines > MAX_FILE_LINES}
    assert not long, f"split by what is tested (at most {MAX_FILE_LINES} lines): {long}"


def _exists(name: str) -> bool:
    """Whether `name` is a module, or in one; true of what is not ours."""
    if name.partition(".")[0] == "tests":
        path = ROOT / name.replace(".", "/")
        return any(found.with_suffix(".py").is_file() for found in (path, path.parent))
    return name.partition(".")[0] not in PACKAGES or name in SOURCES or name.rpartition(".")[0] in SOURCES


def test_kernels_is_no_top_level_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), \
        "delete kernels/__init__.py: a package named `kernels` breaks `import transformers`"


@pytest.mark.parametrize(("rule", "module", "text"), [
    (imports_go_one_way, "engine.model.x", "from engine.train import loop"),
    (imports_go_one_way, "engine.model.x", "import engine.parallel.tensor"),
    (imports_go_one_way, "engine.model.x", "from . import y"),
    (imports_go_one_way, "engine.model.x", "import kernels.rope"),
    (imports_stand_at_the_top, "engine.model.x", "def f() -> None:\n    import json"),
    (no_globals, "engine.model.x", "def f() -> None:\n    global a\n    a = 1"),
    (environment_is_read_in_one_place, "engine.model.x", "import os\nos.environ['A']"),
    (nothing_private_of_torch_at_import, "engine.model.x", "import torch\nA = torch.ops.aten.silu"),
    (nothing_private_of_torch_at_import, "engine.model.x", "class A:\n    f = torch._foreach_add"),
    (nothing_private_of_torch_at_import, "engine.model.x", "from torch._C import _nn"),
    (environment_is_read_in_one_place, "engine.model.x", "from os import getenv"),
    (everything_is_annotated, "engine.model.x", "def f(a: int): return a"),
    (everything_is_annotated, "engine.model.x", "class A:\n    def f(self, *rest) -> None: ..."),
    (errors_have_a_section, "corpus_tools.x", 'def f() -> None:\n    """This.  Raises\n    DataError where not."""'),
    (sizes_stay_readable, "engine.model.x", "a = 1\n" * 401),
    (sizes_stay_readable, "engine.model.x", "def f() -> None:\n" + "    a = 1\n" * 80),
])
def test_rules_complain(rule: Callable[[Source], Iterator[str]], module: str, text: str) -> None:
    assert list(rule(Source(module, text)))


@pytest.mark.parametrize(("rule", "module", "text"), [
    (imports_go_one_way, "engine.train.x", "import torch\nfrom engine import __version__\nfrom engine.model import y"),
    (imports_stand_at_the_top, "engine.data.x", "def f() -> None:\n    import pyarrow.parquet"),
    (environment_is_read_in_one_place, "engine.distributed.x", "import os\nos.environ['A']"),
    (everything_is_annotated, "engine.model.x", "class A:\n    def f(self, a: int) -> None: ..."),
])
def test_rules_allow(rule: Callable[[Source], Iterator[str]], module: str, text: str) -> None:
    assert not list(rule(Source(module, text)))
