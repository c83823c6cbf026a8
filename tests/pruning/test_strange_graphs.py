"""Networks that tools of this kind stumble over: each is cut correctly, or a group is excluded with the reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from compress.cost.macs import count_params
from compress.errors import UnsupportedLayer
from compress.pruning.surgery import cut_copy
from compress.pruning.trial import difference, find_cuttable, masked_copy

WIDTH = 8


class _Net(nn.Module):
    """A stem, a middle and a head: (N, 3, 12, 10) -> (N, 4)."""

    def __init__(self, middle: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, WIDTH, 3, 1, 1), middle
        self.last, self.head = nn.Conv2d(width, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.middle(F.relu(self.stem(x))))).mean((2, 3)))


class _Calls(nn.Module):
    """A forward pass written as a function over named parts."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _conv(inputs: int = WIDTH, outputs: int = WIDTH, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, 1, 1, **options)


class _Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.widen = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.widen(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


def _unpool(module: nn.Module, x: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(module.conv(pooled), places, 2)


def _shuffle(module: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    return module.conv(x)


def _dense(module: nn.Module, x: Tensor) -> Tensor:
    for conv in module.convs:
        x = torch.cat([x, F.relu(conv(x))], 1)
    return x


def _conditional(module: nn.Module, x: Tensor) -> Tensor:
    for position, conv in enumerate(module.convs):
        if position % 2 == 0 or x.shape[-1] > 100:
            x = F.relu(conv(x))
    return x


def _attention(module: nn.Module, x: Tensor) -> Tensor:
    tokens = module.before(x).flatten(2).transpose(1, 2)
    return x + module.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


def _list_of_sizes(module: nn.Module, x: Tensor) -> Tensor:
    one, other = torch.split(module.first(x), module.sizes, 1)
    return torch.cat([module.a(one), module.b(other)], 1)


def _sizes(**parts: nn.Module) -> nn.Module:
    net = _Calls(_list_of_sizes, first=_conv(), a=_conv(5, 4), b=_conv(3, 4))
    net.sizes = [5, 3]
    return net


class _Blur(nn.Module):
    """A fixed depthwise filter with the number of channels written down."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = WIDTH
        self.register_buffer("kernel", torch.full((WIDTH, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=self.channels)


class _Inverted(nn.Module):
    """An inverted residual block with a depthwise convolution and squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.norm = nn.Conv2d(WIDTH, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.project = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.hardswish(self.deep(F.hardswish(self.norm(self.widen(x))))))


def _seeded(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "channel_shuffle_by_view": lambda: _Calls(_shuffle, conv=_conv()),
    "channel_shuffle_as_layer": lambda: nn.Sequential(_conv(groups=2), nn.ChannelShuffle(2), _conv(groups=2)),
    "chunk_and_concat": lambda: _Calls(
        lambda m, x: torch.cat([m.a(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1), a=_conv(4, 4)
    ),
    "halves_by_slices": lambda: _Calls(
        lambda m, x: torch.cat([m.a(x[:, : x.shape[1] // 2]), x[:, x.shape[1] // 2 :]], 1), a=_conv(4, 4)
    ),
    "every_second_channel": lambda: _Calls(
        lambda m, x: torch.cat([x[:, ::2], F.relu(m.a(x[:, 1::2]))], 1), a=_conv(4, 4)
    ),
    "split_by_sizes_in_a_list": _sizes,
    "grouped": lambda: nn.Sequential(_conv(), nn.ReLU(), _conv(groups=4), nn.ReLU()),
    "depthwise": lambda: nn.Sequential(_conv(groups=WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU6()),
    "depthwise_with_multiplier": lambda: nn.Sequential(_conv(WIDTH, 16, groups=WIDTH), nn.ReLU(), _conv(16, WIDTH)),
    "squeeze_and_excite": lambda: nn.Sequential(_Squeeze(), _conv()),
    "squeeze_and_excite_by_a_pooling_layer": lambda: _Calls(
        lambda m, x: x * torch.sigmoid(m.widen(F.relu(m.reduce(m.pool(x))))),
        pool=nn.AdaptiveAvgPool2d(1), reduce=nn.Conv2d(WIDTH, 4, 1), widen=nn.Conv2d(4, WIDTH, 1),
    ),
    "inverted_residual": _Inverted,
    "dense_connections": lambda: _Calls(
        _dense, convs=nn.ModuleList([_conv(8, 4), _conv(12, 4), nn.Conv2d(16, WIDTH, 1)])
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(WIDTH, 6, 2, 2), nn.ReLU(), _conv(6, WIDTH)),
    "transposed_grouped": lambda: nn.Sequential(nn.ConvTranspose2d(WIDTH, 6, 2, 2, groups=2), nn.ReLU(), _conv(6)),
    "transposed_depthwise": lambda: nn.Sequential(nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, groups=WIDTH), nn.ReLU()),
    "group_norm": lambda: nn.Sequential(_conv(), nn.GroupNorm(4, WIDTH), nn.ReLU()),
    "instance_norm": lambda: nn.Sequential(_conv(), nn.InstanceNorm2d(WIDTH, affine=True), nn.ReLU()),
    "instance_norm_with_statistics": lambda: nn.Sequential(
        _conv(), nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True), nn.ReLU()
    ),
    "frozen_batch_norm": lambda: nn.Sequential(_conv(), FrozenBatchNorm2d(WIDTH), nn.ReLU()),
    "batch_norm_without_scale": lambda: nn.Sequential(_conv(), nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()),
    "prelu": lambda: nn.Sequential(_conv(), nn.PReLU(WIDTH)),
    "sigmoid_before_a_reader": lambda: nn.Sequential(_conv(), nn.Sigmoid(), _conv()),
    "pixel_shuffle": lambda: nn.Sequential(_conv(WIDTH, 32), nn.PixelShuffle(2), nn.ReLU()),
    "pixel_unshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, WIDTH, 1)),
    "modules_under_conditions": lambda: _Calls(_conditional, convs=nn.ModuleList([_conv(), _conv(), _conv()])),
    "parameter_for_each_channel": lambda: _Calls(
        lambda m, x: x + m.scale * m.conv(x), conv=_conv(), scale=_seeded((WIDTH, 1, 1))
    ),
    "parameter_for_each_place": lambda: _Calls(
        lambda m, x: F.relu(m.conv(x) + m.places), conv=_conv(), places=_seeded((1, WIDTH, 12, 10))
    ),
    "weight_used_by_a_function": lambda: _Calls(
        lambda m, x: F.relu(F.conv2d(x, m.kernel, m.offset, padding=1)), kernel=_seeded((6, WIDTH, 3, 3)),
        offset=_seeded((6,)),
    ),
    "fixed_filter": lambda: nn.Sequential(_conv(), nn.ReLU(), _Blur()),
    "linear_over_channels_last": lambda: _Calls(
        lambda m, x: m.b(F.gelu(m.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
        a=nn.Linear(WIDTH, 12), b=nn.Linear(12, WIDTH),
    ),
    "upsampling_and_pooling": lambda: _Calls(
        lambda m, x: F.interpolate(F.max_pool2d(m.conv(x), 2), size=x.shape[2:], mode="bilinear") + x, conv=_conv()
    ),
    "gated_linear_unit": lambda: _Calls(
        lambda m, x: m.back(F.glu(m.widen(x), 1) * m.scale[:, None, None]) + x,
        widen=_conv(WIDTH, 12), scale=nn.Parameter(torch.rand(6) + 0.5), back=_conv(6, WIDTH),
    ),
    "gated_linear_unit_of_rows": lambda: _Calls(lambda m, x: m.conv(F.glu(F.interpolate(x, scale_factor=2), 2)),
                                                conv=_conv()),
    "unpooling_to_the_places_of_a_pooling": lambda: _Calls(_unpool, conv=_conv()),
    "two_branches_and_a_softmax_of_them": lambda: _Calls(
        lambda m, x: (torch.stack([m.a(x), m.b(x)], 1) * m.gate(x.mean((2, 3), keepdim=True)).view(
            x.shape[0], 2, -1, 1, 1).softmax(1)).sum(1),
        a=_conv(), b=_conv(), gate=nn.Conv2d(WIDTH, 2 * WIDTH, 1),
    ),
}  # fmt: skip
WIDTHS_AFTER = {"weight_used_by_a_function": 6, "transposed_grouped": 8}


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _hold(module: nn.Module, images: Tensor, *names: str) -> nn.Module:
    """Cut half of every group, hold it against the masked network, and return what is left."""
    groups, _ = find_cuttable(module, images[:1])
    assert groups
    missing = set(names) - set(groups)
    assert not missing, f"{missing} among {list(groups)}"
    generator = torch.Generator().manual_seed(0)
    removed = {}
    for name, group in groups.items():
        units = group.width // group.parts
        removed[name] = group.expand(torch.randperm(units, generator=generator)[: units // 2].tolist())
    slim = cut_copy(module, removed, images[:1])
    with torch.no_grad():
        silent, whole = masked_copy(module, removed, groups)(images), module(images)
        assert difference(slim(images), silent) is None
        assert difference(whole, silent) is not None
    assert count_params(slim) < count_params(module)
    return slim


def _build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Net(MIDDLES[name](), WIDTHS_AFTER.get(name, WIDTH if name != "dense_connections" else 24))
        for part in module.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.InstanceNorm2d, FrozenBatchNorm2d)):
                for tensor in (*part._parameters.values(), *part._buffers.values()):
                    if tensor is not None and tensor.is_floating_point():
                        nn.init.uniform_(tensor, 0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize("name", MIDDLES)
def test_the_network_is_cut_through_and_equals_the_silenced_one(name):
    _hold(_build(name), _images(2, 3, 12, 10), "stem")


def _view_of_a_map(name: str) -> bool:
    """Whether a network's `.view` of a feature map needs it contiguous, so that it does not run channels-last."""
    module = _build(name).to(memory_format=torch.channels_last)
    try:
        module(_images(1, 3, 12, 10).to(memory_format=torch.channels_last))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("name", MIDDLES)
def test_the_same_groups_are_found_where_weights_are_channels_last(name):
    if _view_of_a_map(name):
        pytest.skip("it does not run on channels-last memory")
    module, images = _build(name), _images(1, 3, 12, 10)
    groups, excluded = find_cuttable(module, images)
    found = find_cuttable(module.to(memory_format=torch.channels_last), images)
    assert {name: group.width for name, group in found[0].items()} == {key: one.width for key, one in groups.items()}
    assert found[1] == excluded


def test_there_are_many_strange_networks():
    assert len(MIDDLES) >= 30


EXCLUDED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "attention": (
        lambda: _Calls(_attention, before=_conv(), attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
        "middle.before",
        "_native_multi_head_attention' in 'middle.attention'",
    ),
    "layer_norm": (
        lambda: _Calls(
            lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            conv=_conv(), norm=nn.LayerNorm(WIDTH),
        ),
        "middle.conv",
        "a layer norm's statistics are over its channels, in 'middle.norm'",
    ),
    "softmax_over_channels": (
        lambda: _Calls(lambda m, x: x * m.conv(x).softmax(1), conv=_conv()),
        "stem",
        "its channels are mixed by '_softmax' in 'middle'",
    ),
    "largest_over_channels": (
        lambda: _Calls(lambda m, x: m.b(m.a(x).amax(1, keepdim=True)), a=_conv(), b=_conv(1)),
        "middle.a",
        "its channels are mixed by 'amax' in 'middle'",
    ),
    "picked_channels": (
        lambda: _Calls(lambda m, x: m.b(m.a(x)[:, [2, 0, 1]]), a=_conv(), b=_conv(3)),
        "middle.a",
        "its channels are picked by fixed positions in 'middle'",
    ),
    "made_up_values": (
        lambda: _Calls(lambda m, x: m.a(x) + torch.linspace(0, 1, WIDTH)[:, None, None], a=_conv()),
        "middle.a",
        "it meets values that follow no channel, in 'middle'",
    ),
    "a_number_in_the_code": (
        lambda: _Calls(lambda m, x: torch.cat(torch.split(m.a(x), [5, 3], 1)[::-1], 1), a=_conv()),
        "middle.a",
        "split_with_sizes expects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_cannot_be_cut_is_excluded_with_the_reason_and_the_rest_is_cut(name):
    make, group, reason = EXCLUDED[name]
    torch.manual_seed(0)
    module = _Net(make()).eval()
    groups, excluded = find_cuttable(module, _images(1, 3, 12, 10))
    found = {item.name: item.reason for item in excluded if not item.expected}
    assert group not in groups
    assert reason in found[group]
    _hold(module, _images(2, 3, 12, 10), "last")


class _Heads(nn.Module):
    """Outputs of several kinds: a map, a vector, and features that other layers read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3), _conv()
        self.map, self.vector = nn.Conv2d(WIDTH, 5, 1), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        features = F.relu(self.body(F.relu(self.stem(x))))
        return {"map": self.map(features).softmax(1), "more": (self.vector(features.mean((2, 3))), [features])}


def test_channels_that_are_outputs_stay_whole_whatever_the_structure():
    module = _Heads().eval()
    groups, excluded = find_cuttable(module, _images(1, 3, 12, 10))
    assert list(groups) == ["stem"]
    assert {item.name for item in excluded if item.expected} == {"body", "map", "vector"}
    _hold(module, _images(2, 3, 12, 10))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims):
    conv, norm, pool = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
    }[dims]
    module = nn.Sequential(
        conv(2, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 3, groups=2), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    _hold(module, _images(2, 2, *[9] * dims), "0", "3")


def test_the_dimension_that_a_reshape_shortens_is_the_longest():
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 30, 8 * 6), nn.Unflatten(1, (-1, 3, 2)),
        nn.ConvTranspose2d(8, 4, 2, 2),
    ).eval()  # fmt: skip
    groups, _ = find_cuttable(module, _images(1, 3, 12, 10))
    assert (groups["3"].width, groups["3"].parts) == (48, 6)
    slim = _hold(module, _images(2, 3, 12, 10), "0", "3")
    assert (slim[3].out_features, slim[5].in_channels) == (24, 4)


def test_numbers_of_channels_that_modules_carry_follow_the_cut():
    module = nn.Sequential(
        _conv(3), nn.GroupNorm(4, WIDTH), nn.PReLU(WIDTH), nn.ConvTranspose2d(WIDTH, 6, 2, groups=2),
        nn.InstanceNorm2d(6, affine=True), _conv(6, 12, groups=6), _Blur(),
    )  # fmt: skip
    module[6].channels = 12
    module[6].kernel = module[6].kernel.repeat(2, 1, 1, 1)[:12]
    module.append(nn.Conv2d(12, 4, 1))
    slim = _hold(module.eval(), _images(2, 3, 12, 10))
    assert (slim[0].out_channels, slim[1].num_channels, slim[1].num_groups, slim[2].num_parameters) == (4, 4, 2, 4)
    assert (slim[3].in_channels, slim[3].out_channels, slim[3].groups) == (4, 4, 2)
    assert (slim[4].num_features, slim[5].in_channels, slim[5].groups, slim[5].out_channels) == (4, 4, 4, 8)
    assert (slim[6].channels, slim[7].in_channels) == (8, 8)


class _Counting(nn.Module):
    """A forward pass that puts another tensor in the place of a buffer that it read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3), _conv()
        self.register_buffer("shift", torch.zeros(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) + self.shift
        self.shift = self.shift * 1
        return self.body(x)


def test_a_buffer_that_is_replaced_while_the_network_runs_is_named_and_no_crash():
    groups, excluded = find_cuttable(_Counting().eval(), _images(1, 3, 12, 10))
    assert not groups
    assert "the cut network does not run" in {item.name: item.reason for item in excluded}["stem"]


class _Hidden(nn.Module):
    """A branch whose code mixes channels wherever there are all of them, behind a layer scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = _conv(3), _conv(), _conv()
        self.scale, self.head = nn.Parameter(torch.full((WIDTH, 1, 1), scale)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = F.relu(self.inner(x))
        inner = inner.roll(1, 1) if inner.shape[1] == WIDTH else inner
        return self.head((x + self.scale * self.outer(inner)).mean((2, 3)))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_a_wrong_cut_is_seen_behind_weights_that_let_nothing_through(scale):
    module = _Hidden(scale).eval()
    groups, excluded = find_cuttable(module, _images(1, 3, 12, 10))
    assert "inner" not in groups
    assert "differs from the original" in {item.name: item.reason for item in excluded}["inner"]
    assert bool((module.scale == scale).all())


def test_units_of_a_group_cannot_be_divided():
    module = nn.Sequential(_conv(3), _conv(groups=4), _conv()).eval()
    groups, _ = find_cuttable(module, _images(1, 3, 12, 10))
    assert groups["0"].parts == 4
    with pytest.raises(UnsupportedLayer, match="same positions of each of its 4 parts"):
        cut_copy(module, {"0": (0, 1)}, _images(1, 3, 12, 10))


class _OthersWidth(nn.Module):
    """Reshapes one layer's channels by the width of another layer, as the attention of A2N (super-image) does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = _conv(3, WIDTH), _conv(), _conv()
        self.gate, self.free, self.head = nn.Linear(WIDTH, 1), nn.Conv2d(WIDTH, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        batch, channels, _, _ = x.shape
        inner = F.relu(self.inner(x))
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(inner, 1).view(batch, channels)))
        x = x + self.outer(inner) * gate.view(batch, 1, 1, 1)
        return self.head(F.relu(self.free(x)).mean((2, 3)))


def test_groups_whose_widths_must_be_equal_are_not_prunable() -> None:
    groups, excluded = find_cuttable(_OthersWidth().eval(), _images(1, 3, 12, 10))
    assert list(groups) == ["free"]
    reasons = {item.name: item.reason for item in excluded}
    for name in ("stem", "inner"):
        assert "the cut network does not run" in reasons[name]
        assert ".view(batch, channels)" in reasons[name]


def test_the_halves_of_a_gated_linear_unit_are_one_group() -> None:
    groups, _ = find_cuttable(_build("gated_linear_unit"), _images(1, 3, 12, 10))
    assert (groups["middle.widen"].width, groups["middle.widen"].parts) == (6, 1)


def _reason(middle: nn.Module, name: str, width: int = WIDTH) -> str:
    _, excluded = find_cuttable(_Net(middle, width).eval(), _images(1, 3, 12, 10))
    (reason,) = (item.reason for item in excluded if item.name == name)
    return reason


def test_reasons_name_the_operation() -> None:
    assert _reason(nn.GroupNorm(1, WIDTH), "stem") == (
        "a group norm's statistics are over all its channels, in 'middle'"
    )
    slides = _Calls(lambda m, x: m.over(x.transpose(1, 3)).transpose(1, 3), over=nn.Conv2d(10, 10, 3, padding=1))
    assert _reason(slides, "stem") == "a convolution slides along its channels, in 'middle.over'"
    octave = _Calls(lambda m, x: F.conv2d(x, m.kernel[:WIDTH]), kernel=nn.Parameter(torch.rand(12, WIDTH, 1, 1)))
    assert _reason(octave, "stem") == "a convolution whose kernel is computed reads its channels, in 'middle'"
    weighed = _Calls(lambda m, x: (x[:, None] * m.masks(x).unflatten(1, (2, WIDTH))).flatten(1, 2), masks=_conv(8, 16))
    assert _reason(weighed, "stem", 16) == "each of its channels weighs several others, in 'middle'"
    assert _reason(weighed, "middle.masks", 16) == "it meets channels that each weigh several others, in 'middle'"
