"""The page at /, in a real headless browser that is driven over its debugging port."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.model import PerformerLM

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
Command = Callable[..., Awaitable[Any]]


@asynccontextmanager
async def browsing(folder: Path, url: str) -> AsyncIterator[Command]:
    """Open a page, and give commands of the browser's debugging protocol."""
    flags = [*FLAGS, f"--user-data-dir={folder}", "--window-size=1100,760"]
    process = subprocess.Popen([str(CHROMIUM), *flags, url], stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        while not (port.exists() and port.read_text().count("\n")):
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            listed: list[Any] = []
            while not listed:
                async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
                    listed = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(listed[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                numbers = itertools.count(1)

                async def command(method: str, **options: Any) -> Any:
                    number = next(numbers)
                    await socket.send_json({"id": number, "method": method, "params": options})
                    while (told := await socket.receive_json()).get("id") != number:
                        pass
                    assert "error" not in told, told
                    return told["result"]

                yield command
    finally:
        process.terminate()
        process.wait()


async def evaluate(command: Command, script: str) -> Any:
    result = await command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


async def until(command: Command, script: str) -> None:
    end = time.monotonic() + 30
    while not await evaluate(command, script):
        assert time.monotonic() < end, script
        await asyncio.sleep(0.05)


async def use(command: Command, screenshot: Path, *, count: int) -> dict[str, Any]:
    """Fill in the page, let it stream `count` tokens, point at one, and return what it shows."""
    await until(command, "typeof at === 'function' && at('model').textContent === 'tiny'")
    values = {"prompt": "é <b>line</b> ", "max_tokens": "40", "seed": "3", "temperature": "1", "top_k": ""}
    await evaluate(
        command, "".join(f"at({json.dumps(name)}).value = {json.dumps(text)};" for name, text in values.items())
    )
    await evaluate(command, "at('go').click()")
    await until(command, f"!at('go').disabled && at('count').textContent === '{count}'")
    box = await evaluate(
        command,
        "(({left, top, width, height}) => [left + width / 2, top + height / 2])"
        "(document.querySelectorAll('.token')[4].getBoundingClientRect())",
    )
    await command("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    await until(command, "at('hint').style.display === 'block'")
    picture = await command("Page.captureScreenshot", format="png")
    screenshot.write_bytes(base64.b64decode(picture["data"]))
    shown = {name: await evaluate(command, f"at('{name}').textContent") for name in ("text", "hint", "rate", "state")}
    await evaluate(command, "at('top_p').value = '0'; at('go').click()")
    await until(command, "at('error').textContent !== ''")
    shown["error"] = await evaluate(command, "at('error').textContent")
    await evaluate(command, "at('top_p').value = ''; at('max_tokens').value = '1000'; at('go').click()")
    await until(command, "Number(at('count').textContent) > 2 && !at('halt').disabled")
    await evaluate(command, "at('halt').click()")
    await until(command, "!at('go').disabled")
    shown["after a stop"] = await evaluate(command, "at('error').textContent")
    return shown


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_streams_text_and_shows_probabilities(
    serve: Any, lively_model: Callable[..., PerformerLM], tmp_path: Path
) -> None:
    model = lively_model(vocab_size=257)
    screenshot = Path(os.environ.get("PERFORMER_LM_SCREENSHOT", tmp_path / "page.png"))
    prompt = "é <b>line</b> "
    [[row]] = complete(model, ByteTokenizer(), [prompt], max_new_tokens=40, sampler=Sampler(), seed=3)

    async def visit(url: str) -> dict[str, Any]:
        async with browsing(tmp_path / "profile", url) as command:
            return await use(command, screenshot, count=len(row.tokens))

    with serve(model) as served:
        shown = asyncio.run(visit(served.url))
    assert shown["text"] == prompt + row.text
    assert "%" in shown["hint"]
    assert float(shown["rate"]) > 0
    assert shown["state"].endswith("KiB")
    assert shown["error"] == "top_p must be above 0 and at most 1, got 0"
    assert shown["after a stop"] == ""
    assert screenshot.stat().st_size > 10_000
