"""The loader's promises: a batch is a function of the step, nothing is lost, shares and evaluation are exact."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.config import TrainConfig
from mistral_nb.data.loader import TrainLoader
from mistral_nb.data.loader import eval_batches
from mistral_nb.data.loader import load_data
from mistral_nb.data.loader import pieces_of
from mistral_nb.data.source import SourceError
from mistral_nb.data.store import DataError
from mistral_nb.data.store import TokenStore
from mistral_nb.data.tokenize import TokenSample


def store_of(lengths, untrained=1, kind="instruct", name="toy.jsonl"):
    """Samples in memory; id = 1000 * sample + position, so that each token tells where it comes from."""
    first = np.broadcast_to(untrained, len(lengths))
    ids = lambda i, n: (1000 * i + np.arange(n)).astype(np.int32)
    return TokenStore.of([TokenSample(ids(i, n), np.arange(n) >= first[i]) for i, n in enumerate(lengths)], kind, name)


def same(a, b):
    return (a.seqlens == b.seqlens and a.rows == b.rows and torch.equal(a.input_ids, b.input_ids)
            and torch.equal(a.targets, b.targets) and torch.equal(a.mask, b.mask))


def segments(batch):
    """(row, inputs, targets, mask) of each segment."""
    parts = [t.split(batch.seqlens) for t in (batch.input_ids, batch.targets, batch.mask)]
    return list(zip(batch.rows, *([p.tolist() for p in part] for part in parts)))


chats = store_of(np.random.default_rng(0).integers(3, 40, 83), untrained=2, name="chats.jsonl")
books = store_of([90, 31, 30, 32, 61, 200], untrained=0, kind="pretrain", name="books.jsonl")
one_row = store_of([12], name="one.jsonl")


@pytest.mark.parametrize("world, micro, size", [(1, 1, 1), (2, 3, 5), (3, 1, 2)])
def test_any_step_without_the_ones_before(world, micro, size):
    make = lambda: TrainLoader([(chats, 2, True), (books, 1, True), (one_row, 0.5, False)], 40, size, micro, 7, world)
    loader, again = make(), make()
    keys = [(s, r, m) for s in range(12) for r in range(world) for m in range(micro)]
    walked = {key: loader.batch(*key) for key in keys}
    for key in [(11, world - 1, micro - 1), (5, 0, 0), (0, world - 1, 0)]: assert same(make().batch(*key), walked[key])
    for i in np.random.default_rng(1).permutation(len(keys))[:20]: assert same(again.batch(*keys[i]), walked[keys[i]])


def test_far_steps_are_there_at_once():
    batch = TrainLoader([(chats, 1, True)], 40, 2, seed=3).batch(10**9)
    assert batch.input_ids.dtype == torch.int64 and batch.mask.dtype == torch.bool


def test_shapes_and_shift():
    loader = TrainLoader([(chats, 1, True)], 40, 2)
    for step in range(30):
        batch = loader.batch(step)
        assert sum(batch.seqlens) == len(batch.input_ids) == len(batch.targets) == len(batch.mask) <= 2 * 40
        assert len(batch.rows) == len(batch.seqlens)
        assert batch.num_trained == int(batch.mask.sum())
        for row, x, y, mask in segments(batch):
            i = int(row.split(":")[1]) - 1
            ids, trained = chats.sample(i).ids.tolist(), chats.sample(i).mask.tolist()
            assert (x, y, mask) == (ids[:-1], ids[1:], trained[1:])


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_sample_once(shuffle):
    loader = TrainLoader([(chats, 1, shuffle)], 40, 1)
    packs = loader.streams[0].num_packs
    seen = [[row for s in range(e * packs, (e + 1) * packs) for row in loader.batch(s).rows] for e in range(3)]
    for rows in seen: assert Counter(rows) == Counter(chats.origin(i) for i in range(len(chats)))
    assert (seen[0] == seen[1]) is (not shuffle)
    assert loader.epochs(packs) == [1.0] and loader.epochs(packs * 3 // 2) == [packs * 3 // 2 / packs]


def test_seeds_and_sources_differ():
    rows = [TrainLoader([(chats, 1, True)], 40, 4, seed=s).batch(0).rows for s in (0, 1, 2)]
    assert rows[0] != rows[1] != rows[2]
    twice = TrainLoader([(chats, 1, True), (chats, 1, True)], 40, 1)
    assert twice.streams[0].epoch(0).order.tolist() != twice.streams[1].epoch(0).order.tolist()


def test_devices_share_the_sequence_of_one():
    kinds = [(1, 6, 1), (2, 3, 1), (3, 1, 2), (6, 1, 1), (1, 1, 6)]
    for step in range(5):
        rows = []
        for world, micro, size in kinds:
            loader = TrainLoader([(chats, 1, True), (books, 2, True)], 40, size, micro, 0, world)
            rows.append([r for rank in range(world) for m in range(micro) for r in loader.batch(step, rank, m).rows])
        assert all(r == rows[0] for r in rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), st.integers(0, 5))
def test_shares_of_tokens(weights, seed):
    stores = [chats, books, one_row, store_of([41] * 9), store_of([5] * 4)][:len(weights)]
    loader = TrainLoader([(s, w, True) for s, w in zip(stores, weights)], 40, 1, seed=seed)
    tokens = np.zeros(len(weights))
    for g in range(300):
        s, n = loader.mixture.locate(g)
        tokens[s] += loader.streams[s].size(n)
        off = np.abs(tokens - np.array(weights) / sum(weights) * tokens.sum())
        assert off.max() <= 40 * len(weights)
    assert sum(loader.mixture.counts(300)) == 300


def test_schedule_is_prefix_stable():
    make = lambda: TrainLoader([(chats, 2, True), (books, 1, True)], 40, 1).mixture
    long = make()
    long.locate(500)
    assert [make().locate(g) for g in (0, 1, 77, 300)] == [long.locate(g) for g in (0, 1, 77, 300)]


def test_fewer_rows_than_ranks():
    loader = TrainLoader([(one_row, 1, True)], 40, 2, world=5)
    for rank in range(5): assert loader.batch(3, rank).rows == ["one.jsonl:1"] * 2
    assert loader.epochs(1) == [10.0]


def test_texts_lose_no_token():
    loader = TrainLoader([(books, 1, True)], 30, 1)
    seen = [t for s in range(loader.streams[0].num_packs) for t in loader.batch(s).targets.tolist()]
    assert sorted(seen) == sorted(t for i in range(len(books)) for t in books.sample(i).ids[1:].tolist())
    assert all(sum(loader.batch(s).seqlens) <= 30 for s in range(20))
    assert loader.notes == []


def test_conversations_are_cut_counted_and_said():
    store = store_of([11, 16, 21, 12, 5, 6], untrained=[1, 2, 15, 12, 5, 1], name="long.jsonl")
    pieces = pieces_of(store, 10)
    assert pieces.sample.tolist() == [0, 1, 5] and pieces.length.tolist() == [10, 10, 5]
    assert (pieces.cut, pieces.lost, pieces.dropped, pieces.untrained) == (2, 5 + 20, 1, 2)
    words = " ".join(TrainLoader([(store, 1, True)], 10, 1).notes)
    for part in ["long.jsonl", "2 of 6 samples are longer", "seq_len 10", "25 tokens are lost", "longest has 20",
                 "2 of 6 samples have nothing"]: assert part in words, part


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=20), st.integers(1, 20))
def test_cut_against_a_loop(samples, seq_len):
    store = store_of([n for n, _ in samples], untrained=[u for _, u in samples])
    pieces = pieces_of(store, seq_len)
    kept, lost, cut, dropped, untrained = [], 0, 0, 0, 0
    for i, s in enumerate(map(store.sample, range(len(store)))):
        positions, mask = len(s.ids) - 1, s.mask[1:]
        if not mask.any(): untrained += 1; continue
        cut += positions > seq_len
        if not mask[:seq_len].any(): dropped += 1; lost += positions; continue
        kept.append((i, 0, min(positions, seq_len)))
        lost += max(0, positions - seq_len)
    assert list(zip(pieces.sample, pieces.start, pieces.length)) == kept
    assert (pieces.cut, pieces.lost, pieces.dropped, pieces.untrained) == (cut, lost, dropped, untrained)


unlearnable = store_of([9, 8], untrained=9)


@pytest.mark.parametrize("make, words", [
    (lambda: TrainLoader([], 10, 1), "no training data"),
    (lambda: TrainLoader([(store_of([], name="e.jsonl"), 1, True)], 10, 1), "no samples in e.jsonl"),
    (lambda: TrainLoader([(unlearnable, 1, True)], 10, 1), "nothing to train on in toy.jsonl: of 2 samples, 2 have"),
    (lambda: TrainLoader([(store_of([30], untrained=20), 1, True)], 10, 1), "behind seq_len 10: raise seq_len"),
    (lambda: TrainLoader([(chats, 1, True), (unlearnable, 1, True)], 10, 1), "nothing to train on in toy"),
    (lambda: TrainLoader([(chats, 0, True)], 10, 1), "weight must be above 0, got 0"),
    (lambda: TrainLoader([(chats, float("nan"), True)], 10, 1), "weight must be above 0, got nan"),
    (lambda: TrainLoader([(chats, 1, True)], 10, 1, world=2).batch(0, 2), "rank 2 is out of range: expected 0 to 1"),
    (lambda: TrainLoader([(chats, 1, True)], 10, 1).batch(-1), "step -1 is out of range: expected 0 or more"),
    (lambda: eval_batches([store_of([9], untrained=9)], 10, 1), "nothing to evaluate"),
])
def test_errors(make, words):
    with pytest.raises(ValueError) as e: make()
    assert words in str(e.value)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3, 83])
def test_evaluation_counts_each_sample_once(size, world, rows):
    store = store_of(chats.lengths[:rows], untrained=2, name="eval.jsonl")
    ranks = [list(eval_batches([store], 40, size, rank, world)) for rank in range(world)]
    seen = Counter(row for batches in ranks for b in batches for row in b.rows)
    assert seen == Counter(store.origin(i) for i in range(rows) if store.trained[i])
    assert sum(b.num_trained for batches in ranks for b in batches) == store.trained.sum()
    assert len({len(batches) for batches in ranks}) == 1
    for b in (b for batches in ranks for b in batches):
        assert sum(b.seqlens) == len(b.input_ids) and 0 < len(b.input_ids) <= 40 * size
        assert b.rows or b.num_trained == 0


def test_evaluation_over_several_stores():
    rows = [r for b in eval_batches([chats, one_row], 40, 3) for r in b.rows]
    assert sorted(rows) == sorted([chats.origin(i) for i in range(len(chats))] + ["one.jsonl:1"])


def test_to_moves_all_tensors():
    batch = TrainLoader([(chats, 1, True)], 40, 1).batch(0)
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.targets, moved.mask)} == {"meta"}
    assert moved.rows == batch.rows


v3 = MistralTokenizer.v3()


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def config(tmp_path, monkeypatch, files, **settings):
    """A config over jsonl files made of `files`; the keys of `data` name them."""
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = {k: ",".join(f"{tmp_path}/{part}" for part in v.split(",")) for k, v in settings.pop("data").items()}
    return TrainConfig(model_id_or_path="m", run_dir="r", data=data, **{"seq_len": 32, "batch_size": 2, **settings})


def test_load_data(tmp_path, monkeypatch):
    files = {"a.jsonl": [chat(f"{i}?", "yes") for i in range(9)], "b.jsonl": [chat("no", "no " * 50)],
             "t.jsonl": [{"text": "word " * 100}], "e.jsonl": [chat("1", "2"), chat("3", "4", weight=0)]}
    data = {"instruct_data": "a.jsonl:3,b.jsonl", "data": "t.jsonl:2", "eval_instruct_data": "e.jsonl"}
    cfg = config(tmp_path, monkeypatch, files, data=data, no_eval=False, num_microbatches=3)
    with pytest.warns(UserWarning) as said: loader, deal = load_data(cfg, v3, world=2)
    words = " ".join(str(w.message) for w in said)
    assert "b.jsonl: 1 of 1 samples are longer than seq_len 32" in words
    assert "e.jsonl: 1 of 2 samples have nothing" in words
    assert [w * 6 for w in loader.mixture.weights] == pytest.approx([3, 1, 2])
    assert [s.store.kind for s in loader.streams] == ["instruct", "instruct", "pretrain"]
    assert [s.shuffle for s in loader.streams] == [True, True, False] and loader.packs_per_step == 12
    assert [r for rank in (0, 1) for b in deal(rank) for r in b.rows] == [f"{tmp_path}/e.jsonl:1"]
    batch = loader.batch(0)
    i = int(batch.rows[0].rpartition(":")[2]) - 1
    decoded = v3.decode(batch.targets[:batch.seqlens[0]][batch.mask[:batch.seqlens[0]]].tolist())
    assert decoded == ("yes" if "a.jsonl" in batch.rows[0] else ("no " * 50).strip()[:len(decoded)]), i


@pytest.mark.parametrize("files, data, kind, words", [
    ({"a.jsonl": []}, {"instruct_data": "a.jsonl"}, ValueError, "no samples in"),
    ({"a.jsonl": [chat("1", "2", weight=0)]}, {"instruct_data": "a.jsonl"}, ValueError, "nothing to train on in"),
    ({"a.jsonl": [chat("1", "2"), {"messages": 3}]}, {"instruct_data": "a.jsonl"}, DataError, "a.jsonl:2: messages"),
    ({"a.jsonl": [chat("1", "2")]}, {"instruct_data": "b.jsonl"}, SourceError, "b.jsonl"),
    ({}, {}, ValueError, "no training data"),
    ({"a.jsonl": [chat("1", "2")], "e.jsonl": []}, {"instruct_data": "a.jsonl", "eval_instruct_data": "e.jsonl"},
     ValueError, "nothing to evaluate"),
])
def test_load_data_errors(tmp_path, monkeypatch, files, data, kind, words):
    with pytest.raises(kind) as e: load_data(config(tmp_path, monkeypatch, files, data=data, no_eval=False), v3)
    assert words in str(e.value)


def test_other_ranks_warn_of_nothing(tmp_path, monkeypatch):
    cfg = config(tmp_path, monkeypatch, {"b.jsonl": [chat("no", "no " * 50)]}, data={"instruct_data": "b.jsonl"})
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(cfg, v3, world=2)
