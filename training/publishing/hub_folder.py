"""Hub folders: what is in them, written whole or not at all, and read back."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import modeling_memory
from modeling_memory.memory_saving import TRAINED
from modeling_memory.processing_memory import MemoryProcessor

from ..places import REPOSITORY, licence_text
from .bases import Base, places_of
from .cards import CARDS, card_licence, licence_file, render_card

CODE = Path(modeling_memory.__file__).resolve().parent
MAX_SHARD_SIZE = "4GB"

AUTO_MAPS = {
    "memory_encoder_decoder": {
        "AutoConfig": "configuration_memory.MemoryEncoderDecoderConfig",
        "AutoModel": "modeling_memory.MemoryEncoderDecoderModel",
        "AutoModelForCausalLM": "modeling_memory.MemoryEncoderDecoderForCausalLM",
    },
    "memory_autoencoder": {
        "AutoConfig": "configuration_memory_autoencoder.MemoryAutoencoderConfig",
        "AutoModel": "modeling_memory_autoencoder.MemoryAutoencoder",
    },
    "masked_mixer": {
        "AutoConfig": "configuration_masked_mixer.MaskedMixerConfig",
        "AutoModel": "modeling_masked_mixer.MaskedMixerModel",
        "AutoModelForCausalLM": "modeling_masked_mixer.MaskedMixerForCausalLM",
    },
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_memory.MemoryProcessor"}

# Pieces of a vocabulary may look like paths.
VOCABULARY_FILES = re.compile(r"(tokenizer\.json|vocab\.json|merges\.txt|vocab\.txt|\.model)$")
TOKENIZER_FILES = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt|"
    r"[\w.-]+\.model|chat_template\.jinja"
)
ALLOWED_FILES = re.compile(
    r"README\.md|LICENSE(\.code)?|record\.json|config\.json|generation_config\.json|processor_config\.json|"
    r"trained\.safetensors|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|"
    rf"\w+\.py|(encoder_tokenizer/)?({TOKENIZER_FILES})"
)


class PublishError(RuntimeError):
    """A folder that does not load back as it was written, or cannot be published as it was asked."""

    exit_status = 2  # what is to be mended is what the command was given


def auto_map_of(model_type: str) -> dict[str, str]:
    """The `auto_map` of a model of this package; empty for the library's own causal LMs, which need none.

    Raises:
        ValueError: If the model is neither.
    """
    if model_type in AUTO_MAPS:
        return AUTO_MAPS[model_type]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {}
    raise ValueError(
        f"The model is of type {model_type!r}; expected one of {', '.join(AUTO_MAPS)}, or a causal LM of the library. "
        "Publish others with their own `push_to_hub`."
    )


def is_causal_lm(model_type: str) -> bool:
    """Whether `AutoModelForCausalLM` loads such a model."""
    return "AutoModelForCausalLM" in AUTO_MAPS[model_type] if model_type in AUTO_MAPS else True


def code_files(auto_map: Mapping[str, str], folder: Path | None = None) -> set[str]:
    """Names of the code files that loading needs: those that `auto_map` names, and all that they import.

    Args:
        auto_map (`dict`): Auto class -> `file.Class`.
        folder (`Path`, *optional*): Where the files lie, flat; default: this package.

    Raises:
        FileNotFoundError: If a file that is named or imported is not there.

    >>> found = code_files({"AutoConfig": "configuration_masked_mixer.MaskedMixerConfig"})
    >>> "modeling_masked_mixer.py" in found, "processing_memory.py" in found
    (True, False)
    """
    entries = {(folder or CODE) / f"{entry.partition('.')[0]}.py" for entry in auto_map.values()}
    imported = {Path(name).name for entry in entries for name in get_relative_import_files(entry)}
    return {entry.name for entry in entries} | imported


def write_code(auto_map: Mapping[str, str], folder: Path) -> None:
    """Write the code that loading needs, flat, and drop what an earlier publication left of it.

    A starter in `model_cards/` of a checkout gets relative links to the package, which cannot be stale; any other
    folder gets files, since it will be read where this checkout is not.
    """
    is_starter = folder.parent == CARDS and CODE.parent == REPOSITORY
    for old in folder.glob("*.py"):
        old.unlink()
    for name in sorted(code_files(auto_map)):
        if is_starter:
            (folder / name).symlink_to(os.path.relpath(CODE / name, folder))
        else:
            shutil.copyfile(CODE / name, folder / name)


def write_hub_folder(
    model: PreTrainedModel,
    processor: Any,
    folder: str | os.PathLike,
    record: Mapping[str, Any] | None = None,
    card_context: Mapping[str, Any] | None = None,
    bases: Mapping[str, Base] | None = None,
    by_reference: bool = False,
) -> Path:
    """Write a model as a Hub folder that loads without this package.

    The folder is written beside its place and renamed, so that it is always whole and no file of an earlier
    one survives in it (an old `model.safetensors` would win over new shards).

    Args:
        model (`PreTrainedModel`): One of this package's models, its floating-point weights of one dtype.
        processor (`MemoryProcessor`, tokenizer or `None`): Saved beside it; a memory encoder-decoder needs
            its own.
        folder (`str` or `os.PathLike`): The place. An earlier Hub folder there is replaced; anything else is
            not.
        record (`dict`, *optional*): Record of the run; its numbers go into the card, and it is saved beside
            it.
        card_context (`dict`, *optional*): What only the writer knows, as in
            [`training.publishing.cards.render_card`]; it is kept in the saved record.
        bases (`dict`, *optional*): For `"encoder"`, `"decoder"` or both what they come from: their weights are then
            referred to, and only what differs from them is written.
        by_reference (`bool`): The same with the bases that the model itself remembers, packages say.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the model is none of this package's, its dtypes differ, it lacks its processor, the place
            holds something else, or a base is not the model's.
    """
    target = Path(folder).expanduser().resolve()
    _check_publishable(model, processor)
    if bases and model.config.model_type != "memory_encoder_decoder":
        raise ValueError(f"A {model.config.model_type} has no bases to refer to; publish it by value.")
    _check_replaceable(target)
    with _written_aside(target) as staging:
        sources: dict[str, Any] = {"by_reference": True} if by_reference else {}
        if bases:
            known = {
                part: model._bases[part] for part, base in bases.items() if base.is_package and part in model._bases
            }
            sources = {"by_reference": {**{part: base.source for part, base in bases.items()}, **known}}
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE, **sources)
        if processor is not None:
            processor.save_pretrained(staging)
        _describe(staging, model, processor, record, card_context, bases)
    return target


def refresh_hub_folder(
    folder: str | os.PathLike,
    record: Mapping[str, Any] | None = None,
    card_context: Mapping[str, Any] | None = None,
    bases: Mapping[str, Base] | None = None,
) -> Path:
    """Write the card, the record and the code of a Hub folder anew; weights and tokenizer stay as they are.

    Args:
        folder (`str` or `os.PathLike`): The Hub folder; its code may be missing or out of date.
        record (`dict`, *optional*): The record to show.
        card_context (`dict`, *optional*): As in [`write_hub_folder`].
        bases (`dict`, *optional*): Of a folder by reference, what encoder and decoder come from.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the folder is no Hub folder.
    """
    target = Path(folder).expanduser().resolve()
    model, _ = load_checkpoint(target, bases)
    processor = load_processor(target)
    _check_publishable(model, processor)
    if foreign := [name for name in _files(target) if not ALLOWED_FILES.fullmatch(name)]:
        raise ValueError(f"{target} holds something else than a Hub folder ({foreign[0]}); give another folder")
    with _written_aside(target) as staging:
        shutil.copytree(target, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py"))
        _describe(staging, model, processor, record, card_context, None)
    return target


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write to, and put it in its place if nothing failed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        check_files(staging)
        staging.chmod(0o755)
        _replace(target, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(
    folder: Path,
    model: PreTrainedModel,
    processor: Any,
    record: Mapping[str, Any] | None,
    card_context: Mapping[str, Any] | None,
    bases: Mapping[str, Base] | None,
) -> None:
    """Write all that stands beside weights and tokenizer: settings, code, licence, record and card."""
    auto_map = auto_map_of(model.config.model_type)
    references = _edit_json(
        folder / "config.json", lambda config: _with_references(_without_paths(config, auto_map), bases or {})
    ).get("references", {})
    if isinstance(processor, MemoryProcessor):
        auto_map = {**auto_map, **PROCESSOR_AUTO_MAP}
        _edit_json(folder / "processor_config.json", lambda settings: {**settings, "auto_map": PROCESSOR_AUTO_MAP})
    write_code(auto_map, folder)
    if record is not None:  # with what the card's writer said, so that the card can be written again
        card = {**record.get("card", {}), **(card_context or {})}
        record = _portable({**record, **({"card": card} if card else {})})
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (folder / "record.json").write_text(text + "\n", encoding="utf-8")
    said = {**(card_context or {}), **_prompts(model, processor), "references": references}
    render_card(model, record, said).save(folder / "README.md")
    for name in ("LICENSE", "LICENSE.code"):
        (folder / name).unlink(missing_ok=True)
    (folder / licence_file(card_licence(model, record, said))).write_text(licence_text(), encoding="utf-8")


def check_files(folder: Path) -> None:
    """Check the files of a Hub folder: allowed names, the code that every `auto_map` needs and no other, one layout of
    weights, no paths.

    Raises:
        PublishError: Naming the file.
    """
    names = _files(folder)
    foreign = [name for name in names if not ALLOWED_FILES.fullmatch(name)]
    if foreign:
        raise PublishError(f"{', '.join(foreign)} must not be published")
    if "model.safetensors" in names and "model.safetensors.index.json" in names:
        raise PublishError("both model.safetensors and shards are there; the single file would win on loading")
    if TRAINED in names:
        if any(name.startswith("model") and "safetensors" in name for name in names):
            raise PublishError(f"both {TRAINED} and weights of the bases are there")
        references = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("references") or {}
        nowhere = [part for part, reference in references.items() if not (reference["id"] and reference["revision"])]
        if nowhere or not references:
            raise PublishError(f"config.json does not say where the {(nowhere or ['decoder'])[0]} comes from")
    try:
        needed = code_files(_auto_map_in(folder), folder)
    except FileNotFoundError as error:
        raise PublishError(f"loading needs {Path(error.filename).name}, which is not there") from error
    if stray := [name for name in names if name.endswith(".py") and name not in needed]:
        raise PublishError(f"{', '.join(stray)} must not be published: no entry of an auto_map needs it")
    places = [*_places(), str(folder.parent)]
    for name in names:
        if name.endswith(".safetensors") or VOCABULARY_FILES.search(name):
            continue
        text = (folder / name).read_text(encoding="utf-8")
        for place in places:
            if re.search(re.escape(place) + r"""[/"'\s]""", text):
                raise PublishError(f"{name} contains {place}, a place on this machine")


