"""No pickle is read anywhere in the package, nothing is evaluated, and processes are started in one place only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tessella

FILES = sorted(Path(tessella.__file__).parent.rglob("*.py"))

PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}
PICKLING |= {"torch.distributed.checkpoint", "torch.package", "pandas"}
ERROR_NAMES = {("pickle", "UnpicklingError")}  # to tell what torch's own reader says
PROCESSES = {"subprocess", "multiprocessing", "pty", "os.system", "os.popen"}
STARTS_PROCESSES = {"data/isolated.py"}  # the scan's decoder: fixed words, bytes in, JSON out
EVALUATING = {"eval", "exec", "compile", "__import__"}
UNSAFE_ENDINGS = {  # call -> the keyword that must be given, with this value
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
}
FORBIDDEN_CALLS = {
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "np.frombuffer_object",
    "torch.jit.load",
    "torch.hub.load",
}
LOADERS = {("tessella/text.py", "yaml.load")}  # with a loader that is asserted to be a safe one


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Modules, and the names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def faults(tree: ast.AST, name: str) -> Iterator[str]:
    for module, taken in imports(tree):
        if (module.partition(".")[0] in PICKLING or module in PICKLING) and (module, taken) not in ERROR_NAMES:
            yield f"imports {module}"
        if f"{module}.{taken}" in PICKLING:
            yield f"imports {module}.{taken}"
        if module.partition(".")[0] in PROCESSES and name not in STARTS_PROCESSES:
            yield f"imports {module}"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = dotted(call.func)
        keywords = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if function in UNSAFE_ENDINGS:
            keyword, value = UNSAFE_ENDINGS[function]
            if keywords.get(keyword, ...) is not value:
                yield f"calls {function} without {keyword}={value}"
        if function in FORBIDDEN_CALLS or function in EVALUATING or function in PROCESSES:
            yield f"calls {function}"
        if function == "yaml.load" and (f"tessella/{name}", function) not in LOADERS:
            yield "calls yaml.load: use text.plain_yaml"
        if function.startswith(("os.exec", "os.spawn", "os.posix_spawn", "os.fork")):
            yield f"calls {function}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_a_file_of_the_package_unpickles_evaluates_and_starts_nothing(file: Path):
    name = file.relative_to(Path(tessella.__file__).parent).as_posix()
    assert list(faults(ast.parse(file.read_text(encoding="utf-8")), name)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib", "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint", "import torch\ntorch.load(x)", "torch.load(x, weights_only=False)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "yaml.load(x)", "yaml.unsafe_load(x)", "eval(x)", "exec(x)",
        "import subprocess", "import os\nos.system(x)", "os.execv(x, y)", "from multiprocessing import Pool",
        "os.popen(x)", "torch.hub.load(x, y)", "__import__(x)",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(code):
    assert list(faults(ast.parse(code), "x.py"))


def test_there_are_files_to_look_at():
    assert len(FILES) > 60
