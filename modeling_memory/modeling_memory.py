"""The memory encoder-decoder: a frozen encoder turns chunks into memories, a decoder reads them as input embeddings.

```
 context or earlier windows   x x x x | x x x x | x x x x        (B, C, L) token ids
                                 |         |         |
                              encoder   encoder   encoder         each chunk alone, from position 0
                                 |         |         |            memory states (B, C*K, E)
                              projector projector projector
                                 |         |         |
 decoder input                  m_0       m_1       m_2  y y y y   memory embeds (B, C*K, D), then the window's text
                                                         | | | |
 decoder output                                          logits    (B, T, V)
```

Letters: B batch, T text tokens, C chunks, L chunk length, K memories per chunk, M memories of a text, E encoder width,
D decoder width, V vocabulary.

Source: Badger 2026, arXiv 2602.13466, chunked memory model.
"""

import copy
import inspect
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

# Unused names: transformers before 5.8 copies from a local folder only the files that this one imports itself.
from .configuration_checks import Fields  # noqa: F401
from .configuration_masked_mixer import MaskedMixerConfig
from .configuration_memory import AUTO_MAP, MemoryEncoderDecoderConfig
from .generation_memory import MemoryGenerationMixin
from .memory_adapters import MemoryAdapterMixin, adapted_modules, adapters_on, inject_adapters, is_adapter
from .memory_cache import Memories, MemoryCache, ReadMark, cut_columns, join_rows, mark_cache, mark_of, share_columns
from .memory_checkpoint import TRAINED, load_whole, refuse_a_missing_part, save_whole
from .memory_checks import (
    Call,
    Facts,
    budget_of,
    check_call,
    check_capacity,
    check_context_data,
    check_empty,
    check_flat_mask,
    check_in_full,
    check_no_past,
    check_own_cache,
    check_positions,
    check_rolling,
    check_room,
    check_spelling,
    check_view,
    check_windows,
    is_compiling,
    read_once,
)
from .memory_embeds import prompt_embeds
from .memory_encoder import MemoryProjector, build_encoder, build_pooling, encode_chunks, initialize_leaf
from .memory_layout import (
    Layout,
    Text,
    front_of_memories,
    lay_context,
    lay_front,
    lay_plain,
    lay_slots,
    lay_step,
    lay_windows,
    no_memories,
    open_plain,
    tokens_of_memories,
)
from .memory_parts import (
    HUB_OPTIONS,
    check_decoder,
    embedding_scale,
    identity_gain,
    keep_existing_plans,
    layers_from,
    load_parts,
)
from .memory_saving import PARTS, check_older_weights, is_quantized, load_by_reference, trained_state
from .modeling_masked_mixer import MaskedMixerForCausalLM
from .pipeline_memory import CUSTOM_PIPELINES

TOKENS_PER_GROUP = {"cpu": 4096}
"""Most tokens, memories among them, that are read at a time where no gradient is asked for, by type of device."""
TOKENS_PER_GROUP_ELSEWHERE = 65536
"""The same on other devices, which want large batches: bounds memory only."""
FEW_TOKENS = 4096
"""So many are read at once on any device."""
LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels")


