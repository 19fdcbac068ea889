"""The library's test classes, from the folder that the environment variable `TRANSFORMERS_TESTS` names.

It names an unpacked source distribution of transformers (`.ci/transformers_tests` fetches one and prints its folder),
or a checkout. A source distribution holds the files `tests/test_*.py` alone. What these import from elsewhere is
replaced here by nothing, or by its like; a checkout has it all, and its tests of generation and export run too.
"""

import importlib.util
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TRANSFORMERS_TESTS"
PACKAGE = "transformers_tests"
FOLDER = os.environ.get(VARIABLE, "")
HOW_TO = (
    f"The library's tests are not here: {VARIABLE} is {FOLDER!r}, expected a folder that holds "
    "tests/test_modeling_common.py. Fetch them and run again: "
    f"`{VARIABLE}=$(.ci/transformers_tests) python -m pytest -m hf_common`."
)


class Missing:
    """Stands for a test class that could not be had; `conftest.py` lets it fail and say how to get it."""

    def test_the_library_tests_are_here(self) -> None:
        """Give the class a test to fail."""


class NoGenerationTests:
    """Stands for `GenerationTesterMixin`, which no source distribution has."""


class NoExportTests:
    """Stands for `ExportTesterMixin`, which no source distribution has."""


# The fields that `ConfigTester` asks of every config, each with a value other than its default.
COMMON_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


def _put(name: str, **members: Any) -> None:
    """Make a module of these members importable under a name, and the packages above it."""
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    parent = name.rpartition(".")[0]
    if parent not in ("", PACKAGE) and parent not in sys.modules:
        _put(parent, __path__=[])


def _open_package(tests: Path) -> None:
    """Make the folder a package of another name than ours, `tests`, and fill the gaps of a source distribution."""
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for name, members in (
        ("exporters.test_export", {"ExportTesterMixin": NoExportTests}),
        ("generation.test_utils", {"GenerationTesterMixin": NoGenerationTests}),
        ("utils.test_configuration_utils", {"config_common_kwargs": COMMON_FIELDS}),
    ):
        if not (tests / f"{name.replace('.', '/')}.py").is_file():
            _put(f"{PACKAGE}.{name}", **members)
    if not (tests.parent / "utils" / "fetch_hub_objects_for_ci.py").is_file():
        _put("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)


def _load(name: str, *members: str) -> list[Any]:
    if not HAS_TESTS:
        return [Missing for _ in members]
    module = importlib.import_module(f"{PACKAGE}.{name}")
    return [getattr(module, member) for member in members]


HAS_TESTS = bool(FOLDER) and (Path(FOLDER) / "tests" / "test_modeling_common.py").is_file()
if HAS_TESTS:
    _open_package(Path(FOLDER) / "tests")

ModelTesterMixin, GenerationTesterMixin = _load("test_modeling_common", "ModelTesterMixin", "GenerationTesterMixin")
(ProcessorTesterMixin,) = _load("test_processing_common", "ProcessorTesterMixin")
(ConfigTester,) = _load("test_configuration_common", "ConfigTester")
TestCase = unittest.TestCase
