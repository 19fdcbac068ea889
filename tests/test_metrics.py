import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.measure.metrics import (
    bits_per_byte,
    bootstrap_interval,
    exact_match,
    information_ratio,
    token_results,
    uninformed_loss,
    wilson_interval,
)


def batch(rows: int = 4, columns: int = 6, vocabulary: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, columns, vocabulary)
    targets = torch.randint(0, vocabulary, (rows, columns))
    return logits, targets.masked_fill(torch.rand(rows, columns) < 0.3, -100)


def test_results_equal_a_loop_over_targets() -> None:
    logits, targets = batch()
    kept = logits.clone(), targets.clone()
    right, losses = token_results(logits, targets)
    for row in range(4):
        for column in range(6):
            wanted = int(targets[row, column])
            probabilities = logits[row, column].double().softmax(0)
            found = bool(right[row, column]), losses[row, column].item()
            if wanted == -100:
                assert found == (False, 0.0)
                continue
            assert found[0] == (int(probabilities.argmax()) == wanted)
            assert found[1] == pytest.approx(-math.log(probabilities[wanted]), rel=1e-5)
    assert (logits == kept[0]).all() and (targets == kept[1]).all()


def test_half_precision_logits_lose_only_their_own_rounding() -> None:
    logits, targets = batch()
    rounded = logits.bfloat16()
    for one, other in zip(token_results(rounded, targets), token_results(rounded.float(), targets), strict=True):
        assert torch.equal(one, other)


def test_information_ratio_knows_both_conventions() -> None:
    # 9.0285 is the closed form for the vocabulary of 8,000 of the published tables (stated there as 9.03).
    assert uninformed_loss(8000, "paper") == pytest.approx(9.0285, abs=5e-5)
    assert uninformed_loss(128_256, "paper") == pytest.approx(11.803, abs=5e-4)
    for convention in ("uniform", "paper"):
        assert information_ratio(0.0, 8000, convention) == 1.0
        assert information_ratio(uninformed_loss(8000, convention), 8000, convention) == pytest.approx(0.0)
    assert information_ratio(4.0, 8000, "paper") > information_ratio(4.0, 8000)


def test_paper_convention_is_the_mean_loss_of_uniform_random_logits() -> None:
    logits = torch.rand(64, 2000, generator=torch.Generator().manual_seed(0))
    mean = torch.nn.functional.cross_entropy(logits, torch.zeros(64).long(), reduction="none")
    # The target's logit has mean 1/2 and standard deviation 0.29: over 64 draws within 4 * 0.29 / 8.
    assert mean.mean().item() == pytest.approx(uninformed_loss(2000, "paper"), abs=0.15)
    partition = (logits.logsumexp(1) - 0.5).mean().item()
    assert partition == pytest.approx(uninformed_loss(2000, "paper"), abs=0.01)


def test_bits_per_byte_counts_the_memory_too() -> None:
    # 64 numbers of 4 bits over 1,024 tokens cost 64 * 4 * ln 2 / 1024 = 0.1733 nats per token.
    with_memory = bits_per_byte(1.0, 1024, 4096, memory_bits=64 * 4)
    assert with_memory == pytest.approx(bits_per_byte(1.0 + 64 * 4 * math.log(2) / 1024, 1024, 4096))
    assert bits_per_byte(math.log(256), num_tokens=7, num_bytes=7) == pytest.approx(8.0)


def test_exact_match_ignores_what_is_no_target() -> None:
    targets = torch.tensor([[-100, 5, 6], [-100, 5, 6], [4, 5, 6]])
    predictions = torch.tensor([[1, 5, 6], [1, 5, 9], [4, 5, 6]])
    assert exact_match(predictions, targets).tolist() == [True, False, True]
    assert exact_match(targets[2:], targets[2:]).all()


@settings(deadline=None)
@given(total=st.integers(1, 10_000), data=st.data())
def test_wilson_interval_holds_the_accuracy_and_stays_in_range(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    low, high = wilson_interval(successes, total)
    assert 0.0 <= low <= successes / total <= high <= 1.0
    mirrored = wilson_interval(total - successes, total)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)


def test_wilson_interval_equals_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 and 15 of 148, Wilson score without correction.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=30), st.integers(0, 5))
def test_bootstrap_is_seeded_and_stays_within_the_texts(pairs: list[tuple[int, int]], seed: int) -> None:
    numerators, denominators = torch.tensor(pairs).T
    low, high = bootstrap_interval(numerators, denominators, num_resamples=50, seed=seed)
    assert (low, high) == bootstrap_interval(numerators, denominators, num_resamples=50, seed=seed)
    ratios = numerators / denominators
    assert ratios.min() - 1e-6 <= low <= high <= ratios.max() + 1e-6


def test_bootstrap_covers_the_mean_of_a_normal_sample_as_theory_says() -> None:
    sample = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(sample)
    error = (sample.std() / 20).item()
    assert low == pytest.approx(sample.mean().item() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(sample.mean().item() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(sample, seed=1) != bootstrap_interval(sample, seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_results(torch.zeros(2, 3, 5), torch.zeros(2, 4).long()), r"\(2, 3, 5\).*\(2, 4\)"),
        (lambda: information_ratio(1.0, 8000, "papers"), "known: uniform, paper"),
        (lambda: information_ratio(1.0, 1), "at least 2 tokens"),
        (lambda: bits_per_byte(1.0, 3, 0), "num_bytes is 0"),
        (lambda: bits_per_byte(1.0, 3, 4, memory_bits=-1), "memory_bits -1"),
        (lambda: exact_match(torch.ones(2, 2), torch.tensor([[1, 1], [-100, -100]])), "row 1 has no target"),
        (lambda: exact_match(torch.ones(2, 2), torch.ones(2, 3)), r"\(2, 2\).*\(2, 3\)"),
        (lambda: wilson_interval(5, 4), "5 successes of 4"),
        (lambda: bootstrap_interval(torch.zeros(0)), "at least one text"),
        (lambda: bootstrap_interval(torch.ones(2), torch.tensor([1, 0])), "denominator of 0"),
        (lambda: bootstrap_interval(torch.ones(2), num_resamples=0), "num_resamples is 0"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
