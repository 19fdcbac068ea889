"""The paper's statements on small models: plan the arms, run them in order of value, turn them into one record.

```bash
python -m benchmarks.study --hours 1 --threads 1   # killed at any time, the same command goes on
python -m benchmarks.study --report                # the record of what is there; python -m benchmarks.render the page
```

An *arm* is one model, or one probe of a frozen one, trained to a plateau with each of three seeds. All arms are of one
family, the quickstart's made small: 8 tokens in a vector of 64 numbers, two layers in encoder and in decoder, texts of
32 tokens in windows of 8, 1,024 tokens a step. Rates are swept: three for each architecture and task, on one seed.

They rise, stay, fall to a tenth and rest there; an arm ends at the first plateau of its validation loss within the
rest ([`Validation`]), else at its last step, and is then called not converged. `study_page.py` says what of the
arms decides which statement.

Letters: m a masked mixer, t a transformer. B texts, T tokens of a text.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from benchmarks.measure import benchmark_parser, describe_run, run_benchmark
from modeling_memory import MemoryAutoencoder, MemoryEncoderDecoderForCausalLM
from modeling_memory.memory_encoder import build_encoder
from training.data.objectives import IGNORED, BatchSpec, build_batch
from training.data.rows import keep_columns
from training.data.texts import load_texts
from training.measure.baselines import (
    QUANTISATIONS,
    OracleMemory,
    RecurrentMemory,
    next_token_loss,
    quantised,
    score_next_tokens,
)
from training.measure.frozen import FrozenEncoder, TextRows
from training.measure.inversion import DecoderSize, invert
from training.measure.suites import Evaluation, Scores, free_running_copy, score, score_suite, spread_rows
from training.places import REPOSITORY
from training.recipes.recipe import load_recipe
from training.records.record import data_digest, describe_code, read_json, write_json
from training.train.build import autoencoder_config, child_config
from training.train.fit import Budget, Order, Validation, fit
from training.train.inputs import prepare_inputs
from training.train.trainer import run_objective

WIDTH, CHUNK, ROW, SOURCE = 64, 8, 32, 16
MEMORIES = ROW // CHUNK - 1  # before the last window
STEP_TOKENS, TEST_TOKENS, TEMPERATURE = 1024, 8192, 0.02
SEEDS, SCALES = (0, 1, 2), (0.4, 1.0, 2.5)
RATES = {"ae": (1.0e-2, 1.0e-2), "lm": (4.0e-3, 1.0e-2)}  # of AdamW and Muon, the quickstart's
SCHEDULE = {"warmup": 0.02, "decay": 0.25, "rest": 0.4, "floor": 0.1}
NEWS = "training/corpora/wikinews/test.parquet"


@dataclass(frozen=True)
class Arm:
    """One model or probe.

    Attributes:
        name (`str`): Its name; the letters after the last dot are its architectures.
        kind (`str`): `ae`, `lm`, `memory`, `recurrent`, `oracle`, `retrieval` or `probe`.
        steps (`int`): Most steps.
        tier (`int`): Arms of a lower tier run first.
        parents (`dict`): Role (`encoder`, `start`) -> name of the arm that it takes the model of.
        options (`dict`): What the kind knows.
        swept (`str`, *optional*): The sweep whose best rate it takes, such as `ae.m`; `None`: it is of a sweep.
        scale (`float`): Of the rates, beside the sweep's.
    """

    name: str
    kind: str
    steps: int
    tier: int
    parents: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    swept: str | None = None
    scale: float = 1.0

    @property
    def decoder(self) -> str:
        """Letter of the decoder's architecture."""
        return self.name[-1]

    @property
    def encoder(self) -> str:
        """Letter of the encoder's architecture."""
        return self.name.rpartition(".")[2][0]


