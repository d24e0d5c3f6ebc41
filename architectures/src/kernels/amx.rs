//! Tiles of Intel's AMX: sixteen rows of weights in bf16 times sixteen rows of x, 32 inner elements of each, in one instruction.
//!
//! rustc has these instructions in assembly only. Tiles are registers that it never uses by itself, so they keep what they hold from one piece of
//! assembly to the next. Each element of a product is summed 32 inner elements after the other, however many rows a tile has.

use std::{
    arch::{asm, x86_64 as arch},
    array,
    cell::Cell,
    marker::PhantomData,
    mem::MaybeUninit,
    ops::Range,
    sync::LazyLock,
};

use half::bf16;

use super::{
    blocks::{Group, LANES},
    parallel,
    product::{Block, Rows},
    x86,
};

/// Rows of a tile, and its columns of 32 bits.
const SIDE: usize = 16;
/// Bytes of a tile's row.
const ROW: usize = 64;
/// Inner elements of bf16 in a tile.
const STEP: usize = 32;
/// Steps of a row of weights that are multiplied with all rows of x before the next ones: they fit the first-level cache.
const STEPS: usize = 16;
/// Bytes by which weights that are read but once are fetched ahead.
const AHEAD: usize = 384;

/// Whether the CPU has tiles for bf16, and the system lets us use them.
pub(super) fn has_amx() -> bool {
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    static HAS: LazyLock<bool> =
        LazyLock::new(|| x86::has_avx512_bf16() && arch::__cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE && is_permitted());
    *HAS
}

/// Asks Linux for the room that tiles take wherever a thread's registers are kept.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that touches none of our memory.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

// SAFETY of everything below: callers promise `has_amx` and that what pointers point to is there; all accesses are unaligned.

/// Rows and bytes of a row of the eight tiles: as the CPU reads it.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shape {
    /// Of tiles of so many rows and so many bytes in each.
    fn of(tiles: [(usize, usize); 8]) -> Self {
        let mut shape = Self { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        for (i, (rows, bytes)) in tiles.into_iter().enumerate() {
            // A tile has both or neither.
            if rows > 0 && bytes > 0 {
                (shape.rows[i], shape.bytes[i]) = (rows as u8, bytes as u16);
            }
        }
        shape
    }
}

/// This thread's tiles, as long as it lives: no other may be made meanwhile.
struct Tiles {
    shape: Shape,
    /// the rows and widths that it is of
    sizes: u32,
    /// They are a thread's own.
    here: PhantomData<*mut ()>,
}

impl Tiles {
    /// Of no shape yet.
    fn new() -> Self {
        Self { shape: Shape::of([(0, 0); 8]), sizes: 0, here: PhantomData }
    }

