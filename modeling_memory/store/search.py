"""Nearest memories: exact, block by block with torch, or through faiss.

Q queries, n chunks, K memories per chunk, D decoder width.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

BACKENDS = ("torch", "faiss")
FLATTENED = 60
"""What is added to places before orders are fused, so that the first places of one order do not decide alone."""


def build_search(backend: str, queries: torch.Tensor, k: int) -> Any:
    """Begin a search for the `k` chunks nearest to each query `(Q, D)`, by the cosine to a chunk's nearest memory.

    Raises:
        ValueError: If the backend is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}.")
    queries = normalize(queries.detach().cpu())
    return BlockSearch(queries, k) if backend == "torch" else FaissSearch(queries, k)


def normalize(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors `(..., D)` to length 1, in float32."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def fuse(orders: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Join several orders of the same things into one, by the sum of 1 / (60 + place).

    Source: Cormack, Clarke and Buettcher 2009, reciprocal rank fusion.

    >>> [one for one, _ in fuse([[7, 8, 9], [8, 9, 7]])]
    [8, 7, 9]
    """
    scores: dict[int, float] = {}
    for order in orders:
        for place, one in enumerate(order, start=1):
            scores[one] = scores.get(one, 0.0) + 1 / (FLATTENED + place)
    return sorted(scores.items(), key=lambda pair: -pair[1])


class BlockSearch:
    """The best k of blocks that come one after the other; of equal ones the earlier.

    Args:
        queries (`torch.FloatTensor` of shape `(Q, D)`): Unit vectors.
        k (`int`): Chunks for each.
    """

    def __init__(self, queries: torch.Tensor, k: int):
        self.queries, self.k = queries, k
        self.scores = torch.empty(len(queries), 0)
        self.numbers = torch.empty(len(queries), 0, dtype=torch.long)

    def add(self, memories: torch.Tensor, rows: Sequence[int]) -> None:
        """Take the next block of memories `(n, K, D)` and the numbers that they go by."""
        # The nearest of a chunk's memories: their mean would be near to nothing that one of them says.
        scores = torch.einsum("qd,nkd->qnk", self.queries, normalize(memories)).amax(-1)  # (Q, n)
        numbers = torch.tensor(rows).expand(len(self.queries), -1)
        scores, numbers = torch.cat([self.scores, scores], 1), torch.cat([self.numbers, numbers], 1)
        # Stable, so that what was found does not depend on the size of the blocks.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores, self.numbers = scores[:, : self.k], numbers.gather(1, order[:, : self.k])

    def results(self) -> list[list[tuple[int, float]]]:
        """For each query the numbers of its chunks and their cosines, nearest first."""
        return [
            list(zip(numbers, scores, strict=True))
            for numbers, scores in zip(self.numbers.tolist(), self.scores.tolist(), strict=True)
        ]


class FaissSearch:
    """The same through an exact inner-product index of faiss, which holds all memories.

    Args:
        queries (`torch.FloatTensor` of shape `(Q, D)`): Unit vectors.
        k (`int`): Chunks for each.

    Raises:
        ValueError: If faiss is not installed.
    """

    def __init__(self, queries: torch.Tensor, k: int):
        try:
            faiss = importlib.import_module("faiss")
        except ImportError as error:
            raise ValueError(
                "`backend='faiss'` needs the extra: pip install 'modeling-memory[faiss]'. Or use `backend='torch'`, "
                "which is exact too."
            ) from error
        self.queries, self.k, self.per_chunk = queries, k, 1
        self.rows: list[int] = []
        self.index = faiss.IndexFlatIP(queries.shape[1])

    def add(self, memories: torch.Tensor, rows: Sequence[int]) -> None:
        """Take the next block of memories `(n, K, D)` and the numbers that they go by."""
        self.per_chunk = memories.shape[1]
        self.rows += rows
        self.index.add(normalize(memories).flatten(0, 1).contiguous().numpy())

    def results(self) -> list[list[tuple[int, float]]]:
        """As [`BlockSearch.results`]; of a chunk's memories the nearest counts."""
        # The best k·K memories belong to k chunks or more.
        wanted = min(self.k * self.per_chunk, self.index.ntotal)
        if wanted == 0:
            return [[] for _ in self.queries]
        scores, numbers = self.index.search(self.queries.numpy(), wanted)
        found = []
        for row_scores, row_numbers in zip(scores.tolist(), numbers.tolist(), strict=True):
            best: dict[int, float] = {}
            for score, number in zip(row_scores, row_numbers, strict=True):
                best.setdefault(number // self.per_chunk, score)
            found.append([(self.rows[place], score) for place, score in list(best.items())[: self.k]])
        return found
