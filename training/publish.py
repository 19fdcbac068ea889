"""Hub folders: code, weights, processor and card, loaded back in a clean process.

```bash
python -m training.publish runs/quickstart/hub --to ~/my-model
```
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_memory
from modeling_memory.processing_memory import MemoryProcessor
from training import clean_process
from training.sample import sample_lines

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATE = REPOSITORY / "model_cards" / "template.md"
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
SHIPPED_TEXT = {
    "books": {
        "name": "books, editions of Standard Ebooks",
        "licence": "public domain, CC0 1.0",
        "source": "https://github.com/standardebooks",
    },
    "wikinews": {
        "name": "English Wikinews, by the Wikinews contributors",
        "licence": "CC BY 2.5",
        "source": "https://en.wikinews.org",
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
    r"README\.md|LICENSE|record\.json|config\.json|generation_config\.json|processor_config\.json|"
    r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json|"
    rf"(configuration|modeling|memory|generation|processing)_\w+\.py|(encoder_tokenizer/)?({TOKENIZER_FILES})"
)

SAMPLE_TEXT = "the rest of it:"
SAMPLE_CONTEXT = "a man in the sand and the sea"


class PublishError(RuntimeError):
    """A folder that does not load back as it was written."""


def write_hub_folder(
    model: PreTrainedModel,
    processor: Any,
    folder: str | os.PathLike,
    record: Mapping[str, Any] | None = None,
    card_context: Mapping[str, Any] | None = None,
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
        card_context (`dict`, *optional*): What only the writer knows, for the card: `model_name`,
            `description`, `training_data` (list of `name`, `licence`, `source`), `base_models`, `reproduce`,
            `example`.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the model is none of this package's, its dtypes differ, it lacks its processor, or the
            place holds something else.
    """
    target = Path(folder).expanduser().resolve()
    _check_publishable(model, processor)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        if processor is not None:
            processor.save_pretrained(staging)
        auto_map = AUTO_MAPS[model.config.model_type]
        _edit_json(staging / "config.json", lambda config: _without_paths(config, auto_map))
        if isinstance(processor, MemoryProcessor):
            auto_map = {**auto_map, **PROCESSOR_AUTO_MAP}
            _edit_json(
                staging / "processor_config.json", lambda settings: {**settings, "auto_map": PROCESSOR_AUTO_MAP}
            )
        _copy_code(auto_map, staging)
        shutil.copyfile(REPOSITORY / "LICENSE", staging / "LICENSE")
        if record is not None:
            record = _portable(record)
            text = json.dumps(record, indent=1, ensure_ascii=False)
            (staging / "record.json").write_text(text + "\n", encoding="utf-8")
        render_card(model, record, card_context).save(staging / "README.md")
        check_files(staging)
        staging.chmod(0o755)
        _replace(target, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_files(folder: Path) -> None:
    """Check the files of a Hub folder: allowed names, code for every `auto_map`, one layout of weights, no
    paths.

    Raises:
        PublishError: Naming the file.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    foreign = [name for name in names if not ALLOWED_FILES.fullmatch(name)]
    if foreign:
        raise PublishError(f"{', '.join(foreign)} must not be published")
    if "model.safetensors" in names and "model.safetensors.index.json" in names:
        raise PublishError("both model.safetensors and shards are there; the single file would win on loading")
    for name in ("config.json", "processor_config.json"):
        if name in names:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            for entry in settings["auto_map"].values():
                if f"{entry.partition('.')[0]}.py" not in names:
                    raise PublishError(f"{name} refers to {entry}, whose file is not there")
    places = [*_places(), str(folder.parent)]
    for name in names:
        if name.endswith(".safetensors") or VOCABULARY_FILES.search(name):
            continue
        text = (folder / name).read_text(encoding="utf-8")
        for place in places:
            if re.search(re.escape(place) + r"""[/"'\s]""", text):
                raise PublishError(f"{name} contains {place}, a place on this machine")


def render_card(
    model: PreTrainedModel, record: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
) -> ModelCard:
    """Fill `model_cards/template.md` from the model's config, the record and what its writer adds.

    Args:
        model (`PreTrainedModel`): The model.
        record (`dict`, *optional*): Record of its run.
        context (`dict`, *optional*): As in [`write_hub_folder`].

    Returns:
        [`huggingface_hub.ModelCard`]: The card, with metadata that the Hub reads.

    Raises:
        ValueError: If the context has a key that the card does not know.
    """
    known = {
        "model_name": (record or {}).get("run", {}).get("recipe_name") or model.config.model_type.replace("_", "-"),
        "description": "",
        "language": "en",
        "training_data": training_sources(record or {}),
        "base_models": [],
        "reproduce": (record or {}).get("run", {}).get("command", ""),
        "example": _example(record or {}),
    }
    unknown = sorted(set(context or {}) - set(known))
    if unknown:
        raise ValueError(f"The card does not know {', '.join(unknown)}; expected some of {', '.join(known)}.")
    fields = {**known, **(context or {})}
    results = card_results(record or {})
    causal = "AutoModelForCausalLM" in AUTO_MAPS[model.config.model_type]
    metadata = ModelCardData(
        language=fields["language"],
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation" if causal else "feature-extraction",
        base_model=fields["base_models"] or None,
        tags=["memory", "context-compression", model.config.model_type, "custom_code"],
        model_name=fields["model_name"],
        eval_results=_metadata_results(results, fields["training_data"]) or None,
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **fields,
        metadata=metadata.to_yaml(),
        config=model.config,
        parameters=count_parameters(model),
        results=results,
        record=record or {},
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", content))


def training_sources(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Name, licence and source of the text that ships with the project, as far as a run trained on it.

    >>> files = {"train": {"training/corpora/wikinews/train.parquet": "6014..."}}
    >>> [source["licence"] for source in training_sources({"inputs": {"files": files}})]
    ['CC BY 2.5']
    """
    files = record.get("inputs", {}).get("files", {}).get("train", [])
    return [
        source
        for folder, source in SHIPPED_TEXT.items()
        if any(str(file).startswith(f"training/corpora/{folder}/") for file in files)
    ]


def _example(record: Mapping[str, Any]) -> str:
    """The sample of a run: a text, its memories, and what was regenerated from them."""
    if not record.get("sample"):
        return ""
    lines = "\n".join(sample_lines(record["sample"]))
    return f"From the run that made this model, on its test split:\n\n~~~~text\n{lines}\n~~~~"


def card_results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flatten the metrics of a record into the rows of a table: one for each suite and condition.

    >>> card_results({"metrics": {"copy": {"memory": {"token_accuracy": 0.98, "num_tokens": 100}}}})
    [{'suite': 'copy', 'condition': 'memory', 'token_accuracy': 0.98}]
    """
    shown = ("token_accuracy", "token_accuracy_interval", "exact_match", "loss", "information_ratio", "bits_per_byte")
    rows = []
    for suite, conditions in record.get("metrics", {}).items():
        if not isinstance(conditions, Mapping):
            continue
        for condition, values in conditions.items():
            if isinstance(values, Mapping) and any(name in values for name in shown):
                kept = {name: values[name] for name in shown if values.get(name) is not None}
                rows.append({"suite": suite, "condition": condition, **kept})
    return rows


def _metadata_results(results: list[dict[str, Any]], training_data: list[Mapping[str, str]]) -> list[EvalResult]:
    """The token accuracies with the right memories, as the Hub shows them beside a model."""
    name = ", ".join(source["name"] for source in training_data) or "held-out text"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{name}, test split ({row['suite']})",
            metric_type="token_accuracy",
            metric_value=row["token_accuracy"],
        )
        for row in results
        if row["condition"] == "memory" and "token_accuracy" in row
    ]


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters: `total`, `trainable`, and of each part of the model."""
    counts = {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
    parts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    return {**counts, **{name: count for name, count in parts.items() if count}}


def verify_hub_folder(
    folder: str | os.PathLike, model: PreTrainedModel | None = None, timeout: float = 1800
) -> dict[str, Any]:
    """Load a Hub folder in clean processes and compare it bit for bit with its writer.

    The processes cannot import this repository, have an empty cache and no network. One loads the folder by
    its path, one as a repository of the Hub cache: the library imports the code in different ways.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        model (`PreTrainedModel`, *optional*): The model that was written. By default it is read back from the
            folder here, which checks the loading but not the writing.
        timeout (`float`): Seconds for each process.

    Returns:
        `dict`: For `"folder"` and `"hub"`, the module the model came from, the Auto classes and the cases
        compared.

    Raises:
        ValueError: If the folder is incomplete.
        PublishError: If something does not load or differs.
    """
    folder = Path(folder).expanduser().resolve()
    check_complete(folder)
    check_files(folder)
    if model is None:
        model, _ = load_checkpoint(folder)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        _write_reference(folder, model, work / "reference.safetensors")
        home = work / "home"
        _write_cache_entry(folder, home / "hub" / "models--me--memory-model")
        return {
            kind: _run_clean(source, work, timeout)
            for kind, source in (("folder", str(folder)), ("hub", "me/memory-model"))
        }


def _write_reference(folder: Path, model: PreTrainedModel, path: Path) -> None:
    """Compute what the clean processes have to find again."""
    was_training = model.training
    device = next(model.parameters()).device
    if device.type != "cpu":  # another device computes other last bits
        model = model.__class__.from_pretrained(folder, attn_implementation=model.config._attn_implementation)
    processor = MemoryProcessor.from_pretrained(folder) if (folder / "processor_config.json").exists() else None
    request = None if processor is None else _processor_request(model.config, processor)
    cases = {"plain": _plain_inputs(model.config)}
    tensors = {}
    text = None
    if processor is not None and request is not None:
        cases["processor"] = dict(processor(**request, return_tensors="pt"))
        text = SAMPLE_TEXT
        tensors["tokenizer/input_ids"] = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    model.eval()
    for case, inputs in cases.items():
        tensors.update({f"inputs/{case}/{name}": tensor for name, tensor in inputs.items()})
        outputs = clean_process.compute(model, inputs)
        tensors.update({f"outputs/{case}/{name}": tensor for name, tensor in outputs.items()})
    model.train(was_training)
    settings = {
        "threads": torch.get_num_threads(),
        "attn_implementation": model.config._attn_implementation,
        "causal_lm": "AutoModelForCausalLM" in AUTO_MAPS[model.config.model_type],
        "processor": request,
        "text": text,
    }
    save_file(tensors, path, metadata={"settings": json.dumps(settings)})


def _plain_inputs(config: Any) -> dict[str, torch.Tensor]:
    """Two rows of ids, the second one left-padded; for a memory model long enough to fold and to roll over."""
    if config.model_type == "memory_encoder_decoder":
        num_tokens = 3 * config.window_length - 2 if config.self_memory else config.window_length - 2
    elif config.model_type == "memory_autoencoder":
        num_tokens = config.chunk_length
    else:
        num_tokens = 24
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and config.model_type != "memory_autoencoder":
        num_tokens = min(num_tokens, limit - clean_process.NEW_TOKENS)
    num_tokens = max(num_tokens, 2)
    special = {"pad_token_id", "bos_token_id", "eos_token_id", "memory_token_id", "copy_token_id", "blank_token_id"}
    taken = {getattr(config, name, None) for name in special}
    vocabulary = getattr(config, "vocab_size", None) or config.encoder.vocab_size
    ids = torch.tensor([token_id for token_id in range(vocabulary) if token_id not in taken])
    generator = torch.Generator().manual_seed(0)
    input_ids = ids[torch.randint(len(ids), (2, num_tokens), generator=generator)]  # (2, T)
    attention_mask = torch.ones_like(input_ids)
    if config.model_type != "memory_autoencoder":
        attention_mask[1, 0] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _processor_request(config: Any, processor: MemoryProcessor) -> dict[str, Any] | None:
    """Arguments of a processor call that the model can take; `None` if it has no slots."""
    if getattr(config, "memory_token_id", None) is None:
        return None
    capacity = config.memory_capacity
    num_chunks = 3 if capacity is None else min(3, capacity // config.memories_per_chunk)
    if num_chunks < 1:
        return None
    context = SAMPLE_CONTEXT[: num_chunks * config.chunk_length]  # a token has at least one of these characters
    return {"text": [SAMPLE_TEXT[:3], SAMPLE_TEXT[:2]], "context": [context, context[:1]], "padding_side": "left"}


def _write_cache_entry(folder: Path, entry: Path) -> None:
    """Lay a folder out as a downloaded repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit, encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            place = entry / "snapshots" / commit / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.symlink_to(path)
            except OSError:  # a file system without links
                shutil.copyfile(path, place)


def _run_clean(source: str, work: Path, timeout: float) -> dict[str, Any]:
    """Run `clean_process.py` on a source; return its report."""
    elsewhere = work / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS"))
    }
    environment = {
        **kept,
        "HF_HOME": str(work / "home"),
        "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="modules-", dir=work),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = str(Path(clean_process.__file__).resolve())
    command = [sys.executable, "-I", script, source, str(work / "reference.safetensors"), str(REPOSITORY)]
    try:
        result = subprocess.run(
            command,
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise PublishError(f"loading {source} in a clean process took more than {timeout:.0f} seconds") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise PublishError(f"{source} does not load as it was written: {lines[-1] if lines else 'no message'}")
    return json.loads(result.stdout.splitlines()[-1])


def load_checkpoint(folder: str | os.PathLike) -> tuple[PreTrainedModel, Any]:
    """Load a model of this package and its processor from a folder.

    Args:
        folder (`str` or `os.PathLike`): A checkpoint or a Hub folder.

    Returns:
        The model, and its [`MemoryProcessor`] or `None`.

    Raises:
        ValueError: If the folder is incomplete or holds another kind of model.
    """
    folder = Path(folder).expanduser()
    check_complete(folder)
    config = AutoConfig.from_pretrained(folder)
    auto_class = AutoModelForCausalLM if "AutoModelForCausalLM" in AUTO_MAPS[config.model_type] else AutoModel
    model = auto_class.from_pretrained(folder)
    processor = MemoryProcessor.from_pretrained(folder) if (folder / "processor_config.json").exists() else None
    return model, processor


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
    if config.get("model_type") not in AUTO_MAPS:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}; expected one of {', '.join(AUTO_MAPS)}"
        )
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
    if model.config.model_type not in AUTO_MAPS:
        raise ValueError(
            f"The model is of type {model.config.model_type!r}; expected one of {', '.join(AUTO_MAPS)}. "
            f"Publish others with their own `push_to_hub`."
        )
    if model.config.model_type == "memory_encoder_decoder" and not isinstance(processor, MemoryProcessor):
        raise ValueError(
            f"The processor is a {type(processor).__name__}; expected a MemoryProcessor, without which "
            f"nobody can build the model's inputs."
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"The weights are of several dtypes ({names}); on loading, one of them would win. Cast the model "
            f"first, for example by `model.float()`."
        )


