r"""Questions made from texts, so that none that a model learns from is ever taken from an evaluation set.

| kind | question | answer |
|---|---|---|
| cloze | a sentence of the passage with a name, a date or a number left out | what was left out |
| wh | when, where, who, what or how many, by turning a sentence of a plain form round | what the sentence says |
| written | what a decoder asks about the passage that it reads in full | its own answer, if it stands in the passage |

>>> text = "The bridge was opened in 1932. It was designed by John Bradfield and carries eight lanes of traffic."
>>> found = cloze(text, random.Random(1))
>>> found.question, found.answer
('The bridge was opened in ____.\n\nWhat does ____ stand for? Answer from the text.', '1932')
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .questions import Question

KINDS = ("cloze", "wh", "written")
CHARACTERS = 200, 600
"""Shortest and longest passage: about 50 to 150 tokens."""
FORMS = (
    'Fill in the blank with words from the text: "{}"',
    'Which words of the text are missing here? "{}"',
    "{}\n\nWhat does ____ stand for? Answer from the text.",
)
# Several capitalised words in a row, which are not the first of a sentence, or a number.
SPAN = re.compile(
    r"(?<![.!?:;\"“\n] )(?<![\n\"“(])(?<!^)\b(?:[A-Z][a-z]+(?: (?:of |the |de |van )?[A-Z][a-z]+)*|\d[\d,.]*\d|\d+)\b"
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])|\n+")
_NAME = r"[A-Z][a-z]+(?: (?:of |the |de |van )?[A-Z][a-z]+)*"
MONTH = re.compile("January|February|March|April|May|June|July|August|September|October|November|December")
_DATE = rf"(?:\d{{1,2}} )?(?:(?:{MONTH.pattern}) )?(?:\d{{1,2}}, )?(?:1\d|20)\d\d"
_ABOUT = r"(?P<s>(?:The |A |An )?[\w' -]{3,60}?)"
_BE = r"(?P<be>was|were|is|are)"
# Sentences of a plain form, the question that each answers, with its words in braces, and `a`, the answer.
TURNS = tuple(
    (re.compile(rf"^{pattern}"), question)
    for pattern, question in (
        (rf"{_ABOUT} {_BE} (?P<r>\w+ed[\w' -]{{0,60}}?) (?:in|on) (?P<a>{_DATE})\b", "When {be} {s} {r}?"),
        (
            rf"{_ABOUT} {_BE} (?P<r>\w+ed|born|held|found)[\w' -]{{0,40}}? (?:in|at) (?P<a>{_NAME})\b",
            "Where {be} {s} {r}?",
        ),
        (rf"{_ABOUT} {_BE} (?P<r>\w+ed|written|built|led|won|made|sung) by (?P<a>{_NAME})\b", "Who {be} {s} {r} by?"),
        (rf"(?P<a>{_NAME}) (?P<r>\w+ed (?:the|a|an|his|her|its) [\w' -]{{3,60}})[.,;]", "Who {r}?"),
        (rf"(?P<s>{_NAME}) {_BE} (?P<a>(?:a|an|the) [\w' -]{{4,50}})[.,;]", "What {be} {s}?"),
        (r".*?\b(?P<a>\d[\d,]*\d) (?P<s>[a-z]+s)\b", "How many {s} are there?"),
        (rf"In (?P<a>{_DATE}),? (?P<s>[\w' -]{{3,40}}?) {_BE} (?P<r>\w+ed[\w' -]{{0,60}})[.,;]", "When {be} {s} {r}?"),
    )
)
AUXILIARY = re.compile(r"\b(?:was|were|is|are|has|had|have|as|and|but|after|while|according)\b", re.IGNORECASE)
PRONOUNS = {"he", "she", "it", "they", "this", "that", "these", "those", "there", "who", "which", "we", "i", "you"}
ASK = "{}\n\nWrite one short question that this text answers with a name, a date, a number or a few words."
ANSWER = "{}\n\n{} Answer with a few words from the text."
WORDS = 8


def passages(texts: Sequence[str], seed: int = 0) -> Iterator[str]:
    """Draw passages of whole sentences without end, each from a document that is drawn anew.

    Passages with `<` are left out: a question may hold no control token.

    Args:
        texts (`Sequence[str]`): Documents.
        seed (`int`): Of the draw.

    Raises:
        ValueError: If no document has such a passage.
    """
    draw = random.Random(seed)
    misses = 0
    while misses < 1000 + 10 * len(texts):
        misses += 1
        sentences = [part.strip() for part in SENTENCE.split(draw.choice(texts)) if part.strip()]
        least, most = draw.randint(*CHARACTERS), CHARACTERS[1]
        passage = ""
        for sentence in sentences[draw.randrange(len(sentences)) :] if sentences else []:
            passage = f"{passage} {sentence}".strip()
            if len(passage) >= least:
                break
        if CHARACTERS[0] <= len(passage) <= most and "<" not in passage:
            misses = 0
            yield passage
    raise ValueError(
        f"no passage of whole sentences with {CHARACTERS[0]} to {CHARACTERS[1]} characters is in {len(texts)} "
        "documents; give running text"
    )


def cloze(passage: str, draw: random.Random) -> Question | None:
    """Ask for a name, a date or a number of a passage; `None` if it has none that can be asked for.

    What stands in it more than three times would be guessed.
    """
    found = [
        span
        for span in SPAN.finditer(passage)
        if len(span.group()) > 1 and passage.count(span.group()) < 4 and span.start() > 20
    ]
    if not found:
        return None
    span = draw.choice(found)
    start = max(passage.rfind(". ", 0, span.start()) + 2, span.start() - 160, 0) if ". " in passage[: span.start()] \
        else max(0, span.start() - 160)  # fmt: skip
    end = passage.find(". ", span.end())
    end = min(end + 1 if end >= 0 else len(passage), span.end() + 80)
    gap = f"{passage[start : span.start()]}____{passage[span.end() : end]}".strip()
    return Question(passage, draw.choice(FORMS).format(gap), span.group())


def turned(passage: str, draw: random.Random) -> Question | None:
    """Ask what a sentence of a passage says by turning it round; `None` if none has a form that can be turned.

    >>> turned("Nothing here. The bridge was opened to traffic in March 1932. It is long.", random.Random(0)).question
    'When was the bridge opened to traffic?'
    """
    found = []
    for sentence in SENTENCE.split(passage):
        for pattern, question in TURNS:
            match = pattern.match(sentence)
            if match and _can_be_asked(parts := match.groupdict(), question, passage):
                if "s" in parts:
                    parts["s"] = re.sub(r"^(The|A|An) ", lambda word: word[0].lower(), parts["s"])
                found.append(Question(passage, question.format(**parts), parts["a"]))
    # Numbers stand everywhere, and one question would be most of them.
    rare = [one for one in found if not one.question.startswith("How many")]
    found = rare or (found if draw.random() < 0.1 else [])
    return draw.choice(found) if found else None


def _can_be_asked(parts: dict[str, str], question: str, passage: str) -> bool:
    """Whether a turned sentence asks about something and has one answer: no pronoun, and nothing that stands twice."""
    subject, answer = parts.get("s", ""), parts["a"]
    if {subject.lower(), answer.lower()} & PRONOUNS or AUXILIARY.search(subject) or passage.count(answer) > 1:
        return False
    return question.startswith("When") or not MONTH.match(answer)


MAKERS = {"cloze": cloze, "wh": turned}


def make_questions(texts: Sequence[str], count: int, seed: int = 0, kind: str = "cloze") -> list[Question]:
    """Make so many questions from documents, of a kind of `MAKERS`.

    Raises:
        ValueError: If they have too few sentences that can be asked for.
    """
    draw = random.Random(seed)
    drawn = islice(passages(texts, seed), 50 * count)
    found = list(islice((question for passage in drawn if (question := MAKERS[kind](passage, draw))), count))
    if len(found) < count:
        raise ValueError(
            f"{count} questions of the kind {kind} were asked for, but the passages have sentences for {len(found)} "
            "only; give other text or ask for fewer"
        )
    return found


def write_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[str],
    temperature: float = 0.0,
) -> list[Question | None]:
    """Let a decoder ask about passages that it reads in full, and answer its own questions.

    Args:
        model (`PreTrainedModel`): A causal LM.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template; pads on the left.
        given (`Sequence[str]`): The passages, one batch.
        temperature (`float`): At which questions are sampled; 0: the most likely one. Answers are always that.

    Returns:
        `list`: For each passage a question, or `None` where what was written is none, or its answer is longer than
        a few words, stands in the question, or does not stand in the passage.
    """
    asked = [_question(reply) for reply in _replies(model, tokenizer, [ASK.format(one) for one in given], temperature)]
    kept = [place for place, question in enumerate(asked) if question]
    if not kept:
        return [None] * len(given)
    prompts = [ANSWER.format(given[place], asked[place]) for place in kept]
    answers = dict(zip(kept, _replies(model, tokenizer, prompts, 0.0), strict=True))
    return [_checked(given[place], asked[place], answers.get(place, "")) for place in range(len(given))]


def _question(reply: str) -> str:
    """Take the question out of a reply; empty if there is none.

    >>> _question('Sure! Here it is: "Who built the bridge?" I hope this helps.'), _question("I cannot.")
    ('Who built the bridge?', '')
    """
    found = re.search(r"(?:^|[\n:\"“.!]\s*)([A-Z][^.!?:\n\"“]{8,160}\?)", reply)
    return found[1] if found else ""


def _checked(passage: str, question: str, reply: str) -> Question | None:
    """Keep a question whose answer stands in the passage, and say it as the passage does.

    >>> _checked("It was opened in March 1932.", "When was it opened?", "march 1932.")
    Question(context='It was opened in March 1932.', question='When was it opened?', answer='March 1932')
    >>> _checked("It was opened in 1932.", "Who opened it?", "The mayor") is None
    True
    """
    answer = reply.strip().strip("\"'“”").rstrip(".!").strip()
    place = passage.casefold().find(answer.casefold())
    whole = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", passage, re.IGNORECASE) if answer else None
    if (
        not question
        or place < 0
        or not whole
        or len(answer.split()) > WORDS
        or answer.casefold() in question.casefold()
    ):
        return None
    return Question(passage, question, whole[0])


@torch.no_grad()
def _replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], temperature: float
) -> list[str]:
    chats: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    # Here, since a template is given no side to pad on.
    padding: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = tokenizer(chats, add_special_tokens=False, return_token_type_ids=False, **padding)
    sampling = {"do_sample": temperature > 0, **({"temperature": temperature, "top_p": 0.95} if temperature else {})}
    output = model.generate(**inputs.to(model.device), max_new_tokens=40, **sampling)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def save_questions(questions: Sequence[Question], file: Path) -> None:
    """Write a `.jsonl` that [`training.data.questions.read_questions`] reads."""
    lines = [json.dumps(vars(question), ensure_ascii=False) for question in questions]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(file)
