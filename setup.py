"""What pyproject.toml cannot say: on the index the README stands without its repository, so links become absolute."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = re.search(r'^Repository = "(.*)"', (HERE / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
README = re.sub(r"\]\((?!https?:|#)", f"]({REPOSITORY}/blob/main/", (HERE / "README.md").read_text("utf-8"))

setup(long_description=README, long_description_content_type="text/markdown")
