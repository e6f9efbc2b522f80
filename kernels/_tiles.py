"""Device functions that walk over a network: which tensor, which elements, which bits.

A program handles one chunk of one tensor, as rows of four neighbouring elements in memory:

- FLAT: memory order is logical order; BLOCK elements, [BLOCK / 4, 4], a Philox call per row.
- TAPS: a 3x3 channels_last weight (memory order: output, tap, input). Four input channels times nine taps are 36
  consecutive LOGICAL elements, hence nine whole Philox calls and 36 consecutive bits. One thread holds them all in
  registers and walks the taps: each step reads four neighbouring channels, 16 bytes of fp32.
- STRIDED: any other layout, and the last program of a tensor whose size is not a multiple of four. Logical order,
  addresses from sizes and strides, no assumption about alignment; the sectors of a line meet again in L1 and L2.

Offsets inside a chunk are int32, its start is int64.
"""

import triton
import triton.language as tl

from dwm_fast.kernels._tables import CHANNELS, COLUMNS, LAYER, NUMEL, OUTPUT, THRESHOLD, WORD


@triton.jit
def block_entry(blocks):
    """Tensor, kind and chunk (int64) of this program."""
    entry = tl.load(blocks + 2 * tl.program_id(0).to(tl.int64))
    chunk = tl.load(blocks + 2 * tl.program_id(0).to(tl.int64) + 1)
    return entry >> 2, entry & 3, chunk.to(tl.int64)


@triton.jit
def address(ptrs, tensor, role: tl.constexpr, roles: tl.constexpr):
    """Address (int64) of a tensor's role from the pointer table."""
    return tl.load(ptrs + tensor * roles + role)


@triton.jit
def aligned(word, dtype: tl.constexpr):
    """Pointer from an address that is a multiple of 16, as FLAT and TAPS tensors' are.

    The mark has to sit on the very operation that makes the pointer: Triton 3.6 and 3.8 drop one on the result of a
    call when they inline it, and every access falls to one element.
    """
    return tl.multiple_of(word.to(tl.pointer_type(dtype)), 16)


@triton.jit
def loose(word, dtype: tl.constexpr):
    """Pointer from an address of any alignment."""
    return word.to(tl.pointer_type(dtype))


@triton.jit
def row_of(rows, tensor):
    """Row of a tensor: elements, layer (uint32), threshold (fp32), first word of its bits."""
    row = rows + tensor * COLUMNS
    threshold = tl.load(row + THRESHOLD).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(row + NUMEL), tl.load(row + LAYER).to(tl.uint32), threshold, tl.load(row + WORD)


@triton.jit
def output_start(rows, tensor, which: tl.constexpr):
    """First element of a tensor in flat output `which`; a multiple of 64."""
    return tl.multiple_of(tl.load(rows + tensor * COLUMNS + OUTPUT + which), 64)


@triton.jit
def flat_offsets(numel, chunk, BLOCK: tl.constexpr):
    """Start (int64), offsets int32 [BLOCK / 4, 4] and mask [BLOCK / 4, 1] of a FLAT chunk."""
    start = tl.multiple_of(chunk * BLOCK, BLOCK)
    quads = 4 * tl.arange(0, BLOCK // 4)
    offsets = quads[:, None] + tl.arange(0, 4)[None, :]
    remaining = tl.minimum(numel - start, BLOCK).to(tl.int32)
    return start, offsets, (quads < remaining)[:, None]


@triton.jit
def strided_coordinates(geometry, tensor, numel, chunk, BLOCK: tl.constexpr, RANK: tl.constexpr, ROLES: tl.constexpr):
    """Coordinates of a STRIDED chunk, last dimension first, as a tuple of RANK blocks [BLOCK / 4, 4], and its mask.

    The start is divided in int64, once a program; lanes add to its last coordinate and carry in int32.
    """
    sizes = geometry + tensor * (RANK * (1 + ROLES))
    lane = 4 * tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]
    mask = lane < tl.minimum(numel - chunk * BLOCK, BLOCK).to(tl.int32)
    coordinates = ()
    rest = chunk * BLOCK
    carry = lane
    for d in tl.static_range(RANK - 1):
        size = tl.load(sizes + (RANK - 1 - d))
        total = (rest % size).to(tl.int32) + carry
        rest = rest // size
        carry = total // size.to(tl.int32)
        digit = (total - carry * size.to(tl.int32),)
        coordinates = coordinates + digit  # type: ignore[assignment]  # a tuple that grows
    digit = (rest + carry,)
    return coordinates + digit, mask


@triton.jit
def strided_offsets(geometry, tensor, coordinates, role: tl.constexpr, RANK: tl.constexpr, ROLES: tl.constexpr):
    """Offsets (int64) of those elements in the memory of one role."""
    strides = geometry + tensor * (RANK * (1 + ROLES)) + RANK * (1 + role)
    offsets = coordinates[0].to(tl.int64) * tl.load(strides + (RANK - 1))
    for d in tl.static_range(1, RANK):
        offsets += coordinates[d].to(tl.int64) * tl.load(strides + (RANK - 1 - d))
    return offsets


