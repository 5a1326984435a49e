"""A model, rows and settings small enough to train in a second, for the tests of the trainer and of runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch

from mistral_nb.config import TrainConfig
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.transformer import Transformer
from mistral_nb.train import trainer
from mistral_nb.weights.tensors import Entry
from mistral_nb.weights.tensors import write_tensors

TOKENIZER = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
PARAMS = {"dim": 16, "n_layers": 2, "head_dim": 4, "hidden_dim": 24, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
          "vocab_size": 32768, "rope_theta": 1e6}


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model with the packaged v3 tokenizer, in Mistral's format."""
    folder.mkdir(parents=True)
    params = {**PARAMS, **changes}
    torch.manual_seed(seed)
    state = Transformer(ModelArgs.from_dict(params)).state_dict()
    write_tensors(folder / "consolidated.safetensors",
                  {name: Entry(torch.float32, tuple(t.shape)) for name, t in state.items()}, state.__getitem__)
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(TOKENIZER, folder / "tokenizer.model.v3")
    return folder


def make_rows(path: Path, num: int = 12) -> Path:
    """Chats of all-different lengths, each answered by what was asked."""
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kid", "lynx"]
    rows = [{"messages": [{"role": "user", "content": f"Say {names[i % 12]} {i % 5 + 1} times."},
                          {"role": "assistant", "content": " ".join([names[i % 12]] * (i % 5 + 1))}]}
            for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(model: Path, home: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """Settings of a short run over rows in `home`; `changes` may use dotted keys with `__` for the dot."""
    for kind, num in [("train", 12), ("eval", 5)]:
        if not (home / f"{kind}.jsonl").exists(): make_rows(home / f"{kind}.jsonl", num)
    settings = {"model_id_or_path": str(model), "run_dir": str(home / name), "seq_len": 48, "batch_size": 2,
                "data.instruct_data": str(home / "train.jsonl"), "data.eval_instruct_data": str(home / "eval.jsonl"),
                "max_steps": 6, "optim.lr": 0.01, "lora.rank": 4, "checkpoint": False}
    return TrainConfig.from_dict(settings | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module", autouse=True)
def quiet_machine():
    """One thread, faster for models this small; and no timed look at float32 products, which may go either way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "use_fast_float32", lambda device: "float32 products: as they are")
        yield
    torch.set_num_threads(threads)
