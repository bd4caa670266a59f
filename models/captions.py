"""Image captioning: a convolutional encoder and a Transformer decoder.

The network attends to a grid of picture features while it generates a caption word by word, after Xu et al. 2015
(arXiv:1502.03044), with the decoder of Vaswani et al. 2017 (arXiv:1706.03762) instead of a recurrent one, with
pre-normalization as in Xiong et al. 2020 (arXiv:2002.04745). It has no dropout and no batch normalization, so the
contribution of a caption to the loss does not depend on how a batch is split over workers.

Letters: B pictures, C channels, H and W their size, P positions of the feature grid, L tokens, V size of the
vocabulary, D width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.captions_data import END, PAD, START, UNKNOWN, Vocabulary
from models.vision import counted_flops, three_convolutions

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, both (B, heads, P or L, D / heads)


class Captioner(nn.Module):
    """Generates captions for pictures of any size.

    A batch is a pair: pictures (B, C, H, W) float32; tokens (B, L) int64, START, words, END, PAD… (`captions_data`).
    The words themselves are part of the weights (`spelling`), so that a checkpoint can be read without its data.
    """

    spelling: Tensor

    def __init__(
        self,
        words: str | Sequence[str],
        min_count: int = 1,
        channels: int = 1,
        size: Sequence[int] = (28, 140),
        width: int = 16,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        max_words: int = 5,
        beams: int = 3,
    ) -> None:
        """
        Args:
            words: the words of captions, or a file that contains them, see `Vocabulary.of`; also for `min_count`.
            size: height and width of the pictures for which `flops_per_sample` is counted; any size is accepted.
            width: channels of the first convolution.
            dim: width of the decoder.
            max_words: length at which an unfinished caption is truncated.
            beams: beam size of the search.
        """
        super().__init__()
        if dim % (2 * heads) or dim % 4:
            raise ValueError(f"dim={dim}, heads={heads}: dim must be a multiple of 4 and of twice the heads.")
        if min(channels, width, layers, max_words, beams, *size) < 1:
            raise ValueError(f"{channels=}, {size=}, {width=}, {layers=}, {max_words=}, {beams=}: at least 1 each.")
        vocabulary = Vocabulary.of(words, min_count)
        self.channels, self.max_words, self.beams = channels, max_words, beams
        self.register_buffer("spelling", torch.tensor(list("\n".join(vocabulary.words).encode()), dtype=torch.uint8))
        self.encoder = Encoder(channels, width, dim)
        self.embedding = nn.Embedding(len(vocabulary), dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(vocabulary))
        self.flops_per_sample = self._training_flops(size)

    # ---- training ---------------------------------------------------------------------------------------------------

    def forward(self, pictures: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (B, L, V) of the token that follows each of tokens (B, L), which start with START."""
        return self._decode(self._known(tokens), self._look(self._fitting(pictures)))[0]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return the cross-entropy of every token of the captions, excluding PAD."""
        pictures, tokens = batch
        logits = self(pictures, tokens[:, :-1])  # (B, L - 1, V)
        loss, right, count = self._judged(logits, tokens[:, 1:])
        return {"loss": (loss, count), "next_token": (right, count)}

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return the loss as in training, and `tally`, of captions generated without teacher forcing."""
        pictures, tokens = batch
        memory = self._look(self._fitting(pictures))
        wanted = tokens[:, 1:]  # (B, L - 1)
        loss, _, count = self._judged(self._decode(self._known(tokens)[:, :-1], memory)[0], wanted)
        written = self._greedy(memory, len(pictures))[0]  # (B, max_words + 1)
        length = max(wanted.shape[1], written.shape[1])
        wanted, written = (F.pad(some, (0, length - some.shape[1]), value=PAD) for some in (wanted, written))
        same, valid = wanted == written, wanted != PAD
        # An unknown word is never correct, even if the network predicts UNKNOWN.
        same &= wanted != UNKNOWN
        tally = torch.stack([(same & valid).sum(), valid.sum(), same.all(1).sum()])
        return {"loss": (loss, count), "tally": (tally, len(pictures))}

    def summarize(self, totals: dict[str, tuple[Tensor, float]]) -> dict[str, float]:
        """Return `exact`, the share of captions with every word correct, and `token_accuracy`, of words (and ends) by
        position."""
        tally, captions = totals["tally"]
        right, tokens, exact = tally.tolist()
        return {"exact": exact / captions, "token_accuracy": right / tokens}

    @staticmethod
    def _judged(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (sum of the loss, correct tokens, tokens) of logits (B, L, V) against wanted (B, L)."""
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=PAD, reduction="sum")
        valid = wanted != PAD
        return loss, ((logits.detach().argmax(2) == wanted) & valid).sum(), valid.sum()

    # ---- writing captions -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def greedy(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Decode greedily: tokens (B, max_words + 1) after START, log-probabilities (B,)."""
        return self._greedy(self._look(self._fitting(pictures)), len(pictures))

    def _greedy(self, memory: Cache, size: int) -> tuple[Tensor, Tensor]:
        last = torch.full((size, 1), START, device=self.spelling.device)
        score = torch.zeros(size, device=last.device)
        ended = torch.zeros_like(score, dtype=torch.bool)
        written: list[Tensor] = []
        past: Cache | None = None
        for at in range(self.max_words + 1):
            logits, past = self._decode(last, memory, past, at)
            best, token = self._choices(logits).max(1)  # (B,), (B,)
            token = token.masked_fill(ended, PAD)
            score = score + best.masked_fill(ended, 0)
            written.append(token)
            ended = ended | (token == END)
            last = token[:, None]
        return torch.stack(written, 1), score

    @torch.no_grad()
    def beam(self, pictures: Tensor, beams: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the most likely caption of a beam search, in the format of `_greedy`.

        The search keeps the `beams` best prefixes (Sutskever et al. 2014, arXiv:1409.3215, section 3.2), without length
        normalization. It may drop the greedy caption, which therefore remains a candidate.
        """
        beams, size = beams or self.beams, len(pictures)
        memory = self._look(self._fitting(pictures))
        candidate, candidate_score = self._greedy(memory, size)
        if beams == 1 or not size:
            return candidate, candidate_score
        memory = [(k.repeat_interleave(beams, 0), v.repeat_interleave(beams, 0)) for k, v in memory]
        written = torch.full((size * beams, 1), START, device=pictures.device)
        score = torch.full((size, beams), -math.inf, device=pictures.device)
        score[:, 0] = 0  # all beams are equal at first
        past: Cache | None = None
        for at in range(self.max_words + 1):
            logits, past = self._decode(written[:, -1:], memory, past, at)
            step = self._choices(logits).view(size, beams, -1)  # (B, beams, V)
            ended = ((written == END) | (written == PAD)).any(1).view(size, beams, 1)
            nothing = torch.arange(step.shape[2], device=step.device) == PAD
            step = torch.where(ended, torch.where(nothing, 0.0, -math.inf), step)  # a finished caption does not change
            score, best = (score[:, :, None] + step).flatten(1).topk(beams)  # (B, beams) each
            parent = (best // step.shape[2] + torch.arange(size, device=best.device)[:, None] * beams).flatten()
            written = torch.cat([written[parent], (best % step.shape[2]).view(-1, 1)], 1)
            past = [(k[parent], v[parent]) for k, v in past]
        found = written[:, 1:].view(size, beams, -1)[:, 0]  # topk sorts
        better = score[:, 0] > candidate_score
        return torch.where(better[:, None], found, candidate), torch.where(better, score[:, 0], candidate_score)

    @staticmethod
    def _choices(logits: Tensor) -> Tensor:
        """Return the log-probabilities (B, V) of the next token from the logits (B, 1, V) of the last token."""
        logits = logits[:, -1].float()
        tokens = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill((tokens == PAD) | (tokens == START), -math.inf).log_softmax(1)

    def predict_step(self, batch: Any) -> list[dict[str, str | float]]:
        """Return the caption of each picture by beam search, and its probability; captions in the batch are ignored."""
        pictures = batch[0] if isinstance(batch, tuple | list) else batch
        tokens, score = self.beam(pictures)
        vocabulary = self.vocabulary
        pairs = zip(tokens.tolist(), score.exp().tolist(), strict=True)
        return [{"caption": vocabulary.text(caption), "probability": sure} for caption, sure in pairs]

    def examples(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return a figure of twelve pictures with the generated caption (red if wrong) above the true caption."""
        from matplotlib.figure import Figure

        pictures, tokens = (part[:12] for part in batch)
        vocabulary = self.vocabulary
        written = [vocabulary.text(caption) for caption in self.greedy(pictures)[0].tolist()]
        wanted = [vocabulary.text(caption) for caption in tokens.tolist()]
        rows = -(-len(pictures) // 3)
        figure = Figure(figsize=(12, rows * (0.55 + 4 * pictures.shape[2] / pictures.shape[3])), layout="constrained")
        for axes in figure.subplots(rows, 3, squeeze=False).flat:
            axes.axis("off")
        for axes, picture, found, true in zip(figure.axes, pictures, written, wanted, strict=False):
            low, high = picture.amin(), picture.amax()
            shown = ((picture - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0).float().cpu()  # (H, W, C)
            axes.imshow(shown.expand(-1, -1, 3).numpy())
            colour = "black" if found == true else "crimson"
            axes.set_title(f"{found or '(nothing)'}\ntrue: {true}", color=colour, fontsize=9, wrap=True)
        return {"captions": figure}

    def export_inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the arguments of `forward`."""
        pictures, tokens = batch
        return pictures, tokens[:, :-1]

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary that the weights were trained with."""
        return Vocabulary(bytes(self.spelling.tolist()).decode().split("\n"))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _look(self, pictures: Tensor) -> Cache:
        """Return the keys and values of the pictures for each layer."""
        features = self.encoder(pictures)  # (B, P, D)
        return [block.look.keys_values(features) for block in self.blocks]  # type: ignore[union-attr, operator]

    def _decode(self, tokens: Tensor, memory: Cache, past: Cache | None = None, at: int = 0) -> tuple[Tensor, Cache]:
        """Return the logits (B, L, V) of tokens (B, L) at positions from `at` on, and the cache for the next call.

        Without `past`, tokens attend to those before them; with it, L is 1 and the token attends to the past and
        itself.
        """
        places = torch.arange(at, at + tokens.shape[1], device=tokens.device)
        dim = self.embedding.embedding_dim
        x = self.embedding(tokens) * math.sqrt(dim) + waves(places, dim)  # (B, L, D)
        present: Cache = []
        for i, block in enumerate(self.blocks):
            x, seen = block(x, memory[i], past[i] if past else None)  # (B, L, D)
            present.append(seen)
        return self.head(self.norm(x)), present

    def _fitting(self, pictures: Tensor) -> Tensor:
        """Return `pictures`, or raise an error that names the key, which the error of a later layer would not."""
        if pictures.dim() != 4 or pictures.shape[1] != self.channels or min(pictures.shape[2:]) < 8:
            raise ValueError(
                f"Captioner is built for pictures of {self.channels} channel(s) and at least 8 x 8 pixels, and the "
                f"batch has the shape {tuple(pictures.shape)} (B, C, H, W). Set model.channels to fit the data."
            )
        return pictures

    def _known(self, tokens: Tensor) -> Tensor:
        """Return `tokens`, or raise an error that names the keys; on a GPU the check does not synchronize."""
        known, found = self.embedding.num_embeddings, 0
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            found = int(tokens.max())
        if found >= known:
            raise ValueError(
                f"A caption has token {found}, and Captioner is built for {known} tokens (4 and its words). "
                "Give model.words and data.words the same words."
            )
        return tokens

    def _training_flops(self, size: Sequence[int]) -> int:
        """Return the FLOPs of forward and backward for one picture of `size` with a caption of `max_words`."""
        picture, tokens = torch.zeros(1, self.channels, *size), torch.full((1, self.max_words + 1), START)
        return counted_flops(self, picture, tokens)


class Encoder(nn.Module):
    """Three convolutions, the first with stride 2: pictures (B, C, H, W) to features (B, P, dim), P = H W / 64."""

    def __init__(self, channels: int, width: int, dim: int) -> None:
        super().__init__()
        self.features = three_convolutions(channels, width)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                # With PyTorch's default initialization the signal fades from layer to layer, and the network learned
                # much later: loss 1.77 instead of 1.00 after 500 steps (docs/log.md).
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.project = nn.Linear(4 * width, dim)
        self.norm = nn.LayerNorm(dim)
        self.dim = dim

    def forward(self, pictures: Tensor) -> Tensor:
        grid = self.features(pictures)  # (B, 4 width, H/8, W/8)
        rows, columns = (torch.arange(length, device=grid.device) for length in grid.shape[2:])
        # Half of the width encodes the row, half the column (Carion et al. 2020, arXiv:2005.12872).
        row = waves(rows, self.dim // 2)[:, None].expand(-1, len(columns), -1)
        column = waves(columns, self.dim // 2)[None].expand(len(rows), -1, -1)
        x = self.project(grid.flatten(2).transpose(1, 2))  # (B, P, dim)
        return self.norm(x) + torch.cat([row, column], 2).flatten(0, 1)


class Block(nn.Module):
    """A decoder layer: self-attention over the preceding words, attention to the picture, feed-forward network."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.read, self.look = Attention(dim, heads), Attention(dim, heads)
        self.think = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = self.norms[0](x)
        keys, values = self.read.keys_values(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.read(y, keys, values, causal=past is None)
        x = x + self.look(self.norms[1](x), *memory)
        return x + self.think(self.norms[2](x)), (keys, values)


class Attention(nn.Module):
    """Scaled dot-product attention with several heads: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values  # (B, heads, L, dim / heads) each

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
        queries = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, dim / heads)
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


def waves(places: Tensor, dim: int) -> Tensor:
    """Return sines and cosines of positions (L,): (L, dim), Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, dim, 2, device=places.device) * (-math.log(10_000) / dim))  # (dim / 2,)
    angles = places[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
