"""Training of the tiny target: endless fresh conversations, every picture's features computed once a step.

Legend of dims: B rows, L tokens of a row, H heads, C chunks, T tokens of a chunk, K key dim, V value dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tiny_bank import Bank, picture_features
from tiny_conversations import Conversation, stream
from tiny_world import World

ROUND = 64  # rows are padded to a multiple of the delta rule's chunk


# --- rows of tokens ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation up to one answer. `feature` is the picture's row in `Bank` or -1; `positions` is [3, L]."""

    ids: torch.Tensor
    feature: torch.Tensor
    positions: torch.Tensor
    num_prompt: int


def prompt_text(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, bank: Bank, conversation: Conversation, earlier: list[str], answer: str | None) -> Row:
    """Tokens of a conversation up to its last question, with the `earlier` answers, and of the `answer`, if any.

    Positions as Qwen's multi-axis rotary embedding wants them: a picture of h by w tokens takes max(h, w) steps.
    """
    pictures = [bank.rows[f] for f in conversation.pictures]
    pad = "<|image_pad|>"
    pieces = prompt_text(tokenizer, conversation.messages(earlier)).split(pad)
    text = pieces[0] + "".join(pad * (h * w) + rest for (_, h, w), rest in zip(pictures, pieces[1:], strict=True))
    prompt = tokenizer(text)["input_ids"]
    tail = [] if answer is None else tokenizer(answer + "<|im_end|>")["input_ids"]
    ids = torch.tensor(prompt + tail)
    feature, positions = torch.full_like(ids, -1), torch.empty(3, len(ids), dtype=torch.long)
    at, step = 0, 0
    starts = (ids == tokenizer.convert_tokens_to_ids("<|vision_start|>")).nonzero()[:, 0].tolist()
    for (row, h, w), start in zip(pictures, starts, strict=True):
        first = start + 1
        positions[:, at:first] = torch.arange(step, step + first - at)
        step += first - at
        cells = torch.arange(h * w)
        feature[first : first + h * w] = row + cells
        positions[:, first : first + h * w] = step + torch.stack([torch.zeros_like(cells), cells // w, cells % w])
        at, step = first + h * w, step + max(h, w)
    positions[:, at:] = torch.arange(step, step + len(ids) - at)
    return Row(ids, feature, positions, len(prompt))


def collate(rows: list[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right. `target`: all tokens of answers; `target_at`: the flat positions that predict them."""
    length = -(-max(len(r.ids) for r in rows) // ROUND) * ROUND
    ids = torch.full((len(rows), length), pad_id)
    feature = torch.full_like(ids, -1)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    at, target = [], []
    for i, r in enumerate(rows):
        n = len(r.ids)
        ids[i, :n], feature[i, :n], positions[:, i, :n] = r.ids, r.feature, r.positions
        at.append(i * length + torch.arange(r.num_prompt - 1, n - 1))
        target.append(r.ids[r.num_prompt :])
    return dict(ids=ids, feature=feature, positions=positions, target_at=torch.cat(at), target=torch.cat(target))


class Batches(torch.utils.data.IterableDataset):
    """Endless batches of `tokens` tokens at most: training conversations cut at a random turn, rows of like length."""

    def __init__(self, tokenizer, bank: Bank, world: World, seed: int, tokens: int, weights: dict[str, float]):
        self.tokenizer, self.bank, self.world = tokenizer, dataclasses.replace(bank, groups=()), world
        self.seed, self.tokens, self.weights = seed, tokens, weights

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        seed = self.seed + 1000 * (info.id if info else 0)
        order = torch.Generator().manual_seed(seed)
        source = stream(seed, self.world, held_out=False, weights=self.weights)
        while True:
            rows = []
            for found in itertools.islice(source, max(8, self.tokens // 20)):
                turns = int(torch.randint(1, len(found.turns) + 1, (), generator=order))
                *earlier, answer = [right for _, right in found.turns[:turns]]
                rows.append(encode(self.tokenizer, self.bank, found.cut(turns), earlier, answer))
            rows.sort(key=lambda r: len(r.ids))
            batches, batch = [], []
            for r in rows:
                if batch and (len(batch) + 1) * (-(-len(r.ids) // ROUND) * ROUND) > self.tokens:
                    batches, batch = [*batches, batch], []
                batch.append(r)
            for i in torch.randperm(len(batches), generator=order).tolist():
                yield collate(batches[i], self.tokenizer.pad_token_id)


# --- the step ------------------------------------------------------------------------------------------------------


def gated_delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False, **_):
    """The chunked gated delta rule with one triangular solve a layer where transformers loops over a chunk's 64 rows.

    Shapes as in transformers: query and key [B, L, H, K], value [B, L, H, V], g (log decay) and beta [B, L, H]; from an
    empty state, L a multiple of 64. Equations: Yang et al., "Gated Delta Networks", 2024, section 3.3 (its WY form).
    """
    assert initial_state is None, "starts from an empty state"
    assert not output_final_state, "keeps no state"
    b, length, h, k_dim = key.shape
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * k_dim**-0.5
    q, k, v = (x.transpose(1, 2).reshape(b, h, length // ROUND, ROUND, -1) for x in (query, key, value))
    g, beta = (x.transpose(1, 2).reshape(b, h, length // ROUND, ROUND) for x in (g, beta))
    decay = g.cumsum(-1)
    between = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()  # [B, H, C, T, T]
    k_beta = k * beta[..., None]
    lower = (k_beta @ k.transpose(-1, -2) * between).tril(-1)
    rhs = torch.cat((v * beta[..., None], k_beta * decay.exp()[..., None]), -1)
    eye = torch.eye(ROUND, device=q.device)
    solved = torch.linalg.solve_triangular(lower + eye, rhs, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k_dim), -1)
    inside, q_decayed = (q @ k.transpose(-1, -2)) * between, q * decay.exp()[..., None]
    k_decayed, last = k * (decay[..., -1:] - decay).exp()[..., None], decay[..., -1].exp()[..., None, None]
    state, out = q.new_zeros(b, h, k_dim, v.shape[-1]), []
    for c in range(length // ROUND):
        new = u[:, :, c] - w[:, :, c] @ state
        out.append(q_decayed[:, :, c] @ state + inside[:, :, c] @ new)
        state = state * last[:, :, c] + k_decayed[:, :, c].transpose(-1, -2) @ new
    return torch.cat(out, 2).transpose(1, 2), None


@contextlib.contextmanager
def fast_rule(model):
    """Within, every layer uses `gated_delta_rule` (training only: it keeps no state)."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    layers = [b.linear_attn for b in model.model.language_model.layers if hasattr(b, "linear_attn")]
    slow = modeling.torch_chunk_gated_delta_rule
    # transformers 5.12 looks the function up on the layer, 5.17 in the module.
    on_layer = hasattr(layers[0], "chunk_gated_delta_rule")

    def put(rule) -> None:
        modeling.torch_chunk_gated_delta_rule = rule
        for layer in layers if on_layer else ():
            layer.chunk_gated_delta_rule = rule

    put(gated_delta_rule)
    try:
        yield
    finally:
        put(slow)


def answer_logits(model, bank: Bank, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [number of answer tokens, vocabulary] that predict `batch["target"]`."""
    text = model.get_input_embeddings()(batch["ids"])
    features = picture_features(model.model.visual, bank)
    shown = features[batch["feature"].clamp(min=0)]
    embeds = torch.where(batch["feature"][..., None] >= 0, shown, text)
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False)[0]
    return model.lm_head(hidden.reshape(-1, hidden.shape[-1])[batch["target_at"]])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train: for `minutes`; the learning rate rises over `warmup` steps and falls with the time spent."""

    minutes: float
    tokens: int = 32768
    peak_lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.02
    workers: int = 12
    seed: int = 1


def train(model, tokenizer, bank: Bank, world: World, plan: Plan, device: str) -> dict[str, float]:
    """Train `model` in place; returns {"steps", "loss", "seconds"}."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    weights = dict(describe=1.2, list=1.0, compare=1.2, count=1.4, json=1.0, follow_up=1.4, digits=1.2, text=1.4)
    data = torch.utils.data.DataLoader(
        Batches(tokenizer, bank, world, plan.seed, plan.tokens, weights),
        batch_size=None,
        num_workers=plan.workers,
        pin_memory=device != "cpu",
        prefetch_factor=4 if plan.workers else None,
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=plan.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.98), fused=device != "cpu")
    bank = bank.to(device)
    model.to(device).train()
    start, logged, step, loss = time.monotonic(), 0.0, 0, torch.zeros(())
    with fast_rule(model):
        for batch in data:
            spent = (time.monotonic() - start) / (plan.minutes * 60)
            if spent >= 1:
                break
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / plan.warmup)
                group["lr"] = plan.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * spent))
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            logits = answer_logits(model, bank, batch)
            loss = F.cross_entropy(logits, batch["target"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if spent >= logged:
                logged += 1 / 40
                right = (logits.argmax(-1) == batch["target"]).float().mean()
                print(f"{spent:5.0%} step {step} loss {loss.item():.4f} tokens right {right.item():.4f}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model.eval()
    return dict(steps=step, loss=round(loss.item(), 5), seconds=round(time.monotonic() - start))
