"""Print what .venv needs: the build requirements and the dev extra of pyproject.toml."""

import pathlib
import re

text = pathlib.Path(__file__).parent.with_name("pyproject.toml").read_text()
# Python 3.10 has no TOML parser; both lists hold plain strings only.
for name in ("requires", "dev"):
    body = re.search(rf"^{name} = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL).group(1)
    print("\n".join(re.findall(r'"([^"]+)"', body)))
