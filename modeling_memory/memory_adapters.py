"""Low-rank adapters (LoRA, by peft) inside the parts of a memory model, saved and loaded with it."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PARTS = ("encoder", "decoder")


def adapter_targets(model: nn.Module, parts: Sequence[str] = ("decoder",)) -> list[str]:
    """Name the linear maps in the layers of some parts: what LoRA is put beside, whatever the family calls them.

    Args:
        model (`nn.Module`): A memory model.
        parts (`Sequence[str]`): `"encoder"`, `"decoder"` or both.

    Returns:
        `list` of `str`: Full module names, of peft's `target_modules`; token tables, heads and projector are not
        among them.

    Raises:
        ValueError: If a part is unknown or has no linear map in its layers.
    """
    names: list[str] = []
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"The part {part!r} is unknown; expected one of {', '.join(map(repr, PARTS))}.")
        body = getattr(model, part)
        stacks = [name for name, module in body.named_modules() if isinstance(module, nn.ModuleList)]
        found = [
            f"{part}.{name}"
            for name, module in body.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and any(name.startswith(f"{stack}.") for stack in stacks)
        ]
        if not found:
            raise ValueError(f"The {part}, a {type(body).__name__}, has no linear map in its layers to adapt.")
        names += found
    return names


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Walk through the modules that carry an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "unmerge"):
            yield name, module


def inject_adapters(model: nn.Module, adapters: dict[str, dict[str, Any]]) -> None:
    """Put the adapters of a configuration into a model that has none; the rest trains or not as before.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If a field is none of peft's `LoraConfig`.
    """
    if not adapters:
        return
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("This model has LoRA adapters, which need peft: `pip install peft`.") from error
    trains = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    for name, adapter in adapters.items():
        fields = {key: value for key, value in adapter.items() if key != "parts"}
        try:
            config = peft.LoraConfig(target_modules=adapter_targets(model, adapter["parts"]), **fields)
        except TypeError as error:
            raise ValueError(f"The adapter {name!r} cannot be made by peft's LoraConfig: {error}.") from error
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    for parameter in model.parameters():
        parameter.requires_grad_(trains.get(id(parameter), True))


@contextmanager
def adapters_on(decoder: nn.Module, sees_memories: bool | torch.Tensor) -> Iterator[None]:
    """Let the decoder's adapters act in the rows that see memories, inside this context."""
    yield


class MemoryAdapterMixin:
    """What a memory model does with adapters in its encoder and decoder."""

    config: Any
    decoder: PreTrainedModel

    def add_adapters(self, parts: Sequence[str] = ("decoder",), adapter_name: str = "default", **fields: Any) -> None:
        """Put LoRA into the encoder, the decoder or both, and freeze the weights beside it.

        Args:
            parts (`Sequence[str]`): `"encoder"`, `"decoder"` or both.
            adapter_name (`str`): Their name.
            fields: Fields of peft's `LoraConfig`, `r=8, lora_alpha=16` for example; `target_modules` are found.

        Raises:
            ImportError: If peft is not installed.
            ValueError: If there are adapters already or a field is unknown.

        Source: Hu et al. 2021, arXiv 2106.09685.
        """
        if self.config.adapters:
            raise ValueError(
                f"The model has the adapter {next(iter(self.config.adapters))!r} already. Merge it first "
                "(`merge_adapters(unload=True)`)."
            )
        model: Any = self
        adapter = {"parts": list(parts), **fields}
        inject_adapters(model, {adapter_name: adapter})
        self.config.adapters = {adapter_name: adapter}
        for part in adapter["parts"]:
            setattr(self.config, f"freeze_{part}", True)
            if part == "encoder":
                self.config.encoder_trained_from = None
        dtype = self.decoder.dtype  # one model, one dtype
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.data = parameter.data.to(dtype)
        model.apply_freezing()

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Read without adapters inside this context: the base weights alone, a teacher for example."""
        model: Any = self
        modules = [module for _, module in adapted_modules(model)]
        for module in modules:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in modules:
                module.enable_adapters(True)
            model.apply_freezing()  # switching on makes the adapters trainable, and nothing else may become so

    def merge_adapters(self, unload: bool = False) -> None:
        """Add the adapters to the weights beside them.

        Args:
            unload (`bool`): Whether to drop the adapters for good: the model then saves as any other. Without it
                [`unmerge_adapters`] takes them out again.
        """
        model: Any = self
        for name, module in list(adapted_modules(model)):
            if not module.merged:
                module.merge()
            if unload:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        if unload:
            self.config.adapters = {}

    def unmerge_adapters(self) -> None:
        """Take merged adapters out of the weights again."""
        model: Any = self
        for _, module in adapted_modules(model):
            if module.merged:
                module.unmerge()

    def _check_unmerged(self) -> None:
        model: Any = self
        if any(module.merged for _, module in adapted_modules(model)):
            raise ValueError(
                "The adapters are merged but still there, and would be added twice after loading. Call "
                "`unmerge_adapters()` or `merge_adapters(unload=True)` before saving."
            )


def base_state(part: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Give the state of a part without its adapters, under the names that it has without them."""
    return {
        name.replace(".base_layer.", "."): value for name, value in part.state_dict().items() if not is_adapter(name)
    }
