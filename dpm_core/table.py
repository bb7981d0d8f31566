"""Single vectorised passes over many slices: the only place that touches parameters in bulk.

No pass here loops over structures or waits for the device. Large matrices on a CPU are read and
scaled by the rows that are asked for (:meth:`SliceTable.diagonals`), all others densely, where
multiplying by exactly one leaves every bit of an active structure as it was. Gathering and
scattering rows costs more than either (half of VGG16-BN's rows, on one core: 4.4 ms, by rows 2.4,
densely 3.3). What two passes need is read from memory once: a gradient's norm is taken right before
its product with the weights, and scaling begins with the matrix that was read last.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

LARGE = 1 << 16
"""From how many elements on :meth:`SliceTable.diagonals` pays: 0.15 million take 20 us by it and 60
without, 0.04 million 10 and 10."""


class SliceLike(Protocol):
    """What a table needs to know of a slice."""

    @property
    def parameter(self) -> Tensor:
        """The tensor that the slice is of."""

    @property
    def index(self) -> Tensor:
        """(K, m) positions along ``dim``."""

    @property
    def dim(self) -> int:
        """The dimension that ``index`` counts along."""


class SliceTable:
    """The slices of several structure groups, numbered as one run of structures.

    Structures are numbered through: those of the first group, then those of the second, and so
    on. A position along a slice's dimension is an *entry*; the entries of all slices form one
    vector, in which sums over a structure are gathers.

    Args:
        groups: for each group, its slices, on one device.

    Attributes:
        slices: all slices, in the table's own order: vectors last.
        size: number of structures.
        device: of all slices.
        dtype: in which sums are accumulated: float32, or wider where a slice is.
    """

    def __init__(self, groups: Iterable[Sequence[SliceLike]]) -> None:
        slices: list[SliceLike] = []
        first: list[int] = []
        total = 0
        members: list[tuple[int, list[int]]] = []
        for group in groups:
            members.append((total, list(range(len(slices), len(slices) + len(group)))))
            slices.extend(group)
            first.extend([total] * len(group))
            total += group[0].index.shape[0]
        self.size = total
        # Vectors go last, so that all of them take part as one concatenated tensor.
        self._order = sorted(range(len(slices)), key=lambda i: slices[i].parameter.dim() == 1)
        self._matrices = sum(s.parameter.dim() > 1 for s in slices)
        self.slices = [slices[i] for i in self._order]
        self._first = [first[i] for i in self._order]
        self._extents = [s.parameter.shape[s.dim] for s in self.slices]
        self._others = [[d for d in range(s.parameter.dim()) if d != s.dim] for s in self.slices]
        self.device = self.slices[0].parameter.device
        # Where the model has moved since the slices were made, their indices follow.
        self._index = [s.index.to(self.device) for s in self.slices]
        self._state = self._look()
        self.dtype = torch.float32
        for s in self.slices:
            self.dtype = torch.promote_types(self.dtype, s.parameter.dtype)
        # One factor per entry, filled anew in every step, and a view of it in each slice's shape.
        self._factors = torch.ones(sum(self._extents), dtype=self.dtype, device=self.device)
        self._factor_views = [
            part.view([-1 if d == s.dim else 1 for d in range(s.parameter.dim())])
            for part, s in zip(self._factors.split(self._extents), self.slices, strict=True)
        ]
        self._build_index(members)

    def _build_index(self, members: list[tuple[int, list[int]]]) -> None:
        starts = [0]
        for extent in self._extents:
            starts.append(starts[-1] + extent)
        place = {given: i for i, given in enumerate(self._order)}
        # Entry -> structure; entries that belong to nobody point past the end, at factor one.
        owner = torch.full((starts[-1],), self.size, dtype=torch.int64, device=self.device)
        # Structure -> entries. Structures of one group have equally many; groups with equally
        # many share a gather, so that nothing is padded and the order of summation is fixed.
        by_width: dict[int, list[tuple[int, Tensor]]] = {}
        for start, given in members:
            columns = []
            for i in (place[g] for g in given):
                index = self._index[i]
                entries = starts[i] + index
                numbers = torch.arange(index.shape[0], device=self.device) + start
                owner[entries.reshape(-1)] = numbers.repeat_interleave(index.shape[1])
                columns.append(entries)
            entries = torch.cat(columns, dim=1)
            by_width.setdefault(entries.shape[1], []).append((start, entries))
        self._entry_owner = owner
        self._gathers: list[Tensor] = []
        places: list[Tensor] = []
        for parts in by_width.values():
            self._gathers.append(torch.cat([entries for _, entries in parts]))
            places.extend(
                torch.arange(start, start + entries.shape[0], device=self.device)
                for start, entries in parts
            )
        self._back = torch.empty(self.size, dtype=torch.int64, device=self.device)
        self._back[torch.cat(places)] = torch.arange(self.size, device=self.device)

    def _look(self) -> list[object]:
        parameters = [s.parameter for s in self.slices]
        return [
            *[p.dtype for p in parameters],
            *[p.device for p in parameters],
            *[p.shape for p in parameters],
        ]

    def fits(self) -> bool:
        """Whether type, device and shape of every slice are what the table was built for.

        Another storage alone changes nothing here: values are looked up anew in every pass.
        """
        return self._state == self._look()

    def order(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``tensors``, given one per slice in the groups' order, in the table's order."""
        return [tensors[i] for i in self._order]

    def parameters(self) -> list[Tensor | None]:
        """The slices' parameters, detached, in the table's order."""
        return [s.parameter.detach() for s in self.slices]

    def gradients(self) -> list[Tensor | None]:
        """The slices' gradients, in the table's order; ``None`` where there is none."""
        return [s.parameter.grad for s in self.slices]

    def square_norms(
        self, tensors: Sequence[Tensor | None], diagonals: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Squared L2 norm of ``tensors`` over each structure, (size,), in ``dtype``.

        Args:
            tensors: one for each slice, in the table's order.
            diagonals: as :meth:`dots` takes them.
        """
        matrices = [self._norms(i, tensors[i], diagonals) for i in range(self._matrices)]
        return self._squares(matrices, tensors)

    def diagonals(self, structures: Tensor) -> list[Tensor | None]:
        """What :meth:`dots`, :meth:`square_norms` and :meth:`scale_` need to touch these rows only.

        The products of the rows of two matrices a and b are the diagonal of a b^T, and PyTorch
        computes single entries of such a product, each from its two rows. ``a * b`` would read all
        rows and write as many: for half of VGG16-BN's rows, 13 to 20 ms against 5 to 8, on one
        core.

        Args:
            structures: sorted int64 numbers on the host.

        Returns:
            For each matrix of the table the entries, sparse and of zeros, (extent, extent);
            ``None`` for those of which all rows are read.
        """
        return [self._diagonal(i, structures) for i in range(self._matrices)]

    def dots(
        self,
        left: Sequence[Tensor | None],
        right: Sequence[Tensor | None],
        diagonals: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Inner product of ``left`` and ``right`` over each structure, (size,), in ``dtype``.

        Args:
            left: a tensor for each slice, in the table's order.
            right: as many.
            diagonals: of the structures that are asked for; what is returned for others has no
                meaning. ``None``: of all.
        """
        matrices = [self._products(i, left[i], right[i], diagonals) for i in range(self._matrices)]
        return self._dots(matrices, left, right)

    def square_norms_and_dots(
        self,
        left: Sequence[Tensor | None],
        right: Sequence[Tensor | None],
        diagonals: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`square_norms` of ``right`` and :meth:`dots` of both, bit for bit, in one go."""
        norms, products = [], []
        for i in range(self._matrices):
            norms.append(self._norms(i, right[i], diagonals))
            products.append(self._products(i, left[i], right[i], diagonals))
        return self._squares(norms, right), self._dots(products, left, right)

    @torch.no_grad()
    def scale_(self, factors: Tensor, diagonals: Sequence[Tensor | None] | None = None) -> None:
        """Multiply structure k by ``factors[k]`` in place; ``factors`` is (size,).

        Args:
            factors: one for each structure.
            diagonals: of all structures whose factor is not one, and perhaps of others; ``None``:
                of all.
        """
        padded = torch.cat([factors.to(self.dtype), factors.new_ones(1, dtype=self.dtype)])
        torch.index_select(padded, 0, self._entry_owner, out=self._factors)
        dense = list(range(len(self.slices)))
        by_rows = [] if diagonals is None else list(enumerate(diagonals))
        for i, diagonal in reversed(by_rows):
            p = self.slices[i].parameter
            # A product is taken in the table's type, and rounded to the parameter's afterwards.
            if diagonal is None or p.dtype != self.dtype:
                continue
            if (matrix := _rows_in_memory(p)) is not None:
                rows = diagonal.col_indices()
                by = self._factor_views[i].reshape(-1, 1)[rows].expand(-1, matrix.shape[1])
                matrix.index_reduce_(0, rows, by, "prod")
                dense.remove(i)
        if dense:
            parameters = [self.slices[i].parameter for i in dense]
            torch._foreach_mul_(parameters, [self._factor_views[i] for i in dense])

    def positions(self, structures: Tensor) -> list[tuple[Tensor, int, Tensor]]:
        """(parameter, dim, positions) of ``structures`` for each slice that has any of them.

        Args:
            structures: sorted int64 numbers on the host.
        """
        places = []
        for i, s in enumerate(self.slices):
            rows = self._rows(i, structures)
            if rows.numel():
                # The parameter itself: a view would stay with a storage that is exchanged.
                places.append((s.parameter, s.dim, rows))
        return places

    def _rows(self, i: int, structures: Tensor) -> Tensor:
        """The positions of ``structures``, which are on the host, along slice ``i``."""
        local = structures - self._first[i]
        local = local[(local >= 0) & (local < self._index[i].shape[0])]
        return self._index[i][local.to(self.device, non_blocking=True)].reshape(-1)

    def _diagonal(self, i: int, structures: Tensor) -> Tensor | None:
        p, extent = self.slices[i].parameter, self._extents[i]
        served = p.dtype in (torch.float32, torch.float64) and p.device.type == "cpu"
        if self.slices[i].dim > 0 or p.numel() < LARGE or not served:
            return None
        rows = self._rows(i, structures).sort().values
        starts = torch.searchsorted(rows, torch.arange(extent + 1, device=p.device))
        entries = torch.zeros(rows.shape, dtype=p.dtype, device=p.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PyTorch calls this operation and the layout beta, each once in a process.
            one = entries.new_ones(1, 1)
            one.index_reduce_(0, starts[:1], one.clone(), "prod")
            return torch.sparse_csr_tensor(
                starts, rows, entries, (extent, extent), check_invariants=False
            )

    def _norms(self, i: int, t: Tensor | None, diagonals: Sequence[Tensor | None] | None) -> Tensor:
        """The norm at each position along slice ``i``."""
        if t is None:
            return self._zeros(i)
        # On the host a norm over leading dimensions goes by single elements: 10 times the time.
        leading = self.slices[i].dim > 0 and self.device.type == "cpu"
        if leading or (diagonals is not None and diagonals[i] is not None):
            return self._products(i, t, t, diagonals).sqrt()
        norms: Tensor = torch.linalg.vector_norm(t, dim=self._others[i], dtype=self._wide(t))
        return norms

    def _products(
        self,
        i: int,
        a: Tensor | None,
        b: Tensor | None,
        diagonals: Sequence[Tensor | None] | None,
    ) -> Tensor:
        """Sums of products at each position along slice ``i``."""
        if a is None or b is None:
            return self._zeros(i)
        # Products of half-precision numbers would lose what their sum is made of.
        wide = self._wide(a)
        if not a.dtype == b.dtype == wide:
            a, b = a.to(wide), b.to(wide)
        diagonal = None if diagonals is None else diagonals[i]
        if diagonal is not None:
            if not a.is_contiguous():  # channels_last is, in this order
                a, b = a.movedim(1, -1), b.movedim(1, -1)
            found: Tensor = torch.sparse.sampled_addmm(diagonal, a.flatten(1), b.flatten(1).T)
            values = found.values().to(self.dtype)
            return self._zeros(i).index_copy_(0, found.col_indices(), values)
        products, dim = a * b, self.slices[i].dim
        if 0 < dim < a.dim() - 1:  # one sum over what lies before and behind takes twice the time
            products = products.sum(self._others[i][:dim])
            return products.sum(list(range(1, products.dim()))).to(self.dtype)
        return products.sum(self._others[i]).to(self.dtype)

    def _squares(self, matrices: list[Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
        """Square norms of structures, of norms of the matrices' entries and the vectors."""
        return self._sum(torch.cat(matrices + self._vectors(tensors)).to(self.dtype).square())

    def _dots(
        self,
        matrices: list[Tensor],
        left: Sequence[Tensor | None],
        right: Sequence[Tensor | None],
    ) -> Tensor:
        """Products over structures, of those of the matrices' entries and the vectors."""
        vectors = []
        if self._matrices < len(self.slices):
            a, b = (torch.cat(self._vectors(side)).to(self.dtype) for side in (left, right))
            vectors = [a * b]
        return self._sum(torch.cat(matrices + vectors))

    def _vectors(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            self._zeros(i) if t is None else t
            for i, t in enumerate(tensors[self._matrices :], start=self._matrices)
        ]

    def _zeros(self, i: int) -> Tensor:
        return torch.zeros(self._extents[i], dtype=self.dtype, device=self.device)

    def _wide(self, t: Tensor) -> torch.dtype:
        return torch.promote_types(t.dtype, torch.float32)

    def _sum(self, entries: Tensor) -> Tensor:
        return torch.cat([entries[g].sum(1) for g in self._gathers])[self._back]


def _rows_in_memory(t: Tensor) -> Tensor | None:
    """A matrix of the same storage, with a row for each entry of the first dimension, if any is."""
    if not t.is_contiguous():  # channels_last is, in this order
        t = t.movedim(1, -1)
    return t.view(len(t), -1) if t.is_contiguous() else None


@torch.no_grad()
def zero_(positions: Iterable[tuple[Tensor, int, Tensor]]) -> None:
    """Write exact zeros at what :meth:`SliceTable.positions` gave.

    A product with zero would keep a NaN and make a negative zero.
    """
    for parameter, dim, rows in positions:
        parameter.index_fill_(dim, rows, 0)
