"""Shared fixtures: no network, one thread, fixed seeds, tiny configurations, tokenizers built in memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub client, which reads it once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import logging  # noqa: E402  (the environment must be set before the imports below)
import random  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    BertConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB_SIZE = 96
"""Rows of the tiny models' token tables; the tiny tokenizer's memory token is this id, just outside them."""

HIDDEN_SIZE = 32
MAX_POSITIONS = 128

DECODERS = ("llama", "qwen3", "gpt_neox")
ENCODERS = ("masked_mixer", "llama", "bert")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Fix seeds and threads, so that a test gives the same result alone and in the whole run."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.messages.append(message)


@pytest.fixture(autouse=True)
def _library_deprecations_fail() -> Iterator[None]:
    """The library logs most deprecations instead of warning: one that our code caused is a failure."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages, f"transformers reported a deprecation: {handler.messages}"


def tiny_decoder_config(kind: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Configuration of a two-layer causal LM.

    `kind` is one of `DECODERS`; overrides go to the configuration class.
    """
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,  # wide enough that another input visibly gives another output
    }
    if kind == "llama":
        return LlamaConfig(**{**common, "num_key_value_heads": 2, **overrides})
    if kind == "qwen3":
        return Qwen3Config(**{**common, "num_key_value_heads": 2, "head_dim": 8, **overrides})
    if kind == "gpt_neox":
        return GPTNeoXConfig(**{**common, **overrides})
    raise ValueError(f"unknown decoder {kind!r}; one of {DECODERS}")


def tiny_encoder_config(kind: str = "masked_mixer", **overrides: Any) -> PreTrainedConfig:
    """Configuration of a two-layer encoder body.

    `kind` is one of `ENCODERS`; overrides go to the configuration class.
    """
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    if kind == "masked_mixer":
        import modeling_memory  # noqa: F401  (registers the model type)

        mixer = {"intermediate_size": 64, "num_heads": 2, "kernel_size": 1, "max_position_embeddings": 32}
        known = {**common, **mixer, **overrides}
        return AutoConfig.for_model("masked_mixer", **known)
    if kind == "llama":
        attention = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaConfig(**{**common, **attention, **overrides})
    if kind == "bert":
        attention = {"intermediate_size": 64, "num_attention_heads": 4}
        return BertConfig(**{**common, **attention, **overrides})
    raise ValueError(f"unknown encoder {kind!r}; one of {ENCODERS}")


@pytest.fixture
def decoder_config() -> Callable[..., PreTrainedConfig]:
    return tiny_decoder_config


@pytest.fixture
def encoder_config() -> Callable[..., PreTrainedConfig]:
    return tiny_encoder_config


_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,;:!?'\"-()<>"
_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), (" ", "the"), ("o", "n"), ("r", "e")]
_MERGES += [("an", "d"), ("o", "u"), ("in", "g"), ("e", "s")]


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character tokenizer with a few merges: ids 0..95 are rows of the tiny models, 96 is `<memory>`.

    Pad 0, bos 1, eos 2, copy 3, blank 4. It adds no special token by itself and gives back what it was given.
    """
    specials = ["<pad>", "<bos>", "<eos>", "<copy>", "<blank>"]
    pieces = specials + list(_ALPHABET) + ["".join(pair) for pair in _MERGES]
    assert len(pieces) <= VOCAB_SIZE, len(pieces)
    pieces += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(pieces))]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<memory>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([*specials, "<memory>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<copy>", "<blank>", "<memory>"],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """A second character tokenizer with other ids; like BERT's, it puts `[CLS]` and `[SEP]` around a text."""
    specials = ["[PAD]", "[CLS]", "[SEP]"]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *reversed(_ALPHABET)])}
    assert len(vocabulary) <= VOCAB_SIZE, len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer()


@pytest.fixture
def encoder_tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_encoder_tokenizer()
