"""One page about a run, drawn from its record: `summary.html`, which needs no other file and no network."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from ..measure.suites import results_table
from .sample import sample_lines

FIGURES = ("loss.png", "token_accuracy.png", "accuracy_by_position.png")
# Autoescape: names and texts of a run may hold what looks like HTML.
PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run.recipe_name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td { text-align: right } td:first-child { text-align: left }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px } img { max-width: 100% }
</style></head><body>
<h1>{{ run.recipe_name }}</h1>
<p>{{ run.description or "" }}</p>
<p><code>{{ run.command }}</code><br>{{ run.created_at }}, commit {{ (code.commit ~ "")[:12] }}
{{- " with changes" if code.dirty }}, {{ hardware.device }}, {{ hardware.processes }}
process{{ "es" if hardware.processes != 1 }}</p>
<h2>Measured on the test split</h2>
<pre>{{ results }}</pre>
<h2>Stages</h2>
<table><tr>{% for head in ("stage", "steps", "time", "tokens per second", "peak memory", "last values") %}
<th>{{ head }}</th>{% endfor %}</tr>
{% for name, stage in stages.items() %}
<tr><td>{{ name }}</td><td>{{ "{:,}".format(stage.steps) }}</td><td>{{ "%.1f" % (stage.seconds / 60) }} min</td>
<td>{{ "{:,.0f}".format(stage.text_tokens_per_second) }}</td>
<td>{{ "%.1f" % (stage.peak_memory_bytes.process / 2**30) }} GiB</td>
<td>{% for value in last_values(stage.series or []) %}{{ value }}<br>{% endfor %}</td></tr>
{% endfor %}
</table>
{% if sample %}
<h2>From text to memories and back</h2>
<pre>{{ sample }}</pre>
{% endif %}
{% for title, data in figures %}
<h2>{{ title | capitalize }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
</body></html>
""")


def write_summary(record: dict[str, Any], folder: Path) -> str:
    """Write the page of a run.

    Args:
        record (`dict`): Of `python -m training.run`.
        folder (`Path`): The run's folder, with `figures/`; the page goes there.

    Returns:
        `str`: The page's name.
    """
    sample = record.get("sample")
    files = [folder / "figures" / name for name in FIGURES]
    page = PAGE.render(
        **{name: record[name] for name in ("run", "code", "hardware", "stages")},
        results=results_table(record["metrics"]),
        sample=None if sample is None else "\n".join(sample_lines(sample)),
        figures=[
            (file.stem.replace("_", " "), base64.b64encode(file.read_bytes()).decode())
            for file in files
            if file.is_file()
        ],
        last_values=last_values,
    )
    (folder / "summary.html").write_text(page, encoding="utf-8")
    return "summary.html"


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