def _files(folder: Path) -> list[str]:
    """Names of the files in a folder, links that lead nowhere included."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    )


def _auto_map_in(folder: Path) -> dict[str, str]:
    """The `auto_map` entries of model and processor in a folder."""
    found: dict[str, str] = {}
    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
    return found


def load_checkpoint(
    folder: str | os.PathLike, bases: Mapping[str, Base] | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a model of this package and its processor from a folder.

    Args:
        folder (`str` or `os.PathLike`): A checkpoint or a Hub folder.
        bases (`dict`, *optional*): Of one saved by reference, what encoder and decoder come from. By default they are
            loaded from the Hub.
        dtype (`str`): Of the weights, `"bfloat16"` for example. Default: as they are stored.

    Returns:
        The model, and its [`MemoryProcessor`] or `None`.

    Raises:
        ValueError: If the folder is incomplete or holds another kind of model.
    """
    folder = Path(folder).expanduser()
    check_complete(folder)
    config = AutoConfig.from_pretrained(folder)
    auto_class = AutoModelForCausalLM if is_causal_lm(config.model_type) else AutoModel
    references = getattr(config, "references", None) or {}
    places = places_of({part: base for part, base in (bases or {}).items() if part in references})
    model = auto_class.from_pretrained(folder, dtype=dtype, **places)
    processor = MemoryProcessor.from_pretrained(folder) if (folder / "processor_config.json").exists() else None
    return model, processor