@triton.jit
def taps_offsets(rows, tensor, numel, chunk, GROUPS: tl.constexpr):
    """Groups of four channels of a TAPS chunk.

    Returns the group numbers (int64) [GROUPS], offsets (int64) [GROUPS, 4] at tap 0, their mask [GROUPS, 1], and the
    stride from tap to tap. Column = output * channels + input; offset at tap 0 = column + 8 * output * channels.
    """
    channels = tl.multiple_of(tl.load(rows + tensor * COLUMNS + CHANNELS), 4)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    first_output = chunk * (4 * GROUPS) // channels
    first_input = (chunk * (4 * GROUPS) - first_output * channels).to(tl.int32)
    output = first_output + (first_input + 4 * tl.arange(0, GROUPS)) // channels.to(tl.int32)
    offset = 4 * group + 8 * channels * output
    offsets = offset[:, None] + tl.arange(0, 4)[None, :]
    offsets = tl.max_contiguous(tl.multiple_of(offsets, [1, 4]), [1, 4])
    return group, offsets, (36 * group < numel)[:, None], channels


@triton.jit
def rows_of_four(w0, w1, w2, w3, ROWS: tl.constexpr):
    """Four blocks [ROWS] as columns of one block [ROWS, 4]; no data moves between threads."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, 4)


# --- bits --------------------------------------------------------------------------------------------------------


@triton.jit
def store_bits(bits, word, numel, chunk, keep, BLOCK: tl.constexpr):
    """Write keep flags [BLOCK / 4, 4] of a FLAT or STRIDED chunk, false beyond the end, as int32 words."""
    nibbles = tl.sum(keep.to(tl.int32) << tl.arange(0, 4)[None, :], axis=1)
    eights = nibbles.reshape(BLOCK // 32, 8)
    words = tl.sum(eights << (4 * tl.arange(0, 8))[None, :], axis=1)
    index = chunk * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    tl.store(bits + word + index, words, mask=index < (numel + 127) // 128 * 4)


@triton.jit
def load_bits(bits, word, numel, chunk, BLOCK: tl.constexpr):
    """Keep flags as int32 0 / 1 [BLOCK / 4, 4] of a FLAT or STRIDED chunk; 0 beyond the end."""
    quads = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    words = tl.load(bits + word + quads // 8, mask=quads * 4 < numel, other=0)
    shift = 4 * (tl.arange(0, BLOCK // 4) % 8)[:, None] + tl.arange(0, 4)[None, :]
    return (words[:, None] >> shift) & 1


@triton.jit
def store_taps_bits(bits, word, numel, chunk, taps, GROUPS: tl.constexpr):
    """Write the bits of a TAPS chunk; taps int32 [GROUPS, 4] has bit r set where tap r of a channel is kept.

    A group's 36 bits start 4 * (group % 8) bits into word 9 * (group // 8) + group % 8, since 36 = 32 + 4: they end in
    the next word, whose first bits are theirs. Each thread writes one word, the last of eight two.
    """
    lane = tl.arange(0, GROUPS)
    field = tl.sum(taps.to(tl.int64) << (9 * tl.arange(0, 4))[None, :], axis=1) << (4 * (lane % 8))
    carry = ((field >> 32) & 0xFFFFFFFF).to(tl.int32)
    before = tl.gather(carry, tl.maximum(lane - 1, 0), 0)
    own = (field & 0xFFFFFFFF).to(tl.int32) | tl.where(lane % 8 == 0, 0, before)
    index = chunk * (GROUPS * 9 // 8) + 9 * (lane // 8) + lane % 8
    end = (numel + 127) // 128 * 4
    tl.store(bits + word + index, own, mask=index < end)
    tl.store(bits + word + index + 1, carry, mask=(lane % 8 == 7) & (index + 1 < end))


@triton.jit
def load_taps_bits(bits, word, numel, chunk, GROUPS: tl.constexpr):
    """Inverse of `store_taps_bits`: int32 [GROUPS, 4] with bit r for tap r."""
    lane = tl.arange(0, GROUPS)
    index = chunk * (GROUPS * 9 // 8) + 9 * (lane // 8) + lane % 8
    mask = 36 * (chunk * GROUPS + lane) < numel
    low = tl.load(bits + word + index, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(bits + word + index + 1, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    shift = 4 * (lane % 8).to(tl.int64)
    field = (low >> shift) | (high << (32 - shift))
    return ((field[:, None] >> (9 * tl.arange(0, 4))[None, :]) & 511).to(tl.int32)


@triton.jit
def popcount(word):
    """Ones of each uint32 word, int32."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = eights + (eights >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def compact_places(bits, ranks, word, numel, chunk, BLOCK: tl.constexpr):
    """Index (int64) [BLOCK / 4, 4] of each lane of a chunk among the free (0) lanes of its tensor.

    ranks counts the free lanes before each 128; the words in between and the bits below are counted here.
    """
    quad = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    valid = quad * 4 < numel
    place = tl.load(ranks + word // 4 + quad // 32, mask=valid, other=0)
    for j in tl.static_range(3):
        before = valid & (quad // 8 % 4 > j)
        kept = tl.load(bits + word + quad // 32 * 4 + j, mask=before, other=-1).to(tl.uint32, bitcast=True)
        place += 32 - popcount(kept)
    kept = tl.load(bits + word + quad // 8, mask=valid, other=-1).to(tl.uint32, bitcast=True)
    shift = 4 * (tl.arange(0, BLOCK // 4) % 8)[:, None] + tl.arange(0, 4)[None, :]
    below = (tl.full([BLOCK // 4, 4], 1, tl.uint32) << shift.to(tl.uint32)) - 1
    return place[:, None] + shift - popcount(kept[:, None] & below)
