"""Foreign models as frozen encoders: load one, and read vectors of a text out of it.

B texts, T tokens of a text, K vectors of a text, L tokens that are read at a time, E width of a vector.

Source: Badger 2026, arXiv 2602.13466, information retention of frozen models. There no attention mask is passed and
the probed "last token" may be padding or a special token; here the mask is always passed and the last token of the
*text* is read.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_memory import MemoryAutoencoder, MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_encoder import build_encoder, build_pooling

POSITIONS = ("last", "second_to_last", "mean", "cls")
UNTRAINED = "untrained:"
READ_TOKENS = 8192  # tokens that a frozen model reads at a time
OWN_TYPES = ("memory_autoencoder", "memory_encoder_decoder")


@dataclass(frozen=True)
class FrozenEncoder:
    """A model that is read, never trained.

    Attributes:
        name (`str`): What it is called in tables.
        body (`PreTrainedModel`): Gives `last_hidden_state`.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        position (`str`): Which state is the vector: that of the `"last"` or `"second_to_last"` token of the text, the
            `"mean"` over all columns, the tokenizer's special tokens included, or `"cls"`, the first column. `"own"`:
            what `pooling` says.
        prefix (`tuple[int, ...]`): Special tokens that its tokenizer puts in front of a text.
        suffix (`tuple[int, ...]`): Those after it.
        chunk_length (`int`, *optional*): Tokens that are read at a time; longer texts give a vector a chunk. `None`:
            the whole text at once.
        pooling (`nn.Module`, *optional*): How a model of this package reads its own vectors.
        vectors_per_chunk (`int`): Vectors that `pooling` gives for each chunk.
        bottleneck (`nn.Module`, *optional*): What an autoencoder's vectors go through.
    """

    name: str
    body: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    position: str = "last"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    chunk_length: int | None = None
    pooling: nn.Module | None = None
    vectors_per_chunk: int = 1
    bottleneck: nn.Module | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of its token table (V)."""
        return int(self.body.config.vocab_size)

    @property
    def width(self) -> int:
        """Numbers of a vector (E)."""
        return int(self.body.config.hidden_size)

    @property
    def max_tokens(self) -> int | None:
        """Most text tokens that it reads at a time, beside its special tokens; `None` if nothing says so."""
        limits = [getattr(self.body.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        known = [int(limit) for limit in limits if limit is not None and limit < 10**9]
        return min(known) - len(self.prefix) - len(self.suffix) if known else None

    def num_vectors(self, length: int) -> int:
        """Vectors (K) that a text of so many tokens gives.

        Raises:
            ValueError: If it cannot be read.
        """
        chunk = length if self.chunk_length is None else min(self.chunk_length, length)
        limit = self.max_tokens
        if limit is not None and chunk > limit:
            raise ValueError(
                f"{self.name} reads {limit} tokens of text at a time, but the length is {length}. Give lengths up to "
                f"{limit}, or --chunk {limit} to read longer texts in pieces, a vector each"
            )
        if length % chunk:
            raise ValueError(
                f"{self.name} reads {chunk} tokens at a time, and a length of {length} is no multiple of that; give a "
                f"multiple of {chunk}, or a shorter length"
            )
        if self.position == "second_to_last" and chunk < 2:
            raise ValueError(f"a text of {chunk} token has no second-to-last one; give lengths of 2 or more")
        if chunk < self.vectors_per_chunk:
            raise ValueError(f"{self.name} reads {self.vectors_per_chunk} vectors of a chunk; give longer texts")
        return length // chunk * self.vectors_per_chunk

    def with_fresh_table(self, seed: int = 0) -> "FrozenEncoder":
        """Return a copy whose token table is new and trainable, of the old one's scale; all else stays frozen.

        The paper's small frozen encoders are read like this: a table is trained in front of their frozen blocks.
        """
        body = copy.deepcopy(self.body)
        old = body.get_input_embeddings()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            table = nn.Embedding(*old.weight.shape)
            nn.init.normal_(table.weight, std=float(old.weight.float().std()))
        body.set_input_embeddings(table.to(old.weight.device))
        return replace(self, body=body)

    def to(self, device: torch.device) -> "FrozenEncoder":
        """Move the model."""
        self.body.to(device)
        if self.bottleneck is not None:
            self.bottleneck.to(device)
        return self

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the vectors of texts.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`): Texts of equal length, without special tokens.

        Returns:
            `torch.Tensor` of shape `(B, K, E)`.

        Raises:
            ValueError: If the texts are too long, or hold ids that the model does not have.
        """
        batch_size, length = tokens.shape
        num_vectors = self.num_vectors(length)
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            raise ValueError(
                f"the text has the token {int(tokens.max())}, but {self.name} has {self.vocab_size}; this is the "
                "tokenizer of another model"
            )
        chunks = tokens.reshape(batch_size * num_vectors // self.vectors_per_chunk, -1)  # (N, L)
        front, back = (
            torch.tensor(ids, dtype=torch.long, device=tokens.device).expand(len(chunks), -1)
            for ids in (self.prefix, self.suffix)
        )
        input_ids = torch.cat([front, chunks, back], 1)
        outputs = self.body(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), return_dict=True)
        states, first, end = outputs.last_hidden_state, len(self.prefix), len(self.prefix) + chunks.shape[1]
        if self.pooling is not None:
            vectors = self.pooling(states[:, first:end], torch.ones_like(chunks))
        elif self.position == "mean":
            vectors = states.mean(1)
        else:
            vectors = states[:, {"last": end - 1, "second_to_last": end - 2, "cls": 0}[self.position]]
        if self.bottleneck is not None:
            vectors = self.bottleneck(vectors)
        return vectors.reshape(batch_size, num_vectors, -1)


@torch.no_grad()
def read_all(encoder: FrozenEncoder, tokens: torch.Tensor) -> torch.Tensor:
    """Read the vectors of many texts `(N, T)`, some at a time; returns `(N, K, E)` on the CPU."""
    device = encoder.body.device
    rows = max(1, READ_TOKENS // tokens.shape[1])
    return torch.cat([encoder.read(part.to(device)).float().cpu() for part in tokens.split(rows)])


def load_encoder(
    name: str,
    *,
    position: str | None = None,
    chunk_length: int | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> FrozenEncoder:
    """Load a model as frozen encoder.

    Args:
        name (`str`): Folder or Hub id of any text model, this package's included (then its encoder is read, a chunk at
            a time). `untrained:` in front takes the architecture with fresh weights, `@mean` at the end (or another of
            `POSITIONS`) says which state is its vector.
        position (`str`, *optional*): Which state, where the name does not say. Default: as the model itself reads its
            vectors (models of this package, sentence encoders), else the last token of the text.
        chunk_length (`int`, *optional*): Read longer texts in pieces of so many tokens.
        tokenizer (`str`, *optional*): Folder or Hub id of its tokenizer, where it is not beside the model.
        trust_remote_code (`bool`): Whether to run code that comes with the model.
        seed (`int`): Of fresh weights.

    Raises:
        ValueError: If there is no such model, it has no hidden states, or the tokenizer does not belong to it.
    """
    place, _, given = name.partition("@")
    position = given or position
    if position is not None and position not in POSITIONS:
        raise ValueError(f"{name}: the position {position!r} is unknown; known: {', '.join(POSITIONS)}")
    place, fresh = place.removeprefix(UNTRAINED), place.startswith(UNTRAINED)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{place} is no folder or Hub id of a model ({str(error).splitlines()[0]}); give the folder that holds "
            "config.json and weights"
        ) from error
    body, bottleneck = _body(place, config, trust_remote_code, fresh, seed)
    loaded = _fast_tokenizer(tokenizer or place, trust_remote_code)
    prefix, suffix = special_tokens_around(loaded)
    own = config.model_type in OWN_TYPES
    pooling = build_pooling(config.pooling, config.memories_per_chunk) if own and position is None else None
    if position is None:
        position = "own" if own else _sentence_pooling(place) or "last"
    if chunk_length is None and own:
        chunk_length = config.chunk_length
    encoder = FrozenEncoder(
        name=label_of(name, position),
        body=body.eval().requires_grad_(False),
        tokenizer=loaded,
        position=position,
        prefix=prefix,
        suffix=suffix,
        chunk_length=chunk_length,
        pooling=pooling,
        vectors_per_chunk=config.memories_per_chunk if pooling is not None else 1,
        bottleneck=bottleneck,
    )
    check_encoder(encoder)
    return encoder


def _fast_tokenizer(place: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        loaded = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} has no tokenizer; name one with --tokenizer") from error
    if not getattr(loaded, "is_fast", False):
        raise ValueError(f"{place} has no fast tokenizer (tokenizer.json); name one with --tokenizer")
    return loaded


def _body(
    place: str, config: Any, trust_remote_code: bool, fresh: bool, seed: int
) -> tuple[PreTrainedModel, nn.Module | None]:
    """Return the body and the bottleneck after it, of a trained or a fresh model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model_type == "memory_autoencoder":
            model = MemoryAutoencoder(config) if fresh else MemoryAutoencoder.from_pretrained(place)
            bottleneck = None if model.bottleneck is None else model.bottleneck.eval().requires_grad_(False)
            return model.encoder, bottleneck
        if config.model_type == "memory_encoder_decoder":
            if fresh:
                return build_encoder(config.encoder), None
            return MemoryEncoderDecoderForCausalLM.from_pretrained(place).encoder, None
        if fresh:
            body = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        else:
            body = AutoModel.from_pretrained(place, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return (body.get_encoder() if getattr(config, "is_encoder_decoder", False) else body), None


def _sentence_pooling(place: str) -> str | None:
    """Return how a sentence encoder says that its vector is read, or `None`."""
    file = cached_file(
        place,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if file is None:
        return None
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    chosen = [position for key, position in names.items() if settings.get(key)]
    return chosen[0] if len(chosen) == 1 else None


def label_of(name: str, position: str) -> str:
    """Name a model in a table: the last two parts of its path that say something, and the state that is read.

    >>> label_of("runs/quickstart/stages/autoencoder/model", "last")
    'quickstart/autoencoder, last'
    >>> label_of("untrained:some/bert-tiny@mean", "mean")
    'untrained some/bert-tiny, mean'
    """
    place = name.partition("@")[0]
    fresh = "untrained " if place.startswith(UNTRAINED) else ""
    silent = ("model", "hub", "stages", "", ".", "..")
    parts = [part for part in place.removeprefix(UNTRAINED).split("/") if part not in silent]
    return f"{fresh}{'/'.join(parts[-2:]) or place}, {position}"


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that a tokenizer puts in front of a text, and after it.

    Raises:
        ValueError: If it changes the text between them.
    """
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    raise ValueError(
        f"{type(tokenizer).__name__} changes a text when it adds special tokens ({inner} became {whole}); such a "
        "tokenizer cannot be probed"
    )


@torch.no_grad()
def check_encoder(encoder: FrozenEncoder) -> None:
    """Check that a model gives hidden states and that the tokenizer is its own.

    Raises:
        ValueError: Naming what is missing.
    """
    config = encoder.body.config
    rows, entries = getattr(config, "vocab_size", None), len(encoder.tokenizer)
    if rows is None or getattr(config, "hidden_size", None) is None:
        raise ValueError(
            f"{encoder.name}: a {config.model_type!r} model has no token table or hidden states to probe; give a text "
            "model"
        )
    highest = max(encoder.tokenizer.get_vocab().values(), default=0)
    # Slots stand just after the table of this package's models; others pad their tables by a few rows.
    if highest > rows or entries < 0.8 * rows:
        raise ValueError(
            f"the tokenizer has {entries} entries, but {encoder.name} has a table of {rows} rows: it is the tokenizer "
            "of another model. Name the right one with --tokenizer"
        )
    tokens = torch.zeros(1, 1, dtype=torch.long)
    ids = torch.cat([torch.tensor([encoder.prefix], dtype=torch.long), tokens], 1)
    outputs = encoder.body(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None or states.dim() != 3 or states.shape[:2] != ids.shape:
        raise ValueError(
            f"{encoder.name}: a {config.model_type!r} model gives no `last_hidden_state` of one state a token; give a "
            "model with hidden states"
        )


@dataclass(frozen=True)
class TextRows:
    """Texts of equal length, cut from documents.

    Attributes:
        tokens (`torch.LongTensor` of shape `(N, T)`): N texts in the order of the documents.
        num_bytes (`torch.LongTensor` of shape `(N,)`): Bytes of each text in UTF-8, spaces included.
    """

    tokens: torch.Tensor
    num_bytes: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Any) -> "TextRows":
        """Return some of the texts."""
        return TextRows(self.tokens[index], self.num_bytes[index])


def cut_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, limit: int | None = None
) -> TextRows:
    """Cut documents into texts of `length` tokens; none crosses a document, what is left of one is dropped.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer; it adds no special tokens here.
        texts (`Sequence[str]`): Documents.
        length (`int`): Tokens of a text (T).
        limit (`int`, *optional*): Stop at so many texts.

    Raises:
        ValueError: If no document is that long, or there is none.
    """
    rows: list[list[int]] = []
    num_bytes: list[int] = []
    for text in texts:
        # Documents of megabytes are tokenised in pieces: only whole rows are wanted.
        for piece in _pieces(text):
            encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, ends = encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]
            begin = 0
            for start in range(0, len(ids) - length + 1, length):
                rows.append(ids[start : start + length])
                end = ends[start + length - 1]
                num_bytes.append(len(piece[begin:end].encode()))
                begin = end
                if limit is not None and len(rows) >= limit:
                    return TextRows(torch.tensor(rows), torch.tensor(num_bytes))
    if not rows:
        what = "is empty" if not any(text.strip() for text in texts) else f"has no {length} tokens in a row"
        raise ValueError(f"the text {what}; give a longer text or shorter lengths")
    return TextRows(torch.tensor(rows), torch.tensor(num_bytes))


def _pieces(text: str, size: int = 200_000) -> list[str]:
    r"""Cut a long document at line ends into pieces of about `size` characters.

    >>> _pieces("ab\ncd\nef", size=4)
    ['ab\ncd\n', 'ef']
    """
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += line
    return pieces
