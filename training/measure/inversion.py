"""Writing texts back from vectors: the decoder of the information probe, its training and its score.

```
 vectors of a text (B, K, E)      read by a frozen encoder
        |
   standardise                    each element to mean 0 and variance 1 over the training texts
        |
     bridge                       (B, K, D)
        |
    expansion                     (B, T, D), unrolled or repeated
        |
  decoder, head                   logits (B, T, V), all positions in one pass, no shift
```

B texts, T tokens of a text, K vectors, E width of a vector, D width of the decoder, V vocabulary.

Source: Badger 2026, arXiv 2602.13466, information-retention autoencoder with a frozen encoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from modeling_memory import MaskedMixerConfig
from modeling_memory.memory_encoder import build_encoder
from modeling_memory.modeling_memory_autoencoder import RepeatExpansion, UnrollExpansion

from ..train.build import child_config
from ..train.fit import Budget, Order, Validation, fit
from .frozen import FrozenEncoder, TextRows, read_all
from .metrics import bits_per_byte, token_results
from .suites import Scores, summarise_scores

HELD_TOKENS = 4096


@dataclass(frozen=True)
class DecoderSize:
    """Architecture of a probe's decoder.

    Attributes:
        model_type (`str`): `"masked_mixer"` or `"llama"`, causal both.
        hidden_size (`int`): Width (D).
        num_hidden_layers (`int`): Layers.
        num_heads (`int`): Heads.
        expansion (`str`): `"unroll"` or `"repeat"`.
    """

    model_type: Literal["masked_mixer", "llama"] = "masked_mixer"
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_heads: int = 4
    expansion: Literal["unroll", "repeat"] = "unroll"

    def build_config(self, length: int) -> Any:
        """Return the configuration of the body, for texts of `length` tokens.

        Raises:
            ValueError: If the sizes do not fit each other.
        """
        if self.hidden_size % max(1, self.num_heads):
            raise ValueError(
                f"the decoder's width {self.hidden_size} is no multiple of its {self.num_heads} heads; choose others"
            )
        fields: dict[str, Any] = {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "max_position_embeddings": length,
            "vocab_size": 1,  # it reads vectors
        }
        if self.model_type == MaskedMixerConfig.model_type:
            fields["num_heads"] = self.num_heads
        else:
            fields |= {"num_attention_heads": self.num_heads, "num_key_value_heads": self.num_heads}
            fields["intermediate_size"] = 4 * self.hidden_size
            fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        return child_config(fields, {}, "decoder")


class VectorDecoder(nn.Module):
    """Writes a text from its vectors, all tokens in one pass.

    Args:
        size (`DecoderSize`): Its architecture.
        num_vectors (`int`): Vectors of a text (K).
        width (`int`): Their width (E).
        length (`int`): Tokens of a text (T).
        vocab_size (`int`): Ids it writes (V).
        known_ids (`torch.LongTensor` of shape `(S,)`, *optional*): Ids that have a row of the head each; all others
            share one row, and its probability equally. Default: all. See [`repeated_ids`].
    """

    def __init__(
        self,
        size: DecoderSize,
        *,
        num_vectors: int,
        width: int,
        length: int,
        vocab_size: int,
        known_ids: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        known = torch.arange(vocab_size) if known_ids is None else known_ids.unique()
        self.num_unknown = vocab_size - len(known)
        rows = torch.full((vocab_size,), len(known))
        rows[known] = torch.arange(len(known))
        self.register_buffer("row_of_id", rows, persistent=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.bridge = nn.Identity() if width == size.hidden_size else nn.Linear(width, size.hidden_size)
        if size.expansion == "unroll":
            self.expansion: nn.Module = UnrollExpansion(num_vectors, length, size.hidden_size)
        else:
            self.expansion = RepeatExpansion(num_vectors, length)
        self.body = build_encoder(size.build_config(length))
        self.body.set_input_embeddings(None)
        self.lm_head = nn.Linear(size.hidden_size, len(known) + (self.num_unknown > 0), bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, which is no hidden matrix to the optimizer."""
        return self.lm_head

    @torch.no_grad()
    def standardise(self, vectors: torch.Tensor) -> None:
        """Take mean and scale of each element from the training vectors `(N, K, E)`.

        An affine map of what an affine map reads changes no information; it spares the decoder finding the scale of a
        foreign model. Elements that do not vary are left alone.
        """
        flat = vectors.flatten(0, 1)
        self.mean.copy_(flat.mean(0))
        deviation = flat.std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map vectors `(B, K, E)` to logits of the head's rows, `(B, T, S)`, with unknown ids `(B, T, S + 1)`."""
        inputs_embeds = self.expansion(self.bridge((vectors - self.mean) / self.scale))
        states = self.body(inputs_embeds=inputs_embeds, use_cache=False, return_dict=True).last_hidden_state
        return self.lm_head(states)

    def is_unknown(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return which tokens share the head's last row."""
        return self.row_of_id[tokens] == len(self.row_of_id) - self.num_unknown

    def token_results(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each token `(B, T)` is the likeliest, and its cross entropy over all V ids in nats."""
        correct, nats = token_results(logits, self.row_of_id[tokens])
        unknown = self.is_unknown(tokens)
        if self.num_unknown > 1:  # the shared row's probability is spread over its ids, none of which is the likeliest
            return correct & ~unknown, nats + unknown * math.log(self.num_unknown)
        return correct, nats


def repeated_ids(tokens: torch.Tensor) -> torch.Tensor:
    """Return the ids that occur more than once in training texts.

    Those that occur once stand for those that never do: from them the shared row of the head learns how likely an
    unknown token is. A head with a row for each of tens of thousands of ids that hardly occur would cost most of the
    training, and would take what it has never seen for impossible.

    >>> repeated_ids(torch.tensor([[5, 6], [5, 9]])).tolist()
    [5]
    """
    ids, counts = tokens.unique(return_counts=True)
    return ids[counts > 1]


class Inverter(nn.Module):
    """A decoder together with what is trained of the encoder: nothing, or a token table of its own.

    Args:
        encoder (`FrozenEncoder`): Whose vectors are read.
        decoder (`VectorDecoder`): What writes.
    """

    def __init__(self, encoder: FrozenEncoder, decoder: VectorDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        table = encoder.body.get_input_embeddings()
        self.table = table if table.weight.requires_grad else None

    @property
    def trains_table(self) -> bool:
        """Whether texts must be read anew in every step, because the token table changes."""
        return self.table is not None


def invert(
    encoder: FrozenEncoder,
    train: TextRows,
    test: TextRows,
    size: DecoderSize,
    budget: Budget,
    *,
    shuffled: bool = False,
    checkpoint: Path | None = None,
    vectors: Callable[[TextRows], torch.Tensor] | None = None,
    device: torch.device | None = None,
    stop_after: int | None = None,
    label: str = "",
) -> dict[str, Any]:
    """Train a decoder on a frozen encoder's vectors and measure how much of other texts comes back.

    Args:
        encoder (`FrozenEncoder`): The encoder. With a trainable token table ([`FrozenEncoder.with_fresh_table`]) that
            table is trained with the decoder.
        train (`TextRows`): Texts to train on, `(N, T)`.
        test (`TextRows`): Other texts of the same length.
        size (`DecoderSize`): The decoder.
        budget (`Budget`): Its training.
        shuffled (`bool`): Control: every text gets another text's vectors, in training and in the test. What comes
            back then is guessed.
        checkpoint (`Path`, *optional*): Where the training state is kept.
        vectors (`Callable`, *optional*): Gives the vectors of texts, e.g. from a cache. Default: reads them.
        device (`torch.device`, *optional*): Where to compute.
        stop_after (`int`, *optional*): From this step on training ends where the loss on held-back texts rests.
        label (`str`): For the progress bar.

    Returns:
        `dict`: Metrics of the test texts with counts and intervals, what was spent, and the curve of the loss on
        training texts that were held back (`validation`), with whether it still falls (`at_plateau`).

    Raises:
        ValueError: If there are too few texts for a control, or the loss is not finite.
    """
    if shuffled and min(len(train), len(test)) < 2:
        raise ValueError("the shuffled control needs two texts or more in training and in the test; give longer text")
    device = device or encoder.body.device
    length = train.tokens.shape[1]
    decoder = _fresh_decoder(encoder, train, size, budget.seed)
    model = Inverter(encoder.to(device), decoder).to(device)
    read = vectors or (lambda rows: read_all(encoder, rows.tokens))
    known = None if model.trains_table else read(train)
    decoder.standardise(read(train.select(slice(0, 4096))).to(device) if known is None else known)

    def vectors_of(rows: TextRows, index: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        # Another text's: of the text half of all texts away, never its own.
        source = (index + len(rows) // 2) % len(rows) if shuffled else index
        return encoder.read(rows.tokens[source].to(device)) if known is None else known[source].to(device)

    # The last texts are held back: they tell whether the decoder could still be trained further.
    num_held = min(len(train) // 10, max(1, HELD_TOKENS // length))
    order = Order(len(train) - num_held, max(1, budget.batch_tokens // length), budget.seed)

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        logits = decoder(vectors_of(train, index, known))
        rows = decoder.row_of_id[train.tokens[index].to(device)]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows.flatten())

    held = torch.arange(len(train) - num_held, len(train))
    validation = Validation(lambda: loss_of(held).item(), max(1, budget.steps // 20), stop_after)
    losses = fit(
        model,
        lambda step: loss_of(order.rows(step)),
        budget,
        checkpoint=checkpoint,
        validation=validation if num_held else None,
        label=label,
    )
    known = None if model.trains_table else read(test)
    scores = _score(decoder, test, device, lambda index: vectors_of(test, index, known))
    num_vectors = encoder.num_vectors(length)
    result = summarise_scores(scores, encoder.vocab_size, period=length)
    return _with_bytes(result, test, num_vectors * encoder.width) | {
        "num_vectors": num_vectors,
        "final_train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "train_texts": len(train),
        "train_tokens_read": order.rows(0).numel() * length * len(losses),
        "validation": [list(point) for point in validation.points],
        "fall": validation.fall,
        "at_plateau": validation.at_plateau,
        "unknown_test_tokens": int(decoder.is_unknown(test.tokens.to(device)).sum()),
        "decoder_parameters": sum(p.numel() for p in decoder.parameters()),
    }


def _fresh_decoder(encoder: FrozenEncoder, train: TextRows, size: DecoderSize, seed: int) -> VectorDecoder:
    """Build the decoder for an encoder's vectors of such texts; no random number of the caller is used up."""
    length = train.tokens.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VectorDecoder(
            size,
            num_vectors=encoder.num_vectors(length),
            width=encoder.width,
            length=length,
            vocab_size=encoder.vocab_size,
            known_ids=repeated_ids(train.tokens),
        )


@torch.no_grad()
def _score(
    decoder: VectorDecoder, test: TextRows, device: torch.device, vectors: Callable[[torch.Tensor], torch.Tensor]
) -> Scores:
    """Score what a decoder writes of texts from their vectors."""
    parts = []
    for index in torch.arange(len(test)).split(max(1, 8192 // test.tokens.shape[1])):
        targets = test.tokens[index].to(device)
        correct, nats = decoder.token_results(decoder(vectors(index)), targets)
        parts.append(Scores(nats.cpu(), correct.cpu(), targets.cpu()))
    return Scores.join(parts)


def _with_bytes(result: dict[str, Any], test: TextRows, num_numbers: int) -> dict[str, Any]:
    """Add bits per byte, with and without the vectors' own bits, to the metrics of texts."""
    loss, total, num_bytes = result["loss"], result["num_tokens"], int(test.num_bytes.sum())
    bits = num_numbers * 32 * len(test)  # float32, as they are read
    return result | {
        "num_bytes": num_bytes,
        "bits_per_byte": bits_per_byte(loss, total, num_bytes),
        "bits_per_byte_with_memory": bits_per_byte(loss, total, num_bytes, memory_bits=bits),
        "numbers_per_text": num_numbers,
    }
