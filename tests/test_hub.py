"""Recipes on the Hugging Face Hub, spoken to over HTTP: a server on this machine that knows the routes needed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from visionfuse import Neighborhood, Recipe, Schedule
from visionfuse.recipe import Phase, Variant

ROOT = Path(__file__).resolve().parents[1]
RECIPE = Recipe(
    name="shared",
    variants=(Variant(name="half", plan=Neighborhood(density=0.5)),),
    schedule=Schedule(phases=(Phase(until=0.25, variant="stock"), Phase(variant="half"))),
    note="ä test",
)


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: {name: {"sha": commit, "files": {path: bytes}, "private": bool}}."""

    repos: ClassVar[dict[str, dict]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, values, code: int = 200) -> None:
        self.answer(code, json.dumps(values).encode(), Content_Type="application/json")

    def do_POST(self):
        self.asked.append(f"POST {self.path}")
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            values = json.loads(self.body())
            name = "/".join(filter(None, [values.get("organization"), values["name"]]))
            if name in self.repos:
                self.answer_json({"url": f"{host}/{name}", "error": "exists"}, 409)
                return
            private = bool(values.get("private") or values.get("visibility") == "private")
            self.repos[name] = {"sha": "0" * 40, "files": {}, "private": private}
            self.answer_json({"url": f"{host}/{name}", "name": name})
            return
        if self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
            return
        name, action = self.path.removeprefix("/api/models/").split("/", 2)[:2], self.path
        repo = self.repos["/".join(name)]
        if "/preupload/" in action:
            files = json.loads(self.body())["files"]
            plain = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer_json({"files": plain})
        elif "/commit/" in action:
            lines = [json.loads(line) for line in self.body().splitlines()]
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    repo["files"][line["value"]["path"]] = content
            repo["sha"] = hashlib.sha1(json.dumps(lines).encode()).hexdigest()
            url = f"{host}/{'/'.join(name)}/commit/{repo['sha']}"
            self.answer_json({"success": True, "commitOid": repo["sha"], "commitUrl": url})
        else:
            self.answer_json({"error": "unknown route"}, 404)

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.answer_about("/".join(parts[2:4]), parts[4:5])
            return
        repo = self.repos.get("/".join(parts[:2]))
        if repo is None or parts[2:3] != ["resolve"]:
            self.answer(404, b"", X_Error_Code="RepoNotFound")
            return
        content = repo["files"].get("/".join(parts[4:]))
        if content is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=repo["sha"])
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, X_Repo_Commit=repo["sha"], ETag=etag)

    def answer_about(self, name: str, what: list[str]) -> None:
        repo = self.repos.get(name)
        if repo is None:
            self.answer(404, b"", X_Error_Code="RepoNotFound")
        elif what == ["tree"]:
            entry = {"type": "file", "oid": "0" * 40}
            self.answer_json(
                [entry | {"path": p, "size": len(c)} for p, c in repo["files"].items()]
            )
        else:
            files = [{"rfilename": path} for path in repo["files"]]
            self.answer_json({"id": name, "modelId": name, "sha": repo["sha"], "siblings": files,
                              "private": repo["private"], "tags": [], "downloads": 0})  # fmt: skip

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub():
    Hub.repos, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# The last huggingface_hub for Python 3.10 has cards checked by the Hub itself, whatever HF_ENDPOINT says: in a test
# the Hub is the server here.
FIRST = """
import huggingface_hub, os
if huggingface_hub.__version__ < "2":
    import httpx
    def stay(request):
        if request.url.host == "huggingface.co":
            request.url = httpx.URL(os.environ["HF_ENDPOINT"]).join(request.url.path)
    huggingface_hub.set_client_factory(lambda: httpx.Client(event_hooks={"request": [stay]}, follow_redirects=True))
"""


def talk(hub: str, home: Path, code: str) -> str:
    """Run code in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = kept | {
        "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_TOKEN": "hf_" + "x" * 20, "no_proxy": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FIRST + code], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_push_load_and_what_is_missing(hub, tmp_path):
    RECIPE.save(tmp_path / "mine.json")
    code = f"""
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from visionfuse import Recipe

