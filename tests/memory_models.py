"""Tiny memory models of all families that the tests run through."""

import itertools
from typing import Any

import torch

from modeling_memory import MemoryEncoderDecoderConfig, MemoryEncoderDecoderForCausalLM
from modeling_memory.modeling_memory_autoencoder import MemoryAutoencoder, MemoryAutoencoderConfig
from tests.conftest import DECODERS, ENCODERS, VOCAB_SIZE, tiny_decoder_config, tiny_encoder_config

SLOT, COPY, BLANK = VOCAB_SIZE, 3, 4
CHUNK, WINDOW = 4, 8
ALL_ENCODERS = (*ENCODERS, "memory_autoencoder")
FAMILIES = tuple(itertools.product(ALL_ENCODERS, DECODERS))


def build_model(
    encoder: str = "masked_mixer", decoder: str = "llama", **fields: Any
) -> MemoryEncoderDecoderForCausalLM:
    """A random memory model in `eval()` mode: chunks of 4 tokens, windows of 8.

    `encoder` is one of `ALL_ENCODERS`, `decoder` one of `DECODERS`; fields go to the configuration.
    """
    torch.manual_seed(0)
    fields = {
        "chunk_length": CHUNK,
        "window_length": WINDOW,
        "memory_token_id": SLOT,
        "copy_token_id": COPY,
        "blank_token_id": BLANK,
        "initializer_range": 0.3,  # memories that visibly matter
        **fields,
    }
    decoder_config = tiny_decoder_config(decoder)
    if encoder == "memory_autoencoder":
        fields.pop("initializer_range")
        body = tiny_encoder_config("masked_mixer")
        autoencoder = MemoryAutoencoder(
            MemoryAutoencoderConfig(encoder=body, decoder=tiny_encoder_config("masked_mixer"), chunk_length=CHUNK)
        )
        plain = MemoryEncoderDecoderForCausalLM(
            MemoryEncoderDecoderConfig(encoder=body, decoder=decoder_config, chunk_length=CHUNK)
        )
        return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(autoencoder, plain.decoder, **fields)
    config = MemoryEncoderDecoderConfig(encoder=tiny_encoder_config(encoder), decoder=decoder_config, **fields)
    return MemoryEncoderDecoderForCausalLM(config).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids of ordinary tokens."""
    return torch.randint(5, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def ragged_batch(num_columns: int = 29) -> tuple[torch.Tensor, torch.Tensor]:
    """Four texts: full, padded on the left, on the right, and with holes and on both sides."""
    input_ids = random_ids(4, num_columns)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :7] = 0
    attention_mask[2, num_columns - 9 :] = 0
    attention_mask[3, [0, 1, 5, 6, 11, num_columns - 1]] = 0
    return input_ids.masked_fill(attention_mask == 0, 0), attention_mask


def gradients_of(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the backward pass of a loss alone; return the gradients of all parameters that got one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4, least: float = 1e-4
) -> None:
    """The same parameters have gradients, and each differs by a share of its largest number at most."""
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        largest = gradient.abs().max().clamp(min=least)
        assert (found[name] - gradient).abs().max() <= tolerance * largest, name


def assert_equal_gradients(
    model: torch.nn.Module, fast: torch.Tensor, slow: torch.Tensor, *, atol: float, rtol: float = 0.0
) -> dict[str, torch.Tensor]:
    """A random sum of two results has the same gradient in every parameter that trains; returns those there are."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    weights = torch.randn_like(slow) if slow.dim() else torch.ones_like(slow)
    sides = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True) for x in (fast, slow))
    found = {}
    for name, one, other in zip(names, *sides, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")
            found[name] = one
    return found
