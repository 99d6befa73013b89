"""What the Triton kernels share: tiles of rows, products over chunks, the walk over blocks.

A tensor x is (pointer, stride of batches, of heads, of rows) with contiguous columns, or, where
the GPU has TMA, (descriptor,), whose box is a chunk of a tile. The columns of a tile are held as a
tuple of chunks, so that 96 columns are three chunks of 32 and not 128.
Runs of blocks are (offsets, start, end, blocks before): see `RunTable`; full and partial blocks
have a table each.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(x, b, h, first):
    return x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(h, tl.int64) * x[2] \
        + tl.cast(first, tl.int64) * x[3]


@triton.jit
def load_rows(x, b, h, first, length, DIM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
              BOUNDED: tl.constexpr, ROUNDED: tl.constexpr = False):
    """Rows first .. first + ROWS of x[b, h], as chunks of columns; 0 beyond `length`. ROUNDED: to
    tf32, which a descriptor does by itself."""
    chunks = ()
    for c in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        if len(x) == 1:
            chunk = x[0].load([b, h, first, c * CHUNK]).reshape(ROWS, CHUNK)
        else:
            chunk = _load_chunk(x, b, h, first, length, DIM, CHUNK, ROWS, BOUNDED, c)
            if ROUNDED:
                chunk = tf32(chunk)
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def _load_chunk(x, b, h, first, length, DIM: tl.constexpr, CHUNK: tl.constexpr,
                ROWS: tl.constexpr, BOUNDED: tl.constexpr, c: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = c * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = row_start(x, b, h, first) + row * x[3] + column
    if BOUNDED and (c + 1) * CHUNK > DIM:
        chunk = tl.load(at, mask=(first + row < length) & (column < DIM), other=0.0)
    elif BOUNDED:
        chunk = tl.load(at, mask=first + row < length, other=0.0)
    elif (c + 1) * CHUNK > DIM:
        chunk = tl.load(at, mask=column < DIM, other=0.0)
    else:
        chunk = tl.load(at)
    return chunk


@triton.jit
def tf32(x):
    """float32 to the nearest tf32. Tensor cores would cut the digits off, twice the error."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)


@triton.jit
def operand(x, dtype: tl.constexpr, F: tl.constexpr):
    """What tensor cores multiply of a float32 tile."""
    return tf32(x) if F.rounded else x.to(dtype)


@triton.jit
def store_rows(x, chunks, b, h, first, length, DIM: tl.constexpr, CHUNK: tl.constexpr,
               ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    for c in tl.static_range((DIM + CHUNK - 1) // CHUNK):
        column = c * CHUNK + tl.arange(0, CHUNK)[None, :]
        tl.store(row_start(x, b, h, first) + row * x[3] + column,
                 chunks[c].to(x[0].dtype.element_ty), mask=(first + row < length) & (column < DIM))


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(CHUNKS):
        chunks = chunks + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return chunks


@triton.jit
def scaled(chunks, factor):
    """Every chunk with its rows multiplied by `factor` [rows]."""
    result = ()
    for c in tl.static_range(len(chunks)):
        result = result + (chunks[c] * factor[:, None],)
    return result


@triton.jit
def times(chunks, factor):
    """Every chunk multiplied by one number."""
    result = ()
    for c in tl.static_range(len(chunks)):
        result = result + (chunks[c] * factor,)
    return result


@triton.jit
def product(x, y, F: tl.constexpr):
    """x y^T."""
    total = tl.dot(x[0], tl.trans(y[0]), input_precision=F.precision)
    for c in tl.static_range(1, len(x)):
        total = tl.dot(x[c], tl.trans(y[c]), total, input_precision=F.precision)
    return total


@triton.jit
def add_product(total, x, y, F: tl.constexpr):
    """total + x y."""
    chunks = ()
    for c in tl.static_range(len(y)):
        chunks = chunks + (tl.dot(x, y[c], total[c], input_precision=F.precision),)
    return chunks


@triton.jit
def indices(first, length, TILE: tl.constexpr, BOUNDED: tl.constexpr):
    """Positions of a tile, the last one repeated beyond the end."""
    index = first + tl.arange(0, TILE)
    return tl.minimum(index, length - 1) if BOUNDED else index


@triton.jit
def first_block(table, row, last):
    """Number of blocks, then the state of the walk: run, end of runs, block, end of the run."""
    run = tl.load(table[0] + row)
    runs = tl.load(table[0] + row + 1)
    count = (tl.load(table[3] + runs) - tl.load(table[3] + run)).to(tl.int32)
    block = tl.load(table[1] + run, mask=run < runs, other=last)
    stop = tl.load(table[2] + run, mask=run < runs, other=0)
    return count, run, runs, block, stop


@triton.jit
def next_block(table, run, runs, block, stop, last):
    """The state one block further; behind the last run comes the block `last`."""
    block += 1
    left = block >= stop
    run += left.to(tl.int32)
    more = left & (run < runs)
    stop = tl.where(left, tl.load(table[2] + run, mask=more, other=0), stop)
    block = tl.where(left, tl.load(table[1] + run, mask=more, other=last), block)
    return run, block, stop


@triton.jit
def ends_ragged(table, row, blocks, length, TILE: tl.constexpr):
    """1 if the last full block of the row sticks out of the sequence, otherwise 0."""
    run = tl.load(table[0] + row)
    runs = tl.load(table[0] + row + 1)
    end = tl.load(table[2] + runs - 1, mask=run < runs, other=0)
    return ((end == blocks) & (length % TILE != 0)).to(tl.int32)
