"""The target's own greedy answers, how many are exactly right, and the model card that says so."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path

import torch
from make_tiny_target import datasets, write_jsonl
from tiny_bank import Bank, make_bank, picture_features
from tiny_conversations import KINDS, Conversation
from tiny_processor import load
from tiny_training import collate, encode
from tiny_world import load_world

MAX_NEW = 192
# Between the best and the second best logit. Below it, another machine's rounding could choose differently, and the
# conversation is left out of the files.
MIN_MARGIN = 2e-3

CARD = Path(__file__).with_name("tiny_card.md")


@torch.no_grad()
def generate(model, tokenizer, bank: Bank, prompts: list[tuple[Conversation, list[str]]]) -> list[str]:
    """Greedy answers to each conversation's last question, with the earlier answers given; padded on the left."""
    device = model.device
    rows = [encode(tokenizer, bank, c, earlier, answer=None) for c, earlier in prompts]
    length = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    for i, r in enumerate(rows):
        ids[i, length - len(r.ids) :] = r.ids
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        mask[i, length - len(r.ids) :] = 1
    inputs = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == model.config.image_token_id).long())
    pixels, grids = _pixels(bank)
    shown = [f for c, _ in prompts for f in c.pictures]
    if shown:
        inputs |= dict(
            pixel_values=torch.cat([pixels[f] for f in shown]), image_grid_thw=torch.stack([grids[f] for f in shown])
        )
    out = model.generate(**{k: v.to(device) for k, v in inputs.items()}, do_sample=False, max_new_tokens=MAX_NEW)
    answers = [tokenizer.decode(o, skip_special_tokens=False) for o in out[:, length:].tolist()]
    return [a.split(tokenizer.eos_token)[0] for a in answers]


