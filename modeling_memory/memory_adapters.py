"""Low-rank adapters (LoRA, by peft) inside the parts of a memory model, saved and loaded with it.

Adapters of the decoder act only in rows that see memories, so that tuning a decoder to read memories never changes
what it says of a text without them; those named by `memory_modules` only where memories stand, so that text keeps its
own keys and values. Those of the encoder always act.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PARTS = ("encoder", "decoder")
OWN_FIELDS = ("parts", "memory_modules")
"""Of an adapter's fields those that peft knows nothing of."""


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
    # Noted first, since peft freezes all that it does not put in.
    trains = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    for name, adapter in adapters.items():
        fields = {key: value for key, value in adapter.items() if key not in OWN_FIELDS}
        try:
            config = peft.LoraConfig(target_modules=adapter_targets(model, adapter["parts"]), **fields)
        except TypeError as error:
            raise ValueError(f"The adapter {name!r} cannot be made by peft's LoraConfig: {error}.") from error
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    decoder: Any = model.get_submodule("decoder")
    gate = RowGate()
    names = {name for adapter in adapters.values() for name in adapter.get("memory_modules") or ()}
    for name, module in adapted_modules(decoder):
        gate.watch(module, name.rpartition(".")[2] in names)
        decoder._adapter_rows = gate
    for parameter in model.parameters():
        parameter.requires_grad_(trains.get(id(parameter), True))


@dataclass(frozen=True)
class Where:
    """Where the adapters of a decoder act in one call.

    Attributes:
        rows (`torch.BoolTensor` of shape `(R,)`, or `bool`): The rows that see memories.
        memories (`torch.BoolTensor` of shape `(R, S)`, or `bool`): The columns in which memories stand.
    """

    rows: torch.Tensor | bool = True
    memories: torch.Tensor | bool = True

    def of(self, at_memories: bool) -> torch.Tensor | bool:
        """Return where a module's adapter acts: in whole rows, or at memories alone."""
        return self.memories if at_memories and self.rows is not False else self.rows


class RowGate:
    """Lets the adapters of a decoder act in some rows of a call only, or only where memories stand.

    One gate serves all adapted modules of a decoder. Two hooks a module do the work: one keeps what the module without
    its adapter gives, the other takes that for the places that are shut. So a shut row has the bits of the plain
    decoder, whatever kind of adapter peft has put there.

    Attributes:
        where ([`Where`]): Where the adapters act.
        modules (`list`): Each adapted module, and whether its adapter acts at memories alone.
    """

    def __init__(self) -> None:
        self.where = Where()
        self.modules: list[tuple[Any, bool]] = []

    def watch(self, module: Any, at_memories: bool) -> None:
        """Put the hooks on a module with an adapter."""
        self.modules.append((module, at_memories))
        kept: list[torch.Tensor] = []
        module.base_layer.register_forward_hook(functools.partial(_keep_base, self, at_memories, kept))
        module.register_forward_hook(functools.partial(_choose, self, at_memories, kept))

    @staticmethod
    def leave(base: nn.Module) -> None:
        """Take the hook off a module that has lost its adapter."""
        for key, hook in list(base._forward_hooks.items()):
            if getattr(hook, "func", None) is _keep_base:
                del base._forward_hooks[key]

    @contextmanager
    def open(self, where: Where) -> Iterator[None]:
        """Let the adapters act there inside this context; those that act nowhere are not computed."""
        before = self.where, [module._disable_adapters for module, _ in self.modules]
        self.where = where
        for module, at_memories in self.modules:
            if where.of(at_memories) is False:
                module._disable_adapters = True  # not by `enable_adapters`, which also changes what trains
        try:
            yield
        finally:
            self.where = before[0]
            for (module, _), disabled in zip(self.modules, before[1], strict=True):
                # As they were: someone may have switched them off around this call.
                module._disable_adapters = disabled


def _keep_base(
    gate: RowGate, at_memories: bool, kept: list[torch.Tensor], module: nn.Module, inputs: Any, output: torch.Tensor
) -> None:
    if isinstance(gate.where.of(at_memories), torch.Tensor):
        kept[:] = [output]


