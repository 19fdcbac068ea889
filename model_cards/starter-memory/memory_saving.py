"""Saving by reference: what was trained, and the names and hashes of the pretrained models that it stands on.

A folder saved so holds `trained.safetensors` and a `config.json` whose `references` say, for encoder and decoder,

- `id`, `revision`, `subfolder`: where the base is found on the Hub (`null` for one that came from a folder, which is
  named when loading: no place of a machine is saved);
- `dtype`: what it is loaded in;
- `sha256`: of the names, shapes and bytes of all its tensors that are not in the folder.

A weight that is not the base's, bit for bit, is in the folder; so nothing trained is lost, whatever was frozen when.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

from .memory_adapters import PARTS, base_state
from .memory_parts import HUB_OPTIONS, load_decoder, load_encoder

TRAINED = "trained.safetensors"
BASE_OPTIONS: tuple[str, ...] = ("token", "cache_dir", "local_files_only", "device_map", "attn_implementation")
OPTIONS = {*HUB_OPTIONS, *BASE_OPTIONS, "subfolder", "config", "dtype", "output_loading_info", "adapter_kwargs"}
"""What loading by reference takes; `dtype` is that of the result, the bases are compared in the dtype saved."""


def state_hash(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors, whatever their order and files."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_base(part: str, source: Any, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """Load the encoder or decoder that a model stands on, its parameters in `dtype`."""
    base = load_encoder(source, **kwargs)[0] if part == "encoder" else load_decoder(source, **kwargs)
    if base.config.model_type == "memory_autoencoder":
        base = base.encoder
    for parameter in base.parameters():  # buffers, such as rotary frequencies, keep their precision
        parameter.data = parameter.data.to(dtype)
    return base


def save_by_reference(model: Any, folder: str | os.PathLike, bases: dict[str, Any]) -> None:
    """Save what differs from the bases, and how to find them.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model.
        folder (`str` or `os.PathLike`): Where to.
        bases (`dict`): For `"encoder"` and `"decoder"` the Hub id, folder or model that it came from, or what the
            model remembers of it, a pair of that and loading options. A part without an entry is saved by value.

    Raises:
        ValueError: If no base is known, or one that the caller named shares no tensor with the part.
    """
    if not bases:
        raise ValueError(
            "Nothing is known about where encoder and decoder came from, because they were given as models. Name "
            "them: `by_reference={'decoder': id_or_folder}`."
        )
    references, trained = {}, model.state_dict()
    named = {part for part, known in bases.items() if not isinstance(known, tuple)}
    for part, known in bases.items():
        source, options = known if isinstance(known, tuple) else (known, {})
        body = getattr(model, part)
        base = load_base(part, source, next(body.parameters()).dtype, **options)
        base_tensors, own = base.state_dict(), base_state(body)
        same = {
            name: value
            for name, value in base_tensors.items()
            if name in own and own[name].shape == value.shape and torch.equal(own[name].to(value), value)
        }
        if all(value.ndim < 2 for value in same.values()):  # norms of any two models may agree: they all begin as ones
            same = {}
        if not same and part in named:
            raise ValueError(f"No weight of the {part} is that of {source!r}; it is not its base. Name another one.")
        if not same:
            continue  # trained in all its weights: there is nothing to refer to
        for name in list(trained):
            if name.removeprefix(f"{part}.").replace(".base_layer.", ".") in same and name.startswith(f"{part}."):
                del trained[name]
        on_hub = isinstance(source, str) and not os.path.isdir(source)
        references[part] = {
            "id": source if on_hub else None,
            "revision": (getattr(base.config, "_commit_hash", None) or options.get("revision")) if on_hub else None,
            "subfolder": options.get("subfolder") if on_hub else None,
            "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
            "sha256": state_hash(same),
        }
    model.config.references = references
    Path(folder).mkdir(parents=True, exist_ok=True)
    for old in (*Path(folder).glob("model*.safetensors*"), Path(folder) / TRAINED):
        old.unlink(missing_ok=True)  # no stale weights file may win
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in trained.items()}
    save_file(tensors, Path(folder) / TRAINED, metadata={"format": "pt"})


def load_by_reference(
    model_class: Any, source: str, config: Any, given: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Load the bases that a config refers to, check them, and put what was trained on top.

    Args:
        model_class (`type`): The class to build.
        source (`str`): Folder or Hub id of what was saved by reference.
        config ([`MemoryEncoderDecoderConfig`]): Its config, with `references`.
        given (`dict`): `"encoder"` and `"decoder"`, bases given by the caller instead of those referred to.
        kwargs (`dict`): Of `from_pretrained`: Hub options of the folder; `device_map` and `attn_implementation` of the
            bases.

    Raises:
        ValueError: If a base is not named, or has changed since, or an option is not known.
    """
    unknown_options = sorted(name for name in kwargs if name not in OPTIONS and not name.startswith("_"))
    if unknown_options:
        raise ValueError(
            f"A model saved by reference takes no {', '.join(unknown_options)} on loading; expected some of "
            f"{', '.join(sorted(OPTIONS))}. Load it and save it by value for all options of the library."
        )
    bases = {}
    for part, reference in config.references.items():
        base_source = given.get(part) or reference["id"]
        if base_source is None:
            raise ValueError(
                f"The {part} is saved by reference to a base that came from no Hub id. Say where it is: "
                f"`from_pretrained(folder, {part}_base=folder_or_id)`."
            )
        options: dict[str, Any] = {name: kwargs[name] for name in BASE_OPTIONS if name in kwargs}
        if given.get(part) is None:
            options |= {name: reference[name] for name in ("revision", "subfolder") if reference[name]}
        bases[part] = load_base(part, base_source, getattr(torch, reference["dtype"]), **options)
    hub = {
        name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs and name != "trust_remote_code"
    }
    trained = load_file(cached_file(source, TRAINED, **hub))
    for part, base in bases.items():
        own = {
            name.removeprefix(f"{part}.").replace(".base_layer.", ".")
            for name in trained
            if name.startswith(f"{part}.")
        }
        omitted = {name: value for name, value in base.state_dict().items() if name not in own}
        if state_hash(omitted) != config.references[part]["sha256"]:
            place = given.get(part) or config.references[part]["id"]
            place = type(place).__name__ if isinstance(place, PreTrainedModel) else place
            raise ValueError(
                f"The base of the {part} ({place}) has other weights than when this model was saved (sha256 "
                f"{state_hash(omitted)[:12]} instead of {config.references[part]['sha256'][:12]}). Give the base and "
                "revision that it was trained on."
            )
    config = model_class.config_class.from_dict(config.to_dict())
    model = model_class(config, **bases)
    dtype = next(iter(trained.values())).dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else parameter.dtype)
    unknown = set(trained) - set(model.state_dict())
    missing = {name for name in model.state_dict() if name.split(".")[0] not in bases} - set(trained)
    if unknown or missing:
        raise ValueError(f"{TRAINED} does not fit its config: unknown {sorted(unknown)}, missing {sorted(missing)}.")
    model.load_state_dict(trained, strict=False)
    model.tie_weights()
    wanted = kwargs.get("dtype")
    if wanted in (None, "auto"):
        wanted = config.dtype  # earlier releases of the library hand `dtype` over in the config
    if wanted is not None:
        wanted = getattr(torch, str(wanted).removeprefix("torch."))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wanted if parameter.is_floating_point() else parameter.dtype)
        model.config.dtype = wanted
    if model.can_generate():
        with contextlib.suppress(OSError):  # a folder without them has the config's, as in the library
            model.generation_config = GenerationConfig.from_pretrained(source, **hub)
    return model.eval()


def check_older_weights(folder: str | os.PathLike, repo_id: str, revision: str | None, token: Any) -> None:
    """Refuse to push shards beside a single file of an earlier push: it wins on loading, and a push deletes nothing.

    Raises:
        ValueError: Naming the remedy.
    """
    if not os.path.isfile(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
        return
    try:
        older = has_file(repo_id, SAFE_WEIGHTS_NAME, revision=revision, token=token)
    except OSError:  # a branch that is not there begins as main
        older = has_file(repo_id, SAFE_WEIGHTS_NAME, token=token)
    if older:
        raise ValueError(
            f"{repo_id} holds a {SAFE_WEIGHTS_NAME} of an earlier push, which would win over these shards on loading. "
            f"Delete it, as `huggingface_hub.delete_file({SAFE_WEIGHTS_NAME!r}, {repo_id!r})` does, or raise "
            "`max_shard_size`. Nothing was uploaded."
        )


__all__ = ["PARTS", "TRAINED", "check_older_weights", "load_by_reference", "save_by_reference", "state_hash"]
