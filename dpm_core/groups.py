"""Structure groups: which elements of which parameters make up a structure.

A **structure** is the smallest thing removed whole, such as an output channel with all that
produces it. A **slice** is one parameter's share in the structures of a group. A **structure
group** holds K structures that share the same slices' tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import GroupError
from .table import SliceTable


@dataclass(frozen=True, eq=False)
class Slice:
    """One parameter's share in the K structures of a group.

    Attributes:
        parameter: the tensor the optimizer trains.
        index: int64 tensor, (K,) or (K, m): row k lists the positions along ``dim`` that belong
            to structure k. m above 1 is for several positions per structure, as in a layer behind
            a flatten or in a grouped convolution.
        dim: the dimension of ``parameter`` that ``index`` counts along.
        batch_norm: True for the weight or bias of a BatchNorm. Conv rows in front of a BatchNorm
            can have any scale, so this part alone fixes how strong the output is.
        name: how messages call the slice, best the parameter's name in its model.

    Raises:
        GroupError: index or dim do not fit the parameter, or the parameter is of a kind that
            cannot be decayed in place (sharded, sparse, complex, integer, meta, expanded).
    """

    parameter: Tensor
    index: Tensor
    dim: int = 0
    batch_norm: bool = False
    name: str = "parameter"
    _shape: torch.Size = field(default=torch.Size(), init=False, repr=False)

    def __post_init__(self) -> None:
        p = self.parameter
        _require_plain_storage(p, self.name)
        if not 0 <= self.dim < p.dim():
            raise GroupError(
                f"slice {self.name!r}: dim {self.dim} is outside a parameter of shape "
                f"{tuple(p.shape)}; give a dim of 0 to {p.dim() - 1}"
            )
        index = _rows(self.index, f"slice {self.name!r}").to(p.device)
        extent = p.shape[self.dim]
        if int(index.min()) < 0 or int(index.max()) >= extent:
            raise GroupError(
                f"slice {self.name!r}: index reaches from {int(index.min())} to "
                f"{int(index.max())}, but dim {self.dim} has positions 0 to {extent - 1}"
            )
        if index.unique().numel() != index.numel():
            raise GroupError(
                f"slice {self.name!r}: a position along dim {self.dim} is listed twice; each "
                "element belongs to one structure only"
            )
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "_shape", p.shape)

    @classmethod
    def whole(
        cls,
        parameter: Tensor,
        dim: int = 0,
        *,
        per_structure: int = 1,
        batch_norm: bool = False,
        name: str = "parameter",
    ) -> Slice:
        """All positions along ``dim``, ``per_structure`` consecutive ones to each structure."""
        _require_plain_storage(parameter, name)
        extent = parameter.shape[dim] if 0 <= dim < parameter.dim() else 0
        if per_structure < 1 or extent == 0 or extent % per_structure:
            raise GroupError(
                f"slice {name!r}: {extent} positions along dim {dim} do not split into structures "
                f"of {per_structure}"
            )
        index = torch.arange(extent, device=parameter.device).view(-1, per_structure)
        return cls(parameter, index, dim, batch_norm, name)


@dataclass(frozen=True, eq=False)
class Owner:
    """The module whose output carries the structures of a group, for a hearing.

    Attributes:
        module: best the BatchNorm behind the layer, else the layer itself. Its output is one
            tensor with the batch in dimension 0.
        index: int64 tensor, (K,) or (K, m): the output positions of each structure.
        dim: the dimension of the output that ``index`` counts along; may count from the end.

    Raises:
        GroupError: ``index`` is no list of positions.
    """

    module: nn.Module
    index: Tensor
    dim: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", _rows(self.index, f"owner {self.module}"))


class StructureGroup:
    """K structures that share the same slices' tensors.

    Args:
        name: unique among the groups of one :class:`~dpm_core.DecayPruning`; keys what is saved.
        slices: the parameters' shares; all with the same K.
        owners: where a hearing can gate the structures; may be empty where none is wanted.

    Raises:
        GroupError: no slices, slices of different K, or slices that overlap.
    """

    def __init__(self, name: str, slices: Iterable[Slice], owners: Iterable[Owner] = ()) -> None:
        self.name = name
        self.slices: tuple[Slice, ...] = tuple(slices)
        self.owners: tuple[Owner, ...] = tuple(owners)
        self._latest: SliceTable | None = None
        if not self.slices:
            raise GroupError(f"group {name!r} has no slices; give at least one")
        self.size = self.slices[0].index.shape[0]
        counts = [(s.name, s.index.shape[0]) for s in self.slices]
        counts += [(f"owner {i}", o.index.shape[0]) for i, o in enumerate(self.owners)]
        if len({count for _, count in counts}) != 1:
            listed = ", ".join(f"{what!r}: {count}" for what, count in counts)
            raise GroupError(
                f"group {name!r}: slices disagree on the number of structures ({listed}); every "
                "slice and owner needs one index row per structure"
            )
        require_disjoint([self])

    @property
    def effect_slices(self) -> tuple[Slice, ...]:
        """The part that fixes the structures' effect: BatchNorm's, or all where there is none."""
        return tuple(s for s in self.slices if s.batch_norm) or self.slices

    @property
    def _table(self) -> SliceTable:
        if self._latest is None or not self._latest.fits():
            require_fit([self])
            self._latest = SliceTable([self.slices])
        return self._latest

    def norms(self) -> Tensor:
        """L2 norm of each structure, (K,), accumulated in at least float32."""
        table = self._table
        return table.square_norms(table.parameters()).sqrt()

    def dots(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Inner product of each structure with ``tensors``, one per slice, (K,).

        ``None`` stands for zeros, as a missing gradient does.
        """
        table = self._table
        return table.dots(table.parameters(), table.order(tensors))

    def scale_(self, factors: Tensor) -> None:
        """Multiply structure k by ``factors[k]``, in place; ``factors`` is (K,)."""
        self._table.scale_(factors)

    def nonzero(self, structures: Tensor) -> Tensor:
        """Which of some structures have an element that is not zero, (n,) bool on the host.

        Args:
            structures: their numbers, int64 (n,).

        Raises:
            GroupError: as :func:`require_fit`.
        """
        require_fit([self])
        left = torch.zeros(structures.numel(), dtype=torch.bool, device="cpu")
        for s in self.slices:
            rows = s.index[structures.to(s.index.device)].to(s.parameter.device)
            values = s.parameter.detach().index_select(s.dim, rows.reshape(-1)).movedim(s.dim, 0)
            left |= (values != 0).reshape(structures.numel(), -1).any(1).cpu()
        return left

    def __repr__(self) -> str:
        names = ", ".join(s.name for s in self.slices)
        return f"StructureGroup({self.name!r}, {self.size} structures, slices: {names})"