def load_processor(folder: str | os.PathLike) -> Any:
    """Load what stands beside a model: its [`MemoryProcessor`], else its tokenizer, else `None`."""
    folder = Path(folder).expanduser()
    if (folder / "processor_config.json").exists():
        return MemoryProcessor.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").exists() else None


def _prompts(model: PreTrainedModel, processor: Any) -> dict[str, str]:
    """What the card's snippet says to the model: its COPY token, if it has one."""
    token_id = getattr(model.config, "copy_token_id", None)
    if token_id is None or not isinstance(processor, MemoryProcessor):
        return {}
    return {"copy_token": processor.tokenizer.convert_ids_to_tokens(token_id)}


def check_complete(folder: Path) -> None:
    """Check that a folder holds a config of this package and all its weights.

    Raises:
        ValueError: Naming what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a checkpoint")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no config.json; give the folder of a checkpoint") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is no valid JSON ({error}); the checkpoint is damaged") from error
    try:
        auto_map_of(str(config.get("model_type")))
    except ValueError as error:
        raise ValueError(f"{folder} cannot be published. {error}") from error
    if config.get("references"):
        if not (folder / TRAINED).is_file():
            raise ValueError(f"{folder} has no {TRAINED}; the checkpoint is incomplete: save it again")
        return
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{folder} has no model.safetensors; the checkpoint is incomplete: save it again")
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; the checkpoint is incomplete: save it again")


def _check_publishable(model: PreTrainedModel, processor: Any) -> None:
    auto_map_of(model.config.model_type)
    if model.config.model_type == "memory_encoder_decoder" and not isinstance(processor, MemoryProcessor):
        raise ValueError(
            f"The processor is a {type(processor).__name__}; expected a MemoryProcessor, without which nobody can "
            "build the model's inputs."
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"The weights are of several dtypes ({names}); on loading, one of them would win. Cast the model first, "
            "for example by `model.float()`."
        )


def _check_replaceable(target: Path) -> None:
    """An empty or missing place, or an earlier Hub folder: nothing else may be overwritten."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give the name of a folder")
    names = _files(target)
    foreign = [name for name in names if not ALLOWED_FILES.fullmatch(name)] or _stray_code(target)
    if foreign or (names and "config.json" not in names):
        raise ValueError(
            f"{target} holds something else than a Hub folder ({(foreign or names)[0]}); give an empty or a new folder"
        )