def _pixels(bank: Bank) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Patches and grid of each picture."""
    pixels, grids, files = {}, {}, iter(bank.rows)
    for patches, grid in bank.groups:
        for one, g in zip(patches.split(grid.prod(-1).tolist()), grid, strict=True):
            file = next(files)
            pixels[file], grids[file] = one, g
    return pixels, grids


def own_answers(model, tokenizer, bank: Bank, conversations: list[Conversation], batch: int) -> list[list[str]]:
    """The model's greedy answers to every turn, given its own earlier answers.

    Where every token of the right answers is the model's clear first choice, they are its greedy answers: one pass
    shows it. Only the other conversations are decoded token by token.
    """
    answers = [[right for _, right in c.turns] for c in conversations]
    lead = margins(model, tokenizer, bank, conversations, answers)
    unsure = [i for i, value in enumerate(lead) if value <= MIN_MARGIN]
    print(f"{len(unsure)} of {len(conversations)} conversations are decoded", flush=True)
    decoded = decode_all(model, tokenizer, bank, [conversations[i] for i in unsure], batch)
    for i, given in zip(unsure, decoded, strict=True):
        answers[i] = given
    return answers


def decode_all(model, tokenizer, bank: Bank, conversations: list[Conversation], batch: int) -> list[list[str]]:
    """The same, all decoded; conversations of like length together."""
    answers: list[list[str]] = [[] for _ in conversations]
    for turn in range(max((len(c.turns) for c in conversations), default=0)):
        todo = [i for i, c in enumerate(conversations) if len(c.turns) > turn]
        todo.sort(key=lambda i: len(conversations[i].turns[turn][1]))
        for at in range(0, len(todo), batch):
            group = todo[at : at + batch]
            new = generate(model, tokenizer, bank, [(conversations[i].cut(turn + 1), answers[i]) for i in group])
            for i, text in zip(group, new, strict=True):
                answers[i].append(text)
    return answers


@torch.no_grad()
def margins(model, tokenizer, bank: Bank, conversations: list[Conversation], answers: list[list[str]]) -> list[float]:
    """For each conversation the smallest lead of an answer's token over every other token (negative: not greedy)."""
    lead = [float("inf")] * len(conversations)
    on_device = bank.to(model.device)
    features = picture_features(model.model.visual, on_device)
    turns = [(i, t) for i, c in enumerate(conversations) for t in range(len(c.turns))]
    for at in range(0, len(turns), 16):
        group = turns[at : at + 16]
        rows = [encode(tokenizer, bank, conversations[i].cut(t + 1), answers[i][:t], answers[i][t]) for i, t in group]
        rows_of = torch.tensor([k for k, r in enumerate(rows) for _ in range(len(r.ids) - r.num_prompt)])
        data = {k: v.to(model.device) for k, v in collate(rows, tokenizer.pad_token_id).items()}
        embeds = torch.where(
            data["feature"][..., None] >= 0,
            features[data["feature"].clamp(min=0)],
            model.get_input_embeddings()(data["ids"]),
        )
        hidden = model.model.language_model(inputs_embeds=embeds, position_ids=data["positions"], use_cache=False)[0]
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[data["target_at"]])
        chosen = logits.gather(1, data["target"][:, None])[:, 0]
        others = logits.scatter(1, data["target"][:, None], -torch.inf).amax(-1)
        smallest = torch.full((len(rows),), torch.inf).scatter_reduce(0, rows_of, (chosen - others).cpu(), "amin")
        for (i, _), value in zip(group, smallest.tolist(), strict=True):
            lead[i] = min(lead[i], value)
    return lead


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer beside the right one."""

    kind: str
    said: str
    right: str

    @property
    def exact(self) -> bool:
        return self.said == self.right

    @property
    def mostly(self) -> bool:
        """Nine in ten words agree, in order."""
        return difflib.SequenceMatcher(None, self.said.split(), self.right.split(), autojunk=False).ratio() >= 0.9


def share(marks: list[bool]) -> str:
    return f"{sum(marks) / len(marks):.0%}"


def answer_and_measure(out: Path, device: str, batch: int) -> None:
    """Rewrite both data files with the target's answers, and its model card with its accuracy on held-out questions."""
    world = load_world(out / "pictures")
    model, processor = load(out / "target", device)
    tokenizer = processor.tokenizer
    bank = make_bank(processor.image_processor, out / "pictures", world)
    for name, conversations in datasets(world).items():
        answers = own_answers(model, tokenizer, bank, conversations, batch)
        lead = margins(model, tokenizer, bank, conversations, answers)
        kept = [i for i, value in enumerate(lead) if value > MIN_MARGIN]
        every = [
            Answer(c.kind, said, right)
            for c, given in zip(conversations, answers, strict=True)
            for said, (_, right) in zip(given, c.turns, strict=True)
        ]
        lengths = [len(tokenizer(a)["input_ids"]) for i in kept for a in answers[i]]
        print(
            f"{name}: {len(kept)} of {len(lead)} conversations kept, {share([a.exact for a in every])} of {len(every)} "
            f"answers exactly right, {sum(lengths) / len(lengths):.1f} tokens an answer",
            flush=True,
        )
        write_jsonl(out, name, [conversations[i] for i in kept], [answers[i] for i in kept])
    for a in every:  # of the held-out conversations, which come last
        if not a.exact:
            print(f"- {a.kind}\n  said  {a.said}\n  right {a.right}")
    write_card(out / "target", model, len(tokenizer), every)


def write_card(folder: Path, model, num_tokens: int, answers: list[Answer]) -> None:
    """README.md beside the weights."""
    by_kind = {k: [a for a in answers if a.kind == k] for k in KINDS} | {"all": answers}
    lines = [
        f"| {kind} | {len(some)} | {share([a.exact for a in some])} | {share([a.mostly for a in some])} |"
        for kind, some in by_kind.items()
    ]
    training = json.loads((folder / "training.json").read_text())
    config = model.config.text_config
    text = CARD.read_text().format(
        num_weights=f"{sum(p.numel() for p in model.parameters()):,}",
        num_layers=config.num_hidden_layers,
        rows=config.vocab_size,
        num_tokens=num_tokens,
        table="\n".join(lines),
        **training,
    )
    (folder / "README.md").write_text(text)
    print(text[text.index("| kind") :])
