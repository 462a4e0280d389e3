"""Models that are missing, forbidden, incomplete or of another kind: one message each, at once."""

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from arabic_qwen.config import SFTConfig
from arabic_qwen.errors import ConfigurationError, ModelLoadError
from arabic_qwen.models import sources
from arabic_qwen.models.loading import load_model, load_tokenizer
from arabic_qwen.models.sources import EMBEDDED_MODEL, locate_model, resolve_model_name
from arabic_qwen.training.base_trainer import BaseTrainer

FLOAT32 = SFTConfig(torch_dtype="float32")


def message(name) -> str:
    with pytest.raises(ModelLoadError) as error:
        load_model(str(name), FLOAT32, trainable=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(model_dir, tmp_path):
    """A copy of a model, to be damaged."""
    return shutil.copytree(model_dir, tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestFolders:
    def test_missing(self, tmp_path):
        assert message(tmp_path / "none").startswith(f"{tmp_path}/none: the folder does not exist; give the folder")
        assert message("./none").startswith("./none: the folder does not exist")

    def test_a_file(self, folder):
        assert "is a file; give the folder" in message(folder / "model.safetensors")

    def test_below_home(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert locate_model("~/model") == str(folder)

    def test_no_configuration(self, folder):
        (folder / "config.json").unlink()
        assert message(folder) == (
            f"{folder}: has no config.json, so it is no model; give the folder with config.json and safetensors"
        )

    def test_unfinished_run(self, tmp_path):
        (tmp_path / "training_config.yaml").write_text("method: sft\n")
        assert message(tmp_path) == (
            f"{tmp_path}: holds a run that is not finished; run the same train command again first"
        )

    @pytest.mark.parametrize("text", ["{", "[]", "\x00\x01"])
    def test_damaged_configuration(self, folder, text):
        (folder / "config.json").write_text(text)
        assert message(folder).startswith(f"{folder}/config.json: ")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        assert message(folder).startswith(f"{folder}: model.safetensors is missing; download or copy")

    def test_pickled_weights_are_refused(self, folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        assert f"{folder}: its weights are pickled (pytorch_model.bin), which can run code" in message(folder)

    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
    def test_truncated_weights(self, folder, share):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
        assert message(folder).startswith(f"{weights}: is cut short or damaged")
        assert message(folder).endswith("; download or copy it again")

    def test_git_lfs_pointer(self, folder):
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "is a Git LFS pointer, not the weights; run `git lfs pull`" in message(folder)

    def test_missing_shard(self, folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        for shard, held in shards.items():
            save_file({name: weights[name] for name in held}, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert load_model(str(folder), FLOAT32, trainable=False)
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert message(folder).startswith(f"{folder}: model-00002-of-00002.safetensors is missing")

    def test_weights_that_lack_tensors(self, folder):
        """transformers would make them up at random."""
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "lack 1 of the model's tensors (first model.norm.weight)" in message(folder)

    def test_weights_of_another_size(self, folder):
        edit(folder / "config.json", intermediate_size=100)
        assert message(folder).startswith(f"{folder}: the model cannot be loaded (")

    def test_adapter_without_weights(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        assert message(tmp_path).startswith(f"{tmp_path}: adapter_model.safetensors is missing")


class TestArchitectures:
    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is of model_type 'bert'"),
            ({"model_type": "qwen2_moe"}, "is of model_type 'qwen2_moe'"),
            ({"model_type": "qwen2_5_vl"}, "is of model_type 'qwen2_5_vl'"),
            ({"model_type": "none_such"}, "is of model_type 'none_such'"),
            ({"architectures": ["Qwen2ForSequenceClassification"]}, "is a Qwen2ForSequenceClassification"),
            ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already (gptq)"),
        ],
    )
    def test_refused(self, folder, values, reason):
        edit(folder / "config.json", **values)
        assert message(folder).startswith(f"{folder}: {reason}")
        assert "; choose " in message(folder)


class TestTokenizers:
    def test_missing(self, folder):
        """transformers would make one of a single token."""
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json; copy"):
            load_tokenizer(str(folder))

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_damaged(self, folder, file):
        (folder / file).write_text("{")
        with pytest.raises(ModelLoadError, match=f"{folder}/{file}: cannot be read"):
            load_tokenizer(str(folder))

    @pytest.mark.parametrize(
        ("generation", "model", "expected"),
        [({"eos_token_id": [2, 0]}, {"eos_token_id": 0}, "<|im_end|>"), ({}, {"eos_token_id": 2}, "<|im_end|>")],
    )
    def test_end_token_of_the_configuration(self, folder, generation, model, expected):
        edit(folder / "tokenizer_config.json", eos_token=None)
        (folder / "generation_config.json").write_text(json.dumps(generation))
        edit(folder / "config.json", **model)
        assert load_tokenizer(str(folder)).eos_token == expected

    def test_no_end_token(self, folder):
        edit(folder / "tokenizer_config.json", eos_token=None, unk_token=None)
        (folder / "generation_config.json").unlink()
        edit(folder / "config.json", eos_token_id=None)
        with pytest.raises(
            ConfigurationError, match=f"{folder}: the tokenizer has neither an end nor an unknown token"
        ):
            BaseTrainer(SFTConfig(model_name=str(folder))).setup_model_and_tokenizer()

    def test_no_chat_template(self, folder):
        with pytest.raises(
            ConfigurationError, match=r"instruction_template: 'tokenizer' needs .* use chatml or alpaca"
        ):
            BaseTrainer(SFTConfig(model_name=str(folder), instruction_template="tokenizer")).setup_model_and_tokenizer()


class Hub(BaseHTTPRequestHandler):
    """Answers every request with one status and error code."""

    status, code = 200, ""

    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.send_response(self.status)
        if self.code:
            self.send_header("X-Error-Code", self.code)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that refuses everything; `hub(status, code)` says how."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()

    def refuse(status, code="", port=server.server_port):
        monkeypatch.setattr(
            sources, "hf_hub_url", lambda repo, file: f"http://127.0.0.1:{port}/{repo}/resolve/main/{file}"
        )
        monkeypatch.setattr(Hub, "status", status)
        monkeypatch.setattr(Hub, "code", code)
        return server

    yield refuse
    server.shutdown()
    huggingface_hub.close_session()


def downloaded(tmp_path, model_dir, name) -> str:
    """A model in the hub's cache."""
    repo = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return str(shutil.copytree(model_dir, repo / "snapshots" / ("0" * 40)))


class TestHub:
    @pytest.mark.parametrize(
        ("name", "status", "code", "reason"),
        [
            ("Qwen/Qwen2.5-7b-instruct", 404, "RepoNotFound", "did you mean Qwen/Qwen2.5-7B-Instruct?"),
            (
                "someone/private",
                401,
                "RepoNotFound",
                "no such model on the hub; check the name (A private model: run `hf auth",
            ),
            ("someone/private", 401, "", "the hub refuses this machine's token; renew it with `hf auth login`"),
            ("someone/gated", 403, "GatedRepo", "accept them at https://huggingface.co/someone/gated, then run `hf"),
            ("someone/gguf", 404, "EntryNotFound", "the hub has no config.json in it"),
            ("someone/busy", 503, "", "the hub cannot be asked (Server error '503"),
            ("someone/busy", 429, "", "the hub cannot be asked ("),
        ],
    )
    def test_refusals(self, hub, monkeypatch, name, status, code, reason):
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
        server = hub(status, code)
        said = message(name)
        assert said.startswith(f"{name}: ") and reason in said
        assert "secret" not in said
        assert len(server.asked) == 1  # not repeated

    def test_unreachable(self, hub):
        hub(200, port=9)
        said = message("Qwen/Qwen2.5-7B")
        assert "there is no such folder, and the hub cannot be asked (" in said
        assert "network and proxy settings" in said

    def test_unreachable_but_downloaded_before(self, hub, tmp_path, model_dir):
        hub(200, port=9)
        folder = downloaded(tmp_path, model_dir, "someone/model")
        assert locate_model("someone/model") == folder
        assert load_model("someone/model", FLOAT32, trainable=True).name_or_path == "someone/model"
        assert load_tokenizer("someone/model")

    def test_incomplete_download(self, hub, tmp_path, model_dir):
        hub(200, port=9)
        os.unlink(f"{downloaded(tmp_path, model_dir, 'someone/model')}/model.safetensors")
        assert "model.safetensors is missing; download" in message("someone/model")

    def test_offline(self, hub, monkeypatch, tmp_path, model_dir):
        server = hub(200)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        said = message("Qwen/Qwen2.5-7B")
        assert "HF_HUB_OFFLINE is set; unset it, or run `hf download Qwen/Qwen2.5-7B`" in said
        folder = downloaded(tmp_path, model_dir, "Qwen/Qwen2.5-7B")
        assert locate_model("Qwen/Qwen2.5-7B") == folder
        assert not server.asked

    @pytest.mark.parametrize("name", ["no such name", "https://huggingface.co/Qwen/Qwen2.5-7B", "a/b/c"])
    def test_no_name_at_all(self, name):
        assert message(name) == f"{name}: is neither a folder nor a hub id, which look like Qwen/Qwen2.5-7B"


def test_embedded_model():
    assert locate_model(EMBEDDED_MODEL) == resolve_model_name(f"./gone/{EMBEDDED_MODEL}")
