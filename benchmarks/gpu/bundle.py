"""What travels to the machine with the GPU: text as tokens, the decoder's package, first weights; in calls that fit.

```bash
python -m benchmarks.gpu.bundle --train 'CORPORA/wikipedia_train-*.parquet' --validation CORPORA/books_test.parquet
```

It fills the folder `runs/gpu_bundle`, which git ignores, with one folder a call: pieces of all files, none larger than
what one call may bring beside the code. Nothing is trained here and nothing is fetched: the packages are those that
are installed. The code travels as a branch without the files that only a checkout needs. The commands are printed.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
from transformers import AutoTokenizer

from benchmarks.gpu.parts import PARTS
from training.command_line import Parser, run_command, whole_number
from training.data.making import make_questions, save_questions
from training.data.sources import take_bytes
from training.data.texts import check_splits, load_texts, tokenise_documents
from training.data.tokenizer import complete_tokenizer, train_tokenizer
from training.places import REPOSITORY
from training.recipes.recipe import PretrainedRecipe, find_recipe, resolve_files
from training.recipes.strict_yaml import parse_yaml
from training.records.record import describe_code, read_json, write_json
from training.train.checkpoints import replace_folder

FOLDER = "runs/gpu_bundle"
BRANCH = "gpu-travel"
MANIFEST = "manifest.json"
CALL_BYTES = 58 * 2**20  # 64 MiB a call, less the code
# Of a checkout, what no part of the benchmark reads.
LEFT_BEHIND = (
    "docs",
    "model_cards",
    "tests/saved",
    "tests/hf_common",
    "training/corpora",
    "benchmarks/results",
)


def squeeze(tokens: torch.Tensor) -> bytes:
    """Write token ids below 65,536 as two bytes each, compressed (zstd)."""
    if len(tokens) and int(tokens.max()) >= 2**16:
        raise ValueError(f"a token is {int(tokens.max())}; expected ids below 65536, two bytes each")
    content = tokens.to(torch.uint16).numpy().astype("<u2").tobytes()
    codec = pyarrow.Codec("zstd", compression_level=12)
    return len(content).to_bytes(8, "little") + codec.compress(content, asbytes=True)


def read_tokens(payload: Path, name: str) -> torch.Tensor:
    """Read a stream of tokens that travelled, `(num_tokens,)`, as int32: `squeeze` the other way round."""
    content = (payload / f"{name}.u16.zst").read_bytes()
    size = int.from_bytes(content[:8], "little")
    plain = pyarrow.Codec("zstd").decompress(content[8:], decompressed_size=size, asbytes=True)
    return torch.frombuffer(bytearray(plain), dtype=torch.uint16).to(torch.int32)


def tar_of(files: Iterator[tuple[Path, str]]) -> bytes:
    """Put files under the names given into one archive, without owners and times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file, name in sorted(files, key=lambda one: one[1]):
            info = tarfile.TarInfo(name)
            info.size = file.stat().st_size
            with file.open("rb") as stream:
                archive.addfile(info, stream)
    return buffer.getvalue()