@dataclass
class MemoryModelOutput(ModelOutput):
    """What [`MemoryEncoderDecoderModel`] returns.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`): The decoder's states in the columns of the text.
        past_key_values (`Cache`, *optional*): What the next call continues from.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, T, D)`, *optional*): States of all layers.
        attentions (`tuple`, *optional*): The decoder's attentions, for a text of one window.
        memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`, *optional*): The memories that were read.
        memory_mask (`torch.LongTensor` of shape `(B, M)`, *optional*): 1 for present memories.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    memory_embeds: torch.FloatTensor | None = None
    memory_mask: torch.LongTensor | None = None


@dataclass
class MemoryCausalLMOutputWithPast(ModelOutput):
    """What [`MemoryEncoderDecoderForCausalLM`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Nats per target token.
        logits (`torch.FloatTensor` of shape `(B, T, V)`): Scores of the token that follows each column.
        past_key_values (`Cache`, *optional*): What the next call continues from.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, T, D)`, *optional*): States of all layers.
        attentions (`tuple`, *optional*): The decoder's attentions, for a text of one window.
        memory_embeds (`torch.FloatTensor` of shape `(B, M, D)`, *optional*): The memories that were read.
        memory_mask (`torch.LongTensor` of shape `(B, M)`, *optional*): 1 for present memories.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    memory_embeds: torch.FloatTensor | None = None
    memory_mask: torch.LongTensor | None = None


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a fresh causal LM; the package's own by name: in a folder of code the registry holds none of it."""
    if config.model_type == MaskedMixerConfig.model_type:
        return MaskedMixerForCausalLM._from_config(config)
    return AutoModelForCausalLM.from_config(config)


class MemoryPreTrainedModel(PreTrainedModel):
    """What the memory models share: loading, freezing, initialisation."""

    config_class = MemoryEncoderDecoderConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryProjector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for modules with parameters of their own only. Those of encoder and decoder follow their own rules.
        if isinstance(module, nn.Embedding):  # places in the window
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif any(module is leaf for leaf in self.projector.modules()):
            self.projector.initialize_leaf(module, self.config.initializer_range)
        else:
            initialize_leaf(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does, and freeze what its config says is frozen.

        Of a model saved by reference the bases are loaded from where they came from, the Hub or an installed Python
        package; `encoder_base` and `decoder_base` name another place (id, folder, package or model), and must where a
        base came from a folder. Their hashes are checked.

        Raises:
            ValueError: If weights are missing or do not fit, unless `output_loading_info` asks for their names; if a
                base is not named, not installed, or not the one that the model was trained on.
        """
        given = {part: kwargs.pop(f"{part}_base") for part in PARTS if f"{part}_base" in kwargs}
        config = kwargs.get("config")
        if config is None and args and isinstance(args[0], (str, os.PathLike)):
            hub = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
            config = cls.config_class.from_pretrained(args[0], **hub)
        if config is not None and getattr(config, "references", None) and args:
            loaded = load_by_reference(cls, str(args[0]), config, given, kwargs)
            if kwargs.get("output_loading_info"):
                loaded = loaded, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        elif given:
            raise ValueError(
                f"`{next(iter(given))}_base` was given, but {args[0]} holds all its weights. Leave it out; "
                "`from_encoder_decoder_pretrained` joins other parts."
            )
        else:
            loaded = load_whole(super().from_pretrained, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).apply_freezing()
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        by_reference: bool | dict[str, Any] = False,
        **kwargs: Any,
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, with an `auto_map` that every Auto class finds.

        Whatever stops a save, the folder holds the model that it held before.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            args: As in the library.
            by_reference (`bool` or `dict`): Whether to save only what differs from the pretrained encoder and decoder,
                and ids, revisions and hashes of these. A dictionary names the place of `"encoder"`, `"decoder"` or
                both; a part that it leaves out is saved by value.
            kwargs: As in the library.

        Raises:
            ValueError: If adapters are merged and still there, a part is not what it is said to come from, or
                quantised weights would have to be saved by value.
            OSError: If a base cannot be reached, or what the system says of a full disk.
        """
        if by_reference and kwargs.get("push_to_hub"):
            raise ValueError(
                "`push_to_hub` uploads no model by reference. Save it, and publish the folder with "
                "`huggingface_hub.upload_folder` or `python -m training.publish --by-reference`."
            )
        self._check_unmerged()
        state: dict[str, torch.Tensor] = {}
        references: dict[str, dict[str, Any]] = {}
        if by_reference:
            references, state = trained_state(self, self._bases if by_reference is True else dict(by_reference))
        packed = [part for part in PARTS if part not in references and is_quantized(getattr(self, part))]
        if packed:
            raise ValueError(
                f"The weights of the {packed[0]} are quantised, and a folder by value would hold them in a form that "
                "nobody loads. Save by reference: `save_pretrained(folder, by_reference=True)`."
            )
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
        for child in (self.config.encoder, self.config.decoder):  # their code is reached through the model's own
            vars(child).pop("auto_map", None)
            child._name_or_path = ""
        self.config.references = references
        try:
            save_whole(self._write, save_directory, *args, trained=state if by_reference else None, **kwargs)
        finally:
            self.config.references = {}

    def _write(self, folder: Path, *args: Any, trained: dict[str, torch.Tensor] | None, **kwargs: Any) -> None:
        """Write by the library what belongs into a folder; by reference, `trained` instead of all weights."""
        if trained is None:
            super().save_pretrained(folder, *args, **kwargs)
            return
        # The library writes code, config and generation config; it is given no weights to write.
        super().save_pretrained(folder, *args, **{**kwargs, "state_dict": {}})
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        if (folder / "config.json").exists():  # this process is the one that writes
            save_file(trained, folder / TRAINED, metadata={"format": "pt"})

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        refuse_a_missing_part(self, missing_keys, PARTS)
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload as the library does, but never shards beside an older single file, which would win on loading."""
        check_older_weights(working_dir, repo_id, kwargs.get("revision"), kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class MemoryEncoderDecoderModel(MemoryAdapterMixin, MemoryPreTrainedModel):
    """A memory encoder-decoder without language modelling loss: it returns the decoder's hidden states.

    Its parameters have the names of [`MemoryEncoderDecoderForCausalLM`], head included, so that one folder serves
    both.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The architecture.
        encoder (`PreTrainedModel`, *optional*): A ready encoder body to use instead of a fresh one.
        decoder (`PreTrainedModel`, *optional*): A ready causal LM to use instead of a fresh one.
    """

    def __init__(
        self,
        config: MemoryEncoderDecoderConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder, config.encoder_layers) if encoder is None else encoder
        self.pooling = build_pooling(
            config.pooling, config.memories_per_chunk, config.encoder.hidden_size, config.max_group
        )
        self.projector = MemoryProjector(config)
        self.decoder = build_decoder(config.decoder) if decoder is None else decoder
        self.window_positions = None
        if config.window_positions:
            self.window_positions = nn.Embedding(config.num_places, config.decoder.hidden_size)
        # One object a config: what is set on the child (attention implementation, vocabulary size) is set here too.
        self.config.encoder, self.config.decoder = self.encoder.config, self.decoder.config
        arguments = inspect.signature(self.decoder.forward).parameters
        self._takes_position_ids = "position_ids" in arguments
        self._takes_logits_to_keep = "logits_to_keep" in arguments
        check_decoder(self.decoder)
        self._bases: dict[str, Any] = {}  # where encoder and decoder came from
        self._known_bases: dict[str, Any] = {}  # their hashes, once they were read for a save
        self.post_init()
        keep_existing_plans(self)
        inject_adapters(self, config.adapters)  # after it, since peft draws adapters by its own rule, one half zeros
        self.apply_freezing()

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's token table."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token table."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's language modelling head."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's language modelling head."""
        self.decoder.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the decoder's table as the library does, and the encoder's with it if both read the same ids."""
        table = super().resize_token_embeddings(*args, **kwargs)
        encoder_rows = getattr(self.config.encoder, "vocab_size", None)
        if self.config.self_memory and encoder_rows is not None and encoder_rows < table.weight.shape[0]:
            self.encoder.resize_token_embeddings(
                table.weight.shape[0], mean_resizing=kwargs.get("mean_resizing", True)
            )
        self.apply_freezing()
        return table

    def apply_freezing(self) -> None:
        """Freeze the encoder and the decoder as `config.freeze_encoder` and `config.freeze_decoder` say.

        A frozen part has no gradients, token table included, and stays in `eval()` also after `model.train()`; its
        adapters train.
        """
        for part, frozen in (
            (self.encoder, self.config.freeze_encoder),
            (self.decoder, self.config.freeze_decoder),
        ):
            for name, parameter in part.named_parameters() if frozen else ():
                parameter.requires_grad_(is_adapter(name))
        for layer in self._thawed_layers():
            layer.requires_grad_(True)
        self.train(self.training)

    def _thawed_layers(self) -> list[nn.Module]:
        """Return the layers of a frozen encoder that train all the same."""
        first = self.config.encoder_trained_from
        return [] if first is None else layers_from(self.encoder, first)

    def train(self, mode: bool = True) -> "MemoryEncoderDecoderModel":
        """Set training mode, except in frozen parts."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        if self.config.freeze_decoder:
            self.decoder.eval()
        for layer in self._thawed_layers():
            layer.train(mode)
        for _, module in adapted_modules(self):
            module.lora_dropout.train(mode)
        return self

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | os.PathLike | PreTrainedModel,
        decoder: str | os.PathLike | PreTrainedModel,
        encoder_kwargs: dict | None = None,
        decoder_kwargs: dict | None = None,
        encoder_layers: int | None = None,
        **config: Any,
    ) -> Any:
        """Join a pretrained encoder and a pretrained decoder by a fresh projector.

        The projector starts at the scale at which the decoder's layers see its tokens. Of a model with a head, of a
        T5 or of a memory autoencoder given as encoder the body is taken. An autoencoder also sets `chunk_length`,
        `memories_per_chunk`, `pooling` and, if it has a bottleneck, the projector's; a sentence-transformers folder
        sets `pooling` and `projector_norm`. The encoder is cast to the decoder's dtype, so that what is saved is what
        is loaded.

        Args:
            encoder (`str`, `os.PathLike` or `PreTrainedModel`): Hub id, folder, `"package:NAME"` of an installed
                Python package that carries weights, or model.
            decoder (`str`, `os.PathLike` or `PreTrainedModel`): The same; a causal LM.
            encoder_kwargs (`dict`, *optional*): Passed to the encoder's `from_pretrained`: `revision`, `dtype`,
                `device_map`, `attn_implementation`, `token`, `gguf_file` and so on. The weights of a GGUF file are
                unpacked to `dtype`, unless a `quantization_config` asks for them as they are.
            decoder_kwargs (`dict`, *optional*): Passed to the decoder's `from_pretrained` likewise.
            encoder_layers (`int`, *optional*): How many of its first layers to take of the encoder; 0 takes its token
                table alone, without the norm at its end. Default: all.
            config: Fields of [`MemoryEncoderDecoderConfig`]. `memory_token_id` is by default the id just after the
                decoder's table, and `self_memory` holds if the encoder knows as many ids as the decoder.

        Returns:
            The model, in `eval()` mode.

        Raises:
            ValueError: If the parts do not fit each other, or one of them cannot be such a part.
            OSError: What the library raises for an id or folder that it cannot load.
        """
        sources = {"encoder": (encoder, encoder_kwargs or {}), "decoder": (decoder, decoder_kwargs or {})}
        encoder, decoder, fields = load_parts(
            encoder, decoder, sources["encoder"][1], sources["decoder"][1], encoder_layers
        )
        autoencoder = encoder if encoder.config.model_type == "memory_autoencoder" else None
        if autoencoder is not None:
            encoder, fields = autoencoder.encoder, _autoencoder_fields(autoencoder)
        config = {**fields, **config, "encoder_layers": encoder_layers}
        # The places the parts came from are of no use to whoever loads the joined model.
        encoder.config._name_or_path = decoder.config._name_or_path = ""
        vocabularies = getattr(encoder.config, "vocab_size", None), decoder.config.vocab_size
        config.setdefault("memory_token_id", decoder.config.vocab_size)  # just after the table: no text uses it
        config.setdefault("self_memory", vocabularies[0] is not None and vocabularies[0] >= vocabularies[1])
        encoder.requires_grad_(True)  # an autoencoder may have frozen it; here the joined config decides
        joined = cls.config_class(encoder=encoder.config, decoder=decoder.config, **config)
        model = cls(joined, encoder=encoder, decoder=decoder)
        model._bases = {part: base for part, base in sources.items() if not isinstance(base[0], PreTrainedModel)}
        model.eval()._start_between(autoencoder)
        if model.can_generate():
            model.generation_config = copy.deepcopy(decoder.generation_config)
        return model

    @torch.no_grad()
    def _start_between(self, autoencoder: Any) -> None:
        """Cast and draw what stands between two pretrained parts, at the scale of the decoder's embeddings."""
        encoder = () if is_quantized(self.encoder) else self.encoder.parameters()
        fresh = [module for module in (self.pooling, self.projector, self.window_positions) if module is not None]
        for module in fresh:
            module.to(self.decoder.device)
        for parameter in (*encoder, *(parameter for module in fresh for parameter in module.parameters())):
            # Parameters only: buffers, such as rotary frequencies, keep their precision.
            parameter.data = parameter.data.to(self.decoder.dtype)
        scale = embedding_scale(self.decoder)
        gain = scale
        if self.config.projector_start == "identity_on_last":
            gain = identity_gain(self.encoder, self.projector.norm, self.decoder)
        self.projector.initialize(gain)
        if self.window_positions is not None:
            self.window_positions.weight.normal_(std=scale)
        if autoencoder is None:
            return
        if type(autoencoder.pooling) is type(self.pooling):
            self.pooling.load_state_dict(autoencoder.pooling.state_dict())
        if autoencoder.bottleneck is not None and self.config.projector_type == "bottleneck":
            self.projector.down.load_state_dict(autoencoder.bottleneck.down.state_dict())
            self.projector.up.load_state_dict(autoencoder.bottleneck.up.state_dict())

    def encode_memories(
        self,
        context_input_ids: torch.LongTensor,
        context_attention_mask: torch.LongTensor | None = None,
        num_memories: int | torch.LongTensor | None = None,
        return_num_tokens: bool = False,
    ) -> tuple[torch.FloatTensor, torch.LongTensor] | tuple[torch.FloatTensor, torch.LongTensor, torch.LongTensor]:
        """Turn the chunks of each context into memories in decoder width.

        Chunks do not see each other. The result may be kept, stored, repeated for many prompts and passed to `forward`
        or `generate`.

        Args:
            context_input_ids (`torch.LongTensor` of shape `(B, C, L)`): Encoder token ids.
            context_attention_mask (`torch.LongTensor` of shape `(B, C, L)`, *optional*): 1 for tokens, 0 for padding.
                A chunk of zeros only is an absent chunk.
            num_memories (`int` or `torch.LongTensor` of shape `(B, C)`, *optional*): A smaller budget than K for each
                chunk: exactly so many memories for every context, spread over its chunks, or the number for each
                chunk, 0 for absent ones.
            return_num_tokens (`bool`): Whether to return as well how many tokens each memory stands for, which
                `memory_positions="source"` asks for.

        Returns:
            `memory_embeds` (`torch.FloatTensor` of shape `(B, M, D)`) and `memory_mask` (`torch.LongTensor` of shape
            `(B, M)`, 1 for present memories), M being C*K or with a budget the most that a row needs; with
            `return_num_tokens` also `memory_num_tokens` (`torch.LongTensor` of shape `(B, M)`). Absent memories are
            zero.

        Raises:
            ValueError: If the shapes differ, a chunk is longer than the encoder takes, an id is outside its
                vocabulary, or a budget is none or above K for some chunk.
        """
        facts = check_context_data(self.config, context_input_ids, context_attention_mask, num_memories)
        memories = self._encode_context(context_input_ids, context_attention_mask, num_memories, facts)
        if return_num_tokens:
            return memories.embeds, memories.mask, memories.num_tokens
        return memories.embeds, memories.mask

    def _encode_context(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        num_memories: int | torch.Tensor | None,
        facts: Facts | None,
    ) -> Memories:
        """Encode checked contexts `(B, C, L)`, all chunks in one batch."""
        counts, width = num_memories, None if facts is None else facts.num_budget
        if counts is not None and not isinstance(counts, torch.Tensor):
            counts, width = budget_of(self.config, ids, counts, facts, mask), num_memories
        present = None if facts is None else facts.present
        shape = (ids.shape[0], ids.shape[1], ids.shape[2])
        layout = lay_context(self.config, shape, mask, counts, present, width, ids.device)
        chunk_ids, chunk_mask = ids.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        if layout.chunks is not None and chunk_mask is not None:
            chunk_ids, chunk_mask = chunk_ids[layout.chunks], chunk_mask[layout.chunks]
        embeds = self._encode(chunk_ids, chunk_mask, layout.num_memories).flatten(0, 1)  # (N * K, D)
        if len(embeds) == 0:
            embeds = embeds.new_zeros(1, embeds.shape[1])
        embeds = embeds[layout.place].masked_fill(layout.mask[..., None] == 0, 0)  # (B, M, D)
        none = torch.zeros_like(layout.mask[:, :0].sum(1))
        return Memories(embeds, layout.mask, layout.num_tokens, layout.mask.sum(1), none)

    def _encode(
        self, chunk_ids: torch.Tensor, chunk_mask: torch.Tensor | None, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode chunks `(N, L)` into memories `(N, K, D)`; the encoder runs once for all, or for each group."""
        if len(chunk_ids) == 0:
            shape = 0, self.config.memories_per_chunk, self.config.decoder.hidden_size
            return torch.zeros(shape, dtype=self.decoder.dtype, device=chunk_ids.device)
        groups, parts = [slice(0, len(chunk_ids))], []
        if chunk_ids.numel() > FEW_TOKENS and not torch.is_grad_enabled():
            groups = row_groups(len(chunk_ids), chunk_ids.shape[1], chunk_ids.device)
        for part in groups:
            mask = None if chunk_mask is None else chunk_mask[part]
            number = None if num_memories is None else num_memories[part]
            parts.append(encode_chunks(self.encoder, self.pooling, chunk_ids[part], mask, number, True, self.config))
        return self.projector(torch.cat(parts).to(self.decoder.dtype))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: torch.LongTensor | None = None,
        memory_embeds: torch.FloatTensor | None = None,
        memory_mask: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        context_num_memories: torch.LongTensor | None = None,
        memory_num_tokens: torch.LongTensor | None = None,
        rolling_memory: bool | None = None,
        **kwargs: Any,
    ) -> MemoryModelOutput | tuple:
        """Read a text; arguments and modes are those of [`MemoryEncoderDecoderForCausalLM.forward`].

        Returns:
            [`MemoryModelOutput`]: Hidden states in the columns of the text, memories and cache.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        call = Call(
            Text(input_ids, attention_mask, inputs_embeds, position_ids, tokens),
            context_input_ids, context_attention_mask, context_num_memories, memory_embeds, memory_mask,
            memory_num_tokens, past_key_values,
            rolling_memory=rolling_memory,
            has_memories=context_input_ids is not None or memory_embeds is not None,
        )  # fmt: skip
        output = self._read(call, use_cache, output_hidden_states, output_attentions, kwargs, head=False)
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _read(
        self,
        call: Call,
        use_cache: bool | None,
        output_hidden_states: bool | list[int] | None,
        output_attentions: bool | None,
        unknown: dict[str, Any],
        head: bool,
    ) -> MemoryModelOutput:
        """Read one call: memories of the context, layout, one call of the decoder, features laid back.

        Args:
            call ([`Call`]): The arguments of `forward`.
            use_cache (`bool`, *optional*): Whether to return a cache.
            output_hidden_states (`bool` or `list` of `int`, *optional*): As in the library.
            output_attentions (`bool`, *optional*): As in the library.
            unknown (`dict`): Keywords that `forward` does not know.
            head (`bool`): Whether the features are logits rather than hidden states.

        Returns:
            [`MemoryModelOutput`], whose `last_hidden_state` holds the features.
        """
        if unknown and not torch.compiler.is_compiling():
            check_spelling(unknown, [*inspect.signature(self.forward).parameters, *LOSS_KEYWORDS])
        keeps_all = self.decoder.training and is_checkpointing(self.decoder)
        if keeps_all:
            check_empty(call.cache)
            call, use_cache = replace(call, cache=None), False
        elif use_cache is None:
            use_cache = call.cache is not None or (
                not self.training and getattr(self.decoder.config, "use_cache", True)
            )
        facts = check_call(self.config, call)
        options: dict[str, Any] = {}
        for name, given in (("output_hidden_states", output_hidden_states), ("output_attentions", output_attentions)):
            given = getattr(self.config, name, None) if given is None else given
            if given:  # an explicit None would hide the decoder's own setting
                options[name] = given
        memories = self._memories(call, facts) if call.has_memories else None
        columns = None if call.logits_to_keep is None else columns_of(call.logits_to_keep, call.text.tokens)
        if memories is None and isinstance(call.cache, MemoryCache) and call.cache.num_columns:
            output = self._read_on(call.text, call.cache, head, columns, options)
        else:
            if options.get("output_hidden_states") and facts is not None:
                facts.lowest = None  # of all layers the states of all columns are returned
            layout = self._lay_out(call, memories, facts, use_cache, not keeps_all, options)
            cache = call.cache if use_cache else None
            output = self._run(layout, call.text, memories, cache, use_cache, head, columns, options)
        if self.training and torch.is_grad_enabled():
            output.last_hidden_state = self._touch(output.last_hidden_state)
        return output

    def _memories(self, call: Call, facts: Facts | None) -> Memories:
        """Give the memories of a call, one row for each text: those of its context, or ready ones."""
        if call.context_input_ids is not None:
            memories = self._encode_context(
                call.context_input_ids, call.context_attention_mask, call.context_num_memories, facts
            )
            check_capacity(self.config, memories.mask.shape[1])
        else:
            embeds = call.memory_embeds
            mask = torch.ones_like(embeds[..., 0], dtype=torch.long)
            mask = mask if call.memory_mask is None else (call.memory_mask != 0).long()
            num_tokens = call.memory_num_tokens
            if num_tokens is None:
                num_tokens = tokens_of_memories(self.config, embeds.shape[1], embeds.device).expand_as(mask)
            none = torch.zeros_like(mask[:, :0].sum(1))
            memories = Memories(embeds, mask, num_tokens, mask.sum(1), none)
        batch_size = call.text.tokens.shape[0]
        if memories.batch_size == batch_size:
            return memories
        return memories.map(lambda rows: rows.expand(batch_size, *rows.shape[1:]))  # one context for many prompts

    def _lay_out(
        self,
        call: Call,
        memories: Memories | None,
        facts: Facts | None,
        use_cache: bool,
        shared: bool,
        options: dict[str, Any],
    ) -> Layout:
        """Choose how a text that begins is read, and lay it out."""
        config, text, cache = self.config, call.text, call.cache
        past = 0 if cache is None else int(cache.get_seq_length())
        if memories is not None:
            return self._lay_out_memories(call, memories, facts, use_cache, shared, past)
        fixed = config.memory_positions in ("fixed", "spread")
        batch_size, length = text.tokens.shape[:2]
        if config.self_memory and text.input_ids is not None and (cache is None or isinstance(cache, MemoryCache)):
            mask = text.attention_mask
            if mask is not None and mask.dim() != 2:
                check_flat_mask(text)
            counts = [length] * batch_size if facts is None else facts.num_tokens
            if length > config.window_length and facts is None and mask is not None:
                counts = mask.sum(1).tolist()  # compiled code cannot go on without
            if not fixed and max(counts) <= config.window_length:
                return open_plain(lay_plain(config, text, facts), text, facts, self._no_memories(text))
            if text.position_ids is not None or "output_attentions" in options:
                check_windows(text, counts, config.window_length, options.get("output_attentions"))
            none = [0] * len(counts)
            room = check_room(config, counts, none, none)
            mask = None if mask is None or (facts is not None and facts.is_full) else mask[:, -length:].long()
            lowest = None if facts is None else facts.lowest
            return lay_windows(config, text, mask, None, counts, config.window_length, lowest, shared, room)
        mark = mark_of(cache)
        if mark is None and (call.rolling_memory is not False or past == 0):  # if False, the open window grows on
            check_in_full(config, text, cache, past)
        if mark is not None and mark.first_memory is not None:
            check_view(config, past + length - mark.first_memory)
        if fixed:
            check_no_past(past)
            check_own_cache(cache, True)
            return lay_front(config, text, self._no_memories(text), facts, False, shared, None)
        layout = lay_plain(config, text, facts, past)
        layout.sees_memories = False if mark is None else mark.rows(batch_size)
        layout.mark = ReadMark() if mark is None and text.input_ids is None else mark
        return open_plain(layout, text, facts, self._no_memories(text), rolling=False)

    def _lay_out_memories(
        self, call: Call, memories: Memories, facts: Facts | None, use_cache: bool, shared: bool, past: int
    ) -> Layout:
        """Lay out a text with memories: in its slots as it stands, or after them where what follows has windows."""
        config, text = self.config, call.text
        rolls = bool(call.rolling_memory)
        if rolls:
            check_rolling(config, text.input_ids is not None)
        if not (rolls or config.memory_positions in ("fixed", "spread") or text.input_ids is None):
            layout = lay_slots(config, text, memories, facts, past, mark_of(call.cache))
            if layout.mark is not None and layout.mark.first_memory is not None:
                check_view(config, past + text.tokens.shape[1] - layout.mark.first_memory)
            check_own_cache(call.cache, use_cache and layout.needs_own_cache)
            return layout
        check_flat_mask(text)
        check_no_past(past)
        check_own_cache(call.cache, True)
        room = None
        if not rolls:
            check_view(config, memories.mask.shape[1] + text.tokens.shape[1])
        elif facts is not None:
            embedded = [0] * len(facts.num_tokens)
            if config.max_memories is not None:  # otherwise tokens take the same room as memories
                embedded = [ahead - number for ahead, number in zip(facts.num_ahead, facts.num_memories, strict=True)]
            room = check_room(config, facts.num_after, facts.num_ahead, embedded)
        return lay_front(config, text, memories, facts, rolls, shared, room)

    def _no_memories(self, text: Text) -> Memories:
        weight: Any = self.get_input_embeddings().weight
        return no_memories(weight, text.tokens.shape[0], self.config.decoder.hidden_size)

    def _run(
        self,
        layout: Layout,
        text: Text,
        memories: Memories | None,
        cache: Cache | None,
        use_cache: bool,
        head: bool,
        columns: torch.Tensor | None,
        options: dict[str, Any],
    ) -> MemoryModelOutput:
        """Decode what was laid out, lay the features back, and open the cache."""
        if layout.end > (getattr(self.decoder.config, "max_position_embeddings", None) or layout.end):
            check_positions(self.decoder, layout.end)
        if memories is not None and layout.row is not None and text.input_ids is not None:
            # Where a window is not full a slot may stand, masked; its id need not be a row of the table.
            slots = text.input_ids == (-1 if self.config.memory_token_id is None else self.config.memory_token_id)
            text = replace(text, input_ids=text.input_ids.masked_fill(slots, 0))
        if layout.row is None:
            entries = None if memories is None else memories.embeds.flatten(0, 1)
            keep = columns if layout.back is None else None
            given = cache.decoder_cache() if isinstance(cache, MemoryCache) else cache
            features, outputs = self._decode(layout, text, entries, given, use_cache, head, keep, options)
            hidden_states, column_mask = outputs.hidden_states, None
            decoder_cache, attentions = outputs.past_key_values, outputs.attentions
            if layout.back is not None:
                features = layout.lay_back(features.flatten(0, 1), columns)
        else:
            entries = self._entries(layout, text, memories)
            features, hidden_states, attentions, decoder_cache, column_mask = self._decode_windows(
                layout, text, entries, use_cache, head, options
            )
            assert layout.back is not None
            features = features[layout.back if columns is None else layout.back[:, columns]]
            if hidden_states is not None:
                hidden_states = tuple(None if states is None else layout.lay_back(states) for states in hidden_states)
        kept = memories if layout.memories is None else layout.memories
        if (
            layout.row is not None and kept is not None and entries is not None
        ):  # what stands before each text's last column
            embeds = entries.unflatten(0, kept.mask.shape) if layout.kept is None else entries[layout.kept]
            kept = replace(kept, embeds=embeds.masked_fill(kept.mask[..., None] == 0, 0))
        if use_cache and decoder_cache is not None:
            cache = self._open(layout, text, kept, cache, decoder_cache, column_mask)
        shown = kept if memories is None and layout.row is not None else memories
        return MemoryModelOutput(
            features,
            cache if use_cache and decoder_cache is not None else None,
            hidden_states,
            attentions,
            None if shown is None else shown.embeds,
            None if shown is None else shown.mask,
        )

    def _entries(self, layout: Layout, text: Text, memories: Memories | None) -> torch.Tensor:
        """Compress what is full, and give the vectors that the layout's `entries` count `(n, D)`."""
        vectors = None if memories is None else memories.embeds.flatten(0, 1)
        if layout.compressed is not None:
            new = self._encode(text.input_ids.flatten()[layout.compressed], None).flatten(0, 1)  # (N * K, D)
            vectors = new if vectors is None else torch.cat([vectors.to(new), new])
        assert layout.prefix is not None and layout.prefix.entries is not None and layout.prefix.mask is not None
        if layout.prefix.entries.shape[1] == 0:
            weight: Any = self.get_input_embeddings().weight
            return weight.new_zeros(0, self.config.decoder.hidden_size)
        if layout.prefix.text is None:
            assert vectors is not None
            embeds = vectors[layout.prefix.entries]  # (B, M, D)
        else:
            embeds = self._embed(layout.prefix, text, vectors)
        return embeds.masked_fill(layout.prefix.mask[..., None] == 0, 0).flatten(0, 1)

    def _embed(self, layout: Layout, text: Text, entries: torch.Tensor | None) -> torch.Tensor:
        """Give the embeddings `(R, S, D)` of what was laid out: tokens with their places, and entries."""
        if text.input_ids is None:
            embeds = text.inputs_embeds
            embeds = embeds if layout.text is None else embeds.flatten(0, 1)[layout.text]
        else:
            ids = text.input_ids if layout.text is None else text.input_ids.flatten()[layout.text]
            if layout.entries is not None:
                ids = ids.masked_fill(layout.entries >= 0, 0)  # the slot's id need not be a row of the table
            embeds = self.get_input_embeddings()(ids)
        if layout.places is not None and self.window_positions is not None:
            told = self.window_positions(layout.places.clamp(min=0)) * (layout.places >= 0)[..., None]
            embeds = embeds + told.to(embeds)
        if layout.entries is None or entries is None or len(entries) == 0:
            return embeds
        vectors = entries.to(embeds)[layout.entries.clamp(min=0)]
        return torch.where((layout.entries >= 0)[..., None], vectors, embeds)

    def _decode(
        self,
        layout: Layout,
        text: Text,
        entries: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        head: bool,
        keep: int | torch.Tensor | None,
        options: dict[str, Any],
        embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ModelOutput]:
        """Run the decoder, here and nowhere else: its body, or the whole causal LM with its head and scalings.

        Returns:
            Features of the columns to keep `(R, S', X)` (a number of last ones, or a tensor of columns), and all else.
        """
        mask = layout.mask
        if layout.is_full and (use_cache or cache is not None):
            mask, cache = None, DynamicCache() if cache is None else cache
        inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": use_cache}
        if embeds is not None:
            inputs["inputs_embeds"] = embeds
        elif layout.entries is None and layout.places is None and text.input_ids is not None:
            inputs["input_ids"] = text.input_ids if layout.text is None else text.input_ids.flatten()[layout.text]
        else:
            inputs["inputs_embeds"] = self._embed(layout, text, entries)
        if self._takes_position_ids:
            inputs["position_ids"] = layout.positions
        if head and keep is not None and self._takes_logits_to_keep:
            inputs["logits_to_keep"], keep = keep, None
        read = self.decoder if head else self.decoder.base_model
        adapted = self.config.adapters or getattr(self, "peft_config", None)
        with adapters_on(self.decoder, layout.sees_memories) if adapted else nullcontext():
            outputs = read(**inputs, **options)
        features = outputs.logits if head else outputs.last_hidden_state
        if keep is not None:
            features = features[:, -keep:] if isinstance(keep, int) else features[:, keep]
        return features, outputs

    def _decode_windows(
        self,
        layout: Layout,
        text: Text,
        entries: torch.Tensor | None,
        use_cache: bool,
        head: bool,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, Any, Any, Cache | None, torch.Tensor | None]:
        """Decode windows, each after the entries of its text.

        What stands before the windows of a text does not depend on them: it runs once, and its keys and values are
        shared. Without gradients windows are decoded in groups, so that memory does not grow with the text.

        Returns:
            Features of flat columns `(n, X)`, hidden states `(n, D)` of all layers and attentions if asked for (those
            only of one window a text), and the cache of each text's last window with the mask over its columns.
        """
        prefix, batch_size = layout.prefix, len(layout.lasts or [])
        assert prefix is not None and prefix.entries is not None and layout.row is not None
        assert layout.widths is not None and layout.lasts is not None and entries is not None
        parts: list[torch.Tensor] = []
        hidden: list[Any] = []
        num_entries = prefix.entries.shape[1]
        shared = DynamicCache() if layout.shares_prefix else None
        if num_entries and (layout.shares_prefix or layout.wants_prefix):
            # With a cache to fill, positions that jump are not taken for packed texts, and no mask is needed.
            prefix = replace(prefix, mask=prefix.mask if shared is None else None)
            features, outputs = self._decode(
                prefix, text, None, shared, shared is not None, head and layout.wants_prefix, None,
                options if layout.wants_prefix else {}, entries.unflatten(0, (batch_size, num_entries)),
            )  # fmt: skip
            if layout.wants_prefix:
                parts.append(features.flatten(0, 1))
                hidden.append(outputs.hidden_states)
        if layout.has_filler:
            filler = torch.full_like(entries[:1], float(self.config.absent_memories == "ones"))
            if len(filler) == 0:
                filler = entries.new_full((1, entries.shape[1]), float(self.config.absent_memories == "ones"))
            entries = torch.cat([entries, filler])
        opened: list[tuple[Cache, torch.Tensor]] = []
        assert layout.mask is not None and layout.text is not None and layout.num_wanted is not None
        num_rows = len(layout.widths)
        # Columns of a row, the entries that it sees among them, bound a group.
        groups, width = [slice(0, num_rows)], max(layout.mask.shape[1], layout.text.shape[1])
        if num_rows * width > FEW_TOKENS and not torch.is_grad_enabled():
            groups = row_groups(num_rows, width, layout.row.device)
        for part in groups:
            rows = layout if len(groups) == 1 else layout.rows(part)
            given = None if shared is None else shared
            if shared is not None and len(groups) > 1:
                width = max(layout.widths[part])
                given = share_columns(shared, width, rows.row)
                assert rows.mask is not None
                rows.mask = torch.cat([rows.mask[:, :width], rows.mask[:, num_entries:]], 1)
            elif shared is not None and num_entries and num_rows > batch_size:
                shared.batch_select_indices(layout.row)
            features, outputs = self._decode(
                rows, text, entries, given, use_cache or given is not None, head, layout.num_wanted, options
            )
            parts.append(features.flatten(0, 1))
            hidden.append(outputs.hidden_states)
            if use_cache and len(groups) == 1:
                opened.append((outputs.past_key_values, rows.mask))
            elif use_cache:
                opened += last_windows(layout, rows, part, outputs.past_key_values)
        states: list[torch.Tensor | None] | None = None
        if hidden[0] is not None:
            front = 1 if len(hidden) > len(groups) else 0  # of the prefix all columns, of rows those of the text
            states = []
            for layers in zip(*hidden, strict=True):
                if layers[0] is None:  # a layer that was not asked for
                    states.append(None)
                    continue
                own = [layers[n] if n < front else layers[n][:, -layout.num_wanted :] for n in range(len(layers))]
                states.append(torch.cat([layer.flatten(0, 1) for layer in own]))
        decoder_cache, column_mask = opened[0] if opened else (None, None)
        if len(groups) > 1 and opened:
            decoder_cache, column_mask = join_rows(opened)
        elif decoder_cache is not None and column_mask is not None and layout.last is not None:
            decoder_cache.batch_select_indices(layout.last)
            column_mask = column_mask[layout.last]
        attentions = outputs.attentions if num_rows == batch_size and len(groups) == 1 else None
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        return features, states, attentions, decoder_cache, column_mask

    def _open(
        self,
        layout: Layout,
        text: Text,
        kept: Memories | None,
        cache: Cache | None,
        decoder_cache: Cache,
        column_mask: torch.Tensor | None,
    ) -> Cache:
        """Give the cache that the next call continues from: a memory cache where later steps need what it knows."""
        opening = layout.opening
        if layout.continues and isinstance(cache, MemoryCache):
            masked = text.attention_mask is not None
            cache.append(text.input_ids, text.mask(), None if opening is None else opening.marked, masked)
            return cache
        needs_own = opening is not None and (layout.row is not None or opening.rolling or layout.needs_own_cache)
        if opening is None or kept is None or not (isinstance(cache, MemoryCache) or (cache is None and needs_own)):
            mark_cache(decoder_cache, layout.mark)
            return decoder_cache
        cache = MemoryCache() if cache is None else cache
        column_mask = opening.column_mask if column_mask is None else column_mask
        assert isinstance(cache, MemoryCache) and column_mask is not None
        if layout.num_wanted is not None and not opening.has_gaps:
            width = column_mask.shape[1] - layout.num_wanted + opening.max_fill
            if width < column_mask.shape[1]:
                column_mask = cut_columns(decoder_cache, column_mask, width)
        return cache.open(
            decoder_cache, replace(kept, embeds=kept.embeds.detach()), column_mask, opening.next_position,
            opening.fill,
            num_columns=text.tokens.shape[1], end=layout.end, max_fill=opening.max_fill,
            window_input_ids=None if opening.window is None else text.input_ids.flatten()[opening.window],
            asked=opening.asked, marked=opening.marked, sees_memories=opening.sees_memories,
            has_gaps=opening.has_gaps, rolling=opening.rolling,
            first_memory=None if layout.mark is None else layout.mark.first_memory,
        )  # fmt: skip

    def _read_on(
        self, text: Text, cache: MemoryCache, head: bool, columns: torch.Tensor | None, options: dict[str, Any]
    ) -> MemoryModelOutput:
        """Read the next tokens of texts that a memory cache holds; full windows are compressed, each at its moment."""
        check_flat_mask(text)
        length, window_length = text.tokens.shape[1], self.config.window_length
        if text.input_ids is None and cache.rolling:
            raise ValueError(
                "A memory cache continues with token ids, but `inputs_embeds` were given. Pass `input_ids`."
            )
        if not cache.rolling or cache.max_fill + length <= window_length:
            layout = lay_step(self.config, text, cache)
            if cache.first_memory is not None:
                check_view(self.config, cache.num_columns + length - cache.first_memory)
            elif not cache.rolling and cache.memories.mask.shape[1]:
                check_view(self.config, cache.column_mask.shape[1] + length)
            output = self._run(layout, text, cache.memories, cache, True, head, columns, options)
        else:
            output = self._roll_over(text, cache, head, columns, options)
        output.memory_embeds, output.memory_mask = cache.memories.embeds, cache.memories.mask
        return output

    def _roll_over(
        self, text: Text, cache: MemoryCache, head: bool, columns: torch.Tensor | None, options: dict[str, Any]
    ) -> MemoryModelOutput:
        """Read on where windows may be full. Only here the cache is asked how many tokens and memories rows have."""
        mask, memories, config = text.mask(), cache.memories, self.config
        width, length = cache.window_input_ids.shape[1], text.tokens.shape[1]
        filled = (torch.arange(width, device=mask.device) < cache.window_fill[:, None]).to(mask)
        ids = torch.cat([cache.window_input_ids, text.input_ids], 1)
        opened = Text(ids, torch.cat([filled, mask], 1), tokens=ids)
        wanted = width + torch.arange(length, device=mask.device)
        wanted = wanted if columns is None else wanted[columns]
        known = read_once(
            fill=cache.window_fill + mask.sum(1),
            held=memories.mask.sum(1),
            embedded=memories.num_embedded,
            lowest=(opened.attention_mask.cumsum(1) - 1)[:, wanted].amin(1),
        )
        full = [row for row, fill in enumerate(known["fill"]) if fill > config.window_length]
        if not full:
            cache.max_fill = max(known["fill"]) - length  # now it is known
            return self._read_on(text, cache, head, columns, options)
        if len(full) < len(mask):
            return self._read_apart(full, text, cache, head, columns, options)
        room = check_room(config, known["fill"], known["held"], known["embedded"])
        front = front_of_memories(memories, known["held"], cache.asked)
        layout = lay_windows(
            config, opened, opened.attention_mask, front, known["fill"], config.window_length, known["lowest"],
            room=room,
        )  # fmt: skip
        num_columns = cache.num_columns + length
        output = self._run(layout, opened, memories, cache, True, head, wanted, options)
        cache.num_columns = num_columns
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if states is None else states[:, width:] for states in output.hidden_states
            )
        return output

    def _read_apart(
        self,
        full: list[int],
        text: Text,
        cache: MemoryCache,
        head: bool,
        columns: torch.Tensor | None,
        options: dict[str, Any],
    ) -> MemoryModelOutput:
        """Read the rows whose windows are full apart from the others, which only go on."""
        others = [row for row in range(len(text.input_ids)) if row not in set(full)]
        parts, outputs = [], []
        for numbers in (full, others):
            rows = torch.tensor(numbers, device=text.input_ids.device)
            part = cache.select(rows)
            mask = None if text.attention_mask is None else text.attention_mask[rows]
            ids = text.input_ids[rows]
            outputs.append(self._read_on(Text(ids, mask, tokens=ids), part, head, columns, options))
            parts.append((rows, part))
        cache.join(parts)
        order = torch.cat([rows for rows, _ in parts]).argsort()
        output = outputs[0]
        output.last_hidden_state = torch.cat([one.last_hidden_state for one in outputs])[order]
        if output.hidden_states is not None:
            pairs = zip(*(one.hidden_states for one in outputs), strict=True)
            output.hidden_states = tuple(None if pair[0] is None else torch.cat(pair)[order] for pair in pairs)
        output.past_key_values, output.attentions = cache, None
        return output

    def _touch(self, features: torch.Tensor) -> torch.Tensor:
        """Give every trainable parameter that this step may leave out a gradient of zero.

        Processes that train together wait for all of each other's gradients, whatever texts they drew.
        """
        parameters = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and (not name.startswith("decoder.") or is_adapter(name)):
                parameters.append(parameter)
        return Touched.apply(features, *parameters) if parameters else features


class Touched(torch.autograd.Function):
    """Pass features through, and give parameters that may have no part in them a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Return the features as they are."""
        ctx.save_for_backward(*parameters)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradient as it is, and zeros."""
        return gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class MemoryEncoderDecoderForCausalLM(MemoryEncoderDecoderModel, MemoryGenerationMixin, GenerationMixin):
    """A causal language model that reads long text through memories.

    1. **Plain text.** A text longer than a window is cut into windows; each is read after the memories of all windows
       before it. A text of one window is the plain decoder.
    2. **Context through slots.** Memories of `context_input_ids`, or ready `memory_embeds`, take the places of the
       slot tokens (`config.memory_token_id`) in `input_ids`.
    3. **Cached steps** of either. The cache of plain text compresses a window into memories when it is full.

    Example:
    ```python
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(**tokenizer(long_text, return_tensors="pt")).logits  # (1, T, V), whatever T
    memory_embeds, memory_mask = model.encode_memories(context_input_ids)  # (1, C*K, D): keep them
    output_ids = model.generate(prompt_ids, memory_embeds=memory_embeds, memory_mask=memory_mask)
    ```
    """

    @property
    def base_model(self) -> MemoryEncoderDecoderModel:
        """The body over the same modules: its `last_hidden_state` gives the logits through the head."""
        body: Any = MemoryEncoderDecoderModel.__new__(MemoryEncoderDecoderModel)
        # The dictionaries of modules and parameters are shared, not copied: one model with two ways out. What others
        # put in the place of `forward` is this model's.
        vars(body).update({name: value for name, value in vars(self).items() if name != "forward"})
        return body

    def prompt_embeds(self, **inputs: Any) -> list[torch.Tensor]:
        """Return what the decoder reads of prompts, for servers that run it alone: see [`prompt_embeds`].

        Args:
            inputs: What `forward` takes.
        """
        return prompt_embeds(self, **inputs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: torch.LongTensor | None = None,
        memory_embeds: torch.FloatTensor | None = None,
        memory_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        context_num_memories: torch.LongTensor | None = None,
        memory_num_tokens: torch.LongTensor | None = None,
        rolling_memory: bool | None = None,
        **kwargs: Any,
    ) -> MemoryCausalLMOutputWithPast | tuple:
        """Predict the next token of every column of a text.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Decoder token ids, with slots if memories are given.
            attention_mask (`torch.LongTensor` of shape `(B, T)` or, with a cache, `(B, past + T)`, *optional*): 1 for
                tokens and slots, 0 for padding, which may stand anywhere and is skipped.
            context_input_ids (`torch.LongTensor` of shape `(B, C, L)`, *optional*): Chunks of encoder token ids.
            context_attention_mask (`torch.LongTensor` of shape `(B, C, L)`, *optional*): 1 for tokens, 0 for padding;
                a chunk of zeros only is absent and takes no slots.
            memory_embeds (`torch.FloatTensor` of shape `(B, M, D)` or `(1, M, D)`, *optional*): Ready memories, from
                [`encode_memories`]; a single row is repeated for all texts. With `inputs_embeds` they stand in front.
            memory_mask (`torch.LongTensor` of shape `(B, M)`, *optional*): 1 for present memories. Default: all.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Token that stands in each column, -100 where it
                is not to be learnt; slots are -100. Shifted inside, across windows too.
            past_key_values (`Cache`, *optional*): From an earlier call. Plain text gives and takes a [`MemoryCache`].
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Instead of `input_ids`, for at most
                one window or with memories.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions of a text of one window. By
                default they follow from the mask.
            use_cache (`bool`, *optional*): Whether to return a cache. Default: the decoder's setting, never in
                training.
            logits_to_keep (`int` or `torch.LongTensor`): Number of last columns, or columns, to return logits for; 0
                for all.
            return_dict (`bool`, *optional*): Whether to return an output object rather than a tuple.
            output_hidden_states (`bool` or `list` of `int`, *optional*): Whether to return the states of all layers,
                or of which.
            output_attentions (`bool`, *optional*): Whether to return attentions; only of texts of one window.
            context_num_memories (`torch.LongTensor` of shape `(B, C)`, *optional*): Memories of each chunk, as
                [`encode_memories`] takes them. Default: `memories_per_chunk`.
            memory_num_tokens (`torch.LongTensor` of shape `(B, M)`, *optional*): How many tokens each of the ready
                memories stands for; read with `memory_positions="source"`. Default: those of full chunks.
            rolling_memory (`bool`, *optional*): Whether, after the last slot of a text with memories, full windows
                become memories as those of plain text do. Default: that text is read in full.
            kwargs: Passed to the loss: `num_items_in_batch`, the global number of targets to divide by, and
                `shift_labels` `(B, T)`, targets *of* each column, which then replace `labels`.

        Returns:
            [`MemoryCausalLMOutputWithPast`]: Logits have the shape of `input_ids`; the loss is in nats per target.

        Raises:
            ValueError: If slots and memories differ in number in some row, a label stands on a slot, shapes or ids do
                not fit, or the text needs more memories than the decoder takes.

        Source: Badger 2026, arXiv 2602.13466, chunked memory model; unlike there the first token of a window is
        trained, absent memories are masked, and each window has its own mask.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        call = Call(
            Text(input_ids, attention_mask, inputs_embeds, position_ids, tokens),
            context_input_ids, context_attention_mask, context_num_memories, memory_embeds, memory_mask,
            memory_num_tokens, past_key_values,
            labels, kwargs.pop("shift_labels", None), None if type(logits_to_keep) is int and logits_to_keep == 0
            else logits_to_keep, rolling_memory, context_input_ids is not None or memory_embeds is not None,
        )  # fmt: skip
        reading = self._read(call, use_cache, output_hidden_states, output_attentions, kwargs, head=True)
        features: Any = reading.last_hidden_state
        logits = features.contiguous()  # (B, T, V)
        loss = None
        if call.labels is not None or call.shift_labels is not None:
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets_of(call), **kwargs
            )
        output = MemoryCausalLMOutputWithPast(
            loss, logits, reading.past_key_values, reading.hidden_states, reading.attentions, reading.memory_embeds,
            reading.memory_mask,
        )  # fmt: skip
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def targets_of(call: Call) -> torch.Tensor:
    """Return the target of each column `(B, T)`: the token after it, wherever windows end."""
    if call.shift_labels is not None:
        return call.shift_labels
    labels, mask = call.labels, call.text.attention_mask
    if mask is not None and mask.shape == labels.shape:  # the first token has nothing before it that predicts it
        labels = labels.masked_fill(mask.long().cumsum(1) == 1, -100)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether the library switches the model's cache off to recompute activations."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def row_groups(num_rows: int, tokens_per_row: int, device: torch.device) -> list[slice]:
    """Cut rows into groups of at most `TOKENS_PER_GROUP` tokens, or of one row.

    All rows are one group where gradients are asked for, since the graph keeps what every row needs anyway, and where
    the code is compiled.

    Args:
        num_rows (`int`): Rows: chunks to encode or windows to decode, which do not see each other.
        tokens_per_row (`int`): Tokens of a row, memories among them.
        device (`torch.device`): Where they are read.

    Returns:
        `list[slice]`: The groups, in order.
    """
    if torch.is_grad_enabled() or is_compiling():
        return [slice(0, num_rows)]
    step = max(1, TOKENS_PER_GROUP.get(device.type, TOKENS_PER_GROUP_ELSEWHERE) // tokens_per_row)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def last_windows(layout: Layout, rows: Layout, part: slice, cache: Cache) -> list[tuple[Cache, torch.Tensor]]:
    """Keep of a cache of some rows those that are the last window of a text, with the mask over their columns."""
    assert layout.lasts is not None and rows.mask is not None
    lasts = [number - part.start for number in layout.lasts if part.start <= number < part.stop]
    if not lasts:
        return []
    if len(lasts) == len(rows.mask):
        return [(cache, rows.mask)]
    index = torch.tensor(lasts, device=rows.mask.device)
    cache.batch_select_indices(index)
    return [(cache, rows.mask[index])]


def columns_of(keep: int | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the columns whose features are wanted; `None`: all."""
    if isinstance(keep, torch.Tensor):
        return keep
    length = tokens.shape[1]
    return None if keep >= length else torch.arange(length - keep, length, device=tokens.device)


def _autoencoder_fields(autoencoder: Any) -> dict[str, Any]:
    """Return what a memory model takes over from the autoencoder whose encoder it reads."""
    given = autoencoder.config
    fields = {name: getattr(given, name) for name in ("chunk_length", "memories_per_chunk", "pooling")}
    if autoencoder.bottleneck is not None:
        fields |= {"projector_type": "bottleneck", "projector_hidden_size": given.bottleneck_size}
        fields["projector_noise"] = given.bottleneck_noise
    return fields
