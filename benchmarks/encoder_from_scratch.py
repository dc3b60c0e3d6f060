"""A small encoder from scratch, for data whose language the embedded model can't read: a word-piece vocabulary and a BERT of four layers.

    python -m benchmarks.encoder_from_scratch nsmc_ko.parquet --before 2013-11-24 --most-rows 15 --out var/encoder-ko

It learns two things at once: words that are hidden, and the label of a text whoever wrote it. Only from rows before a day, by people
with few of them: nobody whom `benchmarks.quality` draws (16 training rows or more) is among those, and no row of validation or test.
The folder is a model like any other: `model.name`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from rich.progress import Progress
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from plora_ray.adapters.model import pool
from plora_ray.inference.engine import pad

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD = 0
IGNORED = -100
HIDDEN = 0.15  # of the word pieces of a text


def main(
    data: Annotated[Path, typer.Argument(help="Parquet: user_id, text, label, timestamp.")],
    before: Annotated[str, typer.Option(help="Rows from this day on are left out.")],
    out: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("var/encoder"),
    most_rows: Annotated[int, typer.Option(help="People with more rows than these are left out.")] = 15,
    vocabulary: Annotated[int, typer.Option(help="Word pieces.")] = 8000,
    width: Annotated[int, typer.Option(help="Of a hidden state; a head is 64 wide.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    max_length: Annotated[int, typer.Option(help="Word pieces a text is cut to.")] = 48,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights, order and hidden words.")] = 0,
) -> None:
    """Make the vocabulary, train, save, and say how well labels are told of the last hundredth of the rows, which isn't learnt."""
    rows = pd.read_parquet(data, columns=["user_id", "text", "label", "timestamp"])
    rows = rows[pd.to_datetime(rows["timestamp"]) < pd.Timestamp(before)]
    rows = rows[rows.groupby("user_id")["text"].transform("size") <= most_rows].sample(frac=1, random_state=seed)
    classes, labels = np.unique(rows["label"].to_numpy(), return_inverse=True)
    tokenizer = word_pieces(rows["text"].tolist(), vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    torch.manual_seed(seed)
    encoder = BertModel(config, add_pooling_layer=False)
    texts = tokenizer(rows["text"].tolist(), truncation=True, max_length=max_length)["input_ids"]
    judged = len(texts) // 100
    head = learn(encoder, texts[judged:], torch.from_numpy(labels[judged:]), len(classes), epochs, seed)
    encoder.save_pretrained(out)
    tokenizer.save_pretrained(out)
    loss, right = judge(encoder, head, texts[:judged], torch.from_numpy(labels[:judged]))
    shares = np.bincount(labels[judged:], minlength=len(classes)) / (len(texts) - judged)
    guess = -np.log(shares)[labels[:judged]].mean()
    print(f"{len(texts)} rows; of {judged} that weren't learnt: NLL {loss:.3f} (labels' shares alone {guess:.3f}), {right:.3f} right")


def word_pieces(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A word-piece vocabulary of these texts. Letters of Hangul stay together in their syllables (NFKC)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def learn(
    encoder: BertModel, texts: list[list[int]], labels: torch.Tensor, classes: int, epochs: int, seed: int, size: int = 128
) -> nn.Linear:
    """Train the encoder, and return the head that tells labels from the mean of its hidden states."""
    words = encoder.get_input_embeddings().weight
    assert isinstance(words, torch.Tensor)
    head, back = nn.Linear(words.shape[1], classes), nn.Linear(words.shape[1], words.shape[1])
    learnt = [*encoder.parameters(), *head.parameters(), *back.parameters()]
    steps = epochs * -(-len(texts) // size)
    optimizer = torch.optim.AdamW(learnt, lr=5e-4, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    chance = torch.Generator().manual_seed(seed)
    encoder.train()
    with Progress() as progress:
        told = progress.add_task("learning", total=steps)
        for _ in range(epochs):
            for batch in batches([len(text) for text in texts], size, chance):
                ids, real = pad([texts[row] for row in batch], PAD)
                shown, wanted = hide(ids, len(words), chance)
                states = encoder(input_ids=shown, attention_mask=real).last_hidden_state
                guessed = nn.functional.gelu(back(states[wanted != IGNORED])) @ words.T
                loss = nn.functional.cross_entropy(guessed, wanted[wanted != IGNORED])
                loss = loss + nn.functional.cross_entropy(head(pool(states, real, "mean")), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learnt, 1.0)
                optimizer.step()
                schedule.step()
                progress.update(told, advance=1, description=f"loss {loss.item():.2f}")
    return head


def batches(lengths: list[int], size: int, chance: torch.Generator) -> list[torch.Tensor]:
    """All rows once, in batches of texts about as long as each other, in an order of chance."""
    order = torch.randperm(len(lengths), generator=chance)
    order = order[torch.tensor(lengths)[order].argsort(stable=True)]
    cut = list(order.split(size))
    return [cut[place] for place in torch.randperm(len(cut), generator=chance).tolist()]


def hide(ids: torch.Tensor, words: int, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids shown and wanted. As BERT: of the pieces to be guessed 4/5 are masked, 1/10 is another, 1/10 stays; the rest IGNORED."""
    guessed = (torch.rand(ids.shape, generator=chance) < HIDDEN) & (ids >= len(SPECIAL))
    how = torch.rand(ids.shape, generator=chance)
    other = torch.randint(len(SPECIAL), words, ids.shape, generator=chance)
    shown = torch.where(guessed & (how < 0.8), SPECIAL.index("[MASK]"), torch.where(guessed & (how > 0.9), other, ids))
    return shown, torch.where(guessed, ids, IGNORED)


@torch.no_grad()
def judge(encoder: BertModel, head: nn.Linear, texts: list[list[int]], labels: torch.Tensor) -> tuple[float, float]:
    """Mean NLL in nats and share right."""
    encoder.eval()
    scores = []
    for first in range(0, len(texts), 128):
        ids, real = pad(texts[first : first + 128], PAD)
        scores.append(head(pool(encoder(input_ids=ids, attention_mask=real).last_hidden_state, real, "mean")))
    scores_ = torch.cat(scores)
    return float(nn.functional.cross_entropy(scores_, labels)), float((scores_.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    typer.run(main)