    /// Gives the tiles the shapes for products of two times so many rows of weights with two times so many of x: four of sums, two of weights, two
    /// of x. If they have others, what they hold is zero then.
    #[inline(always)]
    unsafe fn shape(&mut self, [r0, r1]: [usize; 2], [w0, w1]: [usize; 2]) {
        // Shapes themselves are stored by bytes, which are slow to compare right after.
        let sizes = (r0 | r1 << 8 | w0 << 16 | w1 << 24) as u32;
        if sizes != self.sizes {
            self.sizes = sizes;
            let (w0, w1) = (4 * w0, 4 * w1);
            self.shape = Shape::of([(r0, w0), (r0, w1), (r1, w0), (r1, w1), (r0, ROW), (r1, ROW), (SIDE, w0), (SIDE, w1)]);
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const self.shape, options(nostack, readonly, preserves_flags)) };
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made it has promised the instructions.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

#[inline(always)]
unsafe fn load<const TO: usize>(from: *const u8, stride: usize) {
    unsafe {
        asm!("tileloadd tmm{to}, [{from} + {stride}*1]", to = const TO, from = in(reg) from, stride = in(reg) stride,
            options(nostack, readonly, preserves_flags));
    }
}

/// Zeros for the first step, and for others the sums of those before it.
#[inline(always)]
unsafe fn begin<const SUM: usize>(step: usize, from: *const u8) {
    if step == 0 {
        unsafe { asm!("tilezero tmm{sum}", sum = const SUM, options(nomem, nostack, preserves_flags)) };
    } else {
        unsafe { load::<SUM>(from, ROW) };
    }
}

#[inline(always)]
unsafe fn store<const FROM: usize>(to: *mut u8, stride: usize) {
    unsafe {
        asm!("tilestored [{to} + {stride}*1], tmm{from}", from = const FROM, to = in(reg) to, stride = in(reg) stride,
            options(nostack, preserves_flags));
    }
}

/// `SUM` + A B, of pairs of bf16.
#[inline(always)]
unsafe fn pairs<const SUM: usize, const A: usize, const B: usize>() {
    unsafe {
        asm!("tdpbf16ps tmm{sum}, tmm{a}, tmm{b}", sum = const SUM, a = const A, b = const B, options(nomem, nostack, preserves_flags));
    }
}

/// A row of a tile of bf16, within one line of the caches.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([bf16; STEP]);

/// Tiles of weights, one of each step.
type Copies = [[Line; SIDE]; STEPS];

/// Sums [lane][row of x] of sixteen rows of weights with sixteen of x.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([f32; SIDE * SIDE]);

/// Rows of x in bf16 as tiles take them: of each sixteen (the last may be fewer), for every 32 inner elements sixteen pairs of each row, [16][rows][2];
/// beyond the last element stand zeros.
pub(super) struct Pairs {
    data: Vec<Line>,
    /// in, to the next multiple of 32
    wide: usize,
    /// N
    rows: usize,
}

impl Pairs {
    /// Of these rows of x [.., in].
    pub fn of(x: &[f32], inner: usize, rows: Rows<'_>) -> Self {
        struct Start(*mut bf16);
        // SAFETY: every sixteen rows go to their own part.
        unsafe impl Sync for Start {}
        impl Start {
            fn at(&self, offset: usize) -> *mut bf16 {
                self.0.wrapping_add(offset)
            }
        }
        let wide = inner.next_multiple_of(STEP);
        let n = match rows {
            Rows::All => x.len() / inner,
            Rows::Listed(rows) => rows.len(),
        };
        let mut data = Vec::<Line>::with_capacity(n * wide / STEP);
        let start = Start(data.as_mut_ptr().cast());
        parallel(n.div_ceil(SIDE), |tile| {
            let first = tile * SIDE;
            let count = (n - first).min(SIDE);
            let row = |i| match rows {
                Rows::All => first + i,
                Rows::Listed(rows) => rows[first + i] as usize,
            };
            let rows: [&[f32]; SIDE] = array::from_fn(|i| if i < count { &x[row(i) * inner..][..inner] } else { &[][..] });
            // SAFETY: there are tiles, and room for the rows.
            unsafe { pack(&rows[..count], start.at(first * wide)) };
        });
        // SAFETY: all of them have been written.
        unsafe { data.set_len(n * wide / STEP) };
        Self { data, wide, rows: n }
    }

    /// The sixteen rows from the given one on.
    fn tile(&self, row: usize) -> Tile {
        let width = (self.rows - row).min(SIDE);
        Tile { data: self.data[row * self.wide / STEP..].as_ptr().cast(), width }
    }
}

/// Up to sixteen rows of x.
#[derive(Clone, Copy)]
struct Tile {
    data: *const u8,
    width: usize,
}

impl Tile {
    const NONE: Self = Self { data: std::ptr::null(), width: 0 };
}

/// Rounds rows of x and puts them where they belong in [`Pairs`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pack(rows: &[&[f32]], mut to: *mut bf16) {
    unsafe {
        let inner = rows[0].len();
        let mask = ((1u32 << rows.len()) - 1) as u16;
        for at in (0..inner).step_by(STEP) {
            let left = (1u64 << (inner - at).min(STEP)) - 1;
            let mut pairs = [arch::_mm512_setzero_si512(); SIDE];
            for (pairs, row) in pairs.iter_mut().zip(rows) {
                let from = row.as_ptr().wrapping_add(at);
                let low = arch::_mm512_maskz_loadu_ps(left as u16, from);
                let high = arch::_mm512_maskz_loadu_ps((left >> 16) as u16, from.wrapping_add(16));
                *pairs = std::mem::transmute::<arch::__m512bh, arch::__m512i>(arch::_mm512_cvtne2ps_pbh(high, low));
            }
            if rows.len() == 1 {
                arch::_mm512_storeu_si512(to.cast(), pairs[0]);
            } else {
                for (pair, column) in transposed(pairs).into_iter().enumerate() {
                    arch::_mm512_mask_storeu_epi32(to.add(pair * 2 * rows.len()).cast(), mask, column);
                }
            }
            to = to.add(STEP * rows.len());
        }
    }
}

