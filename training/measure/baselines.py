"""What memory models are compared with: recurrent and oracle memories, stored precision.

Other comparisons are settings, not modules; `docs/architecture.md` lists them all.

B texts, T tokens, W tokens of a window, E encoder width, D decoder width, R width of a bottleneck, V vocabulary.

Source: Badger 2026, arXiv 2602.13466: recurrent memory, oracle (embedding-augmented) memory, compression and
quantisation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_memory.memory_encoder import LastPooling, encode_chunks
from modeling_memory.modeling_memory_autoencoder import Bottleneck

from .metrics import token_results
from .suites import Scores

QUANTISATIONS = ("int8", "float8_e4m3fn", "float8_e5m2")


class RecurrentMemory(nn.Module):
    """One causal LM that hands a single memory from window to window.

    ```
    window c:   m_{c-1}  x_0 x_1 ... x_{W-1}  m_{c-1}      W + 2 columns
                                                 |
    window c+1:                                 m_c        the state of the last column
    ```

    The paper overwrites a window's last token with the write column, so that this token never enters the model. Here
    the column is added after it. The last token of a window predicts the first of the next, as in memory models, and
    gradients run through all windows.

    Args:
        decoder (`PreTrainedModel`): A causal LM.
        window_length (`int`): Tokens of a window (W).
        start (`float`): Value of all elements of the first memory: the paper has 1 for transformers, 0 for mixers.
    """

    def __init__(self, decoder: PreTrainedModel, window_length: int, start: float = 1.0) -> None:
        super().__init__()
        if window_length < 1:
            raise ValueError(f"window_length is {window_length}; expected 1 or more")
        limit = getattr(decoder.config, "max_position_embeddings", None)
        if limit is not None and window_length + 2 > limit:
            raise ValueError(
                f"a window of {window_length} tokens, the memory it reads and the one it writes need "
                f"{window_length + 2} positions, but the decoder has {limit}; shorten the window"
            )
        self.decoder = decoder
        self.window_length = window_length
        self.start = start

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map texts `(B, T)` to logits `(B, T, V)` of the next tokens; the last window may be shorter."""
        body, head = self.decoder.base_model, self.decoder.get_output_embeddings()
        table = self.decoder.get_input_embeddings()
        memory = table.weight.new_full((len(input_ids), 1, table.embedding_dim), self.start)
        states = []
        for window in input_ids.split(self.window_length, 1):  # a recurrence: each window needs the one before
            inputs_embeds = torch.cat([memory, table(window), memory], 1)
            mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=window.device)
            read = body(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False).last_hidden_state
            states.append(read[:, 1:-1])
            memory = read[:, -1:]
        return head(torch.cat(states, 1))


