"""Make the tiny target and its data (configs/tiny/), stage by stage:

npm pack emoji-datasource-twitter@16.0.0 && tar xzf emoji-datasource-twitter-16.0.0.tgz     # gives package/
python scripts/make_tiny_target.py pictures --emoji package     # needs scikit-learn
python scripts/make_tiny_target.py start                        # tokenizer, random weights, unanswered data
python scripts/make_tiny_target.py train --minutes 5            # about 5 minutes on one H100
python scripts/make_tiny_target.py answer                       # greedy answers of the target, accuracy, model card
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"
NUM_TRAIN, NUM_EVAL = 1536, 128
TRAIN_SEED, EVAL_SEED, TEXT_SEED = 11, 22, 33


def datasets(world) -> dict[str, list]:
    """{"train": conversations, "eval": conversations}: the same on every machine.

    The target knows all things; the data asks about five of each category, so that a draft that trains for minutes
    sees each of them often.
    """
    from tiny_conversations import distinct

    seen: dict[str, int] = collections.Counter()
    things = []
    for thing in world.things:
        seen[thing.category] += 1
        if seen[thing.category] <= 5:
            things.append(thing)
    world = dataclasses.replace(world, things=tuple(things))
    return {
        "train": distinct(TRAIN_SEED, world, held_out=False, count=NUM_TRAIN),
        "eval": distinct(EVAL_SEED, world, held_out=True, count=NUM_EVAL),
    }


def write_jsonl(folder: Path, name: str, conversations: list, answers: list[list[str]] | None = None) -> None:
    with open(folder / f"{name}.jsonl", "w") as file:
        for i, c in enumerate(conversations):
            row = {"id": f"{name}-{i:04d}", "kind": c.kind, "messages": c.messages(answers[i] if answers else None)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def start(out: Path, seed: int) -> None:
    """Tokenizer, processor, random weights, and both data files with the right answers in place of the target's."""
    import itertools

    from tiny_conversations import stream
    from tiny_processor import model_config, new_model, save_config, save_processor, save_weights, train_tokenizer
    from tiny_world import load_world

    world = load_world(out / "pictures")
    some = itertools.islice(stream(TEXT_SEED, world, held_out=False), 20_000)
    texts = []
    for message in (m for c in some for m in c.messages()):
        content = message["content"]
        texts += [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
    roles = ["system\n", "user\n", "assistant\n"] * 100
    tokenizer = train_tokenizer([*texts, *roles])
    config = model_config(tokenizer)
    save_config(config, out / "target")
    save_weights(new_model(config, seed), out / "target")
    save_processor(tokenizer, out / "target")
    for name, conversations in datasets(world).items():
        write_jsonl(out, name, conversations)
    print(f"{len(tokenizer)} tokens")


def train(out: Path, minutes: float, tokens: int, workers: int, device: str, seed: int) -> None:
    import datetime

    import torch
    import transformers
    from tiny_bank import make_bank
    from tiny_processor import load, new_model, save_weights
    from tiny_training import Plan
    from tiny_training import train as run
    from tiny_world import load_world

    world = load_world(out / "pictures")
    stored, processor = load(out / "target")
    model = new_model(stored.config, seed)  # fresh fp32 weights, not the stored ones in bf16
    bank = make_bank(processor.image_processor, out / "pictures", world)
    result = run(model, processor.tokenizer, bank, world, Plan(minutes=minutes, tokens=tokens, workers=workers), device)
    save_weights(model, out / "target")
    made = dict(
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        train_torch=torch.__version__,
        train_transformers=transformers.__version__,
        date=datetime.date.today().isoformat(),
    )
    (out / "target" / "training.json").write_text(json.dumps(result | made) + "\n")
    print(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["pictures", "start", "train", "answer"])
    parser.add_argument("--out", type=Path, default=TINY)
    parser.add_argument("--emoji", type=Path, default=Path("package"), help="unpacked npm package")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a step")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256, help="conversations answered at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.stage == "pictures":
        from tiny_pictures import make_pictures

        make_pictures(a.emoji, a.out / "pictures")
    elif a.stage == "start":
        start(a.out, a.seed)
    elif a.stage == "train":
        train(a.out, a.minutes, a.tokens, a.workers, a.device, a.seed)
    else:
        from tiny_answers import answer_and_measure

        answer_and_measure(a.out, a.device, a.batch)


if __name__ == "__main__":
    main()
