"""What bench/tokenizer_js.mjs compares, on a page in headless Chromium; takes the same arguments.

python bench/tokenizer_page.py FOLDER TEXT.txt /tmp/peers/node_modules/@huggingface/tokenizers
"""

import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "publish"))

from browser import Browser  # noqa: E402

RUN = """(async () => {
  const { compare } = await import('/bench/tokenizer_js.mjs');
  const { Tokenizer } = await import('/peer/dist/tokenizers.mjs');
  const read = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
  return compare(Tokenizer, (name) => read(`/folder/${name}`), await read('/text.txt'));
})()"""


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map: ClassVar = {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        "": "text/html",
    }

    def log_message(self, format: str, *args: object) -> None:
        pass


def main(folder: str, text: str, peer: str) -> None:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        sys.exit("needs chromium or chromium-browser")
    with tempfile.TemporaryDirectory() as site:
        for path, source in {
            "bench": ROOT / "bench", "mvbert": ROOT / "mvbert", "peer": Path(peer).resolve(),
            "folder": Path(folder).resolve(), "text.txt": Path(text).resolve(),
        }.items():  # fmt: skip
            (Path(site) / path).symlink_to(source)
        (Path(site) / "index.html").write_text("<!doctype html><title>bench</title>")
        handler = functools.partial(Handler, directory=site)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Browser(program)
        try:
            browser.open(f"http://127.0.0.1:{server.server_port}/")
            browser.wait("document.title == 'bench'")
            version = browser.send("Browser.getVersion")["product"]
            print(json.dumps({"browser": version, **browser.evaluate(RUN)}))
        finally:
            browser.close()
            server.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4])