def plan() -> dict[str, Arm]:
    """Return all arms by name, parents before their children."""
    arms: dict[str, Arm] = {}

    def add(name: str, kind: str, steps: int, tier: int, scale: float = 1.0, **rest: Any) -> None:
        parents = {role: rest.pop(role) for role in ("encoder", "start") if role in rest}
        task = "lm" if kind in ("lm", "memory", "recurrent", "oracle", "retrieval") else "ae"
        swept = rest.pop("swept", "ae.m" if kind == "probe" else f"{task}.{name[-1]}")  # probes have one decoder
        arms[name] = Arm(name, kind, steps, tier, parents, rest, swept, scale)

    for k in "mt":  # mixers first: a step costs half of a transformer's
        for scale in SCALES:
            add(f"ae@{scale}.{k}", "ae", 240, 4 * (k == "t"), scale, swept=None)
            add(f"lm@{scale}.{k}", "lm", 240, 4 * (k == "t"), scale, swept=None)
    for number, k in enumerate("mt"):
        _vectors(add, k, 1 + 3 * number)
        _copies(add, k, 2 + 3 * number)
        _others(add, k, 5 + number)
    add("repeat.mt", "ae", 1600, 5, expansion="repeat")
    add("repeat.tm", "ae", 1600, 5, expansion="repeat")
    add("random.m", "ae", 1600, 3, random=True)
    add("narrow.m", "ae", 3200, 3, bottleneck=16)  # two numbers a token
    add("noisy.m", "ae", 3200, 3, bottleneck=16, noise=0.0625)
    for name, encoder in (("blank.mt", "ae.m"), ("blank.tm", "ae.t")):
        add(name, "memory", 2400, 6, objectives={"blank_copy": 1.0}, encoder=encoder)
    causal = {"objectives": {"causal": 1.0}}
    add("frozen.mt", "memory", 3200, 6, **causal, encoder="ae.m")
    add("free.t", "memory", 3200, 6, **causal, positions="contiguous")
    add("ones.t", "memory", 3200, 6, **causal, absent="ones")
    add("borderless.t", "memory", 3200, 7, **causal, border=False)
    add("open32.m", "ae", 6400, 7, length=32, causal=False)
    add("open-decoder32.m", "ae", 6400, 7, length=32, causal_decoder=False)
    add("marker.t", "memory", 2400, 7, objectives={"copy": 1.0}, places=False)
    add("markerless.t", "memory", 2400, 7, objectives={"copy": 1.0}, places=False, marker="none")
    add("blank-lifted.t", "memory", 2400, 7, objectives={"blank_copy": 1.0}, encoder="ae.t", lifted=True)
    for weight in (0.2, 1.0):
        add(f"combined-{weight}.t", "memory", 2400, 7, objectives={"causal": 1.0, "copy": weight})
    return arms


def _vectors(add: Callable[..., None], k: str, tier: int) -> None:
    """What vectors hold, by training of their encoder; what memory is worth to a decoder."""
    add(f"ae.{k}", "ae", 1600, tier)
    add(f"lm.{k}", "lm", 3200, tier)  # all of the row in sight
    for name, source in (("untrained", None), ("causal", "lm"), ("autoencoder", "ae")):
        add(f"probe-{name}.{k}", "probe", 1800, tier, **({"encoder": f"{source}.{k}"} if source else {}))
    add(f"repeat.{k}", "ae", 1600, tier, expansion="repeat")
    add(f"none.{k}", "lm", 3200, tier, window=CHUNK)
    add(f"predict.{k}", "memory", 3200, tier, objectives={"causal": 1.0})
    add(f"probe-memory.{k}", "probe", 1800, tier, encoder=f"predict.{k}")
    add(f"recurrent.{k}", "recurrent", 3200, tier)


def _copies(add: Callable[..., None], k: str, tier: int) -> None:
    """Copying through trainable and frozen encoders."""
    copy, blank = {"objectives": {"copy": 1.0}}, {"objectives": {"blank_copy": 1.0}}
    add(f"copy.{k}", "memory", 2400, tier, **copy)
    add(f"direct.{k}", "memory", 2400, tier, **copy, encoder=f"ae.{k}")
    add(f"blank.{k}", "memory", 2400, tier, **blank, encoder=f"ae.{k}")
    add(f"curriculum.{k}", "memory", 1600, tier, **copy, start=f"blank.{k}")
    add(f"combined.{k}", "memory", 2400, tier, objectives={"causal": 1.0, "copy": 0.5})
    add(f"blank-causal.{k}", "memory", 2400, tier, **blank, encoder=f"lm.{k}")
    add(f"curriculum-causal.{k}", "memory", 1600, tier, **copy, start=f"blank-causal.{k}")
    add(f"blank-memory.{k}", "memory", 2400, tier, **blank, encoder=f"predict.{k}")


