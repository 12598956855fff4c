"""The page of msrl demo without a browser: what it makes, its limits, and what a request can't reach."""

import asyncio
import gzip
import importlib.util
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
import torch
from demo_server import running_demo
from tiny import tiny_pipeline

from msrl_diffusers.app.comparison import MAX_SEED, Comparison
from msrl_diffusers.app.gate import MAX_BODY, Gate
from msrl_diffusers.cli import demo as demo_verb
from msrl_diffusers.cli import generate as generate_verb
from msrl_diffusers.errors import InputError


needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed; it comes with the extra `demo`"
)


@pytest.fixture(scope="module")
def comparison():
    return Comparison({"standard": tiny_pipeline(), "RL-tuned": tiny_pipeline(seed=1)})


def array_of(content: bytes) -> np.ndarray:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content)).get_fdata()


# --- volumes -----------------------------------------------------------------------------------------------------------


def test_both_volumes_come_from_the_same_noise(comparison):
    standard, tuned = comparison.generate("LGG", 2, seed=7)
    assert (standard.title, tuned.title) == ("standard", "RL-tuned")
    assert (standard.file_name, tuned.file_name) == ("LGG-7-standard.nii.gz", "LGG-7-RL-tuned.nii.gz")
    assert np.abs(array_of(standard.content) - array_of(tuned.content)).max() > 0.01  # other weights
    same = Comparison({"a": tiny_pipeline(), "b": tiny_pipeline()}).generate("LGG", 2, seed=7)
    assert same[0].content == same[1].content == standard.content


def test_it_is_the_volume_of_msrl_generate(comparison, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--class_label", "LGG", "--seed", "7", "--num_inference_steps", "2", "--guidance_scale", "1.5"]
    generate_verb.run(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *options])
    made = comparison.generate("LGG", 2, guidance_scale=1.5, seed=7)[0]
    assert np.allclose(
        array_of(made.content), nib.load(tmp_path / "out" / "LGG-7-00000.nii.gz").get_fdata(), atol=1e-5
    )


def test_progress_is_told(comparison):
    told = []
    comparison.generate("HGG", 2, on_step=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_pages_send_whole_numbers_as_floats(comparison):
    assert comparison.generate("HGG", 2.0, 1, 1, 3.0) == comparison.generate("HGG", 2, 1.0, 1.0, 3)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("class_name", ["MS", "../../etc/passwd", 0, None, ["HGG"]], r"class must be one of \['HGG', 'LGG'\]\."),
        (
            "num_inference_steps",
            [0, -1, 101, 10**400, 2.5, "2", True, None, float("nan"), float("inf")],
            r"steps must be a whole number in 1 \.\. 100\.",
        ),
        (
            "seed",
            [-1, MAX_SEED + 1, 0.5, "0", False, None, float("inf")],
            rf"seed must be a whole number in 0 \.\. {MAX_SEED}\.",
        ),
        (
            "guidance_scale",
            [-0.1, 10.1, float("nan"), float("inf"), 10**400, "1", True, None],
            r"guidance must be a number in 0\.1 \.\. 10\.",
        ),
        ("eta", [-0.1, 1.1, float("nan"), "1", None], r"eta must be a number in 0 \.\. 1\."),
    ],
)
def test_every_value_has_limits(comparison, field, values, message):
    for value in values:
        given = {"class_name": "HGG", "num_inference_steps": 1, field: value}
        with pytest.raises(InputError, match=message):
            comparison.generate(**given)


def test_a_scheduler_of_few_steps_lowers_the_limit():
    pipeline = tiny_pipeline()
    pipeline.scheduler.register_to_config(num_train_timesteps=10)
    assert Comparison({"standard": pipeline}).max_steps == 10


