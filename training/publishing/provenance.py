"""What a model was made from, bases and text, and the licence that its weights have from them.

Nothing is guessed: a base is asked for its own card, then the names in `model_cards/licences.yaml`; text is found in
`model_cards/sources.yaml`. What neither tells is unknown, and `training.publish` asks its writer.
"""

import fnmatch
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.file_download import repo_folder_name

from ..data.sources import HUB, HubDataset
from ..places import REPOSITORY
from ..recipes.recipe import PACKAGE, PretrainedRecipe
from ..recipes.strict_yaml import parse_yaml
from ..records.record import read_json

LICENCES = REPOSITORY / "model_cards" / "licences.yaml"
SOURCES = REPOSITORY / "model_cards" / "sources.yaml"
NOTHING_RECORDED = "neither bases nor training text are recorded"
UNKNOWN = "unknown"  # a licence that the Hub knows by this name
OWN = "apache-2.0"  # of this project's code, and of weights that nothing else binds
# How packages write what the Hub writes otherwise.
SPELLINGS = {"apache 2.0": "apache-2.0", "apache software license": "apache-2.0", "apache license 2.0": "apache-2.0",
             "mit license": "mit", "bsd license": "bsd-3-clause", "bsd": "bsd-3-clause"}  # fmt: skip


@dataclass(frozen=True)
class Licence:
    """A licence and why it is the one.

    Attributes:
        id (`str`): Its name, the Hub's where the Hub has one; `unknown`.
        reason (`str`): Whose it is, or what is missing.
        link (`str`): Its text, if its giver named one.
    """

    id: str
    reason: str
    link: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anybody said what it is."""
        return self.id != UNKNOWN

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields of a card's metadata.

        >>> Licence("gemma", "that of google/gemma-3-270m").metadata
        {'license': 'gemma'}
        >>> Licence("house", "as its publisher says", "https://example.org/house").metadata
        {'license': 'other', 'license_name': 'house', 'license_link': 'https://example.org/house'}
        """
        table = licence_table()
        if self.id == "public-domain":
            return {"license": "other", "license_name": self.id, "license_link": self.link or "README.md"}
        if self.id in (UNKNOWN, *table["free"], *table["binding"]):
            return {"license": self.id}
        return {"license": "other", "license_name": self.id, "license_link": self.link or "README.md"}


def licence_table() -> dict[str, Any]:
    """Read `model_cards/licences.yaml`."""
    table: dict[str, Any] = parse_yaml(LICENCES.read_text(encoding="utf-8"), LICENCES.name)
    return table


def weights_licence(bases: Mapping[str, str | None], texts: Mapping[str, str | None], given: str = "") -> Licence:
    """Say which licence a model's weights have.

    Args:
        bases (`dict`): Name of each pretrained model that it was made from -> its licence, `None` if not known.
        texts (`dict`): Name of each training text -> its licence, likewise.
        given (`str`): What the publisher says, `ID` or `NAME=LINK`; it is taken as it is.

    Returns:
        [`Licence`]: `unknown` if the licence of something is, if several bind, or if nothing is recorded.

    >>> weights_licence({}, {"books": "cc0-1.0"})
    Licence(id='apache-2.0', reason='which nothing that they were made from forbids', link='')
    >>> weights_licence({"meta-llama/Llama-3.2-1B": "llama3.2"}, {"books": "cc0-1.0"}).reason
    'that of meta-llama/Llama-3.2-1B'
    >>> weights_licence({}, {"mine.txt": None})
    Licence(id='unknown', reason='the licence of mine.txt is not known', link='')
    """
    if given:
        name, _, link = given.partition("=")
        return Licence(name, "as their publisher says", link)
    sources = {**texts, **bases}
    missing = [name for name, licence in sources.items() if licence is None]
    if missing:
        return Licence(UNKNOWN, f"the licence of {', '.join(missing)} is not known")
    if not sources:
        return Licence(UNKNOWN, NOTHING_RECORDED)
    free = licence_table()["free"]
    binding = {licence: name for name, licence in sources.items() if licence not in free}
    if len(binding) > 1:
        several = ", ".join(f"{licence} ({name})" for licence, name in binding.items())
        return Licence(UNKNOWN, f"several licences bind them: {several}")
    for licence, name in binding.items():
        return Licence(str(licence), f"that of {name}")
    shared = set(bases.values())
    if len(shared) == 1:
        return Licence(str(shared.pop()), f"that of {', '.join(bases)}")
    return Licence(OWN, "which nothing that they were made from forbids")


