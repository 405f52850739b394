"""What others wrote is shown, and steers no terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from cli_calls import Call, lines_of
from rich.table import Table
from rich.text import Text

from emloc_ray.ui import shell

COPIES = "\x1b]52;c;cm0gLXJmIH4=\x1b\\"  # a terminal puts it into the clipboard


@pytest.mark.usefixtures("no_ray")
def test_a_row_s_escapes_are_shown(call: Call) -> None:
    Path(call.values["data"]["train"]["path"]).write_text(lines_of([{"prompt": COPIES, "completion": "a"}] * 9))
    result = call("preview")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "␛·]·5·2" in result.output


def test_styles_and_lines_stay() -> None:
    screen = io.StringIO()
    console = type(shell.console)(file=screen, force_terminal=True, width=60, highlight=False)
    table = Table("name")
    table.add_row(Text(f"{COPIES}a"))
    console.print(f"[red]Error:[/] {COPIES}\tb\n", table)
    with console.status("at work"):
        pass
    shown = screen.getvalue()
    assert "\x1b[31mError:\x1b[0m ␛]52;c;cm0gLXJmIH4=␛" in shown
    assert "\x1b]" not in shown
    assert "\x1b[?25h" in shown  # the cursor, which a bar hides