recipe = Recipe.load({str(tmp_path / "mine.json")!r})
print(recipe.push_to_hub("someone/fast-flux", private=True, commit_message="as measured"))
print(recipe.push_to_hub("someone/fast-flux", filename="video/recipe.json"))
assert recipe == Recipe.from_pretrained("someone/fast-flux")
assert recipe == Recipe.from_pretrained("someone/fast-flux", subfolder="video")
assert recipe == Recipe.from_pretrained("someone/fast-flux", local_files_only=True)
for name, filename, expected in (
    ("someone/fast-flux", "other.json", EntryNotFoundError),
    ("someone/missing", "recipe.json", RepositoryNotFoundError),
):
    try:
        Recipe.from_pretrained(name, filename=filename)
    except expected as error:
        print(type(error).__name__)
"""
    *urls, entry, repository = talk(hub, tmp_path / "home", code).split()
    assert "Entry" in entry
    assert "Repository" in repository
    assert len(urls) == 2
    assert all(url.startswith(f"{hub}/someone/fast-flux/commit/") for url in urls)
    repo = Hub.repos["someone/fast-flux"]
    assert repo["private"] is True
    assert sorted(repo["files"]) == ["recipe.json", "video/recipe.json"]
    assert Recipe.from_dict(json.loads(repo["files"]["recipe.json"])) == RECIPE
    assert any(line.startswith("HEAD /someone/fast-flux/resolve/main/") for line in Hub.asked)


def test_cards_push_and_load(hub, tmp_path):
    RECIPE.save(tmp_path / "mine.json")
    code = f"""
from huggingface_hub import ModelCard
from visionfuse import Recipe
from visionfuse.cards import card

recipe = Recipe.load({str(tmp_path / "mine.json")!r})
recipe.push_to_hub("someone/with-card")
made = card(recipe, base_model="someone/model", license="mit", figures="| PSNR | 42 dB |")
made.push_to_hub("someone/with-card")
read = ModelCard.load("someone/with-card")
assert read.content == made.content
assert (read.data["library_name"], read.data.base_model, read.data.license) == ("visionfuse", "someone/model", "mit")
assert Recipe.from_pretrained("someone/with-card") == recipe
"""
    talk(hub, tmp_path / "home", code)
    assert set(Hub.repos["someone/with-card"]["files"]) == {"recipe.json", "README.md"}
    text = Hub.repos["someone/with-card"]["files"]["README.md"].decode()
    for words in ("# shared", "ä test", "half", "Recipe.from_pretrained", "42 dB"):
        assert words in text


@pytest.mark.slow
def test_the_app_takes_models_of_the_hub(hub, tmp_path):
    """By name: what kind they are is read at start, and what is loaded are safetensors alone."""
    for name in ("flux-micro", "kat-micro"):
        folder = ROOT / "assets" / name
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        Hub.repos[f"someone/{name}"] = {"sha": "1" * 40, "files": files, "private": False}
    Hub.repos["someone/flux-micro"]["files"]["transformer/pytorch_model.bin"] = b"never read"
    code = """
from visionfuse.demos import Settings
from visionfuse.demos.classify import read_classifier
from visionfuse.demos.jobs import read_pipeline

settings = Settings.of(["someone/flux-micro", "someone/kat-micro"])
assert settings.models == {
    "image": {"flux-micro": "someone/flux-micro"}, "classifier": {"kat-micro": "someone/kat-micro"}}
pipe = read_pipeline(settings.path("image", "flux-micro"))
pipe.enable_visionfuse("gna", density=0.5)
print(type(pipe).__name__, type(read_classifier(settings.path("classifier", "kat-micro"))).__name__)
"""
    pytest.importorskip("gradio", reason="the app needs Gradio: pip install visionfuse[demo]")
    assert talk(hub, tmp_path / "home", code).split()[0] == "FluxPipeline"
    assert not any("pytorch_model.bin" in line for line in Hub.asked)


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("assets/*/README.md")), ids=lambda p: p.parent.name
)
def test_shipped_models_have_cards(page):
    from huggingface_hub import ModelCard

    data = ModelCard.load(page).data
    assert data.license == "mit"
    assert data["library_name"] in ("diffusers", "timm")
    assert data.pipeline_tag


def test_a_folder_is_as_good(tmp_path):
    (tmp_path / "inner").mkdir()
    RECIPE.save(tmp_path / "recipe.json")
    RECIPE.save(tmp_path / "inner" / "other.json")
    assert Recipe.from_pretrained(tmp_path) == RECIPE
    assert Recipe.from_pretrained(tmp_path, subfolder="inner", filename="other.json") == RECIPE
    with pytest.raises(OSError, match=r"recipe\.json"):
        Recipe.from_pretrained(tmp_path / "inner")
