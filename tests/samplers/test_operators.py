"""The editing operators: what must be kept is kept, projecting twice is projecting once, and any picture will do."""

import pytest
import torch
import torch.nn.functional as F

from phased_consistency.samplers.operators import (
    LUMA,
    Colorize,
    Identity,
    Inpaint,
    SuperResolution,
    fill,
    luminance,
    outpaint,
    rgb_and_alpha,
)

SIZES = [(1, 1), (7, 5), (24, 40)]


def picture(batch=2, size=(24, 40), channels=3, seed=0):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def hole(size=(24, 40)):
    mask = torch.zeros(1, 1, *size)
    mask[..., size[0] // 4 : -(-size[0] // 2), size[1] // 4 : -(-size[1] // 2)] = 1
    return mask


OPERATORS = {
    "identity": lambda size: Identity(picture(size=size)),
    "inpaint": lambda size: Inpaint(picture(size=size), hole(size), grow=4),
    "outpaint": lambda size: outpaint(picture(size=size), left=3, bottom=2, grow=2),
    "colorize": lambda size: Colorize(picture(size=size)),
    "double": lambda size: SuperResolution(picture(size=size), 2),
    "triple": lambda size: SuperResolution(picture(size=size), 3),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_projecting_twice_is_projecting_once_and_stays_in_range(name, size):
    operator = OPERATORS[name](size)
    once = operator.project(picture(size=operator.size, seed=1))
    assert (operator.project(once) - once).abs().max() < 1e-6
    assert once.min() > -1e-6 and once.max() < 1 + 1e-6
    assert (operator.project(operator.start) - operator.start).abs().max() < 1e-6  # it starts from what it keeps


@pytest.mark.parametrize("name", OPERATORS)
def test_the_result_is_the_projection_of_what_was_drawn(name):
    """Even where a decoder overshoots the range; and the result agrees with what is known, to the same 1e-6."""
    operator = OPERATORS[name]((24, 40))
    result = operator.finish(3 * picture(size=operator.size, seed=1) - 1)
    assert result.min() >= 0 and result.max() <= 1
    blended = getattr(operator, "weight", torch.zeros(1)) > 0
    assert ((operator.project(result) - result) * ~blended).abs().max() < 1e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_a_picture_of_another_size_is_refused(name):
    operator = OPERATORS[name]((24, 40))
    height, width = operator.size
    with pytest.raises(ValueError, match=f"picture of 7x9 was given to an edit of {width}x{height}"):
        operator.project(picture(size=(9, 7)))


@pytest.mark.parametrize("name", ["identity", "inpaint", "colorize", "double"])
def test_one_known_picture_serves_a_batch(name):
    operator = {
        "identity": lambda x: Identity(x),
        "inpaint": lambda x: Inpaint(x, hole()),
        "colorize": Colorize,
        "double": SuperResolution,
    }[name]
    one, drawn = operator(picture(1)), picture(3, operator(picture(1)).size, seed=1)
    rows = torch.cat([one.finish(row) for row in drawn.split(1)])
    assert torch.equal(one.finish(drawn), rows)


def test_inpaint_keeps_every_known_pixel_to_the_bit():
    x, grown, drawn = picture(), F.max_pool2d(hole(), 9, 1, 4), picture(seed=1)
    operator = Inpaint(x, hole(), grow=4)
    result = operator.finish(drawn)
    known, inside = ((mask > 0).expand_as(x) for mask in (1 - grown, hole()))
    assert known.any() and torch.equal(result[known], x[known])
    assert torch.equal(result[inside], drawn[inside])  # and the hole is wholly new
    loop = operator.project(drawn)  # while it is drawn, the rim is known too
    assert torch.equal(loop[~inside], x[~inside]) and torch.equal(loop[inside], drawn[inside])


@pytest.mark.parametrize("grow", range(6))
def test_the_blend_is_1_on_the_mask_and_0_beyond_the_rim(grow):
    weight = Inpaint(picture(1), hole(), grow).weight
    assert (weight[hole() > 0] == 1).all()
    beyond = F.max_pool2d(hole(), 2 * grow + 1, 1, grow) == 0
    assert (weight[beyond] == 0).all()
    rim = weight[..., 9, 20:].flatten()  # going right out of the mask, which ends at column 19
    assert (rim.diff() <= 0).all() and (rim > 0).sum() == grow


def test_a_soft_mask_is_the_blend_itself():
    soft = torch.linspace(0, 1, 40).expand(1, 1, 24, 40)
    x, drawn = picture(1), picture(1, seed=1)
    expected = x + soft * (drawn - x)
    assert (Inpaint(x, soft, grow=0).finish(drawn) - expected).abs().max() < 1e-6


def test_an_empty_mask_gives_the_picture_and_a_full_one_what_was_drawn():
    x, drawn = picture(), picture(seed=1)
    empty, full = torch.zeros(1, 24, 40), torch.ones(1, 24, 40)
    assert torch.equal(Inpaint(x, empty).finish(drawn), x)
    assert (Inpaint(x, full).finish(drawn) - drawn).abs().max() < 1e-6
    assert torch.equal(Inpaint(x, full).start, torch.full_like(x, 0.5))


def test_one_picture_takes_several_masks_and_any_width_of_rim():
    masks = torch.zeros(2, 24, 40)
    assert Inpaint(picture(1), masks).start.shape == (2, 3, 24, 40)
    masks[1, 3, 4] = 1
    wide = Inpaint(picture(1), masks, grow=10**6)
    assert wide.start.shape == (2, 3, 24, 40)
    assert wide.weight[0].max() == 0 and wide.weight[1, 0, 3, 4] == 1 and wide.weight[1].min() > 0


def test_a_cell_is_drawn_when_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., 7, 8] = 1
    mask[..., 23, 39] = 1
    cells = Inpaint(picture(1), mask, grow=0).cells(8, (32, 48))
    assert cells.shape == (1, 1, 4, 6)
    assert cells.nonzero()[:, 2:].tolist() == [[0, 1], [2, 4]]


def test_outpainting_is_inpainting_of_what_was_added():
    x = picture(channels=4)
    operator = outpaint(x, left=3, top=1, bottom=2, grow=0)
    assert operator.size == (27, 43)
    drawn = picture(size=(27, 43), seed=1)
    result = operator.finish(drawn)
    assert torch.equal(result[:, :, 1:25, 3:], x)  # the old part, its transparency too
    assert (result[:, :3, 25:] - drawn[:, :, 25:]).abs().max() < 1e-6
    assert (result[:, 3, :, :3] == 1).all()


def test_filling_keeps_what_is_known_and_lets_it_flow_in():
    x, mask = picture(1), hole()
    filled = fill(x, mask)
    known = (mask == 0).expand_as(x)
    assert torch.equal(filled[known], x[known])
    low, high = x[known].min(), x[known].max()
    assert (filled >= low).all() and (filled <= high).all()
    flat = torch.full((1, 3, 24, 40), 0.3)
    assert (fill(flat * (1 - mask), mask) - flat).abs().max() < 1e-6  # nothing leaks out of the hole
    halves = torch.cat([torch.zeros(1, 3, 24, 20), torch.ones(1, 3, 24, 20)], 3)
    sides = fill(halves, F.pad(torch.ones(1, 1, 24, 36), (2, 2)))
    assert sides[..., 2:8].mean() < 0.35 and sides[..., 32:38].mean() > 0.65  # each side takes its own rim's


def test_colorize_keeps_the_luminance_and_the_drawn_chroma():
    x, drawn = 0.4 + 0.2 * picture(), 0.4 + 0.2 * picture(seed=1)
    operator = Colorize(luminance(x))
    result = operator.project(drawn)
    assert (luminance(result) - luminance(x)).abs().max() < 1e-6
    assert ((result - luminance(result)) - (drawn - luminance(drawn))).abs().max() < 1e-6
    assert LUMA.sum() == pytest.approx(1, abs=1e-6)
    grey = operator.start
    assert torch.equal(grey[:, 0], grey[:, 2]) and (grey[:, :1] - luminance(x)).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_colours_out_of_range_fade_and_leave_the_luminance(seed):
    """Clipping them would not: its error on the same pictures is shown to be large."""
    known, drawn = picture(seed=seed).round(), picture(seed=seed + 10)
    operator = Colorize(known)
    in_8_bits = operator.finish(drawn).mul(255).round()
    error = (luminance(in_8_bits) - 255 * luminance(known)).abs()
    assert error.max() <= 0.5 + 1e-3
    clipped = (drawn + luminance(known) - luminance(drawn)).clamp(0, 1)
    assert (luminance(clipped) - luminance(known)).abs().max() > 0.1


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_super_resolution_keeps_the_mean_of_every_block(factor):
    """Random pictures are the worst case; half a level is what rounding to 8 bits costs."""
    low = picture(size=(5, 6))
    operator = SuperResolution(low, factor)
    for seed in range(3):
        result = operator.finish(picture(size=operator.size, seed=seed))
        assert (F.avg_pool2d(result, factor) - low).abs().max() < 1e-6
        in_8_bits = result.mul(255).round()
        assert (F.avg_pool2d(in_8_bits, factor) - 255 * low).abs().max() <= 0.5 + 1e-3
    assert operator.size == (5 * factor, 6 * factor)


def test_super_resolution_is_the_papers_orthogonal_projection():
    """arXiv 2303.01469, App. D: an orthogonal Q whose first column is constant; that component is the known one."""
    factor = 4
    columns = torch.cat([torch.ones(16, 1), torch.randn(16, 15)], 1).double()
    q = torch.linalg.qr(columns).Q  # the first column is constant, up to its sign
    low, drawn = 0.4 + 0.2 * picture(1, (3, 5)), 0.45 + 0.1 * picture(1, (12, 20), seed=1)

    def components(x):
        blocks = F.unfold(x.double().transpose(0, 1), factor, stride=factor)  # (3, 16, blocks)
        return q.T @ blocks

    mixed = components(drawn)
    mixed[:, 0] = components(low.repeat_interleave(factor, 2).repeat_interleave(factor, 3))[:, 0]
    expected = F.fold(q @ mixed, (12, 20), factor, stride=factor).transpose(0, 1)
    assert (SuperResolution(low, factor).project(drawn) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_transparent_pictures(channels):
    x = picture(channels=channels)
    rgb, alpha = rgb_and_alpha(x)
    assert torch.equal(rgb, x.expand(-1, 3, -1, -1) if channels == 1 else x[:, :3])
    assert (alpha is not None) == (channels == 4)
    for operator in (Identity(x), Inpaint(x, hole()), Colorize(x), SuperResolution(x)):
        result = operator.finish(picture(size=operator.size, seed=1))
        assert result.shape[1] == (4 if channels == 4 else 3)
        if channels == 4:
            enlarged = F.interpolate(x[:, 3:], operator.size)
            assert torch.equal(result[:, 3:], enlarged)
    assert torch.equal(rgb_and_alpha(x[:, 0])[0], x[:, :1].expand(-1, 3, -1, -1))


def test_bad_input_is_named():
    x = picture()
    with pytest.raises(ValueError, match="mask is 40x23 and the picture 40x24: they must be of one size"):
        Inpaint(x, torch.ones(1, 23, 40))
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        Inpaint(x, torch.ones(3, 24, 40))
    with pytest.raises(ValueError, match="grow is -1"):
        Inpaint(x, hole(), grow=-1)
    with pytest.raises(ValueError, match="adds pixels on at least one side.*'left': 0"):
        outpaint(x)
    with pytest.raises(ValueError, match="at least one side.*'top': -8"):
        outpaint(x, left=8, top=-8)
    for factor in (0, 2.5, -1):
        with pytest.raises(ValueError, match=f"factor is {factor}; it must be a whole number"):
            SuperResolution(x, factor)
    for shape in ((3, 0, 4), (2, 2, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match="Pictures must be"):
            Identity(torch.zeros(shape))
    x[0, 0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="picture of 40x24 holds numbers that are not finite"):
        Colorize(x)
