"""Pictures inside the page, for code that runs while the site is built.

A page's hidden block gets it by `runpy.run_path("docs/_picture.py")["picture"]`. The image lies in
the page's HTML, since what runs there may not add files to the site.
"""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any


def picture(source: Any, alt: str, *, width: int | None = None) -> str:
    """HTML of an image.

    **Arguments:**

    - `source`: a matplotlib figure, a Pillow image, or the path of a PNG file.
    - `alt`: what it shows, for those who do not see it.
    - `width`: the width on the page, in CSS pixels; the image's own by default.
    """
    if isinstance(source, str | Path):
        png = Path(source).read_bytes()
    else:
        file = io.BytesIO()
        if hasattr(source, "savefig"):
            source.savefig(file, format="png", dpi=150, bbox_inches="tight")
        else:
            source.save(file, format="png")
        png = file.getvalue()
    size = f' width="{width}"' if width else ""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}"{size}>'
