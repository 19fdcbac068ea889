"""Scores by lm-evaluation-harness, with contexts that are read through memories (`pip install modeling-memory[eval]`).

```bash
python -m modeling_memory.harness --model modeling-memory --model_args pretrained=FOLDER,mode=memory,clear=128 \
    --tasks xquad --metadata data=FOLDER_OF_FILES --limit 200
```

The command line is the harness's own, with the model and the tasks of this package added.
"""
