"""A sentence encoder: texts as vectors whose cosine says how much they are about the same.

n texts, T tokens, E width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from ..recipes.recipe import PretrainedRecipe

BATCH = 32
KEPT = 10_000
"""Texts whose vectors are kept: passages are asked about more than once."""


class SentenceEncoder:
    """An encoder whose states are averaged over a text's tokens, as MiniLM and its like are trained to be read.

    Args:
        name (`str`): Folder, Hub id, or `package:MODULE/FOLDER` of an installed package.
        device (`str`): Where it runs.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        source = PretrainedRecipe(name).source
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = AutoModel.from_pretrained(source).eval().to(device)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is no sentence encoder that can be loaded: {error}") from error
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self._known: dict[str, torch.Tensor] = {}
        self.name = Path(name).name if Path(name).exists() else name

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit vectors `(n, E)`; of a text that is too long the first tokens count."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > KEPT:
            self._known, new = {}, list(dict.fromkeys(texts))
        self._known |= dict(zip(new, self._encode(new), strict=True)) if new else {}
        return torch.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        vectors = []
        for start in range(0, len(texts), BATCH):
            inputs = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**inputs).last_hidden_state.float()  # (n, T, E)
            mask = inputs["attention_mask"][..., None]
            vectors.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(vectors)
