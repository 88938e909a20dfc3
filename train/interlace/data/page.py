"""One HTML page that needs nothing but itself: a template, the data it draws, and what all our pages have in common."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image

_STYLE, _SCRIPT = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")
_LARGEST_PNG = 32_768  # bytes


def filled(template: Path, data: Any) -> str:
    """The page with `data` (plain values, as for JSON) inside: ASCII in one JSON block, whatever it is.

    The template has `__SHARED_STYLE__`, `__SCRIPT_HASH__` (in its Content-Security-Policy), `__DATA__`, and `__SHARED_SCRIPT__` in its last script.
    """
    page = template.read_text(encoding="utf-8")
    for mark, file in (("__SHARED_STYLE__", _STYLE), ("__SHARED_SCRIPT__", _SCRIPT)):
        page = page.replace(mark, file.read_text(encoding="utf-8").rstrip())
    before, _, after = page.partition("__DATA__")
    script = after.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # only the page's own script may run and nothing may be fetched; `<` could end the block that the data stands in
    return before.replace("__SCRIPT_HASH__", f"sha256-{digest}") + json.dumps(data, separators=(",", ":")).replace("<", "\\u003c") + after


def data_uri(image: PIL.Image.Image) -> str:
    """An image as a `data:` address: exact, as PNG, while that is small, else as JPEG of high quality."""
    kind, file = "png", io.BytesIO()
    image.save(file, kind, optimize=True)
    if file.tell() > _LARGEST_PNG:
        kind, file = "jpeg", io.BytesIO()
        image.save(file, kind, quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
