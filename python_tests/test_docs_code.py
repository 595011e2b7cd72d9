"""Every ```python block of README.md and docs/ runs, page by page, in one namespace a page.

What a block takes for granted (a model, a loader) stands in the page, in a comment that readers do
not see; so does the reason where a block cannot run here:

    <!-- setup          <!-- not run: needs a GPU -->
    model = ...
    -->

`<!-- needs: lightning -->` before a block skips it, and the rest of the page goes on, where that
package does not import.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from singd_ext import registry

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^<!-- not run: (?P<reason>[^\n]+) -->$"
    r"|^<!-- needs: (?P<needs>[\w., ]+) -->$"
    r"|^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Blocks that are not run, by page: a new one is added here on purpose.
NOT_RUN: dict[str, int] = {}


@dataclass
class Block:
    """Code of a page, with what the comment before it says."""

    line: int
    code: str
    reason: str = ""
    needs: tuple[str, ...] = ()


def blocks(page: Path) -> list[Block]:
    text, found, reason, needs = page.read_text(), [], "", ()
    for piece in PIECE.finditer(text):
        if piece["reason"]:
            reason = piece["reason"]
        elif piece["needs"]:
            needs = tuple(re.split(r"[, ]+", piece["needs"]))
        else:
            group = "code" if piece["code"] is not None else "setup"
            line = text.count("\n", 0, piece.start(group))
            found.append(Block(line, piece[group], reason, needs))
            reason, needs = "", ()
    return found


def available(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))  # pages register their own
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page):
        if not block.reason and all(map(available, block.needs)):
            code = compile("\n" * block.line + block.code, str(page), "exec")  # lines of the page
            exec(code, namespace)


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        code = [b for b in blocks(page) if not b.reason]
        opened = len(re.findall(r"^\s*```py", page.read_text(), re.MULTILINE))
        setups = len(re.findall(r"^<!-- setup$", page.read_text(), re.MULTILINE))
        left_out = len(blocks(page)) - len(code)
        assert len(blocks(page)) == opened + setups, page.name
        assert left_out == NOT_RUN.get(page.name, 0), page.name
