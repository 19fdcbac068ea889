"""The library's own tests of processors, on ours with one tokenizer and with two."""

from typing import Any

import pytest

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_encoder_tokenizer, build_tiny_tokenizer
from tests.hf_common.library import ProcessorTesterMixin, TestCase

pytestmark = pytest.mark.hf_common


class ProcessorTest(ProcessorTesterMixin, TestCase):
    processor_class = MemoryProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return build_tiny_tokenizer()

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"chunk_length": 4, "window_length": 8}

    def test_model_input_names(self) -> None:
        # The test gives what a name of the library's modalities asks for, and no context: half of the names.
        inputs = self.get_processor()(text="lower newer", context="older", return_tensors="pt")
        self.assertEqual(set(inputs.keys()), set(self.get_processor().model_input_names))


class TwoTokenizersTest(ProcessorTest):
    @classmethod
    def _setup_from_components(cls) -> Any:
        return MemoryProcessor(build_tiny_tokenizer(), build_tiny_encoder_tokenizer(), **cls.prepare_processor_dict())

    def test_processor_from_pretrained_vs_from_components(self) -> None:
        # The test builds it from the parts that every processor has, which the encoder's tokenizer is none of.
        whole = self.get_processor()
        parts = self.processor_class(whole.tokenizer, whole.encoder_tokenizer, **self.prepare_processor_dict())
        self.assertEqual(parts.to_dict(), whole.to_dict())
