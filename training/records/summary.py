"""One page about a run, drawn from its record: `summary.html`, which needs no other file and no network."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from training.measure.suites import results_table
from training.records.sample import sample_lines

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td { text-align: right } td:first-child { text-align: left }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px } img { max-width: 100% }
"""
FIGURES = ("loss.png", "token_accuracy.png", "accuracy_by_position.png")


def write_summary(record: dict[str, Any], folder: Path) -> str:
    """Write the page of a run.

    Args:
        record (`dict`): Of `python -m training.run`.
        folder (`Path`): The run's folder, with `figures/`; the page goes there.

    Returns:
        `str`: The page's name.
    """
    run, code, hardware = record["run"], record["code"], record["hardware"]
    processes = hardware["processes"]
    parts = [
        f"<h1>{escape(run['recipe_name'])}</h1>",
        f"<p>{escape(run.get('description', ''))}</p>",
        f"<p><code>{escape(run['command'])}</code><br>{escape(run['created_at'])}, commit "
        f"{escape(str(code['commit'])[:12])}{' with changes' if code['dirty'] else ''}, {escape(hardware['device'])}, "
        f"{processes} process{'es' if processes != 1 else ''}</p>",
        "<h2>Measured on the test split</h2>",
        f"<pre>{escape(results_table(record['metrics']))}</pre>",
        "<h2>Stages</h2>",
        stages_table(record["stages"]),
    ]
    if record.get("sample") is not None:
        parts += ["<h2>From text to memories and back</h2>"]
        parts += [f"<pre>{escape(chr(10).join(sample_lines(record['sample'])))}</pre>"]
    for name in FIGURES:
        if (folder / "figures" / name).is_file():
            data = base64.b64encode((folder / "figures" / name).read_bytes()).decode()
            title = name.removesuffix(".png").replace("_", " ")
            parts += [f"<h2>{title.capitalize()}</h2>", f'<img alt="{title}" src="data:image/png;base64,{data}">']
    head = f'<meta charset="utf-8"><title>{escape(run["recipe_name"])}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
    (folder / "summary.html").write_text(page, encoding="utf-8")
    return "summary.html"


def stages_table(stages: dict[str, Any]) -> str:
    """Steps, time, speed, memory and last losses of each stage, and the last look at its memories, as HTML.

    >>> stage = {"steps": 9, "seconds": 61.0, "text_tokens_per_second": 5.0, "peak_memory_bytes": {"process": 2**30}}
    >>> "<td>9</td><td>1.0 min</td><td>5</td><td>1.0 GiB</td><td></td>" in stages_table({"copy": stage})
    True
    """
    heads = ("stage", "steps", "time", "tokens per second", "peak memory", "last values")
    rows = ["".join(f"<th>{head}</th>" for head in heads)]
    for name, stage in stages.items():
        cells = (
            escape(name),
            f"{stage['steps']:,}",
            f"{stage['seconds'] / 60:.1f} min",
            f"{stage['text_tokens_per_second']:,.0f}",
            f"{stage['peak_memory_bytes']['process'] / 2**30:.1f} GiB",
            "<br>".join(last_values(stage.get("series", []))),
        )
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def last_values(series: list[dict[str, Any]]) -> list[str]:
    """Say the last value of each objective's loss and accuracy, and of what was seen of the memories.

    >>> last_values([{"step": 1, "copy_loss": 3.0}, {"step": 2, "copy_loss": 2.0, "eval_loss": 1, "loss": 1}])
    ['copy loss 2']
    """
    left_out = ("eval_loss", "train_loss")
    watched = ("memory_norm_to_tokens", "memory_effective_rank", "memory_attention_share", "memory_column_share")
    last: dict[str, float] = {}
    for log in series:
        for key, value in log.items():
            if (key.endswith(("_loss", "_token_accuracy")) and key not in left_out) or key in watched:
                last[key] = value
    return [f"{key.replace('eval_', 'validation ').replace('_', ' ')} {value:.4g}" for key, value in last.items()]
