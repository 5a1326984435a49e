"""Small tekken files of every version: the first tokens of the packaged one, and control tokens for all versions."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

NEWER = ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
EFFORT = {"reasoning_effort": {"values": ["none", "high"], "default": "none"}}
NUM_TOKENS, NUM_CONTROL = 6000, 64


@cache
def packaged() -> dict:
    return json.loads((Path(str(files("mistral_common"))) / "data" / "tekken_240911.json").read_text(encoding="utf-8"))


def write_tekken(folder: Path, version: str) -> Path:
    """Write a `tekken.json` of `version` into `folder`."""
    control = [t["token_str"] for t in Tekkenizer.DEPRECATED_SPECIAL_TOKENS] + NEWER
    sizes = {"num_vocab_tokens": NUM_TOKENS, "default_vocab_size": NUM_TOKENS + NUM_CONTROL,
             "default_num_special_tokens": NUM_CONTROL}
    data = {"config": packaged()["config"] | sizes | {"version": version},
            "vocab": packaged()["vocab"][:NUM_TOKENS],
            "special_tokens": [{"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(control)]}
    if version == "v15": data["model_settings_builder"] = EFFORT
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
    return folder / "tekken.json"


VERSIONS = ["v1", "v2", "v3", "v7", "tekken-v3", "tekken-v7", "tekken-v11", "tekken-v13", "tekken-v15"]


def every_tokenizer(folder: Path) -> dict[str, MistralTokenizer]:
    """A tokenizer of every kind: the packaged SentencePiece files, and small tekkens written into `folder`."""
    out = {name: getattr(MistralTokenizer, name)() for name in VERSIONS[:4]}
    for name in VERSIONS[4:]:
        out[name] = MistralTokenizer.from_file(write_tekken(folder / name, name.removeprefix("tekken-")))
    return out
