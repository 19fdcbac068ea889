"""Metrics from exact sums over tokens, never from means of batch means.

A loss is in nats per target, an accuracy a fraction of targets; targets of -100 do not count. Targets are those *of*
each position, so that all objectives, shifted or not, are counted alike.

B batch, T positions, V vocabulary.

Source: Badger 2026, arXiv 2602.13466, metrics. Its "Hamming distance" is the token accuracy here, its "entropy ratio"
the information ratio in the convention `"paper"`.
"""

import math
from statistics import NormalDist

import torch

IGNORED = -100
CONVENTIONS = ("uniform", "paper")
CONFIDENCE = 0.95


def token_results(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each position whether it is right, and its cross entropy; False and 0 where there is no target.

    Sum over columns for results by text, over rows for results by position.

    Args:
        logits (`torch.FloatTensor` of shape `(..., V)`): Predictions.
        targets (`torch.LongTensor` of shape `(...)`): What each position must output; -100 for nothing.

    Returns:
        `torch.BoolTensor` and `torch.FloatTensor` (nats), both of shape `(...)`.

    Raises:
        ValueError: If the shapes do not fit.

    >>> correct, loss = token_results(torch.tensor([[[9.0, 0.0], [9.0, 0.0]]]), torch.tensor([[0, 1]]))
    >>> correct.tolist(), loss.round().tolist()
    ([[True, False]], [[0.0, 9.0]])
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; expected one target for "
            "each position, (...) for logits (..., vocabulary)."
        )
    present = targets != IGNORED
    chosen, wanted = logits[present], targets[present]  # (P, V), (P,): no work for positions without a target
    correct = torch.zeros_like(present)
    correct[present] = chosen.argmax(-1) == wanted
    loss = torch.zeros(targets.shape, device=logits.device)
    loss[present] = torch.nn.functional.cross_entropy(chosen.float(), wanted, reduction="none")
    return correct, loss


def information_ratio(loss: float, vocab_size: int, convention: str = "uniform") -> float:
    """Return how much of the tokens' information a model has: 1 for a loss of 0, 0 for an uninformed model.

    Args:
        loss (`float`): Mean cross entropy in nats per token.
        vocab_size (`int`): Size of the vocabulary (V).
        convention (`str`): What counts as uninformed. `"uniform"`: all tokens equally likely, ln V. `"paper"`: the
            softmax of independent logits from U[0, 1), in the limit ln V + ln(e - 1) - 1/2.

    Raises:
        ValueError: If the convention is unknown or the vocabulary has fewer than two tokens.

    >>> information_ratio(0.0, 8000)
    1.0
    >>> information_ratio(math.log(8000), 8000)
    0.0
    >>> round(uninformed_loss(8000, "uniform"), 4), round(uninformed_loss(8000, "paper"), 4)
    (8.9872, 9.0285)
    """
    return 1.0 - loss / uninformed_loss(vocab_size, convention)


