"""Counts what makes this code base easy or hard to read, and prints one table.

    python -m benchmarks.house

One forward of plain text with three windows is followed through the package (its own functions, comprehensions aside);
the rest is counted in the files that git tracks.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from modeling_memory import MemoryEncoderDecoderForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "modeling_memory"


def tiny_model() -> MemoryEncoderDecoderForCausalLM:
    """Return a model of two small Llamas: chunks of 8 tokens, windows of 16."""
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder, decoder = LlamaConfig(vocab_size=256, **fields), LlamaConfig(vocab_size=256, **fields)
    return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(
        LlamaModel(encoder), LlamaForCausalLM(decoder), chunk_length=8, window_length=16, memory_token_id=256
    )


def path_of(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """Return file and name of every function of the package that a call enters, in order."""
    path: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            path.append((Path(code.co_filename).name, code.co_name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return path


class Looks(TorchDispatchMode):
    """Names the operations that make the host wait for a number of the device: on a CPU, too, where nothing waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operation, and run it."""
        name = func.__name__
        waits = name.startswith(("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "equal"))
        if name.startswith(("index.", "index_put")):
            waits = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        self.found += [name] if waits else []
        return func(*args, **(kwargs or {}))


def looks_of(call: Callable[[], Any]) -> list[str]:
    """Return what a call waits for; a list read from a tensor is one look, too."""
    to_list: Any = torch.Tensor.tolist
    with torch.no_grad(), Looks() as looks:

        def noted(tensor: torch.Tensor) -> Any:
            looks.found.append("tolist")
            return to_list(tensor)

        torch.Tensor.tolist = noted
        try:
            call()
        finally:
            torch.Tensor.tolist = to_list
    return looks.found


def tracked(pattern: str) -> list[Path]:
    """Return the files that git tracks, links and copies in `model_cards/` aside."""
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and "model_cards" not in path.parts]


def lines_of(paths: list[Path]) -> int:
    """Return the lines of some files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity of a function as ruff's C901 counts it, that of inner functions included."""
    number = 1
    for node in ast.walk(function):
        if isinstance(node, ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler):
            number += 1
        if isinstance(node, ast.For | ast.AsyncFor | ast.While | ast.Try):
            number += bool(node.orelse)
        if isinstance(node, ast.match_case):
            number += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node is not function:
            number += 1
    return number


def body_lines(function: ast.FunctionDef) -> int:
    """Return the lines of a body, without signature and docstring: a list of keywords is no step to read."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def large_functions(paths: list[Path]) -> list[str]:
    """Name the functions whose bodies have more than 60 lines, or a complexity above 15."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (body_lines(node) > 60 or complexity(node) > 15):
                found.append(f"{path.name}:{node.name}")
    return found


def comments_per_thousand(paths: list[Path]) -> float:
    """Return comments in 1,000 lines, those for tools aside."""
    number = 0
    for path in paths:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:")):
                number += 1
    return 1000 * number / max(1, lines_of(paths))


def decoder_sites(paths: list[Path]) -> list[str]:
    """Name the functions that call the decoder, its body, or a name bound to one of them."""
    found = []
    for path in paths:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                found += [f"{path.name}:{function.name}"] * _decoder_calls(function)
    return found


def _decoder_calls(function: ast.FunctionDef) -> int:
    bodies = ("self.decoder", "self.decoder.base_model", "model.decoder", "model.decoder.base_model")
    bound = set(bodies)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            values = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
            if any(ast.unparse(value) in bodies for value in values):
                bound |= {ast.unparse(target) for target in node.targets}
    return sum(isinstance(node, ast.Call) and ast.unparse(node.func) in bound for node in ast.walk(function))


def own_methods(model_class: type) -> tuple[int, list[str]]:
    """Return how many methods the package gives a model, and the mixins among its classes."""
    own = [base for base in model_class.__mro__ if base.__module__.startswith("modeling_memory")]
    names = {
        name
        for base in own
        for name, value in vars(base).items()
        if callable(value) or isinstance(value, (classmethod, staticmethod, property))
    }
    return len(names), [base.__name__ for base in own if base.__name__.endswith("Mixin")]


def main() -> None:
    """Count, and print the table."""
    model, ids = tiny_model(), torch.randint(5, 256, (1, 48))
    model(ids)  # what is done once is not counted
    path = path_of(lambda: model(ids))
    cache = model(ids[:, :40], use_cache=True).past_key_values
    step = len(looks_of(lambda: model(ids[:, 40:41], past_key_values=cache)))
    forward = len(looks_of(lambda: model(ids[:, :16])))
    windows = len(looks_of(lambda: model(ids, attention_mask=torch.ones_like(ids))))
    package, python = tracked("modeling_memory/*.py"), tracked("*.py")
    tests = [path for path in python if "tests" in path.parts]
    large, large_tests = large_functions([path for path in python if path not in tests]), large_functions(tests)
    sites = decoder_sites([PACKAGE / "modeling_memory.py"])
    number, mixins = own_methods(MemoryEncoderDecoderForCausalLM)
    switches = sum(one[0] != other[0] for one, other in zip(path, path[1:], strict=False))
    rows: list[tuple[str, Any, str]] = [
        ("own calls in one forward of three windows", len(path), "25"),
        ("files of these", len({name for name, _ in path}), "6"),
        ("switches of file", switches, "12"),
        ("sites that call the decoder", len(sites), "1"),
        ("own methods on the model", number, "35"),
        ("mixins beside the library's", ", ".join(mixins) or "none", "1"),
        ("functions whose body is over 60 lines or of complexity over 15", len(large), "0"),
        ("the same in tests", len(large_tests), "0"),
        ("lines of Python", lines_of(python), "36,000"),
        ("comments in 1,000 lines of the package", round(comments_per_thousand(package), 1), "at least 40"),
        ("lines of the README", lines_of(tracked("README.md")), "130"),
        ("looks at the device: one cached step", step, "0"),
        ("looks at the device: one window", forward, "1"),
        ("looks at the device: three windows with a mask", windows, "1"),
    ]
    width = max(len(name) for name, _, _ in rows)
    for name, value, goal in rows:
        print(f"{name:<{width}}  {value!s:>24}  {goal:>11}")
    if large:
        print("\nlarge functions: " + ", ".join(large))
    if large_tests:
        print("\nlarge tests: " + ", ".join(large_tests))


if __name__ == "__main__":
    main()