/// Of sixteen rows of 32 bits the sixteen columns.
#[inline(always)]
unsafe fn transposed(rows: [arch::__m512i; SIDE]) -> [arch::__m512i; SIDE] {
    unsafe {
        let (mut twos, mut fours, mut columns) = (rows, rows, rows);
        for i in 0..8 {
            twos[2 * i] = arch::_mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            twos[2 * i + 1] = arch::_mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            for half in 0..2 {
                let (a, b) = (twos[4 * i + half], twos[4 * i + 2 + half]);
                fours[4 * i + 2 * half] = arch::_mm512_unpacklo_epi64(a, b);
                fours[4 * i + 2 * half + 1] = arch::_mm512_unpackhi_epi64(a, b);
            }
        }
        for i in 0..4 {
            let even = [0, 8].map(|j| (fours[j + i], fours[j + 4 + i]));
            let (a, b) =
                (arch::_mm512_shuffle_i32x4::<0x88>(even[0].0, even[0].1), arch::_mm512_shuffle_i32x4::<0x88>(even[1].0, even[1].1));
            let (c, d) =
                (arch::_mm512_shuffle_i32x4::<0xdd>(even[0].0, even[0].1), arch::_mm512_shuffle_i32x4::<0xdd>(even[1].0, even[1].1));
            columns[i] = arch::_mm512_shuffle_i32x4::<0x88>(a, b);
            columns[4 + i] = arch::_mm512_shuffle_i32x4::<0x88>(c, d);
            columns[8 + i] = arch::_mm512_shuffle_i32x4::<0xdd>(a, b);
            columns[12 + i] = arch::_mm512_shuffle_i32x4::<0xdd>(c, d);
        }
        columns
    }
}

/// Up to sixteen rows of weights in bf16, a lane each.
#[derive(Clone, Copy)]
struct Lanes {
    data: *const u8,
    stride: usize,
    there: usize,
}

impl Lanes {
    const NONE: Self = Self { data: std::ptr::null(), stride: 0, there: 0 };

    fn of(group: &Group, b: &Block<'_>) -> Self {
        let row_bytes = b.weights.row_bytes();
        let data = b.weights.data()[(b.start + group.start) * row_bytes..].as_ptr();
        Self { data, stride: group.apart * row_bytes, there: group.there }
    }

    fn at(self, step: usize) -> *const u8 {
        self.data.wrapping_add(step * 2 * STEP)
    }

