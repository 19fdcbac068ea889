"""A record as a run writes it, in small."""

from typing import Any

RECORD: dict[str, Any] = {
    "run": {"recipe_name": "tiny", "command": "python -m training.run tiny.yaml", "status": "success"},
    "code": {"commit": "abc", "dirty": False, "versions": {"torch": "2"}},
    "hardware": {"device": "cpu", "cpu": "some CPU", "threads": 2, "processes": 1},
    "inputs": {"files": {"train": {"train.parquet": "3d0c"}, "test": {"test.parquet": "27b2"}}},
    "recipe": {
        "data": {"train": ["training/corpora/books/train.parquet"]},
        "evaluation": {"autoencoder": "autoencoder", "no_memory": "no_memory", "full_context": None},
        "stages": [
            {"name": "autoencoder", "from": {}, "warm_start": {"tables_from": None}},
            {"name": "decoder", "from": {}, "warm_start": {"tables_from": "autoencoder"}},
            {
                "name": "copy",
                "from": {"encoder": "autoencoder", "decoder": "decoder"},
                "warm_start": {"tables_from": None},
            },
            {"name": "no_memory", "from": {"model": "decoder"}, "warm_start": {"tables_from": None}},
        ],
    },
    "published_stage": "copy",
    "stages": {
        name: {
            "objectives": {objective: 1.0},
            "parameters": {"trainable": 10, "total": 20},
            "steps": 1000,
            "text_tokens": 64000,
            "seconds": seconds,
            "peak_memory_bytes": {"process": 2**30, "largest_child": 0},
            "series": [{"loss": 9.0}, {"eval_loss": 3.5, f"eval_{objective}_loss": 3.5, "step": 10}],
        }
        for name, objective, seconds in (
            ("autoencoder", "reconstruction", 12.3),
            ("decoder", "causal", 45.6),
            ("copy", "copy", 7.8),
            ("no_memory", "causal", 9.1),
        )
    },
    "sample": {
        "text": "the cat",
        "num_tokens": 2,
        "num_memories": 1,
        "memory_width": 8,
        "num_right": 1,
        "memories": [{"norm": 1.5, "first": [0.1]}],
        "tokens": [["the", True], [" dog", False]],
    },
    "metrics": {
        "autoencoder": {"memory": {"token_accuracy": 0.9876, "loss": 0.05, "num_tokens": 100}},
        "blank_copy": {
            "memory": {
                "token_accuracy": 0.9512,
                "token_accuracy_interval": [0.94, 0.96],
                "loss": 0.1234,
                "num_tokens": 16384,
            },
            "no_memory": {"token_accuracy": 0.0312, "loss": 6.5},
            "note": "text",
        },
        "clm": {
            "memory": {"loss": 3.0, "bits_per_byte": 1.5},
            "no_memory_model": {"token_accuracy": 0.25, "loss": 3.2},
            "share_of_gap_recovered": 0.4,
        },
        "speed": 3,
    },
}
