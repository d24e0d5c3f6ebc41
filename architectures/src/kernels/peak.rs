//! What this machine can do at best: the yardsticks of benchmarks.

use std::{hint::black_box, time::Instant};

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{
    Kernels, parallel,
    simd::{Kernel, Multiply, Simd},
};

/// Bytes that are read; more than caches hold.
const BYTES: usize = 256 << 20;
/// Bytes in a task.
const PIECE: usize = 1 << 20;
/// Tries, of which the best counts.
const TRIES: usize = 5;

/// Bytes per second that all threads together read from memory.
pub fn read_bandwidth(kernels: Kernels) -> f64 {
    let data = vec![1f32; BYTES / 4];
    let read = || parallel(BYTES / PIECE, |task| _ = black_box(kernels.run(Read(&data[task * PIECE / 4..][..PIECE / 4]))));
    (0..TRIES).map(|_| BYTES as f64 / seconds(read)).fold(0.0, f64::max)
}

/// Floating-point operations per second of all threads together that multiply bf16 weights and add, all in registers.
pub fn products(kernels: Kernels) -> f64 {
    const TASKS: usize = 256;
    let multiply = || parallel(TASKS, |_| _ = black_box(in_registers(kernels)));
    let operations = in_registers(kernels) * TASKS;
    (0..TRIES).map(|_| operations as f64 / seconds(multiply)).fold(0.0, f64::max)
}

/// Does operations of which there are so many.
fn in_registers(kernels: Kernels) -> usize {
    #[cfg(target_arch = "x86_64")]
    if kernels == Kernels::Amx && amx::has_amx() {
        // SAFETY: there are tiles.
        return unsafe { amx::in_registers() };
    }
    black_box(kernels.run(InRegisters)).1
}

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// The sum of numbers, in four streams.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: every load is within the slice.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            let stream = self.0.len() / 4;
            for at in (0..stream - stream % S::LANES).step_by(S::LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::mul_add(S::splat(1.0), S::load(self.0.as_ptr().add(i * stream + at)), *sum);
                }
            }
            S::sums(sums).iter().sum()
        }
    }
}

/// Returns something that depends on everything, and the number of operations.
struct InRegisters;

impl Kernel for InRegisters {
    type Output = (f32, usize);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (f32, usize) {
        const SUMS: usize = 12;
        const TURNS: usize = 20_000;
        // SAFETY: zeros in bf16 and in f32 are zero bytes, and there are more than any vector holds.
        unsafe {
            let zeros = black_box([0u8; 256]);
            let (w, x) = (S::Bf16::load(zeros.as_ptr()), S::Bf16::load_x(zeros.as_ptr().cast()));
            let mut sums = [S::splat(1.0); SUMS];
            for _ in 0..TURNS {
                for sum in &mut sums {
                    *sum = S::Bf16::mul_add(w, x, *sum);
                }
            }
            let mut total = 0.0;
            for four in sums.as_chunks::<4>().0 {
                total += S::sums(*four).iter().sum::<f32>();
            }
            (total, 2 * S::Bf16::LANES * SUMS * TURNS)
        }
    }
}