def uninformed_loss(vocab_size: int, convention: str = "uniform") -> float:
    """Return the loss that stands for knowing nothing; see [`information_ratio`].

    Args:
        vocab_size (`int`): Size of the vocabulary (V).
        convention (`str`): `"uniform"` or `"paper"`.

    Returns:
        `float`: Nats per token.

    Raises:
        ValueError: If the convention is unknown or the vocabulary has fewer than two tokens.

    >>> round(uninformed_loss(30522, "paper"), 3)
    10.368
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; a ratio needs a vocabulary of at least 2 tokens.")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r} is unknown; known: {', '.join(CONVENTIONS)}.")
    excess = math.log(math.e - 1) - 0.5 if convention == "paper" else 0.0
    return math.log(vocab_size) + excess


def bits_per_byte(loss_nats_per_token: float, num_tokens: int, num_bytes: int, memory_bits: float = 0.0) -> float:
    """Return what a byte of text costs: the prediction of its tokens, and the memories it was predicted from.

    Args:
        loss_nats_per_token (`float`): Mean cross entropy of the tokens.
        num_tokens (`int`): Tokens that the mean is of.
        num_bytes (`int`): Bytes of their text in UTF-8.
        memory_bits (`float`): Bits of all memories that the tokens were predicted from, e.g. vectors * width * bits of
            a number. 0 leaves the memories out.

    Raises:
        ValueError: If there are no bytes, or a number is negative.

    >>> bits_per_byte(math.log(2), num_tokens=4, num_bytes=16)
    0.25
    >>> bits_per_byte(math.log(2), num_tokens=4, num_bytes=16, memory_bits=64 * 4)
    16.25
    """
    if num_bytes < 1 or num_tokens < 0 or memory_bits < 0:
        raise ValueError(
            f"num_bytes is {num_bytes}, num_tokens {num_tokens}, memory_bits {memory_bits}; expected at least one "
            "byte and no negative number."
        )
    return (loss_nats_per_token * num_tokens / math.log(2) + memory_bits) / num_bytes


def exact_match(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return for each row whether all its targets are right.

    Args:
        predictions (`torch.LongTensor` of shape `(B, T)`): Predicted tokens.
        targets (`torch.LongTensor` of shape `(B, T)`): Wanted tokens; -100 where anything will do.

    Returns:
        `torch.BoolTensor` of shape `(B,)`.

    Raises:
        ValueError: If the shapes differ or a row has no target.

    >>> exact_match(torch.tensor([[5, 6], [5, 7], [9, 6]]), torch.tensor([[5, 6], [5, 6], [-100, 6]])).tolist()
    [True, False, True]
    """
    _check_pair(predictions, targets)
    present = targets != IGNORED
    if not present.any(1).all():
        row = int((~present.any(1)).nonzero()[0])
        raise ValueError(f"row {row} has no target, so it can neither match nor fail. Leave it out.")
    return ((predictions == targets) | ~present).all(1)


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of an accuracy, which stays honest near 0 and 1.

    It takes trials for independent. Tokens of one text are not: give an interval over texts beside it
    ([`bootstrap_interval`]) where that matters.

    Args:
        successes (`int`): Right ones.
        total (`int`): All.

    Raises:
        ValueError: If there is nothing, or there are more successes than trials.

    >>> [round(bound, 4) for bound in wilson_interval(9, 10)]
    [0.5958, 0.9821]
    >>> wilson_interval(10, 10)[1]
    1.0
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"{successes} successes of {total} trials; expected 0 to {total}, and one trial or more.")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    rate = successes / total
    scale = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    reach = z / scale * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    low = 0.0 if successes == 0 else max(0.0, centre - reach)
    high = 1.0 if successes == total else min(1.0, centre + reach)
    return low, high


def bootstrap_interval(
    numerators: torch.Tensor,
    denominators: torch.Tensor | None = None,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95% percentile interval of sum(numerators) / sum(denominators) when texts are drawn again.

    The texts are the unit, so tokens of one text may depend on each other. Equal arguments give equal intervals.

    Args:
        numerators (`torch.Tensor` of shape `(num_texts,)`): Of each text, e.g. right tokens or summed loss.
        denominators (`torch.Tensor` of shape `(num_texts,)`, *optional*): Of each text, e.g. targets. Default: 1 each,
            the interval of a mean.
        num_resamples (`int`): Resamples.
        seed (`int`): Seed of the draws.

    Raises:
        ValueError: If there is no text, the shapes differ, a denominator is not positive, or `num_resamples`
            is below 1.

    >>> bootstrap_interval(torch.tensor([4, 4, 4]), torch.tensor([5, 5, 5]))
    (0.8, 0.8)
    """
    top = numerators.detach().double().cpu()
    bottom = torch.ones_like(top) if denominators is None else denominators.detach().double().cpu()
    if top.dim() != 1 or len(top) == 0 or top.shape != bottom.shape:
        raise ValueError(
            f"numerators have shape {tuple(top.shape)} and denominators {tuple(bottom.shape)}; expected one number "
            "for each text in both, at least one text."
        )
    if not (bottom > 0).all():
        raise ValueError("a text has a denominator of 0 or less; leave texts without targets out.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; expected 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(top), (num_resamples, len(top)), generator=generator)  # (resamples, texts)
    ratios = top[draws].sum(1) / bottom[draws].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high


def accuracy_interval(correct: torch.Tensor) -> tuple[float, float]:
    """Return the 95% interval of a token accuracy whose errors cluster in rows.

    It is the wider of two, end by end: rows drawn again, and Wilson's, since rows without any error vary by nothing.

    Args:
        correct (`torch.BoolTensor` of shape `(rows, tokens)`): Which tokens are right.

    >>> clustered = torch.tensor([[True] * 10] * 9 + [[False] * 10])
    >>> [round(bound, 2) for bound in accuracy_interval(clustered)], [round(b, 2) for b in wilson_interval(90, 100)]
    ([0.7, 1.0], [0.83, 0.94])
    """
    sizes = torch.full((len(correct),), correct.shape[1])
    rows, tokens = bootstrap_interval(correct.sum(1), sizes), wilson_interval(int(correct.sum()), correct.numel())
    return min(rows[0], tokens[0]), max(rows[1], tokens[1])


def _check_pair(predictions: torch.Tensor, targets: torch.Tensor) -> None:
    if predictions.dim() != 2 or predictions.shape != targets.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)} and targets {tuple(targets.shape)}; expected the same "
            "(rows, positions) for both."
        )
