"""Ids and masks equal those that the reference makes, for every golden row and both tokenizers."""

import json

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.tokenize import encode
from mistral_nb.data.tokenize import encode_all


@pytest.fixture(scope="module")
def golden(shared) -> list[dict]:
    with open(shared / "golden" / "tokens.jsonl", "rb") as lines: return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, MistralTokenizer]:
    return {"v3": MistralTokenizer.v3(), "v3-tekken": MistralTokenizer.v3(is_tekken=True)}


def test_every_row_gives_the_reference_ids_and_mask(golden, tokenizers):
    assert len(golden) == 194
    for g in golden:
        made = encode(g["row"], tokenizers[g["tokenizer"]], g["kind"])
        assert made.ids.dtype == np.int32 and made.mask.dtype == bool
        assert made.ids.tolist() == g["ids"], g["row"]
        assert made.mask.astype(int).tolist() == g["mask"], g["row"]


def test_without_exact_context_a_row_gives_as_many_samples_as_the_reference(golden, tokenizers):
    for g in golden:
        made = encode_all(g["row"], tokenizers[g["tokenizer"]], g["kind"], exact_context=False)
        assert len(made) == 1 + g["extra_chunks"], g["row"]
        assert made[0].ids.tolist() == g["ids"]
        assert made[0].mask.astype(int).tolist() == g["mask"]
