r"""How much of a text comes back from the vectors of the claims' encoders, all by one protocol.

```bash
python -m benchmarks.claims.probes runs/claims --to runs/claims_cells --threads 1
```

| cell | holds |
|---|---|
| `probe_ENCODER_LENGTH` | what a fresh decoder, trained on the frozen encoder's vectors, writes back of test texts |
| `probe_ENCODER_LENGTH_shuffled` | the same from another text's vectors: what is guessed |
| `retrieval_START` | an encoder tuned by contrast from a stage, and how often it finds texts before and after |

An encoder is a stage, `untrained` or `untrained_transformer` (fresh weights), an oracle of
[`benchmarks.claims.variants`], or `retrieval_START`. Every decoder has the same size, steps and text; every text is
read once.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.cells import measure_cell, read_cell
from benchmarks.claims.scoring import SCORED_TOKENS
from benchmarks.claims.source import Source, open_run
from benchmarks.claims.variants import build_parser, encoder_folder, keep_encoder
from training.command_line import run_command
from training.data.texts import load_texts
from training.measure.frozen import UNTRAINED, cut_rows, load_encoder
from training.measure.inversion import DecoderSize
from training.probe import Probe, in_random_order, probe
from training.recipes.recipe import resolve_files
from training.records.record import data_digest
from training.retrieval import QUERIES, QueryRule, RetrievalEncoder, evaluate_retrieval, train_retrieval
from training.train.fit import Budget

SIZE = DecoderSize(hidden_size=128, num_hidden_layers=2, num_heads=4)
BUDGET = Budget(steps=300, batch_tokens=2048)
TUNING = Budget(steps=200, batch_tokens=1024, optimizer="adamw", learning_rate=3e-4)
LENGTH = 16
FOUND_TEXTS = 512
STARTS = ("clm_mixer", "ae")
UNTRAINED_AS = {"untrained_16": "ae", "untrained_32": "ae_32", "untrained_64": "ae_64",
                "untrained_transformer_16": "decoder"}  # fmt: skip
"""Cell without its prefix -> stage whose architecture gets fresh weights."""


@dataclass(frozen=True)
class Encoder:
    """Whose vectors are read.

    Attributes:
        name (`str`): In the name of its cell.
        length (`int`): Tokens of a text.
        shuffled (`bool`): Whether texts get each other's vectors.
    """

    name: str
    length: int = LENGTH
    shuffled: bool = False

    @property
    def cell(self) -> str:
        return f"probe_{self.name}_{self.length}" + ("_shuffled" if self.shuffled else "")

    @property
    def stage(self) -> str | None:
        """The stage that its folder, or its architecture, is of; `None` for what the study itself trained."""
        if self.name.startswith(("retrieval_", "oracle_")):
            return None
        return UNTRAINED_AS.get(f"{self.name}_{self.length}", self.name)

    def place(self, source: Source, folder: Path) -> str:
        """What [`training.measure.frozen.load_encoder`] loads."""
        if self.stage is None:
            return str(encoder_folder(folder, self.name))
        fresh = UNTRAINED if self.name.startswith("untrained") else ""
        return f"{fresh}{source.model_folder(self.stage)}"


def encoders() -> dict[str, Encoder]:
    """All probes by the name of their cell, in the order of their worth."""
    names = ("ae", "clm_mixer", "decoder", "untrained", "untrained_transformer", "ae_transformer")
    found = [Encoder(name) for name in names]
    found += [Encoder("ae", shuffled=True), Encoder("decoder", shuffled=True)]
    found += [Encoder(name) for name in ("memory", "copy_trainable", "combined")]
    found += [Encoder(f"retrieval_{start}") for start in STARTS]
    for length in (64, 32):
        found += [Encoder(name, length) for name in (f"ae_{length}", "clm_mixer", "decoder", "untrained")]
    found += [Encoder("oracle_token", 64), Encoder("oracle_token_16")]
    return {encoder.cell: encoder for encoder in found}


def texts_of(source: Source, split: str) -> list[str]:
    """Documents of a split of the run."""
    return load_texts(resolve_files(list(getattr(source.recipe.data, split)), f"data.{split}"))


def setting_of(source: Source, encoder: Encoder, budget: Budget) -> Probe:
    """The protocol."""
    return Probe(
        train=texts_of(source, "train"),
        test=texts_of(source, "test"),
        lengths=(encoder.length,),
        conditions=("shuffled" if encoder.shuffled else "embedding",),
        size=SIZE,
        budget=budget,
        train_tokens=budget.steps * budget.batch_tokens,
        test_tokens=SCORED_TOKENS,
    )


def measure_probe(source: Source, folder: Path, encoder: Encoder, budget: Budget = BUDGET) -> dict[str, Any]:
    """Probe an encoder, or find it probed."""
    setting = setting_of(source, encoder, budget)
    place = encoder.place(source, folder)
    made = read_cell(folder, encoder.name) if encoder.stage is None else None
    asked = {
        "length": encoder.length,
        "shuffled": encoder.shuffled,
        "encoder": source.trained_as([encoder.stage]) if encoder.stage else data_digest(made and made["asked"]),
        "fresh": place.startswith(UNTRAINED),
        "text": source.inputs.fingerprint,
        **setting.settings(),
    }

    def measure() -> dict[str, Any]:
        (model,) = probe({encoder.cell: place}, setting, folder / "probe")
        (result,) = model["lengths"][str(encoder.length)].values()
        metrics = {name: value for name, value in result.items() if name != "seconds"}
        return {"metrics": metrics, "steps": budget.steps, "text_tokens": result["train_tokens_read"]}

    return measure_cell(folder, encoder.cell, asked, measure)


def measure_retrieval(source: Source, folder: Path, start: str, budget: Budget = TUNING) -> dict[str, Any]:
    """Tune a stage's encoder to find texts by seven of their tokens, and keep it for a probe."""
    name = f"retrieval_{start}"
    rule, rules = QueryRule(), [QueryRule(kind) for kind in QUERIES]  # type: ignore[arg-type]
    asked = {
        "start": source.trained_as([start]),
        "text": source.inputs.fingerprint,
        "length": LENGTH,
        "query": asdict(rule),
        "budget": asdict(budget),
    }
    checkpoint = folder / "checkpoints" / f"{name}-{data_digest(asked)}.pt"

    def measure() -> dict[str, Any]:
        body, tokenizer = load_encoder(str(source.model_folder(start))).body, source.inputs.tokenizer
        documents = in_random_order(texts_of(source, "train"), budget.seed)
        texts = cut_rows(tokenizer, documents, LENGTH, max(2, budget.steps * budget.batch_tokens // LENGTH)).tokens
        test = cut_rows(tokenizer, texts_of(source, "test"), LENGTH).tokens.unique(dim=0)
        test = test[torch.linspace(0, len(test) - 1, min(FOUND_TEXTS, len(test))).round().long()]
        before = evaluate_retrieval(RetrievalEncoder(body), test, rules)
        model = train_retrieval(body, texts, rule, budget, checkpoint=checkpoint, label=name)
        keep_encoder(model.body, source, folder, name)
        metrics = {"before": before, "after": evaluate_retrieval(model, test, rules)}
        return {"metrics": metrics, "steps": budget.steps, "text_tokens": budget.steps * budget.batch_tokens}

    cell = measure_cell(folder, name, asked, measure)
    checkpoint.unlink(missing_ok=True)
    return cell


def measure_probes(run_folder: Path, cells: Path, only: Sequence[str] = (), recipe: Any = None) -> None:
    """Measure what is missing.

    Args:
        run_folder (`Path`): Folder of the run of `configuration/recipes/claims.yaml`; read only.
        cells (`Path`): Folder of the study, where `benchmarks.claims.variants` keeps its encoders as well.
        only (`Sequence[str]`): Names of measurements. Default: all.
        recipe (`Recipe`, *optional*): What the run ran, if it is another recipe.

    Raises:
        ValueError: If a name is unknown, or, after all others were measured, if some wait for a model.
    """
    tunings = {f"retrieval_{start}": start for start in STARTS}
    known = encoders()
    unknown = [name for name in only if name not in {**tunings, **known}]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such measurement; known: {', '.join([*tunings, *known])}")
    source = open_run(run_folder, recipe)
    waiting = []
    for name in only or [*tunings, *known]:
        encoder = known.get(name)
        stage = tunings[name] if encoder is None else encoder.stage
        if stage is not None and source.lacks([stage]):
            waiting.append(f"{name} for the stage {stage}")
        elif encoder is None:
            print(f"{name}: {measure_retrieval(source, cells, tunings[name])['seconds']:.0f} s", flush=True)
        elif stage is None and not encoder_folder(cells, encoder.name).is_dir():
            waiting.append(f"{name} for the measurement {encoder.name}")
        else:
            print(f"{name}: {measure_probe(source, cells, encoder)['seconds']:.0f} s", flush=True)
    if waiting:
        raise ValueError(f"these wait: {'; '.join(waiting)}. Call again when that is there")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def run(options: argparse.Namespace, command: str) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        measure_probes(Path(options.run), Path(options.to), [name for name in options.only.split(",") if name])

    parser = build_parser("python -m benchmarks.claims.probes", "Probe the encoders of the claims' recipe.")
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
