"""Rows of the tasks in `tasks/`: benchmark files are read from the folder that `--metadata data=FOLDER` names.

A file `X.jsonl` may also be `X.jsonl.gz`. Nothing is downloaded, and nothing is taken from a file that is not named.
"""

import gzip
import json
import random
import re
import string
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset

MMLU_HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"
NUM_SHOTS = 5


def read_text(data: str | None, file: str) -> str:
    """Read a text file, packed or not.

    Raises:
        ValueError: If no folder was named or the file is not in it.
    """
    if not data:
        raise ValueError(f"the folder with {file} was not named; give it with --metadata data=FOLDER (--data FOLDER)")
    for path in (Path(data) / file, Path(data) / f"{file}.gz"):
        if path.is_file():
            opener: Any = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8", newline="") as stream:
                return stream.read()
    raise ValueError(f"{data} holds neither {file} nor {file}.gz; the tasks' page says where the file comes from")


def read_rows(data: str | None, file: str) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in read_text(data, file).split("\n") if line.strip()]


def rows(file: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """A file as it stands."""
    return {"test": Dataset.from_list(read_rows(data, file))}


def gsm8k(file: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """Without the training file the last five test items serve as examples, and are not scored."""
    found = read_rows(data, file)
    return {"test": Dataset.from_list(found[:-NUM_SHOTS] or found), "train": Dataset.from_list(found[-NUM_SHOTS:])}


def mmlu_question(row: dict[str, Any]) -> str:
    """A question as the harness's own task writes it."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['query'].strip()}\n{choices}\nAnswer:"


def mmlu(file: str, dev: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """Each question after the five examples of its subject; subjects take turns, so that a limit meets all."""
    examples: dict[str, list[str]] = {}
    for row in read_rows(data, dev):
        # With a space before the letter, as the harness scores it: many tokenizers have other tokens for the bare one.
        examples.setdefault(row["subject"], []).append(f"{mmlu_question(row)} {'ABCD'[row['gold']]}")
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(data, file):
        head = MMLU_HEAD.format(row["subject"].replace("_", " "))
        shots = examples.get(row["subject"], [])[:NUM_SHOTS]
        subjects.setdefault(row["subject"], []).append(
            {
                "prompt": head + "\n\n".join([*shots, mmlu_question(row)]),
                "gold": row["gold"],
                "subject": row["subject"],
            }
        )
    # The file goes subject by subject, and the first hundred rows of it would be algebra only.
    turns = chain.from_iterable(zip_longest(*subjects.values()))
    return {"test": Dataset.from_list([turn for turn in turns if turn is not None])}


def boolq(file: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """Passage and question apart; the file joins them."""
    found = []
    for row in read_rows(data, file):
        text = re.sub(r"^Passage: ", "", row["query"])
        # From the right: a passage may hold the word itself.
        passage, _, question = text.rpartition("Question: ")
        question = re.sub(r"\s*Answer:\s*$", "", question).strip().rstrip("?")
        found.append({"passage": passage.strip(), "question": question, "gold": row["gold"]})
    return {"test": Dataset.from_list(found)}


def wikitext(file: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """WikiText by page, as the harness's data set has it: a page begins at a heading of the first level."""
    pages: list[str] = []
    for line in read_text(data, file).split("\n"):
        if re.fullmatch(r" = [^=].*[^=] = ", line) or not pages:
            pages.append("")
        pages[-1] += f"{line}\n"
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def qmsum(file: str, data: str | None = None, **others: Any) -> dict[str, Dataset]:
    """One row for each query of each meeting."""
    found = [
        {"context": "\n".join(meeting["turns"]), "question": query["query"], "answers": [query["answer"]]}
        for meeting in read_rows(data, file)
        for query in meeting["queries"]
    ]
    return {"test": Dataset.from_list(found)}


def stretches(
    file: str, words: int = 64, num_rows: int = 500, data: str | None = None, **others: Any
) -> dict[str, Dataset]:
    """Stretches of `words` words of a text file, spread evenly over it."""
    found = read_text(data, file).split()
    # Never closer than a stretch is long, so that no two share a word.
    starts = range(0, max(1, len(found) - words + 1), max(words, (len(found) - words) // num_rows or 1))
    return {"test": Dataset.from_list([{"text": " ".join(found[i : i + words])} for i in starts][:num_rows])}


# ---- needles

NEEDLE = "One of the special magic numbers for {} is: {}."
SIZES = (512, 1024, 2048, 4096, 8192)
ADJECTIVES = ("quiet", "amber", "hollow", "brisk", "velvet", "distant", "copper", "gentle", "frozen", "silver")
NOUNS = ("harbor", "lantern", "meadow", "anchor", "violin", "orchard", "compass", "glacier", "canyon", "falcon")
COMMON = ("apple", "river", "table", "candle", "window", "garden", "button", "mirror", "basket", "pencil", "hammer")
ASK_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
)
ASK_ONE += "the number afterwards.\n{}\nWhat is the special magic number for {} mentioned in the provided text? The "
ASK_ONE += "special magic number for {} mentioned in the provided text is"
ASK_ALL = "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
ASK_ALL += (
    "about the numbers afterwards.\n{}\nWhat are all the special magic numbers for {} mentioned in the provided "
)
ASK_ALL += "text? The special magic numbers for {} mentioned in the provided text are"
ASK_CHAIN = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\nQuestion: Find "
)
ASK_CHAIN += "all variables that are assigned the value {} in the text above. Answer: According to the chain(s) of "
ASK_CHAIN += "variable assignment in the text above, the variables that are assigned the value {} are:"
ASK_COMMON = (
    "Below is a list of words. In these words, some appear more often than others. Memorize the ones that appear "
)
ASK_COMMON += (
    "most often.\n{}\nQuestion: What are the 3 most common words in the above list? Answer: The 3 most common "
)
ASK_COMMON += "words are:"


def needles(
    kind: str,
    data: str | None = None,
    file: str = "haystack_essays.jsonl",
    sizes: list[int] | tuple[int, ...] = SIZES,
    per_size: int = 100,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> dict[str, Dataset]:
    """Needles in a haystack after RULER (arXiv 2404.06654), made from a seed; sizes take turns.

    Args:
        kind (`str`): `single`, `keys`, `values`, `tracking` or `common`.
        data (`str`): Folder of the haystack.
        file (`str`): The haystack, one JSON object with a `text` a line.
        sizes (`list[int]`): Tokens of a prompt, at most.
        per_size (`int`): Rows of each size.
        seed (`int`): Of everything that is drawn.
        tokenizer (`str`): Whose tokens are counted. Default: the model's.
        pretrained (`str`): The model.
        others (`Any`): What else the harness tells every task.

    Raises:
        ValueError: If the kind is unknown, no tokenizer is named, or a size has no room for the question.
    """
    from transformers import AutoTokenizer

    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise ValueError("needles are cut to a number of tokens; name a tokenizer with --metadata tokenizer=FOLDER")
    reader = AutoTokenizer.from_pretrained(name)
    words = " ".join(row["text"] for row in read_rows(data, file)).split()
    words = words * (1 + int(max(sizes)) // len(words))  # a short haystack is repeated
    generator = random.Random(f"{seed} {kind}")  # a text seed: equal on every machine
    found = []
    for _ in range(per_size):
        for size in sizes:
            # Another place of the haystack for each row, or all rows would hide their needles in the same text.
            start = generator.randrange(len(words))
            made = _fit_row(reader, kind, words[start:] + words[:start], int(size), generator.random())
            found.append({**made, "size": int(size)})
    return {"test": Dataset.from_list(found)}


def _fit_row(reader: Any, kind: str, words: list[str], size: int, seed: float) -> dict[str, Any]:
    """Take as much of the haystack as fits into `size` tokens, by halving; the draws do not depend on it."""
    # A word is at least one token, so no more words than tokens can fit.
    low, high = 0, min(len(words) if kind != "common" else size, size)
    if len(reader(make_row(kind, words[:0], seed)["input"], verbose=False)["input_ids"]) > size:
        raise ValueError(
            f"a needle prompt of kind {kind!r} is longer than {size} tokens without any haystack; raise sizes"
        )
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(reader(make_row(kind, words[:middle], seed)["input"], verbose=False)["input_ids"]) <= size
        low, high = (middle, high) if fits else (low, middle - 1)
    return make_row(kind, words[:low], seed)


def make_row(kind: str, haystack: list[str], seed: float) -> dict[str, Any]:
    """Hide needles in a haystack.

    >>> make_row("single", [], 0.5)["outputs"][0] in make_row("single", ["a", "b"], 0.5)["input"]
    True
    """
    # Drawn from the row's seed alone: halving calls this again, and the needles must stay the same.
    generator = random.Random(repr(seed))
    keys = [f"{a}-{n}" for a, n in zip(generator.sample(ADJECTIVES, 8), generator.sample(NOUNS, 8), strict=True)]
    numbers = [str(generator.randint(1_000_000, 9_999_999)) for _ in range(8)]
    depths = [generator.random() for _ in range(8)]
    if kind == "common":
        return _common_words(len(haystack), generator)
    if kind == "tracking":
        names = ["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
        value = str(generator.randint(10_000, 99_999))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)]
        text = _hide(haystack, lines, sorted(depths[:5]))  # a chain is told in its order
        return {"input": ASK_CHAIN.format(text, value, value), "outputs": names}
    plans = {"single": [(0, 0)], "keys": [(i, i) for i in range(4)], "values": [(0, i) for i in range(4)]}
    if kind not in plans:
        raise ValueError(f"needles of kind {kind!r} are unknown; expected single, keys, values, tracking or common")
    needles_of = [NEEDLE.format(keys[key], numbers[number]) for key, number in plans[kind]]
    text = _hide(haystack, needles_of, depths)
    ask = ASK_ALL if kind == "values" else ASK_ONE
    answers = numbers[:4] if kind == "values" else numbers[:1]
    return {"input": ask.format(text, keys[0], keys[0]), "outputs": answers}


def _hide(haystack: list[str], lines: list[str], depths: list[float]) -> str:
    """Put lines at their depths, in the order of these."""
    # By depth only: with equal depths, lines would be compared, and a chain lose its order.
    placed = sorted(zip(depths, lines, strict=False), key=lambda pair: pair[0])
    text, at = [], 0
    for depth, line in placed:
        place = int(depth * len(haystack))
        text += [*haystack[at:place], line]
        at = place
    return " ".join([*text, *haystack[at:]])


def _common_words(length: int, generator: random.Random) -> dict[str, Any]:
    """A list of words in which three stand three times as often as any other."""
    order = generator.sample(COMMON, len(COMMON))
    answers, others = order[:3], order[3:]
    rounds = max(1, length // (3 * 3 + len(others)))
    # At least one round, so that even the shortest list has an answer.
    words = (answers * 3 + others) * rounds
    generator.shuffle(words)
    return {"input": ASK_COMMON.format(" ".join(words)), "outputs": answers}


# ---- metrics


def score_needle(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Share of the answers that the text holds, as RULER counts; also under the size of the prompt."""
    text = results[0].lower()
    # Also under its size: a mean over all sizes hides at which length a model loses the needle.
    score = sum(answer.lower() in text for answer in doc["outputs"]) / len(doc["outputs"])
    return {"score": score, str(doc["size"]): score}


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Best exact match and F1 over the answers, as SQuAD counts them.

    >>> score_answer({"answers": {"text": ["the red house", "house"]}}, [" House."])
    {'exact_match': 1.0, 'f1': 1.0}
    """
    answers = doc["answers"]["text"] if isinstance(doc["answers"], dict) else doc["answers"]
    given = _answer_words(results[0])
    pairs = [(_answer_words(answer), given) for answer in answers]
    return {"exact_match": float(any(a == b for a, b in pairs)), "f1": max(_overlap(a, b) for a, b in pairs)}


def _answer_words(text: str) -> list[str]:
    """Words as SQuAD's script compares them: lower case, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(answer: list[str], given: list[str]) -> float:
    """F1 of the words in common; of empty answers 1 if both are."""
    if not answer or not given:
        return float(answer == given)
    common = sum((Counter(answer) & Counter(given)).values())
    return 2 * common / (len(answer) + len(given))


def score_longbench(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 over the answers, as LongBench's question tasks count it."""
    return {"score": score_answer(doc, [results[0].strip()])["f1"]}


def score_summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L of the better answer, on lower-case words.

    >>> score_summary({"answers": ["the cat sat down"]}, ["The cat sat."])["rouge_l"]
    0.8571428571428571
    """
    return {"rouge_l": max(_rouge_l(_words(answer), _words(results[0])) for answer in doc["answers"])}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _rouge_l(answer: list[str], given: list[str]) -> float:
    """F1 of the longest common subsequence."""
    # One row of the usual table at a time: summaries are long, and only the last row is read.
    common = [0] * (len(given) + 1)
    for word in answer:
        before, common = common, [0]
        for i, other in enumerate(given):
            common.append(before[i] + 1 if word == other else max(common[-1], before[i + 1]))
    return 2 * common[-1] / (len(answer) + len(given)) if common[-1] else 0.0


def score_contains(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Whether the value is in the text, whatever its case, as the harness's SWDE counts."""
    return {"contains": int(doc["value"].strip().lower() in results[0].lower())}


def score_copy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Words of the source that come back in their place, and whether all do.

    >>> score_copy({"text": "a b c d"}, [" a b x d"])
    {'words_in_place': 0.75, 'exact_match': 0.0}
    """
    source, copy = doc["text"].split(), results[0].split()
    right = sum(a == b for a, b in zip(source, copy, strict=False))
    return {"words_in_place": right / len(source), "exact_match": float(source == copy[: len(source)])}


def score_ifeval(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The harness's own checker.

    Raises:
        ValueError: If the sentence splitter's data, which the checker wants, is not there.
    """
    # Here, since the checker brings packages that no other task needs.
    from lm_eval.tasks.ifeval.utils import process_results

    kwargs = json.loads(doc["kwargs_json"])
    try:
        return process_results({**doc, "kwargs": kwargs}, results)
    except LookupError as error:
        raise ValueError(
            "IFEval counts sentences with NLTK's data; get it: python -m nltk.downloader punkt_tab"
        ) from error


def mean_of_lists(values: list[list[bool]]) -> float:
    """Mean over all instructions of all prompts."""
    flat = list(chain.from_iterable(values))
    return sum(flat) / len(flat)
