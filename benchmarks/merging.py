r"""What merging old memories costs: loss on held-out text, with all memories, fewer by each policy, and none.

```bash
python -m training.run merging     # two models: one has learnt with all memories, one with merged ones
python -m benchmarks.merging
```

T tokens of a text, R memories that there is room for.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.measure import describe_run, save_record
from benchmarks.rolling_quality import cut_documents, read_within, token_losses
from modeling_memory import MemoryEncoderDecoderForCausalLM
from training.measure.metrics import bootstrap_interval
from training.places import REPOSITORY, portable_path
from training.records.record import read_json

Record = dict[str, Any]
POLICIES = {"merge": "merged", "drop_oldest": "the newest", "keep_nearest": "the nearest"}
STAGES = {"all_memories": "all memories", "merged_memories": "merged memories"}
ROOMS = (32, 16, 8)


@torch.no_grad()
def measure_policies(
    model: MemoryEncoderDecoderForCausalLM, documents: torch.Tensor, rooms: Sequence[int], first: int
) -> dict[str, Record]:
    """Loss of the tokens from `first` on, with each policy and room, beside that with all memories.

    Args:
        model ([`MemoryEncoderDecoderForCausalLM`]): A model that can merge.
        documents (`torch.LongTensor` of shape `(N, T)`): Texts.
        rooms (sequence of `int`): For how many memories there is room.
        first (`int`): First column that counts: all rooms should be too small by then.

    Returns:
        `dict`: By reading, such as `merge 16`: nats per token, and how much more that is than with all memories, with
        an interval over texts; for merged memories also than with as many of the newest.
    """
    readings: dict[str, tuple[int | None, str]] = {"all": (None, "error")}
    readings |= {f"{policy} {room}": (room, policy) for room in rooms for policy in POLICIES}
    readings["none"] = 0, "drop_oldest"
    losses = {
        name: torch.stack([token_losses(read_within(model, text, *how), text)[first - 1 :] for text in documents])
        for name, how in readings.items()
    }  # (N, T - first) each
    by_text = {name: values.double().mean(1) for name, values in losses.items()}
    result = {}
    for name, means in by_text.items():
        policy, _, room = name.partition(" ")
        beside = {"more": "all"} | ({"beside_newest": f"drop_oldest {room}"} if policy == "merge" else {})
        result[name] = {"loss": means.mean().item()}
        for key, other in beside.items():
            difference = means - by_text[other]
            result[name] |= {key: difference.mean().item(), f"{key}_interval": list(bootstrap_interval(difference))}
    return result


def merging_lines(record: Record, link: str) -> list[str]:
    """A row for each way to hold fewer memories; of each model the loss and what is lost."""
    metrics, given = record["metrics"], record["given"]
    lines = [
        "| memories of the text before | " + " | ".join(f"learnt with {title}" for title in STAGES.values()) + " |",
        "|---|" + "---:|" * len(STAGES),
    ]
    titles = {"all": f"all, up to {given['most_memories']}"}
    titles |= {f"{policy} {room}": f"{room}, {how}" for room in given["rooms"] for policy, how in POLICIES.items()}
    titles["none"] = "none"
    for name, title in titles.items():
        cells = []
        for stage in STAGES:
            found = metrics[stage][name]
            low, high = found["more_interval"]
            more = "" if name == "all" else f" ({found['more']:+.4f}, {low:+.4f} to {high:+.4f})"
            cells.append(f"[{found['loss']:.4f}]({link}){more}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    beside = []
    for stage, title in STAGES.items():
        found = [(room, metrics[stage][f"merge {room}"]) for room in given["rooms"]]
        shown = (
            f"{cell['beside_newest']:+.4f} ({cell['beside_newest_interval'][0]:+.4f} to "
            f"{cell['beside_newest_interval'][1]:+.4f}) with {room}"
            for room, cell in found
        )
        beside.append(f"learnt with {title} {', '.join(shown)}")
    return [
        *lines,
        "",
        f"Merged against as many of the newest: {'; '.join(beside)}.",
        "",
        f"Nats per token, and in brackets how many more than with all memories (95 % over texts); tokens "
        f"{given['first']} to {given['tokens']} of {given['documents']} stretches of the test split. "
        f"{given['memories_per_chunk']} memories for {given['chunk_length']} tokens, windows of "
        f"{given['window_length']}. The second model learnt with room for {given['trained_room']}, merged.",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging", description="Measure what merging old memories costs."
    )
    parser.add_argument("--run", default="runs/merging", help="run of the recipe (default: runs/merging)")
    parser.add_argument("--documents", type=int, default=128, help="stretches of the test split (default: 128)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each (default: 256, as in training)")
    parser.add_argument("--first", type=int, default=144, help="first token that counts (default: 144)")
    parser.add_argument("--rooms", type=int, nargs="+", default=list(ROOMS), help="memories that there is room for")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", help="where the record goes (default: benchmarks/results/merging.json)")
    options = parser.parse_args(arguments)
    run = REPOSITORY / options.run
    if not (run / "record.json").is_file():
        print(
            f"error: there is no finished run in {options.run}; run `python -m training.run merging`", file=sys.stderr
        )
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    trained = read_json(run / "record.json")
    (text,) = trained["recipe"]["data"]["test"]
    tokenizer = AutoTokenizer.from_pretrained(run / "hub")
    documents = cut_documents(tokenizer, text, options.documents, options.tokens)
    command = " ".join(["python", "-m", "benchmarks.merging", *map(portable_path, arguments)])
    record = describe_run("merging", command, {"training": trained["recipe"]["seed"]})
    record["metrics"] = {}
    for stage in STAGES:
        model = MemoryEncoderDecoderForCausalLM.from_pretrained(run / "stages" / stage / "model").eval()
        if model.config.max_memories is not None:
            trained_room = model.config.max_memories
        record["metrics"][stage] = measure_policies(model, documents, options.rooms, options.first)
        for name, found in record["metrics"][stage].items():
            print(f"{stage}, {name}: {found['loss']:.4f} ({found['more']:+.4f})", flush=True)
    config = model.config
    record["given"] = {
        "documents": options.documents,
        "tokens": options.tokens,
        "first": options.first,
        "rooms": options.rooms,
        "trained_room": trained_room,
        "most_memories": (options.tokens - 1) // config.window_length * config.memories_per_window,
        **{name: getattr(config, name) for name in ("chunk_length", "window_length", "memories_per_chunk")},
    }
    record["training"] = {
        "commit": trained["code"]["commit"],
        "stages": {
            name: {key: done[key] for key in ("steps", "text_tokens", "seconds") if key in done}
            for name, done in trained["stages"].items()
        },
    }
    print(f"record: {portable_path(save_record(record, 'merging', options.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
