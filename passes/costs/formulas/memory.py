"""Ops that move bytes and compute nothing: copies, fills, lookups, writes at indices."""
from __future__ import annotations

import torch

from genie_dynamo.passes.costs.registry import Call, Work, bytes_of, formula
from genie_dynamo.passes.costs.sizes import Size, numel, shape_of, size_bytes, tensors_in, touched_bytes

NOTHING = Work(0, 0, 0)

VIEWS = frozenset({"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::_conj", "aten::_neg_view",
                   "aten::resolve_conj", "aten::resolve_neg", "aten::view_as"})
"""Ops that share memory with their argument though their schema does not say so."""


@formula("empty", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
         "aten::empty_strided", "aten::empty_permuted", "aten::resize_")
def allocate(call: Call) -> Work:
    return NOTHING


@formula("fill", "aten::full", "aten::full_like", "aten::zeros", "aten::zeros_like", "aten::ones", "aten::ones_like",
         "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::arange", "aten::eye", "aten::scalar_tensor",
         "aten::linspace", "aten::logspace", "aten::tril_indices", "aten::triu_indices", "aten::fill",
         "aten::fill_", "aten::zero_", "aten::zero", "aten::_efficientzerotensor", "aten::hann_window",
         "aten::hamming_window", "aten::kaiser_window", "aten::bartlett_window", "aten::blackman_window")
def fill(call: Call) -> Work:
    """Writes; what it is like is not looked at."""
    return call.work(0, read=0)


@formula("copy", "aten::clone", "aten::_to_copy", "aten::copy", "aten::copy_", "aten::contiguous", "aten::repeat",
         "aten::roll", "aten::flip", "aten::tril", "aten::triu", "aten::tril_", "aten::triu_", "aten::rot90",
         "aten::lift_fresh_copy", "aten::repeat_interleave", "aten::pixel_shuffle", "aten::pixel_unshuffle",
         "aten::channel_shuffle", "aten::to", "aten::im2col", "aten::col2im", "aten::view_copy",
         "aten::as_strided_copy", "aten::expand_copy", "aten::permute_copy", "aten::slice_copy", "aten::select_copy",
         "aten::t_copy", "aten::transpose_copy", "aten::squeeze_copy", "aten::unsqueeze_copy", "aten::alias_copy",
         "aten::split_copy", "aten::split_with_sizes_copy", "aten::unbind_copy", "aten::unfold_copy",
         "aten::diagonal_copy", "aten::_reshape_copy", "aten::block_diag", "aten::tensor")
def copy(call: Call) -> Work:
    """Reads as many elements as it writes, each where its source has it."""
    written = bytes_of(call.outputs)
    source = call.inputs[-1] if call.name in ("aten::copy", "aten::copy_") else (
        call.inputs[0] if call.inputs else None)
    if source is None:
        return call.work(0, read=0)
    return call.work(0, read=touched_bytes(source), written=written)


@formula("cat", "aten::cat", "aten::stack", "aten::hstack", "aten::vstack", "aten::_stack", "aten::constant_pad_nd",
         "aten::pad_sequence", "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
         "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d", "aten::_pad_circular",
         "aten::reflection_pad1d_backward", "aten::reflection_pad2d_backward", "aten::reflection_pad3d_backward",
         "aten::replication_pad1d_backward", "aten::replication_pad2d_backward",
         "aten::replication_pad3d_backward", "aten::_foreach_copy", "aten::_foreach_copy_")
def concatenate(call: Call) -> Work:
    return call.work(0)


@formula("scatter", "aten::slice_backward", "aten::select_backward", "aten::diagonal_backward",
         "aten::unfold_backward", "aten::value_selecting_reduction_backward")
def view_backward(call: Call) -> Work:
    """Zeros, and the gradient at its place."""
    return call.work(0, written=bytes_of(call.outputs) + touched_bytes(call.tensor(0)))


@formula("scatter", "aten::slice_scatter", "aten::select_scatter", "aten::diagonal_scatter",
         "aten::as_strided_scatter")
