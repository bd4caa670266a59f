"""Price forecasts: quantiles of the log-return over the next days.

A batch is a mapping, as `models.prices_data.Windows` describes it: `x` (B, T, C) features of the last T rows, `base`
(B, H, Q) quantiles of a simple baseline, `y` (B, H) the actual log-returns, and further entries for plots and prices.
Losses are in percent: 100 times those of the log-returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
SHOWN = 6  # windows in the plot


def pinball(quantiles: Tensor, y: Tensor, levels: Tensor) -> Tensor:
    """Return the pinball loss of forecasts (…, Q) at levels (Q,) for actual values y (…): (…, Q), each at least 0.

    Its mean is smallest at the true quantiles (Koenker and Bassett 1978, doi:10.2307/1913643).
    """
    error = y.unsqueeze(-1) - quantiles
    return torch.maximum(levels * error, (levels - 1) * error)


class PatchTransformer(nn.Module):
    """Predicts the width of the next days' distribution relative to `base`, by a Transformer over patches of days.

    Patches of consecutive rows are the tokens, as in PatchTST (Nie et al. 2023, arXiv:2211.14730); blocks are
    pre-norm (Xiong et al. 2020, arXiv:2002.04745). The last token and, past the Transformer, the last row (a linear
    model of volatilities over several spans, HAR: Corsi 2009, doi:10.1093/jjfinec/nbp001) give a level and a slope
    over the logarithm of the horizon, whose exponential multiplies `base`. So it starts as `base`, and its quantiles
    never cross if those of `base` do not. Twenty years of two indices are little data: a network that also shifts the
    quantiles, or predicts each separately, overfits (docs/log.md has the figures).
    """

    levels: Tensor
    shape: Tensor

    def __init__(
        self,
        quantiles: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95),
        horizons: int = 20,
        context: int = 128,
        channels: int = 10,
        patch: int = 8,
        width: int = 16,
        depth: int = 1,
        heads: int = 2,
        dropout: float = 0.6,
    ) -> None:
        """context, channels: T and C of `x`. patch: rows per token; divides the context. width: of a token."""
        super().__init__()
        if patch < 1 or context % patch or width % heads:
            raise ValueError(
                f"model.context={context}, patch={patch}, width={width}, heads={heads}: the patch must divide the "
                "context, and the number of heads the width."
            )
        self.context, self.channels, self.patch = context, channels, patch
        tokens = context // patch
        self.embed = nn.Linear(patch * channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 2)
        self.shortcut = nn.Linear(channels, 2, bias=False)
        for layer in (self.head, self.shortcut):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.bias)
        days = torch.arange(1, horizons + 1).log()
        slope = days / days[-1] if horizons > 1 else days
        self.register_buffer("levels", torch.tensor(list(quantiles), dtype=torch.float32), persistent=False)  # (Q,)
        self.register_buffer("shape", torch.stack([torch.ones(horizons), slope]), persistent=False)  # (2, H)
        weights = patch * channels * width + depth * 12 * width**2  # of the linear layers, each used once per token
        attention = depth * 2 * tokens * width  # products of a token with all others, twice
        # Two operations per multiplication; the backward pass costs twice the forward pass.
        self.flops_per_sample = 3 * 2 * (tokens * (weights + attention) + 2 * (width + channels))

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """x (B, T, C), base (B, H, Q) -> quantiles of the log-return (B, H, Q)."""
        tokens = self.embed(x.unflatten(1, (-1, self.patch)).flatten(2)) + self.position  # (B, T/patch, width)
        tokens = self.norm(self.blocks(self.dropout(tokens)))
        wider = self.head(self.dropout(tokens[:, -1])) + self.shortcut(x[:, -1])  # (B, 2): level and slope
        return base * (wider @ self.shape).exp().unsqueeze(-1)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": 100 * pinball(self._quantiles(batch), batch["y"], self.levels)}  # (B, H, Q)

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, those of both baselines, and the errors of the median and of no change (persistence)."""
        y, quantiles = batch["y"], self._quantiles(batch)
        low, middle, high = 0, int((self.levels - 0.5).abs().argmin()), -1
        return {
            "loss": 100 * pinball(quantiles, y, self.levels),  # (B, H, Q)
            "ewma": 100 * pinball(batch["base"], y, self.levels),
            "constant": 100 * pinball(batch["constant"], y, self.levels),
            "median_error": 100 * (y - quantiles[..., middle]).abs(),  # (B, H)
            "persistence_error": 100 * y.abs(),
            "inside": ((y >= quantiles[..., low]) & (y <= quantiles[..., high])).float(),  # of the widest band
        }

    def summarize(self, totals: Mapping[str, tuple[Tensor, float]]) -> dict[str, float]:
        """Return the ratio of the loss to each baseline's, on the same held-out values."""
        loss = totals["loss"][0]
        return {f"ratio_{name}": float(loss / totals[name][0]) for name in ("ewma", "constant")}

    def predict_step(self, batch: Batch) -> list[dict[str, Any]]:
        """Return for each window its last date and price, and by quantile the prices 1..H rows later."""
        ordered = self._quantiles(batch).double().sort(-1).values  # sorts quantiles that cross
        prices = batch["close"].double()[:, None, None] * ordered.exp()  # (B, H, Q)
        levels = [f"{level:g}" for level in self.levels.tolist()]
        return [
            {
                "date": _date(time),
                "price": close,
                "horizons": list(range(1, prices.shape[1] + 1)),
                "quantiles": dict(
                    zip(levels, [[float(f"{v:.7g}") for v in row] for row in one.T.tolist()], strict=True)
                ),
            }
            for time, close, one in zip(batch["time"].tolist(), batch["close"].tolist(), prices, strict=True)
        ]

    def examples(self, batch: Batch) -> dict[str, Any]:
        """Plot a few windows: the past, the bands between pairs of quantiles, the median, and the actual prices."""
        from matplotlib.figure import Figure

        count = min(SHOWN, len(batch["x"]))
        chosen = torch.linspace(0, len(batch["x"]) - 1, count).round().long().to(batch["x"].device)
        some = {key: value[chosen] for key, value in batch.items()}
        ordered = self._quantiles(some).float().sort(-1).values.cpu()  # (n, H, Q)
        columns = min(3, count)
        rows = -(-count // columns)
        figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
        for n in range(count):
            _draw(
                figure.add_subplot(rows, columns, n + 1),
                {key: value[n].cpu() for key, value in some.items()},
                ordered[n],
            )
        figure.axes[0].legend(loc="upper left", fontsize="small", frameon=False)
        return {"forecasts": figure}

    def export_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["base"]

    def _quantiles(self, batch: Batch) -> Tensor:
        """Return `forward` of a batch, or raise an error that names the keys, which the error of a layer would not."""
        x, base = batch["x"], batch["base"]
        wanted = (self.context, self.channels), (self.shape.shape[1], len(self.levels))
        if (x.shape[1:], base.shape[1:]) != wanted:
            raise ValueError(
                f"The model is built for windows of {wanted[0][0]} rows and {wanted[0][1]} channels, {wanted[1][0]} "
                f"horizons and {wanted[1][1]} quantiles; the batch has x {tuple(x.shape)} and base "
                f"{tuple(base.shape)}. Set model.context, channels, horizons and quantiles to those of the data."
            )
        return self(x, base)


class Block(nn.Module):
    """Attention, then two linear layers, each with pre-norm and a residual connection. (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, d)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(self.norm2(x)))


def _draw(axes: Any, one: Mapping[str, Tensor], ordered: Tensor) -> None:
    """Plot one window with its forecast, ordered (H, Q), in prices."""
    close = float(one["close"])
    horizons, count = ordered.shape
    days = range(0, horizons + 1)
    fan = close * torch.cat([torch.zeros(1, count), ordered]).exp()  # (H + 1, Q), from one point
    past = close * one["past"][-3 * horizons :].exp()
    axes.plot(range(1 - len(past), 1), past, color="0.3", linewidth=1)
    for inner in range(count // 2):
        label = "between the outer quantiles" if inner == 0 else None
        axes.fill_between(
            days, fan[:, inner], fan[:, count - 1 - inner], color="C0", alpha=0.2, linewidth=0, label=label
        )
    if count % 2:
        axes.plot(days, fan[:, count // 2], color="C0", linewidth=1.2, label="middle quantile")
    if "y" in one:
        came = close * torch.cat([torch.zeros(1), one["y"].float()]).exp()
        axes.plot(days, came, color="C3", linewidth=1.2, label="what came")
    axes.axvline(0, color="0.8", linewidth=0.8)
    axes.set_title(f"{_date(int(one['time']))}, {close:.6g}", fontsize="small")
    axes.tick_params(labelsize="small")


def _date(seconds: int) -> str:
    """Format a date as 2018-12-31, with the time if it is not midnight."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S").removesuffix(" 00:00:00")
