"""Text to the next token: a GPT, from a million parameters to the 124 million of GPT-2.

A decoder-only Transformer (Radford et al. 2019, "Language models are unsupervised multitask learners") with later
improvements: rotary positions (Su et al. 2021, RoFormer, arXiv:2104.09864), root-mean-square normalization before each
branch (Zhang and Sennrich 2019, arXiv:1910.07467) and on queries and keys (Henry et al. 2020,
arXiv:2010.04245), squared ReLU (So et al. 2021, Primer, arXiv:2109.08668), no biases, and no dropout: the contribution
of a token to the loss does not depend on how a batch is split over workers.

Shapes: B sequences, T tokens, V tokens in the vocabulary, C the width, H heads of D = C / H numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNCOUNTED = -100  # a target that is not predicted; the index that cross_entropy ignores
BYTES = 256  # size of the byte vocabulary


class GPT(nn.Module):
    """Predicts each token from the preceding ones.

    A batch is a pair x (B, T), y (B, T) int64: y[b, t] is the token that follows x[b, t], or UNCOUNTED. The loss is the
    mean over tokens. A vocabulary of 256 means bytes, and prompts and continuations are UTF-8.

    Args:
        vocabulary: V; token ids are 0 to V - 1.
        context: maximum number of context tokens. T may be smaller.
        width: C, the size of a token's representation between layers.
        tied: whether embedding and output layer share one matrix (Press and Wolf 2016, arXiv:1608.05859).
        generate: tokens that `predict_step` and `examples` add to a prompt.
        temperature: 0 selects the most likely token each time, 1 samples from the unmodified distribution.
        top_k: sample only from this many most likely tokens.

    Raises:
        ValueError: incompatible sizes.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        vocabulary: int = BYTES,
        context: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        tied: bool = False,
        generate: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "layers": layers, "heads": heads}
        for name, size in (*sizes.items(), ("generate", generate), ("top_k", top_k)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1.")
        if width % heads or width // heads % 2:
            raise ValueError(
                f"width={width}, heads={heads}: the width must be a multiple of the heads, and a head's share of it "
                "even, because rotary positions rotate pairs of numbers."
            )
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: must not be negative.")
        self.vocabulary, self.context, self.width = vocabulary, context, width
        self.generate, self.temperature, self.top_k = generate, temperature, top_k

        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos, sin = rotations(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()
        if tied:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Initialize the weights. Every branch starts as zero (Zhang et al. 2019, Fixup, arXiv:1901.09321), which
        allows large first steps."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention.inputs, block.mlp.inputs):
                nn.init.normal_(layer.weight, std=self.width**-0.5)
            for layer in (block.attention.output, block.mlp.output):
                nn.init.zeros_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V)."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]  # (T, D/2)
        x = self.embedding(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin)  # (B, T, C)
        return self.head(self.norm(x))  # (B, T, V)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        x, y = batch
        logits = self(self._fitting(x))  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=UNCOUNTED, reduction="sum")
        return {"loss": (loss, (y != UNCOUNTED).sum())}

    def summarize(self, totals: Mapping[str, tuple[Tensor, float]]) -> dict[str, float]:
        """Convert the loss, nats per token, to the usual units: bits per byte, or perplexity for other tokens."""
        total, count = totals["loss"]
        loss = float(total) / count if count else math.nan
        if self.vocabulary == BYTES:
            return {"bits_per_byte": loss / math.log(2)}
        return {"perplexity": math.exp(min(loss, 700.0))}

    # ---- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def continuation(self, prompt: Tensor, tokens: int, seed: int = 0) -> Tensor:
        """Sample this many tokens after a prompt: prompt (T,) int64 with T >= 1 -> (tokens,) int64.

        The network reads the last `context` tokens, and computes all of them again for every sampled token: simple, and
        fast enough for samples.
        """
        if prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"A prompt is a row of at least one token; found the shape {tuple(prompt.shape)}.")
        generator = torch.Generator().manual_seed(seed)  # the same text for the same weights in every run
        row = prompt
        for _ in range(tokens):
            seen = row[-self.context :]
            logits = self(self._fitting(seen[None]))[0, -1].float()  # (V,)
            likeliest = logits.topk(min(self.top_k, self.vocabulary))
            if self.temperature == 0:
                chosen = likeliest.indices[:1]
            else:
                chances = (likeliest.values / self.temperature).softmax(0).cpu()
                chosen = likeliest.indices[torch.multinomial(chances, 1, generator=generator).to(row.device)]
            row = torch.cat([row, chosen])
        return row[len(prompt) :]

    def predict_step(self, batch: list[Tensor]) -> list[dict[str, Any]]:
        """Return the continuation of each prompt (T,), of any lengths: text if tokens are bytes, else token ids."""
        return [self._told(self.continuation(prompt, self.generate)) for prompt in batch]

    def _told(self, tokens: Tensor) -> dict[str, Any]:
        return {"continuation": text(tokens)} if self.vocabulary == BYTES else {"tokens": tokens.tolist()}

    def examples(self, batch: tuple[Tensor, Tensor]) -> dict[str, str]:
        """Return a continuation of the first half of the first sequence, as Markdown."""
        prompt = batch[0][0, : max(1, batch[0].shape[1] // 2)]
        tokens = self.continuation(prompt, self.generate)
        before, after = (text(row) if self.vocabulary == BYTES else str(row.tolist()) for row in (prompt, tokens))
        return {"continuation": f"{_quoted(before)}\n\ncontinues as\n\n{_quoted(after)}"}

    def export_inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (batch[0],)

    # ---- cost -------------------------------------------------------------------------------------------------------

    def flops_per_sample(self) -> int:
        """Return the floating-point operations of forward and backward for one sequence of `context` tokens.

        Per token 6 N + 12 L T C (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B): N is the number of weights
        in matrix products, without embeddings and the gains of normalization, and a layer's attention computes two
        products of T x T x C in each direction, counted in full although the causal mask hides half of them. A weight
        costs 2 operations forward, 2 for its gradient and 2 for its input's. Everything else is excluded, as is usual.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        products = sum(layer.in_features * layer.out_features for layer in layers)
        return self.context * (6 * products + 12 * len(self.blocks) * self.context * self.width)

    def _fitting(self, tokens: Tensor) -> Tensor:
        """Return `tokens`, or raise an error that names the keys, which the error of a later layer would not."""
        if tokens.dim() != 2 or tokens.shape[1] > self.context or tokens.is_floating_point():
            raise ValueError(
                f"GPT is built for integers (B, T) with at most {self.context} tokens in a row, and the batch has "
                f"the shape {tuple(tokens.shape)} of {tokens.dtype}. Set model.context and data.context to fit."
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and int(tokens.max()) >= self.vocabulary:
            raise ValueError(
                f"The batch holds the token {int(tokens.max())}, and the vocabulary ends at {self.vocabulary - 1}. Set "
                "model.vocabulary to that of the tokens."
            )
        return tokens


class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual connection: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Causal attention of several heads (Vaswani et al. 2017, arXiv:1706.03762): (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width, bias=False)  # queries, keys and values at once
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        q, k = (turn(F.rms_norm(each, each.shape[-1:]), cos, sin).type_as(v) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.output(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward network with a hidden width of 4 C: (B, T, C) -> (B, T, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 4 * width, bias=False)
        self.output = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.inputs(x)).square())


def rotations(length: int, size: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (length, size / 2) float32, of the rotation angles at each position."""
    speeds = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)  # (size/2,)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions: rotate pair (i, i + D/2) of x (…, T, D) by the angle of its position; cos and sin (T,
    D/2)."""
    left, right = x.chunk(2, -1)  # each (…, T, D/2)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def text(tokens: Tensor) -> str:
    """Decode a row of bytes (T,) as UTF-8."""
    return bytes(tokens.tolist()).decode("utf-8", "replace")


def _quoted(text: str) -> str:
    """Return `text` as a Markdown code block."""
    return "\n".join("    " + line for line in text.splitlines())
