"""From text files to token rows: reading, checking that splits share nothing, tokenising, packing, counting bytes.

A split is one flat stream of tokens, each document followed by an end token, so that no text is lost to padding. Rows
are cut from it: whole rows for training, all tokens with a mask for evaluation.
"""

import array
import copy
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .sources import read_file
from .tokenizer import tokenizer_checksum

logger = logging.get_logger(__name__)

BATCH_CHARACTERS = 4_000_000
CACHE_FORMAT = 1


@dataclass(frozen=True)
class TokenisedSplit:
    """A split as one flat stream of tokens.

    Attributes:
        tokens (`torch.LongTensor` of shape `(num_tokens,)`): Each document followed by an end token.
        num_documents (`int`): Documents, and so end tokens.
        num_bytes (`int`): Bytes of the documents' text in UTF-8; end tokens have none.
    """

    tokens: torch.Tensor
    num_documents: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens, end tokens included."""
        return self.tokens.numel()


def load_texts(files: Iterable[str | Path], text_column: str = "text") -> list[str]:
    """Read documents from files, in the order given.

    Args:
        files (`Iterable[str or Path]`): `.parquet`, `.jsonl` (one object a line) or `.txt` (one document), the latter
            two also with `.gz` or `.zst`.
        text_column (`str`): Column or field that holds a document's text.

    Returns:
        `list[str]`: The documents; those without a visible character are left out.

    Raises:
        ValueError: If a file is missing, of another kind, damaged, lacks the column, or if there is no text at all.
    """
    paths = [Path(name) for name in files]
    if not paths:
        raise ValueError("no files were given; name at least one text file.")
    return [text for path in paths for text in read_file(path, text_column)]


def file_checksums(files: Iterable[str | Path]) -> dict[str, str]:
    """Return the SHA-256 of each file under its name; of files of one name under as many folders as tell them apart.

    Args:
        files (`Iterable[str or Path]`): Files.

    Raises:
        ValueError: If a file is missing.
    """
    paths = sorted({Path(file).resolve() for file in files})
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    checksums = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is no file, so it has no checksum. Correct the path.")
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        checksums["/".join(path.parts[-depth:])] = digest.hexdigest()
    return checksums


def check_splits(
    train: Iterable[str], validation: Iterable[str], test: Iterable[str], *, min_line_length: int = 200
) -> None:
    """Refuse splits that share a document or a long line: what was trained on proves nothing.

    White space around documents and lines does not count. Rewordings and shorter passages are not found.

    Args:
        train (`Iterable[str]`): Documents of the training split.
        validation (`Iterable[str]`): Documents of the validation split.
        test (`Iterable[str]`): Documents of the test split.
        min_line_length (`int`): Characters from which on a line shared by two splits is no coincidence.

    Raises:
        ValueError: If two splits share something; names both and the start of the text.

    >>> check_splits(["a b", "c"], ["d"], ["e"])
    >>> check_splits(["a b", "c"], ["d"], [" c "])
    Traceback (most recent call last):
    ValueError: the splits train and test share a document ... 'c'. ...
    """
    seen: dict[str, str] = {}
    # Training comes last and is not kept: only the two small splits are held in memory.
    for name, texts in (("test", test), ("validation", validation), ("train", train)):
        own: set[str] = set()
        for text in texts:
            for kind, piece in shared_pieces(text, min_line_length):
                if piece in seen:
                    start = piece if len(piece) <= 80 else piece[:80] + "..."
                    raise ValueError(
                        f"the splits {name} and {seen[piece]} share a {kind} of {len(piece)} characters that begins "
                        f"{start!r}. Take it out of one of them."
                    )
                if name != "train":
                    own.add(piece)
        seen.update(dict.fromkeys(own, name))


def tokenise_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, cache_folder: str | Path | None = None
) -> TokenisedSplit:
    """Tokenise documents and pack them into one stream, each followed by the end token.

    What looks like a special token in a text is tokenised as ordinary text. The tokenizer's own template is not used.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an end token.
        texts (`Sequence[str]`): Documents.
        cache_folder (`str` or `Path`, *optional*): Where the stream is kept, under a name made of the texts and the
            tokenizer, and found again by the next call with both.

    Returns:
        [`TokenisedSplit`]: The stream and its counts.

    Raises:
        ValueError: If there is no text, no end token, or no fast tokenizer.

    >>> from training.data.tokenizer import train_tokenizer
    >>> split = tokenise_documents(train_tokenizer(["abab"], vocab_size=262), ["ab", "abé"])
    >>> split.tokens.tolist(), split.num_bytes
    ([261, 2, 261, 132, 107, 2], 6)
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.eos_token_id is None:
        missing = "is no fast tokenizer" if backend is None else "has no end token"
        raise ValueError(
            f"{type(tokenizer).__name__} {missing}; packing needs both. Load it with AutoTokenizer and set its "
            "eos_token."
        )
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}; expected a list of at least one document.")
    if cache_folder is None:
        return _tokenise(tokenizer, texts)
    file = Path(cache_folder) / f"tokens-{_cache_key(tokenizer, texts)}.safetensors"
    cached = _load_cached(file)
    if cached is None:
        cached = _tokenise(tokenizer, texts)
        _save_cached(cached, file)
    return cached


def count_bytes(texts: Iterable[str]) -> int:
    """Return the bytes of texts in UTF-8.

    Args:
        texts (`Iterable[str]`): Documents.

    >>> count_bytes(["ab", "é"])
    4
    """
    return sum(len(text.encode()) for text in texts)


def shared_pieces(text: str, min_line_length: int) -> Iterator[tuple[str, str]]:
    """Yield what must not occur in two splits: the document and its long lines."""
    yield "document", text.strip()
    for line in text.splitlines():
        if len(line) >= min_line_length and len(line.strip()) >= min_line_length:
            yield "line", line.strip()


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> TokenisedSplit:
    backend = copy.deepcopy(tokenizer.backend_tokenizer)  # settings are changed below
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # a special token's name in a text is only text
    stream = array.array("q")
    for batch in _batches(texts):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            stream.extend(encoding.ids)
            stream.append(tokenizer.eos_token_id)
    return TokenisedSplit(torch.frombuffer(stream, dtype=torch.long), len(texts), count_bytes(texts))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield documents in batches of a few megabytes, which the Rust side works on in parallel."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cache_key(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{CACHE_FORMAT} {tokenizer_checksum(tokenizer)} {tokenizer.eos_token_id}".encode())
    for text in texts:
        encoded = text.encode()
        digest.update(f" {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()[:32]


def _save_cached(split: TokenisedSplit, file: Path) -> None:
    """Write under another name first: a run that is killed, or another process, never leaves half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    os.close(handle)
    try:
        counts = {"num_documents": str(split.num_documents), "num_bytes": str(split.num_bytes)}
        save_file({"tokens": split.tokens.to(torch.int32)}, temporary, metadata=counts)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _load_cached(file: Path) -> TokenisedSplit | None:
    """Return what is kept, or `None` if there is nothing or it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            counts = stored.metadata()
            tokens = stored.get_tensor("tokens").long()
            return TokenisedSplit(tokens, int(counts["num_documents"]), int(counts["num_bytes"]))
    except SafetensorError as error:
        logger.warning(f"{file} is damaged ({error}); the texts are tokenised again.")
        return None