def _stray_code(folder: Path) -> list[str]:
    """Code files in a folder that nothing which its `auto_map` names imports; links are a starter's own."""
    names = [path.name for path in folder.glob("*.py") if not path.is_symlink()]
    try:
        needed = code_files(_auto_map_in(folder), folder)
    except FileNotFoundError:  # a file that another one needs was renamed or lost
        needed = set()
    return sorted(set(names) - needed)


def _replace(target: Path, staging: Path) -> None:
    """Put a finished folder in its place."""
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        staging.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _edit_json(path: Path, edit: Any) -> dict[str, Any]:
    edited: dict[str, Any] = edit(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(edited, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return edited


def _with_references(config: dict[str, Any], bases: Mapping[str, Base]) -> dict[str, Any]:
    """A saved config whose bases, read from folders here, are named as the Hub or pip knows them."""
    for part, base in bases.items():
        names = {"id": base.id, "revision": base.revision, "subfolder": base.subfolder or None}
        config["references"][part] |= names
    return config


def _without_paths(config: dict[str, Any], auto_map: Mapping[str, str]) -> dict[str, Any]:
    """A saved config with the full `auto_map`, and without the places its parts were loaded from."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in ("_name_or_path", "auto_map")}
        return value

    return {**strip(config), **({"auto_map": dict(auto_map)} if auto_map else {})}


def _portable(value: Any) -> Any:
    """Plain data without paths of this machine: those in the repository become relative, others a file name."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{REPOSITORY}/", "")
    return re.sub(r"(?<![\w:/])/(?:[^/\s\"']+/)+[^/\s\"']*", _last_part_if_local, value)


def _last_part_if_local(match: re.Match[str]) -> str:
    path = match.group()
    local = Path(path).exists() or any(path.startswith(f"{place}/") for place in _places())
    return Path(path).name if local else path


def _places() -> list[str]:
    """Folders of this machine that nobody else needs to know of."""
    places = {str(REPOSITORY), str(Path.cwd()), str(Path.home()), tempfile.gettempdir()}
    return sorted(place for place in places if len(place) > 1)
