"""Texts that try to run a script, load an address or break out of their place when a page shows them unescaped.

Each would set `window.__fired`, open a dialog, or ask for an address at `payload.invalid`; no page of ours may do so.
"""

import json
import re
from html.parser import HTMLParser

JS = "window.__fired=1"
URL = "http://payload.invalid/x"

PAYLOADS = [
    # plain elements
    f"<script>{JS}</script>",
    f"<SCRIPT SRC={URL}.js></SCRIPT>",
    f"<scr<script>ipt>{JS}</scr</script>ipt>",
    f"<<script>{JS}//<</script>",
    f"<script\n>{JS}</script\t>",
    f"<img src=x onerror={JS}>",
    f"<img src='{URL}.png'>",
    f"<IMG SRC=\"x\" ONERROR=\"{JS}\">",
    f"<img/src/onerror={JS}>",
    f"<img src=x\nonerror\n=\n'{JS}'>",
    f"<image src=x onerror={JS}>",
    f"<svg onload={JS}>",
    f"<svg><script>{JS}</script></svg>",
    f"<svg><animate onbegin={JS} attributeName=x dur=1s>",
    f"<svg><style><img src=x onerror={JS}></style></svg>",
    f"<svg><use href='{URL}.svg#x'></use></svg>",
    f"<svg><a xlink:href='javascript:{JS}'><text y=9>x</text></a></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={JS}></style>",
    f"<math href='javascript:{JS}'>x</math>",
    f"<iframe srcdoc='<script>parent.{JS}</script>'></iframe>",
    f"<iframe src='javascript:parent.{JS}'></iframe>",
    f"<iframe src={URL}></iframe>",
    f"<object data='javascript:{JS}'></object>",
    f"<object data='data:text/html,<script>{JS}</script>'></object>",
    f"<embed src='{URL}.swf'>",
    f"<video src=x onerror={JS}></video>",
    f"<video><source onerror={JS}></video>",
    f"<audio src={URL}.mp3 autoplay></audio>",
    f"<body onload={JS}>",
    f"<details open ontoggle={JS}>x</details>",
    f"<input autofocus onfocus={JS}>",
    f"<select autofocus onfocus={JS}></select>",
    f"<textarea autofocus onfocus={JS}></textarea>",
    f"<marquee onstart={JS}>x</marquee>",
    f"<div style='animation:x 1s' onanimationstart={JS}>x</div>",
    f"<a href='javascript:{JS}' id=x onmouseover={JS}>x</a>",
    f"<form action='javascript:{JS}'><button>x</button></form>",
    f"<isindex type=image src=x onerror={JS}>",
    f"<x onclick={JS} onpointerenter={JS} tabindex=1 autofocus onfocus={JS}>x</x>",
    f"<template shadowrootmode=open><img src=x onerror={JS}></template>",
    # the page around
    f"<meta http-equiv=refresh content='0;url={URL}'>",
    f"<base href='{URL}'>",
    f"<link rel=stylesheet href='{URL}.css'>",
    f"<style>@import '{URL}.css';</style>",
    f"<style>*{{background:url({URL}.png)}}</style>",
    f"<div style=\"background-image:url('{URL}.png')\">x</div>",
    "<style>body{display:none!important}</style>",
    # out of an attribute, a comment, an element
    f"\"><img src=x onerror={JS}>",
    f"'><img src=x onerror={JS}>",
    f"\" onmouseover=\"{JS}\" autofocus onfocus=\"{JS}\" x=\"",
    f"' onmouseover='{JS}' autofocus onfocus='{JS}' x='",
    f"` onmouseover=`{JS}`",
    f"--><img src=x onerror={JS}><!--",
    f"]]><img src=x onerror={JS}>",
    f"</style><img src=x onerror={JS}>",
    f"</script><script>{JS}</script>",
    f"</textarea></title></noscript><img src=x onerror={JS}>",
    f"</pre></td></tr></table></div></details><img src=x onerror={JS}>",
    f"<noscript><p title=\"</noscript><img src=x onerror={JS}>\">",
    # what an entity becomes when it is decoded twice
    f"&lt;img src=x onerror={JS}&gt;",
    f"&#60;img src=x onerror={JS}&#62;",
    f"\\u003cimg src=x onerror={JS}\\u003e",
    f"%3Cimg%20src=x%20onerror={JS}%3E",
    f"+ADw-script+AD4-{JS}+ADw-/script+AD4-",
    f"\x00<img src=x onerror={JS}>",
    f"<img\x0bsrc=x\x0conerror={JS}>",
    f"<img src=x onerror=\u202e{JS}>",
    f"\ufeff<img src=x onerror={JS}>",
    # Markdown and formulas
    f"[x](javascript:{JS})",
    f"![x]({URL}.png)",
    f"<{URL}>",
    f"$\\href{{javascript:{JS}}}{{x}}$",
    f"$$\\unicode{{<img src=x onerror={JS}>}}$$",
    f"\\(\\require{{html}}\\style{{background:url({URL}.png)}}{{x}}\\)",
    f"$x<img src=x onerror={JS}>y$",
    # Jupyter's own
    "<button data-commandlinker-command='console:create' data-commandlinker-args='{}'>x</button>",
    f'{{"application/javascript": "{JS}", "text/html": "<img src=x onerror={JS}>"}}',
    f"\x1b]8;;javascript:{JS}\x1b\\x\x1b]8;;\x1b\\ \x1b[31mred\x1b[0m",
    # templates and code
    f"{{{{constructor.constructor('{JS}')()}}}}",
    f"${{{JS}}}",
    f"<%= {JS} %>",
    "__import__('os').abort()",
    "'; DROP TABLE rows; --",
    "%s%n{0}{x!r}",
    "\ud800<b>half</b>",
]


