"""Tables of the memory store: what formats cost, how long it takes, which faults it survived."""

from typing import Any


def store_lines(record: dict[str, Any], link: str) -> list[str]:
    """A line for each number format: bytes a token, what copies and next tokens lose; then the speed."""
    formats, speed = record["metrics"]["formats"], record["metrics"]["speed"]
    goal = formats["target_loss_increase"]
    lines = [
        "| format | bytes per token | blank copy, tokens right | loss | costs | next tokens, loss | costs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dtype, found in formats["formats"].items():
        copy, causal = found["blank_copy"], found["causal"]
        costs = []
        for increase in (copy["loss_increase"], causal["loss_increase"]):
            cost = f"{max(increase, 0.0):.2%}"
            if dtype == "int8":
                cost = f"[{cost}]({link}) (at most {goal:.0%}{'' if increase < goal else ': missed'})"
            costs.append(cost)
        lines.append(
            f"| {dtype} | {found['bytes_per_token']:.1f} | {copy['token_accuracy']:.2%} | {copy['loss']:.4f} | "
            f"{costs[0]} | {causal['loss']:.4f} | {costs[1]} |"
        )
    ratio, given = speed["ratio"], speed["given"]
    missed = "" if ratio["median"] >= speed["target"] else ": missed"
    rates = speed["tokens_per_second"]
    encoded = formats["encoded"]
    return [
        *lines,
        "",
        f"{formats['tokens']:,} tokens of text in {formats['chunks']:,} chunks, one memory for "
        f"{record['given']['tokens_per_memory']} tokens, all files of the store counted, the text not kept (in clear "
        f"it takes {formats['text_bytes_per_token']:.1f} bytes per token). Not stored at all: blank copy "
        f"{encoded['blank_copy']['token_accuracy']:.2%}, loss {encoded['blank_copy']['loss']:.4f}; next tokens, loss "
        f"{encoded['causal']['loss']:.4f}. Remembering {given['texts']} texts of {given['tokens']:,} tokens in "
        f"batches of {given['batch_size']} chunks: {rates['fast']:,.0f} tokens per second, [{ratio['median']:.1f} "
        f"times]({link}) (at least {speed['target']:g}{missed}) the tokens of one chunk and one text after the other "
        "(quartiles "
        f"{ratio['first_quartile']:.1f} to {ratio['third_quartile']:.1f}, {record['repetitions']} rounds).",
    ]


def store_search_lines(record: dict[str, Any], link: str) -> list[str]:
    """A line for each thing that is done with a store at use time."""
    search = record["metrics"]["search"]
    lines = [f"| a store of {search['chunks']:,} chunks | median |", "|---|---:|"]
    for name, seconds in search["seconds"].items():
        lines.append(f"| {name} | {1000 * seconds['median']:.2f} ms |")
    return [*lines, "", f"Medians of [{record['repetitions']} rounds]({link}), timed in turn."]


def store_faults_lines(record: dict[str, Any], link: str) -> list[str]:
    """A line for each kind of fault: how often, what came of it, what was lost."""
    metrics = record["metrics"]
    lines = ["| fault | tried | came of it | texts lost |", "|---|---:|---|---:|"]
    for kind, changes in metrics["at_every_call"].items():
        for name, found in changes.items():
            came = f"{found['before']} as before, {found['after']} as after"
            lines.append(f"| {kind}, in {name} | {found['faults']} | {came} | 0 |")
    for kind, found in metrics["files"].items():
        came = f"{found['refused']:,} refused by name, {found['healed']:,} told and without effect"
        lines.append(f"| {kind}, any file | {found['faults']:,} | {came} | 0 |")
    kills = metrics["kills"]
    came = (
        f"{kills['acknowledged']} changes acknowledged, {kills['arrived']} of {kills['in_flight']} in flight arrived"
    )
    lines.append(f"| SIGKILL at random | {kills['faults']} | {came} | {kills['lost']} |")
    for name, found in metrics["writers"].items():
        came = f"{found['acknowledged']} texts acknowledged, {found['refused']} times told to try again"
        lines.append(f"| writers side by side, {name} | | {came} | {found['lost']} |")
    return [
        *lines,
        "",
        f"[{metrics['faults']:,} faults]({link}), [{metrics['texts_lost']} texts lost]({link}). Crashes and full "
        "disks strike at every system call of a change that touches a file, once each; crashes in a write differ from "
        "the others at writes only. Flips change every byte of every file, cuts end every file at every length; those "
        "of an index have no effect, because a second copy stands beside it. A loss would have ended the run.",
    ]
