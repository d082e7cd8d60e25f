"""Models of a hub: however many workers of a machine start at once, the weights are fetched once."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from pairmill.weights import tiny_captioner_dir, tiny_clip_dir
from pairmill.weights_cache import file_sha256
from tests.hostile.loopback import LoopbackServer

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(LoopbackServer):
    """What huggingface_hub asks of a hub, for one repository. A GET of weights waits for all workers."""

    def __init__(self, folder: Path, all_here: Callable[[], bool]) -> None:
        super().__init__()
        self.files = {p.name: p for p in folder.iterdir() if p.is_file()}
        self.all_here = all_here
        self.gets: Counter[str] = Counter()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts[0] == "api" and "tree" in parts:
            return web.json_response([self._entry(name) for name in self.files])
        if parts[0] == "api":
            siblings = [{"rfilename": name} for name in self.files]
            return web.json_response({"id": "some/model", "sha": COMMIT, "siblings": siblings})
        name = parts[-1]
        if "resolve" not in parts or name not in self.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{file_sha256(str(self.files[name]))}"', "X-Repo-Commit": COMMIT}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(self.files[name].stat().st_size)})
        self.gets[name] += 1
        if name.endswith(".safetensors"):
            while not self.all_here():  # noqa: ASYNC110 - other processes come, without an event
                await asyncio.sleep(0.01)
        return web.Response(body=self.files[name].read_bytes(), headers=headers)

    def _entry(self, name: str) -> dict[str, object]:
        size = self.files[name].stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": COMMIT}


FETCHES = {
    "transformers": (
        "from pairmill.blip import checkpoint_folder as fetch\n"
        f"folder = fetch(ModelRef(name='some/model', revision='{COMMIT}'), 'models.captioner')"
    ),
    "open_clip": (
        "from pairmill.models import _fetch_repository as fetch\n"
        f"folder = fetch('some/model', ModelRef(name='hf-hub:some/model', revision='{COMMIT}'))"
    ),
}


@pytest.mark.parametrize(("kind", "folder"), [("transformers", tiny_captioner_dir()), ("open_clip", tiny_clip_dir())])
def test_weights_of_a_hub_are_fetched_once_a_machine(kind: str, folder: Path, tmp_path: Path):
    workers = 3
    here = tmp_path / "here"
    here.mkdir()
    code = f"""
import os
from pathlib import Path
from pairmill.models import ModelRef
from pairmill.weights_cache import folder_sha256
(Path({str(here)!r}) / str(os.getpid())).touch()
{FETCHES[kind]}
print(folder_sha256(str(folder)))
"""
    with HubServer(folder, lambda: len(list(here.iterdir())) == workers) as hub:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))},
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
            for _ in range(workers)
        ]
        told = [process.communicate(timeout=120)[0].strip() for process in running]
    weights = [name for name in hub.files if name.endswith(".safetensors")]
    assert len(set(told)) == 1 and len(told[0]) == 64, told
    assert [hub.gets[name] for name in weights] == [1], json.dumps(hub.gets)
