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
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
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
from .memory_adapters import (
    adapted_modules,
    adapters_off,
    adapters_on,
    add_adapters,
    check_unmerged,
    inject_adapters,
    is_adapter,
    merge_adapters,
    unmerge_adapters,
)
from .memory_cache import Memories, MemoryCache, ReadMark, cut_columns, join_rows, mark_cache, mark_of, share_columns
from .memory_checkpoint import TRAINED, load_whole, refuse_a_missing_part, save_whole
from .memory_checks import (
    Call,
    Facts,
    budget_of,
    check_call,
    check_capacity,
    check_context_data,
    check_flat_mask,
    check_in_full,
    check_no_past,
    check_own_cache,
    check_positions,
    check_rolling,
    check_room,
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
    text_of_window,
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
        check_unmerged(self)
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
            # Where no weight is a base's any more, after a cast for example, there is nothing to refer to.
            save_whole(self._write, save_directory, *args, trained=state if references else None, **kwargs)
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


class MemoryEncoderDecoderModel(MemoryPreTrainedModel):
    """A memory encoder-decoder without language modelling loss: it returns the decoder's hidden states.

    Its parameters have the names of [`MemoryEncoderDecoderForCausalLM`], head included, so that one folder serves
    both.

    Args:
        config ([`MemoryEncoderDecoderConfig`]): The architecture.
        encoder (`PreTrainedModel`, *optional*): A ready encoder body to use instead of a fresh one.
        decoder (`PreTrainedModel`, *optional*): A ready causal LM to use instead of a fresh one.
    """

    _gives_logits = False

    def __init__(
        self,
        config: MemoryEncoderDecoderConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder, config.encoder_layers) if encoder is None else encoder
        self.pooling = build_pooling(
            config.pooling, config.memories_per_chunk, config.encoder.hidden_size, config.max_group, config.lookback
        )
        self.projector = MemoryProjector(config)
        self.decoder = build_decoder(config.decoder) if decoder is None else decoder
        self.window_positions = None
        if config.window_positions:
            self.window_positions = nn.Embedding(config.num_places, config.decoder.hidden_size)
        # One object a config: what is set on the child (attention implementation, vocabulary size) is set here too.
        self.config.encoder, self.config.decoder = self.encoder.config, self.decoder.config
        # Once, here: a signature is slow to take, and does not change between calls.
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
        for layer in thawed_layers(self):
            layer.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MemoryEncoderDecoderModel":
        """Set training mode, except in frozen parts."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        if self.config.freeze_decoder:
            self.decoder.eval()
        for layer in thawed_layers(self):
            layer.train(mode)
        for _, module in adapted_modules(self):
            module.lora_dropout.train(mode)
        return self

    def add_adapters(
        self,
        parts: Sequence[str] = ("decoder",),
        adapter_name: str = "default",
        memory_modules: Sequence[str] = (),
        **fields: Any,
    ) -> None:
        """Put LoRA into the encoder, the decoder or both, and freeze the weights beside it.

        In the decoder it acts only in rows that see memories: other texts have the plain decoder's logits, bit for
        bit. Adapters that peft itself puts around the model (`get_peft_model`) act in every row.

        Args:
            parts (`Sequence[str]`): `"encoder"`, `"decoder"` or both.
            adapter_name (`str`): Their name.
            memory_modules (`Sequence[str]`): Names of the decoder's maps whose adapters act only in the columns in
                which memories stand: `["k_proj", "v_proj"]` gives memories keys and values of their own, and text
                keeps its own.
            fields: Fields of peft's `LoraConfig`, `r=8, lora_alpha=16` for example; `target_modules` are found.

        Raises:
            ImportError: If peft is not installed.
            ValueError: If there are adapters already or a field is unknown.

        Source: Hu et al. 2021, arXiv 2106.09685.
        """
        add_adapters(self, parts, adapter_name, fields, memory_modules)

    def adapters_off(self) -> AbstractContextManager[None]:
        """Read without adapters inside this context: the base weights alone, a teacher for example."""
        return adapters_off(self)

    def merge_adapters(self, unload: bool = False, all_rows: bool = False) -> None:
        """Add the adapters to the weights beside them.

        Args:
            unload (`bool`): Whether to drop the adapters for good: the model then saves as any other. Without it
                [`unmerge_adapters`] takes them out again.
            all_rows (`bool`): Whether the decoder's adapters may act in every row from now on. Weights know nothing of
                rows, so a text without memories no longer has the plain decoder's logits.

        Raises:
            ValueError: If the decoder has adapters and `all_rows` is not given.
        """
        merge_adapters(self, unload, all_rows)

    def unmerge_adapters(self) -> None:
        """Take merged adapters out of the weights again."""
        unmerge_adapters(self)

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
        start_between(model.eval(), autoencoder)
        if model.can_generate():
            model.generation_config = copy.deepcopy(decoder.generation_config)
        return model

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
        memories = encode_context(self, context_input_ids, context_attention_mask, num_memories, facts)
        if return_num_tokens:
            return memories.embeds, memories.mask, memories.num_tokens
        return memories.embeds, memories.mask

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

        `logits_to_keep` bounds the columns of the features; `labels` and `shift_labels` are checked with the rest.

        Returns:
            [`MemoryModelOutput`]: Hidden states in the columns of the text, memories and cache.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        call = Call(
            Text(input_ids, attention_mask, inputs_embeds, position_ids, tokens),
            context_input_ids, context_attention_mask, context_num_memories, memory_embeds, memory_mask,
            memory_num_tokens, past_key_values, kwargs.pop("labels", None), kwargs.pop("shift_labels", None),
            kwargs.pop("logits_to_keep", 0), rolling_memory, use_cache,
            {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions},
            has_memories=context_input_ids is not None or memory_embeds is not None,
        )  # fmt: skip
        call, facts = check_call(self, call, kwargs)
        memories = None  # a text that begins, and is given none
        if call.has_memories or call.continues:
            memories = memories_of(self, call, facts)  # encode, pool, project: (B, M, D)
        layout = lay_out(self, call, memories, facts)  # where everything stands: R rows of S columns
        if layout.apart is not None:
            output = read_apart(self, call, layout.apart)
        else:
            entries, kept = compress(self, layout, memories)  # full windows become memories, too: (n, D)
            decoded = decode(self, call, layout, entries)  # the decoder's one call: (B, T, X) or flat columns (n, X)
            features = decoded.features
            if layout.back is not None:  # a padding column shows what the token before it predicts
                features = features[layout.back[:, call.columns]]  # (n, X) -> (B, T, X)
            if self.training and torch.is_grad_enabled():
                features = touch(self, features)
            cache = open_cache(call, layout, kept, decoded) if call.use_cache and decoded.cache is not None else None
            # What a caller gave is given back as it was; of plain text, what its windows became.
            shown = memories if layout.row is None or call.has_memories else kept
            output = MemoryModelOutput(
                features, cache, decoded.hidden_states, decoded.attentions,
                None if shown is None else shown.embeds, None if shown is None else shown.mask,
            )  # fmt: skip
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def thawed_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a frozen encoder that train all the same."""
    first = model.config.encoder_trained_from
    return [] if first is None else layers_from(model.encoder, first)


@torch.no_grad()
def start_between(model: Any, autoencoder: Any) -> None:
    """Cast and draw what stands between two pretrained parts, at the scale of the decoder's embeddings."""
    # Packed weights are no numbers of a dtype: casting them would destroy them.
    encoder = () if is_quantized(model.encoder) else model.encoder.parameters()
    fresh = [module for module in (model.pooling, model.projector, model.window_positions) if module is not None]
    for module in fresh:
        module.to(model.decoder.device)
    for parameter in (*encoder, *(parameter for module in fresh for parameter in module.parameters())):
        # Parameters only: buffers, such as rotary frequencies, keep their precision.
        parameter.data = parameter.data.to(model.decoder.dtype)
    scale = embedding_scale(model.decoder)
    gain = scale
    if model.config.projector_start == "identity_on_last":
        gain = identity_gain(model.encoder, model.projector.norm, model.decoder)
    model.projector.initialize(gain)
    if model.window_positions is not None:
        model.window_positions.weight.normal_(std=scale)
    if autoencoder is None:
        return
    # A learned pooling is part of what the autoencoder's vectors mean.
    if type(autoencoder.pooling) is type(model.pooling):
        model.pooling.load_state_dict(autoencoder.pooling.state_dict())
    if autoencoder.bottleneck is not None and model.config.projector_type == "bottleneck":
        model.projector.down.load_state_dict(autoencoder.bottleneck.down.state_dict())
        model.projector.up.load_state_dict(autoencoder.bottleneck.up.state_dict())


def encode_context(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    num_memories: int | torch.Tensor | None,
    facts: Facts | None,
) -> Memories:
    """Encode checked contexts `(B, C, L)`, all chunks in one batch."""
    counts, width = num_memories, None if facts is None else facts.num_budget
    if counts is not None and not isinstance(counts, torch.Tensor):
        counts, width = budget_of(model.config, ids, counts, facts, mask), num_memories
    present = None if facts is None else facts.present
    shape = (ids.shape[0], ids.shape[1], ids.shape[2])
    layout = lay_context(model.config, shape, mask, counts, present, width, ids.device)
    chunk_ids, chunk_mask = ids.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    if layout.chunks is not None and chunk_mask is not None:
        chunk_ids, chunk_mask = chunk_ids[layout.chunks], chunk_mask[layout.chunks]
    embeds = project_chunks(model, chunk_ids, chunk_mask, layout.num_memories).flatten(0, 1)  # (N * K, D)
    # Where every chunk is absent, all places below still point at a vector; the mask sets it to zero.
    if embeds.shape[0] == 0:  # not `len`, which would fix the size of an exported program
        embeds = embeds.new_zeros(1, embeds.shape[1])
    embeds = embeds[layout.place].masked_fill(layout.mask[..., None] == 0, 0)  # (B, M, D)
    none = torch.zeros_like(layout.mask[:, :0].sum(1))
    return Memories(embeds, layout.mask, layout.num_tokens, layout.mask.sum(1), none, torch.zeros_like(layout.mask))


def project_chunks(
    model: Any, chunk_ids: torch.Tensor, chunk_mask: torch.Tensor | None, num_memories: torch.Tensor | None = None
) -> torch.Tensor:
    """Encode chunks `(N, L)` into memories `(N, K, D)`; the encoder runs once for all, or for each group."""
    if chunk_ids.shape[0] == 0:
        shape = 0, model.config.memories_per_chunk, model.config.decoder.hidden_size
        return torch.zeros(shape, dtype=model.decoder.dtype, device=chunk_ids.device)
    groups, parts = [slice(None)], []
    if not (torch.is_grad_enabled() or is_compiling()) and chunk_ids.numel() > FEW_TOKENS:
        groups = row_groups(len(chunk_ids), chunk_ids.shape[1], chunk_ids.device)
    for part in groups:
        mask = None if chunk_mask is None else chunk_mask[part]
        number = None if num_memories is None else num_memories[part]
        parts.append(encode_chunks(model.encoder, model.pooling, chunk_ids[part], mask, number, True, model.config))
    return model.projector(torch.cat(parts).to(model.decoder.dtype))


def memories_of(model: Any, call: Call, facts: Facts | None) -> Memories:
    """Give the memories of a call, one row for each text: those of its context, ready ones, or those of its cache."""
    if call.continues:
        return call.cache.memories
    if call.context_input_ids is not None:
        memories = encode_context(
            model, call.context_input_ids, call.context_attention_mask, call.context_num_memories, facts
        )
        check_capacity(model.config, memories.mask.shape[1])
    else:
        embeds = call.memory_embeds
        mask = torch.ones_like(embeds[..., 0], dtype=torch.long)
        mask = mask if call.memory_mask is None else (call.memory_mask != 0).long()
        num_tokens = call.memory_num_tokens
        if num_tokens is None:
            num_tokens = tokens_of_memories(model.config, embeds.shape[1], embeds.device).expand_as(mask)
        none = torch.zeros_like(mask[:, :0].sum(1))
        memories = Memories(embeds, mask, num_tokens, mask.sum(1), none, torch.zeros_like(mask))
    batch_size = call.text.tokens.shape[0]
    if memories.batch_size == batch_size:
        return memories
    return memories.map(lambda rows: rows.expand(batch_size, *rows.shape[1:]))  # one context for many prompts


def lay_out(model: Any, call: Call, memories: Memories | None, facts: Facts | None) -> Layout:
    """Choose how a text is read, and lay it out; no part of the model runs."""
    config, text, cache = model.config, call.text, call.cache
    if call.continues:
        return lay_on(config, call, facts is not None and facts.has_holes)
    past = 0 if cache is None else int(cache.get_seq_length())
    if memories is not None:
        return lay_out_memories(config, call, memories, facts, past)
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
            return open_plain(lay_plain(config, text, facts), text, facts, empty_memories(model, text))
        if text.position_ids is not None or "output_attentions" in call.options:
            check_windows(text, counts, config.window_length, call.options.get("output_attentions"))
        none = [0] * len(counts)
        room = check_room(config, counts, none, none)
        mask = None if mask is None or (facts is not None and facts.is_full) else mask[:, -length:].long()
        lowest = None if facts is None else facts.lowest
        return lay_windows(config, text, mask, None, counts, config.window_length, lowest, not call.recomputes, room)
    mark = mark_of(cache)
    if mark is None and (call.rolling_memory is not False or past == 0):  # if False, the open window grows on
        check_in_full(config, text, cache, past)
    if mark is not None and mark.first_memory is not None:
        check_view(config, past + length - mark.first_memory)
    if fixed:
        check_no_past(past)
        check_own_cache(cache, True)
        return lay_front(config, text, empty_memories(model, text), facts, False, not call.recomputes, None)
    layout = lay_plain(config, text, facts, past)
    layout.sees_memories = False if mark is None else mark.rows(batch_size)
    layout.mark = ReadMark() if mark is None and text.input_ids is None else mark
    return open_plain(layout, text, facts, empty_memories(model, text), rolling=False)


def lay_out_memories(
    config: PreTrainedConfig, call: Call, memories: Memories, facts: Facts | None, past: int
) -> Layout:
    """Lay out a text with memories: in its slots as it stands, or after them where what follows has windows."""
    text, rolls = call.text, bool(call.rolling_memory)
    if rolls:
        check_rolling(config, text.input_ids is not None)
    if not (rolls or config.memory_positions in ("fixed", "spread") or text.input_ids is None):
        layout = lay_slots(config, text, memories, facts, past, mark_of(call.cache))
        if layout.mark is not None and layout.mark.first_memory is not None:
            check_view(config, past + text.tokens.shape[1] - layout.mark.first_memory)
        check_own_cache(call.cache, call.use_cache and layout.needs_own_cache)
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
    return lay_front(config, text, memories, facts, rolls, not call.recomputes, room)


def lay_on(config: PreTrainedConfig, call: Call, has_holes: bool) -> Layout:
    """Lay out the next tokens of texts that a memory cache holds; full windows are compressed, each at its moment."""
    text, cache, length = call.text, call.cache, call.text.tokens.shape[1]
    check_flat_mask(text)
    if text.input_ids is None and cache.rolling:
        raise ValueError("A memory cache continues with token ids, but `inputs_embeds` were given. Pass `input_ids`.")
    if cache.rolling and cache.max_fill + length > config.window_length:
        # Only here the cache is asked how many tokens and memories rows have: a window may be full.
        opened, width = text_of_window(text, cache), cache.window_input_ids.shape[1]
        columns = slice(None) if call.options.get("output_hidden_states") else call.columns
        known = read_once(
            fill=cache.window_fill + text.mask().sum(1),
            held=cache.memories.mask.sum(1),
            embedded=cache.memories.num_embedded,
            lowest=(opened.attention_mask.cumsum(1) - 1)[:, width:][:, columns].amin(1),
        )
        full = [row for row, fill in enumerate(known["fill"]) if fill > config.window_length]
        if full and len(full) < len(text.tokens):
            return Layout(apart=full)
        if full:
            room = check_room(config, known["fill"], known["held"], known["embedded"])
            front = front_of_memories(cache.memories, known["held"], cache.asked)
            layout = lay_windows(
                config, opened, opened.attention_mask, front, known["fill"], config.window_length, known["lowest"],
                room=room, end=cache.end + length,
            )  # fmt: skip
            assert layout.back is not None
            return replace(layout, back=layout.back[:, width:])  # the window's own columns were read before
        cache.max_fill = max(known["fill"]) - length  # now it is known
    if cache.first_memory is not None:
        check_view(config, cache.num_columns + length - cache.first_memory)
    elif not cache.rolling and cache.memories.mask.shape[1]:
        check_view(config, cache.column_mask.shape[1] + length)
    return lay_step(config, text, cache, has_holes)


def empty_memories(model: Any, text: Text) -> Memories:
    """Return no memories for each text."""
    weight: Any = model.get_input_embeddings().weight
    return no_memories(weight, text.tokens.shape[0], model.config.decoder.hidden_size)


def read_apart(model: Any, call: Call, full: list[int]) -> MemoryModelOutput:
    """Read the rows whose windows are full apart from the others, which only go on: two calls, joined again."""
    text, cache = call.text, call.cache
    others = [row for row in range(len(text.tokens)) if row not in set(full)]
    parts: list[tuple[torch.Tensor, MemoryCache]] = []
    outputs: list[Any] = []
    for numbers in (full, others):
        rows = torch.tensor(numbers, device=text.tokens.device)
        # A cache of its own for each part: they go on at different lengths, and are one rectangle again only
        # afterwards.
        part = cache.select(rows)
        mask = None if text.attention_mask is None else text.attention_mask[rows]
        outputs.append(
            MemoryEncoderDecoderModel.forward(
                model,
                text.input_ids[rows],
                mask,
                past_key_values=part,
                logits_to_keep=call.logits_to_keep,
                return_dict=True,
                **call.options,
            )  # fmt: skip
        )
        parts.append((rows, part))
    cache.join(parts)
    # The two parts were joined one after the other; callers expect the rows as they gave them.
    order = torch.cat([rows for rows, _ in parts]).argsort()
    output = MemoryModelOutput(torch.cat([one.last_hidden_state for one in outputs])[order], cache)
    if outputs[0].hidden_states is not None:
        pairs = zip(*(one.hidden_states for one in outputs), strict=True)
        output.hidden_states = tuple(None if pair[0] is None else torch.cat(pair)[order] for pair in pairs)
    output.memory_embeds, output.memory_mask = cache.memories.embeds, cache.memories.mask
    return output


def compress(model: Any, layout: Layout, memories: Memories | None) -> tuple[torch.Tensor | None, Memories | None]:
    """Turn full windows into memories beside those that are there.

    Returns:
        The vectors `(n, D)` that the layout's `entries` count, `None` for none, and what a cache keeps of them: the
        memories `(B, M, D)` before each text's last column.
    """
    vectors = None if memories is None else memories.embeds.flatten(0, 1)  # (B * M, D)
    if layout.row is None:  # no windows
        return vectors, layout.memories
    prefix, kept = layout.prefix, layout.memories
    assert prefix is not None and prefix.entries is not None and prefix.mask is not None and kept is not None
    if layout.compressed is not None:
        new = project_chunks(model, layout.source.input_ids.flatten()[layout.compressed], None).flatten(0, 1)
        vectors = new if vectors is None else torch.cat([vectors.to(new), new])  # those of windows come last
    if prefix.entries.shape[1] == 0 or vectors is None:
        weight: Any = model.get_input_embeddings().weight
        entries = weight.new_zeros(0, model.config.decoder.hidden_size)
    else:
        embeds = vectors[prefix.entries] if prefix.text is None else embed(model, prefix, vectors)  # (B, M, D)
        entries = embeds.masked_fill(prefix.mask[..., None] == 0, 0).flatten(0, 1)
    embeds = entries.unflatten(0, kept.mask.shape) if layout.kept is None else entries[layout.kept]
    return entries, replace(kept, embeds=embeds.masked_fill(kept.mask[..., None] == 0, 0))


def embed(model: Any, layout: Layout, entries: torch.Tensor | None) -> torch.Tensor:
    """Give the embeddings `(R, S, D)` of what was laid out: tokens with their places, and entries."""
    text = layout.source
    assert text is not None
    if text.input_ids is None:
        embeds = text.inputs_embeds
        embeds = embeds if layout.text is None else embeds.flatten(0, 1)[layout.text]
    else:
        ids = text.input_ids if layout.text is None else text.input_ids.flatten()[layout.text]
        if layout.entries is not None:
            ids = ids.masked_fill(layout.entries >= 0, 0)  # the slot's id need not be a row of the table
        embeds = model.get_input_embeddings()(ids)
    if layout.places is not None and model.window_positions is not None:
        told = model.window_positions(layout.places.clamp(min=0)) * (layout.places >= 0)[..., None]
        embeds = embeds + told.to(embeds)
    if layout.entries is None or entries is None or len(entries) == 0:
        return embeds
    vectors = entries.to(embeds)[layout.entries.clamp(min=0)]
    return torch.where((layout.entries >= 0)[..., None], vectors, embeds)


def memory_columns(layout: Layout) -> torch.Tensor | bool:
    """Tell in which columns `(R, S)` of what was laid out memories stand."""
    if layout.entries is None:
        return False
    columns = layout.entries >= 0
    if layout.is_token is not None:  # what stands before windows: some of it may be text, a chat around its slots
        columns = columns & (layout.is_token == 0)
    elif layout.prefix is not None:  # rows that hold their own entries; fillers, at the end, stand for memories
        assert layout.prefix.is_token is not None
        kinds = F.pad((layout.prefix.is_token == 0).flatten(), (0, 1), value=True)
        columns = columns & kinds[layout.entries.clamp(min=0)]
    return columns


@dataclass
class Decoded:
    """What the decoder gave.

    Attributes:
        features (`torch.FloatTensor`): Logits or hidden states, `(B, T, X)`, or of flat columns `(n, X)` where the
            layout says how they are laid back.
        hidden_states (`tuple`, *optional*): States `(B, T, D)` of all layers, laid back.
        attentions (`tuple`, *optional*): As the decoder gives them.
        cache (`Cache`, *optional*): Keys and values, a row for each text.
        column_mask (`torch.LongTensor` of shape `(B, S)`, *optional*): Which of its columns count; `None`: as laid
            out.
    """

    features: torch.Tensor
    hidden_states: Any = None
    attentions: Any = None
    cache: Cache | None = None
    column_mask: torch.Tensor | None = None


def decode(model: Any, call: Call, layout: Layout, entries: torch.Tensor | None) -> Decoded:
    """Decode what was laid out: a text as it stands, or windows, each after the entries of its text.

    What stands before the windows of a text does not depend on them: it runs once, and its keys and values are
    shared. Without gradients windows are decoded in groups, so that memory does not grow with the text.
    """
    if layout.end > (getattr(model.decoder.config, "max_position_embeddings", None) or layout.end):
        check_positions(model.decoder, layout.end)
    if layout.row is None:
        return decode_whole(model, call, layout, entries)
    prefix, widths, lasts = layout.prefix, layout.widths or [], layout.lasts or []
    assert prefix is not None and prefix.entries is not None and entries is not None
    assert layout.mask is not None and layout.text is not None and layout.num_wanted is not None
    num_entries, num_rows, num_texts = prefix.entries.shape[1], len(widths), len(lasts)
    shared = DynamicCache() if layout.shares_prefix else None
    parts: list[torch.Tensor] = []
    hidden: list[Any] = []
    if num_entries and (layout.shares_prefix or layout.wants_prefix):
        # With a cache to fill, positions that jump are not taken for packed texts, and no mask is needed.
        prefix = replace(prefix, mask=prefix.mask if shared is None else None)
        embeds = entries.unflatten(0, (num_texts, num_entries))
        features, outputs = run(
            model, call, prefix, None, shared, shared is not None, embeds=embeds, unread=not layout.wants_prefix
        )
        if layout.wants_prefix:
            parts.append(features.flatten(0, 1))
            hidden.append(outputs.hidden_states)
    if layout.has_filler:
        filler = entries.new_full((1, entries.shape[1]), float(model.config.absent_memories == "ones"))
        entries = torch.cat([entries, filler])
    opened: list[tuple[Cache, torch.Tensor]] = []
    # Columns of a row, the entries that it sees among them, bound a group.
    groups, width = [slice(0, num_rows)], max(layout.mask.shape[1], layout.text.shape[1])
    if num_rows * width > FEW_TOKENS and not torch.is_grad_enabled():
        groups = row_groups(num_rows, width, layout.row.device)
    for part in groups:
        rows, given = layout, shared
        if len(groups) > 1:
            rows, given = group_of(layout, part, shared, num_entries)
        elif shared is not None and num_entries and num_rows > num_texts:
            shared.batch_select_indices(layout.row)
        use_cache = call.use_cache or given is not None
        features, outputs = run(model, call, rows, entries, given, use_cache, rows.num_wanted)
        parts.append(features.flatten(0, 1))
        hidden.append(outputs.hidden_states)
        if call.use_cache:
            last = [(outputs.past_key_values, rows.mask)]
            opened += last if len(groups) == 1 else last_windows(lasts, rows.mask, part, outputs.past_key_values)
    states = None if hidden[0] is None else join_states(layout, hidden, len(hidden) - len(groups))
    cache, column_mask = opened[0] if opened else (None, None)
    if len(groups) > 1 and opened:
        cache, column_mask = join_rows(opened)
    elif cache is not None and column_mask is not None and layout.last is not None:
        cache.batch_select_indices(layout.last)
        column_mask = column_mask[layout.last]
    attentions = outputs.attentions if num_rows == num_texts and len(groups) == 1 else None
    return Decoded(parts[0] if len(parts) == 1 else torch.cat(parts), states, attentions, cache, column_mask)


def decode_whole(model: Any, call: Call, layout: Layout, entries: torch.Tensor | None) -> Decoded:
    """Decode a text as it stands, memories in its slots, after what a cache holds."""
    cache = call.cache if call.use_cache else None
    cache = cache.decoder_cache() if isinstance(cache, MemoryCache) else cache
    keep = call.columns if layout.back is None and isinstance(call.columns, torch.Tensor) else None
    features, outputs = run(model, call, layout, entries, cache, call.use_cache, keep)
    features = features if layout.back is None else features.flatten(0, 1)
    return Decoded(features, outputs.hidden_states, outputs.attentions, outputs.past_key_values)


def run(
    model: Any,
    call: Call,
    layout: Layout,
    entries: torch.Tensor | None,
    cache: Cache | None,
    use_cache: bool,
    keep: int | torch.Tensor | None = None,
    embeds: torch.Tensor | None = None,
    unread: bool = False,
) -> tuple[torch.Tensor, ModelOutput]:
    """Run the decoder, here and nowhere else: its body, or the whole causal LM with its head and scalings.

    Args:
        model ([`MemoryEncoderDecoderModel`]): The model.
        call ([`Call`]): What is asked of it.
        layout ([`Layout`]): R rows of S columns.
        entries (`torch.FloatTensor` of shape `(n, D)`, *optional*): What the layout's `entries` count.
        cache (`Cache`, *optional*): Keys and values before the rows.
        use_cache (`bool`): Whether to give keys and values back.
        keep (`int` or `torch.LongTensor`, *optional*): A number of last columns, or columns, to give features of.
        embeds (`torch.FloatTensor` of shape `(R, S, D)`, *optional*): What stands in the rows, where it is known.
        unread (`bool`): Whether only keys and values are wanted.

    Returns:
        Features of the columns to keep `(R, S', X)`, and all else that the decoder gives.
    """
    mask = layout.mask
    if layout.is_full and (use_cache or cache is not None):
        mask, cache = None, DynamicCache() if cache is None else cache
    inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": use_cache}
    if embeds is not None:
        inputs["inputs_embeds"] = embeds
    elif layout.entries is None and layout.places is None and layout.source.input_ids is not None:
        ids = layout.source.input_ids
        inputs["input_ids"] = ids if layout.text is None else ids.flatten()[layout.text]
    else:
        inputs["inputs_embeds"] = embed(model, layout, entries)
    if model._takes_position_ids:
        inputs["position_ids"] = layout.positions
    head = model._gives_logits and not unread
    # Not every family can leave columns out before its head; of others they are cut off afterwards.
    if head and keep is not None and model._takes_logits_to_keep:
        inputs["logits_to_keep"], keep = keep, None
    read = model.decoder if head else model.decoder.base_model
    adapted = model.config.adapters or getattr(model, "peft_config", None)
    where = (layout.sees_memories, memory_columns(layout)) if adapted else None
    with nullcontext() if where is None else adapters_on(model.decoder, *where):
        outputs = read(**inputs, **({} if unread else call.options))
    features = outputs.logits if head else outputs.last_hidden_state
    if keep is not None:
        # A number for windows, whose rows begin with entries; columns for texts as they stand.
        features = features[:, -keep:] if isinstance(keep, int) else features[:, keep]
    return features, outputs


def group_of(layout: Layout, part: slice, shared: Cache | None, num_entries: int) -> tuple[Layout, Cache | None]:
    """Give some rows of a layout, and the shared keys and values that the widest of them sees."""
    rows = layout.rows(part)
    if shared is None:
        return rows, None
    assert rows.mask is not None and rows.row is not None and layout.widths is not None
    # Early windows see few entries: what none of a group sees would only cost time.
    width = max(layout.widths[part])
    rows.mask = torch.cat([rows.mask[:, :width], rows.mask[:, num_entries:]], 1)
    # By copying, since the decoder appends to what it is given, and the next group needs the prefix alone.
    return rows, share_columns(shared, width, rows.row)


def last_windows(lasts: list[int], mask: torch.Tensor, part: slice, cache: Cache) -> list[tuple[Cache, torch.Tensor]]:
    """Keep of a cache of some rows those that are the last window of a text, with the mask over their columns."""
    own = [number - part.start for number in lasts if part.start <= number < part.stop]
    if not own:
        return []
    if len(own) == len(mask):
        return [(cache, mask)]
    index = torch.tensor(own, device=mask.device)
    cache.batch_select_indices(index)
    return [(cache, mask[index])]


def join_states(layout: Layout, hidden: list[Any], num_front: int) -> tuple[torch.Tensor | None, ...]:
    """Join what groups of rows gave `(R, S, D)` to the states of each layer, laid back `(B, T, D)`.

    Of the first `num_front`, which are the prefix, all columns count; of rows those of the text, which stand last.
    """
    assert layout.num_wanted is not None and layout.back is not None
    states: list[torch.Tensor | None] = []
    for layers in zip(*hidden, strict=True):
        if layers[0] is None:  # a layer that was not asked for
            states.append(None)
            continue
        own = [*layers[:num_front], *(layer[:, -layout.num_wanted :] for layer in layers[num_front:])]
        states.append(torch.cat([layer.flatten(0, 1) for layer in own])[layout.back])
    return tuple(states)


def open_cache(call: Call, layout: Layout, kept: Memories | None, decoded: Decoded) -> Cache | None:
    """Give the cache that the next call continues from: a memory cache where later steps need what it knows."""
    opening, cache, decoder_cache, text = layout.opening, call.cache, decoded.cache, call.text
    assert decoder_cache is not None
    if layout.continues and opening is not None:
        cache.append(text.input_ids, text.mask(), opening.marked, text.attention_mask is not None)
        return cache
    needs_own = opening is not None and (layout.row is not None or opening.rolling or layout.needs_own_cache)
    if opening is None or kept is None or not (isinstance(cache, MemoryCache) or (cache is None and needs_own)):
        mark_cache(decoder_cache, layout.mark)
        return decoder_cache
    # A cache that the caller gave is filled in place, as the library's are: `generate` holds on to it.
    cache = MemoryCache() if cache is None else cache
    column_mask: Any = opening.column_mask if decoded.column_mask is None else decoded.column_mask
    if layout.num_wanted is not None and not opening.has_gaps:
        width = column_mask.shape[1] - layout.num_wanted + opening.max_fill
        if width < column_mask.shape[1]:
            column_mask = cut_columns(decoder_cache, column_mask, width)
    # Detached, since a cache outlives the step and would keep its whole graph.
    return cache.open(
        decoder_cache, replace(kept, embeds=kept.embeds.detach()), column_mask, opening,
        num_columns=cache.num_columns + text.tokens.shape[1], end=layout.end,
        window_input_ids=None if opening.window is None else layout.source.input_ids.flatten()[opening.window],
        first_memory=None if layout.mark is None else layout.mark.first_memory,
    )  # fmt: skip


def touch(model: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Give every trainable parameter that this step may leave out a gradient of zero.

    Processes that train together wait for all of each other's gradients, whatever texts they drew.
    """
    parameters = []
    for name, parameter in model.named_parameters():
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

    _gives_logits = True

    @property
    def base_model(self) -> MemoryEncoderDecoderModel:
        """The body over the same modules: its `last_hidden_state` gives the logits through the head."""
        # Without `__init__`: that would build and draw a second set of weights.
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
                tokens and slots, 0 for padding, which may stand anywhere and is skipped. Between tokens it has the
                logits of the token before it, if that is in the same call.
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
                memories stands for; read with `memory_positions="source"`. Default: those of full chunks, without
                special tokens of the encoder's own, which [`encode_memories`] and a store count.
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
        shift_labels = kwargs.pop("shift_labels", None)
        reading: Any = super().forward(
            input_ids, attention_mask, context_input_ids, context_attention_mask, memory_embeds, memory_mask,
            past_key_values, inputs_embeds, position_ids, use_cache, True, output_hidden_states, output_attentions,
            context_num_memories, memory_num_tokens, rolling_memory,
            labels=labels, shift_labels=shift_labels, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        # The decoder's own head has made them, with its scalings and soft-caps.
        logits = reading.last_hidden_state.contiguous()  # (B, T, V)
        loss = None
        if labels is not None or shift_labels is not None:
            shift_labels = targets_of(labels, attention_mask) if shift_labels is None else shift_labels
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=shift_labels, **kwargs
            )
        output = MemoryCausalLMOutputWithPast(
            loss, logits, reading.past_key_values, reading.hidden_states, reading.attentions, reading.memory_embeds,
            reading.memory_mask,
        )  # fmt: skip
        wants_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def targets_of(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the target of each column `(B, T)`: the token after it, wherever windows end."""
    if mask is not None and mask.shape == labels.shape:  # the first token has nothing before it that predicts it
        labels = labels.masked_fill(mask.long().cumsum(1) == 1, -100)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


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


def _autoencoder_fields(autoencoder: Any) -> dict[str, Any]:
    """Return what a memory model takes over from the autoencoder whose encoder it reads."""
    given = autoencoder.config
    fields = {name: getattr(given, name) for name in ("chunk_length", "memories_per_chunk", "pooling")}
    if autoencoder.bottleneck is not None:
        fields |= {"projector_type": "bottleneck", "projector_hidden_size": given.bottleneck_size}
        fields["projector_noise"] = given.bottleneck_noise
    return fields
