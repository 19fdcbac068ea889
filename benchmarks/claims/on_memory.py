"""Statements 11 to 23 and our own: what memory models learn from vectors, and what they cost."""

from collections.abc import Sequence

from benchmarks.claims.evidence import (
    NotMeasuredError,
    Number,
    Outcome,
    Part,
    Reading,
    Study,
    Verdict,
    beside,
    close,
    higher,
    joint_verdict,
    judge,
    lower,
    reaches,
    stays_under,
    times,
)
from benchmarks.claims.on_information import AUTOENCODER, AUTOENCODER_64, CLM_MIXER, MEMORY, ORACLE, ORACLE_16


def copying(stage: str, label: str, condition: str = "memory") -> Reading:
    """Tokens copied with those before in sight."""
    return Reading(f"stage_{stage}.copy.{condition}", label)


def blank(stage: str, label: str, condition: str = "memory") -> Reading:
    """Tokens copied with nothing in sight."""
    return Reading(f"stage_{stage}.blank_copy.{condition}", label)


def predicting(stage: str, label: str, condition: str = "memory") -> Reading:
    """Next tokens in rows of 128."""
    return Reading(f"stage_{stage}.clm.{condition}", label)


MEMORY_MODEL = predicting("memory", "memory")
NO_MEMORY = predicting("no_memory", "no memory")
FULL_CONTEXT = predicting("full_context", "full context")


def best_of(claim: str, parts: Sequence[Part]) -> Part:
    """It is enough that one of several readings holds; all must speak against it for it not to hold."""

    def decide(study: Study) -> Outcome:
        lines: list[str] = []
        verdicts = []
        for part in parts:
            found, verdict = part.outcome(study)
            lines += found
            verdicts.append(verdict)
        for verdict in (Verdict.HOLDS, Verdict.UNDECIDED, Verdict.FAILS):
            if verdict in verdicts:
                return lines, verdict
        raise NotMeasuredError("all of them")

    return Part(claim, f"{parts[0].criterion}; for one of {len(parts)} models", decide)


def copies_and_predicts(stage: str, label: str) -> Part:
    """One model must do both."""
    parts = (
        reaches("", copying(stage, f"{label}: copy"), 0.9, decisive=False),
        close("", predicting(stage, f"{label}: next tokens"), MEMORY_MODEL, 0.05, kind="ratio"),
    )

    def decide(study: Study) -> Outcome:
        found = [part.decide(study) for part in parts]
        return [line for lines, _ in found for line in lines], joint_verdict([verdict for _, verdict in found])

    return Part("", "; and ".join(part.criterion for part in parts), decide)


def _share_of_gap(bound: float = 0.5) -> Part:
    def decide(study: Study) -> Outcome:
        gap = study.difference(NO_MEMORY, FULL_CONTEXT, "loss")
        if gap.low <= 0:
            return [f"no gap to recover: {gap.as_difference()}"], Verdict.UNDECIDED
        share = study.share(NO_MEMORY, MEMORY_MODEL, FULL_CONTEXT)
        return [f"share of the gap that memory wins back {share}"], judge(share.high < bound, share.low > bound)

    criterion = f"share of the loss between no memory and full context won back: under {bound:g}, interval included"
    return Part("before a transformer decoder a gap to full context remains", criterion, decide)


def _not_possible(claim: str, why: str) -> Part:
    def decide(study: Study) -> Outcome:
        return [why], Verdict.NOT_RUN

    return Part(claim, "", decide)


def _oracle_near_zero(length: int, suffix: str = "", bound: float = 0.25) -> Part:
    def decide(study: Study) -> Outcome:
        own = study.number(f"oracle_token{suffix}.own", "loss")
        without = study.number(f"oracle_full_context{suffix}", "loss")
        lines = [f"oracle {own}, all tokens before instead {without}"]
        return lines, judge(own.high <= bound * without.low, own.low > bound * without.high)

    criterion = (
        f"loss: at most {bound:g} times that of full context on the same targets, at the ends of both intervals"
    )
    return Part(f"an oracle's vector of 128 numbers makes {length} tokens predictable", criterion, decide)


