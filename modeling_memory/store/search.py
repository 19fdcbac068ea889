"""Nearest memories, exactly and block by block, and several orders fused into one.

Q queries, n chunks, K memories per chunk, D decoder width.
"""

from collections.abc import Sequence

import torch

FLATTENED = 60
"""What is added to places before orders are fused, so that the first places of one order do not decide alone."""


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
