"""Model folders: each fault has its message, round trips keep the bits, memory its bound, crashes leave no halves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mistral_nb.config import LoraConfig
from mistral_nb.data.tokenize import load_tokenizer, vocab_size
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.lora import adapters_off, lora_state_dict
from mistral_nb.model.transformer import Transformer
from mistral_nb.weights.checkpoint import check_folder, check_vocab, load_adapter, load_model, save_adapter, save_merged
from mistral_nb.weights.tensors import CheckpointError

PACKAGED = Path(mistral_common.__file__).parent / "data"
TINY = dict(dim=24, n_layers=2, head_dim=6, hidden_dim=40, n_heads=6, n_kv_heads=2, vocab_size=53, norm_eps=1e-5)
KINDS = {"dense": {}, "tied": {"tied_embeddings": True},
         "experts": {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}}
WEIGHTS = "consolidated.safetensors"
IDS = [7, 1, 30, 22, 52, 9, 11]


def state_of(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    state = Transformer(ModelArgs.from_dict({**TINY, **changes})).state_dict()
    return {name: t.to(dtype) for name, t in state.items()}


def write(folder, state, **params):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products are faster on one thread, by far when other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", state_of(), **TINY)


def logits(model):
    with torch.no_grad(): return model.eval().logits(model(torch.tensor(IDS), [4, 3])).float()


def trained(model, by=0.1):
    """`model` as if its adapters, or else all its weights, had been trained."""
    torch.manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(by * torch.randn_like(p))
    return model


def change(folder, **params):
    (folder / "params.json").write_text(json.dumps({**TINY, **params}))


def edit(folder, drop=(), **add):
    state = {k: v for k, v in load_file(folder / WEIGHTS).items() if k not in drop}
    save_file({**state, **{k.replace("__", "."): v for k, v in add.items()}}, folder / WEIGHTS)


def cut(folder, at):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:at])


def to_hugging_face(folder):
    (folder / "params.json").rename(folder / "config.json")
    (folder / WEIGHTS).rename(folder / "model.safetensors")


def copy_tokenizer(folder, name):
    found = next(p for p in PACKAGED.iterdir() if p.name.endswith(name))
    shutil.copy(found, folder / ("tekken.json" if name.endswith("json") else f"tokenizer.{name}"))


def old_vocabulary(folder):
    change(folder, vocab_size=32000)
    shape = {n: torch.zeros(32000, 24) for n in ("tok_embeddings.weight", "output.weight")}
    save_file({**load_file(folder / WEIGHTS), **shape}, folder / WEIGHTS)
    copy_tokenizer(folder, "model.v3")


FAULTS = {  # what is done to a good folder: (how, what the message must say)
    "no folder": (shutil.rmtree, "There is no folder"),
    "no params": (lambda f: (f / "params.json").unlink(), "has no params.json"),
    "broken json": (lambda f: (f / "params.json").write_text('{"dim": 24,'), "no valid JSON"),
    "a list": (lambda f: (f / "params.json").write_text("[]"), "one JSON object"),
    "lacks a key": (lambda f: (f / "params.json").write_text('{"dim": 24}'), "lacks n_layers"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"has no weights. Expected consolidated\.safetensors"),
    "two files": (lambda f: torch.save(state_of(), f / "consolidated.00.pth"), "more than one weight file"),
    "two pickles": (lambda f: [(f / WEIGHTS).unlink(), *(torch.save({}, f / f"consolidated.0{i}.pth") for i in (0, 1))],
                    r"consolidated\.00\.pth, consolidated\.01\.pth"),
    "a part lacks": (lambda f: (f / WEIGHTS).rename(f / "consolidated-00001-of-00002.safetensors"), "1 of 2 parts"),
    "wrong shape": (lambda f: change(f, hidden_dim=41),
                    r"feed_forward\.w1\.weight has the wrong shape: expected \[41, 24\].*received \[40, 24\]"),
    "missing": (lambda f: edit(f, ["layers.1.ffn_norm.weight"]), r"lacks the tensor layers\.1\.ffn_norm\.weight"),
    "unexpected": (lambda f: edit(f, extra__weight=torch.zeros(3)), r"has the tensor extra\.weight"),
    "untied": (lambda f: edit(f, ["output.weight"]), '"tied_embeddings": true'),
    "old vocabulary": (old_vocabulary, "mistral-nb extend-vocab"),
    "large tokenizer": (lambda f: copy_tokenizer(f, "240911.json"), "knows 131072 words, .* vocab_size of 53"),
    "broken tokenizer": (lambda f: (f / "tekken.json").write_text("{}"), "no tokenizer that can be read"),
    "mamba": (lambda f: change(f, model_type="mamba"), "mamba"),
    "latent attention": (lambda f: change(f, qk_nope_head_dim=64), "qk_nope_head_dim"),
    "shared experts": (lambda f: change(f, moe={**KINDS["experts"]["moe"], "num_shared_experts": 1}), "shared"),
    "fp8 by params": (lambda f: change(f, quantization={"qformat_weight": "fp8_e4m3"}), "BF16"),
    "fp8": (lambda f: edit(f, **{"layers.0.attention.wq.weight": torch.zeros(36, 24).to(torch.float8_e4m3fn)}), "BF16"),
    "fp8 scales": (lambda f: edit(f, **{"layers.0.attention.wq.qscale_weight": torch.ones(())}), "BF16"),
    "cut header": (lambda f: cut(f, 100), "not a whole safetensors file"),
    "cut data": (lambda f: cut(f, -5), "not a whole safetensors file"),
    "empty": (lambda f: cut(f, 0), "not a whole safetensors file"),
    "hugging face": (to_hugging_face, "Hugging Face"),
    "half hugging face": (lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00002.safetensors"), "Hugging Face"),
    "their names": (lambda f: save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}, f / WEIGHTS), "Hugging"),
    "an adapter": (lambda f: (f / WEIGHTS).rename(f / "lora.safetensors"), "load_adapter"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_clear_error_each(folder, fault):
    how, message = FAULTS[fault]
    assert check_folder(folder)
    how(folder)
    with pytest.raises(CheckpointError, match=message): check_folder(folder)
    with pytest.raises(CheckpointError, match=str(folder)): load_model(folder, device="cpu")


@pytest.mark.parametrize("name, size", [("model.v1", 32000), ("model.v2", 32768), ("model.v3", 32768),
                                        ("model.v7", 32768), ("240911.json", 131072)])
def test_tokenizers_are_measured_without_being_built(folder, name, size):
    copy_tokenizer(folder, name)
    with pytest.raises(CheckpointError, match=f"knows {size} words"): check_folder(folder)
    assert size == vocab_size(load_tokenizer(folder))


def test_spare_rows_are_fine():
    check_vocab(ModelArgs.from_dict({**TINY, "vocab_size": 32768}), 32000)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 2500), new=st.binary(min_size=1, max_size=4))
def test_damaged_headers_never_crash(tmp_path_factory, at, new):
    """Bytes overwritten in the header: it loads, or it is refused in words."""
    base = tmp_path_factory.getbasetemp() / "damaged"
    if not base.exists(): write(base, state_of(), **TINY)
    good = (base / WEIGHTS).read_bytes()
    try:
        (base / WEIGHTS).write_bytes(good[:at] + new + good[at + len(new):])
        try: load_model(base, device="cpu")
        except CheckpointError: pass
    finally: (base / WEIGHTS).write_bytes(good)


# Loading

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_loads_alike(tmp_path, kind, stored):
    """safetensors, its parts, and a pickle; in any dtype."""
    state, params = state_of(stored, **KINDS[kind]), {**TINY, **KINDS[kind]}
    whole, parts, pickled = (write(tmp_path / n, state, **params) for n in ("whole", "parts", "pickled"))
    for f in (parts, pickled): (f / WEIGHTS).unlink()
    for i in (0, 1):
        save_file({k: state[k] for k in sorted(state)[i::2]}, parts / f"consolidated-0000{i + 1}-of-00002.safetensors")
    torch.save(state, pickled / "consolidated.00.pth")
    for dtype in (torch.float32, torch.bfloat16):
        for f in (whole, parts, pickled):
            model = load_model(f, device="cpu", dtype=dtype)
            assert model.dtype == dtype and not any(p.requires_grad for p in model.parameters())
            for name, p in model.named_parameters(): assert torch.equal(p, state[name].to(dtype)), name
    full = load_model(whole, device="cpu", dtype=torch.bfloat16, trainable=True)
    assert full.dtype == torch.bfloat16
    assert {(p.dtype, p.requires_grad) for p in full.parameters()} == {(torch.float32, True)}


def test_what_is_not_text_is_left_out_and_said(folder, caplog):
    eyes = {"vision_encoder.ln_pre.weight": torch.ones(3), "patch_merger.merging_layer.weight": torch.ones(2, 2)}
    edit(folder, **eyes)
    change(folder, vision_encoder={"hidden_size": 3})
    model = trained(load_model(folder, LoraConfig(rank=2), device="cpu"))
    assert "vision_encoder.ln_pre.weight" in caplog.text and "vision_encoder.ln_pre.weight" in str(check_folder(folder))
    save_merged(model, folder.parent / "merged", folder)
    merged = load_file(folder.parent / "merged" / WEIGHTS)
    assert all(torch.equal(merged[name], eyes[name]) for name in eyes)


def test_a_dead_head_beside_tied_embeddings_is_left_out(tmp_path):
    folder = write(tmp_path / "m", state_of(), **TINY, tied_embeddings=True)
    model = load_model(folder, device="cpu")
    assert check_folder(folder).left_out == ["output.weight"] and model.output_weight is model.tok_embeddings.weight
    save_merged(model, tmp_path / "again", folder)
    assert torch.equal(logits(load_model(tmp_path / "again", device="cpu")), logits(model))


# Saving

@pytest.mark.parametrize("kind", KINDS)
def test_adapter_round_trip(tmp_path, kind):
    folder = write(tmp_path / "m", state_of(torch.bfloat16, **KINDS[kind]), **TINY, **KINDS[kind])
    lora = LoraConfig(rank=3, scaling=1.25, dropout=0.5)
    base, fresh = load_model(folder, device="cpu"), load_model(folder, lora, device="cpu")
    assert torch.equal(logits(base), logits(fresh))
    tuned = trained(fresh)
    assert not torch.equal(logits(base), logits(tuned))
    (folder / "tokenizer.model.v3").write_bytes(b"kept as it is")
    out = tmp_path / "run/checkpoints/checkpoint_000003/consolidated"
    save_adapter(tuned, out, folder, lora)
    assert sorted(p.name for p in out.iterdir()) == ["lora.safetensors", "params.json", "tokenizer.model.v3"]
    assert (out / "tokenizer.model.v3").read_bytes() == b"kept as it is"
    names = {f"{n.removesuffix('.weight')}.lora_{x}.weight" for n in state_of(**KINDS[kind]) for x in "AB"
             if n.split(".")[-2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}
    assert load_file(out / "lora.safetensors").keys() == names
    (folder / "tokenizer.model.v3").unlink()
    for path in (out, out.parent, out / "lora.safetensors"):
        again = load_adapter(load_model(folder, device="cpu"), path)
        assert torch.equal(logits(again), logits(tuned)) and not again.training
        with adapters_off(again): assert torch.equal(logits(again), logits(base))
    load_adapter(again, out, scaling=0.0001)
    torch.testing.assert_close(logits(again), logits(base), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_merged_round_trip(tmp_path, kind, stored, full):
    folder = write(tmp_path / "m", state_of(stored, **KINDS[kind]), **TINY, **KINDS[kind])
    tuned = trained(load_model(folder, None if full else LoraConfig(rank=3), device="cpu", trainable=full), 0.03)
    save_merged(tuned, tmp_path / "merged", folder)
    source, merged = load_file(folder / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert {k: (t.shape, t.dtype) for k, t in merged.items()} == {k: (t.shape, t.dtype) for k, t in source.items()}
    assert (tmp_path / "merged/params.json").read_text() == (folder / "params.json").read_text()
    again, close = load_model(tmp_path / "merged", device="cpu"), 1e-5 if stored == torch.float32 else 0.08
    torch.testing.assert_close(logits(again), logits(tuned), rtol=close, atol=close)
    assert not torch.equal(logits(again), logits(load_model(folder, device="cpu")))


def test_merging_starts_from_the_source_not_from_rounded_weights(folder):
    """A model computed in float16 keeps its float32 source exact."""
    model = load_model(folder, LoraConfig(rank=2), device="cpu", dtype=torch.float16)
    save_merged(model, folder.parent / "merged", folder)
    merged = load_file(folder.parent / "merged" / WEIGHTS)
    assert all(torch.equal(t, merged[name]) for name, t in load_file(folder / WEIGHTS).items())


def test_foreign_adapters_are_refused(folder, caplog):
    model, tuned = load_model(folder, device="cpu"), trained(load_model(folder, LoraConfig(rank=2), device="cpu"))
    state = {name: t.clone() for name, t in lora_state_dict(tuned).items()}
    path, a = folder.parent / "lora.safetensors", "layers.0.attention.wq.lora_A.weight"
    for change, message in [({a: torch.zeros(2, 23)}, r"wq is \[2, 23\] and \[36, 2\], expected \[rank, 24\] "),
                            ({a: None}, "wq is"), ({a.replace("0", "9"): torch.zeros(2, 24)}, "does not have"),
                            ({a: None, a.replace("_A", "_B"): None}, "lacks the tensors"),
                            ({a: torch.zeros(4, 24), a.replace("_A", "_B"): torch.zeros(36, 4)}, "one rank")]:
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=message): load_adapter(load_model(folder, device="cpu"), path)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="no adapters"): load_adapter(model, path)
    save_file({k: v.bfloat16() for k, v in state.items()}, path)  # as the reference saves them
    load_adapter(model, path)
    assert model.layers[0].attention.wq.scaling == 2.0 and "does not say its scaling" in caplog.text
    (path.parent / "params.json").write_text('{"lora": {"scaling": 4.0}}')
    assert load_adapter(model, path).layers[0].attention.wq.scaling == 4.0
    with pytest.raises(CheckpointError, match="another rank"):
        load_adapter(load_model(folder, LoraConfig(rank=3), device="cpu"), path)
    with pytest.raises(CheckpointError, match="no adapters to save"):
        save_adapter(load_model(folder, device="cpu"), folder.parent / "out", folder, LoraConfig())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_golden_figures(shared, tmp_path, kind):
    """The reference's logits with its adapter; its losses and merged weights after its 12 steps."""
    source = shared / "golden" / kind
    golden = json.loads((source / "golden.json").read_text())
    model = load_adapter(load_model(source, device="cpu"), source / "lora_start.safetensors", golden["lora"]["scaling"])
    ids, targets, mask = (torch.tensor(golden[k]) for k in ("input_ids", "targets", "mask"))

    def outputs(): return model.logits(model(ids, golden["seqlens"]))

    with torch.no_grad(): start = outputs()
    for row, want in golden["logits_rows"].items():
        torch.testing.assert_close(start[int(row)], torch.tensor(want), rtol=1e-5, atol=1e-5)
    how, lr = golden["training"], golden["training"]["optim"]["lr"]
    adapters = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(adapters, lr, (0.9, 0.95), 1e-8, how["optim"]["weight_decay"])
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, how["steps"], pct_start=how["optim"]["pct_start"])
    for want in how["losses"]:
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(outputs()[mask.bool()], targets[mask.bool()])
        assert loss.item() == pytest.approx(want, rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, how["max_norm"])
        opt.step(), plan.step()
    save_merged(model, tmp_path / "merged", source)
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    for name, want in golden["merged_abs_sums"].items():
        assert merged[name].double().abs().sum().item() == pytest.approx(want, rel=1e-5)


