"""Other ways to make a token table small, as drop-ins for `nn.Embedding` that train like ours.

Each peer fixes its codes and goes on training all else (code-books, scales, factors), which is stored as float16. Codes
are counted at their width in bits. All are fitted to vectors drawn by the same weights as ours, not to the bare table.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import faiss
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Peer(nn.Module):
    """A compressed table: `rows` decodes distinct tokens, `code_bits` is what their codes take."""

    code_bits: int

    @abstractmethod
    def rows(self, tokens: Tensor) -> Tensor:
        """Vectors of the tokens, (N,) -> (N, d)."""

    def forward(self, input: Tensor) -> Tensor:
        tokens, place = torch.unique(input, return_inverse=True)
        return F.embedding(place, self.rows(tokens))

    def stored_bytes(self) -> int:
        """Bytes of codes and of all that is trained, as float16."""
        return math.ceil(self.code_bits / 8) + 2 * sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def finish(self) -> None:
        """Round what was trained to how it is stored."""
        for parameter in self.parameters():
            parameter.copy_(parameter.to(torch.float16))


class UniformRows(Peer):
    """`x_w = s_w (q_w - (2^b - 1) / 2)` with the clipping of least error in each row."""

    def __init__(self, table: Tensor, bits: int) -> None:
        super().__init__()
        levels = 2**bits - 1
        self.code_bits, self.middle = table.numel() * bits, levels / 2
        peak = 2 * table.abs().amax(1, keepdim=True) / levels
        best_scale, least_error = peak, torch.full_like(peak, torch.inf)
        for clip in torch.linspace(0.2, 1, 33):
            error = (self._decoded(self._codes(table, clip * peak), clip * peak) - table).square().sum(1, keepdim=True)
            best_scale = torch.where(error < least_error, clip * peak, best_scale)
            least_error = torch.minimum(error, least_error)
        self.register_buffer("codes", self._codes(table, best_scale).to(torch.uint8))
        self.scale = nn.Parameter(best_scale)

    def _codes(self, table: Tensor, scale: Tensor) -> Tensor:
        return (table / scale + self.middle).round().clamp(0, 2 * self.middle)

    def _decoded(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes - self.middle) * scale

    def rows(self, tokens: Tensor) -> Tensor:
        return self._decoded(self.codes[tokens], self.scale[tokens])


class ProductQuantized(Peer):
    """M sub-vectors, each the nearest of K centroids; with `rotate`, after a learned rotation (Ge et al. 2013)."""

    def __init__(self, table: Tensor, sample: Tensor, books: int, bits: int, rotate: bool) -> None:
        super().__init__()
        self.code_bits, dim = len(table) * books * bits, table.shape[1]
        rotation = None
        if rotate:
            transform = faiss.OPQMatrix(dim, books)
            transform.pq = faiss.ProductQuantizer(dim, books, bits)
            transform.niter = 20
            transform.train(sample.numpy())
            rotation = torch.from_numpy(faiss.vector_to_array(transform.A).reshape(dim, dim).copy())
            table, sample = table @ rotation.T, sample @ rotation.T
        quantizer = faiss.ProductQuantizer(dim, books, bits)
        quantizer.train(sample.contiguous().numpy())
        centroids = torch.from_numpy(faiss.vector_to_array(quantizer.centroids).reshape(books, 2**bits, -1).copy())
        parts = table.view(len(table), books, -1).transpose(0, 1)
        codes = torch.stack(
            [torch.cdist(part, book).argmin(1) for part, book in zip(parts, centroids, strict=True)], dim=1
        )
        self.register_buffer("codes", codes)
        self.centroids = nn.Parameter(centroids)
        self.rotation = nn.Parameter(rotation) if rotate else None

    def rows(self, tokens: Tensor) -> Tensor:
        books = torch.arange(len(self.centroids), device=tokens.device)
        vectors = self.centroids[books, self.codes[tokens]].flatten(1)
        return vectors if self.rotation is None else vectors @ self.rotation


class HashedBits(Peer):
    """Signs of random (LSH) or learned (ITQ, Gong and Lazebnik 2011) projections; decoded by least squares."""

    def __init__(self, table: Tensor, weights: Tensor, sample: Tensor, bits: int, learned: bool) -> None:
        super().__init__()
        dim, self.code_bits = table.shape[1], len(table) * bits
        if learned:
            transform = faiss.ITQTransform(dim, bits, True)
        else:
            transform = faiss.RandomRotationMatrix(dim, bits)
            transform.init(0)
        mean = sample.mean(0)
        if learned:
            transform.train((sample - mean).numpy())
        codes = torch.from_numpy(transform.apply((table - mean).numpy())) > 0
        self.register_buffer("codes", codes)
        design = torch.cat([codes.float(), torch.ones(len(table), 1)], dim=1)
        weighted = design * weights[:, None]
        ridge = 1e-3 * weights.sum() * torch.eye(bits + 1)
        solution = torch.linalg.solve(weighted.T @ design + ridge, weighted.T @ table)
        self.vectors, self.bias = nn.Parameter(solution[:-1]), nn.Parameter(solution[-1])

    def rows(self, tokens: Tensor) -> Tensor:
        return self.codes[tokens].to(self.vectors.dtype) @ self.vectors + self.bias


class LowRank(Peer):
    """Truncated singular value decomposition; both factors train on."""

    code_bits = 0

    def __init__(self, table: Tensor, weights: Tensor, rank: int) -> None:
        super().__init__()
        second = (table * weights[:, None]).T @ table
        axes = torch.linalg.eigh(second)[1][:, -rank:]
        self.left, self.right = nn.Parameter(table @ axes), nn.Parameter(axes.T.contiguous())

    def rows(self, tokens: Tensor) -> Tensor:
        return self.left[tokens] @ self.right


class Compositional(Peer):
    """Sums of one vector from each of M books of K (Shu and Nakayama 2018, arXiv 1711.01068).

    The encoder and Gumbel-softmax of their section 3, trained on reconstruction.
    """

    STEPS, BATCH, LEARNING_RATE, TEMPERATURE = 3000, 512, 1e-3, 1.0

    def __init__(self, table: Tensor, weights: Tensor, books: int, bits: int) -> None:
        super().__init__()
        size, dim = 2**bits, table.shape[1]
        self.code_bits = len(table) * books * bits
        unit = table.std()
        hidden = nn.Sequential(nn.Linear(dim, books * size // 2), nn.Tanh(), nn.Linear(books * size // 2, books * size))
        vectors = nn.Parameter(torch.randn(books * size, dim) / books**0.5)

        def logits(x: Tensor) -> Tensor:
            return F.softplus(hidden(x)).add(1e-9).log().view(-1, books, size)

        optimizer = torch.optim.Adam([vectors, *hidden.parameters()], lr=self.LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=self.STEPS)
        for _ in range(self.STEPS):
            x = table[torch.multinomial(weights, self.BATCH, replacement=True)] / unit
            choice = F.gumbel_softmax(logits(x), tau=self.TEMPERATURE)
            loss = F.mse_loss(choice.flatten(1) @ vectors, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            codes = torch.cat([logits(block / unit).argmax(2) for block in table.split(4096)])
        self.register_buffer("codes", codes + size * torch.arange(books))
        self.vectors = nn.Parameter(vectors.detach() * unit)

    def rows(self, tokens: Tensor) -> Tensor:
        return F.embedding(self.codes[tokens], self.vectors).sum(1)


class Trimmed(Peer):
    """The rows of the most frequent tokens, trained on, then rounded to 8 bits an entry and a scale a row.

    All other tokens share one row, as the unknown ones of a smaller tokenizer do.
    """

    code_bits = 0

    def __init__(self, table: Tensor, counts: Tensor, kept: int) -> None:
        super().__init__()
        kept_tokens = counts.argsort(descending=True, stable=True)[:kept]
        place = torch.full((len(table),), kept)
        place[kept_tokens] = torch.arange(kept)
        rest = counts.to(table.dtype).clamp_min(0.5)
        rest[kept_tokens] = 0
        shared = (rest @ table / rest.sum().clamp_min(1e-9))[None]
        self.register_buffer("place", place)
        self.vectors = nn.Parameter(torch.cat([table[kept_tokens], shared]))

    def rows(self, tokens: Tensor) -> Tensor:
        return self.vectors[self.place[tokens]]

    def stored_bytes(self) -> int:
        return self.vectors.numel() + 2 * len(self.vectors)

    @torch.no_grad()
    def finish(self) -> None:
        scale = (self.vectors.abs().amax(1, keepdim=True) / 127).to(torch.float16).float().clamp_min(1e-12)
        self.vectors.copy_((self.vectors / scale).round().clamp(-127, 127) * scale)
