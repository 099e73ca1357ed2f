"""The app over HTTP: what a client gets, what it may not have, and what the server says and where it listens."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

gradio_client = pytest.importorskip(
    "gradio_client", reason="the app needs Gradio: pip install visionfuse[demo]"
)
pytest.importorskip("gradio")

from visionfuse.demos import Settings, build, launch, recipes  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large red circle on a white background"
SMALL = {"side": 128, "steps": 3}
RECIPE = recipes.written("gna", density=0.3, dense_start=0)


@pytest.fixture(scope="module")
def server():
    settings = Settings.of(max_upload=100_000)
    limit = Image.MAX_IMAGE_PIXELS
    app = build(settings)
    yield launch(app, settings, prevent_thread_lock=True).rstrip("/")
    app.close(verbose=False)
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture
def client(server, tmp_path):
    return gradio_client.Client(
        server, download_files=tmp_path, verbose=False, analytics_enabled=False
    )


def compare(client, recipe=RECIPE, **changed):
    values = {
        "prompt": PROMPT,
        "seed": 0,
        "recipe": recipe,
        "label": "flux-micro",
        **SMALL,
    } | changed
    return client.predict(*(values[name] for name in ("label", "prompt", "side", "steps", "seed", "recipe")),
                          api_name="/image_compare")  # fmt: skip


# -- what a client gets -------------------------------------------------------------------------------


def test_compare(client):
    pictures, apart, said, figures, report = compare(client)
    stock, fused = (Image.open(path) for path in pictures)
    assert stock.size == fused.size == (128, 128)
    assert stock.tobytes() != fused.tobytes()
    assert Image.open(apart).getextrema() != ((0, 0),) * 3
    assert re.search(r"visionfuse took [\d.]+ s, the model alone [\d.]+ s", said)
    assert "In 3 of 3 steps" in said
    assert "PSNR" in figures
    assert "8 of 8 layers follow the plan" in report


def test_an_exact_recipe_changes_nothing(client):
    pictures, _, said, figures, _ = compare(client, recipes.written("auto", precision="model"))
    stock, fused = (Image.open(path).tobytes() for path in pictures)
    assert stock == fused
    assert "equal, bit by bit" in said
    assert "infinite" in figures


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_of_the_list_runs_or_says_why_not(client, name):
    text = client.predict(name, 0.4, "auto", 0.0, "model", "int8", api_name="/image_recipe")
    try:
        said = compare(client, text)[2]
    except gradio_client.exceptions.AppError as error:
        said = str(error)
    assert "visionfuse took" in said or name not in ("auto", "dense", "gna", "sage")
    assert "went wrong on the server" not in said


def test_the_form_writes_the_recipe_that_runs(client):
    text = client.predict("gna", 0.2, "8", 0.5, "int8", "int8", api_name="/image_recipe")
    made = recipes.parsed(text, at_most=10_000)
    assert (made.plan.density, made.plan.stride, made.schedule.dense_start) == (0.2, 8, 0.5)
    assert str(made.precision) == "int8"


def test_explore(client):
    said, token, blocks, times = client.predict(
        "16x16", "8x8", "4x4", "1", "auto", 32, 0, 3, 15, api_name="/explore"
    )
    assert "Token (3, 15) of (16, 16) sees 64 of 256" in said
    assert "H200" in times
    assert Image.open(token).width > 100
    assert Image.open(blocks).width > 100


def test_classify(client, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), (220, 40, 40)).save(file)
    stock, fused, said = client.predict(
        "kat-micro",
        gradio_client.handle_file(file),
        "sage: every pair, 8 bits",
        api_name="/classify",
    )
    assert stock["label"] == fused["label"]
    assert "ms" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"recipe": "{"}, "no JSON"),
        ({"recipe": '{"version": 99}'}, "99"),
        ({"prompt": "x" * 5000}, "500"),
        ({"prompt": ""}, "characters"),
        ({"seed": -5}, "."),
        ({"side": 100_000}, "."),
        ({"steps": 100_000}, "."),
        ({"side": 130}, "multiple"),
        ({"label": "../../secret"}, "."),
        ({"recipe": recipes.written("gna", density=0.3).replace('"density": 0.3', '"density": null, "window": 99')
          .replace('"density": null, "window": null', '"window": 99')}, "."),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_wrong_is_said(client, changed, words):
    with pytest.raises(gradio_client.exceptions.AppError, match=r".") as error:
        compare(client, **changed)
    assert words in str(error.value)
    for hidden in ("Traceback", str(ROOT), "site-packages"):
        assert hidden not in str(error.value)


def test_two_visitors_at_once(server, tmp_path):
    """Both get their own picture, and nothing of the other's recipe stays on the model."""
    found: dict[str, tuple] = {}

    def visit(name, recipe, prompt):
        client = gradio_client.Client(
            server, download_files=tmp_path / name, verbose=False, analytics_enabled=False
        )
        found[name] = compare(client, recipe, prompt=prompt)

    exact = recipes.written("auto", precision="model")
    threads = [
        threading.Thread(target=visit, args=("a", RECIPE, PROMPT)),
        threading.Thread(target=visit, args=("b", exact, "a small blue square on a black background")),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    (a, b), (c, d) = (found[name][0] for name in "ab")
    assert Image.open(a).tobytes() != Image.open(b).tobytes()
    assert Image.open(c).tobytes() == Image.open(d).tobytes()
    assert Image.open(a).tobytes() != Image.open(c).tobytes()


def test_cancel_ends_the_run(client):
    job = client.submit("flux-micro", PROMPT, 512, 30, 0, RECIPE, api_name="/image_compare")
    limit = time.monotonic() + 60
    while not (job.status().progress_data or []) and time.monotonic() < limit:
        time.sleep(0.05)
    start = time.monotonic()
    assert "Cancelled" in client.predict(api_name="/image_cancel")
    with pytest.raises(Exception, match="ancel"):
        job.result(timeout=60)
    assert time.monotonic() - start < 20  # a whole run takes minutes
    assert "Nothing was running" in client.predict(api_name="/image_cancel")
    compare(client)  # and the model is as good as before


# -- what it may not have -----------------------------------------------------------------------------


def status_of(url: str, data: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_this_machine_alone(server):
    assert server.startswith("http://127.0.0.1:")
    assert _listening(os.getpid()) <= {"0100007F"}  # 127.0.0.1; as Linux writes it


def test_a_login_keeps_others_out():
    """As app.md says it: launch(app, settings, auth=...)."""
    settings, limit = Settings(), Image.MAX_IMAGE_PIXELS
    app = build(settings)
    address = launch(app, settings, prevent_thread_lock=True, auth=("name", "password")).rstrip("/")
    try:
        assert status_of(f"{address}/config") == 401
        assert status_of(f"{address}/login", b"username=name&password=guessed") == 400
        assert status_of(f"{address}/login", b"username=name&password=password") == 200
    finally:
        app.close(verbose=False)
        Image.MAX_IMAGE_PIXELS = limit


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "README.md",
        "pyproject.toml",
        "assets/flux-micro/model_index.json",
        str(ROOT / "assets" / "flux-micro" / "transformer" / "diffusion_pytorch_model.safetensors"),
        str(ROOT / "assets" / "kat-micro" / "config.json"),
        str(ROOT / "demos" / "app.py"),
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "file:///etc/passwd",
    ],
)
def test_no_file_of_the_server_is_served(server, path):
    assert status_of(f"{server}/gradio_api/file={path}") in (400, 403, 404)
    assert status_of(f"{server}/file={path}") in (400, 403, 404)


