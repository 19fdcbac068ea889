"""Make pages of a repository pages of a site: links that leave `docs/` lead to the repository."""

import posixpath
import re


def on_page_markdown(markdown, page, config, files):
    """Rewrite `](../FILE)` to the file's address in the repository."""

    def absolute(match):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[1]))
        return f"]({config['extra']['repository']}/blob/main/{path}"

    return re.sub(r"\]\((\.\./[^)#\s]*)", absolute, markdown)
