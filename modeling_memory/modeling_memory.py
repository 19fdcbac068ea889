"""The memory encoder-decoder: a frozen encoder turns chunks into memories, a decoder reads them as input embeddings.

```
 context or earlier windows   x x x x | x x x x | x x x x        (B, C, L) token ids
                                 |         |         |
                              encoder   encoder   encoder         each chunk alone, from position 0
                                 |         |         |            memory states (B, C*K, E)
                              projector projector projector
                                 |         |         |
 decoder input                  m_0       m_1       m_2  y y y y   memory embeds (B, C*K, D), then the window in clear
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

# Unused names: transformers before 5.8 copies from a local folder only the files that this one imports itself.
from .configuration_masked_mixer import MaskedMixerConfig
from .configuration_memory import AUTO_MAP, MemoryEncoderDecoderConfig, allot_memories, encoder_limit
from .generation_memory import MemoryGenerationMixin
from .memory_adapters import MemoryAdapterMixin, adapted_modules, inject_adapters, is_adapter
from .memory_cache import MemoryCache  # noqa: F401
from .memory_checkpoint import TRAINED, load_whole, refuse_a_missing_part, save_whole
from .memory_decoding import MemoryDecodingMixin, row_groups  # noqa: F401
from .memory_encoder import MemoryProjector, build_encoder, build_pooling, encode_chunks, initialize_leaf
from .memory_merging import MemoryMergingMixin  # noqa: F401
from .memory_parts import (
    HUB_OPTIONS,
    check_decoder,
    embedding_scale,
    identity_gain,
    keep_existing_plans,
    layers_from,
    load_parts,
)
from .memory_reading import MemoryReadingMixin
from .memory_rolling import MemoryRollingMixin  # noqa: F401
from .memory_saving import PARTS, check_older_weights, is_quantized, load_by_reference, trained_state
from .memory_text import Text, check_has_owner, check_ids, check_same_shape, check_spelling, is_compiling
from .memory_windows import pack_present, scatter_present
from .modeling_masked_mixer import MaskedMixerForCausalLM


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


class MemoryEncoderDecoderModel(MemoryReadingMixin, MemoryAdapterMixin, MemoryPreTrainedModel):
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
    ) -> tuple[torch.FloatTensor, torch.LongTensor]:
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

        Returns:
            `memory_embeds` (`torch.FloatTensor` of shape `(B, M, D)`) and `memory_mask` (`torch.LongTensor` of shape
            `(B, M)`, 1 for present memories), M being C*K or with a budget the most that a row needs. Absent memories
            are zero.

        Raises:
            ValueError: If the shapes differ, a chunk is longer than the encoder takes, an id is outside its
                vocabulary, or a budget is none or above K for some chunk.
        """
        if context_input_ids.dim() != 3 or 0 in context_input_ids.shape:
            raise ValueError(
                f"`context_input_ids` has shape {tuple(context_input_ids.shape)}; expected (batch, chunks, chunk "
                "tokens), none of them 0. `MemoryProcessor` builds it."
            )
        check_same_shape("context_attention_mask", context_attention_mask, "context_input_ids", context_input_ids)
        limit = encoder_limit(self.config.encoder)
        if limit is not None and context_input_ids.shape[2] > limit:
            raise ValueError(
                f"A chunk of the context has {context_input_ids.shape[2]} tokens, but the encoder takes {limit}. Cut "
                f"the context into chunks of `chunk_length` ({self.config.chunk_length}) tokens."
            )
        batch_size, num_chunks, _ = context_input_ids.shape
        per_chunk = self.config.memories_per_chunk
        if num_memories is not None:
            return self._encode_budget(context_input_ids, context_attention_mask, num_memories)
        if context_attention_mask is None:
            memory_embeds = self._encode(context_input_ids.flatten(0, 1), None)  # (B*C, K, D)
            memory_embeds = memory_embeds.reshape(batch_size, num_chunks * per_chunk, -1)
            return memory_embeds, torch.ones_like(memory_embeds[..., 0], dtype=torch.long)
        present = context_attention_mask.bool().any(2)  # (B, C)
        memory_embeds = self._encode(context_input_ids[present], context_attention_mask[present])
        memory_embeds = scatter_present(memory_embeds, present)
        return memory_embeds.flatten(1, 2), present.long().repeat_interleave(per_chunk, dim=1)

    def _encode_budget(
        self,
        context_input_ids: torch.Tensor,
        context_attention_mask: torch.Tensor | None,
        num_memories: int | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode contexts `(B, C, L)` into so many memories for each row, or for each chunk `(B, C)`."""
        per_chunk = self.config.memories_per_chunk
        if context_attention_mask is None:
            context_attention_mask = torch.ones_like(context_input_ids)
        present = context_attention_mask.bool().any(2)  # (B, C)
        if isinstance(num_memories, torch.Tensor):
            counts = num_memories
            check_same_shape("num_memories", counts, "the chunks of the context", present)
            wrong = torch.where(present, (counts < 1) | (counts > per_chunk), counts != 0)
            if wrong.any():
                row, chunk = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"`num_memories` is {int(counts[row, chunk])} for chunk {chunk} of row {row}; expected 1 to "
                    f"{per_chunk}, what the model was made for, and 0 for an absent chunk."
                )
        else:
            counts = torch.zeros_like(present, dtype=torch.long)
            shares = [allot_memories(num_memories, number, per_chunk) for number in present.sum(1).tolist()]
            counts[present] = torch.tensor([n for share in shares for n in share], device=counts.device)
        memory_embeds = self._encode(context_input_ids[present], context_attention_mask[present], counts[present])
        memory_embeds = scatter_present(memory_embeds, present).flatten(1, 2)  # (B, C*K, D)
        asked = torch.arange(per_chunk, device=counts.device) < counts[..., None]  # (B, C, K)
        memory_embeds, memory_mask = pack_present(memory_embeds, asked.flatten(1).long())
        return memory_embeds.masked_fill(memory_mask[..., None] == 0, 0), memory_mask

    def _encode(
        self, chunk_ids: torch.Tensor, chunk_mask: torch.Tensor | None, num_memories: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode chunks `(n, L)` into memories `(n, K, D)`; the encoder runs once for all, or for each group."""
        if len(chunk_ids) == 0:
            shape = 0, self.config.memories_per_chunk, self.config.decoder.hidden_size
            return torch.zeros(shape, dtype=self.decoder.dtype, device=chunk_ids.device)
        check_ids("The encoder", "context_input_ids", chunk_ids, getattr(self.config.encoder, "vocab_size", None))
        inputs = chunk_ids, chunk_mask, num_memories
        memory_states = torch.cat(
            [
                encode_chunks(
                    self.encoder, self.pooling, *(None if given is None else given[part] for given in inputs)
                )
                for part in row_groups(len(chunk_ids), chunk_ids.shape[1], chunk_ids.device)
            ]
        )  # (n, K, E)
        return self.projector(memory_states.to(self.decoder.dtype))

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        context_num_memories: torch.LongTensor | None = None,
        rolling_memory: bool | None = None,
        **kwargs: Any,
    ) -> MemoryModelOutput | tuple:
        """Read a text; arguments and modes are those of [`MemoryEncoderDecoderForCausalLM.forward`].

        Returns:
            [`MemoryModelOutput`]: Hidden states in the columns of the text, memories and cache.
        """
        self._check_spelling(kwargs)
        check_has_owner("context_attention_mask", context_attention_mask, "context_input_ids", context_input_ids)
        check_has_owner("memory_mask", memory_mask, "memory_embeds", memory_embeds)
        if context_input_ids is not None:
            memory_embeds, memory_mask = self._context_memories(
                context_input_ids, context_attention_mask, memory_embeds, context_num_memories
            )
        reading = self._read(
            Text(input_ids, attention_mask, inputs_embeds, position_ids),
            memory_embeds,
            memory_mask,
            past_key_values,
            use_cache,
            rolling_memory,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        output = MemoryModelOutput(
            reading.features,
            reading.cache,
            reading.hidden_states,
            reading.attentions,
            reading.memory_embeds,
            reading.memory_mask,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _check_spelling(self, kwargs: dict[str, Any]) -> None:
        if kwargs and not is_compiling():
            check_spelling(kwargs, [*inspect.signature(self.forward).parameters, "num_items_in_batch", "shift_labels"])

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return getattr(self.config, "return_dict", True) if return_dict is None else return_dict

    def _context_memories(
        self,
        context_input_ids: torch.Tensor,
        context_attention_mask: torch.Tensor | None,
        memory_embeds: torch.Tensor | None,
        context_num_memories: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a context, unless its memories were given as well."""
        if memory_embeds is not None:
            raise ValueError(
                "Both `context_input_ids` and `memory_embeds` were given, but a prompt has one context. Give the "
                "context or its ready memories."
            )
        return self.encode_memories(context_input_ids, context_attention_mask, context_num_memories)

    def _decode(self, *, columns: torch.Tensor | None = None, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Run the decoder. Returns features `(rows, columns, X)` and the decoder's output."""
        if not self._takes_position_ids:
            inputs.pop("position_ids", None)
        outputs = self.decoder.base_model(**inputs)
        features = outputs.last_hidden_state
        return features if columns is None else features[:, columns], outputs


class MemoryEncoderDecoderForCausalLM(MemoryEncoderDecoderModel, MemoryGenerationMixin, GenerationMixin):
    """A causal language model that reads long text through memories.

    1. **Plain text.** A text longer than a window is cut into windows; each is read in clear behind the memories of
       all windows before it. A text of one window is the plain decoder.
    2. **Context through slots.** Memories of `context_input_ids`, or ready `memory_embeds`, take the places of the
       slot tokens (`config.memory_token_id`) in `input_ids`.
    3. **Cached steps** of either. The cache of plain text folds a window into memories when it is full.

    Example:
    ```python
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(**tokenizer(long_text, return_tensors="pt")).logits  # (1, T, V), whatever T
    memory_embeds, memory_mask = model.encode_memories(context_input_ids)  # (1, C*K, D): keep them
    output_ids = model.generate(prompt_ids, memory_embeds=memory_embeds, memory_mask=memory_mask)
    ```
    """

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        context_num_memories: torch.LongTensor | None = None,
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
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions of a text read in clear. By
                default they follow from the mask.
            use_cache (`bool`, *optional*): Whether to return a cache. Default: the decoder's setting, never in
            training.
            logits_to_keep (`int` or `torch.LongTensor`): Number of last columns, or columns, to return logits for; 0
                for all.
            return_dict (`bool`, *optional*): Whether to return an output object rather than a tuple.
            output_hidden_states (`bool`, *optional*): Whether to return the states of all layers.
            output_attentions (`bool`, *optional*): Whether to return attentions; only of texts of one window.
            context_num_memories (`torch.LongTensor` of shape `(B, C)`, *optional*): Memories of each chunk, as
                [`encode_memories`] takes them. Default: `memories_per_chunk`.
            rolling_memory (`bool`, *optional*): Whether, behind the last slot of a text with memories, full windows
                fold into memories as those of plain text do. Default: that text is read in clear.
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
        self._check_spelling(kwargs)
        check_has_owner("context_attention_mask", context_attention_mask, "context_input_ids", context_input_ids)
        check_has_owner("memory_mask", memory_mask, "memory_embeds", memory_embeds)
        if context_input_ids is not None:
            memory_embeds, memory_mask = self._context_memories(
                context_input_ids, context_attention_mask, memory_embeds, context_num_memories
            )
        text = Text(input_ids, attention_mask, inputs_embeds, position_ids)
        shift_labels = self._shift_labels(labels, kwargs.pop("shift_labels", None), text, logits_to_keep)
        reading = self._read(
            text,
            memory_embeds,
            memory_mask,
            past_key_values,
            use_cache,
            rolling_memory,
            columns=_kept_columns(logits_to_keep, text),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = reading.features.contiguous()  # (B, T, V)
        loss = None
        if shift_labels is not None:
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=shift_labels, **kwargs
            )
        output = MemoryCausalLMOutputWithPast(
            loss,
            logits,
            reading.cache,
            reading.hidden_states,
            reading.attentions,
            reading.memory_embeds,
            reading.memory_mask,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _decode(self, *, columns: torch.Tensor | None = None, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Run the whole causal LM, its head and scalings included; returns logits `(rows, columns, V)` and output."""
        if not self._takes_position_ids:
            inputs.pop("position_ids", None)
        if columns is not None and self._takes_logits_to_keep:
            outputs = self.decoder(**inputs, logits_to_keep=columns)
            return outputs.logits, outputs
        outputs = self.decoder(**inputs)
        return outputs.logits if columns is None else outputs.logits[:, columns], outputs

    def _shift_labels(
        self,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        text: Text,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor | None:
        """Turn the token in each column into the target of the column before it; check both kinds of labels."""
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and given.shape != text.tokens.shape[:2]:
                raise ValueError(
                    f"`{name}` has shape {tuple(given.shape)}, but the text has {tuple(text.tokens.shape[:2])}. Give "
                    "one label for each column, -100 where nothing is to be learnt."
                )
        if (labels is not None or shift_labels is not None) and not (
            isinstance(logits_to_keep, int) and logits_to_keep == 0
        ):
            raise ValueError(
                "A loss needs the logits of all columns, but `logits_to_keep` was given. Leave one of them out."
            )
        vocab_size = self.config.decoder.vocab_size
        if labels is None or shift_labels is not None:
            if shift_labels is not None:
                check_ids("The decoder", "shift_labels", shift_labels, vocab_size, shift_labels == -100)
            return shift_labels
        if self._has_slots and text.input_ids is not None and not is_compiling():
            wrong = (text.input_ids == self.config.memory_token_id) & (labels != -100)
            if wrong.any():
                row, column = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"Row {row}, column {column} is a memory slot, but its label is {int(labels[row, column])}. A "
                    "slot holds no token to learn: set its label to -100."
                )
        check_ids("The decoder", "labels", labels, vocab_size, labels == -100)
        if text.has_own_mask:  # the first token has nothing before it that could predict it
            labels = labels.masked_fill(text.mask().cumsum(1) == 1, -100)
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def _autoencoder_fields(autoencoder: Any) -> dict[str, Any]:
    """Return what a memory model takes over from the autoencoder whose encoder it reads."""
    given = autoencoder.config
    fields = {name: getattr(given, name) for name in ("chunk_length", "memories_per_chunk", "pooling")}
    if autoencoder.bottleneck is not None:
        fields |= {"projector_type": "bottleneck", "projector_hidden_size": given.bottleneck_size}
        fields["projector_noise"] = given.bottleneck_noise
    return fields


def _kept_columns(logits_to_keep: int | torch.Tensor, text: Text) -> torch.Tensor | None:
    if not isinstance(logits_to_keep, int):
        return logits_to_keep
    if logits_to_keep == 0 or logits_to_keep >= text.length:
        return None
    return torch.arange(text.length - logits_to_keep, text.length, device=text.tokens.device)
