"""Runs of SPD as it writes them, new and old, local and downloaded: the same numbers as the decomposition they were written from."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from theodolite.cli import RUN_DIR_VARIABLE, main
from theodolite.lightning_modules.decomposition.component_model import ComponentModel
from theodolite.lightning_modules.decomposition.decomposition import Decomposition
from theodolite.lightning_modules.decomposition.spd_config import migrated, open_run
from theodolite.lightning_modules.decomposition.spd_import import SPDRunModule, current_name, llama_from_config, load_spd_state
from theodolite.lightning_modules.decomposition.targets.toy_models import TMS

TARGET = {
    "model_type": "LlamaSimpleMLP",
    "block_size": 8,
    "vocab_size": 20,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "n_intermediate": 12,
    "rotary_dim": 4,
    "n_ctx": 8,
    "n_key_value_heads": 1,
    "use_grouped_query_attention": True,
}
CONFIG: dict[str, Any] = {
    "module_info": [{"module_pattern": "h.*.mlp.*", "C": 6}, {"module_pattern": "h.*.attn.q_proj", "C": 5}],
    "identity_module_info": [{"module_pattern": "h.*.attn.q_proj", "C": 3}],
    "ci_config": {"mode": "layerwise", "fn_type": "shared_mlp", "hidden_dims": [4]},
    "sigmoid_type": "leaky_hard",
    "sampling": "continuous",
    "use_delta_component": True,
    "output_loss_type": "kl",
    "pretrained_model_class": "spd.pretrain.models.llama_simple_mlp.LlamaSimpleMLP",
    "pretrained_model_name": "wandb:someone/pretraining/runs/t-00000001",
    "pretrained_model_output_attr": "idx_0",
}


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    target = llama_from_config(TARGET)
    target.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(10)
    model = ComponentModel(target, {"h.*.mlp.*": 6, "h.*.attn.q_proj": 5}, {"h.*.attn.q_proj": 3})
    parts = Decomposition(model, CONFIG["ci_config"], output_loss="kl")
    parts.initialise(3)
    return parts


def spd_state(parts: Decomposition) -> dict[str, Tensor]:
    """A checkpoint in SPD's names."""
    state: dict[str, Tensor] = {}
    for name, tensor in parts.state_dict().items():
        name = name.replace("model.target.", "target_model.").replace("model.components.", "_components.")
        state[name.replace("ci_fn.ci_fns.", "ci_fn._ci_fns.")] = tensor
    return state


def write_run(folder: Path, state: dict[str, Tensor], config: dict[str, Any], steps: tuple[int, ...] = (7,)) -> Path:
    folder.mkdir(parents=True)
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(TARGET))
    for step in steps:
        torch.save(state, folder / f"model_{step}.pth")
    return folder


def loss_of(module: Any, delta: bool = True) -> float:
    tokens = torch.arange(12).reshape(2, 6)
    sources = {name: torch.full((channels,), 0.3) for name, channels in module.source_channels().items()}
    with torch.no_grad():
        return float(module.loss_sum(module.prepare(tokens), sources)[0])


def loaded(run: str, **settings: Any) -> SPDRunModule:
    module = SPDRunModule(run, **settings)
    module.configure_model()
    return module


def test_a_run_is_read_from_its_folder_and_its_latest_step(tmp_path: Path, decomposition: Decomposition) -> None:
    run = write_run(tmp_path / "s-0123abcd", {}, CONFIG, steps=(900, 30))
    torch.save(spd_state(decomposition), run / "model_1000.pth")
    module = loaded(str(run))
    assert loss_of(module) == loss_of(decomposition)
    assert module.source_channels() == decomposition.source_channels() == dict(zip(decomposition.names, (7, 7, 6, 4), strict=True))
    assert module.provenance["spd_run"]["checkpoint"] == "model_1000.pth"
    assert len(module.provenance["spd_run"]["sha256"]) == 64
    assert loaded(str(run), use_delta=False).source_channels() == {name: count - 1 for name, count in module.source_channels().items()}
    with pytest.raises(ValueError, match="does not fit its configuration"):
        loaded(str(run), checkpoint_step=30)
    with pytest.raises(ValueError, match="has no checkpoint"):
        SPDRunModule(str(run), checkpoint_step=31)


