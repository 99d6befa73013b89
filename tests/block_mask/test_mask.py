"""BlockMask's methods against dense masks, element by element."""

import copy
import io
import random

import pytest
import torch

from flexattn import masks
from flexattn.block_mask import BlockMask, create_block_mask, create_mask
from flexattn.errors import ArgumentError, MaskMismatchError, ShapeError
from flexattn.ir.evaluate import evaluate

TABLE = ("offsets", "start", "end", "full")
documents = torch.randint(0, 4, (2, 300)).sort(-1).values


def packed(b, h, q, k):
    return (documents[b, q] == documents[b, k]) & (q >= k)


def near(b, h, q, k):
    return (q - k).abs() <= 30 * (h + 1)


def kinds_of(dense, q_block, kv_block):
    """0 empty, 1 partial, 2 full, block by block."""
    *lead, q_len, kv_len = dense.shape
    kinds = torch.zeros(*lead, -(-q_len // q_block), -(-kv_len // kv_block), dtype=torch.int)
    for i in range(kinds.shape[-2]):
        for j in range(kinds.shape[-1]):
            tile = dense[..., i * q_block:(i + 1) * q_block, j * kv_block:(j + 1) * kv_block]
            kinds[..., i, j] = tile.flatten(-2).any(-1).int() + tile.flatten(-2).all(-1).int()
    return kinds


def kinds_in(table, lines, columns):
    """The same from a table of runs, entry by entry."""
    kinds = torch.zeros(table.batch, table.heads, lines, columns, dtype=torch.int)
    offsets = table.offsets.tolist()
    for image in range(table.batch * table.heads):
        for row in range(lines):
            at = image * lines + row
            for i in range(offsets[at], offsets[at + 1]):
                b, h = divmod(image, table.heads)
                kinds[b, h, row, table.start[i]:table.end[i]] = 1 + int(table.full[i])
    return kinds


def attended(mask):
    """What a kernel that follows the mask attends, bool [B, H, q_len, kv_len]."""
    batch, heads, q_len, kv_len = mask.shape
    rows, columns = mask.BLOCK_SIZE
    table = mask.rows()
    kinds = kinds_in(table, table.num_rows, -(-kv_len // columns)).expand(batch, heads, -1, -1)
    kinds = kinds.repeat_interleave(rows, -2)[..., :q_len, :].repeat_interleave(
        columns, -1)[..., :kv_len]
    mod = mask.traced(mask.device)
    inputs = {name: torch.arange(n).view([-1 if i == d else 1 for i in range(4)])
              for d, (name, n) in enumerate(zip(("b", "h", "q_idx", "kv_idx"), mask.shape,
                                                strict=True))}
    found = evaluate(mod.graph, inputs, mod.captures, mod.numbers)["mask"]
    return (kinds == 2) | ((kinds == 1) & found.expand(mask.shape))


def hand_built(q_len, kv_len, block, mask_mod, heads=2):
    """Random lists of blocks, and their kinds."""
    kinds = torch.randint(0, 3, (1, heads, -(-q_len // block), -(-kv_len // block)))
    lists = []
    for kind in (1, 2):
        member = (kinds == kind).int()
        lists += [member.sum(-1).int(),
                  torch.argsort(member, dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=mask_mod,
                                    seq_lengths=(q_len, kv_len)), kinds


def same(table, other):
    return all(torch.equal(getattr(table, name), getattr(other, name)) for name in TABLE)


@pytest.mark.parametrize("mod", [packed, near])
def test_columns_are_the_transposed_rows(mod):
    mask = create_block_mask(mod, 2, 3, 300, 270, BLOCK_SIZE=(32, 16))
    columns = mask.columns()
    got = kinds_in(columns, 17, 10)
    rows = mask.rows()
    assert (columns.row_block, columns.col_block, columns.num_rows) == (16, 32, 17)
    assert torch.equal(got, kinds_in(rows, 10, 17).transpose(-1, -2))


@pytest.mark.parametrize("tile", [(64, 32), (48, 80), (192, 64), (16, 16), (300, 300)])
def test_regrid_is_the_mask_made_for_that_grid(tile):
    mask = create_block_mask(packed, 2, 1, 300, 300)
    assert mask.regrid(*tile) is mask.regrid(*tile)
    assert mask.regrid(128, 128) is mask
    assert same(mask.regrid(*tile).rows(), create_block_mask(packed, 2, 1, 300, 300,
                                                             BLOCK_SIZE=tile).rows())


@pytest.mark.parametrize("mod", [near, None])
@pytest.mark.parametrize("tile", [(64, 64), (32, 16), (48, 80), (192, 128)])
def test_regrid_keeps_blocks_that_were_given(tile, mod):
    mask, kinds = hand_built(290, 300, 64, mod)
    blocks = kinds.repeat_interleave(64, -2)[..., :290, :].repeat_interleave(64, -1)[..., :300]
    dense = torch.ones(1, 2, 290, 300, dtype=torch.bool) if mod is None else create_mask(
        mod, 1, 2, 290, 300)
    wanted = (blocks == 2) | ((blocks == 1) & dense)
    fine = mask.regrid(*tile)
    assert torch.equal(attended(mask), wanted)
    assert torch.equal(attended(fine), wanted)
    if tile != (64, 64):
        assert torch.equal(kinds_in(fine.rows(), -(-290 // tile[0]), -(-300 // tile[1])),
                           kinds_of(wanted, *tile))


def test_a_new_mask_mod_is_used_in_the_blocks_that_are():
    mask = create_block_mask(packed, 2, 1, 300, 300, BLOCK_SIZE=64)
    before = attended(mask)
    mask.mask_mod = lambda b, h, q, k: q % 2 == k % 2
    kinds = kinds_in(mask.rows(), 5, 5).repeat_interleave(64, -2).repeat_interleave(
        64, -1)[..., :300, :300]
    odd = (torch.arange(300)[:, None] - torch.arange(300)) % 2 == 0
    assert torch.equal(attended(mask), (kinds == 2) | ((kinds == 1) & odd))
    assert not torch.equal(attended(mask), before)
    assert torch.equal(attended(mask.regrid(48, 96)), attended(mask))


@pytest.mark.parametrize("index", [0, -1, (1, 2), (slice(None), slice(1, 3), 2),
                                   (1, slice(None), slice(2, 4)), (Ellipsis, slice(1, None)),
                                   (slice(None), torch.tensor([2, 0])),
                                   (slice(None), slice(None), torch.tensor([3, 0, 4]))])
def test_slices_are_slices_of_the_mask(index):
    mask = create_block_mask(lambda b, h, q, k: packed(b, h, q, k) & near(b, h, q, k), 2, 3, 300,
                             280, BLOCK_SIZE=64)
    part = mask[index]
    keys = index if isinstance(index, tuple) else (index,)
    keys = (slice(None), *keys) if Ellipsis in [k for k in keys if k is not None and
                                                not isinstance(k, torch.Tensor)] else keys
    keys = [slice(None) if k is Ellipsis else k for k in keys] + [slice(None)] * 3
    taken = [torch.arange(n)[k].reshape(-1) for k, n in zip(keys, (2, 3, 5), strict=False)]
    tokens = [t for r in taken[2].tolist() for t in range(64 * r, min(64 * r + 64, 300))]
    dense = create_mask(mask.mask_mod, 2, 3, 300, 280)
    wanted = dense[taken[0]][:, taken[1]][:, :, tokens]
    assert part.shape == tuple(wanted.shape)
    assert torch.equal(create_mask(part.mask_mod, *part.shape), wanted)
    assert torch.equal(kinds_in(part.rows(), len(taken[2]), 5), kinds_of(wanted, 64, 64))
    assert torch.equal(attended(part.regrid(48, 32)), wanted)


def test_slices_that_make_no_sense():
    mask = create_block_mask(packed, 2, 3, 300, 300)
    for index, error in ((5, "leaves"), ((0, 0, 0, 0), "too many"),
                         ((0, 0, torch.tensor([2, 0])), "ragged")):
        with pytest.raises(ArgumentError, match=error):
            mask[index]


def test_boolean_algebra():
    one = create_block_mask(packed, 2, 1, 300, 280, BLOCK_SIZE=64)
    two, _ = hand_built(300, 280, 64, near, heads=3)
    x, y = attended(one), attended(two)
    for made, wanted in ((one & two, x & y), (one | two, x | y), (~two, ~y), (~one, ~x)):
        assert made.shape == tuple(wanted.shape)
        assert torch.equal(attended(made), wanted)
        table = made.rows()
        assert torch.equal(kinds_in(table, 5, 5).expand(*wanted.shape[:2], -1, -1),
                           kinds_of(wanted, 64, 64))
    with pytest.raises(ShapeError):
        one & create_block_mask(packed, 2, 1, 300, 290)
    with pytest.raises(TypeError):
        one | 3


def test_adjusted_lengths():
    mask = create_block_mask(near, 1, 2, 200, 200, BLOCK_SIZE=64)
    for lengths in ((100, 130), (333, 200), (64, 500)):
        longer = mask.adjust(*lengths)
        assert same(longer.rows(), create_block_mask(near, 1, 2, *lengths, BLOCK_SIZE=64).rows())
    given, kinds = hand_built(300, 280, 64, None)
    cut = given._adjust(100, 150)
    assert cut.shape == (1, 2, 100, 150)
    assert torch.equal(kinds_in(cut.rows(), 2, 3) > 0, kinds[..., :2, :3] > 0)
    with pytest.raises(ArgumentError, match="longer"):
        given.adjust(301, 280)


def test_verify_names_the_first_wrong_block():
    create_block_mask(packed, 2, 1, 300, 300).verify()
    lists = [torch.tensor([[[1, 2]]]), torch.tensor([[[[0, 1], [1, 0]]]])]
    BlockMask.from_kv_blocks(*lists, mask_mod=masks.causal).verify()  # the full one as partial
    with pytest.raises(MaskMismatchError, match=r"batch 0, head 0, row 1, column 1.* is empty"):
        BlockMask.from_kv_blocks(torch.tensor([[[1, 1]]]), lists[1].flip(-1).sort(-1).values,
                                 mask_mod=masks.causal).verify()
    none = torch.zeros(1, 1, 2, dtype=torch.int)
    with pytest.raises(MaskMismatchError, match="row 0, column 0. is full"):
        BlockMask.from_kv_blocks(none, lists[1], *lists, mask_mod=masks.causal).verify()


def test_torch_block_masks_are_taken_and_given_back():
    from torch.nn.attention.flex_attention import create_block_mask as torch_create

    mod = masks.causal
    theirs = torch_create(mod, 2, 3, 384, 512, device="cpu")
    ours = BlockMask.from_torch(theirs)
    assert ours is BlockMask.from_torch(theirs)
    made = create_block_mask(mod, 2, 3, 384, 512)
    assert torch.equal(kinds_in(ours.rows(), 3, 4), kinds_in(made.rows(), 3, 4).expand(2, 3, 3, 4))
    assert ours.sparsity() == pytest.approx(theirs.sparsity())
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("q_num_blocks", "q_indices"),
                            ("full_kv_num_blocks", "full_kv_indices"),
                            ("full_q_num_blocks", "full_q_indices")):
        count, index = getattr(made, counts), getattr(made, indices)
        assert torch.equal(count, getattr(theirs, counts)) and count.dtype is torch.int32
        assert torch.equal(index, getattr(theirs, indices)) and index.dtype is torch.int32
    assert torch.equal(made.to_dense(), theirs.to_dense())
    assert [type(x) for x in made.as_tuple()[:3]] == [int, int, torch.Tensor]
    assert made.as_tuple(flatten=False)[0] == (384, 512)
    assert made.numel() == theirs.numel()


def test_lists_without_full_blocks():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=(64, 32), seq_lengths=(100, 60))
    assert mask.shape == (1, 1, 100, 60) and mask.full_kv_num_blocks is None
    assert torch.equal(mask.kv_num_blocks, counts) and torch.equal(mask.kv_indices, indices)
    assert mask.sparsity() == pytest.approx(100 * 64 * 28 / 6000)
    with pytest.raises(ArgumentError, match="together"):
        BlockMask.from_kv_blocks(counts, indices, counts)
    with pytest.raises(ShapeError, match="counts"):
        BlockMask.from_kv_blocks(counts[0], indices)


def keep_even(b, h, q, k):
    return (q + k) % 2 == 0


def saved(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_saving():
    mask = create_block_mask(keep_even, 1, 1, 100, 100)
    assert torch.equal(attended(saved(mask)), attended(mask))
    window = masks.sliding_window(random.randint(5, 50))
    lost = saved(create_block_mask(window, 1, 1, 100, 100, BLOCK_SIZE=16))
    assert "sliding_window" in lost._lost_mod
    assert 0 < lost.sparsity() < 100
    with pytest.raises(ArgumentError, match="saved without its mask_mod"):
        lost.traced(torch.device("cpu"))
    lost.mask_mod = window
    assert torch.equal(attended(lost), create_mask(window, 1, 1, 100, 100))
    assert copy.deepcopy(lost).mask_mod is window


def test_pytrees_and_repr_compute_no_view():
    from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

    mask = create_block_mask(masks.causal, None, None, 1 << 22, 1 << 22)
    leaves, spec = tree_flatten(mask)
    assert sum(x.numel() for x in leaves) < 1 << 18 and mask._columns is None
    again = tree_unflatten(leaves, spec)
    assert same(again.rows(), mask.rows()) and again.shape == mask.shape
    assert again.mask_mod is masks.causal
    assert tree_flatten(again)[1] == spec
    assert tree_map(lambda x: x.to(torch.int64), {"mask": mask})["mask"].rows().start.dtype == (
        torch.int64)
    assert repr(mask) == ("BlockMask(shape=(1, 1, 4194304, 4194304), BLOCK_SIZE=(128, 128), "
                          "sparsity=50.00%)")
    assert str(mask).startswith(repr(mask))


def test_moves():
    mask = create_block_mask(packed, 2, 1, 300, 300)
    assert mask.to("meta").device.type == "meta" and mask.to("cpu").mask_mod is packed
    assert same(mask.to("cpu").rows(), mask.rows())