def write_into_a_copy(call: Call) -> Work:
    """A copy of the first argument, and the second written into it."""
    return call.work(0, written=bytes_of(call.outputs) + touched_bytes(call.tensor(1)))


@formula("index", "aten::index", "aten::_unsafe_index", "aten::gather", "aten::index_select", "aten::take",
         "aten::masked_select", "aten::nonzero", "aten::nonzero_static", "aten::_unsafe_masked_index",
         "aten::take_along_dim")
def lookup(call: Call) -> Work:
    """Of the source only what comes out is read; nonzero and masks are read whole."""
    source = call.tensor(0)
    whole = call.name in ("aten::nonzero", "aten::nonzero_static")
    indices = sum(touched_bytes(t) for t in call.inputs if t is not source)
    read = touched_bytes(source) if whole else call.out_numel * source.dtype.itemsize
    return call.work(0, read=read + indices)


@formula("embedding", "aten::embedding")
def embedding(call: Call) -> Work:
    """Reads the rows that are looked up, not the table."""
    indices = call.tensor(1)
    return call.work(0, read=bytes_of(call.outputs) + touched_bytes(indices))


@formula("embedding", "aten::_embedding_bag", "aten::embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Work:
    """Rows by index, added up bag by bag."""
    table, indices = call.tensor(0), call.tensor(1)
    elements = numel(indices) * shape_of(table)[-1]
    others = sum(touched_bytes(t) for t in call.inputs if t is not table)
    return call.work(elements, read=elements * table.dtype.itemsize + others)


@formula("embedding_backward", "aten::embedding_dense_backward", "aten::_embedding_bag_dense_backward")
def embedding_backward(call: Call) -> Work:
    """Zeros for the whole table, then every row of the gradient added to its row there."""
    rows = touched_bytes(call.tensor(0))
    return call.work(numel(call.tensor(0)), read=bytes_of(call.inputs) + rows, written=bytes_of(call.outputs) + rows)


_SCATTERS = ("scatter", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put", "_index_put_impl",
             "index_add", "index_copy", "index_fill", "index_reduce", "masked_scatter", "masked_scatter_backward",
             "put", "_unsafe_masked_index_put_accumulate")


def _values(call: Call) -> tuple[torch.Tensor, ...]:
    """All arguments but the tensor that is written to."""
    return tuple(t for t in call.inputs if t is not call.args[0])


def _written_bytes(call: Call) -> Size:
    """Bytes that the values take: of the source, or of one element per index where one number goes everywhere."""
    target = call.tensor(0)
    values = _values(call)
    sources = [t for t in values if t.dtype == target.dtype and t.dim()]
    if sources:
        return size_bytes(sources[-1])
    return numel(values[0]) * target.dtype.itemsize if values else size_bytes(target)


@formula("scatter", *(f"aten::{name}" for name in _SCATTERS))
def scatter(call: Call) -> Work:
    """A copy of the first argument, in which elements are then written: as many as there are values."""
    return call.work(0, written=bytes_of(call.outputs) + _written_bytes(call))


@formula("scatter", *(f"aten::{name}_" for name in _SCATTERS if name != "masked_scatter_backward"))
def scatter_in_place(call: Call) -> Work:
    """Touches only the elements that it writes."""
    return call.work(0, read=bytes_of(_values(call)), written=_written_bytes(call))


@formula("sync", "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::_assert_async",
         "aten::_assert_scalar", "aten::_assert_tensor_metadata", "aten::sym_constrain_range",
         "aten::sym_constrain_range_for_size", "aten::sym_size", "aten::sym_stride", "aten::sym_numel",
         "aten::sym_storage_offset", "aten::_functional_assert_async")
def read_one(call: Call) -> Work:
    """Reads a number, or what is known without reading."""
    return Work(0, sum(t.dtype.itemsize for t in tensors_in(call.args) if t.dim() == 0), 0)
