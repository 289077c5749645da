"""The chat page and its Content-Security-Policy: nothing runs but what is in the file."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def load() -> tuple[bytes, str]:
    """(the page, its policy: the one script and the one style sheet by their hashes)."""
    text = PAGE.read_text(encoding="utf-8")
    hashed = {
        kind: base64.b64encode(hashlib.sha256(_inside(tag, text).encode()).digest()).decode()
        for kind, tag in (("script", "script"), ("style", "style"))
    }
    policy = [
        "default-src 'none'",
        f"script-src 'sha256-{hashed['script']}'",
        f"style-src 'sha256-{hashed['style']}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return text.encode(), "; ".join(policy)


def _inside(tag: str, text: str) -> str:
    (found,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    return found