def rows(texts: list[str]) -> list[dict]:
    """Rows in which every field of a user carries a payload, and whose tokens can be shown."""
    out = []
    for i, text in enumerate(texts):
        call = {"id": "abcdefgh1", "type": "function", "function": {
            "name": "look", "arguments": json.dumps({text: text})}}
        tool = {"type": "function", "function": {"name": "look", "description": text, "parameters": {
            "type": "object", "title": text, "properties": {"x": {"type": "string", "description": text}}}}}
        out.append({"tools": [tool], "messages": [
            {"role": "system", "content": text}, {"role": "user", "content": text},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefgh1", "name": f"t{i}", "content": text},
            {"role": "assistant", "content": text}]})
    return out


def broken(texts: list[str]) -> list[dict]:
    """Rows each with a fault whose message quotes the payload."""
    user, ends = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tool = lambda **f: {"type": "function", "function": {"name": "f", "description": "", "parameters": {}} | f}
    calls = lambda **c: {"role": "assistant", "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": {
        "name": "f", "arguments": "{}"} | c.pop("function", {})} | c]}
    make = [
        lambda t: {"messages": [{"role": t, "content": t}, ends]},
        lambda t: {t: t, "conversations": [{"from": t, "value": t}]},
        lambda t: {"messages": [user, calls(id=t), {"role": "tool", "content": t, "tool_call_id": t}, ends]},
        lambda t: {"messages": [user, calls(function={"name": t, "arguments": t})]},
        lambda t: {"tools": [tool(name=t, description=t)], "messages": [user, ends]},
        lambda t: {"tools": [{"type": t, t: t}], "messages": [user, ends]},
        lambda t: {"messages": [{"role": "user", "content": [{"type": t, t: t}]}, ends]},
        lambda t: {"messages": [user, {**ends, "weight": t}]},
        lambda t: {"messages": {t: t}},
        lambda t: {"messages": [user, {"role": "assistant", t: t}]},
        lambda t: {"messages": [user, ends, {"role": "user", "content": t}]},
        lambda t: {"prompt": t, "completion": t, t: [t]},
    ]
    return [make[i % len(make)](text) for i, text in enumerate(texts)]


ELEMENTS = set("div style h3 p b i u s span br wbr code pre details summary table thead tbody tr th td".split())
ATTRIBUTES = {"class", "style", "title", "colspan", "open"}
STYLES = re.compile(r"(width|height|margin-top|padding|border-left|text-align|vertical-align|background-color|"
                    r"background|color|display|opacity|white-space|overflow-wrap|line-height):[-#%.(), \w]*")


class Checked(HTMLParser):
    """Collects what in a page is not one of our elements with one of our attributes."""

    def __init__(self):
        super().__init__()
        self.strange = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS: self.strange.append(tag)
        for name, value in attrs:
            styles = value.strip(";").split(";") if name == "style" else []
            bad = [s for s in styles if not STYLES.fullmatch(s.strip()) or "url" in s]
            if name not in ATTRIBUTES or bad: self.strange.append(f"{tag} {name}={value}")

    def handle_comment(self, data: str) -> None: self.strange.append(f"comment {data}")

    def handle_decl(self, decl: str) -> None: self.strange.append(f"declaration {decl}")

    def unknown_decl(self, data: str) -> None: self.strange.append(f"declaration {data}")

    def handle_pi(self, data: str) -> None: self.strange.append(f"instruction {data}")


def strange(page: str) -> list[str]:
    """What in a page of ours is not ours; a page without a payload that got through has nothing."""
    parser = Checked()
    parser.feed(page)
    parser.close()
    return parser.strange
