"""A hook of mkdocs: formulas become MathML while the pages are built, so that readers fetch no script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex leaves in the page: \(...\) in the line, \[...\] by itself.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', flags=re.DOTALL
)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace the formulas of a page."""

    def mathml(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        block = match["tag"] == "div"
        try:
            formula = convert(tex, display="block" if block else "inline")
        except Exception as error:  # the converter has no common base for its errors
            raise PluginError(f"{page.file.src_uri}: {tex}: {type(error).__name__} {error}") from error
        # A command that the converter does not know goes into the formula as it is.
        if unknown := re.search(r">(\\\w+|&)<", formula):
            raise PluginError(f"{page.file.src_uri}: {tex}: cannot render {unknown[1]}")
        return f'<div class="formula">{formula}</div>' if block else formula

    return _FORMULA.sub(mathml, content)