def _rounding(noise: str, bound: float, *, under: bool, claim: str) -> Part:
    """Eight bits raise the loss by less, or more, than so many percent."""

    def decide(study: Study) -> Outcome:
        own = study.number(f"noise_{noise}.own", "loss")
        shown, verdict = [], Verdict.NOT_RUN
        for stored, label in (("int8", "int8"), ("float8_e4m3fn", "E4M3"), ("float8_e5m2", "E5M2")):
            change = study.difference(
                Reading(f"noise_{noise}.{stored}", stored), Reading(f"noise_{noise}.own", "own"), "loss"
            )
            percent = [100 * value / own.value for value in (change.value, change.low, change.high)]
            shown.append(f"{label} {percent[0]:+.2f} % ({percent[1]:+.2f} to {percent[2]:+.2f})")
            if stored == "int8":
                below, above = percent[2] < bound, percent[1] > bound
                verdict = judge(below, above) if under else judge(above, below)
        return [f"{', '.join(shown)}; loss {own}"], verdict

    side = "under" if under else "over"
    return Part(claim, f"loss increase by storing the narrow vector in int8: {side} {bound:g} %", decide)


def _noise_costs(noise: str) -> Part:
    return close(
        "and the noise itself costs little",
        Reading(f"noise_{noise}.own", "noise"),
        Reading("noise_none.own", "none"),
        0.1,
        kind="loss",
    )


def _cache_entries() -> Part:
    def decide(study: Study) -> Outcome:
        cells = {
            name.split("/")[1]: cell for name, cell in study.other("rolling").items() if name.startswith("generation/")
        }
        if not cells:
            raise NotMeasuredError("rolling.json: generation")
        lines, fits = [], []
        for cell in cells.values():
            columns, tokens = cell["cache_columns"], cell["given"]["tokens"]
            expected = tokens / cell["tokens_per_memory"]
            lines.append(f"{columns['memories']:,} entries instead of {columns['full']:,}")
            fits.append(expected <= columns["memories"] <= 1.1 * expected)
        return sorted(set(lines)), judge(all(fits), not all(fits))

    criterion = (
        "cache columns behind 16,384 tokens: tokens / chunk length, and at most a tenth more for the open window"
    )
    return Part("the cache holds memories and one window instead of all tokens", criterion, decide)


def _linear_reading() -> Part:
    def decide(study: Study) -> Outcome:
        found = study.other("speed")["read_exponents"]
        lines = [f"{name}: exponent {value:.3f}" for name, value in found.items()]
        long = [
            f"up to 65,536 tokens: {cell['exponent']:.2f} by the clock, {cell['cpu_exponent']:.2f} in CPU time"
            for name, cell in study.other("rolling").items()
            if name == "reading/1024"
        ]
        values = list(found.values())
        return ["; ".join([*lines, *long])], judge(max(values) <= 1.1, max(values) >= 1.5)

    criterion = "exponent of reading time in the number of windows: at most 1.1 holds, 1.5 or more does not"
    return Part("reading costs grow linearly with the text", criterion, decide)


def _first_token_gain(shape: str = "quickstart") -> Part:
    def decide(study: Study) -> Outcome:
        cells = {
            cell["given"]["tokens"]: cell["cpu_ratio"]["stored_16"]
            for name, cell in study.other("rolling").items()
            if name.startswith(f"first_token/{shape}/")
        }
        if len(cells) < 3:
            raise NotMeasuredError(f"rolling.json: first_token/{shape}")
        gains = [cells[tokens] for tokens in sorted(cells)]
        lines = [", ".join(f"{tokens:,} tokens {cells[tokens]:.0f} times" for tokens in sorted(cells))]
        grows = all(later > earlier for earlier, later in zip(gains[:-1], gains[1:], strict=True))
        return lines, judge(grows, gains[-1] <= gains[0])

    criterion = "CPU time to the first token, full text over stored memories: larger at every longer text"
    return Part("the gain in time to the first token grows with the text", criterion, decide)


def _half_depth_changes() -> Part:
    def decide(study: Study) -> Outcome:
        cosine = study.part("half_depth.cosine_whole")["mean"]
        lines = [f"cosine of lifted and own vectors {cosine:.3f}"]
        pair = [study.number(f"half_depth.retention_{name}", "accuracy") for name in ("lifted", "whole")]
        lines.append(f"the autoencoder's decoder writes {pair[0]} from them instead of {pair[1]}")
        return lines, judge(pair[0].high < 0.5 * pair[1].low, pair[0].low > 0.9 * pair[1].high)

    criterion = "tokens the autoencoder still writes: under half holds, over nine tenths does not"
    return Part("fresh layers and a fresh norm above a trained encoder garble its vectors", criterion, decide)