def training_sources(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what `model_cards/sources.yaml` has of the text that a run trained on.

    Returns:
        `list[dict]`: `name`, `licence` and `source` for a reader; where they are known, `license` (its name in
        `licences.yaml`), `language`, and `hub` (the text's id on the Hub).

    >>> files = {"data": {"train": ["training/corpora/wikinews/train.parquet", "mine.txt"]}}
    >>> [source["licence"] for source in training_sources({"recipe": files})]
    ['CC BY 2.5', 'not recorded']
    """
    known = parse_yaml(SOURCES.read_text(encoding="utf-8"), SOURCES.name)
    patterns = list(record.get("recipe", {}).get("data", {}).get("train", []))
    files = record.get("inputs", {}).get("files", {}).get("train", {})
    sources: dict[str, dict[str, str]] = {}
    for name in [*patterns, *files]:  # a glob pattern may hide what the names of its files tell
        if name.startswith(HUB):
            data = HubDataset.parse(name)
            link = f"https://huggingface.co/datasets/{data.name} at {data.revision}"
            own: dict[str, str] = next((corpus for corpus in known.values() if corpus.get("hub") == data.name), {})
            licence = own.get("license") or dataset_licence(data.name)
            found = {"name": data.name, "licence": licence or "see its card", "source": link, "hub": data.name}
            spoken = {"license": licence, "language": own.get("language")}
            sources[data.name] = found | {key: value for key, value in spoken.items() if value}
            continue
        corpus = next((corpus for corpus in known if re.search(rf"(^|/){corpus}[/_]", name)), None)
        if corpus is not None:
            sources[corpus] = known[corpus]
        elif "*" not in name and not any(pattern.endswith(f"/{name}") for pattern in patterns):
            sources[name] = {"name": Path(name).name, "licence": "not recorded", "source": "not recorded"}
    return list(sources.values())


def record_licence(
    record: Mapping[str, Any],
    bases: Sequence[str] = (),
    texts: Sequence[Mapping[str, str]] | None = None,
    given: str = "",
) -> Licence:
    """Say which licence the weights of a run's published stage have.

    Args:
        record (`dict`): Record of the run, which names its bases and text.
        bases (`Sequence[str]`): Further bases.
        texts (`Sequence[dict]`, *optional*): The training text, as [`training_sources`] gives it; default:
            the record's.
        given (`str`): What the publisher says; it is taken as it is.
    """
    sources = training_sources(record) if texts is None else texts
    names = dict.fromkeys([*recorded_bases(record), *bases])
    licences = {source["name"]: source.get("license") for source in sources}
    return weights_licence({short_name(name): base_licence(name) for name in names}, licences, given)


def recorded_bases(record: Mapping[str, Any]) -> list[str]:
    """Return the pretrained models that the published stage of a run was made from, as its recipe names them.

    >>> recipe = {"pretrained": {"llama": {"path": "meta-llama/Llama-3.2-1B"}, "other": {"path": "me/other"}}}
    >>> recipe["stages"] = [{"name": "memory", "from": {"decoder": "llama"}}]
    >>> recorded_bases({"recipe": recipe, "published_stage": "memory"})
    ['meta-llama/Llama-3.2-1B']
    """
    recipe = record.get("recipe", {})
    pretrained = recipe.get("pretrained") or {}
    stage = record.get("published_stage")
    names = pretrained if stage is None else stage_sources(recipe, stage)
    return [pretrained[name]["path"] for name in names if name in pretrained]


def stage_sources(recipe: Mapping[str, Any], stage: str) -> list[str]:
    """Name all that a stage was made from, itself first: stages of the recipe and pretrained models."""
    stages = {entry["name"]: entry for entry in recipe.get("stages", [])}
    needed = [stage]
    for name in needed:  # grows while it is read
        entry = stages.get(name, {})
        sources = [*(entry.get("from") or {}).values(), (entry.get("warm_start") or {}).get("tables_from")]
        needed += [source for source in sources if source and source not in needed]
    return needed


def base_licence(name: str) -> str | None:
    """Find the licence of a pretrained model.

    Args:
        name (`str`): A Hub id, a folder, or `package:MODULE/FOLDER`.

    Returns:
        `str`: What its own card says, else the record of the run that made it, else its package, else the table of
        names; `None` if none of them tells.
    """
    folder = _folder(name)
    if folder is None:
        return _by_package(name) or _in_cache(name, "model") or _in_table(name, "bases")
    said = _said_in(folder / "README.md") or _by_run(folder)
    config = read_json(folder / "config.json") or {}
    names = [str(config.get("_name_or_path") or ""), folder.name]
    return said or _by_package(name) or next(filter(None, (_in_table(own, "bases") for own in names)), None)


def dataset_licence(name: str) -> str | None:
    """Find the licence of a dataset of the Hub: what its card in the cache says, else the table of names."""
    return _in_cache(name, "dataset") or _in_table(name, "datasets")


def short_name(name: str) -> str:
    """Name a base for a reader: a Hub id as it is, a folder or package without its place.

    >>> [short_name(name) for name in ("meta-llama/Llama-3.2-1B", "package:llm/model", "/data/models/My-Llama")]
    ['meta-llama/Llama-3.2-1B', 'llm/model', 'My-Llama']
    """
    if name.startswith(PACKAGE):
        return name.removeprefix(PACKAGE)
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a base is named by its id on the Hub and not by a place of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and _folder(name) is None


def _folder(name: str) -> Path | None:
    try:
        folder = Path(PretrainedRecipe(name).source).expanduser()
    except ValueError:  # a package that is not installed
        return None
    return folder if folder.is_dir() else None


def _said_in(card: Path) -> str | None:
    """The licence in the metadata of a card."""
    if not card.is_file():
        return None
    try:
        data: Any = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):
        return None
    said = data.get("license")
    if said == "other":
        said = data.get("license_name")
    said = said[0] if isinstance(said, Sequence) and not isinstance(said, str) and said else said
    return str(said).lower() if said and str(said).lower() != UNKNOWN else None


def _in_cache(name: str, kind: str) -> str | None:
    """The licence in the card that the Hub's cache has of a repository, at whichever commit it was fetched last."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    cards = sorted(snapshots.glob("*/README.md"), key=lambda card: card.lstat().st_mtime, reverse=True)
    return next(filter(None, map(_said_in, cards)), None)


def _by_run(folder: Path) -> str | None:
    """The licence of a stage of a run of this project: that of what it was made from."""
    if folder.name != "model" or len(folder.parents) < 3 or folder.parents[1].name != "stages":
        return None
    record = read_json(folder.parents[2] / "record.json")
    if not isinstance(record, Mapping):
        return None
    licence = record_licence({**record, "published_stage": folder.parent.name})
    return licence.id if licence.is_known else None


def _by_package(name: str) -> str | None:
    """The licence of an installed package: its own word on what is in it."""
    if not name.startswith(PACKAGE):
        return None
    module = name.removeprefix(PACKAGE).partition("/")[0]
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        metadata: Any = importlib.metadata.metadata(distribution)
        said = metadata.get("License-Expression") or metadata.get("License")
        if said and "\n" not in said:
            return SPELLINGS.get(said.lower(), said.lower())
    return None


def _in_table(name: str, kind: str) -> str | None:
    name = name.removeprefix(PACKAGE).replace("_", "-").lower()
    patterns = licence_table()[kind]
    return next((licence for pattern, licence in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)
