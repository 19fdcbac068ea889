"""How faithfully does a text come back? Compared as text: characters, words, and the details that matter.

```bash
python -m training.evaluate runs/quickstart/hub --suite fidelity --limit 64
```

| figure | counts |
|---|---|
| exact match | texts written without an error |
| character precision, recall | characters in common stretches, of those written, of those wanted |
| BLEU | sacrebleu, of the whole corpus |
| digits, dates, names kept | how many of those in the reference stand in what was written |

A number is a run of digits with its separators; a date is a numeric date, a month's name with a day or a year, or a
year of four digits from 1000 to 2099; a name is a capitalised word of two letters or more that does not begin a
sentence. These are rules of thumb for English; equal rules for all systems make the shares comparable.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .measure.metrics import bootstrap_interval, wilson_interval
from .measure.suites import Evaluation, evaluate_suite, write_freely

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DETAILS = {
    "digits": re.compile(r"\d+(?:[.,:/]\d+)*"),
    "dates": re.compile(
        rf"\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}|(?:\d{{1,2}} )?(?:{MONTHS})(?: \d{{1,2}}(?!\d))?(?:,? \d{{4}})?"
        r"|\b(?:1\d|20)\d\d\b"
    ),
    "names": re.compile(r"(?<![.!?\"“”'‘—\n] )(?<=[\w,;:)] )[A-Z][a-z]+"),
}


def details_of(text: str, kind: str) -> Counter[str]:
    """Find the details of a kind in a text, with how often each occurs.

    >>> text = "The ship left Bristol on 4 March 1765 with 1,200 men. Trelawney stayed."
    >>> [sorted(details_of(text, kind)) for kind in ("digits", "dates", "names")]
    [['1,200', '1765', '4'], ['4 March 1765'], ['Bristol', 'March']]
    """
    return Counter(DETAILS[kind].findall(text))


def matching_characters(reference: str, written: str) -> int:
    """Count characters in the longest common stretches of two texts, in order (Ratcliff and Obershelp).

    >>> matching_characters("the cat sat", "the bat sat")
    10
    """
    return sum(block.size for block in difflib.SequenceMatcher(None, reference, written, False).get_matching_blocks())


def text_fidelity(references: Sequence[str], written: Sequence[str]) -> dict[str, Any]:
    """Compare texts with what was written of them.

    Args:
        references (`Sequence[str]`): What was to be written.
        written (`Sequence[str]`): What was written.

    Returns:
        `dict`: `exact_match`, `character_precision` and `character_recall` with intervals over texts, `bleu` in 0 to
        100, and for digits, dates and names the share kept (`None` where the references hold none) with its count.

    Raises:
        ValueError: If there is no pair, the numbers differ, or a reference is empty.
    """
    if not references or len(references) != len(written):
        raise ValueError(f"there are {len(references)} references and {len(written)} texts; give pairs, one at least")
    if not all(references):
        raise ValueError(f"reference {[bool(text) for text in references].index(False)} is empty; leave it out")
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ValueError("BLEU is computed by sacrebleu, which is not installed: pip install sacrebleu") from error
    pairs = list(zip(references, written, strict=True))
    exact = sum(wanted == got for wanted, got in pairs)
    matching = torch.tensor([matching_characters(*pair) for pair in pairs])
    wanted_lengths = torch.tensor([len(text) for text in references])
    # Nothing written is nothing right: one character of nothing counts as wrong.
    got_lengths = torch.tensor([max(1, len(text)) for text in written])
    result: dict[str, Any] = {
        "num_texts": len(pairs),
        "exact_match": exact / len(pairs),
        "exact_match_interval": list(wilson_interval(exact, len(pairs))),
        "character_precision": (matching.sum() / got_lengths.sum()).item(),
        "character_precision_interval": list(bootstrap_interval(matching, got_lengths)),
        "character_recall": (matching.sum() / wanted_lengths.sum()).item(),
        "character_recall_interval": list(bootstrap_interval(matching, wanted_lengths)),
        "bleu": corpus_bleu(list(written), [list(references)]).score,
    }
    for kind in DETAILS:
        kept = total = 0
        for reference, got in pairs:
            there, here = details_of(reference, kind), details_of(got, kind)
            kept += (there & here).total()
            total += there.total()
        result[f"{kind}_kept"] = kept / total if total else None
        result[f"{kind}_kept_interval"] = list(wilson_interval(kept, total)) if total else None
        result[f"num_{kind}"] = total
    return result


def accuracy_by_part(by_position: Sequence[float], chunk_length: int) -> dict[str, float]:
    """Average accuracies by position over the start, middle and end of a text, and over the ends of its chunks.

    Args:
        by_position (`Sequence[float]`): Accuracy at each position of a text of whole chunks.
        chunk_length (`int`): Tokens of a chunk; `boundary` is the first and the last token of each.

    Raises:
        ValueError: If the text is no whole number of chunks, or shorter than three tokens.

    >>> accuracy_by_part([1.0, 0.5, 0.5, 0.0, 1.0, 0.0], chunk_length=3)
    {'start': 0.75, 'middle': 0.25, 'end': 0.5, 'boundary': 0.375}
    """
    length = len(by_position)
    if length < 3 or length % chunk_length:
        raise ValueError(f"a text has {length} positions; expected three or more, a multiple of {chunk_length}")
    third = length // 3
    places = [place for place in range(length) if place % chunk_length in (0, chunk_length - 1)]
    parts = {
        "start": list(by_position[:third]),
        "middle": list(by_position[third : length - third]),
        "end": list(by_position[length - third :]),
        "boundary": [by_position[place] for place in places],
    }
    return {name: sum(values) / len(values) for name, values in parts.items()}


def random_rows(rows: torch.Tensor, vocab_size: int, special: Sequence[int]) -> torch.Tensor:
    """Return rows of uniformly random ordinary tokens, of the shape of `rows`: nothing about them can be guessed."""
    ordinary = torch.tensor(sorted(set(range(vocab_size)) - set(special)))
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), rows.shape, generator=generator)]


def evaluate_fidelity(
    evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor
) -> dict[str, Any]:
    """Measure how faithfully a model of this package writes texts back.

    Args:
        evaluation (`Evaluation`): The model and how to feed it.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`torch.LongTensor` of shape `(R, n)`): Texts: chunks of an autoencoder, windows of a memory model.

    Returns:
        `dict`: Condition -> metrics, as of the suite `retention` (autoencoder) or `copy`. `memory` has in `text` what
        [`text_fidelity`] says of free-running texts, and `by_part`; `random_tokens` is the same model on random
        tokens.

    Raises:
        ValueError: As [`training.measure.suites.evaluate_suite`], or if sacrebleu is missing.
    """
    is_autoencoder = evaluation.model.config.model_type == "memory_autoencoder"
    suite = "retention" if is_autoencoder else "copy"
    length = rows.shape[1]
    result = evaluate_suite(evaluation, suite, rows, period=length)
    own, written = write_freely(evaluation, rows)
    texts = [tokenizer.batch_decode(tokens.clamp(min=0), skip_special_tokens=True) for tokens in (own, written)]
    full = [index for index, text in enumerate(texts[0]) if text]
    if full:
        result["memory"]["text"] = text_fidelity(*([part[index] for index in full] for part in texts))
    if length >= 3:
        by_position = result["memory"]["token_accuracy_by_position"]
        result["memory"]["by_part"] = accuracy_by_part(by_position, evaluation.chunk_length)
    random = random_rows(rows, evaluation.vocab_size, tokenizer.all_special_ids)
    result["random_tokens"] = evaluate_suite(evaluation, suite, random, period=length)["memory"]
    return result


def text_lines(found: dict[str, Any]) -> list[str]:
    """Lay text metrics out as lines."""
    lines = [f"exact {found['exact_match']:.1%} of {found['num_texts']}, BLEU {found['bleu']:.1f}, characters: "
             f"precision {found['character_precision']:.1%}, recall {found['character_recall']:.1%}"]  # fmt: skip
    kept = [
        f"{kind} {found[f'{kind}_kept']:.1%} of {found[f'num_{kind}']}" for kind in DETAILS if found[f"num_{kind}"]
    ]
    return [*lines, "kept: " + (", ".join(kept) or "no digits, dates or names in these texts")]