def _check_replaceable(target: Path) -> None:
    """An empty or missing place, or an earlier Hub folder: nothing else may be overwritten."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give the name of a folder")
    names = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    foreign = [name for name in names if not ALLOWED_FILES.fullmatch(name)]
    if foreign or (names and "config.json" not in names):
        raise ValueError(
            f"{target} holds something else than a Hub folder ({(foreign or names)[0]}); give an empty or a new folder"
        )


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


def _copy_code(auto_map: Mapping[str, str], folder: Path) -> None:
    """Copy the files of the classes in `auto_map` and all that they import, flat."""
    roots = {f"{entry.partition('.')[0]}.py" for entry in auto_map.values()}
    files = {CODE / root for root in roots}
    for root in roots:
        files.update(Path(name) for name in get_relative_import_files(CODE / root))
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _edit_json(path: Path, edit: Any) -> None:
    edited = edit(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(edited, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(config: dict[str, Any], auto_map: Mapping[str, str]) -> dict[str, Any]:
    """A saved config with the full `auto_map`, and without the places its parts were loaded from."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in ("_name_or_path", "auto_map")}
        return value

    return {**strip(config), "auto_map": dict(auto_map)}


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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.publish",
        description="Write a checkpoint as a Hub folder, and load it back in clean processes.",
    )
    parser.add_argument("checkpoint", help="folder of a trained model: config, weights, processor")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="the Hub folder; an earlier one is replaced")
    parser.add_argument("--record", metavar="FILE", help="record of the run (default: record.json in CHECKPOINT)")
    parser.add_argument("--name", help="name of the model in its card (default: the recipe's)")
    options = parser.parse_args(arguments)
    try:
        record = _read_record(options.checkpoint, options.record)
        model, processor = load_checkpoint(options.checkpoint)
        context = {"model_name": options.name} if options.name else None
        print(f"writing {options.to} ...", flush=True)
        folder = write_hub_folder(model, processor, options.to, record, context)
        print("loading it in clean processes ...", flush=True)
        report = verify_hub_folder(folder, model)
    except (ValueError, OSError, PublishError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{options.to}: {size / 1e6:.1f} MB, loads bit for bit as folder and as repository")
    print(f"checked: {', '.join(report['hub']['loaded'])}, forward and generation")
    return 0


def _read_record(checkpoint: str, path: str | None) -> dict[str, Any] | None:
    file = Path(path).expanduser() if path else Path(checkpoint).expanduser() / "record.json"
    if not file.is_file():
        if path:
            raise ValueError(f"{path} is no file; give the record of the run, or leave --record out")
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no valid JSON ({error}); give the record of the run") from error


if __name__ == "__main__":
    sys.exit(main())