    /// Copies the tiles of some steps, of rows of `inner` elements, beyond which stand zeros.
    #[inline(always)]
    unsafe fn copy(self, steps: Range<usize>, inner: usize, to: *mut Copies) {
        for (i, step) in steps.enumerate() {
            let len = (inner - step * STEP).min(STEP);
            for row in 0..self.there {
                let from = self.at(step).wrapping_add(row * self.stride);
                unsafe {
                    let to = (&raw mut (*to)[i][row]).cast::<[u8; ROW]>();
                    if len == STEP {
                        *to = from.cast::<[u8; ROW]>().read();
                    } else {
                        *to = [0; ROW];
                        std::ptr::copy_nonoverlapping(from, to.cast(), 2 * len);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fetch(self, step: usize) {
        for row in 0..self.there {
            // SAFETY: a prefetch of any address is none of a fault.
            unsafe { arch::_mm_prefetch::<{ arch::_MM_HINT_T0 }>(self.at(step).wrapping_add(row * self.stride + AHEAD).cast()) };
        }
    }
}

/// As [`Block`] promises, of weights in bf16; its x is [`Pairs`] of the rows that it chooses.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn multiply(b: &Block<'_>) {
    unsafe {
        let x = &*b.x.cast::<Pairs>();
        let (inner, steps) = (b.weights.inner(), x.wide / STEP);
        let tile = |i: usize| if i * SIDE < b.n { x.tile(b.row + i * SIDE) } else { Tile::NONE };
        let mut registers = Tiles::new();
        let mut copies = MaybeUninit::<[Copies; 2]>::uninit();
        let copies = [0, 1].map(|p| copies.as_mut_ptr().cast::<Copies>().wrapping_add(p));
        let (once, across) = (b.n <= SIDE, b.n.div_ceil(SIDE));
        let span = if once { steps } else { STEPS };
        // What is fetched ahead of one group is the next one.
        let groups = Group::all(b.out, b.n);
        let pairs = groups.chunks(if once { 1 } else { 2 });
        let mut kept = SUMS.take();
        let waiting = if span < steps { pairs.len() } else { 1 };
        kept.resize(kept.len().max(waiting * across), [Sums([0.0; SIDE * SIDE]); 2]);
        for start in (0..steps).step_by(span) {
            let run = start..(start + span).min(steps);
            // Read again and again they had better lie together; and the last may need zeros behind it.
            let direct = if once { run.start..run.end.min(inner / STEP) } else { run.start..run.start };
            for (pair, groups) in pairs.clone().enumerate() {
                let lanes = [0, 1].map(|i| groups.get(i).map_or(Lanes::NONE, |group| Lanes::of(group, b)));
                for (lanes, copies) in lanes.iter().zip(copies) {
                    lanes.copy(direct.end..run.end, inner, copies);
                }
                let sums = &mut kept[pair % waiting * across..][..across];
                for (two, sums) in sums.chunks_mut(2).enumerate() {
                    let tiles = [tile(2 * two), tile(2 * two + 1)];
                    registers.shape(lanes.map(|lanes| lanes.there), tiles.map(|tile| tile.width));
                    let part = Part { lanes, copies: copies.map(<*mut _>::cast_const), tiles };
                    let runs = [direct.clone(), direct.end..run.end];
                    match (groups.len(), sums.len()) {
                        (2, 2) => part.add::<2, 2>(runs, sums),
                        (2, _) => part.add::<2, 1>(runs, sums),
                        (_, 2) => part.add::<1, 2>(runs, sums),
                        _ => part.add::<1, 1>(runs, sums),
                    }
                }
                if waiting == 1 {
                    for (i, sums) in sums.iter().enumerate() {
                        groups.iter().zip(sums).for_each(|(group, Sums(sums))| write(b, group, i * SIDE, sums));
                    }
                }
            }
        }
        if waiting > 1 {
            // A few rows of y after the other: each may lie in a page of its own.
            for i in 0..across {
                for (pair, groups) in pairs.clone().enumerate() {
                    groups.iter().zip(&kept[pair * across + i]).for_each(|(group, Sums(sums))| write(b, group, i * SIDE, sums));
                }
            }
        }
        SUMS.set(kept);
    }
}

thread_local! {
    /// Room for sums of products.
    static SUMS: Cell<Vec<[Sums; 2]>> = const { Cell::new(Vec::new()) };
}

/// Two tiles' rows of weights and two tiles' rows of x.
struct Part {
    lanes: [Lanes; 2],
    copies: [*const Copies; 2],
    tiles: [Tile; 2],
}

impl Part {
    /// Adds to the sums [T][P] what some steps give of the first P and T: first those of weights where they lie, then those of copies.
    #[inline(always)]
    unsafe fn add<const P: usize, const T: usize>(&self, [direct, copied]: [Range<usize>; 2], sums: &mut [[Sums; 2]]) {
        unsafe {
            let start = sums.as_mut_ptr().cast::<u8>();
            let place = |t: usize, p: usize| start.wrapping_add((2 * t + p) * ROW * SIDE);
            begin::<0>(direct.start, place(0, 0));
            if T == 2 {
                begin::<1>(direct.start, place(1, 0));
            }
            if P == 2 {
                begin::<2>(direct.start, place(0, 1));
                if T == 2 {
                    begin::<3>(direct.start, place(1, 1));
                }
            }
            for step in direct {
                self.lanes[..P].iter().for_each(|lanes| lanes.fetch(step));
                self.step::<P, T>(self.lanes.map(|lanes| (lanes.at(step), lanes.stride)), step);
            }
            let first = copied.start;
            for step in copied {
                let copies = self.copies.map(|copies| (copies.cast::<u8>().wrapping_add((step - first) * SIDE * ROW), ROW));
                self.step::<P, T>(copies, step);
            }
            store::<0>(place(0, 0), ROW);
            if T == 2 {
                store::<1>(place(1, 0), ROW);
            }
            if P == 2 {
                store::<2>(place(0, 1), ROW);
                if T == 2 {
                    store::<3>(place(1, 1), ROW);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn step<const P: usize, const T: usize>(&self, weights: [(*const u8, usize); 2], step: usize) {
        unsafe {
            let x = self.tiles.map(|tile| (tile.data.wrapping_add(step * 4 * SIDE * tile.width), 4 * tile.width));
            load::<4>(weights[0].0, weights[0].1);
            load::<6>(x[0].0, x[0].1);
            pairs::<0, 4, 6>();
            if T == 2 {
                load::<7>(x[1].0, x[1].1);
                pairs::<1, 4, 7>();
            }
            if P == 2 {
                load::<5>(weights[1].0, weights[1].1);
                pairs::<2, 5, 6>();
                if T == 2 {
                    pairs::<3, 5, 7>();
                }
            }
        }
    }
}

/// Writes sums [lane][row of x] of the block's rows of x from `row` on.
#[inline(always)]
unsafe fn write(b: &Block<'_>, group: &Group, row: usize, sums: &[f32; SIDE * SIDE]) {
    unsafe {
        let lanes = std::mem::transmute::<[f32; SIDE * SIDE], [arch::__m512i; SIDE]>(*sums);
        let rows = std::mem::transmute::<[arch::__m512i; SIDE], [f32; SIDE * SIDE]>(transposed(lanes));
        group.write(b, row, &rows[..(b.n - row).min(SIDE) * LANES], LANES);
    }
}

/// Operations of products in registers alone, which it does.
///
/// # Safety
/// [`has_amx`]
pub(super) unsafe fn in_registers() -> usize {
    const TURNS: usize = 5000;
    let mut registers = Tiles::new();
    unsafe {
        registers.shape([SIDE; 2], [SIDE; 2]);
        for _ in 0..TURNS {
            pairs::<0, 4, 6>();
            pairs::<1, 4, 7>();
            pairs::<2, 5, 6>();
            pairs::<3, 5, 7>();
        }
    }
    2 * 4 * SIDE * SIDE * STEP * TURNS
}