class OracleMemory(nn.Module):
    """A decoder that is given one vector of the whole text, the tokens that it must predict included.

    | kind | decoder input |
    |---|---|
    | `"token"` | [A·up(down(e)), E[x]]: one column more |
    | `"embedding"` | [down(e) ; E[x_t]] at every t: D + R wide |
    | `"projection"` | E[x_t] + A·up(down(e)) at every t |

    Args:
        encoder (`PreTrainedModel`): A body; e is its state at the last token.
        decoder (`PreTrainedModel`): A causal LM; for `"embedding"` its hidden size is D + R, D that of `table`.
        kind (`str`): Of the table.
        bottleneck (`Bottleneck`, *optional*): Down, noise in training, up; `"embedding"` uses what is narrow.
        freeze_encoder (`bool`): Encoder without gradients, in `eval()`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        decoder: PreTrainedModel,
        kind: Literal["token", "embedding", "projection"],
        bottleneck: Bottleneck | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.kind, self.bottleneck = encoder, decoder, kind, bottleneck
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            encoder.requires_grad_(False).eval()
        self.pooling = LastPooling(1)
        width, decoder_width = encoder.config.hidden_size, decoder.config.hidden_size
        if kind == "embedding":
            extra = width if bottleneck is None else bottleneck.down.out_features
            if decoder_width <= extra:
                raise ValueError(
                    f"the decoder is {decoder_width} wide and the vector takes {extra} of it, which leaves nothing "
                    "for tokens; narrow the vector by a bottleneck or widen the decoder"
                )
            self.table = nn.Embedding(decoder.config.vocab_size, decoder_width - extra)
            nn.init.normal_(self.table.weight, std=decoder.config.initializer_range)
            decoder.set_input_embeddings(None)  # its own is of another width
            self.bridge: nn.Module = nn.Identity()
        elif kind in ("token", "projection"):
            self.table = decoder.get_input_embeddings()
            self.bridge = nn.Linear(width, decoder_width) if width != decoder_width else nn.Identity()
        else:
            raise ValueError(f"kind is {kind!r}; known: token, embedding, projection")

    def train(self, mode: bool = True) -> "OracleMemory":
        """Set training mode, except in a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def encode(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read the vector of each text `(B, T)`: `(B, E)`, of `"embedding"` with a bottleneck `(B, R)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            vector = encode_chunks(self.encoder, self.pooling, input_ids)[:, 0]
        if self.bottleneck is None:
            return vector
        return self.bottleneck.narrow(vector) if self.kind == "embedding" else self.bottleneck(vector)

    def forward(self, input_ids: torch.Tensor, vector: torch.Tensor | None = None) -> torch.Tensor:
        """Map texts `(B, T)` to logits `(B, T, V)` of the next tokens, from their own vectors or given ones."""
        memory = self.bridge(self.encode(input_ids) if vector is None else vector)[:, None]  # (B, 1, D or R)
        embeds = self.table(input_ids)
        if self.kind == "token":
            inputs_embeds = torch.cat([memory, embeds], 1)
        elif self.kind == "embedding":
            inputs_embeds = torch.cat([memory.expand(-1, embeds.shape[1], -1), embeds], 2)
        else:
            inputs_embeds = embeds + memory
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=input_ids.device)
        logits = self.decoder(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False).logits
        return logits[:, -input_ids.shape[1] :]


def next_token_loss(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of all tokens but each text's first, from logits `(B, T, V)`."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())


@torch.no_grad()
def score_next_tokens(model: nn.Module, rows: torch.Tensor, batch_size: int = 32) -> Scores:
    """Score all tokens but the first of texts `(R, T)`, for [`training.measure.suites.summarise_scores`]."""
    model.eval()
    parts = []
    for own in rows.split(batch_size):
        correct, losses = token_results(model(own)[:, :-1], own[:, 1:])
        parts.append(Scores(losses, correct, own[:, 1:]))
    return Scores.join(parts)


def quantise(vectors: torch.Tensor, kind: str) -> torch.Tensor:
    """Round vectors `(..., R)` to eight bits a number and return them in their own type.

    Gradients pass as if nothing had been rounded (rounding itself has none), so that a model can be trained after it.

    Args:
        vectors (`torch.Tensor`): Of any floating type.
        kind (`str`): `"int8"`: 255 even steps between plus and minus the largest number of each vector;
            `"float8_e4m3fn"` or `"float8_e5m2"`: a cast, where too large numbers become the largest there is.

    Raises:
        ValueError: If the kind is unknown.

    >>> quantise(torch.tensor([[1.0, -0.5, 0.001]]), "int8").round(decimals=4).tolist()
    [[1.0, -0.503..., 0.0]]
    """
    if kind not in QUANTISATIONS:
        raise ValueError(f"quantisation {kind!r} is unknown; known: {', '.join(QUANTISATIONS)}")
    exact = vectors.detach()
    if kind == "int8":
        step = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny) / 127
        rounded = (exact / step).round() * step
    else:
        narrow = getattr(torch, kind)
        largest = torch.finfo(narrow).max
        rounded = exact.clamp(-largest, largest).to(narrow).to(exact.dtype)
    return rounded + (vectors - exact)  # the difference is zero; only its gradient is one


@contextmanager
def quantised(bottleneck: Bottleneck, kind: str) -> Iterator[None]:
    """Let a bottleneck's narrow vectors be stored in eight bits for as long as the block runs.

    Args:
        bottleneck (`Bottleneck`): Of an autoencoder, or `down` and `up` of a projector.
        kind (`str`): See [`quantise`].
    """
    if kind not in QUANTISATIONS:
        raise ValueError(f"quantisation {kind!r} is unknown; known: {', '.join(QUANTISATIONS)}")
    handle = bottleneck.down.register_forward_hook(lambda module, inputs, output: quantise(output, kind))
    try:
        yield
    finally:
        handle.remove()
