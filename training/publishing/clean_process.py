"""Load a Hub folder in a process that has nothing but transformers, and compare it with what its writer
computed, under a guard that ends the process at the first connection, pickle, child process or foreign write.

`training.publish` runs this file by its path, isolated (`python -I`), and hands it a reference file. Only the
standard library, torch, transformers and safetensors may be imported here.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NEW_TOKENS = 6
HIDDEN_PACKAGES = ("modeling_memory", "training", "tests")


class HidingFinder(MetaPathFinder):
    """Makes this repository's packages impossible to import, even where an editable install offers them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse the hidden top-level names; leave everything else to the other finders."""
        if fullname.partition(".")[0] in HIDDEN_PACKAGES:
            raise ModuleNotFoundError(f"{fullname} is hidden: the Hub folder has to load without it", name=fullname)
        return None


class Guard:
    """An audit hook: what the loaded code does that a model has no reason to do ends in an error.

    The library copies a repository's code into its modules cache, and Python compiles it there; nothing else may be
    written. A hook cannot be taken off again, so it is armed once everything but the folder's code is imported.

    Args:
        writable (`Sequence[Path]`): Folders where writing is the library's business.
    """

    FORBIDDEN = ("socket.", "pickle.find_class", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
    WRITING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
               "shutil.rmtree", "shutil.move")  # fmt: skip

    def __init__(self, writable: Sequence[Path]) -> None:
        self.writable = [str(folder.resolve()) + os.sep for folder in writable]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at one event of the interpreter."""
        if event.startswith(self.FORBIDDEN):
            # Asking for this machine's own name opens no connection.
            if event != "socket.gethostname" and event != "socket.__new__":
                self.refuse(event, arguments)
        elif event == "open":
            path, mode, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and _writes(mode, flags):
                self.check(event, path)
        elif event in self.WRITING:
            self.check(event, arguments[0])

    def check(self, event: str, path: Any) -> None:
        """Refuse to write anywhere but in the library's own places."""
        place = os.path.abspath(os.fsdecode(path))
        if place != os.devnull and not f"{place}{os.sep}".startswith(tuple(self.writable)):
            self.refuse(event, (place,))

    @staticmethod
    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        """Raise, with the event and what it was about."""
        raise PermissionError(f"loading must not do this: {event} {', '.join(map(repr, arguments[:2]))}")


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else False


def compute(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is compared bit for bit: logits, and what the model writes greedily or reconstructs."""
    with torch.no_grad():
        outputs = {"logits": model(**inputs).logits}
        if model.config.model_type == "memory_autoencoder":
            outputs["reconstructed"] = model.reconstruct(**inputs)
        elif getattr(model.config, "causal", True):
            outputs["generated"] = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


def group(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Undo the flattening of names in the reference file.

    >>> sorted(group({"inputs/plain/input_ids": torch.ones(1), "inputs/plain/attention_mask": torch.ones(1)}))
    ['inputs/plain']
    """
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        folder, _, key = name.rpartition("/")
        grouped.setdefault(folder, {})[key] = tensor
    return grouped


def main(source: str, reference: Path, packages: Path, bases: Mapping[str, str]) -> dict[str, Any]:
    """Load `source` through every Auto class and compare it with the reference.

    Args:
        source (`str`): A folder, or a repository in the offline cache.
        reference (`Path`): Tensors from the writer, with settings in the metadata.
        packages (`Path`): The repository whose packages must stay out of reach.
        bases (`Mapping[str, str]`): Of a source by reference, `encoder_base` and `decoder_base` as folders.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != packages.resolve()]
    sys.meta_path.insert(0, HidingFinder())
    import transformers
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    with safe_open(reference, framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
        expected = group({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    torch.set_num_threads(settings["threads"])
    trusted: dict[str, Any] = {"trust_remote_code": True}
    libraries = {Path(transformers.__file__).parents[1], Path(torch.__file__).parents[1], Path(os.__file__).parent}
    before = set(sys.modules)
    sys.addaudithook(Guard([Path(os.environ["HF_HOME"]), Path(os.environ["HF_MODULES_CACHE"])]))

    config = AutoConfig.from_pretrained(source, **trusted)
    loading = {**trusted, "attn_implementation": settings["attn_implementation"], "output_loading_info": True, **bases}
    body, body_report = AutoModel.from_pretrained(source, **loading)
    loaded = {"AutoConfig": config, "AutoModel": body}
    model, report = body, body_report
    if settings["causal_lm"]:
        model, report = AutoModelForCausalLM.from_pretrained(source, **loading)
        loaded["AutoModelForCausalLM"] = model
    check(not body_report["missing_keys"], f"AutoModel misses {body_report['missing_keys']}")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not report[kind], f"{kind}: {report[kind]}")
    check_equal_weights(body, model)
    if settings["processor"] is not None:
        loaded["AutoProcessor"] = processor = AutoProcessor.from_pretrained(source, **trusted)
        batch = dict(processor(**settings["processor"], return_tensors="pt"))
        compare("the processor's", batch, expected["inputs/processor"])
    for name, item in loaded.items():
        where = type(item).__module__
        home = "transformers_modules." if settings["remote_code"] else "transformers."
        check(where.startswith(home), f"{name} came from {where}, not from {home.rstrip('.')}")
    if settings["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(source, **trusted)
        batch = {"input_ids": tokenizer(settings["text"], return_tensors="pt")["input_ids"]}
        compare("the tokenizer's", batch, expected["tokenizer"])
    cases = [folder.partition("/")[2] for folder in expected if folder.startswith("inputs/")]
    for case in cases:
        outputs = compute(model, expected[f"inputs/{case}"])
        compare(f"the model's ({case})", outputs, expected[f"outputs/{case}"])
    check_origins(set(sys.modules) - before, [*libraries, Path(os.environ["HF_MODULES_CACHE"])])
    return {
        "module": type(model).__module__,
        "transformers": transformers.__version__,
        "loaded": sorted(loaded) + ["AutoTokenizer"] * (settings["text"] is not None),
        "cases": cases,
    }


def check_origins(names: Sequence[str] | set[str], places: Sequence[Path]) -> None:
    """Stop unless every module that was imported while loading is the library's, Python's or the folder's."""
    roots = tuple(str(place.resolve()) + os.sep for place in places)
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            check(os.path.realpath(file).startswith(roots), f"{name} was imported from {file}")


def check(truth: bool, message: str) -> None:
    """Stop with a message unless something holds."""
    if not truth:
        raise SystemExit(f"verification failed: {message}")


def compare(what: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Stop unless two groups of tensors are equal bit for bit."""
    check(set(found) == set(expected), f"{what} outputs are {sorted(found)}, expected {sorted(expected)}")
    for name, tensor in expected.items():
        same = found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        check(same and torch.equal(found[name], tensor), f"{what} {name} differ from those of the writer")


def check_equal_weights(body: Any, model: Any) -> None:
    """Stop unless what both Auto classes load are the same weights, under the same names but for the prefix."""
    weights = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    for name, tensor in body.state_dict().items():
        other = weights.get(name, weights.get(prefix + name))
        check(other is not None and torch.equal(tensor, other), f"{name} differs between the Auto classes")


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))))
