//! The vector operations that kernels are written in, once for all instruction sets.
//!
//! A kernel is a value that implements `Kernel`: generic over `Simd`, inlined into a function that
//! is compiled with the instruction set's features by `Isa::run`. A new instruction set is one
//! file that implements `Simd`, and a line in `Isa`.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;

use bytemuck::Pod;
use minisgl_tensor::{BackendError, Result};

/// Vectors of one instruction set; names as in the instruction manuals. A value of the type is the proof that this machine has it.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 in a vector; a multiple of 8, at most 16.
    const LANES: usize;
    /// A vector of f32.
    type F32: Copy;
    /// `LANES` f32 in memory.
    type Floats: Pod;

    fn splat(self, x: f32) -> Self::F32;
    fn load(self, from: &Self::Floats) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a · b + c`, rounded once where the machine can.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The sum of all lanes, in an order of its own that never changes.
    fn sum(self, x: Self::F32) -> f32;

    /// Up to `LANES` f32, zeros behind them.
    #[inline(always)]
    fn load_front(self, from: &[f32]) -> Self::F32 {
        let mut lanes: Self::Floats = bytemuck::Zeroable::zeroed();
        let lanes_slice: &mut [f32] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut lanes));
        lanes_slice[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// Whole vectors of `x`, and what is left.
    #[inline(always)]
    fn split(self, x: &[f32]) -> (&[Self::Floats], &[f32]) {
        let whole = x.len() / Self::LANES * Self::LANES;
        (bytemuck::cast_slice(&x[..whole]), &x[whole..])
    }
}

/// A computation to be compiled for every instruction set.
pub trait Kernel {
    /// Its result.
    type Output;
    /// Runs it. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug)]
pub enum Isa {
    /// AVX2, FMA and F16C: x86-64 since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// Plain Rust.
    Portable(portable::Portable),
}

/// The environment variable that chooses the instruction set where `IsaChoice::Auto` would.
pub const ISA_VARIABLE: &str = "MINISGL_CPU_ISA";

/// Which instruction set to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IsaChoice {
    /// What `MINISGL_CPU_ISA` says (`avx2`, `portable`), else the best there is.
    #[default]
    Auto,
    /// AVX2 or an error.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// Finds what `choice` asks for. Errors: the machine has not got it.
    pub fn detect(choice: IsaChoice) -> Result<Self> {
        let choice = match (choice, std::env::var(ISA_VARIABLE).ok().as_deref()) {
            (IsaChoice::Auto, Some("avx2")) => IsaChoice::Avx2,
            (IsaChoice::Auto, Some("portable")) => IsaChoice::Portable,
            (IsaChoice::Auto, Some(other)) if !other.is_empty() && other != "auto" => {
                let message = format!("{ISA_VARIABLE} is {other:?}; it can be avx2 or portable");
                return Err(BackendError::Unsupported(message.into()));
            }
            _ => choice,
        };
        #[cfg(target_arch = "x86_64")]
        if choice != IsaChoice::Portable
            && let Some(avx2) = avx2::Avx2::detect()
        {
            return Ok(Isa::Avx2(avx2));
        }
        if choice == IsaChoice::Avx2 {
            return Err(BackendError::Unsupported("this machine has no AVX2".into()));
        }
        Ok(Isa::Portable(portable::Portable))
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "AVX2",
            Isa::Portable(_) => "portable",
        }
    }

    /// Runs `kernel` as compiled for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(avx2) => avx2.run(kernel),
            Isa::Portable(portable) => kernel.run(portable),
        }
    }
}
