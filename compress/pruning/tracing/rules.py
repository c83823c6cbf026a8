"""Table of rules: PyTorch's operations by name."""

from collections.abc import Iterator

from compress.pruning.tracing import layers, moving, pointwise
from compress.pruning.tracing.watch import Rule

_NAMES: dict[Rule, str] = {
    layers.convolution: "convolution",
    layers.matrix_product: "mm addmm",
    layers.transpose_matrix: "t",
    layers.batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm",
    layers.group_norm: "native_group_norm",
    layers.layer_norm: "native_layer_norm",
    # elementwise operations that PyTorch does not tag as pointwise
    pointwise.pointwise: "_prelu_kernel prelu hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ "
    "log_sigmoid_forward rrelu_with_noise native_dropout elu elu_ celu celu_ selu selu_ softplus hardsigmoid "
    "hardsigmoid_ hardshrink softshrink mish mish_ silu silu_ relu6 threshold threshold_ gelu gelu_ where addcmul",
    pointwise.keep: "clone alias detach detach_ lift_fresh lift_fresh_copy _to_copy contiguous zeros_like ones_like "
    "empty_like full_like rand_like randn_like bernoulli bernoulli_ dropout zero_ fill_",
    pointwise.reduce: "mean sum amax amin max min var std var_mean std_mean prod linalg_vector_norm norm logsumexp "
    "argmax argmin any all median count_nonzero",
    pointwise.glu: "glu",
    pointwise.unpool: "max_unpool2d max_unpool3d",
    pointwise.over_axis: "_softmax _log_softmax softmax log_softmax cumsum cumprod sort topk",
    moving.move: "repeat flip roll channel_shuffle native_channel_shuffle repeat_interleave unfold as_strided diagonal "
    "triu tril",
    moving.permute: "permute transpose movedim swapaxes",
    moving.view: "view _unsafe_view reshape _reshape_alias view_copy",
    moving.take_slice: "slice",
    moving.select: "select",
    moving.split: "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
    moving.unbind: "unbind",
    moving.squeeze: "squeeze squeeze_",
    moving.unsqueeze: "unsqueeze unsqueeze_",
    moving.expand: "expand",
    moving.restride: "as_strided_",
    moving.concatenate: "cat",
    moving.stack: "stack",
    moving.pad: "constant_pad_nd",
    moving.index: "index index_select gather",
    moving.columns: "im2col pixel_unshuffle",
    moving.pixel_shuffle: "pixel_shuffle",
    moving.copy_into: "copy_ index_put_ scatter_ masked_fill_ index_copy_ slice_scatter",
    pointwise.create: "empty zeros ones full arange new_zeros new_ones new_full new_empty empty_strided scalar_tensor "
    "linspace rand randn eye",
}
_POOLS = (
    "max_pool{}d_with_indices max_pool{}d avg_pool{}d _adaptive_avg_pool{}d adaptive_avg_pool{}d adaptive_max_pool{}d "
    "fractional_max_pool{}d upsample_nearest{}d _upsample_nearest_exact{}d reflection_pad{}d replication_pad{}d"
)
_SPATIAL = {
    1: "upsample_linear1d",
    2: "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d "
    "roi_align roi_pool",
    3: "upsample_trilinear3d grid_sampler_3d",
}


def find_rule(name: str, is_pointwise: bool) -> Rule:
    """Return the rule of an operation.

    Args:
        name: PyTorch's name of the operation, such as "convolution" or "add_".
        is_pointwise: Whether PyTorch tags the operation as pointwise (elementwise).
    """
    return _RULES.get(name, pointwise.pointwise if is_pointwise else pointwise.unknown)


def _rules() -> Iterator[tuple[str, Rule]]:
    for rule, names in _NAMES.items():
        yield from ((name, rule) for name in names.split())
    for axes, names in _SPATIAL.items():
        rule = pointwise.spatial(axes)
        yield from ((name, rule) for name in (*_POOLS.format(*[axes] * _POOLS.count("{}")).split(), *names.split()))


_RULES = dict(_rules())