def older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of three former formats at once."""
    old: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("_components."):
            path, matrix = name.removeprefix("_components.").rsplit(".", 1)
            name = f"patched_model.{path.replace('-', '.')}.components.{matrix}"
        elif name.startswith("target_model.") and ".mlp." in name:
            name = name.replace("target_model.", "patched_model.").replace(".weight", ".original.weight")
        old[name.replace("ci_fn._ci_fns.", "_gates.")] = tensor
    return old


def test_an_old_run_says_the_same_in_other_words(tmp_path: Path, decomposition: Decomposition) -> None:
    config = CONFIG | {
        "C": 6,
        "target_module_patterns": ["h.*.mlp.*"],
        "identity_module_patterns": None,
        "ci_fn_type": "shared_mlp",
        "ci_fn_hidden_dims": [4],
        "pretrained_model_class": "simple_stories_train.models.llama_simple_mlp.LlamaSimpleMLP",
    }
    for new in ("module_info", "identity_module_info", "ci_config"):
        del config[new]
    only = {n: t for n, t in spd_state(decomposition).items() if "q_proj" not in n or n.startswith("target_model.")}
    target = llama_from_config(TARGET)
    reference = Decomposition(ComponentModel(target, {"h.*.mlp.*": 6}), CONFIG["ci_config"], output_loss="kl")
    load_spd_state(reference, only)
    assert loss_of(loaded(str(write_run(tmp_path / "old", older_names(only), config)))) == loss_of(reference)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_gates.linear1.layers.0.W", "ci_fn._ci_fns.linear1.layers.0.W"),
        ("patched_model.h.0.mlp.c_fc.original.weight", "target_model.h.0.mlp.c_fc.weight"),
        ("target_model.h.0.mlp.c_fc.components.U", "_components.h-0-mlp-c_fc.U"),
        ("ci_fn._global_ci_fn.layers.0.W", "ci_fn._global_ci_fn.layers.0.W"),
    ],
)
def test_names_of_all_ages(old: str, new: str) -> None:
    assert current_name(old) == new
    assert current_name(new) == new


def test_old_configurations_in_new_words() -> None:
    assert migrated({"use_global_ci": True, "ci_fn_type": "shared_mlp", "ci_fn_hidden_dims": [3]})["ci_config"] == {
        "mode": "global",
        "fn_type": "global_shared_mlp",
        "hidden_dims": [3],
    }
    assert migrated({"pretrained_model_name_hf": "gpt2"})["pretrained_model_name"] == "gpt2"


class FakeFile:
    def __init__(self, path: Path, log: list[str]) -> None:
        self.name, self.path, self.log = path.name, path, log

    def download(self, root: str, replace: bool) -> None:
        self.log.append(self.name)
        shutil.copy(self.path, Path(root) / self.name)


@pytest.fixture
def wandb_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decomposition: Decomposition) -> list[str]:
    run = write_run(tmp_path / "remote" / "s-0123abcd", spd_state(decomposition), CONFIG, steps=(7, 12))
    (run / "model_config.yaml").rename(tmp_path / "remote" / "model_config.yaml")
    downloads: list[str] = []

    def files(path: str) -> list[FakeFile]:
        folders = {"goodfire/spd/s-0123abcd": run, "someone/pretraining/t-00000001": tmp_path / "remote"}
        return [FakeFile(file, downloads) for file in folders[path].iterdir() if file.is_file()]

    def find(path: str) -> Any:
        return types.SimpleNamespace(files=lambda: files(path))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=lambda: types.SimpleNamespace(run=find)))
    return downloads


@pytest.mark.parametrize(
    "address",
    ["wandb:goodfire/spd/runs/s-0123abcd", "goodfire/spd/s-0123abcd", "https://wandb.ai/goodfire/spd/runs/s-0123abcd/overview?nw=1"],
)
def test_a_run_is_downloaded_once(address: str, tmp_path: Path, wandb_runs: list[str], decomposition: Decomposition) -> None:
    for _ in range(2):
        assert loss_of(loaded(address, cache=str(tmp_path / "cache"))) == loss_of(decomposition)
    assert sorted(wandb_runs) == ["final_config.yaml", "model_12.pth", "model_config.yaml"]
    assert sorted(path.name for path in (tmp_path / "cache" / "spd-s-0123abcd").iterdir()) == ["final_config.yaml", "model_12.pth"]


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a run like"):
        open_run("nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no final_config\.yaml"):
        open_run(str(tmp_path / "empty"), tmp_path)
    other = write_run(tmp_path / "other", {}, CONFIG | {"pretrained_model_class": "spd.pretrain.models.gpt2.GPT2"})
    with pytest.raises(ValueError, match="decomposes a GPT2"):
        SPDRunModule(str(other))
    with pytest.raises(ValueError, match="mlp_bias"):
        llama_from_config(TARGET | {"mlp_bias": True})


def tms_run(folder: Path, steps: int = 5) -> tuple[Path, Decomposition]:
    target = TMS(5, 2)
    target.initialise(torch.Generator().manual_seed(2))
    parts = Decomposition(ComponentModel(target, {"linear1": 8, "linear2": 8}), CONFIG["ci_config"])
    parts.initialise(1)
    config = CONFIG | {
        "module_info": [{"module_pattern": name, "C": 8} for name in ("linear1", "linear2")],
        "identity_module_info": None,
        "output_loss_type": "mse",
        "pretrained_model_class": "spd.experiments.tms.models.TMSModel",
    }
    state = spd_state(parts) | {"_components.linear2.bias": target.linear2.bias.detach()}
    return write_run(folder, state, config, (steps,)), parts


def test_the_experiment_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    run, _ = tms_run(tmp_path / "run")
    root = request.config.rootpath
    data = {"kind": "unit", "width": 5, "probability": 0.5, "global_batch_size": 8, "eval_batch_size": 8, "eval_batches": 2}
    layer = {"data": {"class_path": "theodolite.datamodules.toy.ToyDataModule", "init_args": data}, "trainer": {"accelerator": "cpu"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(layer))
    arguments = [f"--config={root}/configs/decomposition/pgd_recon.yaml", f"--config={tmp_path}/toy.yaml", f"--run_dir={tmp_path}/out"]
    callback = "--trainer.callbacks.init_args"
    arguments += [f"--model.run={run}", f"{callback}.attack_batch_size=8", f"{callback}.legacy_ranks=4", f"{callback}.n_steps=[1,5,20]"]
    main(["validate", *arguments])
    (written,) = (tmp_path / "out" / "pgd").iterdir()
    found = {(row["attack"], row["n_steps"]): row["loss"] for row in json.loads(written.read_text())["results"]}
    for n in (1, 5, 20):
        assert found["averaged_4x2", n] == pytest.approx(found["joint_8", n], rel=1e-6)
    assert found["separate_2", 20] > found["joint_8", 20]
    manifest = json.loads((tmp_path / "out" / "manifest.validate.json").read_text())
    assert manifest["spd_run"]["checkpoint"] == "model_5.pth"
    assert manifest["model"] == str(run)
