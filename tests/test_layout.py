"""The package's names and the direction of its imports."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arabic_qwen import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "arabic_qwen"

# A room imports from those below it.
ROOMS = [
    {"arabic_qwen"},  # the version
    {"redaction"},
    {"errors"},
    {"files", "terminal", "packing"},
    {"text"},
    {"config"},
    {"data"},
    {"models"},
    {"methods"},
    {"audit"},
    {"memory"},
    {"runs"},
    {"generation"},
    {"engine"},
    {"training"},
    {"plan"},
    {"commands"},
    {"__main__"},
]

SAME_OBJECTS = """
import sys
from pathlib import Path

source = Path(sys.argv[1]) / "src"
sys.path[:] = [entry for entry in sys.path if Path(entry) != source]  # as if the package were not installed

from src.training.base_trainer import BaseTrainer
from src.config import SFTConfig
import src.config
import src.config.base
import src.training.base_trainer

import arabic_qwen.config
import arabic_qwen.training.base_trainer

assert src.config is arabic_qwen.config
assert src.config.base is arabic_qwen.config.base
assert src.training.base_trainer is arabic_qwen.training.base_trainer
assert BaseTrainer is arabic_qwen.training.base_trainer.BaseTrainer
assert SFTConfig is arabic_qwen.config.SFTConfig
assert arabic_qwen.config.__spec__.name == "arabic_qwen.config"
assert arabic_qwen.config.__name__ == "arabic_qwen.config"
assert Path(arabic_qwen.__file__).parent == source / "arabic_qwen"
print("same")
"""


@pytest.mark.parametrize("place", ["repository root", "elsewhere"])
def test_src_is_an_alias_of_the_package(place, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if place == "elsewhere":
        environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-c", SAME_OBJECTS, str(ROOT)],
        cwd=ROOT if place == "repository root" else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == "same\n", run.stderr


def test_unknown_module_of_the_alias_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"arabic_qwen\.no_such_module"):
        __import__("src.no_such_module")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    """The top-level package that a file belongs to: config, data, …, or errors for errors.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "arabic_qwen" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, those inside functions too, but not those for type checkers."""
    parents = ["arabic_qwen", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "arabic_qwen":
                yield from (f"arabic_qwen.{alias.name}" for alias in node.names)
            else:
                yield module


def own_imports(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(path)]
    return {name[1] if len(name) > 1 else "arabic_qwen" for name in names if name[0] == "arabic_qwen"} - {"__version__"}


def floor(room: str) -> int:
    found = [number for number, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"{room} has no place in ROOMS; decide what may import it"
    return found[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = package_of(path)
    wrong = {name for name in own_imports(path) - {own} if floor(name) >= floor(own)}
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_losses_import_only_torch():
    for path in [
        *(PACKAGE / "methods").glob("*/loss.py"),
        *(PACKAGE / "methods" / name for name in ("margins.py", "objective.py")),
    ]:
        third_party = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert third_party <= {"torch", "arabic_qwen"}, path
        assert own_imports(path) <= {"methods"}, path


FIRST = """
import sys
{first}
from arabic_qwen.config import METHOD_CONFIGS, DPOConfig
from arabic_qwen.methods.dpo import DPOConfig as same

assert DPOConfig is same is METHOD_CONFIGS["dpo"]
assert not {{"torch", "transformers"}} & set(sys.modules)
print("same")
"""


@pytest.mark.parametrize("first", ["import arabic_qwen.config", "import arabic_qwen.methods.dpo"])
def test_settings_and_methods_import_in_either_order_without_torch(first):
    run = subprocess.run([sys.executable, "-c", FIRST.format(first=first)], capture_output=True, text=True, timeout=120)
    assert run.stdout == "same\n", run.stderr


def test_text_imports_no_torch():
    for path in (PACKAGE / "text").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}, path
        assert own_imports(path) <= {"text", "errors"}, path


def test_exceptions_form_the_documented_hierarchy():
    for error in (errors.ModelLoadError, errors.DatasetError, errors.ConfigurationError):
        assert issubclass(error, errors.TrainingError)
    assert issubclass(errors.ConfigurationError, ValueError)
    assert not issubclass(errors.DatasetError, ValueError)
    assert issubclass(errors.TrainingError, Exception)
