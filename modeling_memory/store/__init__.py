"""Memories on disk. See [`MemoryStore`]; none of this goes into a published model's folder."""

from .codec import quantization_report
from .database import MemoryStoreError
from .memory_store import MemoryStore
from .texts import Chunk, Passage, StoredText

__all__ = ["Chunk", "MemoryStore", "MemoryStoreError", "Passage", "StoredText", "quantization_report"]
