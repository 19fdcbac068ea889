"""Memory models behind a server or a page; nothing here goes into a published model's folder.

`engine` answers requests with contexts, `api` speaks OpenAI's protocol (extra `serve`), `page` is the page of the
browser (extra `app`), `asking` chooses memories of a store.
"""

from .engine import Engine, Limits, RefusedError, Writing

__all__ = ["Engine", "Limits", "RefusedError", "Writing"]
