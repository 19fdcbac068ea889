"""The pretrained models that a published model stands on when it is published by reference.

A Hub folder by reference holds what was trained, and ids, commits and hashes of the rest. Here the rest is found: on
the Hub, or in a folder that is said to be a copy of it, which is checked against the Hub before anything is pushed; or
in an installed Python package, which its users install, too.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling_memory.memory_parts import PACKAGE, locate, package_version
from modeling_memory.memory_saving import PARTS

from .push import PushError, explained

COMMIT = re.compile(r"[0-9a-f]{40}")
# No pickles: whoever loads the model should read none. The card says which licence the weights have.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "README.md")


@dataclass(frozen=True)
class Base:
    """A pretrained model on the Hub or in a Python package, and where it lies here.

    Attributes:
        id (`str`): The repository, or `package:NAME`.
        revision (`str`): Its commit, or the package's version.
        folder (`Path`): The files of that commit or package.
        subfolder (`str`): Where in it the model stands; empty for the top.
    """

    id: str
    revision: str
    folder: Path
    subfolder: str = ""

    @property
    def is_package(self) -> bool:
        """Whether an installed package brings it, which everybody installs for themselves."""
        return self.id.startswith(PACKAGE)

    @property
    def source(self) -> str:
        """What to load from: the folder, or the package."""
        return self.id if self.is_package else str(self.folder / self.subfolder)


def find_bases(config: Mapping[str, Any], named: Sequence[str], folders: Sequence[str]) -> dict[str, Base]:
    """Find what encoder and decoder come from.

    Args:
        config (`dict`): Config of the checkpoint; the bases that one saved by reference names are the default.
        named (`Sequence[str]`): `PART=ID[@REVISION]` or `PART=package:NAME` each.
        folders (`Sequence[str]`): `PART=FOLDER` each: where the base lies, instead of a download.

    Returns:
        `dict`: Part -> base.

    Raises:
        ValueError: If a base is not named, cannot be referred to, or its commit is not known.
        PushError: If the Hub does not give it.
    """
    references = config.get("references") or {}
    wanted = {part: (ref["id"], ref["revision"], ref.get("subfolder") or "") for part, ref in references.items()}
    for part, value in _parts(named, "--base", "ID@REVISION").items():
        repo_id, _, revision = value.partition("@")
        if not repo_id.startswith(PACKAGE):
            validate_repo_id(repo_id)
        wanted[part] = (repo_id, revision or None, "")
    places = _parts(folders, "--base-folder", "FOLDER")
    packages = {part for part, (repo_id, *_) in wanted.items() if (repo_id or "").startswith(PACKAGE)}
    for part in sorted(places.keys() & packages):
        raise ValueError(f"--base-folder {part}=... is for a base on the Hub; {wanted[part][0]} is read where it is")
    stray = sorted(places.keys() - wanted.keys())
    if stray or not wanted:
        part = (stray or ["decoder"])[0]
        raise ValueError(f"what the {part} comes from is not known; name it: --base {part}=ID@REVISION")
    found = {}
    for part, (repo_id, revision, subfolder) in wanted.items():
        if repo_id is None:
            raise ValueError(
                f"the base of the {part} came from a folder; name it on the Hub: --base {part}=ID@REVISION"
            )
        if part in packages:
            folder, revision = Path(locate(repo_id)), str(package_version(repo_id)[1])
        elif part in places:
            folder = Path(places[part]).expanduser().resolve()
            if not folder.is_dir():
                raise ValueError(f"--base-folder {part}={places[part]} is no folder")
        else:
            with explained(repo_id, "fetching it"):
                folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
            revision = folder.name  # the commit that a branch stands for
        if part not in packages and not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"the revision of {repo_id} is {revision!r}; expected a commit of 40 hexadecimal digits, since a "
                f"folder does not tell which it is: --base {part}={repo_id}@COMMIT"
            )
        found[part] = Base(repo_id, str(revision), folder, subfolder)
        # What a package holds beside a config, a GGUF file, has no code; a checkpoint that refers to it says which.
        if part not in packages or part not in references or (folder / subfolder / "config.json").is_file():
            _check_needs_no_code(part, found[part])
    return found


def places_of(bases: Mapping[str, Base] | None) -> dict[str, str]:
    """What `from_pretrained` is told of bases: where those of the Hub lie here; a package is found by its name."""
    return {f"{part}_base": base.source for part, base in (bases or {}).items() if not base.is_package}


def check_bases_on_hub(bases: Mapping[str, Base]) -> None:
    """Compare the weights of bases with those that the Hub has at their commits, by checksums.

    Raises:
        PushError: If a base is not there or has other weights.
    """
    api = HfApi()
    for base in bases.values():
        if base.is_package:
            continue
        with explained(base.id, "looking it up"):
            tree = api.list_repo_tree(base.id, recursive=True, revision=base.revision)
            remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        for path in sorted(Path(base.source).glob("*.safetensors")):
            name = path.relative_to(base.folder).as_posix()
            if name not in remote or not _is_same(path, remote[name]):
                raise PushError(
                    f"{name} of {base.id} at {base.revision} is not the one in {base.folder}, so nobody could load "
                    "the model; give the base that it was trained on; nothing was published"
                )


def _is_same(path: Path, file: RepoFile) -> bool:
    if file.lfs is None:
        return bool(file.blob_id == git_hash(path.read_bytes()))
    with path.open("rb") as stream:
        return bool(file.lfs.sha256 == sha_fileobj(stream).hex())


def _parts(given: Sequence[str], option: str, what: str) -> dict[str, str]:
    """Read `PART=VALUE` words.

    >>> _parts(["decoder=me/base@abc"], "--base", "ID@REVISION")
    {'decoder': 'me/base@abc'}
    """
    found = {}
    for word in given:
        part, _, value = word.partition("=")
        if part not in PARTS or not value:
            raise ValueError(f"{option} is {word!r}; expected PART={what} with PART one of {', '.join(PARTS)}")
        found[part] = value
    return found


def _check_needs_no_code(part: str, base: Base) -> None:
    """Refuse a base with code of its own: its users would have to trust a second repository."""
    path = base.folder / base.subfolder / "config.json"
    if not path.is_file():
        raise ValueError(f"{base.id} has no config.json, so it is no base to refer to by --base")
    config = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" in config or config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"{base.id} needs code of its own to load, which by reference nobody could allow; leave --base {part}=... "
            f"out, so that the {part} is published by value"
        )