# Crashes and memory

CRASH = """
import os, sys
from mistral_nb.config import LoraConfig
from mistral_nb.weights import checkpoint
model = checkpoint.load_model(sys.argv[1], LoraConfig(rank=2), device="cpu")
writing = checkpoint.write_tensors
def dies(path, layout, tensor_of, notes=None):
    def half(name): return tensor_of(name) if name != list(layout)[len(layout) // 2] else os._exit(9)
    writing(path, layout, half, notes)
checkpoint.write_tensors = dies
checkpoint.save_merged(model, sys.argv[2], sys.argv[1])
"""


def test_a_crash_leaves_the_old_folder_whole(folder):
    out = folder.parent / "out"
    assert subprocess.run([sys.executable, "-c", CRASH, folder, out]).returncode == 9
    assert not out.exists() and (folder.parent / ".out.part").exists()
    model = load_model(folder, device="cpu")
    save_merged(model, out, folder)
    before = (out / WEIGHTS).read_bytes()
    assert subprocess.run([sys.executable, "-c", CRASH, folder, out]).returncode == 9
    assert (out / WEIGHTS).read_bytes() == before
    save_merged(model, out, folder)
    assert sorted(os.listdir(folder.parent)) == ["model", "out"]


PEAK = """
import gc, json, sys, torch
from mistral_nb.config import LoraConfig
from mistral_nb.device import memory, reset_peak
from mistral_nb.weights import checkpoint
from mistral_nb.weights import tensors
tensors.MAPPED = 32 * 2**20
cpu, (small, large) = torch.device("cpu"), sys.argv[1:]
def load(folder, dtype): return checkpoint.load_model(folder, LoraConfig(rank=1), device="cpu", dtype=dtype)
def peak(job):
    gc.collect()
    reset_peak(cpu)
    before = memory(cpu).current
    kept = job()
    return memory(cpu).peak - before, kept
checkpoint.save_merged(load(small, torch.float32), small + "-merged", small)
low, model = peak(lambda: load(large, torch.bfloat16))
merging, _ = peak(lambda: checkpoint.save_merged(model, large + "-merged", large))
del model
high, _ = peak(lambda: load(large, torch.float32))
print(json.dumps({"bfloat16": low, "merging": merging, "float32": high}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", [WEIGHTS, "consolidated.00.pth"])
def test_memory_holds_one_tensor_beside_the_model(tmp_path, form):
    """A model of 168 MB in bfloat16, its largest tensor 17 MB (34 MB in float32), in a process of its own."""
    shape = dict(dim=1024, n_layers=4, head_dim=64, hidden_dim=4096, n_heads=16, n_kv_heads=16, vocab_size=8192)
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, args in zip(folders, ({**TINY}, {**TINY, **shape})):
        with torch.device("meta"): names = Transformer(ModelArgs.from_dict(args)).state_dict()
        write(folder, {n: torch.full(t.shape, 0.01, dtype=torch.bfloat16) for n, t in names.items()}, **args)
        if form == WEIGHTS: continue
        torch.save(load_file(folder / WEIGHTS), folder / form)
        (folder / WEIGHTS).unlink()
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    size, mb, peak = (folders[1] / form).stat().st_size, 2**20, json.loads(done.stdout)
    for name in ("large", "large-merged"): shutil.rmtree(tmp_path / name)
    print(form, peak, "file:", size)
    spare = 40 * mb if form == WEIGHTS else 80 * mb  # a pickle's map may hold 32 MiB and a tensor
    assert peak["bfloat16"] < size + spare and peak["float32"] < 2 * size + spare and peak["merging"] < 100 * mb + spare