def require_disjoint(groups: Iterable[StructureGroup]) -> None:
    """Refuse groups in which one element belongs to two structures.

    Raises:
        GroupError: two slices share elements, a parameter is sliced along two dimensions, or two
            parameters share storage.
    """
    by_storage: dict[int, list[tuple[Slice, str, Tensor]]] = {}
    for group in groups:
        for s in group.slices:
            storage = s.parameter.untyped_storage().data_ptr()
            here = f"{s.name!r} of group {group.name!r}"
            taken = torch.zeros(s.parameter.shape[s.dim], dtype=torch.bool, device="cpu")
            taken[s.index.reshape(-1).cpu()] = True
            for other, there, taken_before in by_storage.get(storage, []):
                if other.parameter is not s.parameter:
                    raise GroupError(
                        f"{here} shares storage with {there}, but is another tensor; one of them "
                        "would be decayed behind the other's back. Give tied parameters as one"
                    )
                if other.dim != s.dim:
                    raise GroupError(
                        f"{here} slices dim {s.dim} and {there} dim {other.dim} of one parameter, "
                        "so they overlap; decay it along one of the two"
                    )
                if bool((taken & taken_before).any()):
                    both = int((taken & taken_before).nonzero()[0])
                    raise GroupError(
                        f"{here} and {there} overlap (position {both} of dim {s.dim} is in both); "
                        "an element can follow one decay only"
                    )
            by_storage.setdefault(storage, []).append((s, here, taken))


def require_fit(groups: Iterable[StructureGroup]) -> torch.device:
    """Refuse parameters that are no longer what the groups were made from.

    Another storage, type or device is no obstacle: the values are the same ones.

    Returns:
        The device of all groups.

    Raises:
        GroupError: a parameter has another shape, is of a kind that cannot be decayed any more, or
            the groups lie on several devices.
    """
    devices = set()
    for group in groups:
        for s in group.slices:
            _require_plain_storage(s.parameter, s.name)
            if s.parameter.shape != s._shape:
                raise GroupError(
                    f"{s.name!r} of group {group.name!r} has shape {tuple(s.parameter.shape)}, and "
                    f"had {tuple(s._shape)} when the group was made; its structures are not those "
                    "any more. Call detach(), and make new groups of the model as it is"
                )
            devices.add(s.parameter.device)
    if len(devices) > 1:
        raise GroupError(
            f"the groups lie on several devices ({sorted(map(str, devices))}); make one "
            "DecayPruning per device"
        )
    return devices.pop()


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds only a part of a parameter, or one that several were flattened into.

    DTensors and ShardedTensors are, and all that FSDP manages: FlatParameters, and the parameters
    that are left as views of them (``use_orig_params=True``), which are plain but for this mark.
    """
    marks = ("placements", "local_shards", "_fsdp_flattened")
    return any(hasattr(parameter, mark) for mark in marks)


def _rows(index: Tensor, what: str) -> Tensor:
    """An index as int64 (K, m).

    Raises:
        GroupError: it is no list of positions.
    """
    if not isinstance(index, Tensor):
        index = torch.as_tensor(index, device="cpu")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise GroupError(f"{what}: index is {index.dtype}; give integer positions, not a mask")
    if index.dim() not in (1, 2) or index.numel() == 0:
        raise GroupError(
            f"{what}: index has shape {tuple(index.shape)}; give (K,) or (K, m) with at least one "
            "structure"
        )
    return index.detach().to(torch.int64).reshape(index.shape[0], -1)


def _require_plain_storage(p: Tensor, name: str) -> None:
    """Refuse every kind of tensor whose elements cannot be scaled in place by position."""
    if not isinstance(p, Tensor):
        raise GroupError(f"slice {name!r}: {type(p).__name__} is not a tensor")
    if is_sharded(p):
        raise GroupError(
            f"slice {name!r} is sharded over processes ({type(p).__name__}, as FSDP and tensor "
            "parallelism make them): a structure's norm is known in none of them. Train with "
            "DistributedDataParallel, or prune before the model is sharded"
        )
    if p.is_meta or p.layout != torch.strided:
        kind = "on the meta device" if p.is_meta else f"of layout {p.layout}"
        raise GroupError(f"slice {name!r} is {kind}; give a dense parameter that holds its values")
    if not p.is_floating_point():
        raise GroupError(f"slice {name!r} is {p.dtype}; only real floating-point values decay")
    if p.numel() == 0 or p.dim() == 0:
        raise GroupError(f"slice {name!r} has shape {tuple(p.shape)}; it holds no structures")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise GroupError(
            f"slice {name!r} is an expanded view, its elements share memory; give a parameter "
            "with storage of its own (parameter.clone())"
        )