def package_files(modules: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files of installed packages, and of what `pip` knows of them, with their places beside each other."""
    owners = importlib.metadata.packages_distributions()
    for module in modules:
        found = importlib.metadata.distribution(owners[module][0])
        place = Path(str(found.locate_file("")))
        told = place.glob(f"{found.name.replace('-', '_')}-*.dist-info/**/*")
        for file in [*(place / module).rglob("*"), *told]:
            if file.is_file() and file.suffix != ".pyc":
                yield file, file.relative_to(place).as_posix()


def text_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Read both splits and check that they share nothing."""
    texts = {
        split: load_texts(resolve_files(getattr(options, split), f"--{split}")) for split in ("train", "validation")
    }
    check_splits(texts["train"], texts["validation"], [])
    for documents in texts.values():  # whatever is left out then is so of every source
        random.Random(0).shuffle(documents)
    return texts


def chosen_base(options: argparse.Namespace) -> dict[str, Any]:
    """Return path and file of the decoder: those of the recipe, or of a package that is named."""
    recipe = parse_yaml(find_recipe("smollm2").read_text(encoding="utf-8"), "smollm2")
    named = recipe["pretrained"]["smollm2"]
    if options.base is not None:
        return {"path": options.base, "gguf_file": None}
    return {"path": named["path"], "gguf_file": named["gguf_file"]}


def make_payload(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write all that travels into a folder; returns what is said of it."""
    folder.mkdir(parents=True)
    texts, base = text_of(options), chosen_base(options)
    if options.tokenizer is None:
        chunks = train_tokenizer(texts["train"], options.vocab_size, max_bytes=20_000_000)
    else:
        chunks = AutoTokenizer.from_pretrained(options.tokenizer)
    source = PretrainedRecipe(base["path"], gguf_file=base["gguf_file"])
    pair = complete_tokenizer(AutoTokenizer.from_pretrained(source.source, **source.options))
    counts = {}
    for kind, tokenizer, limit in (("chunks", chunks, options.tokens), ("pair", pair, options.pair_tokens)):
        for split, documents in texts.items():
            wanted = limit if split == "train" else limit // 10
            tokens = tokenise_documents(tokenizer, [*take_bytes(documents, 6 * wanted)]).tokens[:wanted]
            counts[f"{kind}_{split}"] = len(tokens)
            (folder / f"{kind}_{split}.u16.zst").write_bytes(squeeze(tokens))
    chunks.save_pretrained(folder.with_name("tokenizer"))  # stays here, to read with what part c brings back
    for name, split, count in (("questions", "train", options.questions), ("validation_questions", "validation", 64)):
        save_questions(make_questions(texts[split], count), folder / f"{name}.jsonl")
    packages = (base["path"].removeprefix("package:").partition("/")[0], *(["gguf"] if base["gguf_file"] else []))
    (folder / "site.tar").write_bytes(tar_of(package_files(packages)))
    warm = Path(options.warm)
    # A starter's code files are links to the package, which travels with the checkout.
    own = (file for file in warm.iterdir() if file.is_file() and not file.is_symlink())
    (folder / "warm.tar").write_bytes(tar_of((file, file.name) for file in own))
    return {"base": base, "tokens": counts, "toy": options.toy, "code": describe_code()}


def cut(sizes: dict[str, int], room: int) -> list[list[dict[str, Any]]]:
    """Share files out over calls of so many bytes, in their order, the largest in pieces.

    Returns:
        For each call its pieces: name of the file, and where its bytes begin and end.
    """
    calls: list[list[dict[str, Any]]] = [[]]
    left = room
    for name, size in sizes.items():
        start = 0
        while start < size:
            if left <= 0:
                calls.append([])
                left = room
            end = min(size, start + left)
            calls[-1].append({"file": name, "start": start, "end": end})
            left, start = left - (end - start), end
    return calls


def write_calls(folder: Path, payload: Path, said: dict[str, Any], room: int) -> list[list[dict[str, Any]]]:
    """Write the folders of the calls, text first; returns the pieces in each, from [`cut`]."""
    order = ("chunks", "questions", "pair", "validation", "site", "warm")
    names = sorted(file.name for file in payload.iterdir())
    names.sort(key=lambda name: order.index(name.partition("_")[0].partition(".")[0]))
    files = {name: (payload / name).read_bytes() for name in names}
    sizes = {name: len(content) for name, content in files.items()}
    manifest = {**said, "files": {
        name: {"bytes": sizes[name], "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }}  # fmt: skip
    calls = cut(sizes, room)
    for number, pieces in enumerate(calls, 1):
        place = folder / f"call{number}"
        place.mkdir()
        for piece in pieces:
            content = files[piece["file"]][piece["start"] : piece["end"]]
            (place / f"{piece['file']}.{piece['start']:012d}").write_bytes(content)
        write_json(place / MANIFEST, manifest)
    return calls


def receive(call: Path, payload: Path) -> dict[str, Any]:
    """Join what a call brought with what earlier ones did; a file is there when it is whole, else not at all.

    Returns:
        What is said of all: `files` with sizes and checksums, `missing` names those that are not whole yet.

    Raises:
        ValueError: If a whole file is not the one that was sent.
    """
    manifest = json.loads((call / MANIFEST).read_text(encoding="utf-8"))
    pieces = payload / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for file in call.iterdir():
        if file.name != MANIFEST:
            (pieces / file.name).write_bytes(file.read_bytes())
    missing = []
    for name, wanted in manifest["files"].items():
        if (payload / name).is_file():
            continue
        own = sorted(pieces.glob(f"{name}.*"))
        content = b"".join(piece.read_bytes() for piece in own)
        if len(content) < wanted["bytes"]:
            missing.append(name)
            continue
        if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
            raise ValueError(f"{name} is not the file that was sent; delete {payload} and send all calls again")
        part = payload / f"{name}.part"
        part.write_bytes(content)
        if name.endswith(".tar"):
            with tarfile.open(part) as archive:
                archive.extractall(payload / name.removesuffix(".tar"), filter="data")
        part.rename(payload / name)
        for piece in own:
            piece.unlink()
    write_json(payload / MANIFEST, {**manifest, "missing": missing})
    return packed(payload)


def packed(payload: Path) -> dict[str, Any]:
    """Return what is said of a payload, as far as it has come."""
    return read_json(payload / MANIFEST)


def travel_branch() -> str:
    """Let the branch `gpu-travel` hold the commit at hand without what stays behind; returns its commit."""

    with tempfile.TemporaryDirectory() as folder:
        # An index of its own: neither what is staged nor any file of the checkout is touched.
        environment = {**os.environ, "GIT_INDEX_FILE": f"{folder}/index"}

        def git(*words: str, given: str | None = None) -> str:
            command = ["git", "-C", str(REPOSITORY), *words]
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, env=environment)
            return done.stdout.strip()

        kept = [
            line
            for line in git("ls-tree", "-r", "HEAD").splitlines()
            if not any(line.partition("\t")[2].startswith(f"{place}/") for place in LEFT_BEHIND)
        ]
        git("update-index", "--index-info", given="\n".join(kept) + "\n")
        commit = git("commit-tree", git("write-tree"), "-p", "HEAD", "-m", "What travels to a GPU: the code alone")
        git("branch", "-f", BRANCH, commit)
    return commit


def commands(calls: list[list[dict[str, Any]]], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Return what is sent, call by call: a part goes with the first call after which all that it needs has come.

    Args:
        calls (`list`): Their pieces, from [`cut`].
        sizes (`dict`): Bytes of each file.
    """
    found, come, left = [], dict.fromkeys(sizes, 0), list(PARTS)
    for number, pieces in enumerate(calls, 1):
        for piece in pieces:
            come[piece["file"]] += piece["end"] - piece["start"]
        ready = [name for name in left if all(come[file] == sizes[file] for file in PARTS[name].needs)]
        left = [name for name in left if name not in ready]
        place = f"{FOLDER}/call{number}"
        seconds = sum(PARTS[name].seconds + 10 for name in ready)
        words = f"--payload {place} --to /tmp/gpu --ship $OUT --parts {','.join(ready) or ','}"
        found.append({
            "command": f"python3 -u -m benchmarks.gpu {words}", "timeout_s": min(600, seconds + 60), "carry": [place],
        })  # fmt: skip
    return found


def rehearse(folder: Path, sent: list[dict[str, Any]], ref: str) -> None:
    """Run the very commands on a copy of the branch, one after the other, as the machine would.

    Args:
        folder (`Path`): Of the bundle.
        sent (`list`): From [`commands`].
        ref (`str`): The commit whose files travel.

    Raises:
        ValueError: If one of them fails, or brings back more than may come.
    """
    with tempfile.TemporaryDirectory() as place:
        tree, out, kept = Path(place) / "tree", Path(place) / "out", Path(place) / "gpu"
        tree.mkdir()
        archive = subprocess.run(
            ["git", "-C", str(REPOSITORY), "archive", ref], capture_output=True, check=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(tree, filter="data")
        (Path(place) / "bin").mkdir()
        (Path(place) / "bin" / "python3").symlink_to(sys.executable)
        environment = {**os.environ, "OUT": str(out), "PATH": f"{place}/bin:{os.environ['PATH']}"}
        environment["PYTHONPATH"] = os.pathsep.join(word for word in sys.path if word and word != str(REPOSITORY))
        for number, one in enumerate(sent, 1):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            shutil.copytree(folder / f"call{number}", tree / one["carry"][0])
            # Its folder lies here, so that two rehearsals do not meet; all else is what will be sent.
            command = one["command"].replace("/tmp/gpu", shlex.quote(str(kept)))
            print(f"-- {one['command']}", flush=True)
            done = subprocess.run(["bash", "-c", command], cwd=tree, env=environment)
            files = [file for file in out.iterdir() if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            print(f"-- brings back {', '.join(sorted(file.name for file in files))}: {size:,} bytes", flush=True)
            if (
                done.returncode
                or len(files) > 8
                or size > 64 * 2**20
                or any(f.stat().st_size > 16 * 2**20 for f in files)
            ):
                raise ValueError(f"call {number} ended with {done.returncode} and {len(files)} files, {size} bytes")


def run(options: argparse.Namespace, command: str) -> None:
    """Make the bundle and say what to send."""
    folder = REPOSITORY / FOLDER if options.to is None else options.to
    ref = travel_branch() if options.branch else "HEAD"

    def fill(part: Path) -> None:
        said = make_payload(options, part / "payload")
        calls = write_calls(part, part / "payload", said, options.room)
        sizes = {name: one["bytes"] for name, one in packed(part / "call1")["files"].items()}
        write_json(part / "calls.json", commands(calls, sizes))
        shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        print(f"{sum(sizes.values()):,} bytes in {len(calls)} calls: {shown}")

    replace_folder(folder, fill)
    sent = json.loads((folder / "calls.json").read_text(encoding="utf-8"))
    print(f"git switch {BRANCH}     # the code alone; git switch - when all is done")
    for one in sent:
        print(json.dumps(one))
    if options.rehearse:
        rehearse(folder, sent, ref)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog="python -m benchmarks.gpu.bundle", description="Pack what travels to a machine with a GPU.")
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="FILE", help="text to train on")
    add("--validation", nargs="+", required=True, metavar="FILE", help="text held out")
    add("--to", type=Path, metavar="FOLDER", help=f"where the bundle goes (default: {FOLDER})")
    add("--tokenizer", metavar="FOLDER", help="of the autoencoder (default: one is trained on the text)")
    add("--vocab-size", type=whole_number(), default=8000, metavar="N", help="of that one (8000)")
    add("--tokens", type=whole_number(), default=30_000_000, metavar="N", help="for the autoencoder (30,000,000)")
    add("--pair-tokens", type=whole_number(), default=6_000_000, metavar="N", help="for the pair (6,000,000)")
    add("--questions", type=whole_number(), default=4_000, metavar="N", help="made of the text (4,000)")
    add("--base", metavar="package:NAME", help="decoder of the pair (default: that of the recipe smollm2)")
    add("--warm", default="model_cards/starter-smollm2", metavar="FOLDER", help="first weights of the pair")
    add("--room", type=whole_number(), default=CALL_BYTES, metavar="BYTES", help=f"of one call ({CALL_BYTES:,})")
    add("--toy", action="store_true", help="the machine shall run toy sizes")
    add("--rehearse", action="store_true", help="run the commands here, one after the other, on a copy of the branch")
    add("--no-branch", dest="branch", action="store_false", help=f"leave the branch {BRANCH} as it is")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
