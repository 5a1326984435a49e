"""Train the demo's base model from scratch and write what the package ships: mistral_nb/demo_model/.

    python scripts/make_demo_model.py [--work FOLDER] [--threads 2]

The text is made here, by chance from a fixed seed; there are no tools in it and no tool calls: that is what the demo's
adapter is for. The training is the project's own, all weights, in three parts:

    echo    tokens drawn by chance and said twice, never the same again, so that nothing can be learned but to copy;
    world   small facts about people, places, things, days and numbers: told, asked, put into JSON and taken out again;
    whole   the same texts with the whole vocabulary, through `train(cfg)` with `lora.enable: false`.

The first two use only the tokens that occur in the texts, by the trainer's own `train_step`: with 1,100 rows in the
output matrix instead of 32,768 a step costs a fifth. Before the third the table is widened; a token that no
text uses gets the
mean of the control tokens, which nothing was ever trained to say.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tqdm.auto import tqdm

from mistral_nb.config import OptimConfig
from mistral_nb.config import TrainConfig
from mistral_nb.data.loader import Batch
from mistral_nb.data.tokenize import BY_VOCABULARY
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.data.tokenize import TokenSample
from mistral_nb.data.tokenize import encode
from mistral_nb.demo import CONVERT
from mistral_nb.demo import DATES
from mistral_nb.demo import SUMS
from mistral_nb.demo import UNITS
from mistral_nb.demo import WORDS
from mistral_nb.demo import a_day
from mistral_nb.demo import as_row
from mistral_nb.demo import calculate
from mistral_nb.demo import convert
from mistral_nb.demo import in_words
from mistral_nb.demo import number
from mistral_nb.demo import pack_model
from mistral_nb.demo import questions
from mistral_nb.device import use_fast_float32
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.transformer import Transformer
from mistral_nb.run import Run
from mistral_nb.run import train
from mistral_nb.train.optim import Updater
from mistral_nb.train.optim import make_optimizer
from mistral_nb.train.trainer import train_step
from mistral_nb.weights.tensors import layout_of
from mistral_nb.weights.tensors import write_tensors

SHIPPED = Path(__file__).resolve().parents[1] / "mistral_nb" / "demo_model"
PARAMS = dict(dim=128, n_layers=3, head_dim=32, hidden_dim=384, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
              vocab_size=32768, rope_theta=10000.0, tied_embeddings=True, max_seq_len=2048)
TOKENIZER = BY_VOCABULARY[32768]

NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Vera".split()
CITIES = "Paris Rome London Berlin Madrid Vienna Boston Chicago Tokyo Sydney Dublin Prague".split()
ITEMS = "apples eggs books chairs tickets stamps pens lamps cups boxes cards stones".split()
THINGS = "bridge road wall table river garden tower box rope train ship tank".split()
COLORS = "red blue green black white yellow".split()
ALL_UNITS = [unit for table in UNITS.values() for unit in table]


# Facts: a record of keys and values, and a sentence that tells it.

def clock(rng: random.Random) -> str: return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"


def purchase(rng):
    fact = dict(name=rng.choice(NAMES), count=rng.randint(2, 99), item=rng.choice(ITEMS), price=number(rng),
                color=rng.choice(COLORS))
    return fact, rng.choice(["{name} bought {count} {color} {item} for {price} euros.",
                             "For {price} euros, {name} got {count} {item}, all {color}.",
                             "{name} sold {count} {color} {item} and was paid {price} euros.",
                             "{count} {color} {item} cost {name} {price} euros."]).format(**fact)


def trip(rng):
    (start, to), day = rng.sample(CITIES, 2), a_day(rng)
    fact = dict(name=rng.choice(NAMES), start=start, to=to, time=clock(rng), date=day.isoformat())
    return fact, rng.choice(["{name} goes from {start} to {to} on {day} at {time}.",
                             "On {day}, {name} leaves {start} at {time} and travels to {to}.",
                             "The {time} train takes {name} from {start} to {to} on {day}."]
                            ).format(day=in_words(day), **fact)


def birth(rng):
    day = a_day(rng)
    fact = dict(name=rng.choice(NAMES), city=rng.choice(CITIES), date=day.isoformat(), weekday=f"{day:%A}")
    return fact, rng.choice(["{name} was born in {city} on {weekday}, {day}.",
                             "It was {weekday}, {day}. {name} came to {city}.",
                             "{name} has lived in {city} since {day}, a {weekday}."]).format(day=in_words(day), **fact)


def weather(rng):
    day = a_day(rng)
    fact = dict(city=rng.choice(CITIES), value=rng.randint(-20, 40), date=day.isoformat(), weekday=f"{day:%A}")
    return fact, rng.choice(["It was {value} degrees in {city} on {weekday}, {day}.",
                             "{city} had {value} degrees on {day}, a {weekday}.",
                             "On {weekday}, {day}, people in {city} had {value} degrees."]
                            ).format(day=in_words(day), **fact)


def measure(rng):
    fact = dict(thing=rng.choice(THINGS), value=number(rng), unit=rng.choice(ALL_UNITS), color=rng.choice(COLORS))
    return fact, rng.choice(["The {color} {thing} measures {value} {unit}.",
                             "There is a {color} {thing} of {value} {unit}.",
                             "{value} {unit} is what the {color} {thing} has.",
                             "They say {value} {unit} for the {color} {thing}."]).format(**fact)


def change(rng):
    unit, to = rng.sample(list(rng.choice(list(UNITS.values()))), 2)
    fact = dict(value=number(rng), unit=unit, to=to)
    return fact, rng.choice(["{name} wants {value} {unit} in {to}.", "{value} {unit} must be given in {to}.",
                             "They ask how many {to} are {value} {unit}.", "From {value} {unit} to {to}.",
                             "{name} asks for {value} {unit} to be written in {to}.",
                             "The number of {to} in {value} {unit} is wanted."]).format(name=rng.choice(NAMES), **fact)


def wait(rng):
    day, num, sign = a_day(rng), rng.randint(2, 200), rng.choice([-1, 0, 1])
    said = {1: ["{name} arrives {num} days after {day}.", "{num} days later than {day}.",
                "The party is {num} days after {day}.", "It starts on {day} and ends {num} days later.",
                "On {day} {name} says: in {num} days."],
            -1: ["{name} arrived {num} days before {day}.", "{num} days earlier than {day}.",
                 "The party was {num} days before {day}.", "On {day} {name} says: it was {num} days ago."],
            0: ["The party is on {day}.", "{name} likes {day}.", "It happens on {day} itself.",
                "{name} asks about {day}."]}[sign]
    return (dict(date=day.isoformat(), days=sign * num),
            rng.choice(said).format(day=in_words(day), num=num, name=rng.choice(NAMES)))


def total(rng):
    sign, a, b = rng.choice("+-*/"), number(rng), number(rng)
    said = {"+": ["{a} plus {b}.", "{name} adds {a} and {b}.", "{a} and {b} taken together.",
                  "There were {a} and then {b} more."],
            "-": ["{a} minus {b}.", "{name} takes {b} from {a}.", "There were {a}, but {b} went away.",
                  "{a} without {b}."],
            "*": ["{a} times {b}.", "{name} multiplies {a} by {b}.", "There are {a} boxes of {b} each."],
            "/": ["{a} divided by {b}.", "{name} divides {a} by {b}.", "{a} shared among {b} people."]}[sign]
    return dict(expression=f"{a} {sign} {b}"), rng.choice(said).format(a=a, b=b, name=rng.choice(NAMES))


FACTS = [purchase, trip, birth, weather, measure, change, change, wait, wait, total, total]


# Rows: plain texts, and chats without tools.

def chat(ask: str, say: str) -> dict:
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}


def some_of(fact: dict, rng: random.Random) -> dict:
    keys = rng.sample(list(fact), rng.randint(1, len(fact)))
    return {key: fact[key] for key in keys}


def extract(rng):
    fact, said = rng.choice(FACTS)(rng)
    part = some_of(fact, rng) if rng.random() < 0.6 else fact
    keys = ", ".join(part)
    if rng.random() < 0.25:
        label, value, inner = rng.choice(["kind", "title"]), rng.choice(THINGS), rng.choice(["content", "data"])
        whole = {label: value, inner: part}
        return chat(f"{said} JSON of {label} {value} with {inner} {keys}.",
                    json.dumps([whole] if rng.random() < 0.5 else whole))
    return chat(rng.choice(["{s} Write {k} as JSON.", "Give {k} as JSON: {s}", "{s} JSON with {k}, please.",
                            "Find {k}. {s}"]).format(s=said, k=keys), json.dumps(part))


def one(rng):
    fact, said = rng.choice(FACTS)(rng)
    key = rng.choice(list(fact))
    return chat(rng.choice(["{s} What is the {k}?", "What is the {k} here? {s}"]).format(s=said, k=key), str(fact[key]))


def tell(rng):
    fact, said = rng.choice(FACTS)(rng)
    return chat(f"Say it in words: {json.dumps(fact)}", said)


def dates(rng):
    day = a_day(rng)
    if rng.random() < 0.5: return chat(f"Write {in_words(day)} in numbers.", day.isoformat())
    return chat(f"Write {day.isoformat()} in words.", f"{in_words(day)}.")


def answer_convert(rng):
    unit, to = rng.sample(list(rng.choice(list(UNITS.values()))), 2)
    value = number(rng)
    return chat(rng.choice(CONVERT).format(value=value, unit=unit, to=to),
                f"{value} {unit} is {convert(value, unit, to)['value']} {to}.")


def answer_date(rng):
    day, num, sign = a_day(rng), rng.randint(2, 200), rng.choice([-1, 0, 1])
    there = day + timedelta(days=sign * num)
    return chat(rng.choice(DATES[sign]).format(day=in_words(day), days=num),
                f"It is {there:%A}, {in_words(there)}." if sign else f"{in_words(there)} is a {there:%A}.")


def answer_sum(rng):
    sign, a, b = rng.choice("+-*/"), number(rng), number(rng)
    return chat(rng.choice(SUMS[sign]).format(a=a, b=b),
                f"{a} {WORDS[sign]} {b} is {calculate(f'{a} {sign} {b}')['value']}.")


def answer(rng): return rng.choice([answer_convert, answer_date, answer_sum])(rng)


def statement(rng):
    fact, said = rng.choice(FACTS)(rng)
    return {"text": f"{said} {json.dumps(fact)}" if rng.random() < 0.6 else f"{json.dumps(some_of(fact, rng))} {said}"}


def story(rng):
    facts = [rng.choice(FACTS)(rng) for _ in range(rng.randint(2, 5))]
    return {"text": " ".join(said for _, said in facts) + " " + json.dumps([fact for fact, _ in facts])}


# The corpus: a batch is a function of the step.

@dataclass
class Corpus:
    "Packed batches of texts made on the fly, in the ids of a small vocabulary."
    tokenizer: MistralTokenizer
    ids: np.ndarray  # int [n], the tokenizer's ids that are used, ascending
    echo_steps: int

    def __post_init__(self) -> None:
        self.new = np.full(32768, -1)
        self.new[self.ids] = np.arange(len(self.ids))
        self.plain = np.flatnonzero(self.ids >= 771).tolist()  # no control tokens, no single bytes

    def echo(self, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        "Ids and mask of a question and the same as its answer."
        begin, end, ask, answer = (self.new[i] for i in (1, 2, 3, 4))
        said = rng.choices(self.plain, k=rng.randint(4, 24))
        ids = np.array([begin, ask, *said, answer, *said, end])
        return ids, np.arange(len(ids)) >= len(said) + 3

    def spoken(self, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        "Ids and mask of a row about the small world."
        while True:
            sample = sample_of(draw(rng), self.tokenizer)
            if (self.new[sample.ids] >= 0).all(): return self.new[sample.ids], sample.mask

    def batch(self, step: int, echoes: float, tokens: int) -> Batch:
        "About `tokens` positions, a share of `echoes` among their samples."
        rng, samples, num = random.Random(f"batch {step}"), [], 0
        while num < tokens:
            samples.append((self.echo if rng.random() < echoes else self.spoken)(rng))
            num += len(samples[-1][0]) - 1
        parts = zip(*((ids[:-1], ids[1:], mask[1:]) for ids, mask in samples))
        return Batch(*(torch.from_numpy(np.concatenate(p)) for p in parts), [len(ids) - 1 for ids, _ in samples], [])


FORMS = ((extract, 0.40), (one, 0.08), (tell, 0.12), (dates, 0.08), (answer, 0.15), (statement, 0.10), (story, 0.07))


def draw(rng: random.Random) -> dict:
    "One row about the small world."
    makers, weights = zip(*FORMS)
    return rng.choices(makers, weights)[0](rng)


def sample_of(row: dict, tokenizer: MistralTokenizer) -> TokenSample:
    return encode(row, tokenizer, "pretrain" if "text" in row else "instruct")


def used_ids(tokenizer: MistralTokenizer) -> np.ndarray:
    "The ids of thousands of rows, of the demo's own chats, and the control tokens."
    rng = random.Random("vocabulary")
    used = set(range(20))
    for _ in range(6000): used.update(sample_of(draw(rng), tokenizer).ids.tolist())
    for q in questions(1500, seed=5): used.update(encode(as_row(q, rng.random()), tokenizer).ids.tolist())
    return np.array(sorted(used))


# Model and training.

def fresh(params: dict, seed: int = 0) -> Transformer:
    """Random weights: linear maps N(0, 1/in), those that write into the residual stream divided by √(2 layers).

    Embeddings are N(0, 0.02²): with larger ones copying is learned many times later, or never.
    """
    torch.manual_seed(seed)
    model = Transformer(ModelArgs.from_dict(params))
    for name, p in model.named_parameters():
        if name.endswith(("wo.weight", "w2.weight")): p.data /= math.sqrt(2 * params["n_layers"])
    return model.requires_grad_(True)


def learn(model: Transformer, corpus: Corpus, steps: int, lr: float, tokens: int) -> None:
    "Echo, then world; the rate rises for 100 steps and falls over the last two fifths."
    updater, losses = Updater(make_optimizer(model.parameters(), OptimConfig(lr=lr, weight_decay=0)), max_norm=1.0), []
    bar = tqdm(range(steps), "small vocabulary", mininterval=5)
    for step in bar:
        falling = 1 - (step - 0.6 * steps) / (0.4 * steps)
        for group in updater.optimizer.param_groups: group["lr"] = lr * min(1, (step + 1) / 100, max(0.02, falling))
        echoes = 1.0 if step < corpus.echo_steps else 0.25 if step < 0.7 * steps else 0.05
        losses.append(train_step(model, [corpus.batch(step, echoes, tokens)], updater)[0])
        if step % 50 == 49: bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")


def widen(model: Transformer, corpus: Corpus, params: dict, folder: Path) -> Path:
    "The model with the whole vocabulary, as a model folder."
    state = {name: p.detach() for name, p in model.named_parameters()}
    small, control = state["tok_embeddings.weight"], corpus.new[np.arange(5, 20)]
    noise = torch.randn(params["vocab_size"], params["dim"], generator=torch.Generator().manual_seed(1)) * 0.02
    table = small[control].mean(0) + noise
    table[corpus.ids] = small
    state["tok_embeddings.weight"] = table
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(PACKAGE / TOKENIZER, folder / "tokenizer.model.v3")
    write_tensors(folder / "consolidated.safetensors", layout_of(state), state.__getitem__)
    return folder


def write_rows(path: Path, num: int, seed: str, chats: bool) -> Path:
    "Write `num` rows of one kind about the small world."
    rng, rows = random.Random(seed), []
    while len(rows) < num:
        row = draw(rng)
        if ("messages" in row) == chats: rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def whole(work: Path, folder: Path, steps: int) -> Run:
    "The last part: the project's full fine-tuning on files, as a user would run it."
    files = [write_rows(work / f"{name}.jsonl", num, name, chats)
             for name, num, chats in (("chats", 8000, True), ("texts", 1000, False), ("held_out", 300, True))]
    return train(TrainConfig.from_dict({
        "model_id_or_path": str(folder), "run_dir": str(work / "whole"), "seq_len": 2048, "batch_size": 1,
        "data": {"instruct_data": f"{files[0]}:0.85", "data": f"{files[1]}:0.15", "eval_instruct_data": str(files[2]),
                 "shuffle": True},
        "max_steps": steps, "optim": {"lr": 3e-4, "weight_decay": 0.0}, "lora.enable": False, "checkpoint": False,
        "no_eval": False, "num_ckpt_keep": 1, "log_freq": 10, "overwrite": True, "seed": 1}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo_run/base"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2200, help="with the small vocabulary")
    parser.add_argument("--echo-steps", type=int, default=500, help="of them, on echoes alone")
    parser.add_argument("--whole-steps", type=int, default=60, help="with the whole vocabulary")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    use_fast_float32(torch.device("cpu"))
    args.work.mkdir(parents=True, exist_ok=True)
    began, tokenizer = time.time(), MistralTokenizer.from_file(str(PACKAGE / TOKENIZER))
    corpus = Corpus(tokenizer, used_ids(tokenizer), args.echo_steps)
    model = fresh(PARAMS | {"vocab_size": len(corpus.ids)})
    learn(model, corpus, args.steps, lr=2e-3, tokens=3072)
    run = whole(args.work, widen(model, corpus, PARAMS, args.work / "wide"), args.whole_steps)
    size = pack_model(run.checkpoints[-1] / "consolidated", args.out, corpus.ids)
    loss, minutes = float(run.eval_metrics["eval_loss"].iloc[-1]), (time.time() - began) / 60
    print(f"{minutes:.1f} minutes, held-out loss {loss:.3f}, {len(corpus.ids)} tokens known, {size / 2**20:.1f} MB")


if __name__ == "__main__": main()