def _others(add: Callable[..., None], k: str, tier: int) -> None:
    """Other encoders, longer texts."""
    add(f"oracle.{k}", "oracle", 3200, tier)
    add(f"probe-oracle.{k}", "probe", 1800, tier, encoder=f"oracle.{k}")
    add(f"retrieval.{k}", "retrieval", 800, tier, 0.3, start=f"lm.{k}")
    add(f"probe-retrieval.{k}", "probe", 1800, tier, encoder=f"retrieval.{k}")
    add(f"early.{k}", "lm", 100, tier)
    add(f"probe-early.{k}", "probe", 1800, tier, encoder=f"early.{k}")
    add(f"ae16.{k}", "ae", 3200, tier, length=16)
    add(f"ae32.{k}", "ae", 6400, tier, length=32)
    for name, source in (("untrained", None), ("causal", "lm"), ("autoencoder", "ae32")):
        add(f"probe32-{name}.{k}", "probe", 1800, tier, length=32, **({"encoder": f"{source}.{k}"} if source else {}))
    together = {"causal": 1.0, "copy": 0.5}
    add(f"combined-frozen.{k}", "memory", 2400, tier, objectives=together, start=f"curriculum.{k}")


class Lab:
    """Text, models and finished arms of a study.

    Args:
        folder, seed, arms: Where all is kept; of fresh weights and the order of texts; default: [`plan`].
    """

    def __init__(self, folder: Path, seed: int, arms: dict[str, Arm] | None = None) -> None:
        self.folder, self.seed = folder, seed
        self.arms = plan() if arms is None else arms

    @cached_property
    def inputs(self) -> Any:
        """Tokenizer and text of the quickstart."""
        return prepare_inputs(load_recipe("quickstart"), self.folder / "inputs", PartialState(cpu=True))

    @cached_property
    def news(self) -> torch.Tensor:
        """Tokens of text of another kind."""
        texts = "\n".join(load_texts([REPOSITORY / NEWS]))[:400_000]
        return torch.tensor(self.inputs.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def tokens(self) -> dict[str, int | None]:
        """Ids that the configurations of all parts share."""
        ids = self.inputs.special_tokens
        return {"vocab_size": ids.memory, "pad_token_id": ids.pad, "bos_token_id": ids.bos, "eos_token_id": ids.eos}

    def place(self, name: str, ending: str = "json") -> Path:
        """Where the result (`json`) or the weights (`pt`) of an arm are kept."""
        return self.folder / "arms" / f"{name}-{self.seed}.{ending}"

    def identity(self, name: str) -> str:
        """Differs whenever an arm or one that it rests upon is planned otherwise."""
        arm = self.arms[name]
        return data_digest({"arm": asdict(arm), "parents": [self.identity(parent) for parent in arm.parents.values()]})

    def result(self, name: str) -> dict[str, Any] | None:
        """Return what was measured of an arm, if it is done as it is planned now."""
        found = read_json(self.place(name))
        return found if found is not None and found.get("identity") == self.identity(name) else None

    def ready(self, arm: Arm) -> bool:
        """Whether everything that an arm needs is done."""
        swept = [] if arm.swept is None else [self.sweep(arm.swept, scale) for scale in SCALES]
        return None not in [*swept, *(self.result(parent) for parent in arm.parents.values())]

    def sweep(self, swept: str, scale: float) -> dict[str, Any] | None:
        """What a sweep's arm of that scale found, if it is done; it is of the first seed."""
        return Lab(self.folder, SEEDS[0], self.arms).result(f"@{scale}.".join(swept.split(".")))

    def best_scale(self, swept: str) -> float:
        """The scale of the sweep's lowest validation loss."""
        found = {scale: self.sweep(swept, scale) for scale in SCALES}
        return min(SCALES, key=lambda scale: (found[scale] or {"validation_loss": math.inf})["validation_loss"])

    def body(self, letter: str, positions: int, layers: int = 2, causal: bool = True) -> dict[str, Any]:
        """Fields of a body's configuration."""
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": layers, "max_position_embeddings": positions}
        if letter == "m":
            return {"model_type": "masked_mixer", **sizes, "num_heads": 4, "causal": causal}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 3 * WIDTH}
        return {"model_type": "llama", **sizes, **heads, "is_causal": causal}

    def build(self, arm: Arm) -> nn.Module:
        """Build the model of an arm, from its parents' weights where it has any."""
        set_seed(self.seed)
        return getattr(self, f"_build_{arm.kind}")(arm, **arm.options)

    def load(self, name: str) -> nn.Module:
        """Load the model of a finished arm."""
        model = self.build(self.arms[name])
        model.load_state_dict(torch.load(self.place(name, "pt"), weights_only=True))
        return model.eval()

    def language_model(self, letter: str, positions: int = ROW) -> Any:
        """Build a fresh causal LM."""
        return AutoModelForCausalLM.from_config(child_config(self.body(letter, positions), self.tokens, "study"))

    def fresh_encoder(self, letter: str, positions: int = CHUNK, layers: int = 2) -> Any:
        """Build a fresh body."""
        return build_encoder(child_config(self.body(letter, positions, layers), self.tokens, "study"))

    def _build_ae(
        self, arm: Arm, length: int = CHUNK, causal: bool = True, causal_decoder: bool | None = None, **options: Any
    ) -> nn.Module:
        expansion = options.get("expansion", "unroll")
        fields = {
            **{"chunk_length": length, "expansion": expansion},
            "unroll_stride": WIDTH // length if expansion == "unroll" else 1,  # positions share the vector evenly
            **{"bottleneck_size": options.get("bottleneck"), "bottleneck_noise": options.get("noise", 0.0)},
            "encoder": self.body(arm.encoder, length, causal=causal),
            "decoder": self.body(arm.decoder, length, causal=causal if causal_decoder is None else causal_decoder),
        }
        return MemoryAutoencoder(autoencoder_config(fields, self.tokens, "study"))

    def _build_lm(self, arm: Arm, **options: Any) -> nn.Module:
        return self.load(arm.parents["start"]) if arm.parents else self.language_model(arm.decoder)

    _build_retrieval = _build_lm

    def _build_recurrent(self, arm: Arm) -> nn.Module:
        return RecurrentMemory(self.language_model(arm.decoder), CHUNK, start=0.0 if arm.decoder == "m" else 1.0)

    def _build_oracle(self, arm: Arm) -> nn.Module:
        decoder = self.language_model(arm.decoder, CHUNK + 1)
        return OracleMemory(self.fresh_encoder(arm.encoder), decoder, "token")

    def _build_memory(
        self, arm: Arm, positions: str = "fixed", absent: str = "mask", places: bool = True, **options: Any
    ) -> nn.Module:
        if "start" in arm.parents:
            return self.load(arm.parents["start"])
        parent = arm.parents.get("encoder")
        encoder = self.fresh_encoder(arm.encoder) if parent is None else self.load(parent)
        if isinstance(encoder, MemoryEncoderDecoderForCausalLM):
            encoder = encoder.encoder
        if options.get("lifted"):  # the original's fault: fresh layers and a fresh norm above a trained encoder
            deep = self.fresh_encoder(arm.encoder, layers=4)
            lower = {name: tensor for name, tensor in encoder.encoder.state_dict().items() if name != "norm.weight"}
            deep.load_state_dict(lower, strict=False)
            encoder = deep
        set_seed(self.seed)  # decoders start equal, whatever the encoder is
        ids = {f"{name}_token_id": getattr(self.inputs.special_tokens, name) for name in ("memory", "copy", "blank")}
        sizes = {"chunk_length": CHUNK, "window_length": CHUNK, "max_memories": MEMORIES}
        layout = {"memory_positions": positions, "absent_memories": absent, "window_positions": places}
        projector = {"projector_type": "linear", "projector_norm": True, "freeze_encoder": parent is not None}
        fields = {**ids, **sizes, **layout, **projector}
        decoder = self.language_model(arm.decoder)
        return MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, **fields)

    def rows(self, split: str, length: int, limit: int | None = None) -> torch.Tensor:
        """Cut a split into rows `(N, length)`, at most `limit` of them, evenly spread."""
        tokens = self.inputs.tokens[split]
        return spread_rows(tokens, row_length=length, limit=tokens.numel() if limit is None else limit)

    def spec(self, arm: Arm) -> BatchSpec:
        """How batches of a memory model are made."""
        sizes = {"chunk_length": CHUNK, "window_length": CHUNK}
        mixed = len(arm.options.get("objectives", ())) > 1
        options = {"marker": arm.options.get("marker", "token"), "mixed_with_causal": mixed}
        return BatchSpec(self.inputs.special_tokens, source_length=SOURCE, **options, **sizes)

    def run(self, arm: Arm) -> dict[str, Any]:
        """Train an arm, measure it, keep result and weights; a run that was killed goes on from its checkpoint."""
        started = time.process_time()
        scale = arm.scale * (1.0 if arm.swept is None else self.best_scale(arm.swept))
        adam, muon = RATES["ae" if arm.kind in ("ae", "probe") else "lm"]
        rates = {"learning_rate": adam * scale, "muon_learning_rate": muon * scale}
        budget = Budget(arm.steps, STEP_TOKENS, seed=self.seed, **rates, **SCHEDULE)
        checkpoint = self.place(arm.name, f"{self.identity(arm.name)[:8]}.checkpoint")
        train = self._probe if arm.kind == "probe" else self._train
        curve, metrics = train(arm, budget, checkpoint)
        result = {
            "scale": scale,
            "steps": curve.points[-1][0],
            "converged": curve.at_plateau,
            "fall": round(curve.fall or 0.0, 5),
            "validation_loss": round(curve.points[-1][1], 5),
            "curve": " ".join(f"{step}:{loss:.3f}" for step, loss in curve.points[::2]),
            "metrics": {name: round(float(value), 5) for name, value in metrics.items()},
            "seconds": round(time.process_time() - started, 1),
            "commit": describe_code()["commit"],
            "identity": self.identity(arm.name),
        }
        write_json(self.place(arm.name), result)
        checkpoint.unlink(missing_ok=True)
        return result

    def _train(self, arm: Arm, budget: Budget, checkpoint: Path) -> tuple[Validation, dict[str, float]]:
        model = self.build(arm)
        loss_of = getattr(self, f"_loss_{arm.kind}")
        length = arm.options.get("length", CHUNK) if arm.kind in ("ae", "oracle") else ROW
        if arm.kind == "memory" and "causal" not in arm.options["objectives"]:
            length = SOURCE
        train, held = self.rows("train", length), self.rows("validation", length, TEST_TOKENS // 2 // length)
        if arm.options.get("random"):
            train, held = (self.random_tokens(rows.shape, number) for number, rows in enumerate((train, held)))
        columns = ROW if arm.kind == "memory" else length  # copies are read after their source
        order = Order(len(train), STEP_TOKENS // columns, self.seed)
        end, label = budget.steps * 3 // 4, f"{arm.name}, seed {self.seed}"
        validation = Validation(lambda: loss_of(arm, model, held).item(), max(1, budget.steps // 20), end)
        watched: dict[str, Any] = {"checkpoint": checkpoint, "validation": validation, "label": label}
        fit(model, lambda step: loss_of(arm, model, train[order.rows(step)]), budget, **watched)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), self.place(arm.name, "part"))
        os.replace(self.place(arm.name, "part"), self.place(arm.name, "pt"))
        with torch.no_grad():
            return validation, getattr(self, f"_measure_{arm.kind}")(arm, model.eval())

    def random_tokens(self, shape: torch.Size, number: int) -> torch.Tensor:
        """Draw tokens of the vocabulary, special ones left out."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randint(5, self.inputs.special_tokens.memory, shape, generator=generator)

    def _loss_ae(self, arm: Arm, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows, labels=rows).loss

    def _loss_lm(self, arm: Arm, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return self._mean(model, self._causal(arm, rows))

    def _causal(self, arm: Arm, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Next tokens of rows, each window by itself where the arm sees no more."""
        window = arm.options.get("window", ROW)
        batch = build_batch("causal", rows, BatchSpec(self.inputs.special_tokens, chunk_length=1, window_length=1))
        return {name: tensor.reshape(-1, window) for name, tensor in batch.items()}

    def _loss_memory(self, arm: Arm, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for objective, weight in arm.options["objectives"].items():
            batch = build_batch(objective, rows, self.spec(arm))
            if not arm.options.get("border", True):
                batch["shift_labels"][:, CHUNK - 1 :: CHUNK] = IGNORED
            total = total + weight * self._mean(model, keep_columns(batch))
        return total

    @staticmethod
    def _mean(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss_sum, _, targets = run_objective(model, batch)
        return loss_sum / (targets != IGNORED).sum()

    def _loss_recurrent(self, arm: Arm, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return next_token_loss(model(rows), rows)

    _loss_oracle = _loss_recurrent

    def _loss_retrieval(self, arm: Arm, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Find the text that eight tokens in a row stand in, among the texts of the batch."""
        starts = torch.arange(len(rows)) * 7 % (rows.shape[1] - CHUNK + 1)
        queries = rows.gather(1, starts[:, None] + torch.arange(CHUNK))
        read = (model.base_model(input_ids=texts, use_cache=False) for texts in (queries, rows))
        vectors = [nn.functional.normalize(states.last_hidden_state[:, -1].float()) for states in read]
        return nn.functional.cross_entropy(vectors[0] @ vectors[1].T / TEMPERATURE, torch.arange(len(rows)))

    def _measure_ae(self, arm: Arm, model: Any) -> dict[str, float]:
        length = arm.options.get("length", CHUNK)
        rows = self.rows("test", length, TEST_TOKENS // length)
        news = spread_rows(self.news, row_length=length, limit=TEST_TOKENS // length)
        found = {}
        for name, texts in (("", rows), ("news_", news), ("random_", self.random_tokens(rows.shape, 2))):
            found |= summary(score(model, {"input_ids": texts, "labels": texts}, len(texts)), name)
        if model.bottleneck is not None:
            for kind in QUANTISATIONS:
                with quantised(model.bottleneck, kind):
                    found |= summary(score(model, {"input_ids": rows, "labels": rows}, len(rows)), f"{kind}_")
        return found

    def _measure_lm(self, arm: Arm, model: Any) -> dict[str, float]:
        rows = self.rows("test", ROW, TEST_TOKENS // ROW)
        return summary(score(model, self._causal(arm, rows), len(rows)))

    def _measure_memory(self, arm: Arm, model: Any) -> dict[str, float]:
        sizes: dict[str, Any] = {"chunk_length": CHUNK, "window_length": CHUNK, "batch_size": 64}
        marker = arm.options.get("marker", "token")
        evaluation = Evaluation(model, self.inputs.special_tokens, num_generated_rows=64, marker=marker, **sizes)
        rows, sources = self.rows("test", ROW, TEST_TOKENS // ROW), self.rows("test", SOURCE, TEST_TOKENS // SOURCE)
        objectives = arm.options["objectives"]
        causal = score_suite(evaluation, "clm", rows)["memory"]
        border = torch.zeros(ROW - 1, dtype=torch.bool)
        border[CHUNK - 1 :: CHUNK] = True
        found = {**summary(causal, "causal_"), "causal_border_loss": causal.losses[:, border].mean().item()}
        for suite in ("copy", "blank_copy"):
            if suite == "copy" or suite in objectives:
                for name, scores in score_suite(evaluation, suite, sources).items():
                    found |= summary(scores, f"{suite}_{'' if name == 'memory' else name + '_'}")
        random = score_suite(evaluation, "copy", self.random_tokens(sources[:128].shape, 2))["memory"]
        found |= summary(random, "random_")
        if "copy" in objectives:
            written = free_running_copy(evaluation, sources)
            found |= {"free_exact": written["exact_match"], "free_accuracy": written["generated_token_accuracy"]}
        return found

    def _measure_recurrent(self, arm: Arm, model: nn.Module) -> dict[str, float]:
        return summary(score_next_tokens(model, self.rows("test", ROW, TEST_TOKENS // ROW)), "causal_")

    def _measure_oracle(self, arm: Arm, model: nn.Module) -> dict[str, float]:
        return summary(score_next_tokens(model, self.rows("test", CHUNK, TEST_TOKENS // CHUNK)))

    def _measure_retrieval(self, arm: Arm, model: nn.Module) -> dict[str, float]:
        return {"loss": self._loss_retrieval(arm, model, self.rows("test", ROW, STEP_TOKENS // ROW)).item()}

    def _probe(self, arm: Arm, budget: Budget, checkpoint: Path) -> tuple[Validation, dict[str, float]]:
        """Train a decoder on the vectors of a frozen encoder; the same decoder for all of them."""
        length = arm.options.get("length", CHUNK)
        set_seed(self.seed)
        if "encoder" in arm.parents:
            model: Any = self.load(arm.parents["encoder"])
            body = getattr(model, "encoder", None) or model.base_model
        else:
            body = self.fresh_encoder(arm.encoder, length)
        encoder = FrozenEncoder(arm.name, body.eval().requires_grad_(False), self.inputs.tokenizer)
        texts = {}
        for split, number in (("train", budget.steps * STEP_TOKENS // length), ("test", TEST_TOKENS // length)):
            tokens = self.rows(split, length, number)
            texts[split] = TextRows(tokens, self.inputs.byte_lengths[tokens].sum(1))
        # Rows of the stream stand in the order of the books: those held back come from all of them.
        mixed = torch.randperm(len(texts["train"]), generator=torch.Generator().manual_seed(self.seed))
        train, test, size = texts["train"].select(mixed), texts["test"], DecoderSize(hidden_size=WIDTH)
        watched: dict[str, Any] = {"checkpoint": checkpoint, "label": f"{arm.name}, seed {self.seed}"}
        found = invert(encoder, train, test, size, budget, stop_after=budget.steps * 3 // 4, **watched)
        curve = Validation(lambda: math.nan, 1, points=found["validation"])
        names = {"accuracy": "token_accuracy", "loss": "loss", "information": "information_ratio_paper"}
        return curve, {name: found[key] for name, key in names.items()}


def summary(scores: Scores, prefix: str = "") -> dict[str, float]:
    """Loss and accuracy of scored tokens."""
    loss, right = (values.double().mean().item() for values in (scores.losses, scores.correct))
    return {f"{prefix}loss": loss, f"{prefix}accuracy": right}


def in_order(arms: dict[str, Arm]) -> Iterator[tuple[Arm, int]]:
    """Yield arms with their seeds, of the highest value first: sweeps, then tier by tier, seed by seed."""
    for tier in sorted({arm.tier for arm in arms.values()}):
        for seed in SEEDS:
            for arm in arms.values():
                if arm.tier == tier and (arm.swept is not None or seed == SEEDS[0]):
                    yield arm, seed


def run_arms(folder: Path, arms: dict[str, Arm], hours: float) -> tuple[int, int]:
    """Run what is not done yet until the time is up; returns how many runs are done, and of how many."""
    end, done, number = time.monotonic() + 3600 * hours, 0, 0
    labs = {seed: Lab(folder, seed, arms) for seed in SEEDS}
    for arm, seed in in_order(arms):
        lab, number = labs[seed], number + 1
        if lab.result(arm.name) is None:
            if time.monotonic() >= end or not lab.ready(arm):
                continue
            found = lab.run(arm)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in list(found["metrics"].items())[:4])
            state = "" if found["converged"] else f" NOT CONVERGED ({found['fall']:.2%})"
            print(f"{arm.name} {seed}: {found['steps']} steps, {found['seconds']:.0f} s: {shown}{state}", flush=True)
        done += 1
    return done, number


def collect(folder: Path, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """Return the results of all runs that are done: arm -> seed -> result."""
    found: dict[str, dict[str, Any]] = {}
    for arm, seed in in_order(arms):
        result = Lab(folder, seed, arms).result(arm.name)
        if result is not None:
            del result["identity"]
            found.setdefault(arm.name, {})[str(seed)] = result
    return found


def rests_upon(arms: dict[str, Arm]) -> dict[str, list[str]]:
    """Return for each arm those that must be at their plateau, too: not an encoder that was stopped on purpose."""
    needed: dict[str, list[str]] = {}
    for name, arm in arms.items():
        parents = [parent for parent in arm.parents.values() if not parent.startswith("early")]
        needed[name] = [other for parent in parents for other in (parent, *needed[parent])]
    return needed


def measure(options: argparse.Namespace, command: str) -> dict[str, Any] | None:
    """Run arms, unless only a report is asked for; return the record of what is there."""
    folder, arms, record = Path(options.folder), plan(), describe_run("study", command, {"first": SEEDS[0]})
    done, number = run_arms(folder, arms, 0.0 if options.report else options.hours)
    print(f"{done} of {number} runs are done")
    found = collect(folder, arms)
    if not found:
        return None
    sizes = {"width": WIDTH, "chunk_length": CHUNK, "row_length": ROW, "source_length": SOURCE, "layers": 2}
    record["recipe"] = {**sizes, "vocabulary": 2048, "text": "books", "step_tokens": STEP_TOKENS, "scales": SCALES}
    record["metrics"] = {"planned_runs": number, "parents": rests_upon(arms), "arms": found}
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = benchmark_parser("study", "The paper's statements on small models, every arm to a plateau.", quick=False)
    parser.add_argument("--hours", type=float, default=8.0, help="how long to run (8); an arm that began is finished")
    parser.add_argument("--report", action="store_true", help="run nothing: the record of what is done")
    parser.add_argument("--folder", default="runs/study", help="where runs are kept (runs/study)")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