def test_pipelines_that_differ_in_more_than_weights_are_refused():
    other = tiny_pipeline()
    other.register_to_config(id2label={0: "AD", 1: "CN"})
    with pytest.raises(InputError, match=r"unequal id2label, .*'HGG'.* and .*'AD'.*; give a pipeline and its tuned"):
        Comparison({"standard": tiny_pipeline(), "RL-tuned": other})
    other = tiny_pipeline()
    other.register_to_config(spacing=[1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="unequal spacing"):
        Comparison({"standard": tiny_pipeline(), "RL-tuned": other})


def test_nan_is_refused():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        Comparison({"standard": pipeline}).generate("HGG", 1)


# --- the gate ----------------------------------------------------------------------------------------------------------

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/config", 200),
        ("GET", "/assets/index-a1.js", 200),
        ("GET", "/static/js/frame.min.js", 200),
        ("GET", "/gradio_api/queue/data", 200),
        ("POST", "/gradio_api/queue/join", 200),
        ("POST", "/gradio_api/call/generate", 200),
        ("GET", f"/gradio_api/file=/tmp/page/{DIGEST}/HGG-0-standard.nii.gz", 200),
        ("HEAD", f"/gradio_api/file=/tmp/page/{DIGEST}/HGG-0-standard.nii.gz", 200),
        ("GET", "/gradio_api/file=/etc/passwd", 404),
        ("GET", f"/gradio_api/file=/tmp/page/{DIGEST}/../../../etc/passwd", 404),
        ("GET", f"/gradio_api/file=/tmp/page/{DIGEST}/../x.nii.gz", 404),
        ("GET", f"/gradio_api/file=/tmp/page/{DIGEST}/.x.nii.gz", 404),
        ("GET", f"/gradio_api/file=/tmp/page/{DIGEST}/HGG-0-standard.nii.gz\n", 404),
        ("GET", f"/gradio_api/file=/tmp/pages/{DIGEST}/HGG-0-standard.nii.gz", 404),
        ("GET", f"/gradio_api/file=/tmp/other/{DIGEST}/HGG-0-standard.nii.gz", 404),
        ("GET", "/gradio_api/file=http://127.0.0.1/", 404),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/", 404),
        ("GET", "/gradio_api/file/etc/passwd", 404),
        ("GET", "/assets/../../../etc/passwd", 404),
        ("GET", "/assets/%2e%2e/x", 404),
        ("GET", "/assets//etc/passwd", 404),
        ("GET", "/static/.env", 404),
        ("GET", "/monitoring", 404),
        ("POST", "/gradio_api/upload", 404),
        ("POST", "/gradio_api/component_server", 404),
        ("POST", "/gradio_api/run/generate", 404),
        ("POST", "/login", 404),
        ("PUT", "/gradio_api/queue/join", 404),
        ("DELETE", "/", 404),
    ],
)
def test_the_gate(method, path, status):
    gate = Gate(None, "/tmp/page")
    assert (
        gate.status({"type": "http", "method": method, "path": path, "headers": [(b"content-length", b"2")]}) == status
    )


def test_the_gate_knows_paths_of_windows():
    folder = "C:\\Users\\x\\page"
    path = f"/gradio_api/file={folder}\\{DIGEST}\\HGG-0-standard.nii.gz"
    assert Gate(None, folder).status({"type": "http", "method": "GET", "path": path, "headers": []}) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 411),
        ([(b"content-length", b"-1")], 411),
        ([(b"content-length", b"many")], 411),
        ([(b"content-length", b"5"), (b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", str(MAX_BODY).encode())], 200),
        ([(b"content-length", str(MAX_BODY + 1).encode())], 413),
    ],
)
def test_bodies_have_a_limit(headers, status):
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers}
    assert Gate(None, "/tmp/page").status(scope) == status


def test_the_gate_answers_and_passes_on():
    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    async def send(message):
        sent.append(message)

    gate = Gate(app, "/tmp/page")
    for scope in (
        {"type": "lifespan"},
        {"type": "http", "method": "GET", "path": "/", "headers": []},
        {"type": "http", "method": "GET", "path": "/etc", "headers": []},
        {"type": "websocket", "path": "/"},
    ):
        asyncio.run(gate(scope, None, send))
    assert passed == ["lifespan", "http"]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body", "websocket.close"]
    assert sent[0]["status"] == 404