def _border(kind: str, condition: str) -> Reading:
    label = {"parallel": "trained", "no_border": "not trained"}[kind]
    return Reading(f"{kind}_100.{condition}", label)


def _seeds(one: str, other: str, condition: str, claim: str, by: float) -> Part:
    """One has a lower loss than the other with each of two seeds."""

    def decide(study: Study) -> Outcome:
        lines: list[str] = []
        found: list[Number] = []
        for seed in (100, 101):
            try:
                difference = study.difference(
                    Reading(f"{one}_{seed}.{condition}", one), Reading(f"{other}_{seed}.{condition}", other), "loss"
                )
            except NotMeasuredError:
                if not found and seed == 101:
                    raise
                continue
            found.append(difference)
            lines.append(f"seed {seed}: {difference.as_difference()}")
        if not found:
            raise NotMeasuredError(f"{one}_100, {other}_100")
        holds = all(difference.high < 0 and difference.value < -by for difference in found)
        fails = all(difference.low > 0 and difference.value > by for difference in found)
        return ["; ".join(lines)], judge(holds, fails)

    return Part(claim, f"loss, with each seed that was run: less by over {by:g} nats, the interval below zero", decide)


PARTS: dict[str, tuple[Part, ...]] = {
    "11": (
        lower("memory predicts better than no memory", MEMORY_MODEL, NO_MEMORY, by=0.01),
        lower("full context better than memory", FULL_CONTEXT, MEMORY_MODEL, by=0.01),
        beside(
            lower(
                "the text's own memories better than another's",
                MEMORY_MODEL,
                predicting("memory", "another text's", "wrong_memory"),
                by=0.0,
            )
        ),
        _share_of_gap(),
        _not_possible(
            "before a mixer decoder the gap nearly closes",
            "a mixer reads a fixed number of columns, so it is no decoder of a memory model in this package",
        ),
    ),
    "12": (
        close("its encoder inverts like a causal LM", MEMORY, CLM_MIXER, 0.05),
        times("far below an autoencoder", AUTOENCODER, MEMORY, 2),
        stays_under("a frozen causal encoder fails at blank copy", blank("blank_clm", "frozen causal mixer"), 0.25),
        times(
            "an autoencoder's is far better there",
            blank("blank_only", "frozen autoencoder"),
            blank("blank_clm", "frozen causal mixer"),
            2,
        ),
        beside(
            times(
                "and better than an untrained one's",
                blank("blank_only", "frozen autoencoder"),
                blank("blank_untrained", "frozen untrained mixer"),
                2,
            )
        ),
    ),
    "13": (
        reaches(
            "copies 32 tokens through two vectors", copying("copy_trainable", "trainable encoder"), 0.9, decisive=False
        ),
        times(
            "far above its own control without memory",
            copying("copy_trainable", "own memories"),
            copying("copy_trainable", "none", "no_memory"),
            2,
            decisive=False,
        ),
        higher(
            "above it at all",
            copying("copy_trainable", "own memories"),
            copying("copy_trainable", "none", "no_memory"),
        ),
        close(
            "the control is a guess of the next token",
            copying("copy_trainable", "control without memory", "no_memory"),
            predicting("no_memory", "next token without memory"),
            0.1,
        ),
        beside(
            stays_under(
                "another text's memories do not help",
                copying("copy_trainable", "another text's memories", "wrong_memory"),
                0.25,
            )
        ),
    ),
    "14": (
        close(
            "frozen autoencoder, copy from the start: as without memory",
            copying("copy_direct", "own memories"),
            copying("copy_direct", "none", "no_memory"),
            0.1,
        ),
        times(
            "blank copy makes it read them",
            blank("blank_only", "own memories"),
            blank("blank_only", "none", "no_memory"),
            5,
        ),
        higher(
            "blank copy, then copy: better than blank copy alone",
            copying("curriculum", "curriculum, copy"),
            blank("blank_only", "blank copy alone"),
        ),
        beside(
            higher(
                "copying better than blank copying did at the end of its first half",
                copying("curriculum", "then copy"),
                blank("curriculum_blank", "blank copy, 150 steps"),
            )
        ),
        times(
            "blank copy, then copy: far above copy from the start",
            copying("curriculum", "curriculum, copy"),
            copying("copy_direct", "copy from the start"),
            2,
        ),
        higher(
            "blank copy alone better than copy from the start",
            blank("blank_only", "blank copy alone"),
            copying("copy_direct", "copy from the start"),
        ),
    ),
    "15": (
        close(
            "frozen causal encoder, curriculum: as without memory",
            copying("curriculum_clm", "own memories"),
            copying("curriculum_clm", "none", "no_memory"),
            0.1,
        ),
        times(
            "far below the autoencoder's curriculum",
            copying("curriculum", "autoencoder"),
            copying("curriculum_clm", "causal mixer"),
            2,
        ),
    ),
    "16": (
        best_of(
            "one model copies, and predicts as one trained on prediction alone",
            [
                copies_and_predicts("combined", "trainable encoder"),
                copies_and_predicts("combined_frozen", "curriculum, frozen encoder"),
            ],
        ),
        close(
            "trained on prediction alone it copies like its control",
            copying("memory", "own memories"),
            copying("memory", "none", "no_memory"),
            0.05,
        ),
        lower(
            "trained on copies alone it predicts badly",
            MEMORY_MODEL,
            predicting("copy_trainable", "copy alone"),
            by=0.5,
        ),
    ),
    "17": (
        lower("fixed slots no worse", predicting("fixed", "fixed"), MEMORY_MODEL),
        close("the difference is small", predicting("fixed", "fixed"), MEMORY_MODEL, 0.05, kind="loss"),
    ),
    "18": (_seeds("parallel", "recurrent", "all", "parallel below recurrent", 0.02),),
    "19": (
        higher(
            "blank copy before a transformer: transformer encoder above mixer",
            blank("blank_transformer", "transformer"),
            blank("blank_only", "mixer"),
        ),
        lower(
            "next tokens: transformer encoder below mixer",
            predicting("memory_frozen_transformer", "transformer"),
            predicting("memory_frozen_ae", "mixer"),
            by=0.01,
        ),
        lower(
            "a frozen mixer encoder is worse than no memory",
            NO_MEMORY,
            predicting("memory_frozen_ae", "frozen mixer"),
            by=0.0,
        ),
    ),
    "20": (
        _oracle_near_zero(64),
        _oracle_near_zero(16, "_16"),
        times("while its vector inverts poorly, 64 tokens", AUTOENCODER_64, ORACLE, 2),
        times("while its vector inverts poorly, 16 tokens", AUTOENCODER, ORACLE_16, 2),
    ),
    "21": (
        _rounding("1_4", 0.6, under=True, claim="trained with noise, eight bits are nearly free"),
        _rounding("none", 5.0, under=False, claim="trained without, they are not"),
        beside(_noise_costs("1_4")),
    ),
    "22": (
        close(
            "brief copy training is benign",
            Reading("pretrained_brief.clm", "after brief training"),
            Reading("pretrained_base.clm", "before"),
            0.05,
            kind="loss",
        ),
        lower(
            "long copy training is not",
            Reading("pretrained_brief.clm", "after brief training"),
            Reading("pretrained_long.clm", "after long training"),
            by=0.05,
        ),
        beside(
            higher(
                "long training does teach it to copy",
                Reading("pretrained_long.copy.memory", "after long training"),
                Reading("pretrained_brief.copy.memory", "after brief training"),
            )
        ),
    ),
    "23": (_cache_entries(), _linear_reading(), _first_token_gain()),
    "a": (
        lower(
            "it lowers the loss of windows' first tokens",
            _border("parallel", "border"),
            _border("no_border", "border"),
            by=0.05,
        ),
        close(
            "and leaves the others as they are",
            _border("parallel", "inside"),
            _border("no_border", "inside"),
            0.02,
            kind="loss",
        ),
    ),
    "b": (
        lower(
            "masked slots predict better than slots of ones", predicting("fixed", "masked"), predicting("ones", "ones")
        ),
    ),
    "c": (
        _half_depth_changes(),
        times(
            "blank copy through them is far worse",
            Reading("whole_copy.memory", "encoder as it was trained"),
            Reading("half_depth_copy.memory", "lifted under fresh layers"),
            2,
        ),
    ),
    "d": (
        higher(
            "the marker raises the share of copied tokens",
            copying("copy_marker", "marker"),
            copying("copy_markerless", "no marker"),
        ),
    ),
}
