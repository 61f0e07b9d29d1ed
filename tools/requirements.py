"""Print lists of requirements in pyproject.toml, by name: ``requires`` to build, and the extras."""

import pathlib
import re
import sys

text = pathlib.Path(__file__).parent.with_name("pyproject.toml").read_text()
# Python 3.10 has no TOML parser; the lists hold plain strings only.
for name in sys.argv[1:]:
    body = re.search(rf"^{name} = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL).group(1)
    print("\n".join(re.findall(r'"([^"]+)"', body)))
