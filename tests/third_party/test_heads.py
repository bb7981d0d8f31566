"""Attention heads in drawn forms: what is found, and what is left when some are removed.

A head that is removed is compared with the same network in which the output layer does not listen
to it. That takes nothing of what was found: which columns are a head's is known by construction.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dpm_core.third_party import dependency, heads, running
from dpm_core.third_party.groups import UnsupportedLayerError
from tests.support import rounding

WIDTH, LENGTH = 8, 5
EXAMPLE = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Form:
    """How an attention is written.

    Attributes:
        shared: heads of queries to one of keys and values.
        pairs: heads of keys and values.
        size: channels of a head.
        layout: of the layers: three; two, with keys and values in one; or one, part after part or
            head after head.
        product: fused, by softmax, or by softmax with heads and batch in one dimension.
        bare: the biases are parameters beside the layer, those of keys perhaps a buffer of zeros.
        table: what is added to the attention's scores, a column for each head.
        scale: a factor for each head's scores.
        norm: queries and keys are normalised, by a norm that all heads share.
        gate: the outputs are multiplied with a gate.
        number: the attribute in which the number of heads is kept, or none.
        width: whether the attention keeps the width of all its heads, and goes by it.
    """

    shared: int = 1
    pairs: int = 3
    size: int = 4
    layout: str = "three"
    product: str = "fused"
    bare: bool = False
    table: bool = False
    scale: bool = False
    norm: bool = False
    gate: bool = False
    number: str = "num_heads"
    width: bool = False

    @property
    def heads(self) -> int:
        return self.shared * self.pairs


class Attention(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.head_dim = form, form.size
        if form.number:
            setattr(self, form.number, form.heads)
        self.inner = form.heads * form.size
        queries, pairs = self.inner, form.pairs * form.size
        if form.layout == "three":
            self.q = nn.Linear(WIDTH, queries)
            self.k, self.v = nn.Linear(WIDTH, pairs), nn.Linear(WIDTH, pairs)
        elif form.layout == "two":
            self.q, self.kv = nn.Linear(WIDTH, queries), nn.Linear(WIDTH, 2 * pairs, not form.bare)
        else:
            self.qkv = nn.Linear(WIDTH, queries + 2 * pairs, bias=not form.bare)
        if form.bare:
            self.q_bias = nn.Parameter(torch.zeros(queries))
            self.v_bias = nn.Parameter(torch.zeros(pairs))
            if form.layout == "parts":
                self.register_buffer("k_bias", torch.zeros(pairs), persistent=False)
            else:
                self.k_bias = nn.Parameter(torch.zeros(pairs))
        if form.table:
            self.table = nn.Parameter(torch.zeros(LENGTH, form.heads))
        if form.scale:
            self.logit_scale = nn.Parameter(torch.ones(form.heads, 1, 1))
        if form.norm:
            self.q_norm, self.k_norm = nn.LayerNorm(form.size), nn.LayerNorm(form.size)
        if form.gate:
            self.gate = nn.Linear(WIDTH, queries)
        self.o = nn.Linear(queries, WIDTH)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, (batch, heads, length, size)."""
        form, d = self.form, self.head_dim
        if form.layout == "three":
            parts = [self.q(x), self.k(x), self.v(x)]
        elif form.layout == "two":
            q, pair = self.q(x), self.kv(x)
            if form.bare:
                q, pair = q + self.q_bias, pair + torch.cat([self.k_bias, self.v_bias])
            parts = [q, *pair.chunk(2, dim=-1)]
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias]) if form.bare else None
            y = F.linear(x, self.qkv.weight, bias) if form.bare else self.qkv(x)
            if form.layout == "heads":  # of each pair its queries, its keys and its values
                y = y.unflatten(-1, (-1, form.shared + 2, d))
                return [
                    p.flatten(2, 3).transpose(1, 2) for p in y.split([form.shared, 1, 1], dim=3)
                ]
            each = y.shape[-1] // (form.shared + 2)
            parts = list(y.split([form.shared * each, each, each], dim=-1))
        number = getattr(self, form.number) if form.number else -1
        count = [number, *[number // form.shared if form.number else -1] * 2]
        return [p.unflatten(-1, (n, d)).transpose(1, 2) for p, n in zip(parts, count, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        q, k, v = self.parts(x)
        if form.norm:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = (p.repeat_interleave(form.shared, dim=1) for p in (k, v))
        added = self.table.T[:, None] if form.table else None
        if form.scale:
            q = q * self.logit_scale
        if form.product == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        else:
            if form.product == "flat":
                shape = q.shape[:2]
                q, k, v = (p.flatten(0, 1) for p in (q, k, v))
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            if added is not None:
                scores = scores + (
                    added if form.product == "softmax" else added.repeat(len(x), 1, 1)
                )
            y = scores.softmax(-1) @ v
            if form.product == "flat":
                y = y.unflatten(0, shape)
        y = y.transpose(1, 2).reshape(*x.shape[:2], self.inner if form.width else -1)
        if form.gate:
            y = y * self.gate(x).sigmoid()
        return self.o(y)


class Network(nn.Module):
    """Two attentions, residual."""

    def __init__(self, form: Form, kind: Any = Attention) -> None:
        super().__init__()
        self.first, self.second = kind(form), kind(form)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.out(x + self.second(x))


def network(form: Form, kind: Any = Attention) -> Network:
    torch.manual_seed(0)
    model = Network(form, kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def deaf(model: Network, gone: dict[str, list[int]]) -> Network:
    """A copy whose output layers do not listen to some structures."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, structures in gone.items():
            form, o = getattr(silent, name).form, getattr(silent, name).o
            each = form.shared * form.size
            for k in structures:
                o.weight[:, k * each : (k + 1) * each] = 0
    return silent


def roots(form: Form) -> dict[str, str]:
    last = {"three": "v", "two": "kv"}.get(form.layout, "qkv")
    return {name: f"{name}.{last}" for name in ("first", "second")}


FORMS = st.builds(
    Form,
    shared=st.sampled_from([1, 2]),
    pairs=st.sampled_from([2, 3, 4]),
    size=st.sampled_from([3, 4]),
    layout=st.sampled_from(["three", "two", "parts", "heads"]),
    product=st.sampled_from(["fused", "softmax", "flat"]),
    bare=st.booleans(),
    table=st.booleans(),
    scale=st.booleans(),
    norm=st.booleans(),
    gate=st.booleans(),
    number=st.sampled_from(["num_heads", "n_head", "num_attention_heads"]),
    width=st.booleans(),
).filter(lambda form: not form.bare or form.layout in ("two", "parts"))


@settings(max_examples=30)
@given(form=FORMS, draw=st.randoms(use_true_random=False))
def test_heads_of_any_form_are_found_and_what_is_left_computes_the_same(form, draw):
    model = network(form)
    found = heads.find(model, EXAMPLE.double())
    assert found.refused == {}
    assert {h.root: h.count for h in found.heads} == dict.fromkeys(roots(form).values(), form.pairs)
    gone = {
        name: sorted(draw.sample(range(form.pairs), draw.randint(1, form.pairs - 1)))
        for name in roots(form)
    }
    plan = [
        (root, [c for k in gone[name] for c in found.of(root).members[k]])
        for name, root in roots(form).items()
    ]
    expected = deaf(model, gone)(EXAMPLE.double())
    dependency.cut(model, EXAMPLE.double(), plan)
    rounding.assert_exact(model(EXAMPLE.double()), expected)
    for name, structures in gone.items():
        left = form.pairs - len(structures)
        attention = getattr(model, name)
        assert (
            attention.o.in_features == attention.o.weight.shape[1] == left * form.shared * form.size
        )
        assert getattr(attention, form.number) == left * form.shared
        assert attention.head_dim == form.size
        if form.width:
            assert attention.inner == attention.o.in_features
    again = copy.deepcopy(model)
    rounding.assert_exact(again(EXAMPLE.double()), expected)


@pytest.mark.parametrize("layout", ["three", "heads"])
def test_what_decays_is_queries_keys_and_values_and_owners_are_the_values(layout):
    form = Form(shared=2, pairs=2, layout=layout, table=True)
    model = network(form)
    group = heads.find(model, EXAMPLE.double()).heads[0].group(model)
    assert group.heads
    names = {s.name: [len(i) for i in s.index] for s in group.shares}
    if layout == "three":
        expected = {"k": 4, "v": 4, "q": 8}
        assert group.owners == [(model.first.v, -1, [[0, 1, 2, 3], [4, 5, 6, 7]])]
    else:
        expected = {"qkv": 16}
        assert group.owners == [(model.first.qkv, -1, [[12, 13, 14, 15], [28, 29, 30, 31]])]
    sizes = {f"first.{n}.{w}": [s, s] for n, s in expected.items() for w in ("weight", "bias")}
    assert names == sizes | {"first.table": [2, 2]}


def test_a_removal_may_name_any_layer_of_the_heads():
    form = Form(shared=2, pairs=3)
    by_values, by_queries = network(form), network(form)
    found = heads.find(by_values, EXAMPLE.double())
    plan = [("first.v", found.of("first.v").members[1])]
    dependency.cut(by_values, EXAMPLE.double(), plan)
    both = [("first.q", found.of("first.q").members[1]), *plan]
    dependency.cut(by_queries, EXAMPLE.double(), both)
    assert by_queries.first.num_heads == 4
    values = by_values.state_dict()
    assert all(torch.equal(t, values[n]) for n, t in by_queries.state_dict().items())
    assert found.of("first.o") is None


@pytest.mark.parametrize("product", ["fused", "softmax"])
@pytest.mark.parametrize("layout", ["three", "parts", "heads"])
def test_from_a_single_position_nothing_is_found_that_is_not_so(layout, product):
    model = network(Form(layout=layout, product=product))
    for seed in range(8):  # queries and keys have no effect but for rounding
        draw = torch.Generator().manual_seed(seed)
        found = heads.find(model, torch.randn(1, 1, WIDTH, generator=draw).double())
        for one in found.heads:
            owned = [table for _, table in one.owners]
            for table in [*one.parts.values(), *owned]:
                assert len({len(positions) for positions in table}) == 1


def test_heads_that_go_one_removal_after_the_other():
    model = network(Form(shared=2, pairs=4, layout="heads", table=True))
    found = heads.find(model, EXAMPLE.double()).heads[0]
    expected = deaf(model, {"first": [1, 3]})(EXAMPLE.double())
    found.remove(model, [1])
    left = found.without([1])
    assert left.group(model).owners[0][2] == [
        list(range(k * 16 + 12, k * 16 + 16)) for k in range(3)
    ]
    left.remove(model, [2])
    rounding.assert_exact(model(EXAMPLE.double()), expected)
    assert left.without([2]) == replaced(heads.find(model, EXAMPLE.double()).heads[0], left)
    with pytest.raises(UnsupportedLayerError, match=r"leaves no head of 'first\.qkv'"):
        left.without([2]).remove(model, [0, 1])


def replaced(fresh: heads.Heads, old: heads.Heads) -> heads.Heads:
    """Heads with the parts in another's order, which says nothing."""
    return dataclasses.replace(fresh, parts={leaf: fresh.parts[leaf] for leaf in old.parts})


def test_gradients_go_with_what_is_left_and_what_is_frozen_stays_so():
    model = network(Form())
    model(EXAMPLE.double()).sum().backward()
    model.first.o.weight.requires_grad_(False)
    kept = model.first.q.weight.grad[4:].clone()
    heads.find(model, EXAMPLE.double()).heads[0].remove(model, [0])
    assert torch.equal(model.first.q.weight.grad, kept)
    assert not model.first.o.weight.requires_grad


# ---------------------------------------------------------------------- blocks beside the heads


class Blocked(Attention):
    """Attention within blocks of positions; ``at`` says where they lie as it is computed."""

    def __init__(self, form: Form, blocks: int, at: str) -> None:
        super().__init__(form)
        self.blocks, self.at = blocks, at

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        q, *pair = self.parts(x)
        parts = [q, *(p.repeat_interleave(form.shared, dim=1) for p in pair)]
        parts = [p.unflatten(2, (self.blocks, -1)) for p in parts]
        if "before" in self.at:
            parts = [p.transpose(1, 2) for p in parts]
        shape = parts[0].shape[:3]
        first, last = {"all": (0, 2), "two": (0, 1)}.get(self.at.split()[0], (0, 0))
        q, k, v = (p.flatten(first, last) for p in parts)
        if form.product == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1) @ v
        y = y.unflatten(0, shape[: last + 1]) if last else y
        y = y.transpose(1, 2) if "before" in self.at else y
        return self.o(y.flatten(2, 3).transpose(1, 2).reshape(*x.shape[:2], -1))


@settings(max_examples=30)
@given(
    form=st.builds(
        Form,
        shared=st.sampled_from([1, 2]),
        pairs=st.sampled_from([2, 3, 6]),
        size=st.sampled_from([4, 5]),
        layout=st.sampled_from(["three", "two", "parts", "heads"]),
        product=st.sampled_from(["fused", "softmax"]),
    ),
    blocks=st.sampled_from([2, 4, 8]),
    at=st.sampled_from([f"{n} {at}" for n in ("all", "two", "one") for at in ("before", "behind")]),
    draw=st.randoms(use_true_random=False),
)
def test_blocks_are_not_taken_for_heads(form, blocks, at, draw):
    model = network(form, functools.partial(Blocked, blocks=blocks, at=at))
    example = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    found = heads.find(model, example)
    assert {h.root: h.count for h in found.heads} == dict.fromkeys(roots(form).values(), form.pairs)
    gone = sorted(draw.sample(range(form.pairs), draw.randint(1, form.pairs - 1)))
    root = roots(form)["first"]
    expected = deaf(model, {"first": gone})(example)
    plan = [(root, [c for k in gone for c in found.of(root).members[k]])]
    dependency.cut(model, example, plan)
    rounding.assert_exact(model(example), expected)


@pytest.mark.parametrize("pairs", [1, 2])
def test_many_blocks_take_no_more_passes_than_few(pairs, monkeypatch):
    passes: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    counts = []
    for blocks in (2, 64):
        form = Form(pairs=pairs, size=64 // pairs, product="softmax")
        model = network(form, functools.partial(Blocked, blocks=blocks, at="two behind"))
        before = len(passes)
        heads.find(model, torch.randn(1, 64, WIDTH).double())
        counts.append(len(passes) - before)
    assert counts[0] == counts[1]


class Normed(Attention):
    """A BatchNorm and a ReLU stand between the heads and the layer that reads them."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.norm = nn.BatchNorm1d(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(self.norm(y.transpose(1, 2)).relu().transpose(1, 2))


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("length", [64, 256])
def test_no_channel_is_silent_behind_a_norm_and_a_relu(size, length):
    form = Form(size=size)
    model = network(form, Normed)
    draw = torch.Generator().manual_seed(1)
    example = torch.randn(1, length, WIDTH, generator=draw).double()
    found = heads.find(model, example)
    assert found.refused == {}
    assert [h.count for h in found.heads] == [3, 3]


# ---------------------------------------------------------------------- attentions that are tied


class Passed(nn.Module):
    """Two attentions with one table of positions, which the first passes on."""

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.a, self.b = Attention(Form()), Attention(Form())
        self.table, self.own = nn.Embedding(LENGTH, 3), own
        self.number_of_heads, self.out = 3, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(LENGTH)
        if self.own:
            bias = self.table(places).T[:, None]
        else:  # constant, but of as many heads
            bias = torch.zeros(self.a.num_heads, 1, LENGTH, dtype=x.dtype)
        for attention in (self.a, self.b):
            q, k, v = attention.parts(x)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + attention.o(y.transpose(1, 2).flatten(2))
        return self.out(x)


@pytest.mark.parametrize("own", [True, False])
def test_attentions_that_depend_on_one_another_lose_the_same_heads(own):
    torch.manual_seed(0)
    model = Passed(own).double()
    (found,) = heads.find(model, EXAMPLE.double()).heads
    assert (found.root, found.count) == ("a.v", 3)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for attention in (silent.a, silent.b):
            attention.o.weight[:, 4:8] = 0
    found.remove(model, [1])
    rounding.assert_exact(model(EXAMPLE.double()), silent(EXAMPLE.double()))
    assert (model.a.num_heads, model.b.num_heads) == (2, 2)
    assert model.table.embedding_dim == (2 if own else 3)


def test_an_attention_that_runs_several_times_is_one():
    class Twice(Network):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first(x + self.first(x)))

    torch.manual_seed(0)
    model = Twice(Form()).double()
    (found,) = heads.find(model, EXAMPLE.double()).heads
    expected = deaf(model, {"first": [0, 2]})(EXAMPLE.double())
    found.remove(model, [0, 2])
    rounding.assert_exact(model(EXAMPLE.double()), expected)


# ---------------------------------------------------------------------- numbers that are elsewhere


class Config:
    def __init__(self) -> None:
        self.num_attention_heads, self.hidden_size = 3, 12


class Configured(Attention):
    """Reads its number of heads from a configuration that all layers share."""

    shared = Config()

    def __init__(self, form: Form) -> None:
        super().__init__(dataclasses.replace(form, number=""))
        self.config = self.shared

    def parts(self, x: Tensor) -> list[Tensor]:
        count = self.config.num_attention_heads
        layers = (self.q, self.k, self.v)
        return [layer(x).unflatten(-1, (count, self.head_dim)).transpose(1, 2) for layer in layers]


def test_a_number_in_a_shared_configuration_becomes_the_layers_own():
    model = network(Form(), Configured)
    expected = deaf(model, {"first": [1]})(EXAMPLE.double())
    found = heads.find(model, EXAMPLE.double())
    found.of("first.v").remove(model, [1])
    rounding.assert_exact(model(EXAMPLE.double()), expected)
    assert model.first.config.num_attention_heads == 2
    assert model.second.config is Configured.shared
    assert vars(Configured.shared) == {"num_attention_heads": 3, "hidden_size": 12}


class Fixed(Attention):
    """Gives its outputs the width of its inputs, whatever is left."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(x.shape))


class Numbered(Attention):
    """Each head has a slope, by its number."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        slopes = torch.arange(1, q.shape[1] + 1, dtype=x.dtype)[:, None, None]
        far = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().to(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes * far)
        return self.o(y.transpose(1, 2).flatten(2))


class Mixed(Attention):
    """Normalises queries over all heads."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.over_all = nn.LayerNorm(form.heads * form.size)

    def parts(self, x: Tensor) -> list[Tensor]:
        layers = (self.over_all(self.q(x)), self.k(x), self.v(x))
        return [y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in layers]


@pytest.mark.parametrize(
    ("form", "kind", "why"),
    [
        (Form(pairs=2), Fixed, "takes their number, or that of their channels, from elsewhere"),
        (Form(), Numbered, "changes the outputs"),
        (Form(), Mixed, r"parts of 'first.over_all' \(LayerNorm\)"),
        (Form(pairs=1, shared=3), Attention, "all heads share the same values"),
    ],
)
def test_heads_that_cannot_go_are_refused_by_name(form, kind, why):
    found = heads.find(network(form, kind), EXAMPLE.double())
    assert found.heads == []
    assert set(found.refused) == {"first.v", "second.v"}
    assert found.layers >= {"first.q", "first.k", "first.v"}
    with pytest.raises(UnsupportedLayerError, match=why):
        raise UnsupportedLayerError(found.refused["first.v"])


def test_what_is_no_attention_has_no_heads():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x).softmax(-1))

    assert heads.find(Gated(), EXAMPLE) == heads.Found()
    assert heads.find(nn.ReLU(), EXAMPLE) == heads.Found()
    one = heads.find(network(Form(pairs=1)), EXAMPLE.double())
    assert (one.heads, one.refused, one.layers) == ([], {}, set())


def test_a_network_is_searched_once_and_its_values_do_not_matter(monkeypatch):
    model = network(Form(pairs=4, number="heads"))
    found = heads.find(model, EXAMPLE.double())
    assert len(found.heads) == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    searched = []
    monkeypatch.setattr(heads.search, "_Search", lambda *given: searched.append(given))
    assert heads.find(running.copied(model), EXAMPLE.double()) is found
    assert searched == []
    found.heads[0].remove(model, [0])
    monkeypatch.undo()
    assert [h.count for h in heads.find(model, EXAMPLE.double()).heads] == [3, 4]
