"""A byte-level BPE tokenizer with the special tokens of the objectives, trained on the run's own text.

Ids are fixed: `<pad>` 0, `<bos>` 1, `<eos>` 2, `<copy>` 3, `<blank>` 4, and `<memory>` the last one, `vocab_size`: the
slot id needs no row in a token table, so tables of `vocab_size` rows hold all other tokens.
"""

from collections.abc import Iterable, Iterator

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_memory.store.fingerprint import tokenizer_checksum as tokenizer_checksum

from .objectives import SpecialTokens

PAD, BOS, EOS, COPY, BLANK, MEMORY = "<pad>", "<bos>", "<eos>", "<copy>", "<blank>", "<memory>"
TABLE_SPECIALS = (PAD, BOS, EOS, COPY, BLANK)
NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, *, max_bytes: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text comes back exactly, and no special token is added by itself.

    Equal texts in equal order give an equal tokenizer.

    Args:
        texts (`Iterable[str]`): Documents.
        vocab_size (`int`): Rows of the models' token tables: special tokens, the 256 bytes and the merges. The
            tokenizer has one more entry, `<memory>`.
        max_bytes (`int`, *optional*): Train on about this many bytes, documents taken evenly from all of the texts.

    Returns:
        `PreTrainedTokenizerFast`: Pads on the left, as generation needs it.

    Raises:
        ValueError: If the vocabulary cannot hold the special tokens and the bytes, or the texts do not have that many
            merges.

    >>> tokenizer = train_tokenizer(["the theme of the thesis"], vocab_size=263)
    >>> tokenizer.convert_ids_to_tokens(tokenizer("the eta<memory>").input_ids)
    ['the', 'Ġ', 'e', 't', 'a', '<memory>']
    >>> tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<copy>", "<blank>", "<memory>"])
    [0, 1, 2, 3, 4, 263]
    >>> tokenizer.decode(tokenizer("naïve 🙂").input_ids)
    'naïve 🙂'
    """
    smallest = len(TABLE_SPECIALS) + NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {len(TABLE_SPECIALS)} special tokens and {NUM_BYTES} bytes need "
            f"{smallest}. Give at least {smallest}; 2048 or more is usual."
        )
    if isinstance(texts, str):
        raise ValueError("texts is a single string; expected a list of documents. Wrap it: [text].")
    backend = _trained(texts if max_bytes is None else _evenly(list(texts), max_bytes), vocab_size)
    reached = backend.get_vocab_size()
    if reached != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the texts have pairs to merge for {reached} tokens only. Give more "
            f"text, or a vocab_size of at most {reached}."
        )
    backend.add_special_tokens([AddedToken(MEMORY, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[COPY, BLANK, MEMORY],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _trained(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in TABLE_SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def special_tokens_of(
    tokenizer: PreTrainedTokenizerBase, copy: int | str | None = None, blank: int | str | None = None
) -> SpecialTokens:
    """Return the ids that the objectives need; those of markers and slots that the tokenizer lacks are `None`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): From [`train_tokenizer`], or any with `<copy>`, `<blank>` and
            `<memory>` added.
        copy (`int` or `str`, *optional*): Of a tokenizer without `<copy>`, the token that serves as COPY.
        blank (`int` or `str`, *optional*): Likewise.

    Raises:
        ValueError: If the tokenizer has no padding token, a marker is no token of it, or ids clash.

    >>> special_tokens_of(train_tokenizer(["abab"], vocab_size=262))
    SpecialTokens(pad=0, bos=1, eos=2, memory=262, copy=3, blank=4)
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token; set one, e.g. tokenizer.pad_token = tokenizer.eos_token."
        )
    added = tokenizer.get_added_vocab()
    markers = {COPY: copy, BLANK: blank}
    for name, given in markers.items():
        if isinstance(given, str):
            markers[name] = tokenizer.get_vocab().get(given)
            if markers[name] is None:
                raise ValueError(f"the tokenizer has no token {given!r} to serve as {name}; name one that it has.")
    return SpecialTokens(
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        memory=added.get(MEMORY),
        copy=added.get(COPY, markers[COPY]),
        blank=added.get(BLANK, markers[BLANK]),
    )


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer that was made elsewhere what slots and padding need, where it lacks it.

    `<memory>` gets the id after its last one; padding, which is always masked, is the end token. Markers are not
    added: they would need rows of the model's tables.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any; changed in place.

    Raises:
        ValueError: If it has neither a padding nor an end token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer has neither a padding nor an end token; set one, e.g. tokenizer.eos_token = '</s>'."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if MEMORY not in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [MEMORY]}, replace_extra_special_tokens=False)
    return tokenizer


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return how many bytes of text each id stands for, so that any row's bytes can be counted exactly.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A byte-level one; special tokens count 0.

    Returns:
        `torch.LongTensor` of shape `(len(tokenizer),)`.

    Raises:
        ValueError: If the tokenizer is not byte-level: its tokens do not stand for fixed bytes.

    >>> tokenizer = train_tokenizer(["abab"], vocab_size=262)
    >>> token_byte_lengths(tokenizer)[tokenizer("abé<eos>").input_ids].tolist()
    [2, 1, 1, 0]
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel):
        raise ValueError(
            f"bytes of a token are known for byte-level tokenizers, but {type(tokenizer).__name__} is none. Count the "
            "bytes of whole texts instead."
        )
    lengths = torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.long)
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    indices, names = zip(*pieces, strict=True)
    lengths[list(indices)] = torch.tensor([len(name) for name in names])  # one character of a piece is one byte
    lengths[sorted(tokenizer.added_tokens_decoder)] = 0
    return lengths


def _evenly(texts: list[str], max_bytes: int) -> Iterator[str]:
    """Yield about `max_bytes` of the texts, spread evenly over all of them; at least one document.

    >>> list(_evenly(["aaaa", "bbbb", "cccc", "dddd"], max_bytes=8))
    ['bbbb', 'dddd']
    """
    total = sum(len(text.encode()) for text in texts)
    seen = taken = 0
    for text in texts:
        size = len(text.encode())
        seen += size
        # Take a document whenever the share taken would otherwise fall a document behind.
        if (taken + size) * total <= seen * max_bytes or (seen == total and taken == 0):
            taken += size
            yield text
