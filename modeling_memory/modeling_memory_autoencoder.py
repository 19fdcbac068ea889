"""The memory autoencoder: one vector (K vectors) must hold a chunk so well that a decoder writes it back in one pass.

```
 x_0 x_1 x_2 x_3        chunk (B, L)
        |
     encoder
        |               states (B, L, E)
     pooling            memory (B, K, E), of the last token by default
        |
   [down, noise, up]    optional bottleneck
        |
     [bridge]           (B, K, D), when the widths differ
        |
    expansion           z_0 z_1 z_2 z_3   (B, L, D)
        |
     decoder, head      logits (B, L, V): position i writes token i
```

Letters: B batch, L chunk length, T columns given, K memories per chunk, E encoder width, D decoder width,
V vocabulary.

Source: Badger 2026, arXiv 2602.13466, information-retention autoencoder.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

# Unused names: transformers before 5.8 copies from a local folder only the files that this one imports itself.
from .configuration_checks import POOLINGS  # noqa: F401
from .configuration_masked_mixer import MaskedMixerConfig  # noqa: F401
from .configuration_memory_autoencoder import MemoryAutoencoderConfig
from .memory_checkpoint import load_whole, refuse_a_missing_part, save_whole
from .memory_encoder import build_encoder, build_pooling, encode_chunks, initialize_leaf
from .memory_parts import keep_existing_plans
from .modeling_masked_mixer import check_attention_mask, check_token_ids


@dataclass
class MemoryAutoencoderOutput(ModelOutput):
    """What [`MemoryAutoencoder`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Nats per target token.
        logits (`torch.FloatTensor` of shape `(B, T, V)`): Scores of the token that stands in each column.
        memories (`torch.FloatTensor` of shape `(B, K, E)`, *optional*): What the chunk was written from.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, T, D)`, *optional*): The decoder's states, before
            and after every layer, in the columns of the logits.
        attentions (`tuple` of `torch.FloatTensor` of shape `(B, heads, L, L)`, *optional*): The decoder's, over the
            ranks of the chunk: column i of the logits is rank i where there is no padding.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    memories: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class Bottleneck(nn.Module):
    """Narrow vectors, add noise in training, widen them again.

    Args:
        width (`int`): Width of the vectors.
        bottleneck_size (`int`): Width in between.
        noise (`float`): Half-width q of the uniform noise in [-q, q].

    Source: Badger 2026, arXiv 2602.13466, compression and noise.
    """

    def __init__(self, width: int, bottleneck_size: int, noise: float):
        super().__init__()
        self.noise = noise
        self.down = nn.Linear(width, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, width)

    def narrow(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map `(..., E)` to the narrow vectors in between, `(..., bottleneck_size)`, with noise in training."""
        narrow = self.down(vectors)
        if self.training and self.noise:
            # Centred, unlike the paper's: one-sided noise is a shift that a bias learns to take back.
            narrow = narrow + torch.empty_like(narrow).uniform_(-self.noise, self.noise)
        return narrow

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map `(..., E)` to `(..., E)`."""
        return self.up(self.narrow(vectors))


class RepeatExpansion(nn.Module):
    """Give the decoder the same vector at all of its positions.

    Args:
        num_memories (`int`): Vectors (K); vector j stands at the positions i with floor(i * K / L) = j.
        length (`int`): Positions (L).
    """

    def __init__(self, num_memories: int, length: int):
        super().__init__()
        self.num_memories = num_memories
        self.length = length

    def forward(self, memories: torch.Tensor) -> torch.Tensor:
        """Expand `(B, K, D)` to `(B, L, D)`."""
        each = -(-self.length // self.num_memories)
        return self._cut(memories.unsqueeze(2).expand(-1, -1, each, -1))

    def _cut(self, expanded: torch.Tensor) -> torch.Tensor:
        """Join the stretches `(B, K, ceil(L / K), ...)` to `(B, L, ...)`: of each the positions that are its own."""
        # The usual case needs no index, which would copy all of it once more.
        if self.length % self.num_memories == 0:
            return expanded.flatten(1, 2)
        position = torch.arange(self.length, device=expanded.device)
        memory = position * self.num_memories // self.length
        first = -(-memory * self.length // self.num_memories)
        return expanded[:, memory, position - first]


class UnrollExpansion(RepeatExpansion):
    """Give the decoder at each position another window of the vector.

    Position i of a vector's stretch reads the D // 2 elements (s i, s i + 1, ...) mod D, mapped to width D by one
    shared affine map. Long stretches repeat: positions i and i + D read the same.

    Args:
        num_memories (`int`): Vectors (K); vector j stands at the positions i with floor(i * K / L) = j.
        length (`int`): Positions (L).
        width (`int`): Width of the vectors (D).
        stride (`int`): Elements from one position's window to the next (s). With D * K / L, positions share the
            elements evenly; with 1, as in the paper, L / K positions reach the first D // 2 + L / K - 1 of them only.

    Source: Badger 2026, arXiv 2602.13466, unroll (sliding window with wrap).
    """

    def __init__(self, num_memories: int, length: int, width: int, stride: int = 1):
        super().__init__(num_memories, length)
        self.stride = stride
        # Half of the vector, the paper's choice: neighbours read almost the same, positions far apart little in
        # common.
        self.window = width // 2
        self.projection = nn.Linear(self.window, width)

    def forward(self, memories: torch.Tensor) -> torch.Tensor:
        """Expand `(B, K, D)` to `(B, L, D)`."""
        each = -(-self.length // self.num_memories)
        # With the vector laid end to end after itself, windows that wrap are plain ones: one strided view, one copy.
        needed = (each - 1) * self.stride + self.window
        laid = memories.repeat(1, 1, -(-needed // memories.shape[2]))[:, :, :needed]
        return self.projection(
            self._cut(laid.unfold(2, self.window, self.stride))
        )  # (B, K, L / K, D // 2) before the cut


class MemoryAutoencoder(PreTrainedModel):
    """An autoencoder of chunks of text through K vectors.

    With a frozen foreign encoder it measures how much of a text that encoder's states hold.

    Args:
        config ([`MemoryAutoencoderConfig`]): The architecture.
        encoder (`PreTrainedModel`, *optional*): A ready encoder body to use instead of a fresh one.

    Example:
    ```python
    >>> mixer = {"model_type": "masked_mixer", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    >>> model = MemoryAutoencoder(MemoryAutoencoderConfig(encoder=mixer, decoder=mixer, chunk_length=8))
    >>> memories = model.encode(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]))
    >>> memories.shape, model.reconstruct(memories=memories).shape
    (torch.Size([1, 1, 32]), torch.Size([1, 8]))

    ```
    """

    config_class = MemoryAutoencoderConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MemoryAutoencoderConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # cross entropy; the targets are passed already aligned
        self.encoder = build_encoder(config.encoder) if encoder is None else encoder
        self.decoder = build_encoder(config.decoder)
        self.decoder.set_input_embeddings(None)  # it reads vectors; an unused table would be saved and never trained
        # One object a config: what is set on the child (attention implementation, vocabulary size) is set here too.
        config.encoder, config.decoder = self.encoder.config, self.decoder.config
        encoder_width, width = config.encoder.hidden_size, config.decoder.hidden_size
        num_memories, length = config.memories_per_chunk, config.chunk_length
        self.pooling = build_pooling(config.pooling, num_memories, encoder_width)
        self.bottleneck = None
        if config.bottleneck_size is not None:
            self.bottleneck = Bottleneck(encoder_width, config.bottleneck_size, config.bottleneck_noise)
        self.bridge = nn.Identity() if encoder_width == width else nn.Linear(encoder_width, width)
        if config.expansion == "unroll":
            self.expansion: nn.Module = UnrollExpansion(num_memories, length, width, config.unroll_stride)
        else:
            self.expansion = RepeatExpansion(num_memories, length)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()
        keep_existing_plans(self)
        self.apply_freezing()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The library's own rule knows linear maps and norms, not learned queries.
        if any(module is leaf for leaf in self.pooling.modules()):
            initialize_leaf(module)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token table."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's token table."""
        self.encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    def apply_freezing(self) -> None:
        """Freeze the encoder, token table included, as `config.freeze_encoder` says."""
        if self.config.freeze_encoder:
            self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MemoryAutoencoder":
        """Set training mode, except in a frozen encoder."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does, and freeze what its config says is frozen.

        Raises:
            ValueError: If weights are missing or do not fit, unless `output_loading_info` asks for their names.
        """
        loaded = load_whole(super().from_pretrained, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).apply_freezing()
        return loaded

    def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
        refuse_a_missing_part(self, missing_keys, ("encoder", "decoder"))
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, whole or not at all, without the places the parts came from.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            args: As in the library.
            kwargs: As in the library.
        """
        for child in (self.config.encoder, self.config.decoder):
            # Where a part was loaded from is a place of this machine, of no use to anyone else.
            child._name_or_path = ""
        save_whole(super().save_pretrained, save_directory, *args, **kwargs)

    def encode(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.FloatTensor:
        """Turn each chunk into its memory.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for tokens, 0 for padding, anywhere.

        Returns:
            `torch.FloatTensor` of shape `(B, K, E)`: K vectors a chunk, in encoder width, after the bottleneck if
            there is one.

        Raises:
            ValueError: If a row has no token, an id is outside the vocabulary, or a chunk is longer than the encoder
                takes.
        """
        # Encoded first, so that ids and shapes are checked before the values of the mask are read.
        memories = encode_chunks(self.encoder, self.pooling, input_ids, attention_mask, config=self.config)
        if attention_mask is not None and not torch.compiler.is_compiling():
            empty = (attention_mask == 0).all(1)
            if bool(empty.any()):
                raise ValueError(f"Row {int(empty.nonzero()[0])} has padding only; leave out chunks without tokens.")
        # A frozen encoder may be loaded in a narrower type than the parts that train.
        memories = memories.to(self.lm_head.weight.dtype)
        return memories if self.bottleneck is None else self.bottleneck(memories)

    def decode(self, memories: torch.FloatTensor) -> torch.FloatTensor:
        """Write each chunk from its memory, in one pass.

        Args:
            memories (`torch.FloatTensor` of shape `(B, K, E)`): From [`~MemoryAutoencoder.encode`].

        Returns:
            `torch.FloatTensor` of shape `(B, L, V)`: logits; position i writes the token of rank i.

        Raises:
            ValueError: If the shape is another.
        """
        return self._decode(memories, output_hidden_states=False, output_attentions=False)[0]

    def _decode(self, memories: torch.Tensor, **asked: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Give logits `(B, L, V)`, and what the decoder returned, with what else was asked for."""
        expected = self.config.memories_per_chunk, self.config.encoder.hidden_size
        if memories.dim() != 3 or memories.shape[0] == 0 or memories.shape[1:] != expected:
            raise ValueError(
                f"`memories` has shape {tuple(memories.shape)}; expected (batch, {expected[0]}, {expected[1]}): "
                "memories per chunk, encoder width. `encode` gives them."
            )
        inputs_embeds = self.expansion(self.bridge(memories.to(self.lm_head.weight.dtype)))  # (B, L, D)
        # No mask: positions after a short chunk's last token are written as well, and nobody looks at them.
        outputs = self.decoder(inputs_embeds=inputs_embeds, use_cache=False, return_dict=True, **asked)
        # All positions at once, each seeing those before it: nothing that was written is read again.
        return self.lm_head(outputs.last_hidden_state), outputs

    @torch.no_grad()
    def reconstruct(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        memories: torch.FloatTensor | None = None,
    ) -> torch.LongTensor:
        """Write chunks back, from their tokens or from their memories.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for tokens, 0 for padding.
            memories (`torch.FloatTensor` of shape `(B, K, E)`, *optional*): Memories instead of `input_ids`.

        Returns:
            `torch.LongTensor` of shape `(B, L)`: the likeliest token at each rank of the chunk. How many of them are
            text, the memory does not say.

        Raises:
            ValueError: If both or neither of tokens and memories are given, or they are wrong.
        """
        self._check_length(input_ids)
        return self.decode(self._memories(input_ids, attention_mask, memories)).argmax(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        memories: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MemoryAutoencoderOutput:
        """Encode chunks and write them back.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Token ids, at most `chunk_length` a row.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for tokens, 0 for padding, anywhere.
            memories (`torch.FloatTensor` of shape `(B, K, E)`, *optional*): Memories instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): The token that each column must give, usually
                `input_ids`: there is no shift. -100 and padding have no loss.
            output_hidden_states (`bool` or list of `int`, *optional*): Whether to return the decoder's states, or
                which. Default: as the config says.
            output_attentions (`bool`, *optional*): Whether to return the decoder's attentions. Default: as the config
                says.
            kwargs: `num_items_in_batch` reaches the loss.

        Returns:
            [`MemoryAutoencoderOutput`]: Logits in the columns of `input_ids`, of `labels` if only memories are given,
            or of the whole chunk.

        Raises:
            ValueError: If both or neither of tokens and memories are given, a row is longer than `chunk_length`, or
                labels have another shape.
        """
        given = input_ids if input_ids is not None else labels
        memories_given = memories is not None
        if given is not None and not isinstance(given, torch.Tensor):
            check_token_ids("labels" if input_ids is None else "input_ids", given, None)
        self._check_length(given)
        memories = self._memories(input_ids, attention_mask, memories)
        logits, outputs = self._decode(
            memories,
            output_hidden_states=_given(output_hidden_states, self.config.output_hidden_states),
            output_attentions=_given(output_attentions, self.config.output_attentions),
        )
        states = outputs.hidden_states
        if given is not None:
            if memories_given:
                check_attention_mask("attention_mask", attention_mask, *given.shape)
            logits = self._lay_back(logits, attention_mask, given.shape[1])
            states = states and tuple(
                None if state is None else self._lay_back(state, attention_mask, given.shape[1]) for state in states
            )

        loss = None
        if labels is not None:
            labels = self._check_labels(labels, input_ids, logits.shape[:2])
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            loss = self.loss_function(
                logits, None, vocab_size=self.config.vocab_size, shift_labels=labels.contiguous(), **kwargs
            )
        return MemoryAutoencoderOutput(
            loss=loss,
            logits=logits,
            memories=memories,
            hidden_states=states,
            attentions=getattr(outputs, "attentions", None),
        )

    def _check_labels(self, labels: Any, input_ids: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
        """Return labels as the loss takes them; those that are the ids themselves were looked at."""
        if not isinstance(labels, torch.Tensor) or labels.shape != shape:
            given = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"`labels` has shape {given}; expected {tuple(shape)}, one a token, unshifted.")
        if input_ids is not None and labels is input_ids:
            return labels.long()
        check_token_ids("labels", labels, None)
        if not (labels.is_meta or torch.compiler.is_compiling()):
            wrong = ((labels < 0) & (labels != -100)) | (labels >= self.config.vocab_size)
            if bool(wrong.any()):
                raise ValueError(
                    f"`labels` holds {int(labels[wrong][0])}; expected ids of 0 to {self.config.vocab_size - 1}, or "
                    "-100 where nothing is to be learnt."
                )
        return labels.long()

    def _check_length(self, token_ids: torch.Tensor | None) -> None:
        if (
            isinstance(token_ids, torch.Tensor)
            and token_ids.dim() == 2
            and token_ids.shape[1] > self.config.chunk_length
        ):
            raise ValueError(
                f"A row has {token_ids.shape[1]} tokens, but this autoencoder writes chunks of "
                f"{self.config.chunk_length} (`chunk_length`). Cut the text into chunks."
            )

    def _memories(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, memories: torch.Tensor | None
    ) -> torch.Tensor:
        if (input_ids is None) == (memories is None):
            raise ValueError("Give either `input_ids` or `memories`, and only one of them.")
        if memories is None:
            return self.encode(input_ids, attention_mask)
        if not isinstance(memories, torch.Tensor) or not memories.is_floating_point():
            given = (
                f"has type {memories.dtype}"
                if isinstance(memories, torch.Tensor)
                else f"is a {type(memories).__name__}"
            )
            raise ValueError(f"`memories` {given}; expected a tensor of vectors. `encode` makes it.")
        if not (memories.is_meta or torch.compiler.is_compiling() or bool(torch.isfinite(memories).all())):
            raise ValueError(
                "`memories` holds values that are not finite. Encode the chunk again, in float32 or bfloat16 if this "
                "was float16."
            )
        return memories

    @staticmethod
    def _lay_back(logits: torch.Tensor, attention_mask: torch.Tensor | None, num_columns: int) -> torch.Tensor:
        """Take logits by rank `(B, L, V)` to the columns `(B, T, V)` of a text with padding."""
        # The whole chunk is returned as it is, so that its gradient can be asked for.
        first = logits if num_columns == logits.shape[1] else logits[:, :num_columns].contiguous()
        if attention_mask is None:
            return first
        real = attention_mask != 0
        ranks = (real.long().cumsum(1) - 1).clamp(min=0)  # (B, T)
        if not torch.compiler.is_compiling():
            columns = torch.arange(num_columns, device=ranks.device)
            if bool(((ranks == columns) | ~real).all()):
                return first  # no padding in front: nothing to move
        return logits.gather(1, ranks[:, :, None].expand(-1, -1, logits.shape[2]))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the encoder's token table and the head, as `PreTrainedModel.resize_token_embeddings` does."""
        table = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.lm_head.weight.shape[0]
        self.config.encoder.vocab_size = table.weight.shape[0]
        return table


def _given(asked: Any, default: Any) -> Any:
    return default if asked is None else asked