def _choose(
    gate: RowGate, at_memories: bool, kept: list[torch.Tensor], module: Any, inputs: Any, output: torch.Tensor
) -> torch.Tensor | None:
    """Take what the module gives with its adapter `(rows, columns, features)` where it acts only."""
    where = gate.where.of(at_memories)
    if not isinstance(where, torch.Tensor) or not kept:
        return None
    base = kept.pop()
    # Some families lay rows and columns in one dimension.
    flat = where.dim() == 2 and output.dim() == 2 and len(output) == where.numel()
    if output.shape[0] % len(where) or (where.dim() == 2 and not flat and output.shape[:2] != where.shape):
        raise ValueError(
            f"A {type(module).__name__} inside the decoder gives {tuple(output.shape)} for {len(where)} texts, so its "
            "adapter cannot be kept to what sees memories. Give `target_modules` without it."
        )
    # A decoder may be spread over devices, and each of its layers is asked where it is.
    where = where.to(output.device)
    where = where.flatten() if flat else where
    if where.dim() == 1:
        where = where.repeat_interleave(output.shape[0] // len(where))
    return torch.where(where.view(*where.shape, *[1] * (output.dim() - where.dim())), output, base)


def adapters_on(
    decoder: nn.Module, sees_memories: torch.Tensor | bool, memories: torch.Tensor | bool = True
) -> AbstractContextManager[None]:
    """Let the adapters of a decoder act only in rows that see memories, inside this context.

    Outside of it they act in all rows. Nothing is read from the device. What activation checkpointing computes again
    outside of the context is computed with the rows that it was computed with first.

    Args:
        decoder (`nn.Module`): The decoder of a memory model. One without adapters of [`add_adapters`], or with merged
            ones, which are weights as any others, is left as it is.
        sees_memories (`torch.BoolTensor` of shape `(rows,)`, or `bool`): The rows, in the order in which the decoder
            is given them; True or False for all.
        memories (`torch.BoolTensor` of shape `(R, S)`, or `bool`): The columns in which memories stand, for adapters
            that act there alone.

    Raises:
        ValueError: If the rows are neither a bool nor booleans in one dimension, or the columns in two.
    """
    if not isinstance(sees_memories, bool) and (sees_memories.dim() != 1 or sees_memories.dtype != torch.bool):
        raise ValueError(
            f"`sees_memories` is {sees_memories.dtype} of shape {tuple(sees_memories.shape)}; expected one boolean a "
            "row, or True or False for all."
        )
    if not isinstance(memories, bool) and (memories.dim() != 2 or memories.dtype != torch.bool):
        raise ValueError(
            f"`memories` is {memories.dtype} of shape {tuple(memories.shape)}; expected one boolean a row and column, "
            "or True or False for all."
        )
    gate: RowGate | None = getattr(decoder, "_adapter_rows", None)
    if gate is None or any(module.merged for module, _ in gate.modules):
        return nullcontext()
    return _open_in_layers(decoder, gate, Where(sees_memories, memories))


@contextmanager
def _open_in_layers(decoder: nn.Module, gate: RowGate, where: Where) -> Iterator[None]:
    """Open a gate now, and again whenever a layer is computed anew for its gradients."""

    def remember(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            def again(*given: Any, **named: Any) -> Any:
                with gate.open(where):
                    return layer(*given, **named)

            return checkpoint(again, *inputs, **options)

        return run

    # What checkpointing calls twice is a closure over this place: by the time of the backward pass the context has
    # ended, and another forward may have opened other rows.
    layers = decoder.modules() if torch.is_grad_enabled() else ()
    checkpointing: list[Any] = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    before = [module._gradient_checkpointing_func for module in checkpointing]
    for module, checkpoint in zip(checkpointing, before, strict=True):
        module._gradient_checkpointing_func = remember(checkpoint)
    try:
        with gate.open(where):
            yield
    finally:
        for module, checkpoint in zip(checkpointing, before, strict=True):
            module._gradient_checkpointing_func = checkpoint


def add_adapters(
    model: Any, parts: Sequence[str], adapter_name: str, fields: dict[str, Any], memory_modules: Sequence[str] = ()
) -> None:
    """Put LoRA into parts of a memory model, as its `add_adapters` says."""
    if model.config.adapters:
        raise ValueError(
            f"The model has the adapter {next(iter(model.config.adapters))!r} already. Merge it first "
            "(`merge_adapters(unload=True, all_rows=True)`)."
        )
    adapter: dict[str, Any] = {"parts": list(parts), **fields}
    if memory_modules:
        adapter["memory_modules"] = check_memory_modules(model, parts, memory_modules)
    inject_adapters(model, {adapter_name: adapter})
    # In the config, so that loading puts them in before it looks for their weights.
    model.config.adapters = {adapter_name: adapter}
    for part in adapter["parts"]:
        setattr(model.config, f"freeze_{part}", True)
        if part == "encoder":
            # Adapters take the place of layers that train whole.
            model.config.encoder_trained_from = None
    dtype = model.decoder.dtype  # one model, one dtype
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    model.apply_freezing()


def check_memory_modules(model: nn.Module, parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Refuse names of modules that none of the decoder's adapters has."""
    known = {name.rpartition(".")[2] for name in adapter_targets(model, ["decoder"])} if "decoder" in parts else set()
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"`memory_modules` names {', '.join(unknown)}; expected some of {', '.join(sorted(known)) or 'none'}, the "
            "linear maps in the decoder's layers that get adapters."
        )
    return list(names)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Switch all adapters of a memory model off inside this context."""
    modules = [module for _, module in adapted_modules(model)]
    for module in modules:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters(True)
        model.apply_freezing()  # switching on makes the adapters trainable, and nothing else may become so


def merge_adapters(model: Any, unload: bool, all_rows: bool) -> None:
    """Add the adapters of a memory model to the weights beside them, as its `merge_adapters` says."""
    if not all_rows and any(True for _ in adapted_modules(model.decoder)):
        raise ValueError(
            "Merged adapters of the decoder act in every row, also in texts without memories, which until now "
            "have the plain decoder's logits. Say `merge_adapters(all_rows=True)` if that is meant, or save the "
            "model with its adapters as they are."
        )
    for name, module in list(adapted_modules(model)):
        if not module.merged:
            module.merge()
        if unload:
            parent, _, child = name.rpartition(".")
            base = module.get_base_layer()
            # The base stays in use without its adapter, and would go on calling the hook.
            RowGate.leave(base)
            setattr(model.get_submodule(parent), child, base)
    if unload:
        vars(model.decoder).pop("_adapter_rows", None)
        model.config.adapters = {}


def unmerge_adapters(model: nn.Module) -> None:
    """Take merged adapters out of the weights again."""
    for _, module in adapted_modules(model):
        if module.merged:
            module.unmerge()


def check_unmerged(model: nn.Module) -> None:
    """Refuse to save adapters that are merged and still there."""
    if any(module.merged for _, module in adapted_modules(model)):
        raise ValueError(
            "The adapters are merged but still there, and would be added twice after loading. Call "
            "`unmerge_adapters()` or `merge_adapters(unload=True, all_rows=True)` before saving."
        )


def base_state(part: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Give the state of a part without its adapters, under the names that it has without them."""
    return {
        name.replace(".base_layer.", "."): value for name, value in part.state_dict().items() if not is_adapter(name)
    }
