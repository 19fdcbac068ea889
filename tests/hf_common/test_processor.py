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


class TwoTokenizersTest(ProcessorTest):
    @classmethod
    def _setup_from_components(cls) -> Any:
        return MemoryProcessor(build_tiny_tokenizer(), build_tiny_encoder_tokenizer(), **cls.prepare_processor_dict())
