"""What a run made, handed on: to the hub, to llama.cpp, to whoever asks it."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_calls import invoke
from faulting.s3 import uri
from rich.console import Console
from typer.testing import CliRunner

from emloc_ray.data.row_formats import converted
from emloc_ray.io.formats.checkpoint import INDEX_NAME
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.ui.chat import Pair, talk
from emloc_ray.ui.cli import app

RELEASED = Path(__file__).parents[2] / "compat" / "0.1.0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A finished run, and its model beside it."""
    shutil.copytree(RELEASED, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    written = Path("run", "adapter", "adapter_config.json")
    written.write_text(json.dumps({**json.loads(written.read_text()), "base_model_name_or_path": "/home/me/model"}))
    return RunDirectory("run")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload takes: https://huggingface.co/docs/hub/api."""

    made: dict[str, Any]
    files: dict[str, bytes]
    deleted: list[str]
    public: bool

    def do_POST(self) -> None:
        here = f"http://{self.headers['Host']}"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.made.update(json.loads(body))
            answer: dict[str, Any] = {"url": f"{here}/me/mine"}
        elif "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    self.deleted.append(line["value"]["path"])
            answer = {"commitUrl": f"{here}/me/mine/commit/abc", "commitOid": "abc", "success": True}
        else:
            answer = {}
        self._answer(answer)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            return self._answer([{"type": "file", "path": path, "size": 1, "oid": "a"} for path in self.files])
        self._answer({"id": "me/mine", "sha": "abc", "siblings": [], "private": not self.public})

    def _answer(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.made, Hub.files, Hub.deleted, Hub.public = {}, {}, [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "a" * 8)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("part", ["adapter", "merged"])
def test_a_result_is_pushed_with_its_card(run: RunDirectory, hub: type[Hub], part: str) -> None:
    own = {path.name for path in run.path(part).iterdir() if path.name != ".inputs"}
    run.path(part, ".inputs").touch()  # its stage's own
    done = invoke("push", "run", "me/mine", "--part", part, "--private")
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"Pushing {part}/ (" in done.stdout
    assert f"{part}/ is at http://127.0.0.1:" in done.stdout
    assert hub.made["visibility"] == "private"
    assert hub.files.keys() == {"README.md", *own}
    assert hub.files["README.md"].startswith(b"---\n")
    assert b'"me/mine")' in hub.files["README.md"]  # how to load it
    weights = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
    assert hub.files[weights] == run.path(part, weights).read_bytes()
    assert b"/home/me" not in b"".join(hub.files.values())


def test_weights_that_would_be_loaded_in_place_of_a_merged_model_are_deleted(run: RunDirectory, hub: type[Hub]) -> None:
    shards = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"]
    kept = ["a.gguf", "notes.md", "old/model.safetensors", "training_args.bin", ".gitattributes", "model.py"]
    hub.files.update(dict.fromkeys([*shards, *others, *kept, "model.safetensors"], b""))
    adapter = invoke("push", "run", "me/mine")
    assert (adapter.exit_code, hub.deleted) == (0, []), (adapter.output, adapter.exception)
    merged = invoke("push", "run", "me/mine", "--part", "merged")
    assert merged.exit_code == 0, (merged.output, merged.exception)
    assert sorted(hub.deleted) == sorted([*shards, *others])
    assert f"to me/mine, and deleting {', '.join(shards)} and 3 more there" in merged.stdout


@pytest.fixture
def stored(s3_port: int, node_cache: Path, request: pytest.FixtureRequest, run: RunDirectory) -> RunDirectory:
    """The adapter of that run on an object store."""
    found = RunDirectory(uri(s3_port, f"verbs/{request.node.name}/run"))
    found.create(run.manifest()["config"])
    for file in run.path("adapter").iterdir():
        copy_file(file, found.path("adapter", file.name))
    found.commit("correct", "of nothing", [found.path("adapter")], {})
    found.write_metrics(run.metrics())
    return found


def test_a_result_on_an_object_store_comes_with_its_card(stored: RunDirectory, hub: type[Hub]) -> None:
    pushed = invoke("push", stored.place, "me/mine")
    assert pushed.exit_code == 0, (pushed.output, pushed.exception)
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b"PeftModel.from_pretrained" in hub.files["README.md"]
    missing = invoke("push", stored.place, "me/mine", "--part", "merged")
    assert "has no merged/: run it up to there, emloc-ray merge CONFIG." in missing.stderr
    fetched = invoke("fetch", stored.place, "home", "--part", "adapter")
    assert fetched.exit_code == 0, (fetched.output, fetched.exception)
    card = Path("home", "adapter", "README.md").read_text().partition("\n<!--")[0]
    assert card.replace('".")  # in this folder', '"me/mine")').encode() == hub.files["README.md"]
    asked = CliRunner().invoke(app, ["chat", stored.place, "--max-new-tokens", "2"], input=b"add 1\xff: \n\n")
    assert asked.exit_code == 0, (asked.output, asked.exception)
    assert "fine-tuned" in asked.stdout


def test_what_is_to_be_private_is_not_pushed_to_what_is_public(run: RunDirectory, hub: type[Hub]) -> None:
    """The hub leaves a repository that is there as it is, whatever is asked for."""
    hub.public = True
    refused = invoke("push", "run", "me/mine", "--private")
    assert refused.exit_code == 2
    assert "me/mine is there already, and public: name another, or leave --private out." in refused.stderr
    assert not hub.files
    assert invoke("push", "run", "mine").exit_code == 0  # an own repository needs no owner


def test_what_cannot_be_pushed_is_told(run: RunDirectory, hub: type[Hub]) -> None:
    bad = invoke("push", "run", "a name/that/is none")
    assert bad.exit_code == 2
    assert "is no name of the hub" in bad.stderr
    run.forget("merge")
    for verb in (["push", "run", "me/mine", "--part", "merged"], ["gguf", "run"]):
        assert "has no merged/: run it up to there, emloc-ray merge CONFIG." in invoke(*verb).stderr
    assert not hub.files


def test_a_hub_that_is_not_reached_is_told(run: RunDirectory, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # where nothing listens in a moment
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    done = invoke("push", "run", "me/mine")
    assert done.exit_code == 1, done.exception
    assert "me/mine cannot be pushed to (" in done.stderr
    assert "): see that the hub can be reached." in done.stderr


CONVERTER = """
import pathlib, sys
if "q8_0" in sys.argv: sys.exit("this model is not known.")
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(" ".join(sys.argv[1:]))
"""


def test_llama_cpps_converter_writes_gguf(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    missing = invoke("gguf", "run")
    assert missing.exit_code == 2
    assert "llama.cpp's convert_hf_to_gguf.py is not installed: clone" in missing.stderr
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    done = invoke("gguf", "run")
    assert done.exit_code == 0, (done.output, done.exception)
    written = run.path("run-merged-bf16.gguf")
    begun = run.path(".run-merged-bf16.part.gguf")
    assert written.read_text() == f"{run.path('merged')} --outfile {begun} --outtype bf16"
    assert "is there already" in invoke("gguf", "run").stderr
    assert invoke("gguf", "run", "--part", "adapter", "--output", "a.gguf").exit_code == 0
    assert Path("a.gguf").read_text().endswith(f"--base {Path.cwd()}/model")
    failed = invoke("gguf", "run", "--outtype", "q8_0")
    assert failed.exit_code == 1
    assert "(this model is not known): see what it takes" in failed.stderr
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER + "sys.exit('the disk is full.')\n")
    assert "(the disk is full): see what it takes" in invoke("gguf", "run", "--outtype", "f16").stderr
    assert [file.name for file in run.root.glob("*.gguf")] == [written.name]  # nothing half written
    absent = invoke("gguf", "run", "--output", "no/folder/a.gguf")
    assert (absent.exit_code, "is no folder: make it" in absent.stderr) == (2, True)


def test_the_original_is_found_where_the_run_found_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convert_lora_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    home = Path.cwd()
    run.write_metrics({**run.metrics(), "base_model": str(home / "model")})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    written = ["gguf", str(home / "run"), "--part", "adapter", "--output"]
    done = invoke(*written, "a.gguf")
    assert done.exit_code == 0, (done.output, done.exception)
    assert Path("a.gguf").read_text().endswith(f"--base {home}/model")
    (home / "model").rename("model")  # moved to where the config says
    assert invoke(*written, "b.gguf").exit_code == 0
    assert Path("b.gguf").read_text().endswith(f"--base {Path.cwd()}/model")
    Path("model").rename("other")
    lost = invoke("chat", str(home / "run"))
    assert lost.exit_code == 2
    assert f"model.source {home}/model is no model directory" in lost.stderr


def test_gguf_of_a_run_on_an_object_store_is_written_here(
    stored: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convert_lora_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    done = invoke("gguf", stored.place, "--part", "adapter")
    assert done.exit_code == 0, (done.output, done.exception)
    words = Path("run-adapter-bf16.gguf").read_text().split()
    assert Path(words[0]).name == "adapter"
    assert words[-2:] == ["--base", f"{Path.cwd()}/model"]


def test_code_that_came_with_a_run_is_not_run_unasked(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by chat, whatever the run's own config says, nor by llama.cpp's converter, which trusts some kinds of models."""
    # A class of its own: transformers marks a class that comes as code, and saves that code with every tokenizer of it.
    code = 'import transformers\nopen("mark", "w")\nclass Theirs(transformers.PreTrainedTokenizerFast): pass\n'
    manifest = run.manifest()
    manifest["config"]["model"]["trust_remote_code"] = True
    run.path("manifest.json").write_text(json.dumps(manifest))
    for folder in (Path("model"), run.path("merged")):
        (folder / "theirs.py").write_text(code)
        named = json.loads((folder / "tokenizer_config.json").read_text())
        named["auto_map"] = {"AutoTokenizer": [None, "theirs.Theirs"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    asked = invoke("chat", "run")
    assert asked.exit_code == 2
    assert "was made with code that came with its model" in asked.stderr
    assert not Path("mark").exists()
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "convert_lora_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    for part, file in (("merged", run.path("merged")), ("adapter", Path("model").absolute())):
        refused = invoke("gguf", "run", "--part", part)
        assert refused.exit_code == 2
        assert f"{file}/tokenizer_config.json names code that came with the model (theirs.Theirs)" in refused.stderr
        assert invoke("gguf", "run", "--part", part, "--trust-remote-code").exit_code == 0
    CliRunner().invoke(app, ["chat", "run", "--trust-remote-code"], input="\n")
    assert Path("mark").exists()


def test_a_run_s_files_name_none_outside(
    run: RunDirectory, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may be anybody's: neither an index nor a link in it leads to other files of this machine."""
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    verbs = {"chat": ["chat", "run"], "push": ["push", "run", "me/mine"], "gguf": ["gguf", "run"]}
    shutil.copytree("model", run.path("model"))
    for folder in (run.path("model"), run.path("merged")):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / INDEX_NAME).write_text('{"weight_map": {"lm_head.weight": "../outside.safetensors"}}')
    for verb in (
        verbs["chat"],
        [*verbs["push"], "--part", "merged"],
        verbs["gguf"],
        [*verbs["gguf"], "--part", "adapter"],
    ):
        refused = invoke(*verb)
        assert refused.exit_code == 2, (verb, refused.output, refused.exception)
        assert "as a file of weights, which leads out of its folder" in refused.stderr
    run.path("adapter", "key.txt").symlink_to("/etc/hostname")
    refused = invoke(*verbs["push"])
    assert refused.exit_code == 2
    assert "key.txt is a link, which may lead to any file of this machine" in refused.stderr
    run.path("adapter").rename("elsewhere")
    run.path("adapter").symlink_to(Path("elsewhere").absolute())
    assert "adapter is a link, which may lead to any file of this machine" in invoke(*verbs["push"]).stderr
    assert not hub.made


@pytest.mark.parametrize("plain", [True, False])
def test_both_models_are_asked_the_same(run: RunDirectory, plain: bool) -> None:
    pair = Pair.of(run, run.root, max_new_tokens=4)
    assert pair.plain  # as the run's rows are prompts and completions
    pair.plain = plain
    said = iter(["add 1 and 1: ", "/new", "add 1: ", ""])
    console = Console(record=True, width=100)
    talk(console, pair, lambda prompt: next(said))
    text = console.export_text()
    assert text.count("original") == text.count("fine-tuned") == 2
    heard = [turn["role"] for turn in pair.turns["original"]]
    assert heard == ([] if plain else ["user", "assistant"])
    with pytest.raises(StopIteration):
        talk(console, pair, lambda prompt: next(said))


def test_a_processor_s_template_is_asked_with_parts_as_in_training(run: RunDirectory) -> None:
    """LLaVA's leaves out every word of a content that is a text."""
    pair = Pair.of(run, run.root, max_new_tokens=1)
    parts = "{% for part in m['content'] if part is mapping %}{{ part['text'] }}{% endfor %}"
    template = "{% for m in messages %}USER: " + parts + "{% endfor %}"
    pair.plain, pair.processor = False, copy.deepcopy(pair.tokenizer)
    pair.processor.chat_template = template
    asked: list[str] = []
    decode = pair.tokenizer.decode
    asks = pair.model.get_base_model()  # as the adapter's wrapper does in the end
    generate = asks.generate
    asks.generate = lambda **given: asked.append(decode(given["input_ids"][0])) or generate(**given)
    pair.answers("add 1 and 2")
    assert asked == ["USER: add 1 and 2"] * 2


@pytest.mark.parametrize("verb", [["chat"], ["push", "me/mine"], ["gguf"]])
def test_a_batch_has_no_result_of_its_own(tmp_path: Path, verb: list[str]) -> None:
    batch = RunDirectory(tmp_path / "batch")
    batch.root.mkdir()
    batch.path("manifest.json").write_text(json.dumps({"kind": "batch", "format": 2, "stages": {}, "config": {}}))
    refused = invoke(verb[0], str(batch.root), *verb[1:])
    assert refused.exit_code == 2
    assert (
        f"{batch.root} is a batch: name the directory of one of its tasks, below {batch.root}/tasks." in refused.stderr
    )


@pytest.mark.parametrize(("formats", "plain"), [(["prompt_completion"], True), (["messages", "text"], False)])
def test_prompts_are_wrapped_as_the_rows_that_auto_took_were(
    run: RunDirectory, formats: list[str], plain: bool
) -> None:
    manifest = run.manifest()
    manifest["config"]["data"]["format"] = "auto"
    manifest["stages"]["data"]["result"]["formats"] = formats
    run.path("manifest.json").write_text(json.dumps(manifest))
    assert Pair.of(run, run.root).plain is plain


@pytest.mark.parametrize(("format", "plain"), [("alpaca", False), ("alpaca", True), ("prompt_completion", False)])
def test_without_a_chat_template_a_model_of_alpaca_s_rows_is_asked_as_it_was_trained(
    run: RunDirectory, format: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model", "chat_template.jinja").unlink()
    manifest = run.manifest()
    manifest["stages"]["data"]["result"]["formats"] = [format]
    run.path("manifest.json").write_text(json.dumps(manifest))
    pair = Pair.of(run, run.root, plain)
    asked: list[str] = []

    def generate(input_ids: Any, **options: Any) -> Any:
        asked.append(pair.tokenizer.decode(input_ids[0]))
        return input_ids

    monkeypatch.setattr(pair.model.get_base_model(), "generate", generate)
    pair.answers("add 1 and 1: ")
    row = {"instruction": "add 1 and 1: ", "output": "2"}
    trained = converted(row, "alpaca", {}, "row 1", chats=False)[0]["prompt"]
    assert asked == [trained if format == "alpaca" and not plain else "add 1 and 1: "] * 2


def test_the_adapter_makes_a_difference_in_one_of_them(run: RunDirectory) -> None:
    pair = Pair.of(run, run.root, plain=True, max_new_tokens=8)
    answers = pair.answers("add 3 and 3: ")
    assert set(answers) == {"original", "fine-tuned"}
    assert answers["original"] != answers["fine-tuned"]


def test_a_config_without_a_run_dir_names_no_run(tmp_path: Path) -> None:
    for text in ("model: x\n", "run_dir:\n"):
        (tmp_path / "my.yaml").write_text(text)
        shown = invoke("status", str(tmp_path / "my.yaml"))
        assert (shown.exit_code, shown.stderr) == (2, f"Error: {tmp_path}/my.yaml: run_dir is missing: set it.\n")
