"""The library's own tests of configs, on our three."""

import pytest
import torch

from modeling_memory import MaskedMixerConfig, MemoryAutoencoderConfig, MemoryEncoderDecoderConfig
from tests.hf_common.library import ConfigTester, TestCase
from tests.hf_common.testers import AutoencoderTester, MixerTester, OneWindowTester

pytestmark = pytest.mark.hf_common
CASES = {
    MaskedMixerConfig: (MixerTester, {"vocab_size": 50, "hidden_size": 32, "num_heads": 2, "kernel_size": 2}),
    MemoryAutoencoderConfig: (AutoencoderTester, {"chunk_length": 8, "memories_per_chunk": 2, "pooling": "mean"}),
    MemoryEncoderDecoderConfig: (OneWindowTester, {"chunk_length": 8, "window_length": 32, "max_memories": 6}),
}
PROPERTIES = {
    MaskedMixerConfig: ["hidden_size", "num_hidden_layers", "max_position_embeddings"],  # it has no attention heads
    MemoryAutoencoderConfig: ["hidden_size"],
    MemoryEncoderDecoderConfig: ["hidden_size", "max_position_embeddings"],
}


@pytest.mark.parametrize("config_class", CASES, ids=lambda cls: cls.__name__)
def test_config(config_class: type) -> None:
    tester_class, fields = CASES[config_class]
    parent = TestCase()
    parent.model_tester = tester_class(parent)
    tester = ConfigTester(parent, config_class, common_properties=[*PROPERTIES[config_class]], **fields)
    tester.run_common_tests()


def test_dtype_is_told_as_torch_knows_it() -> None:
    assert MaskedMixerConfig(dtype="float16").dtype == torch.float16