# --- the verb ----------------------------------------------------------------------------------------------------------


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("server", "page", "viewer"):
        monkeypatch.delitem(sys.modules, f"msrl_diffusers.app.{name}", raising=False)
    with pytest.raises(
        InputError,
        match=r"msrl demo needs gradio; pip install -e '\.\[demo\]' in the clone of the repository brings it\.",
    ):
        demo_verb.run(["--standard", "nowhere"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--standard", "a", "--port", "0"], r"port must lie in 1 \.\. 65535, got 0"),
        (["--standard", "a", "--rl", "b", "--lora", "c"], "Give --rl or --lora, not both"),
        (["--standard", "a", "--dtype", "int8"], "dtype must be one of"),
        (["--standart", "a"], r"There is no option --standart; did you mean --standard\?"),
        ([], "There is no outputs/demo/pipeline_standard nor model_cards/phantoms-32 here; name a pipeline"),
    ],
)
def test_a_bad_command_line_is_one_sentence(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        demo_verb.run(options)


def test_what_a_checkout_has_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("model_cards/phantoms-32", "outputs/demo/pipeline_standard", "outputs/demo/pipeline_rl"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model_index.json").write_text("{}")
        taken = demo_verb.DemoArguments()
    assert (taken.standard, taken.rl) == ("outputs/demo/pipeline_standard", "outputs/demo/pipeline_rl")
    assert demo_verb.DemoArguments(lora="adapter").rl is None
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    taken = demo_verb.DemoArguments()
    assert (taken.standard, taken.rl) == ("model_cards/phantoms-32", None)


# --- the server, in a process of its own, as a user starts it -----------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running_demo(tmp_path_factory.mktemp("served")) as demo:
        yield demo


@needs_gradio
def test_the_function_answers_with_nifti_files(served, comparison):
    event, (shown,) = served.generate("HGG", 2, 1.0, 1.0, 5)
    assert event == "complete"
    made = comparison.generate("HGG", 2, seed=5)
    assert [volume["title"] for volume in shown["volumes"]] == ["standard", "RL-tuned"]
    for volume, expected in zip(shown["volumes"], made, strict=True):
        assert volume["file"]["orig_name"] == expected.file_name
        status, content = served.ask("GET", urlsplit(volume["file"]["url"]).path)
        assert status == 200
        assert np.allclose(array_of(content), array_of(expected.content), atol=1e-5)


@needs_gradio
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("MS", 2, 1.0, 1.0, 0), "MS"),
        (("../../etc/passwd", 2, 1.0, 1.0, 0), "etc"),
        (("HGG", 10**6, 1.0, 1.0, 0), "100"),
        (("HGG", 0, 1.0, 1.0, 0), "1"),
        (("HGG", 2.5, 1.0, 1.0, 0), "steps must be a whole number in 1 .. 100."),
        (("HGG", 2, 1e9, 1.0, 0), "10"),
        (("HGG", 2, 1.0, -1.0, 0), "0"),
        (("HGG", 2, 1.0, 1.0, -1), "0"),
        (("HGG", 2, 1.0, 1.0, 2**40), str(MAX_SEED)),
        (("HGG", "many", 1.0, 1.0, 0), ""),
        (("HGG", None, 1.0, 1.0, 0), ""),
        (("HGG",), ""),
    ],
)
def test_the_server_refuses_what_is_out_of_its_limits(served, values, message):
    before = served.files()
    event, data = served.generate(*values)
    assert event == "error"
    assert message in str(data)
    assert served.files() == before


@needs_gradio
def test_no_path_of_a_request_reaches_a_file(served, tmp_path):
    (tmp_path / "secret.nii.gz").write_bytes(b"secret")
    _, (shown,) = served.generate("HGG", 1, 1.0, 1.0, 1)
    path = urlsplit(shown["volumes"][0]["file"]["url"]).path
    made = Path(path.removeprefix("/gradio_api/file="))
    assert made in served.files()
    assert {file.suffixes[-2] for file in served.files()} == {".nii"}  # nothing else is written
    assert served.ask("GET", path)[0] == 200
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={tmp_path / 'secret.nii.gz'}",
        f"/gradio_api/file={made.parent}/../../../../../../../..{tmp_path}/secret.nii.gz",
        f"/gradio_api/file={made.parent}/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=setup.py",
        "/gradio_api/file=http://127.0.0.1:1/x.nii.gz",
        "/static/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
    ):
        assert served.ask("GET", path) == (404, b""), path
    before = served.files()
    assert served.ask("POST", "/gradio_api/upload", b"x") == (404, b"")
    assert served.ask("POST", "/gradio_api/queue/join", b"x" * (MAX_BODY + 1)) == (413, b"")
    named = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    assert served.generate("HGG", 1, 1.0, 1.0, named)[0] == "error"
    assert served.files() == before


@needs_gradio
def test_the_page_is_whole_and_calls_nobody(served):
    status, content = served.ask("GET", "/")
    assert status == 200
    assert b"fonts.googleapis" not in content
    assert b"Not for clinical use." in content
    config = json.loads(served.ask("GET", "/config")[1])
    assert config["analytics_enabled"] is False
    assert config["app_id"]


@needs_gradio
def test_a_taken_port_is_one_sentence(served, comparison):
    from msrl_diffusers.app.server import serving

    port = int(served.address.split(":")[1])
    with pytest.raises(InputError, match=rf"127\.0\.0\.1, port {port}: Address already in use; give another"):
        with serving(comparison, "127.0.0.1", port):
            pass


@needs_gradio
def test_importing_the_page_writes_nothing_beside_it():
    import msrl_diffusers.app.viewer  # Gradio writes a stub file for every class that is a component

    assert not list(Path(msrl_diffusers.app.viewer.__file__).parent.glob("*.pyi"))
