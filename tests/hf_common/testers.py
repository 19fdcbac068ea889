"""What the library's model tests are run on: tiny configs and inputs, one a way of using the models."""

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from modeling_memory import MaskedMixerConfig, MemoryAutoencoderConfig, MemoryEncoderDecoderConfig

VOCAB_SIZE = 99
HIDDEN_SIZE = 32
NUM_LAYERS = 2
NUM_HEADS = 4
BATCH_SIZE = 4
CHUNK, WINDOW = 4, 8
SLOT = VOCAB_SIZE  # outside the table, so that no random id is one


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, shape)


def llama_config(num_hidden_layers: int = NUM_LAYERS) -> LlamaConfig:
    """Config of encoder and decoder."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=37,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def mixer_config() -> MaskedMixerConfig:
    """Config of a masked mixer with heads."""
    return MaskedMixerConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        intermediate_size=37,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Tester:
    """What the library's tests read off a model tester."""

    batch_size = BATCH_SIZE
    seq_length = 7
    is_training = True
    vocab_size = VOCAB_SIZE
    hidden_size = HIDDEN_SIZE
    num_hidden_layers = NUM_LAYERS
    num_attention_heads = NUM_HEADS

    def __init__(self, parent: Any):
        self.parent = parent

    def get_config(self) -> PreTrainedConfig:
        """A fresh config."""
        raise NotImplementedError

    def get_inputs(self) -> dict[str, torch.Tensor]:
        """Fresh inputs of `batch_size` rows."""
        return {
            "input_ids": _ids(self.batch_size, self.seq_length),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
        }

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """Config and inputs, as the library's tests ask for them."""
        return self.get_config(), self.get_inputs()


class MemoryTester(Tester):
    """A memory model whose parts all train, so that tests of gradients reach all of them."""

    num_encoder_layers = NUM_LAYERS

    def get_config(self) -> MemoryEncoderDecoderConfig:
        """A Llama that reads the memories of a Llama."""
        return MemoryEncoderDecoderConfig(
            encoder=llama_config(self.num_encoder_layers),
            decoder=llama_config(),
            chunk_length=CHUNK,
            window_length=WINDOW,
            memory_token_id=SLOT,
            freeze_encoder=False,
        )


class OneWindowTester(MemoryTester):
    """Texts shorter than a window: the plain decoder."""


class WindowsTester(MemoryTester):
    """Texts of two full windows and a part of a third."""

    seq_length = 2 * WINDOW + 3


class SlotsTester(MemoryTester):
    """Two chunks of a context, whose slots stand in a text: where the library's tests pad nothing."""

    slots = slice(2, 4)

    def get_inputs(self) -> dict[str, torch.Tensor]:
        """Text with slots, and context."""
        inputs = super().get_inputs()
        inputs["input_ids"][:, self.slots] = SLOT
        return {**inputs, "context_input_ids": _ids(self.batch_size, 2, CHUNK)}


class MixerTester(Tester):
    """Text read by a masked mixer."""

    def get_config(self) -> MaskedMixerConfig:
        """A causal mixer."""
        return mixer_config()


class AutoencoderTester(Tester):
    """Chunks written back from one vector."""

    seq_length = CHUNK

    def get_config(self) -> MemoryAutoencoderConfig:
        """A Llama that is read, and one that writes."""
        return MemoryAutoencoderConfig(encoder=llama_config(), decoder=llama_config(), chunk_length=CHUNK)
