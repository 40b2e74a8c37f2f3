"""Pages in a real browser: Debian's chromium, without a window and without a network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium to look at the pages in it"),
]
THEMES = ("dark", "light")
WIDTHS = (390, 1280)
_DRIVER = """<!DOCTYPE html><title>nothing</title>
<body><script>
const found = {};
const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const look = async (frame, page, window) => { LOOK };
const widths = [WIDTHS];
const next = () => {
  const width = widths.shift();
  if (width === undefined) { document.title = JSON.stringify(found); return; }
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 900px`;
  frame.onload = async () => {
    try {
      found[width] = await look(frame, frame.contentDocument, frame.contentWindow);
    } catch (error) {
      found[width] = { error: String(error) };
    }
    next();
  };
  frame.src = "PAGE";
  document.body.append(frame);
};
next();
</script></body>
"""


def looked_at(page: Path, script: str, theme: str, profile: Path) -> tuple[dict[str, dict], str]:
    """
    What a script finds in a page.

    Args:
        page: its file.
        script: the body of an asynchronous function of `frame, page, window` that returns what JSON can say.
        theme: of the system.
        profile: an empty folder for the browser.

    Returns:
        What it found, by the width of the window, and what the browser logged.
    """
    driver = page.with_name(f"look-at-{page.name}")
    widths = ", ".join(map(str, WIDTHS))
    driver.write_text(_DRIVER.replace("LOOK", script).replace("WIDTHS", widths).replace("PAGE", page.name))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    command += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", "--timeout=60000"]
    command += ["--virtual-time-budget=20000"]
    ran = subprocess.run([*command, "--dump-dom", driver.as_uri()], capture_output=True, timeout=240)
    title = re.search(r"<title>(.*?)</title>", ran.stdout.decode(), flags=re.DOTALL)
    return json.loads(html.unescape(title[1])), ran.stderr.decode()


def complaints(log: str) -> list[str]:
    """Lines in which a browser logs an error of a page."""
    return [line for line in log.splitlines() if re.search(r"CONSOLE|Refused|Uncaught", line)]
