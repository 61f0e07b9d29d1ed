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
_PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>")
_EQUALS, _MINUS = "<mo>&#x0003D;</mo>", "&#x02212;"


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace the formulas of a page."""

    def mathml(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        block = match["tag"] == "div"
        # The converter makes something of half a formula too.
        if tex.count("{") != tex.count("}"):
            raise PluginError(f"{page.file.src_uri}: {tex}: unbalanced braces")
        try:
            formula = convert(tex, display="block" if block else "inline")
        except Exception as error:  # the converter has no common base for its errors
            raise PluginError(f"{page.file.src_uri}: {tex}: {type(error).__name__} {error}") from error
        # A command that the converter does not know goes into the formula as it is.
        if unknown := re.search(r">(\\\w+|&)<", formula):
            raise PluginError(f"{page.file.src_uri}: {tex}: cannot render {unknown[1]}")
        # A minus after the equals sign is a sign, not a difference.
        formula = formula.replace(f"{_EQUALS}<mo>{_MINUS}", f'{_EQUALS}<mo form="prefix">{_MINUS}')
        # Fonts have the prime raised already: as a superscript it would float.
        formula = _PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', formula)
        # Names of functions come as operators, which browsers put space around.
        formula = re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", formula)
        return f'<div class="formula">{formula}</div>' if block else formula

    return _FORMULA.sub(mathml, content)