def test_no_file_of_the_server_is_read_for_a_visitor(server):
    """A client that names a path instead of uploading a file gets an error."""
    for path in (ROOT / "assets" / "images" / "demo.png", Path("/etc/passwd")):
        stolen = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        data = {"data": ["kat-micro", stolen, "sage: every pair, 8 bits"]}
        request = urllib.request.Request(
            f"{server}/gradio_api/call/classify",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{request.full_url}/{event}", timeout=20) as answer:
            assert answer.readline().strip() == b"event: error"


def test_uploads_are_small(server):
    def upload(size: int) -> int:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="r.json"\r\n\r\n'
            + b" " * size
        )
        return status_of(f"{server}/gradio_api/upload", body + b"\r\n--x--\r\n",
                         **{"Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip

    assert upload(1_000) == 200
    assert upload(200_000) in (400, 413)


def test_recipes_from_uploads(client, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(RECIPE)
    found = client.predict(gradio_client.handle_file(file), api_name="/image_upload")
    assert json.loads(found) == json.loads(RECIPE)
    file.write_text('{"version": 2, "plan": {"kind": "os.system"}}')
    with pytest.raises(gradio_client.exceptions.AppError, match=r"os\.system"):
        client.predict(gradio_client.handle_file(file), api_name="/image_upload")


# -- the command --------------------------------------------------------------------------------------

# Told to every Python that starts below: connections to other machines are written down, and refused.
WATCH = """
import os, socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["WATCH_FILE"], "a") as file:
            print(address, file=file)
        raise OSError("no network in this test")
    return _connect(self, address)
socket.socket.connect = connect
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_the_command_stays_on_this_machine_and_tells_no_secrets(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    port, log, asked = free_port(), tmp_path / "log", tmp_path / "asked"
    secret = "hf_" + "s3cr3t" * 5
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GRADIO_"))} | {
        "HF_TOKEN": secret, "PYTHONPATH": str(tmp_path), "WATCH_FILE": str(asked),
    }  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "visionfuse.cli", "demo", "--port", str(port)],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if f"Open {address}" in log.read_text():
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            if sys.platform == "linux":
                assert _listening(process.pid) == {"0100007F"}  # 127.0.0.1
            client = gradio_client.Client(
                address, download_files=tmp_path, verbose=False, analytics_enabled=False
            )
            compare(client)
            with pytest.raises(gradio_client.exceptions.AppError):
                compare(client, recipe="{")
            config = urllib.request.urlopen(f"{address}/config", timeout=20).read().decode()
        finally:
            process.terminate()
            process.wait(20)
    said = log.read_text()
    assert not asked.exists(), asked.read_text()
    assert secret not in said
    assert secret not in config
    assert str(ROOT) not in config
    assert PROMPT not in said  # what visitors ask for is theirs


def _listening(pid: int) -> set[str]:
    """The local addresses on which a process listens, as Linux writes them."""
    files = Path(f"/proc/{pid}/fd").iterdir()
    own = {os.readlink(link) for link in files if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in own:
                found.add(parts[1].split(":")[0])
    return found


# -- other models -------------------------------------------------------------------------------------


def pixart():
    from diffusers import AutoencoderKL, PixArtSigmaPipeline

    from visionfuse.testing_families import pixart
    from visionfuse.testing_pipelines import flux_components

    text, pipe = flux_components(), pixart().pipe
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    pipe.transformer.register_to_config(sample_size=32)  # its sizes are those near 256x256
    return PixArtSigmaPipeline(
        tokenizer=text["tokenizer_2"], text_encoder=text["text_encoder_2"], vae=vae.eval(),
        transformer=pipe.transformer, scheduler=pipe.scheduler,
    )  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A server with models that do not ship with the repository, and its settings."""
    from visionfuse.testing_pipelines import wan_pipeline

    folder = tmp_path_factory.mktemp("others")
    for name, pipe in (("pixart", pixart()), ("wan", wan_pipeline())):
        pipe.save_pretrained(folder / name)
    settings = Settings.of([str(folder / "pixart"), str(folder / "wan")], max_frames=9, queue=1)
    app = build(settings)
    yield launch(app, settings, prevent_thread_lock=True)
    app.close(verbose=False)


def visitor(address, folder):
    return gradio_client.Client(
        address, download_files=folder, verbose=False, analytics_enabled=False
    )


def test_any_model_that_draws(others, tmp_path):
    client = visitor(others, tmp_path)
    pictures, _, said, _, report = compare(client, label="pixart")
    stock, fused = (Image.open(path) for path in pictures)
    assert stock.size == fused.size == (128, 128)
    assert stock.tobytes() != fused.tobytes()
    assert "In 3 of 3 steps" in said
    assert "2 of 2 layers follow the plan" in report
    with pytest.raises(gradio_client.exceptions.AppError, match="Only FLUX"):
        compare(client, recipes.written("scale_dit"), label="pixart")


def test_a_full_queue_says_so(others, tmp_path):
    """One runs, one waits, and nobody else is kept waiting without an end."""
    asked = ["pixart", PROMPT, 128, 30, 0, RECIPE]
    jobs = [visitor(others, tmp_path).submit(*asked, api_name="/image_compare") for _ in range(6)]
    said = []
    for job in jobs:
        try:
            said.append(job.result(timeout=120)[2])
        except gradio_client.utils.QueueError as error:
            said.append(str(error))
    assert 1 <= sum("visionfuse took" in each for each in said) <= 3
    assert sum("Queue is full" in each for each in said) >= 3, said


# -- video --------------------------------------------------------------------------------------------


def test_video_tab_is_there_for_a_wan_model(others, tmp_path):
    client = visitor(others, tmp_path)
    recipe = recipes.written("gna", density=0.4, dense_start=0)
    values = ["wan", "a red cube", 64, 9, 3, 0, recipe]
    stock, fused, pictures, _, said, figures, report = client.predict(
        *values, api_name="/video_compare"
    )
    for film in (stock, fused):
        path = film["video"] if isinstance(film, dict) else film
        assert b"ftyp" in Path(path).read_bytes()[:16]
    assert Image.open(pictures[0]).size == (64, 64)
    assert "In 3 of 3 steps" in said
    assert "9 frames of 64x64" in figures
    assert "follow the plan" in report
    values[3] = 400
    with pytest.raises(gradio_client.exceptions.AppError):
        client.predict(*values, api_name="/video_compare")
