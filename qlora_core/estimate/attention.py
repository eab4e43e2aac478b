"""Attention of one layer: projections, norms of queries and keys, rotation, and the kernel's own tensors.

Stands for transformers' ``<Family>Attention.forward`` and, for packed rows, `qlora_core.train.packed_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

from qlora_core.estimate.architecture import Architecture, Layer
from qlora_core.estimate.operations import (
    FLOAT32,
    activate,
    add,
    cast,
    concatenate,
    copy,
    laid_out_anew,
    norm,
    part,
    scale,
    split,
)
from qlora_core.estimate.rows import Rows
from qlora_core.estimate.tape import Arrived, Gradients, Memory, Tape, Value

Project = Callable[[str, Value], Value]


def attend(
    tape: Tape,
    model: Architecture,
    layer: Layer,
    rows: Rows,
    hidden: Value,
    project: Project,
    turns: tuple[Memory, Memory],
    *,
    on_gpu: bool,
) -> Value:
    """Give what attention adds to the residual.

    Args:
        tape: records.
        model: of the layer.
        layer: its window counts.
        rows: how the tokens lie.
        hidden: [tokens, hidden], normed.
        project: runs a linear layer of this layer by name.
        turns: cosine and sine of the positions.
        on_gpu: which kernels run.
    """
    query, key, value = _projected(tape, model, rows, hidden, project)
    query, key = _turned(tape, model, query, key, turns)
    mixed = _packed(tape, model, layer, rows, query, key, value, on_gpu=on_gpu)
    return project("self_attn.o_proj", mixed)


def _projected(
    tape: Tape, model: Architecture, rows: Rows, hidden: Value, project: Project
) -> tuple[Value, Value, Value]:
    if model.family.fused:
        qkv = project("self_attn.qkv_proj", hidden)
        tokens = rows.tokens
        query = part(tape, qkv, tokens * model.query_width)
        key = part(tape, qkv, tokens * model.kv_width)
        value = part(tape, qkv, tokens * model.kv_width)
        return query, key, value
    query = _by_heads(tape, model, rows, project("self_attn.q_proj", hidden), model.heads)
    key = _by_heads(tape, model, rows, project("self_attn.k_proj", hidden), model.kv_heads)
    value = project("self_attn.v_proj", hidden)
    return query, key, value


def _by_heads(tape: Tape, model: Architecture, rows: Rows, projected: Value, heads: int) -> Value:
    if model.family.qk_norm == "whole":
        return laid_out_anew(tape, norm(tape, projected, rows.tokens, model.family.norm))
    by_heads = laid_out_anew(tape, projected)
    del projected
    if model.family.qk_norm == "head":
        return norm(tape, by_heads, rows.tokens * heads, model.family.norm)
    return by_heads


def _turned(
    tape: Tape, model: Architecture, query: Value, key: Value, turns: tuple[Memory, Memory]
) -> tuple[Value, Value]:
    """``apply_rotary_pos_emb``: the values it is given live until both are turned."""
    turned = _turned_one(tape, model, query, turns)
    return turned, _turned_one(tape, model, key, turns)


def _turned_one(tape: Tape, model: Architecture, x: Value, turns: tuple[Memory, Memory]) -> Value:
    elements, rest = x.elements * model.rotary_dim // model.head_dim, None
    if _cuts(model):
        x, rest = part(tape, x, elements), part(tape, x, x.elements - elements)
    straight = scale(tape, x, turns[0])
    crossed = scale(tape, _half_turned(tape, x), turns[1])
    found = add(tape, straight, crossed)
    del straight, crossed
    return found if rest is None else concatenate(tape, [found, rest])


def _cuts(model: Architecture) -> bool:
    """Whether what is not turned is cut off and put back; Phi-3 does that even where it is nothing."""
    return model.family.fused or model.rotary_dim < model.head_dim


def _half_turned(tape: Tape, x: Value) -> Value:
    first, second = part(tape, x, x.elements // 2), part(tape, x, x.elements // 2)
    return concatenate(tape, [scale(tape, second), first])


def is_masked(layer: Layer, length: int) -> bool:
    """Whether a row of this length takes a mask: causal attention alone takes none."""
    return layer.window is not None and layer.window < length


def _packed(
    tape: Tape,
    model: Architecture,
    layer: Layer,
    rows: Rows,
    query: Value,
    key: Value,
    value: Value,
    *,
    on_gpu: bool,
) -> Value:
    """Attend by example in a packed row, over all of them at once in padded ones."""
    if rows.lengths is None:
        masked = is_masked(layer, rows.width)
        mixed = _kernel(
            tape, model, rows.count, rows.width, query, key, value, masked=masked, on_gpu=on_gpu
        )
        # The kernel lays its result out as the queries lie, and a concatenation lies by heads.
        return copy(tape, mixed) if _cuts(model) else mixed
    if on_gpu and not model.family.eager:
        return _kernel(tape, model, 1, rows.tokens, query, key, value, masked=False, on_gpu=True)
    widths = (model.query_width, model.kv_width, model.kv_width)
    parts = [
        split(tape, x, [length * width for length in rows.lengths])
        for x, width in zip((query, key, value), widths, strict=True)
    ]
    found: list[Value] = []
    for length, q, k, v in zip(rows.lengths, *parts, strict=True):
        masked = is_masked(layer, length)
        found.append(_kernel(tape, model, 1, length, q, k, v, masked=masked, on_gpu=on_gpu))
    return concatenate(tape, found)


def _kernel(
    tape: Tape,
    model: Architecture,
    count: int,
    length: int,
    query: Value,
    key: Value,
    value: Value,
    *,
    masked: bool,
    on_gpu: bool,
) -> Value:
    if model.family.eager:
        return _all_scores(
            tape, model, count, length, query, key, value, makes_mask=masked and count == 1
        )
    return _fused(tape, model, count, length, query, key, value, masked=masked, on_gpu=on_gpu)


def _fused(
    tape: Tape,
    model: Architecture,
    count: int,
    length: int,
    query: Value,
    key: Value,
    value: Value,
    *,
    masked: bool,
    on_gpu: bool,
) -> Value:
    """``scaled_dot_product_attention``: keeps what it is given, its result, and a number per row and head."""
    mask: list[Memory] = []
    if masked:
        key, value = _repeated(tape, model, key), _repeated(tape, model, value)
        truths = tape.memory(length * length)
        mask = [tape.memory(count * length * length * query.itemsize)]
        del truths
    sizes = [one.nbytes for one in (query, key, value)]
    statistics = count * length * model.heads * FLOAT32
    widened = query.elements * FLOAT32 if on_gpu else 0

    def backward(_: Arrived) -> Gradients:
        # FlashAttention-2 sums the queries' gradients in float32, and those of keys by query head.
        summed = [tape.memory(widened + statistics)] if on_gpu else []
        grads = [tape.memory(nbytes) for nbytes in sizes]
        if on_gpu and sizes[1] < sizes[0]:
            summed += [tape.memory(sizes[0]), tape.memory(sizes[0])]
        summed.clear()
        return grads

    memory, logarithms = tape.memory(query.nbytes), tape.memory(statistics)
    kept = [query.memory, key.memory, value.memory, memory, logarithms, *mask]
    return tape.record(
        memory, query.elements, query.itemsize, [query, key, value], backward, saved=kept
    )


def _all_scores(
    tape: Tape,
    model: Architecture,
    count: int,
    length: int,
    query: Value,
    key: Value,
    value: Value,
    *,
    makes_mask: bool,
) -> Value:
    """``eager_attention_forward`` with scores that are bent: every score is there, several times."""
    size = query.itemsize
    scores = count * model.heads * length * length
    key, value = _repeated(tape, model, key), _repeated(tape, model, value)
    mask = tape.memory(length * length * size if makes_mask else 0)
    weights = _product(tape, query, key, scores)
    weights = scale(tape, weights)
    weights = scale(tape, weights)
    weights = activate(tape, weights, keeps_result=True)
    weights = scale(tape, weights)
    weights = _masked(tape, weights)
    weights = cast(tape, weights, FLOAT32)
    weights = activate(tape, weights, keeps_result=True)
    weights = cast(tape, weights, size)
    found = _product(tape, weights, value, query.elements)
    del mask
    return laid_out_anew(tape, found)


def _masked(tape: Tape, weights: Value) -> Value:
    memory = tape.memory(weights.nbytes)
    return tape.record(
        memory, weights.elements, weights.itemsize, [weights], lambda grad: [grad[0]]
    )


def _product(tape: Tape, a: Value, b: Value, elements: int) -> Value:
    """``a @ b``: keeps both."""
    sizes = (a.nbytes, b.nbytes)
    memory = tape.memory(elements * a.itemsize)
    return tape.record(
        memory, elements, a.itemsize, [a, b], lambda _: [tape.memory(one) for one in sizes],
        saved=[a.memory, b.memory],
    )  # fmt: skip


def _repeated(tape: Tape, model: Architecture, x: Value) -> Value:
    """``repeat_kv``: a copy for each head of queries."""
    times, nbytes = model.heads // model.kv_heads, x.nbytes
    if times == 1:
        return x
    memory = tape.memory(times * nbytes)
    return tape.record(memory, times * x.elements, x.itemsize, [x], lambda _: [tape.memory(nbytes)])
